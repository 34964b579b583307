"""Captioned images out of WebDataset shards: tar files that are read from front to back, and need not fit on a disk."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mirror_modules._checks import check_positive
from mirror_modules.data.batching import seeded
from mirror_modules.data.damage import DamagedSample, ErrorReport
from mirror_modules.data.files import class_of
from mirror_modules.data.images import decode_square, import_pillow
from mirror_modules.data.sample import CaptionedImage
from mirror_modules.data.shards import Member, check_end, image_suffix, read_captions, reason_of

# Fewer samples say little of the share that is damaged.
FEW_SAMPLES = 100
_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_META = re.compile(r"__[^/]*__($|/)")
_T = TypeVar("_T")


class WebDatasetCaptions(IterableDataset[CaptionedImage]):
    """Square images with their captions, streamed out of shards in the format of the package `webdataset`.

    A shard is a tar file. Files that follow each other and share their name up to its first dot are a sample: an image
    (jpg, jpeg, png, webp) with a txt, one caption a line, or with a json, {"captions": ["..."], "class": 3}. The class
    may be left out; such an image is a class of its own.

    Each pass over the data set is one epoch, in an order that depends on seed and number of the epoch: the shards are
    shuffled and dealt to all worker processes of all ranks, and each of these mixes its samples in a buffer. Together
    they give each sample once. How many a rank gets depends on what is in its shards.

    `read` lets worker processes prepare the samples, and knows how far it has come. A `DataLoader` of one's own
    works too, but leaves the position here as it is: call `set_epoch` before each pass, or it repeats the epoch.

    Args:
        shards: Names of tar files, or one name with braces, such as "train-{000..099}.tar". Names with a scheme are
            opened as `webdataset` does; "pipe:" runs a command, so take no names from strangers.
        resolution: Height and width of the images; the middle square is kept, as in other data sets.
        seed: Decides the order; None reads shards and samples as they lie.
        buffer: Samples, not decoded yet, that a worker mixes.
        rank: Which part of the shards is wanted, from 0.
        ranks: Into how many parts the shards are divided.
        on_error: What a damaged sample does: "stop", "skip" or "list", see `ErrorReport`; few are 5 % of those seen,
            and up to five. What follows a damaged place of a shard is lost, and counts as one, beside the sample that
            is cut through.

    Raises:
        FileNotFoundError: A shard without a scheme does not exist.
        ValueError: A number is out of its range, a shard is named twice, or there are fewer shards than ranks.
        ImportError: webdataset or Pillow is missing.
    """

    report: ErrorReport
    """What was left out so far, each sample once."""

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        resolution: int = 64,
        *,
        seed: int | None = 0,
        buffer: int = 1000,
        rank: int = 0,
        ranks: int = 1,
        on_error: str = "stop",
    ) -> None:
        owner = self._owner = type(self).__name__
        check_positive(owner, resolution=resolution, buffer=buffer, ranks=ranks)
        if not isinstance(rank, int) or not 0 <= rank < ranks:
            raise ValueError(f"{owner}: rank must be from 0 to {ranks - 1} with ranks={ranks}, but it is {rank!r}.")
        _import_webdataset()
        import_pillow()
        self.shards = _expand(shards)
        self.resolution, self.seed, self.buffer, self.rank, self.ranks = resolution, seed, buffer, rank, ranks
        self.report = ErrorReport(on_error)
        if len(set(self.shards)) < len(self.shards):
            twice = next(name for name in self.shards if self.shards.count(name) > 1)
            raise ValueError(f"{owner}: shards names {twice} twice; its samples would be seen twice.")
        for name in self.shards:
            if not _REMOTE.match(name) and not os.path.isfile(name):
                raise FileNotFoundError(f"{owner}: there is no shard {name}; name tar files that exist.")
        self._check_workers(1)
        self._epoch, self._samples, self._next = 0, [0], 0
        self._seen = self._damaged = 0

    def __iter__(self) -> Iterator[CaptionedImage]:
        """The samples of this epoch that are still to come: all of this rank, or in a worker process its part of them.

        Raises:
            ValueError: A sample is damaged and `on_error` is "stop", or too many are.
        """
        worker = get_worker_info()
        index, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        self._divide(workers)
        for drawn in self._draw(index, workers):
            yield from self._take(drawn, workers)
        self.set_epoch(self._epoch + 1)

    def read(self, workers: int = 0) -> Iterator[CaptionedImage]:
        """The same as a pass over the data set, prepared by worker processes, which take turns in a fixed order.

        Raises:
            ValueError: As in a pass, or there are fewer shards than workers of all ranks.
        """
        if workers == 0:
            yield from self
            return
        check_positive(self._owner, workers=workers)
        self._check_workers(workers)
        self._divide(workers)
        loader: DataLoader[Any] = DataLoader(
            _Turns(self, workers),
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_it_is,
            # Otherwise it draws from the global source of random numbers.
            generator=torch.Generator(),
        )
        ended = 0
        for drawn in loader:
            if drawn is not None:
                yield from self._take(drawn, workers)
            # An end comes again with each turn: as many in a row as there are workers are the end of all.
            ended = ended + 1 if drawn is None else 0
            if ended == workers:
                break
        self.set_epoch(self._epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch, counted from 0."""
        self._epoch, self._samples, self._next = epoch, [0], 0

    def state_dict(self) -> dict[str, Any]:
        """The position: the epoch, how many samples of it each worker process is done with, and whose turn it is."""
        return {"epoch": self._epoch, "samples": list(self._samples), "next": self._next}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position: what follows is what would have followed there, with as many worker processes as there.

        What was done of the epoch is read again, and not decoded.

        Raises:
            ValueError: It is none.
        """
        numbers = [state.get("epoch"), state.get("next"), *(state.get("samples") or [None])]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(
                f"{self._owner}: a position has an epoch, samples and whose turn is next, such as {self.state_dict()}, "
                f"but it is {dict(state)!r}."
            )
        self._epoch, self._samples, self._next = state["epoch"], list(state["samples"]), state["next"]

    def _divide(self, workers: int) -> None:
        """Count the samples of so many workers."""
        if not any(self._samples):
            self._samples = [0] * workers
        if len(self._samples) != workers:
            raise ValueError(
                f"{self._owner}: the position is that of {len(self._samples)} worker processes, but there are "
                f"{workers}; go on with as many, or begin an epoch with set_epoch."
            )

    def _check_workers(self, workers: int) -> None:
        if len(self.shards) < self.ranks * workers:
            raise ValueError(
                f"{self._owner}: {len(self.shards)} shards cannot be dealt to {self.ranks} ranks with {workers} worker "
                "processes each; make more and smaller shards, or take fewer processes."
            )

    def _take(self, drawn: _Drawn, workers: int) -> Iterator[CaptionedImage]:
        """Move the position on, and leave a damaged sample out."""
        self._samples[drawn.worker] = drawn.done
        self._next = (drawn.worker + 1) % workers
        self._seen += 1
        if isinstance(drawn.sample, CaptionedImage):
            yield drawn.sample
        elif drawn.sample.skipped not in self.report.skipped:
            self.report.add(self._owner, *drawn.sample.skipped)
            self._damaged += 1
            self.report.check(self._owner, self._damaged, max(self._seen, FEW_SAMPLES))

    def _draw(self, worker: int, workers: int) -> Iterator[_Drawn]:
        """One worker's samples of this epoch that are still to come."""
        self._check_workers(workers)
        before = self._samples[worker]
        for done, raw in enumerate(islice(self._mixed(worker, workers), before, None), start=before + 1):
            yield _Drawn(worker, done, raw if isinstance(raw, DamagedSample) else self._decode(raw))

    def _mixed(self, worker: int, workers: int) -> Iterator[_Raw | DamagedSample]:
        """All of one worker's samples of this epoch, not decoded, in their order."""
        names = list(self.shards)
        if self.seed is not None:
            order = torch.randperm(len(names), generator=seeded(self.seed, 3, self._epoch))
            names = [names[i] for i in order.tolist()]
        part = self.rank * workers + worker
        mine = names[part :: self.ranks * workers]
        samples = (sample for name in mine for sample in _read_shard(self._owner, name))
        if self.seed is None:
            return samples
        return _mix(samples, self.buffer, seeded(self.seed, 4, self._epoch, part))

    def _decode(self, raw: _Raw) -> CaptionedImage | DamagedSample:
        place = f"{raw.shard}/{raw.key}"
        try:
            suffix = image_suffix(self._owner, place, raw.files)
            captions, class_id = read_captions(self._owner, place, raw.files)
            image = decode_square(raw.files[suffix], f"{place}.{suffix}", self.resolution)
        except DamagedSample as error:
            return error
        return CaptionedImage(image, captions, class_of(place) if class_id is None else class_id, {})


class _Raw(NamedTuple):
    """A sample as it lies in a shard."""

    shard: str
    key: str
    """What its files share of their names."""
    files: dict[str, bytes]
    """By the rest of their names."""


class _Drawn(NamedTuple):
    """What a worker hands out."""

    worker: int
    done: int
    """How many it has handed out in this epoch, this one included."""
    sample: CaptionedImage | DamagedSample


class _Turns(IterableDataset["_Drawn | None"]):
    """What worker processes run: their samples, and then None without end.

    A loader that meets a worker's end leaves it out of the turns from a moment on that depends on chance.
    """

    def __init__(self, captions: WebDatasetCaptions, workers: int) -> None:
        self.captions, self.workers = captions, workers

    def __iter__(self) -> Iterator[_Drawn | None]:
        worker = get_worker_info()
        # A loader begins with its first process, and a position with the one whose turn it was.
        index = (self.captions._next + (0 if worker is None else worker.id)) % self.workers
        yield from self.captions._draw(index, self.workers)
        while True:
            yield None


def _as_it_is(drawn: _T) -> _T:
    return drawn


def _read_shard(owner: str, name: str) -> Iterator[_Raw | DamagedSample]:
    """The samples of a shard in their order; what cannot be read of it where it was met."""
    webdataset = _import_webdataset()
    errors: list[Exception] = []

    def note(error: Exception) -> bool:
        errors.append(error)
        return True

    def noted() -> Iterator[DamagedSample]:
        if errors:
            why = reason_of(errors[0])
            errors.clear()
            yield DamagedSample(owner, name, f"cannot be read as a whole ({why})")

    is_empty = True
    # Shard by shard, so that a file at the torn end of one never meets another of its name in the next.
    for sample in webdataset.tariterators.group_by_keys(_read_files(name, note), handler=note):
        yield from noted()
        files = {suffix: content for suffix, content in sample.items() if isinstance(content, bytes)}
        yield _Raw(name, sample["__key__"], files)
        is_empty = False
    if is_empty and not errors:
        errors.append(ValueError("there is no sample in it"))
    yield from noted()


def _read_files(name: str, note: Callable[[Exception], object]) -> Iterator[dict[str, Any]]:
    """The files of a shard in webdataset's form, up to the first place that cannot be read, which is noted.

    webdataset's own reader takes a damaged header for the end, and what follows is lost without a word.
    """
    try:
        with _open(name) as stream, tarfile.open(fileobj=stream, mode="r|*", tarinfo=Member) as tar:
            while (member := tar.next()) is not None:
                # It keeps a list of all that it has met.
                tar.members = []  # type: ignore[attr-defined]
                content = tar.extractfile(member) if member.isreg() else None
                if content is not None and not _META.match(member.name):
                    yield {"fname": member.name, "data": content.read(), "__url__": name}
            check_end(tar.fileobj)
    # What opens and decompresses a shard fails in many ways.
    except Exception as error:  # noqa: BLE001
        note(error)


def _open(name: str) -> Any:
    if os.path.isfile(name):
        return open(name, "rb")
    from webdataset.gopen import gopen, set_options

    stream = gopen(name)
    # A command that is not listened to any more has not failed: 23 is curl's word for it, the others are SIGPIPE.
    set_options(stream, ignore_status=[0, 23, 141, -13])
    return stream


def _mix(items: Iterator[_T], size: int, random: torch.Generator) -> Iterator[_T]:
    """Hold `size` items back, and hand out a random one of them for each that comes."""
    held: list[_T] = []

    def draw() -> _T:
        i = int(torch.randint(len(held), (1,), generator=random))
        held[i], held[-1] = held[-1], held[i]
        return held.pop()

    for item in items:
        held.append(item)
        if len(held) > size:
            yield draw()
    while held:
        yield draw()


def _expand(shards: str | Path | Sequence[str | Path]) -> list[str]:
    if isinstance(shards, str):
        from webdataset.shardlists import expand_urls

        return list(expand_urls(shards))
    return [str(shards)] if isinstance(shards, Path) else [str(name) for name in shards]


def _import_webdataset() -> Any:
    try:
        import webdataset
    except ImportError as error:
        raise ImportError("Reading shards needs webdataset: pip install 'mirror-modules[data]'.") from error
    return webdataset
