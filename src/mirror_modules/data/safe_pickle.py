"""Pickles of data, read without running what else a pickle may ask for."""

from __future__ import annotations

import pickle
import pickletools
import re
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

_NUMPY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
_BUILTINS = ("builtins", "__builtin__")
# Not used by what writes pickles of data; the last three get objects that no name is asked for.
_REFUSED = ("DUP", "EXT1", "EXT2", "EXT4")
_GET, _PUT = ("GET", "BINGET", "LONG_BINGET"), ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")
_FILL = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
# What these make may stand at several places: text, bytes, and what is called or comes of a call.
_SHARED = re.compile(r"(SHORT_)?(BIN)?(STRING|UNICODE|BYTES)8?|(STACK_)?GLOBAL|REDUCE")
_DEEPEST = 100
_PLAIN, _HOLDERS = {type(None), bool, int, float, str, bytes}, {dict, list, tuple, set, frozenset}
# Truth values, whole and floating point numbers, bytes, text.
_SCALAR_CODE = re.compile(r"[biufSU]\d{1,4}")


def read_pickle(path: Path) -> Any:
    """Read a pickle of lists, tuples, sets, dicts, numbers, strings, bytes and numpy scalars.

    Strings of Python 2 are read as Latin-1, numpy scalars become Python's numbers and strings. A list, tuple or dict
    that stands at several places of the whole is refused: a few bytes could ask for more than any memory holds.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It asks for anything else, or is no pickle.
    """
    content = path.read_bytes()
    try:
        _check_program(content)
        result = _PlainUnpickler(BytesIO(content), encoding="latin1").load()
        _check_plain(result)
        return result
    except _Forbidden as error:
        raise ValueError(
            f"read_pickle: {path} asks for the global {error}; only lists, tuples, sets, dicts, numbers, strings and "
            "numpy scalars are read. Do not load it otherwise unless you trust whoever made it."
        ) from error
    # A pickle is a program, and a damaged one may fail in every way.
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"read_pickle: {path} is damaged: it is no pickle of plain data ({why}).") from error


class _Forbidden(Exception):
    """A global that is not among the few allowed ones."""


def _check_program(content: bytes) -> None:
    """Refuse a pickle that makes the reader take more memory, time or stack than its size tells.

    Nothing that holds other things is shared, so none grows without end, and none is so deep that hashing it fails.
    """
    depths: list[int] = []  # of the things on the stack
    marks: list[int] = []
    remembered: dict[int, int | None] = {}
    before = ""
    for opcode, argument, _ in pickletools.genops(content):
        name, needed = opcode.name, opcode.stack_before
        if name in _REFUSED:
            raise ValueError(f"it uses the opcode {name}")
        if name == "MARK":
            marks.append(len(depths))
        elif name.startswith("BININT"):
            depths.append(1)
        elif name in _PUT:
            number = len(remembered) if name == "MEMOIZE" else int(argument or 0)
            if number > len(content):
                raise ValueError(f"it wants to remember {number} things")
            remembered[number] = depths[-1] if _SHARED.fullmatch(before) else None
        elif name in _GET:
            depth = remembered[int(argument or 0)]
            if depth is None:
                raise ValueError("a list, tuple or dict stands at several places in it")
            depths.append(depth)
        elif name == "POP" and marks[-1:] == [len(depths)]:
            marks.pop()
        else:
            start = len(depths)
            if pickletools.markobject in needed:
                start = marks.pop()
                needed = needed[: needed.index(pickletools.markobject)]
            start -= len(needed)
            taken = depths[start:]
            del depths[start:]
            into = taken.pop(0) if name in _FILL else 0
            depth = max(into, 1 + max(taken, default=0))
            if depth > _DEEPEST:
                raise ValueError(f"it is nested more than {_DEEPEST} deep")
            depths += [depth] * len(opcode.stack_after)
        if name != "FRAME":
            before = name


def _check_plain(content: Any) -> None:
    """Refuse what is left of numpy's types, where nothing was made of them."""
    waiting, seen = [[content]], set[int]()
    while waiting:
        holder = waiting.pop()
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        parts = [*holder, *holder.values()] if isinstance(holder, dict) else holder
        kinds = set(map(type, parts))
        if strange := kinds - _PLAIN - _HOLDERS:
            raise ValueError(f"it holds something of type {strange.pop().__name__}")
        if kinds & _HOLDERS:
            waiting += [part for part in parts if type(part) in _HOLDERS]


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in _NUMPY_MODULES and name == "scalar":
            return _Call(_scalar)
        if module == "numpy" and name == "dtype":
            return _Call(_ScalarType)
        if module == "_codecs" and name == "encode":
            return _Call(_bytes)
        if module in _BUILTINS and name == "set":
            return _Call(_set)
        if module in _BUILTINS and name == "frozenset":
            return _Call(_frozenset)
        raise _Forbidden(f"{module}.{name}")


class _Call:
    """Stands for a function, which a pickle could give other defaults."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise ValueError("it gives a function a state")


class _ScalarType:
    """Stands for numpy's dtype, which must not be built from unknown data."""

    __slots__ = ("dtype",)

    def __init__(self, code: str, *_: object) -> None:
        if not _SCALAR_CODE.fullmatch(code):
            raise ValueError(f"a numpy scalar of type {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


def _scalar(kind: _ScalarType, data: bytes | str) -> Any:
    raw = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(raw, kind.dtype, count=1)[0].item()


def _bytes(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def _set(items: Iterable[Any] = ()) -> set[Any]:
    """Of text and numbers alone: sets may be shared, and tuples of shared things take long to compare."""
    items = list(items)
    if any(isinstance(item, tuple | frozenset) for item in items):
        raise ValueError("a set in it holds more than text and numbers")
    return set(items)


def _frozenset(items: Iterable[Any] = ()) -> frozenset[Any]:
    return frozenset(_set(items))
