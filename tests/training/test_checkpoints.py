"""Damaged checkpoints are not loaded, the newest few and the best are kept, and a full disk destroys none.

This file runs itself as a process of its own, with limits that would remain in that of the tests.
"""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from mirror_modules.training import checkpoints
from mirror_modules.training.checkpoints import Checkpoints, checksum, load_checkpoint

CONTENT = {"weights": torch.arange(7.0), "random": [torch.arange(5, dtype=torch.uint8)], "log": {"step": 3, "s": 0.5}}


@pytest.fixture
def kept(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", "glam", 2)


def save_with_full_disk(kept):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    kept.save(4, {"weights": torch.zeros(99_999)})


def save_as_another_user(kept):
    if os.getuid() == 0:
        os.setuid(65534)
    kept.save(4, CONTENT)


TASKS = {"full": save_with_full_disk, "user": save_as_another_user}


def run_task(name, kept):
    """Type and message of the OSError of a task that runs in a process of its own."""
    command = [sys.executable, __file__, name, str(kept.folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_file_name_has_phase_step_and_checksum(kept):
    path = kept.save(250, CONTENT)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    assert path == kept.folder / f"glam-00000250-{digest}.pt"
    assert kept.files() == {250: path}
    assert checksum(path) == digest


def test_the_content_loads_with_weights_only(kept):
    content = torch.load(kept.save(3, CONTENT), weights_only=True)
    torch.testing.assert_close(content["weights"], CONTENT["weights"], rtol=0, atol=0)
    torch.testing.assert_close(content["random"], CONTENT["random"], rtol=0, atol=0)
    assert content["log"] == CONTENT["log"]
    assert load_checkpoint(kept.newest_whole()).keys() == CONTENT.keys()


def test_the_newest_and_the_best_are_kept(kept):
    for step in (9, 10, 11, 100, 101):
        kept.save(step, CONTENT, best_step=10 if step > 9 else None)
    assert list(kept.files()) == [10, 100, 101]
    kept.save(102, CONTENT, best_step=102)
    assert list(kept.files()) == [101, 102]


def test_an_old_checkpoint_that_another_program_has_open_is_removed_later(kept, monkeypatch):
    """On Windows, an open file cannot be removed."""
    first = kept.save(1, CONTENT)
    unlink = Path.unlink

    def refuse(path, *arguments, **options):
        if path == first:
            raise PermissionError(errno.EACCES, "The process cannot access the file because it is being used")
        unlink(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        for step in (2, 3, 4):
            kept.save(step, CONTENT)
        assert list(kept.files()) == [1, 3, 4]
    kept.save(5, CONTENT)
    assert list(kept.files()) == [4, 5]


def test_checkpoints_of_other_phases_are_kept(kept):
    other = Checkpoints(kept.folder, "glam-2", 1).save(7, CONTENT)
    for step in (1, 2, 3):
        kept.save(step, CONTENT)
    assert other.exists()
    assert list(kept.files()) == [2, 3]


def test_a_new_phase_has_no_checkpoints(kept):
    assert kept.files() == {}
    assert kept.newest_whole() is None
    assert not kept.folder.exists()


def truncate(data):
    return data[: len(data) // 2]


def flip_a_bit(data):
    return data[:99] + bytes([data[99] ^ 1]) + data[100:]


def empty(data):
    return b""


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty])
def test_a_damaged_checkpoint_is_replaced_by_the_one_before_it(kept, damage):
    before, newest = kept.save(3, CONTENT), kept.save(4, CONTENT)
    newest.write_bytes(damage(newest.read_bytes()))
    with pytest.warns(UserWarning, match=rf"{newest.name} is damaged: its checksum .* now {newest.stem}\.damaged"):
        assert kept.newest_whole() == before
    assert newest.with_suffix(".damaged").exists()
    assert list(kept.files()) == [3]
    assert kept.newest_whole() == before


def test_without_an_undamaged_checkpoint_there_is_none(kept):
    for step in (3, 4):
        kept.save(step, CONTENT).write_bytes(b"")
    with pytest.warns(UserWarning, match="is damaged") as warned:
        assert kept.newest_whole() is None
    assert len(warned) == 2


def test_temporary_files_of_a_killed_save_are_removed(kept):
    path = kept.save(3, CONTENT)
    (kept.folder / ".glam-00000004").write_bytes(b"truncated")
    (kept.folder / ".stem-00000004").write_bytes(b"of another phase")
    assert kept.newest_whole() == path
    assert sorted(os.listdir(kept.folder)) == [".stem-00000004", path.name]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limits")
def test_a_full_disk_does_not_damage_the_previous_checkpoint(kept):
    path = kept.save(3, CONTENT)
    before = path.read_bytes()
    assert run_task("full", kept) == ["OSError", f"[Errno {errno.EFBIG}] {os.strerror(errno.EFBIG)}"]
    assert os.listdir(kept.folder) == [path.name]
    assert path.read_bytes() == before


@pytest.mark.parametrize("place", ["flush_to_disk", "checksum"])
def test_an_error_while_saving_removes_the_temporary_file(kept, monkeypatch, place):
    path = kept.save(3, CONTENT)

    def fail(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints, place, fail)
    with pytest.raises(OSError, match="No space left"):
        kept.save(4, CONTENT)
    assert os.listdir(kept.folder) == [path.name]


@pytest.mark.parametrize("within", [False, True])
def test_a_dead_loader_process_during_a_save_is_not_reported_as_a_full_disk(kept, monkeypatch, within):
    """Torch raises its error in a signal handler: in `torch.save` itself, or in its writer, which wraps it."""
    path = kept.save(3, CONTENT)

    def fail(*_):
        try:
            raise RuntimeError("DataLoader worker (pid 7) exited unexpectedly")
        except RuntimeError:
            if within:
                raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904
            raise

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid 7\)"):
        kept.save(4, CONTENT)
    assert os.listdir(kept.folder) == [path.name]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
def test_a_read_only_folder_raises_a_permission_error():
    # Other users cannot enter pytest's temporary folders, and the process becomes another user.
    folder = Path(tempfile.mkdtemp())
    try:
        kept = Checkpoints(folder, "glam", 2)
        path = kept.save(3, CONTENT)
        folder.chmod(0o555)
        error, message = run_task("user", kept)
        assert error == "PermissionError"
        assert f"{folder}" in message
        assert os.listdir(folder) == [path.name]
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


if __name__ == "__main__":
    try:
        TASKS[sys.argv[1]](Checkpoints(Path(sys.argv[2]), "glam", 2))
    except OSError as error:
        print(json.dumps([type(error).__name__, str(error)]))
