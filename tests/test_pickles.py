"""Checkpoints from outside: their weights are read, and nothing in them is ever run."""

from __future__ import annotations

import copyreg
import functools
import io
import os
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from latentclip.errors import UsageError
from latentclip.pickles import read_weights

GOOD = b"\x80\x02}X\x0a\x00\x00\x00state_dict}s."


def archive(file: Path, program: bytes, members: Mapping[str, bytes] | None = None, **options: Any) -> Path:
    """A checkpoint file whose pickle is `program`."""
    with zipfile.ZipFile(file, "w", **options) as opened:
        for name, data in {"epoch_34/data.pkl": program, "epoch_34/version": b"3\n", **(members or {})}.items():
            opened.writestr(name, data)
    return file


def text(value: str) -> bytes:
    """The instruction that puts a string on the stack."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def tensor_of(storage: bytes, offset: int, shape: bytes, strides: bytes) -> bytes:
    """A pickle of {"state_dict": {"w": one tensor}}; storage, shape and strides are instructions."""
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K" + bytes([offset]) + shape + strides
    return b"\x80\x02}" + text("state_dict") + b"}" + text("w") + tensor + b"\x89ccollections\nOrderedDict\n)RtRss."


def storage_of(elements: bytes) -> bytes:
    return b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + elements + b"tQ"


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


class Runs:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def live(command: str, canary: str) -> dict[str, bytes]:
    """Pickles that touch the canary as soon as Python's own pickle reads them."""
    nested = io.BytesIO()
    torch.save(Runs(os.system, command), nested)
    called = text(command) + b"\x85R"
    system, ordered = b"cos\nsystem\n", b"ccollections\nOrderedDict\n"
    bytes_of_a_tensor = b"B" + struct.pack("<I", nested.tell()) + nested.getvalue()
    importing = b"cbuiltins\n__import__\n" + text("os") + b"\x85R"
    return {
        "a call by REDUCE": pickle.dumps(Runs(os.system, command), protocol=2),
        "builtins.eval": pickle.dumps(Runs(eval, f"__import__('os').system({command!r})"), protocol=2),
        "Python 2's name": b"\x80\x02c__builtin__\nexec\n" + text(f"import os; os.system({command!r})") + b"\x85R.",
        "a numpy function": b"\x80\x02cnumpy\nsavetxt\n" + text(canary) + b"K\x01\x85\x86R.",
        "a stack global": pickle.dumps(Runs(os.system, command), protocol=4),
        "a dotted global": b"\x80\x04" + text("torch.serialization") + text("os.system") + b"\x93" + called + b".",
        "getattr": b"\x80\x02cbuiltins\ngetattr\n" + importing + text("system") + b"\x86R" + called + b".",
        "INST": b"(" + text(command) + b"ios\nsystem\n.",
        "OBJ": b"(" + system + text(command) + b"o.",
        "a state set by BUILD": pickle.dumps(Runs(functools.partial(os.system, command)), protocol=2),
        "a tensor's bytes": b"\x80\x03ctorch.storage\n_load_from_bytes\n" + bytes_of_a_tensor + b"\x85R.",
        "an extension": b"\x80\x02\x82\xf0" + called + b".",
        "a memo written twice": b"\x80\x02" + ordered + b"q\x000" + system + b"q\x000h\x00" + called + b".",
        "a numpy type's argument": b"\x80\x02cnumpy\ndtype\n" + text("f8") + b"\x85R" + system + called + b"\x86.",
        "attributes of a dictionary": b"\x80\x02" + ordered + b")R}" + text("items") + system + called + b"sb.",
        "a key": b"\x80\x02}" + system + called + b"K\x01s.",
    }


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


def body(program: bytes) -> bytes:
    """A pickle without its frame, to stand within another."""
    return (program[2:] if program[0] == 0x80 else program).removesuffix(b".")


def beside_weights(program: bytes) -> bytes:
    """A checkpoint whose weights are in order, and whose optimizer is `program`."""
    good = tensor_of(storage_of(b"K\x08"), 0, b"K\x08\x85", b"K\x01\x85")
    return body(good).join([b"\x80\x02", text("optimizer") + body(program) + b"s."])


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
    {
        "a key whose hash takes for ever": b"\x80\x02}K\x01\x85" + b"q\x00h\x00\x86" * 60 + b"K\x01s.",
        "a key too deep for the stack": b"\x80\x02}K\x01\x85" + b"\x85" * 500_000 + b"K\x01s.",
        "more instructions than a checkpoint has": b"\x80\x02]" + b"]0" * 2**20 + b".",
        "an allocation": b"\x80\x02cbuiltins\nbytearray\n\x8a\x06" + (10**12).to_bytes(6, "little") + b"\x85R.",
        "a tensor's constructor": b"\x80\x02ctorch\nFloatTensor\n\x8a\x06" + (10**12).to_bytes(6, "little") + b"\x85R.",
        "a large number": b"\x80\x02\x8b" + struct.pack("<I", 2**20) + bytes(2**20) + b".",
        "one value as a million": tensor_of(storage_of(b"K\x08"), 0, b"M\xff\xffM\xff\xff\x86", b"K\x00K\x00\x86"),
        "a storage longer than its member": tensor_of(storage_of(b"K\x10"), 0, b"K\x10\x85", b"K\x01\x85"),
        "values behind the storage": tensor_of(storage_of(b"K\x08"), 4, b"K\x08\x85", b"K\x01\x85"),
        "strides beyond the storage": tensor_of(storage_of(b"K\x08"), 0, b"K\x04\x85", b"K\x04\x85"),
        "a negative shape": tensor_of(storage_of(b"K\x08"), 0, b"J\xff\xff\xff\xff\x85", b"K\x01\x85"),
        "a shape of strings": tensor_of(storage_of(b"K\x08"), 0, text("a") + b"\x85", b"K\x01\x85"),
        "a storage of another kind": tensor_of(b"(" + text("module") + b"NNNNtQ", 0, b")", b")"),
        "a storage that is a string": tensor_of(text("0") + b"Q", 0, b")", b")"),
        "a state_dict of numbers": b"\x80\x02}" + text("state_dict") + b"}" + text("a") + b"K\x01ss.",
        "no dictionary": b"\x80\x02]K\x01a.",
        "an empty dictionary": b"\x80\x02}.",
        "attributes of a name": b"\x80\x02ccollections\nOrderedDict\n}b.",
        "a value called": b"\x80\x02}K\x01\x85R.",
        "an allowed name with other arguments": b"\x80\x02ccollections\nOrderedDict\n]\x85R.",
        "nothing to take": b"\x80\x020.",
        "a mark that is missing": b"\x80\x02t.",
        "a memo that was never written": b"\x80\x02h\x05.",
        "no end": b"\x80\x02}",
        "no pickle": b"<html></html>",
        "a name that is no text": b"\x80\x02c\xff\n\xff\n.",
    }.items(),
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
