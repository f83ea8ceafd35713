"""Judge a checkpoint by retrieval and zero-shot classification.

    latent shards  ->  image features, text features  ->  metrics.json, galleries.json, report.html
    python pipelines/evaluate.py demo --checkpoint runs/demo --latents latents/ --out runs/demo
    python pipelines/evaluate.py demo --latents known=latents/known unseen=latents/unseen

Ray Data hands the shards of all sets to one pool of actors that hold the model. Features are gathered here, where the
captions are embedded and everything is ranked. Only the plain view of each image is judged.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from latentclip.codec import load_codec
from latentclip.dataset import LatentDataset
from latentclip.errors import UsageError
from latentclip.intervals import Metric
from latentclip.loaded import Loaded, load
from latentclip.retrieval import Ranking, evaluate_retrieval, gallery, unique_captions
from latentclip.storage import Folder
from latentclip.zero_shot import Classes, class_features, evaluate_zero_shot, read_classes, read_templates
from pipelines.cluster import absolute, absolute_source, check_output, cluster, run_program, warn_unless_shared
from pipelines.configs import EvaluateConfig, parse, write_config
from pipelines.embedding import Embedded, embed
from pipelines.experiments import EXPERIMENTS
from pipelines.report import LatentSet, ReportSources, write_report
from pipelines.runlog import StageLog

UNNAMED = ""
"""Name of the only set where none is given; its metrics stand at the top of metrics.json."""

_TEXTS_AT_ONCE = 512


def named_sources(latents: Sequence[str]) -> dict[str, str]:
    """Where each set is: NAME=SOURCE by name, or a single SOURCE under `UNNAMED`; raises UsageError for a mixture.

    Local paths are made absolute.
    """
    sources: dict[str, str] = {}
    for value in latents:
        name, equals, source = value.partition("=")
        if not equals or "://" in name or Path(value).exists():
            name, source = UNNAMED, value
        if name in sources:
            raise UsageError(f"the set {name or value!r} needs a name of its own; give several sets as NAME=SOURCE")
        sources[name] = source
    if UNNAMED in sources and len(sources) > 1:
        raise UsageError(f"the set {sources[UNNAMED]!r} has no name; give several sets as NAME=SOURCE")
    if not sources:
        raise UsageError("there are no latents to evaluate; give --latents")
    return {name: absolute_source(source) for name, source in sources.items()}


def check(clip: Loaded, dataset: LatentDataset, label_column: str | None) -> None:
    """Raise UsageError unless the model reads these latents, there are any, and the label column is among theirs."""
    dataset.space.require_same_encoder(clip.space, mine=f"{dataset.source}", theirs=f"the checkpoint {clip.path}")
    with torch.no_grad():
        clip.encode_latents(torch.zeros(1, *dataset.dataset.one_shape()), dataset.space)
    filled = [index for index, shard in enumerate(dataset.shards) if shard.rows]
    if not filled:
        raise UsageError(
            f"{dataset.source} holds no latents, since no pair was stored; see its records for the reasons"
        )
    if label_column and label_column not in (columns := dataset.read(filled[0]).metadata):
        known = ", ".join(sorted(columns)) or "none"
        raise UsageError(f"{dataset.source} has no column {label_column!r}; its columns are: {known}")


def embed_captions(clip: Loaded, captions: Sequence[str]) -> dict[str, Tensor]:
    """Features (d,) of each distinct caption, so that sets with the same captions share the work."""
    texts, _ = unique_captions(captions)
    features: dict[str, Tensor] = {}
    with tqdm(total=len(texts), unit="caption", desc="evaluate", file=sys.stdout, mininterval=1) as progress:
        for first in range(0, len(texts), _TEXTS_AT_ONCE):
            some = texts[first : first + _TEXTS_AT_ONCE]
            features.update(zip(some, clip.encode_text(some), strict=True))
            progress.update(len(some))
    return features


def retrieve(
    images: Embedded, texts: Mapping[str, Tensor], device: torch.device, seed: int
) -> tuple[dict[str, Metric], dict[str, Any]]:
    """Retrieval metrics of one set by name, and what a few queries of each direction find."""
    captions, caption_of = unique_captions(images.captions)
    image_features = images.features.to(device)
    text_features = torch.stack([texts[caption] for caption in captions])
    own = torch.arange(len(captions))
    metrics = dict(evaluate_retrieval(image_features, text_features, caption_of, seed))
    to_text = gallery(image_features, text_features, caption_of, own, seed=seed)
    to_image = gallery(text_features, image_features, own, caption_of, seed=seed)

    def image(index: int) -> dict[str, str]:
        return {"caption": images.captions[index], "shard": images.shards[index], "key": images.keys[index]}

    def text(index: int) -> dict[str, str]:
        return {"caption": captions[index]}

    found = {
        "image_to_text": [_found(ranking, image, text) for ranking in to_text],
        "text_to_image": [_found(ranking, text, image) for ranking in to_image],
    }
    return metrics, found


def _found(ranking: Ranking, query: Any, candidate: Any) -> dict[str, Any]:
    results = zip(ranking.candidates, ranking.scores, ranking.hits, strict=True)
    return {
        **query(ranking.query),
        "rank": ranking.rank,
        "results": [{**candidate(index), "score": score, "hit": hit} for index, score, hit in results],
    }


@dataclass(frozen=True)
class Prompts:
    """What zero-shot classification is asked with."""

    classes: Classes | None
    """None takes the labels that occur."""
    templates: tuple[str, ...] | None
    """None takes the default templates."""


def read_prompts(config: EvaluateConfig) -> Prompts:
    """Read the files of class names and templates; raises UsageError for a bad one, or without a label column."""
    if (config.class_names or config.templates) and not config.label_column:
        raise UsageError("class names and templates are for zero-shot classification; give --label-column too")
    return Prompts(
        read_classes(config.class_names) if config.class_names else None,
        read_templates(config.templates) if config.templates else None,
    )


def classify(clip: Loaded, images: Embedded, prompts: Prompts, config: EvaluateConfig) -> dict[str, Metric]:
    """Zero-shot metrics of one set by name, over the images that have a label."""
    labelled = [place for place, label in enumerate(images.labels) if label is not None]
    labels = [_label(images.labels[place]) for place in labelled]
    if not labels:
        raise UsageError(f"no image has a value in the column {config.label_column!r}; choose another")
    classes = prompts.classes or _classes_of(labels, config.label_column)
    names = class_features(clip.model, clip.tokenizer, classes.names, prompts.templates)
    features = images.features[labelled].to(clip.device)
    return dict(evaluate_zero_shot(features, classes.index(labels), names, config.seed))


def _label(value: Any) -> str | int:
    if isinstance(value, float) and value.is_integer():  # whole numbers, in a column with gaps
        return int(value)
    return value if isinstance(value, str | int) else str(value)


def _classes_of(labels: Sequence[str | int], column: str | None) -> Classes:
    ids = sorted({str(label) for label in labels})
    if all(isinstance(label, int) for label in labels):
        raise UsageError(f"the column {column!r} holds numbers, which say nothing; give the names with --class-names")
    return Classes(tuple(label.replace("_", " ") for label in ids), tuple(ids))


def run(config: EvaluateConfig) -> dict[str, Any]:
    """The stage: writes metrics.json and galleries.json and returns the metrics, by set if the sets are named."""
    check_output(config.out)
    config = replace(config, checkpoint=absolute(config.checkpoint))  # actors may run in another directory
    sets = {name: LatentDataset(source) for name, source in named_sources(config.latents).items()}
    clip = load(config.checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
    prompts = read_prompts(config)
    codec = load_codec(config.codec) if config.codec else None
    for dataset in sets.values():
        check(clip, dataset, config.label_column)
        if codec:  # the report would refuse it too, after the work
            dataset.space.require_same_encoder(codec.space, mine=dataset.source, theirs="the codec for the report")
    folder = Folder(config.out)
    with cluster(config.ray_address), StageLog(folder, "evaluate") as log:
        warn_unless_shared(config.out)
        write_config(folder, "evaluate.config.json", config)
        embedded = embed(config, sets)
        log.samples = sum(len(images.keys) for images in embedded.values())
        metrics, galleries = judge(config, clip, embedded, prompts)
        for name, values in (("metrics.json", metrics), ("galleries.json", galleries)):
            flat = values.get(UNNAMED, values)
            folder.replace(name, (json.dumps(flat, indent=1) + "\n").encode())
    return metrics.get(UNNAMED, metrics)


def judge(
    config: EvaluateConfig, clip: Loaded, embedded: Mapping[str, Embedded], prompts: Prompts
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics (`Metric.to_json`) and galleries of each set, by its name."""
    texts = embed_captions(clip, [caption for images in embedded.values() for caption in images.captions])
    metrics, galleries = {}, {}
    for name, images in embedded.items():
        found, galleries[name] = retrieve(images, texts, clip.device, config.seed)
        if config.label_column:
            found |= classify(clip, images, prompts, config)
        metrics[name] = {measure: metric.to_json() for measure, metric in found.items()}
    return metrics, galleries


def report_sources(config: EvaluateConfig) -> ReportSources:
    """What the report of this evaluation alone can show."""
    checkpoint = Path(config.checkpoint)
    runs = (checkpoint, *checkpoint.absolute().parents[1:2])  # the run itself, or that of RUN/checkpoints/step_N
    run_folder = next((str(folder) for folder in runs if (folder / "samples.jsonl").is_file()), None)
    return ReportSources(
        out=config.out,
        sets={name or source: LatentSet(source) for name, source in named_sources(config.latents).items()},
        run=run_folder,
        codec=load_codec(config.codec) if config.codec else None,
        title="Latent-CLIP evaluation",
        headline=f"The checkpoint {config.checkpoint}, judged on latents it reads without decoding them.",
    )


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 done, 2 for wrong input."""
    defaults = {name: (value.description, value.evaluate) for name, value in EXPERIMENTS.items()}
    _, config = parse(defaults, arguments, "evaluate.py")
    sources = report_sources(config)
    metrics = run(config)
    for name, values in metrics.items() if "value" not in next(iter(metrics.values())) else [("", metrics)]:
        shown = ", ".join(f"{measure} {metric['value']:.3g}" for measure, metric in values.items())
        print(f"evaluate: {name + ': ' if name else ''}{shown}")
    print(f"evaluate: report -> {write_report(sources)}")
    return 0


if __name__ == "__main__":
    run_program(main)
