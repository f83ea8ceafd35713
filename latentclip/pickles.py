"""Weights of a torch checkpoint (`epoch_34.pt`), read without running anything that is in it.

    weights = read_weights("epoch_34.pt")

Such a file is a zip of raw storages and one pickle, a program that says how tensors are made of them. The program is
never run: its instructions are read (`pickletools`), the few that describe plain values and tensors are followed, and
any other instruction or name ends the reading. No name is imported and nothing is called; what only a resumed training
needs, such as an optimizer's numpy scalars, is passed over. Tensors are views of the file, which is mapped.

torch.load(weights_only=True) calls no foreign code either, but what it allows cannot be narrowed: with torch 2.15.0 a
file of 300 bytes makes it hash for ever (nested tuples as a key) or allocate without bound (`bytearray(10**12)`), and
one of 3 MB ends the process.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from latentclip._pickled import Described, Description, RefusedError
from latentclip.errors import UsageError

_LARGEST = 2**24
"""Bytes of a pickle, and of a zip's directory. Those of the largest CLIPs, optimizer included, have 2 MB."""
_MEMBERS = re.compile(
    r"[^/\\]+/(data/[0-9]+|data\.pkl|byteorder|version|\.format_version|\.storage_alignment|\.data/serialization_id)"
)
_ZIP, _LOCAL, _END, _LOCATOR, _END64 = b"PK\3\4", b"PK\3\4", b"PK\5\6", b"PK\6\7", b"PK\6\6"


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name of a checkpoint's `state_dict`, or of a `.safetensors` file; without DDP's `module.`.

    Those of a checkpoint are views of the mapped file: copy what is to outlive it. Raises UsageError, naming the file,
    for whatever such a file does not hold: other code, other values, parts that are missing or packed.
    """
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"there is no file {file}; give a checkpoint as it was downloaded")
    try:
        weights = load_file(file) if file.suffix == ".safetensors" else _Checkpoint(file).weights()
    except RefusedError as reason:
        raise UsageError(f"{file} {reason}, so nothing of it is used; fetch it again from who published it") from None
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{file} cannot be read ({error}); fetch it again from who published it") from None
    return {name.removeprefix("module."): tensor for name, tensor in weights.items()}


class _Checkpoint:
    """A mapped checkpoint file, and where its members lie."""

    def __init__(self, file: Path) -> None:
        with file.open("rb") as opened:
            if opened.read(4) != _ZIP:
                raise RefusedError("is no zip as torch.save has written since version 1.6")
            self.file = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        self.members = self._find_members(file)

    def weights(self) -> dict[str, Tensor]:
        """The tensors of the state dict."""
        top = Description(self._member("data.pkl", _LARGEST)).read()
        described = top.get("state_dict", top) if type(top) is dict else None
        if type(described) is not dict or not described:
            raise RefusedError("holds no state_dict")
        for name, value in described.items():
            if type(name) is not str or type(value) is not Described:
                raise RefusedError("holds something else than tensors in its state_dict")
        weights = {name: self._tensor(value) for name, value in described.items()}
        if sum(tensor.nbytes for tensor in weights.values()) > len(self.file):
            raise RefusedError("describes more weights than it holds")
        return weights

    def _find_members(self, file: Path) -> dict[str, tuple[int, int]]:
        """Offset and size of each member, by its name without the archive's."""
        if _directory_size(self.file[-98:]) > _LARGEST:
            raise RefusedError("has no directory as torch.save writes it")
        try:
            with zipfile.ZipFile(file) as archive:
                found = archive.infolist()
        # NotImplementedError is zipfile's for a directory that asks for a later version of the format.
        except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
            raise RefusedError(f"is no whole zip ({error})") from None
        members = {}
        for info in found:
            if not _MEMBERS.fullmatch(info.filename) or info.compress_type or info.flag_bits & 1:
                raise RefusedError(f"holds {info.filename[:60]!r}, which torch.save does not write so")
            members[info.filename.partition("/")[2]] = (self._start(info), info.file_size)
        if len(members) < len(found):
            raise RefusedError("holds two members of one name")
        return members

    def _start(self, info: zipfile.ZipInfo) -> int:
        """Where a member's bytes begin: behind its local header, which has a size of its own."""
        header = self.file[info.header_offset : info.header_offset + 30]
        if len(header) < 30 or header[:4] != _LOCAL:
            raise RefusedError(f"has no {info.filename[:60]!r} where it should be")
        start: int = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
        if info.compress_size != info.file_size or start + info.file_size > len(self.file):
            raise RefusedError(f"ends within {info.filename[:60]!r}")
        return start

    def _member(self, name: str, most: int) -> bytes:
        start, size = self.members.get(name, (0, 0))
        if not 0 < size <= most:
            raise RefusedError(f"holds no {name} of a checkpoint's size")
        return self.file[start : start + size]

    def _tensor(self, described: Described) -> Tensor:
        """A view of the file; what it describes must lie within the storage, once."""
        storage, shape, strides = described.storage, described.shape, described.strides
        start, size = self.members.get(f"data/{storage.key}", (0, -1))
        values, reach = math.prod(shape), sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        inside = described.offset + reach < storage.elements and values <= storage.elements
        if storage.elements * storage.dtype.itemsize != size or (values and not inside):
            raise RefusedError("describes tensors that its storages do not hold")
        if not values:
            return torch.empty(shape, dtype=storage.dtype)
        if self.members.get("byteorder") and self._member("byteorder", 9) != b"little":
            raise RefusedError("was saved on a machine of another byte order")
        flat = torch.frombuffer(self.file, dtype=storage.dtype, count=storage.elements, offset=start)
        return flat.as_strided(shape, strides, described.offset)


def _directory_size(tail: bytes) -> int:
    """Size of a zip's directory, of which `tail` are the last 98 bytes: its end in zip64 and in the old form."""
    end, locator, end64 = tail[-22:], tail[-42:-22], tail[-98:-42]
    if len(end) < 22 or end[:4] != _END or end[20:] != b"\0\0":
        raise RefusedError("is cut off, or no zip of torch.save")
    size: int = struct.unpack("<I", end[12:16])[0]
    if locator[:4] != _LOCATOR:
        return size
    if end64[:4] != _END64:
        raise RefusedError("has no directory as torch.save writes it")
    size64: int = struct.unpack("<Q", end64[40:48])[0]
    return size64
