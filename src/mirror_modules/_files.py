"""Files on disk: atomic writes, JSON with errors that name the file, and locks between processes."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file atomically: `write` fills a temporary file in the same folder, which is renamed to `path`.

    After an error or an interruption, the old file is intact and the temporary file is deleted.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(Path(name))
        os.chmod(name, 0o644)
        flush_to_disk(Path(name))
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def flush_to_disk(path: Path) -> None:
    """Block until a file, or the list of entries of a folder, is on disk and survives a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({error}).") from error


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
