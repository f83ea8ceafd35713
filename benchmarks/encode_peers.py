"""Encoding beside the scripts that users write today: rate, and the work that a kill costs.

    pair shards  ->  ours: pipelines/encode.py
                 ->  plain: DataLoader, diffusers, torch.save into a tar
                 ->  ray: ray.data.read_webdataset, map_batches, write_parquet
    python benchmarks/encode_peers.py --source ../pairs --codec ../vae/taesdxl --image-size 256

Each is a program of its own, in turn, on the same machine, threads and batch size. The seconds are those of the whole
program, start-up included; also from the first pixels on (of ours, from the first shards on). Then each is killed once
it has encoded a share of the pairs: the work lost is what is encoded a second time.
"""

from __future__ import annotations

import io
import json
import os
import platform
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from latentclip import allocator
from latentclip.records import Record, finished
from latentclip.storage import Folder

ROOT = Path(__file__).parents[1]
IN_FLIGHT = 2
"""Shards that an encoder actor has in hand."""


@dataclass(frozen=True)
class Peers:
    """What is measured."""

    source: str
    """Folder of WebDataset tars."""
    codec: str = str(ROOT / "latentclip/codecs/demo")
    """Autoencoder, a local directory."""
    image_size: int = 64
    """Side of the encoded images, in pixels."""
    batch_size: int = 16
    """Images in one call of the codec."""
    shards: int = 30
    """The pairs are dealt into so many shards first; a shard's last batch is padded, so let them hold whole batches."""
    kill_at: float = 0.7
    """Share of the pairs after which a program is killed; 0: not at all."""
    programs: tuple[str, ...] = ("ours", "plain", "ray")
    """Which are measured."""
    compile: bool = False
    """Let ours compile its encoder."""
    program: str | None = None
    """Run one of the peers in this process; used by the benchmark itself."""
    out: str = ""
    """Where a peer writes."""


def deal(config: Peers, folder: Path) -> int:
    """Copy the samples into `shards` tars of equal size; returns how many there are."""
    samples: dict[str, list[tuple[str, bytes]]] = {}
    for path in sorted(Path(config.source).glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file:
                    samples.setdefault(f"{path.stem}-{member.name.split('.')[0]}", []).append(
                        (member.name.split(".", 1)[1], file.read())
                    )
    folder.mkdir()
    for number in range(config.shards):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for key in list(samples)[number :: config.shards]:
                for extension, data in samples[key]:
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return len(samples)


def note(out: str, event: str, samples: int = 0) -> None:
    """Append a line to what the benchmark reads: when something happened, and to how many samples."""
    with open(f"{out}.events", "a") as file:
        file.write(json.dumps({"event": event, "time": time.time(), "samples": samples}) + "\n")


def preprocess(data: bytes, size: int) -> np.ndarray:
    """What such scripts do: shorter side to the size, centre crop."""
    from PIL import Image
    from torchvision.transforms import v2

    image = Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(v2.CenterCrop(size)(v2.Resize(size, antialias=True)(image)))


def load_vae(config: Peers) -> Any:
    """The autoencoder as diffusers gives it."""
    import diffusers
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    name = json.loads((Path(config.codec) / "config.json").read_text())["_class_name"]
    return getattr(diffusers, name).from_pretrained(config.codec).eval()


def encode_batch(vae: Any, images: Any) -> Any:
    """(n, size, size, 3) uint8 -> (n, c, h, w) float16."""
    import torch

    with torch.no_grad():
        pixels = torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        output = vae.encode(pixels, return_dict=False)[0]
    return (output if isinstance(output, torch.Tensor) else output.mean).half()


def plain(config: Peers) -> None:
    """A DataLoader with one worker over webdataset, latents as torch.save members of one tar."""
    import torch
    import webdataset

    vae = load_vae(config)
    urls = sorted(map(str, Path(config.source).glob("*.tar")))
    dataset = (
        webdataset.WebDataset(urls, shardshuffle=False)
        .to_tuple("__key__", "jpg", "txt", "json")
        .map(lambda row: (row[0], preprocess(row[1], config.image_size), row[2], row[3]))
    )
    loader = torch.utils.data.DataLoader(dataset, batch_size=config.batch_size, num_workers=1, collate_fn=list)
    with tarfile.open(config.out, "w") as tar:
        for number, rows in enumerate(loader):
            if not number:
                note(config.out, "first")
            latents = encode_batch(vae, np.stack([row[1] for row in rows]))
            for (key, _, text, meta), latent in zip(rows, latents, strict=True):
                buffer = io.BytesIO()
                torch.save(latent.clone(), buffer)
                for extension, data in (("latent.pt", buffer.getvalue()), ("txt", text), ("json", meta)):
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
            note(config.out, "batch", len(rows))


class RayEncoder:
    """The actor of the Ray Data script."""

    def __init__(self, config: Peers) -> None:
        self.config = config
        self.vae = load_vae(config)
        self.first = True

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Encode a batch of decoded images."""
        if self.first:
            note(self.config.out, "first")
            self.first = False
        latents = encode_batch(self.vae, np.stack(list(batch.pop("image"))))
        note(self.config.out, "batch", len(latents))
        return {**batch, "latent": [latent.numpy().tobytes() for latent in latents]}


def ray_data(config: Peers) -> None:
    """Ray Data from end to end."""
    import ray

    ray.init(num_cpus=max(8, os.cpu_count() or 1), include_dashboard=False, log_to_driver=False)
    (
        ray.data.read_webdataset(config.source, decoder=None)
        .map(
            lambda row: {
                "key": row["__key__"],
                "text": row["txt"].decode(),
                "image": preprocess(row["jpg"], config.image_size),
            }
        )
        .map_batches(
            RayEncoder,
            fn_constructor_args=(config,),
            batch_size=config.batch_size,
            compute=ray.data.ActorPoolStrategy(size=1),
        )
        .write_parquet(config.out)
    )
    ray.shutdown()


def command(program: str, config: Peers, pairs: Path, out: Path) -> list[str]:
    """The command line of one program."""
    sizes = ("--image-size", str(config.image_size), "--batch-size", str(config.batch_size), "--codec", config.codec)
    if program == "ours":
        flags = (*sizes, *(["--compile"] if config.compile else []))
        return [sys.executable, "pipelines/encode.py", "photos", "--pairs", str(pairs), "--latents", str(out), *flags]
    arguments = ("--program", program, "--source", str(pairs), "--out", str(out), *sizes)
    return [sys.executable, "benchmarks/encode_peers.py", *arguments]


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own, so that all of it can be killed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)


def encoded(program: str, out: Path) -> int:
    """Samples that are encoded: for ours those of published shards, for the scripts all that they have computed."""
    if program == "ours":
        folder = Folder(out)
        return sum(Record.read(folder, name).counts.planned for name in finished(folder).values())
    return sum(event["samples"] for event in events(out))


def events(out: Path) -> list[dict[str, Any]]:
    """What a script has noted so far, the line that it is writing left out."""
    path = Path(f"{out}.events")
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def undisturbed(program: str, config: Peers, pairs: Path, out: Path, total: int) -> None:
    """Run one program to its end and print its rate."""
    began = time.time()
    if start(command(program, config, pairs, out)).wait():
        raise SystemExit(f"{program} failed")
    ended = time.time()
    assert encoded(program, out) == total
    if program == "ours":
        warm = after_first_shards(Folder(out))
    else:
        warm = total / (ended - next(event["time"] for event in events(out) if event["event"] == "first"))
    print(
        f"{program:6} {ended - began:7.1f} s, {total / (ended - began):.2f} pairs/s with start-up, {warm:.2f} without",
        flush=True,
    )


def after_first_shards(folder: Folder) -> float:
    """Pairs/s of the shards that were not in the actor's hands at the start."""
    modified = folder.modified()
    times = sorted((modified[name], Record.read(folder, name).counts.planned) for name in finished(folder).values())
    (begin, _), rest = times[IN_FLIGHT - 1], times[IN_FLIGHT:]
    return sum(pairs for _, pairs in rest) / (times[-1][0] - begin)


def killed(program: str, config: Peers, pairs: Path, out: Path, total: int) -> None:
    """Kill one program once it has encoded a share of the pairs, and print how much of that is encoded again."""
    process = start(command(program, config, pairs, out))
    while encoded(program, out) < config.kill_at * total:
        if process.poll() is not None:
            raise SystemExit(f"{program} ended before it was killed")
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = encoded(program, out)
    # The scripts know of nothing that is done. Ours repeats what its one actor had in hand.
    again = f"at most {IN_FLIGHT * -(-total // config.shards)}" if program == "ours" else f"{done}"
    print(f"       killed after {done} of {total}: {again} encoded a second time", flush=True)


def main(config: Peers) -> None:
    """Deal the shards, then measure each program."""
    if config.program:
        {"plain": plain, "ray": ray_data}[config.program](config)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        total = deal(config, folder / "pairs")
        for program in config.programs:
            undisturbed(program, config, folder / "pairs", folder / f"{program}-whole", total)
            if config.kill_at:
                killed(program, config, folder / "pairs", folder / f"{program}-killed", total)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "ray", "webdataset"))
    print(
        f"{total} pairs, {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, {packages}"
    )


if __name__ == "__main__":
    allocator.restart_with_it()
    main(tyro.cli(Peers))
