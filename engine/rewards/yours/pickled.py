"""Plain values in Python's pickle format, written and read without `pickle`: reading one can run nothing.

Reward servers of flow_grpo, verl-omni and others speak it.  Only values go through: dicts, lists, tuples, texts, bytes,
numbers, truths and None, and arrays and scalars of NumPy, which arrive as lists and numbers.  Everything else that a
pickle may hold (a class, a call) is refused by name.

Source: Python's Lib/pickletools.py, whose reader of single instructions is used; NumPy's `ndarray.__reduce__` and
`__reduce_ex__`, `dtype.__reduce__`.
"""

from __future__ import annotations

import pickletools
import re
import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

_NUMBERS = re.compile(r"[biuf][1248]")
"""Kinds of NumPy's numbers that are read, as its dtypes are called."""
_ARRAY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")
_PUSHED = frozenset({"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"})
_PUSHED |= {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING"}
_PUSHED |= {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
"""Instructions that push their argument."""
_MADE: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NOTHING = frozenset({"PROTO", "FRAME"})


class _Name(NamedTuple):
    """What a pickle calls by its name."""

    module: str
    name: str


class _Dtype:
    """A NumPy dtype while its byte order is not known yet."""

    def __init__(self, kind: Any) -> None:
        if not isinstance(kind, str) or not _NUMBERS.fullmatch(kind):
            raise ValueError(f"an array of {str(kind)[:40]!r}")
        self.kind, self.order = kind, "="

    def read(self, data: Any, shape: Any = (), *, by_columns: bool = False) -> Any:
        """The numbers of a buffer as nested lists, or one number."""
        if not isinstance(data, bytes | bytearray):
            raise ValueError("an array without its bytes")
        flat = np.frombuffer(data, np.dtype(self.order + self.kind))
        return flat.reshape(shape, order="F" if by_columns else "C").tolist()


class _Array(list[Any]):
    """A NumPy array whose state is still to come."""


def dumps(value: Any) -> bytes:
    """A plain value, as `pickle.loads` of any Python 3 reads it.

    Raises:
        TypeError: something else in it.
    """
    parts = [b"\x80\x03"]
    _write(value, parts)
    return b"".join([*parts, b"."])


def _write(value: Any, parts: list[bytes]) -> None:
    if value is None or isinstance(value, bool):
        parts.append({None: b"N", True: b"\x88", False: b"\x89"}[value])
    elif isinstance(value, int):
        encoded = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        parts.append(b"\x8b" + struct.pack("<i", len(encoded)) + encoded)
    elif isinstance(value, float):
        parts.append(b"G" + struct.pack(">d", value))
    elif isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")
        parts.append(b"X" + struct.pack("<I", len(text)) + text)
    elif isinstance(value, bytes):
        parts.append(b"B" + struct.pack("<I", len(value)) + value)
    elif isinstance(value, list | tuple):
        parts.append(b"](")
        for item in value:
            _write(item, parts)
        parts.append(b"e")
    elif isinstance(value, Mapping):
        parts.append(b"}(")
        for key, item in value.items():
            _write(key, parts)
            _write(item, parts)
        parts.append(b"u")
    else:
        raise TypeError(f"pickled: expected plain values, got {type(value).__name__}; leave it out")


def loads(data: bytes) -> Any:
    """The value of a pickle.

    Raises:
        ValueError: it is none, or holds more than plain values.
    """
    machine = _Machine()
    try:
        for instruction, argument, _ in pickletools.genops(data):
            if instruction.name == "STOP":
                return machine.stack.pop()
            machine.does(instruction.name, argument)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, UnicodeError) as error:
        raise ValueError(f"expected a pickle of plain values, got {error or type(error).__name__}") from None
    raise ValueError("expected a pickle of plain values, got one that is cut off")


class _Machine:
    """Follows the instructions of a pickle, as far as they make plain values."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def does(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _PUSHED:
            stack.append(argument)
        elif name in _MADE:
            stack.append(_MADE[name]())
        elif name in _TUPLES:
            stack.append(tuple(self.taken(len(stack) - _TUPLES[name])))
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[len(self.memo) if argument is None else int(argument)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self.memo[int(argument)])
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name not in _NOTHING:
            self.builds(name, argument)

    def builds(self, name: str, argument: Any) -> None:
        """Instructions that put parts together."""
        stack = self.stack
        if name in ("APPEND", "APPENDS"):
            items = self.taken(len(stack) - 1 if name == "APPEND" else self.marks.pop())
            stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self.taken(len(stack) - 2 if name == "SETITEM" else self.marks.pop())
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name in ("LIST", "TUPLE"):
            items = self.taken(self.marks.pop())
            stack.append(items if name == "LIST" else tuple(items))
        elif name == "DICT":
            items = self.taken(self.marks.pop())
            stack.append(dict(zip(items[::2], items[1::2], strict=True)))
        elif name == "GLOBAL":
            stack.append(_Name(*argument.split(" ")))
        elif name == "STACK_GLOBAL":
            stack.append(_Name(*self.taken(len(stack) - 2)))
        elif name == "REDUCE":
            called, arguments = self.taken(len(stack) - 2)
            stack.append(_called(called, *arguments))
        elif name == "BUILD":
            _complete(*self.taken(len(stack) - 1, keep=True))
        else:
            raise ValueError(f"the instruction {name}")

    def taken(self, begin: int, keep: bool = False) -> list[Any]:
        """What lies on the stack from `begin` on, taken off; with `keep`, also what lies below it, which stays."""
        if begin < keep:
            raise ValueError("an instruction without what it needs")
        items = self.stack[begin - keep :]
        del self.stack[begin:]
        return items


def _called(called: Any, *arguments: Any) -> Any:
    """What a call gives, of those that NumPy's pickles have."""
    if not isinstance(called, _Name):
        raise ValueError("a call of something without a name")
    if called == ("_codecs", "encode"):  # how protocol 2 has bytes
        text, encoding = arguments
        return str(text).encode({"latin1": "latin1", "latin-1": "latin1"}[encoding])
    if called in (("__builtin__", "bytes"), ("builtins", "bytes")) and not arguments:
        return b""
    if called == ("numpy", "dtype"):
        return _Dtype(arguments[0])
    if called.module in _ARRAY_MODULES:
        if called.name == "_reconstruct":
            return _Array()
        if called.name == "scalar" and isinstance(arguments[0], _Dtype):
            return arguments[0].read(arguments[1])
        if called.name == "_frombuffer" and isinstance(arguments[1], _Dtype):
            data, dtype, shape, order = arguments
            return dtype.read(data, shape, by_columns=order == "F")
    raise ValueError(f"{called.module}.{called.name}, which is no plain value; have the server send lists and numbers")


def _complete(made: Any, state: Any) -> None:
    """Gives a dtype its byte order, or an array its numbers."""
    if isinstance(made, _Dtype):
        made.order = {"<": "<", ">": ">", "|": "=", "=": "="}[state[1]]
    elif isinstance(made, _Array):
        _, shape, dtype, by_columns, data = state
        if not isinstance(dtype, _Dtype):
            raise ValueError("an array of no numbers")
        found = dtype.read(data, shape, by_columns=bool(by_columns))
        made.extend(found if isinstance(found, list) else [found])
    else:
        raise ValueError(f"a state for {type(made).__name__}")
