"""Files: atomic writes, JSON with errors that name the file, and locks between processes."""

import errno
import subprocess
import sys
from contextlib import contextmanager

import pytest

from mirror_modules import _files
from mirror_modules._files import flush_to_disk, locked, read_json, write_json, write_text, write_whole


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("interruption", [OSError, KeyboardInterrupt])
def test_an_interrupted_write_keeps_the_old_file_and_leaves_no_other(tmp_path, interruption):
    path = tmp_path / "notes.txt"
    path.write_text("old")

    def write_half(temporary):
        temporary.write_text("ne")
        raise interruption

    with pytest.raises(interruption):
        write_whole(path, write_half)
    assert files_of(tmp_path) == {"notes.txt": b"old"}
    write_whole(path, lambda temporary: temporary.write_text("new"))
    assert files_of(tmp_path) == {"notes.txt": b"new"}


def test_a_failed_rename_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    write_text(tmp_path / "notes.txt", "old")

    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "notes.txt", "new")
    assert files_of(tmp_path) == {"notes.txt": b"old"}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
def test_others_may_read_a_written_file(tmp_path):
    write_text(tmp_path / "notes.txt", "new")
    assert (tmp_path / "notes.txt").stat().st_mode & 0o777 == 0o644


def test_text_is_written_as_utf_8(tmp_path):
    write_text(tmp_path / "notes.txt", "빨간 꽃")
    assert files_of(tmp_path) == {"notes.txt": "빨간 꽃".encode()}


def test_json_round_trip(tmp_path):
    content = {"caption": "빨간 꽃", "losses": [0.25, None]}
    write_json(tmp_path / "notes.json", content)
    assert read_json(tmp_path / "notes.json") == content
    assert "빨간 꽃" in (tmp_path / "notes.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000], ids=["empty", "cut", "binary", "nested"])
def test_the_error_names_a_damaged_file(tmp_path, content):
    (tmp_path / "notes.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"notes\.json is damaged: it is not JSON"):
        read_json(tmp_path / "notes.json")


def test_the_error_names_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
        read_json(tmp_path / "nothing.json")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows opens no folders")
def test_files_and_folders_are_flushed(tmp_path):
    write_text(tmp_path / "notes.txt", "new")
    flush_to_disk(tmp_path / "notes.txt")
    flush_to_disk(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt"):
        flush_to_disk(tmp_path / "nothing.txt")


# Runs `_files.py` on its own, without importing torch.
LOCK = """
import runpy, sys
from pathlib import Path

with runpy.run_path(sys.argv[1])["locked"](Path(sys.argv[2])) as is_acquired:
    print(is_acquired, flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process_locking(path):
    """Run a process that tries to lock `path` and keeps the lock; yield the process and whether it has the lock."""
    command = [sys.executable, "-c", LOCK, _files.__file__, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process, {"True\n": True, "False\n": False}[process.stdout.readline()]


def another_process_can_lock(path):
    with another_process_locking(path) as (_, is_acquired):
        return is_acquired


@pytest.fixture(params=["file", "new file", "folder"])
def lockable(request, tmp_path):
    pytest.importorskip("fcntl", reason="Windows has no such locks")
    path = tmp_path / "lock"
    if request.param == "file":
        path.write_text("content")
    elif request.param == "folder":
        path.mkdir()
    return path


def test_a_lock_is_exclusive_until_it_is_released(lockable):
    with locked(lockable) as is_acquired:
        assert is_acquired
        assert not another_process_can_lock(lockable)
        assert not another_process_can_lock(lockable), "a failed attempt must not release the lock"
    assert another_process_can_lock(lockable)


def test_an_error_releases_the_lock(lockable):
    with pytest.raises(RuntimeError, match="inside"), locked(lockable):
        raise RuntimeError("inside")
    assert another_process_can_lock(lockable)


def test_a_killed_process_releases_its_lock(lockable):
    with another_process_locking(lockable) as (process, is_acquired):
        assert is_acquired
        with locked(lockable) as is_acquired_here:
            assert not is_acquired_here
        process.kill()
        process.wait()
        with locked(lockable) as is_acquired_here:
            assert is_acquired_here


def test_different_paths_have_different_locks(lockable, tmp_path):
    with locked(lockable):
        assert another_process_can_lock(tmp_path / "other")


def test_a_lock_does_not_change_the_file(tmp_path):
    write_text(tmp_path / "notes.txt", "content")
    with locked(tmp_path / "notes.txt"):
        pass
    assert files_of(tmp_path) == {"notes.txt": b"content"}


def test_without_locks_on_the_system_every_attempt_succeeds(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with locked(tmp_path / "lock") as outer, locked(tmp_path / "lock") as inner:
        assert outer
        assert inner


def test_without_locks_on_the_file_system_every_attempt_succeeds(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl", reason="Windows has no such locks")

    def fail(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    with locked(tmp_path / "lock") as is_acquired:
        assert is_acquired
