"""Ways to spoil the newest checkpoint of a run, by name; each takes its folder. For tests of what finds a good one."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from latentclip import _commit
from latentclip._commit import COMMIT

Spoil = Callable[[Path], Any]
WEIGHTS, MOMENTS, STATE = "model.safetensors", "optimiser.safetensors", "state.json"
FILES = (WEIGHTS, MOMENTS, STATE, "model.json", "latent_space.json", "tokenizer/bpe_simple_vocab_16e6.txt.gz", COMMIT)


def commit_again(folder: Path) -> None:
    """Make a changed folder whole again, as a writer with a fault of its own would leave it."""
    (folder / COMMIT).unlink()
    _commit.commit(folder)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size * 2 // 3)


def flip(file: Path, share: float) -> None:
    """Flip a bit at a share of the file's length."""
    content = bytearray(file.read_bytes())
    content[int(share * (len(content) - 1))] ^= 4
    file.write_bytes(content)


def in_every_file() -> dict[str, Spoil]:
    """What a disk does."""
    found: dict[str, Spoil] = {}
    for name in FILES:
        found[f"{name} cut off"] = lambda folder, name=name: cut(folder / name)
        found[f"{name} empty"] = lambda folder, name=name: (folder / name).write_bytes(b"")
        found[f"{name} missing"] = lambda folder, name=name: (folder / name).unlink()
        for place, share in {"head": 0.0, "middle": 0.5, "tail": 1.0}.items():
            found[f"{name} flipped at its {place}"] = lambda folder, name=name, share=share: flip(folder / name, share)
    return found


def replaced(name: str, make: Spoil) -> Spoil:
    """Something else where a file should be."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return spoil


def instead(make: Spoil) -> Spoil:
    """Something else where the folder should be; the folder itself lies beside the run."""

    def spoil(folder: Path) -> None:
        folder.rename(folder.parents[2] / "moved")
        make(folder)

    return spoil


def content(name: str, data: bytes) -> Spoil:
    """Other bytes in a file, and a commit that vouches for them."""

    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(data)
        commit_again(folder)

    return spoil


def values(name: str, change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """A JSON file with other values, committed."""

    def spoil(folder: Path) -> None:
        before = json.loads((folder / name).read_bytes())
        content(name, json.dumps(change(before)).encode())(folder)

    return spoil


def state(**changes: Any) -> Spoil:
    return values(STATE, lambda before: before | changes)


def tensors(name: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Spoil:
    """A safetensors file with other tensors, committed."""

    def spoil(folder: Path) -> None:
        save_file(change(load_file(folder / name)), folder / name)
        commit_again(folder)

    return spoil


def filled(key: str, value: float) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda before: before | {key: torch.full_like(before[key], value)}


def without(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda before: {name: value for name, value in before.items() if name != key}


def header(entries: dict[str, Any], size: int | None = None) -> bytes:
    """A safetensors file of 8 bytes of data with a header of one's choice."""
    text = json.dumps(entries).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + bytes(8)


def forged(files: dict[str, Any]) -> Spoil:
    return lambda folder: (folder / COMMIT).write_text(_commit.commit_text(files))


def of_format(version: object) -> Spoil:
    """A commit that is right in the terms of another format version."""

    def spoil(folder: Path) -> None:
        commit = json.loads((folder / COMMIT).read_text())["commit"] | {"format_version": version}
        digest = hashlib.sha256(json.dumps(commit, sort_keys=True).encode()).hexdigest()
        (folder / COMMIT).write_text(json.dumps({"commit": commit, "sha256": digest}, sort_keys=True))

    return spoil


def io_error(folder: Path) -> None:
    """A file of the right size that cannot be read, by root neither."""
    (folder / STATE).unlink()
    (folder / STATE).symlink_to("/proc/self/mem")
    forged({STATE: {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}})(folder)


def named_twice(folder: Path) -> None:
    text = (folder / STATE).read_text().replace('"step": 6', '"step": 6, "step": 6')
    content(STATE, text.encode())(folder)


def lacking(name: str) -> Spoil:
    """Without a file, and a commit that does not name it."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        commit_again(folder)

    return spoil


def older_content(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("step_00000004"), folder)


PASSED_OVER: dict[str, Spoil] = {
    **in_every_file(),
    "a folder where the weights should be": replaced(WEIGHTS, Path.mkdir),
    "a folder where the commit should be": replaced(COMMIT, Path.mkdir),
    "a pipe where the commit should be": replaced(COMMIT, os.mkfifo),
    "a pipe where the state should be": replaced(STATE, os.mkfifo),
    "weights that are a dangling link": replaced(WEIGHTS, lambda file: file.symlink_to("nowhere")),
    "weights that are a link to themselves": replaced(WEIGHTS, lambda file: file.symlink_to(file)),
    "a commit that is a link to /dev/zero": replaced(COMMIT, lambda file: file.symlink_to("/dev/zero")),
    "a commit of a terabyte": lambda folder: os.truncate(folder / COMMIT, 1 << 40),
    "a commit of deep brackets": lambda folder: (folder / COMMIT).write_text("[" * 200_000),
    "a commit that is no UTF-8": lambda folder: (folder / COMMIT).write_bytes(b'{"commit": "\xff"}'),
    "the commit of an older folder": lambda folder: shutil.copy(folder.with_name("step_00000004") / COMMIT, folder),
    "a commit of no files": forged({}),
    "a commit without hashes": forged({STATE: {}}),
    "a commit whose files are a list": lambda folder: (folder / COMMIT).write_text('{"commit": {"files": []}}'),
    "a commit of a file outside": forged({"../step_00000004/state.json": {"bytes": 1, "sha256": ""}}),
    "a commit of /etc/passwd": forged({"/etc/passwd": {"bytes": 1, "sha256": ""}}),
    "a file that cannot be read": io_error,
    "a future format": of_format(2),
    "an unknown format": of_format("x"),
    "an empty folder": instead(Path.mkdir),
    "a file named as the folder": instead(Path.touch),
    "a dangling link named as the folder": instead(lambda folder: folder.symlink_to("nowhere")),
    "a link to itself named as the folder": instead(lambda folder: folder.symlink_to(folder)),
    "a link to an older folder": instead(lambda folder: folder.symlink_to("step_00000004")),
    "the content of an older folder": older_content,
    "weights with NaN": tensors(WEIGHTS, filled("logit_scale", float("nan"))),
    "weights with Inf": tensors(WEIGHTS, filled("visual.proj", float("inf"))),
    "weights of another type": tensors(WEIGHTS, lambda t: t | {"visual.proj": t["visual.proj"].half()}),
    "weights of another shape": tensors(WEIGHTS, lambda t: t | {"visual.proj": t["visual.proj"][:1].clone()}),
    "a weight missing": tensors(WEIGHTS, without("visual.proj")),
    "a weight too many": tensors(WEIGHTS, lambda t: t | {"more": torch.ones(1)}),
    "a pickle as weights": content(WEIGHTS, pickle.dumps({"logit_scale": 1.0})),
    "a header of an exabyte": content(WEIGHTS, header({}, size=1 << 60)),
    "overlapping tensors": content(
        WEIGHTS, header({name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in "ab"})
    ),
    "a header that is no JSON": content(WEIGHTS, (4).to_bytes(8, "little") + b"{{{{"),
    "moments with NaN": tensors(MOMENTS, filled("0.exp_avg", float("nan"))),
    "moments of another model": tensors(MOMENTS, lambda t: t | {"0.exp_avg": torch.zeros(3, 3)}),
    "moments of integers": tensors(MOMENTS, lambda t: t | {"0.exp_avg": t["0.exp_avg"].long()}),
    "a moment missing": tensors(MOMENTS, without("0.exp_avg_sq")),
    "the moments of a weight missing": tensors(MOMENTS, lambda t: {k: v for k, v in t.items() if k[:2] != "0."}),
    "moments of a weight too many": tensors(MOMENTS, lambda t: t | {"9999.step": torch.tensor(1.0)}),
    "moments without a number": tensors(MOMENTS, lambda t: t | {"exp_avg": torch.tensor(1.0)}),
    "a pickle as moments": content(MOMENTS, pickle.dumps({})),
    "a state of another step": state(step=5),
    "a state whose step is a word": state(step="6"),
    "a state whose step is true": state(step=True),
    "a state before the first step": state(step=-6),
    "a state without a step": values(STATE, without("step")),
    "a state of negative seconds": state(elapsed=-1.0),
    "a state with NaN": state(elapsed=float("nan")),
    "a state with Infinity": state(elapsed=float("inf")),
    "a state that skips words": state(skips=["1"]),
    "a state that skips a batch twice": state(skips=[1, 1]),
    "a state of another seed": state(seed=7),
    "a state of another batch size": state(batch_size=24),
    "a state that is a list": content(STATE, b"[]"),
    "a state that is no JSON": content(STATE, b"step: 6"),
    "a state of deep brackets": content(STATE, b"[" * 200_000),
    "a state that names its step twice": named_twice,
    "a state of a later step": state(step=99),
    "no state": lacking(STATE),
    "no snapshot": lacking("snapshot.json"),
    "another model": values("model.json", lambda before: before | {"embed_dim": 32}),
    "a model that is no config": content("model.json", b"{}"),
    "another latent space": values(
        "latent_space.json", lambda m: m | {"latent_space": m["latent_space"] | {"encoder_hash": "f" * 16}}
    ),
    "a latent space without a name": values("latent_space.json", lambda m: m | {"latent_space": {}}),
    "another grid": values("latent_space.json", lambda before: before | {"grid": 8}),
    "a tokenizer that is no archive": content(FILES[5], b"no archive"),
}


def outside(folder: Path) -> Path:
    """The folder moved out of its run."""
    return folder.rename(folder.parents[2] / "moved")


def beside(name: str | bytes, make: Callable[[Any], Any]) -> Spoil:
    """Something more in the folder of checkpoints."""
    return lambda folder: make(Path(os.fsdecode(os.path.join(os.fsencode(folder.parent), os.fsencode(name)))))


def copied(name: str) -> Spoil:
    """A copy of the newest under another name."""
    return lambda folder: shutil.copytree(folder, folder.with_name(name))


HARMLESS: dict[str, Spoil] = {
    "weights that are a link out of the run": lambda folder: (folder / WEIGHTS).symlink_to(
        (folder / WEIGHTS).rename(folder.parents[2] / "weights")
    ),
    "a link out of the run named as the folder": lambda folder: folder.symlink_to(outside(folder)),
    "a file more": lambda folder: (folder / "notes.txt").write_text("mine"),
    "deep folders more": lambda folder: (folder / "/".join("d" * 200)).mkdir(parents=True),
    "a half-written folder": beside(".step_00000007.0123abcd.partial", Path.mkdir),
    "a half-written folder that is a file": beside(".step_00000007.0123abcd.partial", Path.touch),
    "a step beyond every number": copied("step_99999999999999999999"),
    "a negative step": copied("step_-1"),
    "a copy by hand": copied("step_00000009 (copy)"),
    "a copy under a later step": copied("step_00000009"),
    "the step a second time": copied("step_6"),
    "a step in other digits": copied("step_٠٠٠٠٠٠٠٩"),
    "a name that is no UTF-8": beside(b"step_0000000\xff", Path.mkdir),
    "a file named as a later step": beside("step_00000010", Path.touch),
    "an empty folder named as a later step": beside("step_00000010", Path.mkdir),
    "a folder without a number": beside("step_final", Path.mkdir),
    "a torn snapshot of Ray Train": beside(
        "checkpoint_manager_snapshot.json", lambda file: file.write_text('{"checkpoint_results": [{"che')
    ),
}
