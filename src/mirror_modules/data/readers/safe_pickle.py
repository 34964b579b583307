"""Pickles of plain data, read without running any code that the pickle names."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mirror_modules.data.readers.damage import excerpt

_NUMPY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
_BUILTINS = ("builtins", "__builtin__")
# Booleans, integers, floats, bytes, text.
_SCALAR_CODE = re.compile(r"[biufSU][0-9]{1,9}")
# Calls may copy this many bytes for each byte of the file; pickles of numpy scalars stay below 1.
_COPIES_PER_BYTE = 4


class PickledDict:
    """The keys and values of a pickled dict, none of which is hashed.

    In a dict, integer keys can be chosen such that a lookup visits all of them, even among integers of 32 bits. The
    hash of a long integer is computed at every lookup. Hashing a tuple nested 200,000 deep overflows the C stack and
    kills the process; hashing 60 tuples, each of which holds the previous one twice, takes 2^60 steps.
    """

    __slots__ = ("_items",)

    def __init__(self) -> None:
        self._items: list[tuple[Any, Any]] = []

    def __setitem__(self, key: Any, value: Any) -> None:
        self._items.append((key, value))

    def __len__(self) -> int:
        return len(self._items)

    def items(self) -> list[tuple[Any, Any]]:
        """Pairs of key and value in the order of the file; the last value of a repeated key counts."""
        return self._items


_SCALARS, _CONTAINERS = {type(None), bool, int, float, str, bytes}, {PickledDict, list, tuple}


def read_pickle(path: Path) -> Any:
    """Read a pickle of lists, tuples, sets, dicts, numbers, strings, bytes and numpy scalars.

    Python 2 strings are decoded as Latin-1; numpy scalars become Python numbers and strings, sets become lists, and
    dicts become `PickledDict`. No container may be referenced twice: otherwise a few bytes could demand unbounded
    memory or time.

    Args:
        path: The file.

    Returns:
        The data, built of Python's own types and `PickledDict` alone.

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
            f"read_pickle: {path} requests the global {excerpt(str(error))}; only lists, tuples, sets, dicts, numbers, "
            "strings and numpy scalars are read. Do not load it by other means unless you trust its author."
        ) from error
    # A pickle is a program, so a damaged one can raise anything.
    except Exception as error:
        reason = str(error)
        if not isinstance(error, ValueError | pickle.UnpicklingError):
            reason = f"{type(error).__name__}: {reason}".rstrip(": ")
        raise ValueError(
            f"read_pickle: {path} is damaged: it is not a pickle of plain data ({excerpt(reason)})."
        ) from error


class _Forbidden(Exception):
    """A global outside the short list of permitted ones."""


def _check_plain(content: Any) -> None:
    """Refuse objects other than plain data, and containers that are referenced twice.

    Each container then takes bytes of its own in the file, so a loop over the result ends in proportion to its size.
    """
    pending: list[Any] = [[content]]
    seen = set[int]()
    while pending:
        container = pending.pop()
        parts = list(chain.from_iterable(container.items())) if isinstance(container, PickledDict) else container
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


def _load_empty_dict(unpickler: Any) -> None:
    unpickler.append(PickledDict())


def _load_dict(unpickler: Any) -> None:
    items, result = unpickler.pop_mark(), PickledDict()
    for key, value in zip(items[::2], items[1::2], strict=True):
        result[key] = value
    unpickler.append(result)


def _load_state(unpickler: Any) -> None:
    """Set the state of a numpy dtype; of other objects, a pickle could replace any attribute."""
    state, instance = unpickler.stack.pop(), unpickler.stack[-1]
    if not isinstance(instance, _ScalarType):
        raise ValueError(f"it sets the state of an object of type {type(instance).__name__}")
    instance.set_state(state)


def _refuse_bytearray(unpickler: Any) -> None:
    """A bytearray is allocated before its bytes are read: nine bytes would claim gigabytes."""
    raise ValueError("it holds a bytearray")


class _Memo(list[Any]):
    """Memoized objects by index.

    The memo of Python's unpickler is a dict, whose keys can be chosen to collide; that of the one written in C is an
    array, which an index of 2^28 in an 8-byte file grows to 4 GiB.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def __setitem__(self, index: Any, value: Any) -> None:
        # Picklers number the objects that they write, each of which takes at least a byte.
        if index > self._size:
            raise ValueError(f"a memo index of {index} in a file of {self._size} bytes")
        # Unused indices hold an ellipsis, which is not plain data: a file that refers to one is refused.
        self.extend([...] * (index + 1 - len(self)))
        super().__setitem__(index, value)


class _PlainUnpickler(pickle._Unpickler):
    """The unpickler written in Python, whose opcodes can be replaced."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **pickle._Unpickler.dispatch,
        pickle.EMPTY_DICT[0]: _load_empty_dict,
        pickle.DICT[0]: _load_dict,
        pickle.EMPTY_SET[0]: pickle._Unpickler.dispatch[pickle.EMPTY_LIST[0]],
        pickle.ADDITEMS[0]: pickle._Unpickler.dispatch[pickle.APPENDS[0]],
        pickle.FROZENSET[0]: pickle._Unpickler.dispatch[pickle.LIST[0]],
        pickle.BUILD[0]: _load_state,
        pickle.BYTEARRAY8[0]: _refuse_bytearray,
    }

    def __init__(self, content: bytes) -> None:
        super().__init__(BytesIO(content), encoding="latin1")
        self.memo = _Memo(len(content))
        self._copies_left = _COPIES_PER_BYTE * len(content)

    def find_class(self, module: str, name: str) -> Any:
        if module in _NUMPY_MODULES and name == "scalar":
            return _Call(self, _scalar)
        if module == "numpy" and name == "dtype":
            return _Call(self, _ScalarType)
        if module == "_codecs" and name == "encode":
            return _Call(self, _bytes)
        if module in _BUILTINS and name == "bytes":
            return _Call(self, _empty_bytes)
        if module in _BUILTINS and name in ("set", "frozenset"):
            return _Call(self, _members)
        raise _Forbidden(f"{module}.{name}")

    def get_extension(self, code: int) -> None:
        """Refuse a global named by a number: it may come from a cache, without `find_class`."""
        raise ValueError("it uses a registered extension")

    def count_copies(self, arguments: tuple[Any, ...]) -> None:
        """Limit what calls copy: 8 bytes of a pickle repeat a call on a text of any length stored once."""
        self._copies_left -= sum(len(each) for each in arguments if isinstance(each, str | bytes))
        if self._copies_left < 0:
            raise ValueError("its calls copy far more than it holds")


class _Call:
    """A permitted function whose calls are counted against the limit on copies."""

    __slots__ = ("_function", "_unpickler")

    def __init__(self, unpickler: _PlainUnpickler, function: Callable[..., Any]) -> None:
        self._unpickler, self._function = unpickler, function

    def __call__(self, *arguments: Any) -> Any:
        self._unpickler.count_copies(arguments)
        return self._function(*arguments)


class _ScalarType:
    """A substitute for numpy's dtype, which must not be built from untrusted data."""

    __slots__ = ("dtype",)

    # A call with any number of arguments could repeat a list of them at no cost in bytes.
    def __init__(self, code: str, align: object = False, copy: object = False) -> None:
        if not _SCALAR_CODE.fullmatch(code):
            raise ValueError(f"a numpy scalar of type {code!r}")
        self.dtype = np.dtype(code)

    def set_state(self, state: tuple[Any, ...]) -> None:
        """Take the byte order from the state that numpy stores."""
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


def _scalar(kind: _ScalarType, data: bytes | str) -> Any:
    # Empty text and bytes, which numpy does not read from a buffer.
    if kind.dtype.itemsize == 0:
        return kind.dtype.type().item()
    raw = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(raw, kind.dtype, count=1)[0].item()


def _bytes(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        # Without the encoding: the repr of a nested tuple could take 2^60 steps.
        raise ValueError("bytes in an encoding other than Latin-1")
    return text.encode("latin1")


def _empty_bytes() -> bytes:
    """Protocols 0 to 2 store empty bytes as `bytes()`; `bytes(n)` would allocate n."""
    return b""


def _members(members: list[Any]) -> list[Any]:
    """Protocols 0 to 3 store a set as a call on the list of its members."""
    return members
