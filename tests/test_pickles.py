"""Checkpoints from outside: their weights are read, and nothing in them is ever run."""

from __future__ import annotations

import copyreg
import io
import os
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile_pickles import GOOD, SENSELESS, Runs, archive, beside_weights, body, live, storage_of, tensor_of, text
from safetensors.torch import save_file

from latentclip.errors import UsageError
from latentclip.pickles import read_weights


def weights() -> OrderedDict[str, torch.Tensor]:
    values = OrderedDict(
        (f"module.{name}", tensor)
        for name, tensor in torch.nn.Conv2d(4, 8, 3, dtype=torch.bfloat16).state_dict().items()
    )
    values._metadata = torch.nn.Linear(1, 1).state_dict()._metadata  # as every module's state dict has
    values["module.turned"] = torch.arange(12).view(3, 4).T
    values["module.part"] = torch.arange(10.0)[3:7]
    values["module.scale"] = torch.tensor(2.5, dtype=torch.float16)
    values["module.none"] = torch.empty(0, 3)
    values["module.parameter"] = torch.nn.Parameter(torch.ones(2))
    return values


def as_open_clip_saves() -> dict[str, Any]:
    """What open_clip's trainer puts into epoch_34.pt, with the numpy scalars that its schedule leaves there."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimiser = torch.optim.AdamW([parameter], betas=(0.9, 0.98))
    parameter.grad = torch.ones(3)
    optimiser.step()
    optimiser.param_groups[0] |= {"lr": np.float64(1e-3), "steps": np.int64(3), "flag": np.bool_(True)}
    state = {"epoch": 34, "name": "run", "state_dict": weights(), "optimizer": optimiser.state_dict()}
    return state | {"scaler": {"scale": 65536.0, "growth_interval": 2000, "_growth_tracker": 2**40}}


def same(found: dict[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    names = [name.removeprefix("module.") for name in expected]
    equal = (a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found.values(), expected.values(), strict=True))
    return list(found) == names and all(equal)


@pytest.mark.parametrize("take", [lambda state: state, lambda state: state["state_dict"]])
def test_weights_of_a_training_checkpoint(take: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    state = as_open_clip_saves()
    torch.save(take(state), tmp_path / "epoch_34.pt")
    assert same(read_weights(tmp_path / "epoch_34.pt"), state["state_dict"])


def test_numpys_older_name(tmp_path: Path) -> None:
    """numpy 1 had its scalars in another module, and the published checkpoints are of its time."""
    torch.save(as_open_clip_saves(), tmp_path / "new.pt")
    with zipfile.ZipFile(tmp_path / "new.pt") as new:
        members = {name: new.read(name) for name in new.namelist()}
    [name] = [name for name in members if name.endswith("data.pkl")]
    assert b"cnumpy._core.multiarray\n" in members[name]
    members[name] = members[name].replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    with zipfile.ZipFile(tmp_path / "old.pt", "w") as old:
        for member, data in members.items():
            old.writestr(member, data)
    assert same(read_weights(tmp_path / "old.pt"), weights_of(tmp_path / "new.pt"))


def weights_of(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=False)["state_dict"]


def test_safetensors(tmp_path: Path) -> None:
    save_file({"module.a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert read_weights(tmp_path / "model.safetensors")["a"].tolist() == [1, 1]
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(UsageError, match="cannot be read"):
        read_weights(tmp_path / "model.safetensors")


def test_the_file_stays_as_it_is(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(4)}, tmp_path / "a.pt")
    before = (tmp_path / "a.pt").read_bytes()
    read_weights(tmp_path / "a.pt")["a"].zero_()
    assert (tmp_path / "a.pt").read_bytes() == before


LIVE = list(live("", ""))


@pytest.fixture(autouse=True)
def extension() -> Iterator[None]:
    copyreg.add_extension("os", "system", 0xF0)
    yield
    copyreg.remove_extension("os", "system", 0xF0)


def refused(file: Path) -> str:
    """The one sentence with which a file is refused."""
    with pytest.raises(UsageError) as error:
        read_weights(file)
    sentence = str(error.value)
    assert str(file) in sentence
    assert "; " in sentence  # a remedy follows
    assert "\n" not in sentence
    assert len(sentence) < len(str(file)) + 250
    return sentence


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", LIVE)
def test_programs_are_not_run(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    program = live(f"touch {canary}", str(canary))[name]
    for whole in (program, b"\x80\x02}" + text("state_dict") + body(program) + b"s.", beside_weights(program)):
        refused(archive(tmp_path / "a.pt", whole, {"epoch_34/data/0": bytes(32)}))
        assert not canary.exists()
    pickle.loads(program)  # so that this test cannot pass with a program that does nothing
    assert canary.exists()


def test_what_is_asked_for_is_named(tmp_path: Path) -> None:
    members = {"epoch_34/data/0": bytes(32)}
    assert list(read_weights(archive(tmp_path / "good.pt", beside_weights(b"N."), members))) == ["w"]
    hostile = beside_weights(pickle.dumps(Runs(os.system, "true"), protocol=2))
    assert "asks for 'posix.system', which no checkpoint needs" in refused(archive(tmp_path / "a.pt", hostile, members))


def test_older_formats_of_torch(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    hostile = Runs(os.system, f"touch {canary}")
    torch.save(hostile, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    with tarfile.open(tmp_path / "tar.pt", "w") as tar:
        for member in ("storages", "tensors", "pickle"):
            data = pickle.dumps(hostile, protocol=2)
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(hostile))
    for name in ("legacy", "tar", "bare"):
        assert "no zip as torch.save has written" in refused(tmp_path / f"{name}.pt")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("member", "options"),
    [
        ("../../canary", {}),
        ("/tmp/canary", {}),
        ("epoch_34/data/../../canary", {}),
        ("epoch_34\\..\\canary", {}),
        ("epoch_34/link", {}),
        ("epoch_34/constants.pkl", {}),
        ("epoch_34/code/__torch__.py", {}),
        ("epoch_34/other.pkl", {}),
        ("epoch_34/DATA.PKL", {}),
        ("other/data.pkl", {}),
        ("epoch_34/data/0", {"compression": zipfile.ZIP_DEFLATED}),
    ],
)
def test_members_that_torch_does_not_write(member: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Traversal, links, TorchScript, a second pickle, and what would unpack to far more than it is."""
    refused(archive(tmp_path / "a.pt", GOOD, {member: bytes(10**6)}, **options))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt"]


@pytest.mark.parametrize(
    "program",
    SENSELESS.items(),
    ids=lambda item: item[0],
)
def test_pickles_that_no_checkpoint_has(program: tuple[str, bytes], tmp_path: Path) -> None:
    refused(archive(tmp_path / "a.pt", program[1], {"epoch_34/data/0": bytes(32)}))


def test_many_tensors_of_one_storage(tmp_path: Path) -> None:
    """What is small in the file must not become large in memory, so a storage counts as often as it is used."""
    values = torch.ones(10**5)
    torch.save({str(number): values for number in range(100)}, tmp_path / "a.pt")
    assert "more weights than it holds" in refused(tmp_path / "a.pt")


def test_every_truncation(tmp_path: Path) -> None:
    torch.save(as_open_clip_saves(), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for size in [*range(0, 64, 7), *range(64, len(whole), 401), len(whole) - 1]:
        (tmp_path / "cut.pt").write_bytes(whole[:size])
        refused(tmp_path / "cut.pt")


def test_bytes_behind_and_before(tmp_path: Path) -> None:
    torch.save(as_open_clip_saves(), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for name, data in {"behind": whole + b"x", "before": b"MZ" + whole, "twice": whole + whole[:50]}.items():
        (tmp_path / f"{name}.pt").write_bytes(data)
        refused(tmp_path / f"{name}.pt")


def test_flipped_bytes_are_weights_or_a_sentence(tmp_path: Path) -> None:
    torch.save(as_open_clip_saves(), tmp_path / "whole.pt")
    whole = bytearray((tmp_path / "whole.pt").read_bytes())
    generator = np.random.default_rng(0)
    outcomes = set()
    for place in generator.integers(0, len(whole), 400):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(generator.integers(8))
        (tmp_path / "a.pt").write_bytes(flipped)
        try:
            read_weights(tmp_path / "a.pt")
            outcomes.add("weights")
        except UsageError:
            outcomes.add("sentence")
    assert outcomes == {"weights", "sentence"}


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "loop.pt").symlink_to("loop.pt")
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "empty.pt").touch()
    for name in ("pipe.pt", "loop.pt", "folder.pt", "empty.pt", "missing.pt"):
        refused(tmp_path / name)


def test_another_byte_order(tmp_path: Path) -> None:
    program = tensor_of(storage_of(b"K\x08"), 0, b"K\x08\x85", b"K\x01\x85")
    members = {"epoch_34/data/0": np.arange(8, dtype="<f4").tobytes(), "epoch_34/byteorder": b"little"}
    assert read_weights(archive(tmp_path / "a.pt", program, members))["w"].tolist() == list(range(8))
    assert "byte order" in refused(archive(tmp_path / "b.pt", program, members | {"epoch_34/byteorder": b"big"}))
