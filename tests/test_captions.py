import unicodedata

import hostile
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentclip.captions import CAPTION_LIMIT, normalise_caption
from latentclip.rejects import Reason, Rejected


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("a dog", "a dog"),
        (b"a dog", "a dog"),
        ("  a\t dog\r\n\u00a0on\u2028 grass ", "a dog on grass"),
        ("a\0dog\x1b[31m\x85", "a dog [31m"),
        ("cafe\u0301", "caf\u00e9"),
        ("e\u200b\u0301", "\u00e9"),
        ("\ufeffinvoice\u202egpj.exe\u202c \u2066x\u2069", "invoicegpj.exe x"),
        ("ze\u200bro\u2060wi\u00addth", "zerowidth"),
        ("\u4e00\u53ea\u72d7", "\u4e00\u53ea\u72d7"),
        ("<script>alert(1)</script>", "<script>alert(1)</script>"),
        ("=cmd|' /C calc'!A0", "=cmd|' /C calc'!A0"),
        ("<|endoftext|> a dog", "<|endoftext|> a dog"),
        ("a \u200d\ufe0f dog", "a dog"),
    ],
)
def test_captions_become_one_clean_line(raw: str | bytes, clean: str) -> None:
    assert normalise_caption(raw) == clean


@pytest.mark.parametrize(
    "text",
    [
        "\U0001f468\u200d\U0001f469\u200d\U0001f467 family",
        "\u2764\ufe0f\u200d\U0001f525 heart on fire",
        "1\ufe0f\u20e3",
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
    ],
)
def test_joiners_inside_words_are_spelling(text: str) -> None:
    assert normalise_caption(text) == text


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (None, Reason.CAPTION_MISSING),
        ("", Reason.CAPTION_EMPTY),
        (" \n\t\u3000", Reason.CAPTION_EMPTY),
        (b"\0\0", Reason.CAPTION_EMPTY),
        ("\u200b\u200d\ufe0f", Reason.CAPTION_EMPTY),
        (b"caf\xe9", Reason.CAPTION_ENCODING),
        (b"\xed\xa0\x80", Reason.CAPTION_ENCODING),
        ("lone \ud800", Reason.CAPTION_ENCODING),
        ("x" * 10_000, Reason.CAPTION_TOO_LONG),
        ("x" * 1_000_000, Reason.CAPTION_TOO_LONG),
        ("\u72d7" * 2731, Reason.CAPTION_TOO_LONG),
        ("\u0301\u0316" * 500_000, Reason.CAPTION_TOO_LONG),
    ],
)
def test_unusable_captions_are_rejected_by_reason(raw: str | bytes | None, reason: Reason) -> None:
    assert hostile.outcome(normalise_caption, raw) is reason


def test_limit_counts_bytes_after_normalisation() -> None:
    assert len(normalise_caption("x" * CAPTION_LIMIT)) == CAPTION_LIMIT
    assert len(normalise_caption("\u72d7" * 2730)) == 2730
    assert normalise_caption("x" + " " * 1_000_000 + "y") == "x y"
    hangul = unicodedata.normalize("NFD", "\uac01" * 2730)
    assert len(hangul.encode()) > 3 * CAPTION_LIMIT - 30
    assert len(normalise_caption(hangul)) == 2730
    with pytest.raises(Rejected, match="at most 4"):
        normalise_caption("12345", limit=4)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.binary(), st.text(" \t\u200b\u200c\u200d\ufe0f\u0301\u212ae\u2000")))
def test_any_input_is_cleaned_once_for_all_or_rejected(raw: str | bytes) -> None:
    text = hostile.outcome(normalise_caption, raw)
    if text in {Reason.CAPTION_EMPTY, Reason.CAPTION_ENCODING}:
        return
    assert text == " ".join(text.split()) != ""
    assert unicodedata.is_normalized("NFC", text)
    assert not any(unicodedata.category(character) == "Cc" for character in text)
    assert normalise_caption(text) == text
