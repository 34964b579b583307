"""Decode and resize a data set once, into files that need no decoding."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from mirror_modules._checks import check_choice, check_positive
from mirror_modules._files import flush_to_disk, locked, read_json, replace, write_json, write_whole
from mirror_modules.data.readers.damage import DamagedSample, Skipped, printable
from mirror_modules.data.readers.files import SPLITS, CaptionedFiles, Entry, check_apart
from mirror_modules.data.readers.images import MAX_PIXELS
from mirror_modules.data.readers.prepared import FORMAT, LOCATED_FORMAT, PREPARED, REMEDY, PreparedCaptions
from mirror_modules.data.sample import CaptionedImage
from mirror_modules.data.sources import open_captions, recognize

OWNER = "prepare_captions"
MAX_RESOLUTION = math.isqrt(MAX_PIXELS)


class Prepared(NamedTuple):
    """The result of `prepare_captions`."""

    folder: Path
    """The folder written, which `open_captions` reads."""
    source: str
    """Format of the originals."""
    resolution: int
    """Height and width of all images."""
    images: dict[str, int]
    """Number of images in each split."""
    skipped: tuple[Skipped, ...]
    """Skipped samples of both splits."""


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

    The folder appears once it is complete. Until then, files are collected in a hidden folder beside it, from which the
    same call resumes after an interruption; a call with other arguments, or with changed originals, starts over.

    Args:
        path: Folder of the originals.
        out: Folder to create. If the same call already created it, it is left unchanged.
        resolution: Height and width of the images; somewhat above the model's leaves room for random crops.
        source: Format of the originals, as for `open_captions`.
        on_error: "stop" raises at the first damaged sample; "skip" skips damaged samples up to 5 % of a split.
        shard_size: Maximum number of samples per file; after an interruption, only the unfinished file is computed
            again. Training maps the images of all files into memory instead of copying them.
        progress: Called with (split, samples done, samples in total) after each sample, and once for each file that an
            earlier call completed.

    Returns:
        The folder, the number of images in it, and the skipped samples.

    Raises:
        FileExistsError: `out` holds something else.
        FileNotFoundError: `path`, or a part of its layout, is missing.
        ValueError: An argument is unknown or out of range, `path` has no known format or is itself a prepared folder,
            an image is in both splits, samples are damaged, or another process prepares the same folder.
        OSError: A file cannot be written, for instance because the disk is full.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from mirror_modules.data import prepare_captions
        >>> root = Path(tempfile.mkdtemp())
        >>> for split in ("train", "validation"):
        ...     (root / split).mkdir()
        ...     Image.new("RGB", (40, 30)).save(root / split / "black.png")
        ...     _ = (root / split / "black.txt").write_text("a black square")
        >>> prepared = prepare_captions(root, root / "cache", resolution=16)
        >>> prepared.images, prepared.skipped
        ({'train': 1, 'validation': 1}, ())
    """
    check_positive(OWNER, resolution=resolution, shard_size=shard_size)
    if resolution > MAX_RESOLUTION:
        raise ValueError(
            f"{OWNER}: resolution={resolution} exceeds {MAX_RESOLUTION}, the largest size that can be decoded."
        )
    check_choice(OWNER, "on_error", on_error, ("stop", "skip"))
    # The target of a symbolic link: a folder cannot be renamed onto the link itself.
    out = Path(os.path.realpath(out))
    name = recognize(path) if source == "auto" else source
    if name == "prepared":
        raise ValueError(
            f"{OWNER}: {path} is already prepared, and resizing images twice degrades them; pass the originals."
        )
    splits = [open_captions(path, split, resolution, name, on_error=on_error) for split in SPLITS]
    check_apart(OWNER, *splits)
    has_places = any(entry.box is not None or entry.points is not None for each in splits for entry in each.entries)
    version = LOCATED_FORMAT if has_places else FORMAT
    digest = _digest(splits, [version, name, resolution, on_error, shard_size])
    if _is_done(out, digest):
        return _summary(out)
    unfinished = out.with_name(f".{out.name}.{digest[:16]}")
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        with locked(unfinished) as is_acquired:
            if not is_acquired:
                raise ValueError(f"{OWNER}: another process is preparing {out} from the same originals; wait for it.")
            contents = [_write_split(unfinished, dataset, shard_size, progress) for dataset in splits]
            facts = {
                "format": version,
                "source": name,
                "resolution": resolution,
                "splits": {dataset.split: content.facts() for dataset, content in zip(splits, contents)},
                "skipped": [list(skipped) for dataset in splits for skipped in dataset.report.skipped],
                "digest": digest,
            }
            if has_places:
                facts["point_names"] = splits[0].point_names
            write_json(unfinished / PREPARED, facts)
            _publish(unfinished, out)
    except OSError as error:
        message = f"{OWNER}: {out} cannot be written ({error.strerror or error})"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message += (
                f"; it needs about {sum(map(len, splits)) * resolution**2 * 3 / 2**20:.0f} MiB. Completed files are "
                f"kept in {unfinished}: free some space and repeat the call to resume"
            )
        raise OSError(f"{message}.") from error
    return _summary(out)


class _Shard(NamedTuple):
    """A file of images, from a range of samples of a split."""

    file: str
    lines: list[str]
    """A line of JSON for each image in the file."""
    skipped: list[Skipped]
    """The skipped samples of the range."""


class _Content(NamedTuple):
    """All files of a split."""

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
            # The notes are written after the images, which are therefore complete.
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
    """Write the images of a range of samples as one array, contiguously: damaged samples are skipped."""
    shard = _Shard(path.name, [], [])

    def samples() -> Iterator[CaptionedImage]:
        for i in rows:
            try:
                sample = dataset[i]
                yield sample
            except DamagedSample as error:
                dataset.report.add(OWNER, *error.skipped)
                shard.skipped.append(error.skipped)
                dataset.report.check(OWNER, damaged_before + len(shard.skipped), len(dataset))
            else:
                shard.lines.append(_line(dataset.entries[i], dataset.root, sample))
            if progress is not None:
                progress(dataset.split, i + 1, len(dataset))

    write_whole(path, lambda temporary: _write_array(temporary, samples(), len(rows), dataset.resolution))
    if not shard.lines:
        path.unlink()
    return shard


def _write_array(path: Path, samples: Iterable[CaptionedImage], capacity: int, resolution: int) -> None:
    """Stream images into a .npy file; the number of images in its header is corrected at the end.

    Not through a memory map: on a full disk the process would be killed without an error message.
    """
    with path.open("wb") as file:
        _write_header(file, capacity, resolution)
        begin, count = file.tell(), 0
        for sample in samples:
            file.write(np.ascontiguousarray(sample.image).data)
            count += 1
        file.seek(0)
        # The .npy format pads the header, so that the first dimension can change in place.
        _write_header(file, count, resolution)
        if file.tell() != begin:
            raise ValueError(f"{OWNER}: the header of {path.name} changed its length; choose another shard_size.")


def _write_header(file: BinaryIO, count: int, resolution: int) -> None:
    shape = (count, resolution, resolution, 3)
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _line(entry: Entry, root: Path, sample: CaptionedImage | None = None) -> str:
    """A line of JSON; of a sample with box or key points, they are in it, too."""
    row = {"file": _name(entry, root), "captions": entry.captions, "class_id": entry.class_id}
    if sample is not None and (sample.box is not None or sample.points is not None):
        row |= {"box": sample.box, "points": sample.points}
    return json.dumps(row, ensure_ascii=False)


def _name(entry: Entry, root: Path) -> str:
    return printable(entry.image.relative_to(root).as_posix())


def _digest(splits: list[CaptionedFiles], settings: list[object]) -> str:
    """Hash everything that determines the folder: the settings, and the metadata, size and mtime of each original."""
    digest = hashlib.sha256(json.dumps(settings).encode())
    for dataset in splits:
        for entry in dataset.entries:
            file = (entry.image if entry.part is None else entry.part.file).stat()
            facts: list[object] = [_line(entry, dataset.root), entry.box, file.st_size, file.st_mtime_ns]
            if entry.points is not None:
                facts.append(entry.points)
            digest.update(json.dumps(facts).encode())
    return digest.hexdigest()


def _is_done(out: Path, digest: str) -> bool:
    """Whether the same call already created the folder.

    Raises:
        FileExistsError: `out` holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    facts = read_json(out / PREPARED) if (out / PREPARED).is_file() else None
    if not isinstance(facts, dict):
        raise FileExistsError(f"{OWNER}: {out} exists and is not empty; name a folder that does not exist yet.")
    if facts.get("digest") != digest:
        raise FileExistsError(
            f"{OWNER}: {out} was prepared with other settings or from other originals; remove it, or name another "
            "folder."
        )
    return True


def _publish(unfinished: Path, out: Path) -> None:
    """Remove temporary files and rename the finished folder to its final name."""
    final = {PREPARED, *(f"{split}.jsonl" for split in SPLITS)}
    for file in unfinished.iterdir():
        if file.name.startswith(".") or (file.name not in final and file.suffix != ".npy"):
            file.unlink()
    flush_to_disk(unfinished)
    if out.exists():
        # An empty folder, as `_is_done` checked; only POSIX renames onto one.
        out.rmdir()
    replace(unfinished, out)
    flush_to_disk(out.parent)
    for other in out.parent.glob(f".{glob.escape(out.name)}.{'[0-9a-f]' * 16}"):
        with locked(other) as is_acquired:
            if is_acquired:
                shutil.rmtree(other, ignore_errors=True)


def _summary(out: Path) -> Prepared:
    # Opening both splits verifies the files.
    splits = {split: PreparedCaptions(out, split=split, resolution=1) for split in SPLITS}
    facts = read_json(out / PREPARED)
    try:
        source, resolution = facts["source"], facts["resolution"]
        skipped = tuple(Skipped(*each) for each in facts["skipped"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{OWNER}: {out / PREPARED} lacks a field ({error}); {REMEDY}.") from error
    return Prepared(out, source, resolution, {split: len(dataset) for split, dataset in splits.items()}, skipped)
