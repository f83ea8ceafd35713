"""Training steps beside open_clip's own trainer: samples/s of both in turn, on the same model, batches and recipe.

    latent shards  ->  latentclip.fit.Fit: loader, checks, step, log           ->  samples/s, share of waiting, memory
    their batches, ready in memory  ->  open_clip_train.train.train_one_epoch  ->  samples/s; ratio, losses compared
    python benchmarks/train_step.py --json steps.json

Sizes follow the device: a small and a paper's model on CPUs in fp32; on a GPU both of the paper's architectures in
bf16, plain, with gradient checkpointing and compiled. Ours reads shards from disk, while open_clip's trainer is handed
batches that lie in memory (on GPUs page-locked), so that no loader slows it down. Checkpoints are in neither. Both
begin with the same weights, and the losses of all steps are compared, which proves that they do the same work.
Captions are as long as alt texts are, and ours computes no padding; TFLOP/s and MFU count what ours does compute, and
what gradient checkpointing repeats does not count. Memory is of a GPU alone: most of a round beside weights and
moments, and what `latentclip.cost` says it is. Runs without Ray.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from train_step_contestants import SPACE, WARM, OpenClip, Ours, Round, place, ready, write_latents  # beside this file

from latentclip.cost import DEVICES, Cost
from latentclip.fit import FitSettings
from latentclip.training import Optimisation, autocast

COUNTED = 64
"""Samples whose FLOPs are counted."""
TOLERANCE = {"fp32": 1e-4, "bf16": 0.02}
"""Most by which the losses of the two may differ, as a share."""


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    model: str
    grid: int
    batch: int
    steps: int
    checkpointing: bool = False
    compile: bool = False

    @property
    def name(self) -> str:
        """What it is called in the table."""
        options = (" checkpointed" if self.checkpointing else "") + (" compiled" if self.compile else "")
        return f"{self.model.removeprefix('Latent-')}, batch {self.batch}{options}"


CASES = {
    "cpu": (Case("Latent-ViT-tiny", 16, 256, 4), Case("Latent-ViT-B-8-512", 64, 16, 2)),
    "cuda": tuple(
        Case(model, 64, batch, 10, checkpointing, compiled)
        for model, batch in (("Latent-ViT-B-8-512", 1024), ("Latent-ViT-B-4-512-plus", 384))
        for checkpointing, compiled in ((False, False), (True, False), (False, True))
    ),
}


@dataclass(frozen=True)
class StepBenchmark:
    """What is measured."""

    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    rounds: int = 6
    """Rounds in which both take turns."""
    only: str = ""
    """Measure the cases alone whose name in the table has this in it, such as `compiled`."""
    json: str | None = None
    """File for all figures."""


def measure(config: StepBenchmark, case: Case, folder: Path) -> dict[str, Any]:
    """The figures of one case."""
    device, steps = torch.device(config.device), config.rounds * (WARM + case.steps)
    precision: Literal["bf16", "fp32"] = "bf16" if config.device == "cuda" else "fp32"
    dataset = write_latents(folder / "latents", case.model, case.grid, 8 * case.batch)
    recipe = Optimisation(precision=precision)
    settings = FitSettings(
        case.model,
        steps,
        batch_size=case.batch,
        optimisation=recipe,
        gradient_checkpointing=case.checkpointing,
        compile=case.compile,
    )
    ours = Ours(dataset, folder / "run", settings, place(device), report=lambda _: None, say=lambda _: None)
    model = ours.training.model
    bare = uncompiled(model)
    bare.set_grad_checkpointing(False)
    theirs = OpenClip(uncompiled(model), ready(ours, steps), recipe, device, compiled=case.compile)
    rounds: dict[str, list[Round]] = {"ours": [], "open_clip": []}
    for number in range(config.rounds):
        order = ("ours", "open_clip") if number % 2 else ("open_clip", "ours")
        for name in order:
            if config.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            rounds[name].append((ours if name == "ours" else theirs).round(case.steps))
    compare(rounds, TOLERANCE[precision])
    cost = Cost(bare.cpu(), ours.training.config, SPACE, case.grid, recipe, checkpointing=case.checkpointing)
    bare._groups = model._groups  # of captions, which checkpointing has fewer of
    found = figures(case, rounds, cost, flops(bare.to(device), *theirs.batches[0]))
    return {"case": asdict(case), **found}


def uncompiled(model: Any) -> Any:
    """A copy of a model as it was before `compile`."""
    bare = copy.deepcopy(model)
    for module in bare.modules():
        module._compiled_call_impl = None
    return bare


def flops(model: Any, latents: Tensor, text: Tensor) -> float:
    """FLOPs of a sample's forward and backward pass, each computed once, on average over some of a batch."""
    device, some = next(model.parameters()).device, slice(COUNTED)
    with FlopCounterMode(display=False) as counter, autocast(device, "auto"):
        images, texts, *_ = model(latents[some].to(device, torch.float32), text[some])
        (images.sum() + texts.sum()).backward()
    return counter.get_total_flops() / len(images)


def compare(rounds: dict[str, list[Round]], tolerance: float) -> None:
    """End with an error unless both had the same losses."""
    ours, theirs = ([loss for found in rounds[name] for loss in found.losses] for name in ("ours", "open_clip"))
    worst = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    if worst > tolerance:
        raise SystemExit(f"the losses differ by {worst:.2g}, so that the two do not do the same work")


def figures(case: Case, rounds: dict[str, list[Round]], cost: Cost, sample_flops: float) -> dict[str, Any]:
    """What the table shows of a case, and the rounds themselves."""
    rates = {name: [case.batch / found.seconds for found in each] for name, each in rounds.items()}
    reached = statistics.median(rates["ours"]) * sample_flops
    last = rounds["ours"][-1].memory  # gradients and moments are there before it begins
    return {
        "rates": rates,
        "ratios": [ours / theirs for ours, theirs in zip(rates["ours"], rates["open_clip"], strict=True)],
        "processor_ratios": [
            theirs.processor / ours.processor for ours, theirs in zip(rounds["ours"], rounds["open_clip"], strict=True)
        ],
        "waiting": [found.waiting for found in rounds["ours"]],
        "tflops": reached / 1e12,
        "utilisation": reached / peak if (peak := nominal_flops()) else None,
        "memory": last,
        "estimated_memory": cost.activations(case.batch) + cost.memory(case.batch).loss,
        "losses": {name: [loss for found in each for loss in found.losses] for name, each in rounds.items()},
    }


def nominal_flops() -> float | None:
    """The GPU's nominal FLOP/s in bf16, where `latentclip.cost` knows it."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((device.flops for known, device in DEVICES.items() if known in name), None)


def table(found: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Lines of the table; the ratio is the median over rounds, with the least and the most.

    CPU is the median ratio of processor time, which says more where other work shares the machine.
    """
    head = (
        "samples/s ours",
        "open_clip",
        "ratio",
        "least",
        "most",
        "CPU",
        "waiting",
        "TFLOP/s",
        "MFU",
        "GB",
        "GB est.",
    )
    yield f"{'':44}" + "".join(f"{name:>15}" if name == head[0] else f"{name:>10}" for name in head)
    for row in found:
        ours, theirs = (statistics.median(row["rates"][name]) for name in ("ours", "open_clip"))
        ratios, use = row["ratios"], row["utilisation"]
        memory = (f"{row[name] / 1e9:.1f}" if row["memory"] else "-" for name in ("memory", "estimated_memory"))
        cells = (
            f"{theirs:.1f}",
            *(f"{value(ratios):.3f}" for value in (statistics.median, min, max)),
            f"{statistics.median(row['processor_ratios']):.3f}",
            f"{statistics.median(row['waiting']):.2%}",
            f"{row['tflops']:.3g}",
            f"{use:.1%}" if use else "-",
            *memory,
        )
        yield f"{Case(**row['case']).name:44}{ours:15.1f}" + "".join(f"{cell:>10}" for cell in cells)


def machine() -> Iterator[str]:
    """Lines that say where this was measured, and with what."""
    cuda = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads"
    yield f"{name}, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}"
    yield ", ".join(f"{package} {version(package)}" for package in ("torch", "open_clip_torch", "timm"))


def main(config: StepBenchmark) -> None:
    """Measure all cases and print the table with the machine and the versions."""
    header, found = list(machine()), []

    def rows() -> Iterator[dict[str, Any]]:
        for case in CASES[config.device]:
            if config.only in case.name:
                with tempfile.TemporaryDirectory() as folder:
                    found.append(measure(config, case, Path(folder)))
                yield found[-1]

    print("\n".join([*header, f"{config.rounds} rounds", ""]))
    for line in table(rows()):
        print(line, flush=True)
    if config.json:
        Path(config.json).write_text(json.dumps({"header": header, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(StepBenchmark))
