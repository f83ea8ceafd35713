"""Zero-shot classification: an image's class is the one whose prompts lie nearest (Radford et al., 2021, 3.1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from open_clip import OPENAI_IMAGENET_TEMPLATES
from open_clip.zero_shot_classifier import build_zero_shot_classifier
from torch import Tensor

from latentclip.errors import UsageError
from latentclip.intervals import Metric, mean_per_class, proportion
from latentclip.retrieval import ranks

_BLANK = "{}"
_TEXTS_AT_ONCE = 1024


@dataclass(frozen=True)
class Classes:
    """Class names as prompts say them, and the ids by which the data's labels call them (the names, if not given)."""

    names: tuple[str, ...]
    ids: tuple[str, ...]

    def __post_init__(self) -> None:
        for what, values in (("name", self.names), ("id", self.ids)):
            value, times = Counter(values).most_common(1)[0]
            if times > 1:
                raise UsageError(f"the class {what} {value!r} is given {times} times; give every class once")

    def index(self, labels: Sequence[str | int]) -> Tensor:
        """Class index of each label, (n,) int64; raises UsageError naming the labels that no class has.

        A label is a class's id, else its name, else (an integer) its place in the file, from 0.
        """
        known: dict[str | int, int] = {place: place for place in range(len(self.names))}
        known |= {name: place for place, name in enumerate(self.names)}
        known |= {int(id_): place for place, id_ in enumerate(self.ids) if id_.isdecimal()}
        known |= {id_: place for place, id_ in enumerate(self.ids)}
        if missing := sorted({str(label) for label in labels if label not in known}):
            shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise UsageError(f"{len(missing)} labels are no class ({shown}); add them to the class names file")
        return torch.tensor([known[label] for label in labels], dtype=torch.int64)


def read_classes(path: str | Path) -> Classes:
    """Read class names, one a line: `name`, or `id<TAB>name` where the data's labels are ids.

    Raises UsageError if the file is absent or empty, or names a class twice.
    """
    pairs = [line.split("\t", 1) for line in _lines(path, "class names")]
    return Classes(tuple(pair[-1].strip() for pair in pairs), tuple(pair[0].strip() for pair in pairs))


def read_templates(path: str | Path) -> tuple[str, ...]:
    """Read prompt templates, one a line, each with `{}` where the class name goes.

    Raises UsageError if the file is absent or empty, or a template has no `{}`.
    """
    templates = _lines(path, "templates")
    for template in templates:
        if _BLANK not in template:
            raise UsageError(f"the template {template!r} in {path} has no {{}}; put {{}} where the class name goes")
    return tuple(templates)


def class_features(
    model: Any, tokenizer: Callable[[list[str]], Tensor], names: Sequence[str], templates: Sequence[str] | None = None
) -> Tensor:
    """Text features of the classes, (classes, d): the mean over templates of normalised features, renormalised.

    `model` has open_clip's `encode_text(tokens, normalize=True)`. The default templates are CLIP's 80 for ImageNet.
    """
    fills: Sequence[Callable[[str], str]] = (
        [partial(_fill, template) for template in templates] if templates else OPENAI_IMAGENET_TEMPLATES
    )
    weights = build_zero_shot_classifier(
        model,
        tokenizer,
        classnames=names,
        templates=fills,
        num_classes_per_batch=max(1, _TEXTS_AT_ONCE // len(fills)),
        device=next(model.parameters()).device,
    )
    return weights.T


def evaluate_zero_shot(
    image_features: Tensor, labels: Tensor, classes: Tensor, seed: int = 0
) -> Iterator[tuple[str, Metric]]:
    """Yield (name, Metric) for `top1`, `top5` (of all classes where they are fewer) and `mean_per_class_recall`.

    `image_features` (n, d), `labels` (n,) class indices, `classes` (classes, d) features. Ties count against the
    model, as in retrieval. Raises UsageError for features that are not finite, and where there is no image.
    """
    found = ranks(image_features, classes, labels, torch.arange(len(classes)))
    top = min(5, len(classes))
    yield "top1", proportion(found <= 1, 1 / len(classes), seed)
    yield "top5", proportion(found <= top, top / len(classes), seed)
    yield "mean_per_class_recall", mean_per_class(found <= 1, labels.cpu().numpy(), 1 / len(classes), seed)


def _fill(template: str, name: str) -> str:
    # str.format would trip over other braces in a template.
    return template.replace(_BLANK, name)


def _lines(path: str | Path, what: str) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the {what} file {path} ({error}); give a UTF-8 text file, one a line") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UsageError(f"the {what} file {path} is empty; write one a line")
    return lines
