"""Pickles of data, read without running what else a pickle may ask for."""

from __future__ import annotations

import pickle
import pickletools
import re
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

_NUMPY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
_BUILTINS = ("builtins", "__builtin__")
# Truth values, whole and floating point numbers, bytes, text.
_SCALAR_CODE = re.compile(r"[biufSU]\d{1,4}")


def read_pickle(path: Path) -> Any:
    """Read a pickle of lists, tuples, sets, dicts, numbers, strings, bytes and numpy scalars.

    Strings of Python 2 are read as Latin-1, numpy scalars become Python's numbers and strings.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It asks for anything else, or is no pickle.
    """
    content = path.read_bytes()
    try:
        _check_sizes(content)
        return _PlainUnpickler(BytesIO(content), encoding="latin1").load()
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


def _check_sizes(content: bytes) -> None:
    """Refuse a pickle that makes the reader reserve more memory than the file could fill."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(content):
            raise ValueError(f"it wants to remember {argument} things")


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in _NUMPY_MODULES and name == "scalar":
            return _scalar
        if module == "numpy" and name == "dtype":
            return _ScalarType
        if module == "_codecs" and name == "encode":
            return _bytes
        if module in _BUILTINS and name in ("set", "frozenset"):
            return {"set": set, "frozenset": frozenset}[name]
        raise _Forbidden(f"{module}.{name}")


class _ScalarType:
    """Stands for numpy's dtype, which must not be built from unknown data."""

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
