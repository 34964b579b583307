"""File names: hidden ones, and those that differ from a listed name in Unicode form, case or separator only."""

from __future__ import annotations

import os
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path, PurePosixPath

# Folders that macOS adds to archives and Synology to shared folders: their files have the names of the user's files.
_SYSTEM_FOLDERS = ("__MACOSX", "@eaDir")
# Similar names are sought among this many neighbors in alphabetical order on either side, and for this many misses:
# a list of a million wrong names must not take hours. File systems limit a name to 255 bytes.
_NEIGHBORS, _HINTS, _NAME_LENGTH = 20, 20, 255
_NUMBER = re.compile(r"\d+")


def is_hidden(name: str) -> bool:
    """Whether a file is hidden or belongs to the system, such as ._a.jpg, .DS_Store, .a.txt.swp and __MACOSX/a.jpg."""
    parts = PurePosixPath(name).parts
    return any(part in _SYSTEM_FOLDERS or (part.startswith(".") and part != "..") for part in parts)


def is_inside(name: str) -> bool:
    """Whether a relative file name stays within its folder, with either separator."""
    path = PurePosixPath(with_slashes(name))
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


class NameIndex:
    """Names in which others are found that differ in Unicode form, case or surrounding spaces only."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._hints = 0

    def find(self, name: str) -> str | None:
        """The same name, else the only one of the same normal form, else the only one that differs in case as well."""
        if name in self._names:
            return name
        alike = self._by_form.get(_caseless(name), [])
        for same in ([each for each in alike if _composed(each) == _composed(name)], alike):
            if len(same) == 1:
                return same[0]
        return None

    def similar(self, name: str) -> str:
        """A hint for an error message that names at most three similar names; empty if there are none.

        Only the first misses get one.
        """
        # The cheap checks first: a damaged list may hold names of any length.
        self._hints += 1
        if self._hints > _HINTS or len(name) > _NAME_LENGTH:
            return ""
        key = _without_zeros(_caseless(name))
        keys, names = self._spellings
        at = bisect_left(keys, key)
        near = get_close_matches(key, keys[max(at - _NEIGHBORS, 0) : at + _NEIGHBORS], n=10)
        # In numbered files, the same number in another spelling is more likely than another number.
        near = [each for each in near if _NUMBER.findall(each) == _NUMBER.findall(key)] or near
        found = [each for key in near for each in names[key]]
        return f" (similar: {', '.join(found[:3])})" if found else ""

    @cached_property
    def _by_form(self) -> dict[str, list[str]]:
        forms: dict[str, list[str]] = {}
        for name in self._names:
            forms.setdefault(_caseless(name), []).append(name)
        return forms

    @cached_property
    def _spellings(self) -> tuple[list[str], dict[str, list[str]]]:
        """The names by their caseless form without leading zeros, which puts 7.jpg beside 0007.jpg; first the keys."""
        names: dict[str, list[str]] = {}
        for name in sorted(self._names):
            if len(name) <= _NAME_LENGTH:
                names.setdefault(_without_zeros(_caseless(name)), []).append(name)
        return sorted(names), names


class FileFinder:
    """Finds the files that lists name; the folders that it had to search are read once."""

    def __init__(self) -> None:
        self._folders: dict[Path, NameIndex] = {}

    def find(self, folder: Path, name: str) -> Path | None:
        """The file `name` in `folder`, or the one that differs in Unicode form, case or separator only."""
        # Path.is_file raises an OSError for names that are too long; os.path.isfile returns False.
        if os.path.isfile(folder / name):
            return folder / name
        path, missing = self._walk(folder, name)
        return path if missing is None and os.path.isfile(path) else None

    def similar(self, folder: Path, name: str) -> str:
        """A hint for an error message: names similar to the first part of `name` that does not exist."""
        path, missing = self._walk(folder, name)
        return "" if missing is None else self._index(path).similar(missing)

    def _walk(self, folder: Path, name: str) -> tuple[Path, str | None]:
        """Follow the parts of a name as far as they exist; return the path reached and the first missing part."""
        path = folder
        for part in PurePosixPath(with_slashes(name)).parts:
            found = part if os.path.exists(path / part) else self._index(path).find(part)
            if found is None:
                return path, part
            path /= found
        return path, None

    def _index(self, folder: Path) -> NameIndex:
        if folder not in self._folders:
            try:
                names = os.listdir(folder)
            except OSError:
                names = []
            self._folders[folder] = NameIndex(names)
        return self._folders[folder]


def with_slashes(name: str) -> str:
    """The name with / as separator."""
    return name.replace("\\", "/")


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _without_zeros(name: str) -> str:
    return re.sub(r"(?<!\d)0+(?=\d)", "", name)


def _caseless(name: str) -> str:
    return _composed(unicodedata.normalize("NFD", name).casefold()).strip()
