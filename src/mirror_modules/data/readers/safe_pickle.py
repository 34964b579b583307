"""Pickles of plain data, read without running any code that the pickle names."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

_NUMPY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
_BUILTINS = ("builtins", "__builtin__")
_SCALARS, _CONTAINERS = {type(None), bool, int, float, str, bytes}, {dict, list, tuple, set, frozenset}
# Booleans, integers, floats, bytes, text.
_SCALAR_CODE = re.compile(r"[biufSU]\d{1,4}")
# Calls may copy this many bytes and items for each byte of the file; pickles of numpy scalars stay below 1.
_COPIES_PER_BYTE = 4


def read_pickle(path: Path) -> Any:
    """Read a pickle of lists, tuples, sets, dicts, numbers, strings, bytes and numpy scalars.

    Python 2 strings are decoded as Latin-1; numpy scalars become Python numbers and strings. Dict keys and set members
    must be numbers or text, and no container may be referenced twice: otherwise a few bytes could demand unbounded
    memory or time.

    Args:
        path: The file.

    Returns:
        The data, built of Python's own types alone.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not a pickle, or holds anything else.
    """
    content = path.read_bytes()
    try:
        result = _PlainUnpickler(content).load()
        _check_plain(result)
        return result
    except _Forbidden as error:
        raise ValueError(
            f"read_pickle: {path} requests the global {error}; only lists, tuples, sets, dicts, numbers, strings and "
            "numpy scalars are read. Do not load it by other means unless you trust its author."
        ) from error
    # A pickle is a program, so a damaged one can raise anything.
    except Exception as error:
        reason = " ".join(str(error).split())
        if not isinstance(error, ValueError | pickle.UnpicklingError):
            reason = f"{type(error).__name__}: {reason}".rstrip(": ")
        raise ValueError(f"read_pickle: {path} is damaged: it is not a pickle of plain data ({reason}).") from error


class _Forbidden(Exception):
    """A global outside the short list of permitted ones."""


def _check_plain(content: Any) -> None:
    """Refuse objects other than plain data, and containers that are referenced twice.

    Each container then takes bytes of its own in the file, so a loop over the result ends in proportion to its size.
    """
    pending, seen = [[content]], set[int]()
    while pending:
        container = pending.pop()
        parts = [*container, *container.values()] if isinstance(container, dict) else container
        types = set(map(type, parts))
        if foreign := types - _SCALARS - _CONTAINERS:
            raise ValueError(f"it holds an object of type {foreign.pop().__name__}")
        if types & _CONTAINERS:
            for part in parts:
                # Python has a single empty tuple.
                if type(part) in _CONTAINERS and part:
                    if id(part) in seen:
                        raise ValueError("a container is referenced twice")
                    seen.add(id(part))
                    pending.append(part)


def _with_scalars(code: bytes, hashed: slice) -> Callable[[Any], None]:
    """An opcode that hashes `hashed` of the topmost stack items, restricted to numbers and text.

    Hashing a tuple nested 200,000 deep overflows the C stack and kills the process; hashing 60 tuples, each of which
    holds the previous one twice, takes 2^60 steps.
    """
    load = pickle._Unpickler.dispatch[code[0]]

    def load_checked(unpickler: Any) -> None:
        if not _SCALARS.issuperset(map(type, unpickler.stack[hashed])):
            raise ValueError("a dict key or set member is neither a number nor text")
        load(unpickler)

    return load_checked


def _refuse_bytearray(unpickler: Any) -> None:
    """A bytearray is allocated before its bytes are read: nine bytes would claim gigabytes."""
    raise ValueError("it holds a bytearray")


class _PlainUnpickler(pickle._Unpickler):
    """The unpickler written in Python, whose opcodes can be restricted.

    Its memo is a dict. The memo of the one written in C is an array, which a memo index of 2^28 in an 8-byte file grows
    to 4 GiB.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **pickle._Unpickler.dispatch,
        pickle.SETITEM[0]: _with_scalars(pickle.SETITEM, slice(-2, -1)),
        pickle.SETITEMS[0]: _with_scalars(pickle.SETITEMS, slice(None, None, 2)),
        pickle.DICT[0]: _with_scalars(pickle.DICT, slice(None, None, 2)),
        pickle.ADDITEMS[0]: _with_scalars(pickle.ADDITEMS, slice(None)),
        pickle.FROZENSET[0]: _with_scalars(pickle.FROZENSET, slice(None)),
        pickle.BYTEARRAY8[0]: _refuse_bytearray,
    }

    def __init__(self, content: bytes) -> None:
        super().__init__(BytesIO(content), encoding="latin1")
        self._copies_left = _COPIES_PER_BYTE * len(content)

    def find_class(self, module: str, name: str) -> Any:
        if module in _NUMPY_MODULES and name == "scalar":
            return _Call(self, _scalar)
        if module == "numpy" and name == "dtype":
            return _Call(self, _ScalarType)
        if module == "_codecs" and name == "encode":
            return _Call(self, _bytes)
        if module in _BUILTINS and name == "set":
            return _Call(self, _set)
        if module in _BUILTINS and name == "frozenset":
            return _Call(self, _frozenset)
        raise _Forbidden(f"{module}.{name}")

    def get_extension(self, code: int) -> None:
        """Refuse a global named by a number: it may come from a cache, without `find_class`."""
        raise ValueError("it uses a registered extension")

    def count_copies(self, arguments: tuple[Any, ...]) -> None:
        """Limit what calls copy: 8 bytes of a pickle repeat a call on a text of any length stored once."""
        self._copies_left -= sum(len(each) for each in arguments if hasattr(each, "__len__"))
        if self._copies_left < 0:
            raise ValueError("its calls copy far more than it holds")


class _Call:
    """A permitted function, wrapped: a pickle could replace the defaults of a bare function."""

    __slots__ = ("_function", "_unpickler")

    def __init__(self, unpickler: _PlainUnpickler, function: Callable[..., Any]) -> None:
        self._unpickler, self._function = unpickler, function

    def __call__(self, *arguments: Any) -> Any:
        self._unpickler.count_copies(arguments)
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise ValueError("it gives a function a state")


class _ScalarType:
    """A substitute for numpy's dtype, which must not be built from untrusted data."""

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
    items = list(items)
    if not _SCALARS.issuperset(map(type, items)):
        raise ValueError("a dict key or set member is neither a number nor text")
    return set(items)


def _frozenset(items: Iterable[Any] = ()) -> frozenset[Any]:
    return frozenset(_set(items))
