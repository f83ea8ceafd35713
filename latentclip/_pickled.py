"""What the pickle of a torch checkpoint describes, found by reading its instructions and running none of them."""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from typing import Any

import torch

_MOST_INSTRUCTIONS = 2**20
_DTYPES = {
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch DoubleStorage": torch.float64,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
_ORDERED_DICT, _TENSOR, _PARAMETER = (
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
)
_PASSED_OVER = {
    "_codecs encode",
    "numpy dtype",
    "numpy.core.multiarray scalar",
    "numpy._core.multiarray scalar",
}
"""What numpy scalars are pickled as; their values are of no interest here."""
_NAMES = {*_DTYPES, _ORDERED_DICT, _TENSOR, _PARAMETER, *_PASSED_OVER}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK, _SKIPPED = object(), object()


class RefusedError(Exception):
    """What such a checkpoint never holds."""


@dataclass(frozen=True)
class _Name:
    name: str


@dataclass(frozen=True)
class Storage:
    """The numbers that tensors share, by their member of the file."""

    dtype: torch.dtype
    key: str
    elements: int


@dataclass(frozen=True)
class Described:
    """A tensor as the pickle describes it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Description:
    """Follows the instructions of a pickle as far as they describe plain values and tensors."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def read(self) -> Any:
        """What the pickle describes."""
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(self.data)):
                if count > _MOST_INSTRUCTIONS:
                    raise RefusedError("describes far more than a checkpoint")
                if opcode.name == "STOP":
                    [top] = self.stack
                    return top
                self._follow(opcode.name, argument)
        except (ValueError, IndexError, KeyError, TypeError, OverflowError):
            pass
        raise RefusedError("holds no pickle of a checkpoint")

    def _follow(self, instruction: str, argument: Any) -> None:
        stack = self.stack
        if instruction in _CONSTANTS:
            stack.append(_CONSTANTS[instruction])
        elif instruction in _LITERALS:
            stack.append(argument)
        elif instruction in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif instruction in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif instruction == "MARK":
            stack.append(_MARK)
        elif instruction in _TUPLES:
            stack.append(tuple(self._pop(_TUPLES[instruction])))
        elif instruction == "TUPLE":
            stack.append(tuple(self._pop_marked()))
        elif instruction in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if instruction == "EMPTY_DICT" else [])
        elif instruction in ("APPEND", "APPENDS", "SETITEM", "SETITEMS"):
            self._fill(instruction)
        elif instruction == "GLOBAL":
            stack.append(_name(argument))
        elif instruction == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif instruction == "REDUCE":
            name, arguments = self._pop(2)
            stack.append(_call(name, arguments))
        elif instruction == "BUILD":
            self._skip_attributes()
        elif instruction != "PROTO":
            raise RefusedError(f"holds the instruction {instruction}, which no checkpoint needs")

    def _pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError
        popped = self.stack[-count:]
        del self.stack[-count:]
        return popped

    def _pop_marked(self) -> list[Any]:
        popped: list[Any] = []
        while (value := self.stack.pop()) is not _MARK:
            popped.append(value)
        return popped[::-1]

    def _fill(self, instruction: str) -> None:
        """Put what lies on top into the list or dictionary below."""
        single = 1 if instruction == "APPEND" else 2
        values = self._pop_marked() if instruction.endswith("S") else self._pop(single)
        target = self.stack[-1]
        if type(target) is list and instruction.startswith("APPEND"):
            target.extend(values)
        elif type(target) is dict and instruction.startswith("SETITEM"):
            for key, value in zip(values[::2], values[1::2], strict=True):
                if type(key) not in (str, int):  # hashing a tuple of tuples of tuples may take for ever
                    raise RefusedError("holds a dictionary with keys that are neither names nor numbers")
                target[key] = value
        else:
            raise RefusedError("fills something else than a list or a dictionary")

    def _skip_attributes(self) -> None:
        """Pass over a state dict's versions and the byte order of a numpy type; nothing else has a state here."""
        self.stack.pop()
        if type(self.stack[-1]) is not dict and self.stack[-1] is not _SKIPPED:
            raise RefusedError("sets the attributes of something")


def _name(argument: str) -> _Name:
    if argument not in _NAMES:
        raise RefusedError(f"asks for {argument.replace(' ', '.')[:60]!r}, which no checkpoint needs")
    return _Name(argument)


def _storage(identity: Any) -> Storage:
    """What torch's pickles name a storage by: ("storage", type, key, device, elements)."""
    if type(identity) is not tuple or len(identity) != 5:
        raise RefusedError("refers to something outside that is no storage")
    kind, of, key, _, elements = identity
    known = type(kind) is str and kind == "storage" and type(of) is _Name and of.name in _DTYPES
    if not (known and type(key) is str and type(elements) is int and elements >= 0):
        raise RefusedError("refers to something outside that is no storage")
    return Storage(_DTYPES[of.name], key, elements)


def _call(function: Any, arguments: Any) -> Any:
    """What an allowed name with its arguments stands for."""
    if type(function) is not _Name or type(arguments) is not tuple:
        raise RefusedError("calls something that has no name")
    if function.name in _PASSED_OVER:
        return _SKIPPED
    if function.name == _ORDERED_DICT and not arguments:
        return {}
    if function.name == _PARAMETER and arguments and type(arguments[0]) is Described:
        return arguments[0]
    if function.name == _TENSOR and len(arguments) >= 4 and type(arguments[0]) is Storage:
        storage, offset, shape, strides = arguments[:4]
        if _sizes((offset,)) and _sizes(shape) and _sizes(strides) and len(shape) == len(strides):
            return Described(storage, offset, shape, strides)
    raise RefusedError(f"calls {function.name.replace(' ', '.')} in a way that no checkpoint does")


def _sizes(values: Any) -> bool:
    return type(values) is tuple and len(values) <= 8 and all(type(value) is int and value >= 0 for value in values)
