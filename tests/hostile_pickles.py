"""Pickles in a checkpoint's place: programs that run when Python reads them, and what no checkpoint describes."""

from __future__ import annotations

import functools
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

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


def body(program: bytes) -> bytes:
    """A pickle without its frame, to stand within another."""
    return (program[2:] if program[0] == 0x80 else program).removesuffix(b".")


def beside_weights(program: bytes) -> bytes:
    """A checkpoint whose weights are in order, and whose optimizer is `program`."""
    good = tensor_of(storage_of(b"K\x08"), 0, b"K\x08\x85", b"K\x01\x85")
    return body(good).join([b"\x80\x02", text("optimizer") + body(program) + b"s."])


SENSELESS = {
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
}
"""By what is wrong with them; nothing of it is a program, and a reader may hang or die of it all the same."""
