"""Files: atomic writes, JSON with errors that name the file, locks between processes, and names on every system."""

import _pyio
import errno
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest

from mirror_modules import _files
from mirror_modules._files import (
    as_folder,
    file_name,
    flush_to_disk,
    locked,
    read_json,
    replace,
    write_json,
    write_text,
    write_whole,
)
from mirror_modules.stem import Vocabulary


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_may_exist_or_be_created_but_not_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("", "new", "new/below"):
        assert as_folder("out", str(tmp_path / name)) == tmp_path / name
    for name in ("file", "file/below", "file/further/below"):
        with pytest.raises(ValueError, match=r"^out must be a folder, but .*file is a file; choose another path"):
            as_folder("out", tmp_path / name)
    with pytest.raises(ValueError, match=r"^out must be the path of a folder, but it is 3"):
        as_folder("out", 3)


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


def test_text_has_the_same_line_endings_on_every_system(tmp_path, monkeypatch):
    # Python's own implementation of files, unlike that in C, reads the line ending of the system at run time.
    monkeypatch.setattr("io.open", _pyio.open)
    monkeypatch.setattr("os.linesep", "\r\n")
    (tmp_path / "of the system").write_text("one\n", encoding="utf-8")
    assert (tmp_path / "of the system").read_bytes() == b"one\r\n"
    write_text(tmp_path / "notes.txt", "one\ntwo\n")
    assert (tmp_path / "notes.txt").read_bytes() == b"one\ntwo\n"
    Vocabulary(["red"]).save(tmp_path / "vocabulary.json")
    assert b"\r" not in (tmp_path / "vocabulary.json").read_bytes()


def test_json_round_trip(tmp_path):
    content = {"caption": "빨간 꽃", "losses": [0.25, None]}
    write_json(tmp_path / "notes.json", content)
    assert read_json(tmp_path / "notes.json") == content
    assert "빨간 꽃" in (tmp_path / "notes.json").read_text(encoding="utf-8")


def test_json_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "notes.json").write_bytes("\ufeff{}".encode())
    assert read_json(tmp_path / "notes.json") == {}


def test_json_with_a_repeated_key_is_rejected(tmp_path):
    (tmp_path / "notes.json").write_text('{"glam": {"steps": 5, "seed": 1, "steps": 6}}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"notes\.json is damaged: .*the key 'steps' occurs more than once"):
        read_json(tmp_path / "notes.json")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000], ids=["empty", "cut", "binary", "nested"])
def test_the_error_names_a_damaged_file(tmp_path, content):
    (tmp_path / "notes.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"notes\.json is damaged: it is not JSON"):
        read_json(tmp_path / "notes.json")


def test_the_error_names_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
        read_json(tmp_path / "nothing.json")


def system_error(number):
    return OSError(number, os.strerror(number))


@pytest.fixture
def flushed(monkeypatch):
    """Names of the files and folders for which `os.fsync` was called."""
    names, opened = [], {}
    open_file = os.open

    def record_name(path, *arguments):
        handle = open_file(path, *arguments)
        opened[handle] = os.path.basename(path)
        return handle

    monkeypatch.setattr("os.open", record_name)
    monkeypatch.setattr("os.fsync", lambda handle: names.append(opened[handle]))
    return names


def test_files_and_folders_are_flushed(tmp_path, flushed):
    write_text(tmp_path / "notes.txt", "new")
    assert len(flushed) == 1
    assert flushed[0].startswith(".notes.txt.")
    flush_to_disk(tmp_path / "notes.txt")
    if sys.platform != "win32":
        flush_to_disk(tmp_path)
        assert flushed[1:] == ["notes.txt", tmp_path.name]
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt"):
        flush_to_disk(tmp_path / "nothing.txt")


def test_a_system_that_flushes_only_files_open_for_writing(tmp_path, monkeypatch):
    """Windows."""
    fcntl = pytest.importorskip("fcntl", reason="Windows itself")
    flushed = []

    def fsync(handle):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise system_error(errno.EBADF)
        flushed.append(handle)

    monkeypatch.setattr("os.fsync", fsync)
    write_text(tmp_path / "notes.txt", "new")
    assert files_of(tmp_path) == {"notes.txt": b"new"}
    assert len(flushed) == 1


def test_a_system_that_opens_no_folders(tmp_path, monkeypatch):
    """Windows."""
    open_file = os.open

    def refuse_folders(path, *arguments, **options):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return open_file(path, *arguments, **options)

    monkeypatch.setattr("os.open", refuse_folders)
    flush_to_disk(tmp_path)


@pytest.mark.parametrize("number", [errno.EBADF, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_that_flushes_no_folders(tmp_path, monkeypatch, number):
    """Network file systems, and those in user space."""

    def fail(handle):
        raise system_error(number)

    monkeypatch.setattr("os.fsync", fail)
    flush_to_disk(tmp_path)
    with pytest.raises(OSError, match=os.strerror(number)):
        write_text(tmp_path / "notes.txt", "new")


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_failed_disk_is_not_ignored(tmp_path, monkeypatch, number):
    def fail(handle):
        raise system_error(number)

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match=os.strerror(number)):
        flush_to_disk(tmp_path)


def test_a_file_system_without_permissions(tmp_path, monkeypatch):
    """FAT, and folders shared with Windows."""

    def fail(*arguments):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr("os.chmod", fail)
    write_text(tmp_path / "notes.txt", "new")
    assert files_of(tmp_path) == {"notes.txt": b"new"}


@pytest.fixture
def pauses(monkeypatch):
    """The pauses in seconds, without their duration."""
    seconds = []
    monkeypatch.setattr("time.sleep", seconds.append)
    return seconds


@pytest.mark.parametrize("failures", [0, 1, 3])
def test_a_file_that_another_program_has_open_for_a_moment_is_replaced(tmp_path, monkeypatch, pauses, failures):
    """A virus scanner, on Windows."""
    rename, attempts = os.replace, []

    def fail_at_first(*paths):
        attempts.append(paths)
        if len(attempts) <= failures:
            raise PermissionError(errno.EACCES, "The process cannot access the file because it is being used")
        rename(*paths)

    write_text(tmp_path / "notes.txt", "old")
    monkeypatch.setattr("os.replace", fail_at_first)
    write_text(tmp_path / "notes.txt", "new")
    assert files_of(tmp_path) == {"notes.txt": b"new"}
    assert len(pauses) == failures


def test_a_file_that_another_program_keeps_open_is_an_error(tmp_path, monkeypatch, pauses):
    def fail(*paths):
        raise PermissionError(errno.EACCES, "The process cannot access the file because it is being used")

    monkeypatch.setattr("os.replace", fail)
    (tmp_path / "one").write_text("content")
    with pytest.raises(PermissionError, match="cannot access the file"):
        replace(tmp_path / "one", tmp_path / "other")
    assert 0.5 < sum(pauses) < 5


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("weight 0.25", "weight 0.25"),
        ("빨간 꽃", "빨간 꽃"),
        ("a:b/c\\d", "a-b-c-d"),
        ('<>"|?*\n\0', "--------"),
        ("dots and spaces . .", "dots and spaces"),
        ("", "_"),
        (".", "_"),
        ("..", "_"),
        ("aux", "_aux"),
        ("NUL.txt", "_NUL.txt"),
        ("com7", "_com7"),
        ("console", "console"),
        ("꽃" * 300, "꽃" * 80),
    ],
)
def test_file_names_are_valid_on_every_system(tmp_path, text, name):
    assert file_name(text) == name
    (tmp_path / name).mkdir()


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
