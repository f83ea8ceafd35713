"""The report of a run: gathers what the stages left on disk into one self-contained page.

    metrics.json, galleries.json, *.log.json, *.config.json, records, samples.jsonl  ->  OUT/report.html
    python pipelines/report.py --latents latents/ --pairs pairs/    # of an encoded data set alone

The demo and the evaluation make theirs when they end.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch
import tyro

from latentclip.codec import Codec, load_codec
from latentclip.dataset import LatentDataset
from latentclip.intervals import Metric
from latentclip.quality import summarise
from latentclip.quarantine import quarantined
from latentclip.records import SUFFIXES, Record, finished, record_name, split_generation
from latentclip.report import (
    Counts,
    Credit,
    Evaluation,
    Example,
    Gallery,
    Quality,
    Query,
    ReportData,
    Result,
    Stage,
    Training,
    build_report,
)
from latentclip.storage import Folder, locate, shard_stem
from latentclip.verify import Report
from pipelines.cluster import absolute, absolute_source, run_program
from pipelines.configs import ReportConfig
from pipelines.report_pictures import Pictures, Row
from pipelines.runlog import read_log

EXAMPLES = 6
"""Pairs shown with their latents, of each set."""
_PACKAGES = ("latentclip", "torch", "ray", "diffusers", "open_clip_torch", "transformers")
_DIRECTIONS = {"image_to_text": "From image to caption", "text_to_image": "From caption to image"}


@dataclass(frozen=True)
class LatentSet:
    """One evaluated set: its latent shards, and the pair shards they were made of if those are at hand."""

    latents: str
    pairs: str | None = None


@dataclass(frozen=True)
class ReportSources:
    """Where to find what the report shows. What is absent is left out of the page."""

    out: str
    """Folder of the evaluation (metrics.json, galleries.json), where report.html goes."""
    sets: Mapping[str, LatentSet]
    """The evaluated sets by name, those of `EvaluateConfig.latents`."""
    title: str
    headline: str
    """What this is, in one or two sentences."""
    run: str | None = None
    """Folder of the training run."""
    codec: Codec | None = None
    """Decodes pictures; None takes the packaged codec for the sets that are its."""
    notes: Sequence[str] = ()
    """Plain statements beside the metrics, for example what the model cannot do."""
    credits: Sequence[Credit] = ()
    stages: Sequence[Stage] = ()
    """Stages that came before encode, such as making the pairs."""
    galleries: Sequence[str] | None = None
    """Sets whose galleries are shown; all by default."""
    examples: Sequence[str] | None = None
    """Sets whose pairs are shown with their latents; the first by default."""
    seed: int = 0
    """Chooses the pairs shown."""


def write_report(sources: ReportSources) -> str:
    """Write OUT/report.html and return its path or URL.

    Raises UsageError if a set has no latents, or the codec is of another latent space than a set.
    """
    folder = Folder(sources.out)
    folder.replace("report.html", build_report(gather(sources)).encode())
    return folder.path("report.html")


def gather(sources: ReportSources) -> ReportData:
    """Everything the report shows, from the files of all stages."""
    out = Folder(sources.out)
    datasets = {name: LatentDataset(chosen.latents) for name, chosen in sources.sets.items()}
    metrics = _of_sets(_read_json(out, "metrics.json"), sources)
    evaluations = [_evaluation(name, values) for name, values in metrics.items()]
    counts = [_counts(name, dataset) for name, dataset in datasets.items()]
    training = _training(Folder(sources.run)) if sources.run else None
    pictures = {name: Pictures(dataset, sources.sets[name].pairs, sources.codec) for name, dataset in datasets.items()}
    return ReportData(
        title=sources.title,
        headline=sources.headline,
        figures=_figures(evaluations, counts, training),
        stages=[*sources.stages, *_stages(sources, datasets)],
        counts=counts,
        quality=[_quality(folder) for folder in _folders(datasets)],
        examples=_examples(sources, pictures),
        training=training,
        evaluations=evaluations,
        notes=list(sources.notes),
        galleries=list(_galleries(sources, _of_sets(_read_json(out, "galleries.json"), sources), pictures)),
        config={"Versions": versions(), "Machine": machine(), **_settings(sources, datasets)},
        credits=list(sources.credits),
        created=f"Made {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by pipelines/report.py.",
    )


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def machine() -> dict[str, str]:
    """What this machine is."""
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "platform": platform.platform(),
        "processors": str(os.cpu_count()),
        "accelerators": ", ".join(devices) or "none",
    }


def _read_json(folder: Folder, name: str) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(folder.read(name))
    except FileNotFoundError:
        return {}
    return values


def _of_sets(values: dict[str, Any], sources: ReportSources) -> dict[str, Any]:
    """Values by set; those of a single unnamed set stand at the top of its file."""
    if set(values) <= set(sources.sets):
        return values
    assert len(sources.sets) == 1, f"{sorted(values)} are not of the sets {sorted(sources.sets)}"
    return dict.fromkeys(sources.sets, values)


def _evaluation(name: str, values: dict[str, Any]) -> Evaluation:
    metrics = {measure: Metric(**metric) for measure, metric in values.items()}
    images, captions = metrics["image_to_text_r1"].n, metrics["text_to_image_r1"].n
    return Evaluation(name, f"{images:,} images, {captions:,} captions", metrics)


def _figures(evaluations: list[Evaluation], counts: list[Counts], training: Training | None) -> list[tuple[str, str]]:
    figures = []
    for evaluation in evaluations[:4]:
        measure, what = ("top1", "zero-shot top-1") if "top1" in evaluation.metrics else ("image_to_text_r1", "R@1")
        figures.append((f"{100 * evaluation.metrics[measure].value:.1f} %", f"{what}, {evaluation.name}"))
    stored, planned = (sum(getattr(count, name) for count in counts) for name in ("stored", "planned"))
    figures.append((f"{stored:,}", "images judged" if evaluations else "images stored"))
    if not evaluations:
        figures.append((f"{planned - stored:,}", "pairs not stored"))
    if training:
        figures.append((f"{training.steps[-1] + 1:,}", "training steps"))
    return figures


def _folders(datasets: Mapping[str, LatentDataset]) -> list[Folder]:
    """The folders that the shards of all sets are in; sets may share one."""
    return [Folder(url) for url in dict.fromkeys(locate(s.url)[0].url for d in datasets.values() for s in d.shards)]


def _name(folder: Folder) -> str:
    return "/".join(folder.url.rstrip("/").split("/")[-2:])


def _stages(sources: ReportSources, datasets: Mapping[str, LatentDataset]) -> Iterator[Stage]:
    for folder in _folders(datasets):
        encoded = read_log(folder, "encode.log.json")
        yield from _stage(encoded, "encode", f"pairs to latents: {_name(folder)}", "pairs")
    if sources.run:
        trained = read_log(Folder(sources.run), "train.log.json")
        yield from _stage(trained, "train", "latents and captions to a model", "pairs")
    evaluated = read_log(Folder(sources.out), "evaluate.log.json")[-1:]  # it starts anew each time
    yield from _stage(evaluated, "evaluate", "latents to features, ranked both ways", "images")


def _stage(entries: list[dict[str, Any]], name: str, detail: str, unit: str) -> Iterator[Stage]:
    """One stage over all its starts: an interrupted job went on where it was."""
    if entries:
        samples = sum(entry["samples"] for entry in entries)
        yield Stage(name, detail, sum(entry["seconds"] for entry in entries), samples, unit)


def _counts(name: str, dataset: LatentDataset) -> Counts:
    report = Report()
    with ThreadPoolExecutor(16) as pool:
        for record in pool.map(_record, (shard.url for shard in dataset.shards)):
            report.add(record)
    return Counts(
        name, report.planned, report.stored, dict(report.rejected), report.filtered, report.removed, report.pending
    )


def _quality(folder: Folder) -> Quality:
    done = finished(folder)
    with ThreadPoolExecutor(16) as pool:
        records = list(pool.map(lambda name: Record.read(folder, name), sorted(done.values())))
    return summarise(_name(folder), records, sorted(quarantined(folder, done)))


def _record(url: str) -> Record:
    return Record.read(locate(url)[0], record_name(*split_generation(shard_stem(url, SUFFIXES.values()))))


def _training(run: Folder) -> Training | None:
    """The course of a run from its samples.jsonl; a step that was done again after a stop counts once."""
    try:
        lines = run.read("samples.jsonl").decode().splitlines()
    except FileNotFoundError:
        return None
    steps = {line["step"]: line for line in map(_parse_line, lines) if line}
    if not steps:
        return None
    ordered = [steps[step] for step in sorted(steps)]
    settings = _read_json(run, "train.config.json").get("settings", {})
    contrastive = settings.get("optimisation", {}).get("loss") == "clip"

    def column(name: str) -> list[float]:
        return [line[name] for line in ordered] if all(name in line for line in ordered) else []

    return Training(
        steps=sorted(steps),
        loss=column("loss"),
        learning_rate=column("learning_rate"),
        logit_scale=column("logit_scale"),
        chance_loss=math.log(settings["batch_size"]) if contrastive else None,
    )


def _parse_line(line: str) -> dict[str, Any] | None:
    try:
        values: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:  # the last line of a run that was killed while writing it
        return None
    return values


def _examples(sources: ReportSources, pictures: Mapping[str, Pictures]) -> list[Example]:
    chosen = list(pictures)[:1] if sources.examples is None else sources.examples
    return [example for name in chosen for example in pictures[name].examples(EXAMPLES, sources.seed)]


def _galleries(
    sources: ReportSources, galleries: Mapping[str, Any], pictures: Mapping[str, Pictures]
) -> Iterator[Gallery]:
    for name, directions in galleries.items():
        if sources.galleries is not None and name not in sources.galleries:
            continue
        items = [item for queries in directions.values() for query in queries for item in (query, *query["results"])]
        rows = [Row(item["shard"], item["key"]) for item in items if "key" in item]
        shown = pictures[name].show(rows)

        def picture(item: dict[str, Any], shown: dict[Row, str] = shown) -> str | None:
            return shown[Row(item["shard"], item["key"])] if "key" in item else None

        for direction, queries in directions.items():
            title = f"{_DIRECTIONS[direction]}: {name}"
            yield Gallery(title, "", [_query(query, picture) for query in queries])


def _query(query: dict[str, Any], picture: Callable[[dict[str, Any]], str | None]) -> Query:
    results = [Result(item["caption"], item["hit"], item["score"], picture(item)) for item in query["results"]]
    return Query(query["caption"], results, query["rank"], picture(query))


def _settings(sources: ReportSources, datasets: Mapping[str, LatentDataset]) -> dict[str, dict[str, str]]:
    """The resolved configuration of each stage, as tables."""
    folders = {f"Encode: {_name(folder)}": (folder, "encode.config.json") for folder in _folders(datasets)}
    if sources.run:
        folders["Train"] = (Folder(sources.run), "train.config.json")
    folders["Evaluate"] = (Folder(sources.out), "evaluate.config.json")
    tables = {title: dict(_flat(_read_json(*place))) for title, place in folders.items()}
    return {title: table for title, table in tables.items() if table}


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def sources_of(config: ReportConfig) -> ReportSources:
    """What the page of an encoded data set shows."""
    latents = absolute(config.latents)
    pairs = absolute_source(config.pairs) if config.pairs else None
    return ReportSources(
        out=latents,
        sets={_name(Folder(latents)): LatentSet(latents, pairs)},
        codec=load_codec(config.codec) if config.codec else None,
        title="Latents of an image-text data set",
        headline=f"What is in {config.latents}, and whether it is fit to be trained on.",
    )


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 written, 2 for wrong input."""
    config = tyro.cli(ReportConfig, args=list(arguments), prog="report.py")
    print(f"report -> {write_report(sources_of(config))}")
    return 0


if __name__ == "__main__":
    run_program(main)
