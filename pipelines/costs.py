"""What a training would need in memory and time, as the table that `train.py --dry-run` prints."""

from __future__ import annotations

from collections.abc import Iterator

from latentclip.cost import DEVICES, Cost, Memory
from latentclip.dataset import LatentDataset
from latentclip.model import build_model, resolve_config
from latentclip.place import team_size
from latentclip.training import build_optimiser
from pipelines.configs import TrainConfig

NUMBERS = (1, 8, 128)
"""Numbers of devices in the table, beside that of the configured workers: one, a node, the paper's cluster."""
ROOM = 0.9
"""Share of a device's memory that tensors may fill; the rest is for what `latentclip.cost` does not see."""
HEADER = ("devices", "at a time", "parts", "GB", "state", "towers", "loss", "samples/s", "MB/s", "s/step", "days")
LEGEND = (
    "at a time: most samples that fit beside the rest, and a worker's parts of the batch (--micro-batch); GB: the "
    "memory of a device, of which state is weights, moments and gradients; MB/s: latents that a device reads"
)


def costs(config: TrainConfig) -> str:
    """A table: one row for each number of devices. Raises UsageError for a model that cannot be built."""
    dataset = LatentDataset(config.latents)
    space, grid, settings = dataset.space, dataset.dataset.grid, config.settings
    model_config = resolve_config(settings.model, space, grid)
    model = build_model(model_config, space, grid)
    build_optimiser(model, settings.optimisation)  # which freezes what is not trained
    cost = Cost(
        model,
        model_config,
        space,
        grid,
        settings.optimisation,
        checkpointing=settings.gradient_checkpointing,
        averaged=settings.average is not None,
        sharded=settings.shard_weights,
    )
    numbers = sorted({team_size(settings.batch_size, number) for number in (*NUMBERS, config.workers)})
    rows = [HEADER, *(tuple(row(config, cost, number)) for number in numbers)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in rows]
    return "\n".join([*summary(config, cost), *table, LEGEND])


def summary(config: TrainConfig, cost: Cost) -> Iterator[str]:
    """Lines about what does not depend on the number of devices."""
    device, settings = DEVICES[config.device], config.settings
    yield (
        f"{settings.model}: {cost.vision / 1e6:.1f} M parameters of vision and {cost.text / 1e6:.1f} M of text; "
        f"a sample takes {cost.forward_flops / 1e9:.1f} GFLOP forward and {cost.training_flops / 1e9:.1f} in training"
    )
    kept = "with" if cost.checkpointing else "without"
    yield (
        f"batch {settings.batch_size:,}, {'bf16' if cost.half else 'fp32'}, {kept} gradient checkpointing; "
        f"on {config.device}: {device.memory / 1e9:.0f} GB, {device.flops / 1e12:.0f} TFLOP/s, of which "
        f"{config.utilisation:.0%} are taken for reached (--utilisation)"
    )


def row(config: TrainConfig, cost: Cost, workers: int) -> Iterator[str]:
    """The cells of one number of devices."""
    device, batch = DEVICES[config.device], config.settings.batch_size
    share = batch // workers
    fitting = cost.micro_batch(batch, workers, ROOM * device.memory)
    memory = cost.memory(batch, workers, fitting or 1)
    yield from (f"{workers:,}", f"{fitting:,}" if fitting else "none", f"{share // fitting:,}" if fitting else "-")
    yield from (f"{value / 1e9:.1f}" for value in parts(memory))
    rate = cost.samples_per_second(batch, workers, device, in_parts=fitting != share, utilisation=config.utilisation)
    yield from (f"{rate:,.0f}", f"{rate / workers * cost.latent_bytes / 1e6:,.0f}", f"{batch / rate:.2f}")
    steps = config.settings.steps
    yield f"{steps * batch / rate / 86_400:.1f}" if steps else "-"


def parts(memory: Memory) -> tuple[int, ...]:
    """Bytes in all, and those of the state, of the towers, and of the loss with its features."""
    state = memory.weights + memory.moments + memory.gradients
    return memory.total, state, memory.activations, memory.loss + memory.features
