"""Damaged checkpoints are not loaded, the newest few and the best are kept, and a full disk destroys none."""

import errno
import hashlib
import multiprocessing
import os
import resource
import shutil
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


def run_in_child(function):
    """The result of a function that runs in a forked process."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=lambda: results.put(function()))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    return results.get()


def catch(function):
    """Type and message of the OSError of a function; None without an error."""
    try:
        function()
    except OSError as error:
        return type(error).__name__, str(error)
    return None


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


def test_a_full_disk_does_not_damage_the_previous_checkpoint(kept):
    path = kept.save(3, CONTENT)
    before = path.read_bytes()

    def save():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        return catch(lambda: kept.save(4, {"weights": torch.zeros(99_999)}))

    assert run_in_child(save) == ("OSError", f"[Errno {errno.EFBIG}] {os.strerror(errno.EFBIG)}")
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


def test_a_read_only_folder_raises_a_permission_error():
    # Other users cannot enter pytest's temporary folders, and the child process becomes another user.
    folder = Path(tempfile.mkdtemp())
    try:
        kept = Checkpoints(folder, "glam", 2)
        path = kept.save(3, CONTENT)
        folder.chmod(0o555)

        def save():
            if os.getuid() == 0:
                os.setuid(65534)
            return catch(lambda: kept.save(4, CONTENT))

        error, message = run_in_child(save)
        assert error == "PermissionError"
        assert f"{folder}" in message
        assert os.listdir(folder) == [path.name]
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)
