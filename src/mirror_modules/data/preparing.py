"""Decode and resize a data set once, into files that are read without decoding."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from mirror_modules._checks import check_choice, check_positive
from mirror_modules.data.damage import DamagedSample, Skipped, printable
from mirror_modules.data.files import SPLITS, CaptionedFiles, Entry, check_apart
from mirror_modules.data.images import MOST_PIXELS
from mirror_modules.data.prepared import AGAIN, FORMAT, PREPARED, PreparedCaptions
from mirror_modules.data.sample import CaptionedImage
from mirror_modules.data.sources import open_captions, recognize
from mirror_modules.models.pretrained import flush_to_disk, read_json, write_json, write_whole

OWNER = "prepare_captions"
LARGEST = math.isqrt(MOST_PIXELS)


class Prepared(NamedTuple):
    """What `prepare_captions` wrote."""

    folder: Path
    """Where it lies; `open_captions` reads it."""
    source: str
    """The format of the originals."""
    resolution: int
    """Height and width of all images."""
    images: dict[str, int]
    """How many there are in each split."""
    skipped: tuple[Skipped, ...]
    """What was left out, of both splits."""


def prepare_captions(
    path: str | Path,
    out: str | Path,
    *,
    resolution: int,
    source: str = "auto",
    on_error: str = "stop",
    shard_size: int = 2000,
    progress: Callable[[str, int, int], None] | None = None,
) -> Prepared:
    """Decode and resize both splits of a data set on disk into a folder that `PreparedCaptions` reads.

    The folder appears when all of it is written. Before, the files gather in a hidden folder beside it, where the same
    call goes on after it was stopped; a call that differs in an argument, or in the originals, begins anew.

    Args:
        path: Folder of the originals.
        out: Folder to make. One that was made by the same call already is left as it is.
        resolution: Height and width of the images. Somewhat more than the model's leaves room for random crops.
        source: The format of the originals, as for `open_captions`.
        on_error: "stop" raises an error for the first damaged sample, "skip" leaves it out as long as few are damaged.
        shard_size: Samples that one file holds at most. The images of a split in one file need not be copied into
            memory to be trained on.
        progress: Called with (split, samples done, samples in all) after each sample, and after those found done.

    Returns:
        How many images there are, and what was left out.

    Raises:
        FileExistsError: `out` holds something else.
        FileNotFoundError: `path`, or a part of its layout, is missing.
        ValueError: An argument is unknown or out of its range, `path` has no format that is known or is a prepared
            folder, an image is in both splits, samples are damaged, or another process prepares the same.
        OSError: A file cannot be written, for instance because the disk is full.
    """
    check_positive(OWNER, resolution=resolution, shard_size=shard_size)
    if resolution > LARGEST:
        raise ValueError(f"{OWNER}: resolution={resolution} exceeds {LARGEST}, which is as large as images may be.")
    check_choice(OWNER, "on_error", on_error, ("stop", "skip"))
    # Where a link leads: a folder cannot take the place of the link itself.
    out = Path(os.path.realpath(out))
    name = recognize(path) if source == "auto" else source
    if name == "prepared":
        raise ValueError(
            f"{OWNER}: {path} is prepared already, and images lose by being resized twice; name originals."
        )
    splits = [open_captions(path, split, resolution, name, on_error=on_error) for split in SPLITS]
    check_apart(OWNER, *splits)
    digest = _digest(splits, [FORMAT, name, resolution, on_error, shard_size])
    if _is_done(out, digest):
        return _summary(out)
    unfinished = out.with_name(f".{out.name}.{digest[:16]}")
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        with _locked(unfinished) as is_mine:
            if not is_mine:
                raise ValueError(f"{OWNER}: another process prepares {out} from the same originals; wait for it.")
            contents = [_write_split(unfinished, dataset, shard_size, progress) for dataset in splits]
            facts = {
                "format": FORMAT,
                "source": name,
                "resolution": resolution,
                "splits": {dataset.split: content.facts() for dataset, content in zip(splits, contents)},
                "skipped": [list(skipped) for dataset in splits for skipped in dataset.report.skipped],
                "digest": digest,
            }
            write_json(unfinished / PREPARED, facts)
            _publish(unfinished, out)
    except OSError as error:
        message = f"{OWNER}: {out} cannot be written ({error.strerror or error})"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message += (
                f"; it needs about {sum(map(len, splits)) * resolution**2 * 3 / 2**20:.0f} MiB. What is done is kept "
                f"in {unfinished}: make room, and the same call goes on with it"
            )
        raise OSError(f"{message}.") from error
    return _summary(out)


class _Shard(NamedTuple):
    """What became of some samples of a split."""

    file: str
    lines: list[str]
    """What is said of each image in the file."""
    skipped: list[Skipped]


class _Content(NamedTuple):
    """The files of a split."""

    shards: list[_Shard]

    def facts(self) -> dict[str, object]:
        counts = {shard.file: len(shard.lines) for shard in self.shards if shard.lines}
        return {"images": sum(counts.values()), "shards": counts}


def _write_split(
    folder: Path,
    dataset: CaptionedFiles,
    shard_size: int,
    progress: Callable[[str, int, int], None] | None,
) -> _Content:
    shards, damaged, total = [], 0, len(dataset)
    for number, start in enumerate(range(0, total, shard_size)):
        rows = range(start, min(start + shard_size, total))
        notes = folder / f"{dataset.split}-{number:05}.json"
        if notes.is_file():
            # Written after the images: they are whole.
            file, lines, skipped = read_json(notes)
            shard = _Shard(file, lines, [Skipped(*each) for each in skipped])
            dataset.report.skipped += shard.skipped
            if progress is not None:
                progress(dataset.split, rows.stop, total)
        else:
            shard = _write_shard(notes.with_suffix(".npy"), dataset, rows, damaged, progress)
            write_json(notes, shard)
        damaged += len(shard.skipped)
        dataset.report.check(OWNER, damaged, total)
        shards.append(shard)
    if damaged == total:
        raise ValueError(f"{OWNER}: none of the {total} samples can be read: {dataset.report.listing()}.")
    text = "".join(line + "\n" for shard in shards for line in shard.lines)
    write_whole(folder / f"{dataset.split}.jsonl", lambda temporary: temporary.write_bytes(text.encode("utf-8")))
    return _Content(shards)


def _write_shard(
    path: Path,
    dataset: CaptionedFiles,
    rows: range,
    damaged_before: int,
    progress: Callable[[str, int, int], None] | None,
) -> _Shard:
    """Write the images of some samples as one array; damaged ones leave no hole."""
    shard = _Shard(path.name, [], [])

    def samples() -> Iterator[CaptionedImage]:
        for i in rows:
            try:
                yield dataset[i]
            except DamagedSample as error:
                dataset.report.add(OWNER, *error.skipped)
                shard.skipped.append(error.skipped)
                dataset.report.check(OWNER, damaged_before + len(shard.skipped), len(dataset))
            else:
                shard.lines.append(_line(dataset.entries[i], dataset.root))
            if progress is not None:
                progress(dataset.split, i + 1, len(dataset))

    write_whole(path, lambda temporary: _write_array(temporary, samples(), len(rows), dataset.resolution))
    if not shard.lines:
        path.unlink()
    return shard


def _write_array(path: Path, samples: Iterable[CaptionedImage], most: int, resolution: int) -> None:
    """Write images one after the other as a .npy file, and how many they are at last.

    Not through a memory map: on a full disk the process would be killed, and no error told.
    """
    with path.open("wb") as file:
        _write_header(file, most, resolution)
        begin, count = file.tell(), 0
        for sample in samples:
            file.write(np.ascontiguousarray(sample.image).data)
            count += 1
        file.seek(0)
        # The format leaves room for the first size to change.
        _write_header(file, count, resolution)
        if file.tell() != begin:
            raise ValueError(f"{OWNER}: the header of {path.name} has changed its length; give another shard_size.")


def _write_header(file: BinaryIO, count: int, resolution: int) -> None:
    shape = (count, resolution, resolution, 3)
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _line(entry: Entry, root: Path) -> str:
    said = {"file": _name(entry, root), "captions": entry.captions, "class_id": entry.class_id}
    return json.dumps(said, ensure_ascii=False)


def _name(entry: Entry, root: Path) -> str:
    return printable(entry.image.relative_to(root).as_posix())


def _digest(splits: list[CaptionedFiles], settings: list[object]) -> str:
    """What tells a cache from all others: the settings, what is said of each original, its size and its last change."""
    digest = hashlib.sha256(json.dumps(settings).encode())
    for dataset in splits:
        for entry in dataset.entries:
            file = (entry.image if entry.part is None else entry.part.file).stat()
            said = [_line(entry, dataset.root), entry.box, file.st_size, file.st_mtime_ns]
            digest.update(json.dumps(said).encode())
    return digest.hexdigest()


def _is_done(out: Path, digest: str) -> bool:
    """Is the folder there already?

    Raises:
        FileExistsError: Something else is.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    facts = read_json(out / PREPARED) if (out / PREPARED).is_file() else None
    if not isinstance(facts, dict):
        raise FileExistsError(f"{OWNER}: {out} exists and is not empty; name a folder that is to be made.")
    if facts.get("digest") != digest:
        raise FileExistsError(
            f"{OWNER}: {out} was prepared with other settings or from other originals; remove it, or name another "
            "folder."
        )
    return True


def _publish(unfinished: Path, out: Path) -> None:
    """Let the finished folder appear, without what only helped to make it."""
    named = {PREPARED, *(f"{split}.jsonl" for split in SPLITS)}
    for file in unfinished.iterdir():
        if file.name.startswith(".") or (file.name not in named and file.suffix != ".npy"):
            file.unlink()
    flush_to_disk(unfinished)
    if out.exists():
        # An empty folder, as `_is_done` has seen; elsewhere than on POSIX it would be in the way.
        out.rmdir()
    os.replace(unfinished, out)
    flush_to_disk(out.parent)
    for other in out.parent.glob(f".{glob.escape(out.name)}.{'[0-9a-f]' * 16}"):
        with _locked(other) as is_mine:
            if is_mine:
                shutil.rmtree(other, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold a folder; False if another process does. Systems without such a lock hold nothing."""
    try:
        import fcntl
    except ImportError:
        # Windows has none.
        yield True
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_mine = True
    except BlockingIOError:
        is_mine = False
    try:
        yield is_mine
    finally:
        os.close(handle)


def _summary(out: Path) -> Prepared:
    # Opened, so that what is reported can be read.
    splits = {split: PreparedCaptions(out, split=split, resolution=1) for split in SPLITS}
    facts = read_json(out / PREPARED)
    try:
        source, resolution = facts["source"], facts["resolution"]
        skipped = tuple(Skipped(*each) for each in facts["skipped"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{OWNER}: {out / PREPARED} lacks a part ({error}); {AGAIN}.") from error
    return Prepared(out, source, resolution, {split: len(dataset) for split, dataset in splits.items()}, skipped)
