"""Files on disk, on every system: atomic writes, JSON with errors that name the file, locks between processes, names.

What a system or file system does not support, such as locks or permissions, is omitted without an error.
"""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# Errors of systems and file systems that cannot flush the list of entries of a folder. A failed disk raises EIO.
_NO_FLUSH = (errno.EACCES, errno.EBADF, errno.EINVAL, errno.EISDIR, errno.ENOSYS, errno.ENOTSUP, errno.EPERM)
# Seconds between the attempts to replace a file that another program has open.
_PAUSES = (0.01, 0.1, 1.0)
# Windows forbids these characters in a name, and these names, with or without an extension.
_FORBIDDEN = re.compile(r'[\x00-\x1f<>:"/\\|?*]')
_RESERVED = re.compile(r"(aux|con|nul|prn|com[0-9]|lpt[0-9])(\.|$)", re.IGNORECASE)
# Short enough for a name of 255 bytes, at up to three bytes per character.
_MAX_NAME = 80


def as_folder(name: str, path: object) -> Path:
    """Require a path at which a folder exists or can be created, and return it.

    Raises:
        ValueError: It is no path, or a part of it is a file; `name` says which argument this is.
    """
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"{name} must be the path of a folder, but it is {path!r}.")
    folder = Path(path)
    existing = next((each for each in (folder, *folder.parents) if each.exists()), folder)
    if existing.exists() and not existing.is_dir():
        raise ValueError(f"{name} must be a folder, but {existing} is a file; choose another path.")
    return folder


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file atomically: `write` fills a temporary file in the same folder, which is renamed to `path`.

    After an error or an interruption, the old file is intact and the temporary file is deleted.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(Path(name))
        # Not every file system has permissions; mkstemp creates a file for its owner only.
        with suppress(OSError):
            os.chmod(name, 0o644)
        flush_to_disk(Path(name))
        replace(Path(name), path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def flush_to_disk(path: Path) -> None:
    """Block until a file, or the list of entries of a folder, is on disk and survives a power failure.

    A folder is skipped where the system (Windows) or the file system cannot flush it.
    """
    is_folder = path.is_dir()
    try:
        # Windows flushes files that are open for writing only, and a folder cannot be opened for writing.
        handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if not is_folder or error.errno not in _NO_FLUSH:
            raise


def replace(source: Path, target: Path) -> None:
    """Rename a file or folder atomically, replacing a file of that name.

    Windows refuses this while another program, such as a virus scanner, has either file open: it is tried again for
    about a second.
    """
    for seconds in _PAUSES:
        with suppress(PermissionError):
            os.replace(source, target)
            return
        time.sleep(seconds)
    os.replace(source, target)


def file_name(text: str) -> str:
    """Turn a text into a name of a file or folder that is valid on every system.

    Texts that differ in forbidden characters, or after the first 80, get the same name.
    """
    name = _FORBIDDEN.sub("-", text)[:_MAX_NAME].rstrip(". ")
    return f"_{name}" if not name or _RESERVED.match(name) else name


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically, with the same bytes on every system."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        OSError: The file does not exist, or cannot be read.
        ValueError: The file is not JSON, or an object has a key twice.
    """
    try:
        # Editors on Windows begin a file with a byte order mark.
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({error}).") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which json.loads would keep the last of several equal keys."""
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the key {key!r} occurs more than once in an object")
        content[key] = value
    return content


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Try to lock a file, created if needed, or a folder, and release it at the end of the block; does not wait.

    Yields:
        Whether the lock was acquired; False if another process holds it. Always True on systems without such locks
        (Windows, some network file systems).
    """
    try:
        import fcntl
    except ImportError:
        yield True
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_acquired = True
    except BlockingIOError:
        is_acquired = False
    except OSError:
        # Some network file systems do not support locks.
        is_acquired = True
    try:
        yield is_acquired
    finally:
        os.close(handle)
