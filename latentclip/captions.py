"""Captions: from whatever a shard holds to clean text, or a typed reject."""

from __future__ import annotations

import unicodedata

from latentclip.rejects import Reason, Rejected

CAPTION_LIMIT = 8192
"""Bytes of UTF-8. A tokenizer reads some 77 tokens; what is longer than this is a page, not a caption."""

# Joiners and variation selectors are spelling, not decoration: they build emoji (family, flags, red heart) and the
# letter forms of Persian, Arabic and Indic words. They mean nothing only where they follow nothing, at a word's start.
_JOINERS = "\u200c\u200d" + "".join(map(chr, range(0xFE00, 0xFE10)))

# Invisible and direction-changing characters let a caption show one thing and tokenize as another.
_REMOVED = [0x00AD, 0x061C, 0x180E, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2060, 0x2070), 0xFEFF]
_CONTROL = [*range(0x20), *range(0x7F, 0xA0)]  # all of Unicode's category Cc
_CLEANED = dict.fromkeys(_REMOVED, "") | dict.fromkeys(_CONTROL, " ")

# NFC shortens UTF-8 at most threefold (Hangul: three jamo of three bytes to one syllable).
_NFC_SHRINKS_BY = 3


def normalise_caption(raw: bytes | str | None, limit: int = CAPTION_LIMIT) -> str:
    """Return the caption as one line of NFC text without control, invisible or direction-changing characters.

    `raw` is text, or bytes of strict UTF-8; `limit` counts bytes of UTF-8 after normalisation. Applying it twice
    changes nothing. Raises Rejected: CAPTION_MISSING (None), CAPTION_ENCODING (not UTF-8, or a lone surrogate),
    CAPTION_EMPTY (nothing visible), CAPTION_TOO_LONG.
    """
    if raw is None:
        raise Rejected(Reason.CAPTION_MISSING)
    words = _decode(raw).translate(_CLEANED).split()
    text = " ".join(word for word in (word.lstrip(_JOINERS) for word in words) if word)
    if not text:
        raise Rejected(Reason.CAPTION_EMPTY)
    # Before NFC too, since sorting a long run of combining marks takes time quadratic in its length.
    _check_length(text, limit * _NFC_SHRINKS_BY)
    text = unicodedata.normalize("NFC", text)
    _check_length(text, limit)
    return text


def _decode(raw: bytes | str) -> str:
    try:
        return raw.decode() if isinstance(raw, bytes) else raw.encode().decode()
    except UnicodeError as error:
        raise Rejected(Reason.CAPTION_ENCODING, str(error)) from None


def _check_length(text: str, limit: int) -> None:
    if (size := len(text.encode())) > limit:
        raise Rejected(Reason.CAPTION_TOO_LONG, f"{size} bytes, at most {limit}")
