"""The values that every pair container yields, and the rules that hold for all of them."""

from __future__ import annotations

import json
import math
import unicodedata
from dataclasses import dataclass, field
from typing import Any

from latentclip.captions import normalise_caption
from latentclip.errors import UsageError
from latentclip.rejects import Reason, Rejected

_KEY_LIMIT = 512
"""Bytes of UTF-8."""


class ShardUnreadable(UsageError):  # noqa: N818 - it says what the shard is
    """A pair shard of which nothing can be trusted; the message names it and says why. Other shards go on."""


@dataclass(frozen=True)
class Pair:
    """One image-text pair, its image still encoded."""

    key: str
    image: bytes
    caption: str
    """As `captions.normalise_caption` returns it."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """The source's other columns as JSON values; no NaN, and integers of at most 64 bits."""


@dataclass(frozen=True)
class Refusal:
    """One pair that cannot be read."""

    key: str
    """Escaped to printable ASCII where the key is what is invalid; "" where it is unknown."""
    reason: Reason


@dataclass(frozen=True)
class PairColumns:
    """Where a shard keeps what: member extensions of a tar, column names of a Parquet file. The first found wins."""

    image: tuple[str, ...] = ("jpg", "jpeg", "png", "webp", "avif", "gif", "image", "image_bytes")
    caption: tuple[str, ...] = ("txt", "caption", "text")
    """Also looked up in a tar sample's JSON, if it has no member of these extensions. Of a list of captions, in JSON or
    in a Parquet column, the first that is not blank is taken, and all are kept as the column `captions`."""
    key: str = "key"

    def metadata_only(self, columns: dict[str, Any], caption: str | None) -> dict[str, Any]:
        """Return `columns` as plain JSON values, without the key and the caption (of the column named `caption`)."""
        left_out = {"key", "caption", self.key, caption}
        kept = {plain_json(name): plain_json(value) for name, value in columns.items() if name not in left_out}
        all_captions = columns.get(caption or "")
        if isinstance(all_captions, list):
            kept["captions" if "captions" not in kept else f"source_{caption}"] = plain_json(all_captions)
        return kept


def make_pair(key: str, image: bytes | None, caption: bytes | str | None, metadata: dict[str, Any]) -> Pair:
    """Put a pair together; raises Rejected for a missing image and for what `normalise_caption` refuses."""
    if image is None:
        raise Rejected(Reason.IMAGE_MISSING)
    return Pair(key, image, normalise_caption(caption), metadata)


def first_caption(value: Any) -> Any:
    """Of a list of captions the first that is not blank, None if there is none; any other value as it is."""
    if not isinstance(value, list):
        return value
    return next((caption for caption in value if isinstance(caption, str | bytes) and caption.strip()), None)


def check_key(key: str) -> None:
    """Raise Rejected KEY_INVALID for a key that could not name a file inside a tar of its own.

    That is: empty, longer than 512 bytes, not UTF-8, with control characters, absolute, or under `..`.
    """
    *folders, base = key.split("/")
    unprintable = any(unicodedata.category(character) in {"Cc", "Cs"} for character in key)
    if not base or unprintable or key.startswith("/") or ".." in folders:
        raise Rejected(Reason.KEY_INVALID)
    if len(key.encode()) > _KEY_LIMIT:
        raise Rejected(Reason.KEY_INVALID, f"longer than {_KEY_LIMIT} bytes")


def refuse(key: str, reason: Reason) -> Refusal:
    """Return the refusal; an invalid key is escaped, so that records and terminals can hold it."""
    if reason is Reason.KEY_INVALID:
        key = key[:_KEY_LIMIT].encode("unicode_escape").decode()
    return Refusal(key, reason)


def parse_json(data: bytes) -> dict[str, Any]:
    """Parse a sample's JSON object, NaN and infinities as None; raises Rejected METADATA_BROKEN."""
    try:
        values = json.loads(data.decode("utf-8-sig"), parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise Rejected(Reason.METADATA_BROKEN, str(error)) from None
    if not isinstance(values, dict):
        raise Rejected(Reason.METADATA_BROKEN, "not an object")
    return values


def plain_json(value: Any) -> Any:
    """Return a value as JSON and Arrow can hold it: no NaN, no lone surrogate, dates and decimals as text."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**63 else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {plain_json(str(name)): plain_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(part) for part in value]
    return str(value)
