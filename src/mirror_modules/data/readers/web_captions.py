"""Captioned images streamed from WebDataset shards, sequentially: shards may be remote and larger than the disk."""

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
from mirror_modules.data.readers.damage import DamagedSample, ErrorReport
from mirror_modules.data.readers.files import class_of
from mirror_modules.data.readers.images import decode_square, import_pillow
from mirror_modules.data.readers.shards import (
    Member,
    check_end,
    image_suffix,
    read_captions,
    reason_of,
    split_member,
)
from mirror_modules.data.sample import CaptionedImage
from mirror_modules.data.seeding import seeded

# The share of damaged samples is computed for at least this many: a smaller number is too few to estimate it.
MIN_SAMPLES = 100
_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_T = TypeVar("_T")


class WebDatasetCaptions(IterableDataset[CaptionedImage]):
    """Square images with captions, streamed from shards in the format of the package `webdataset`.

    A shard is a tar file. Consecutive members whose names agree up to the first dot form a sample: an image (jpg, jpeg,
    png, webp) with a txt, one caption per line, or a json, {"captions": ["..."], "class": 3}; if there are both, the
    txt holds the captions. The class is optional, in the json or in a cls; an image without one is its own class. Other
    fields and members, such as the metadata of a downloader, are ignored.

    Each pass over the data set is one epoch, in an order that depends on seed and epoch number: the shards are shuffled
    and distributed over all worker processes of all ranks, and each worker shuffles its samples in a buffer. Together
    they yield each sample once. The number of samples of a rank depends on its shards.

    `read` prepares samples in worker processes and tracks the position in the stream. A `DataLoader` of your own works
    too, but does not advance the position here: call `set_epoch` before each pass, or it repeats the epoch.

    Args:
        shards: Names of tar files, or one name with braces, such as "train-{000..099}.tar". Names with a scheme are
            opened as `webdataset` does; "pipe:" runs a shell command, so never pass names from untrusted sources.
        resolution: Height and width of the images; the center square is kept, as in other data sets.
        seed: Seed of the order; None reads shards and samples in their stored order.
        buffer: Size of each worker's shuffle buffer, in samples that are not decoded yet.
        rank: Rank whose shards are read, from 0.
        ranks: Number of ranks.
        on_error: "stop", "skip" or "list": see `ErrorReport`; the limit of "skip" is 5 % of the samples seen, but at
            least five. The remainder of a damaged shard is lost and counts as one sample, in addition to the sample
            that is cut off.

    Raises:
        FileNotFoundError: A shard without a scheme does not exist.
        ValueError: A number is out of range, a shard is named twice, or there are fewer shards than ranks.
        ImportError: webdataset or Pillow is missing.

    Examples:
        >>> from mirror_modules.data import WebDatasetCaptions
        >>> captions = WebDatasetCaptions("train-{000..099}.tar", resolution=64, seed=0)  # doctest: +SKIP
        >>> for sample in captions.read(workers=2):  # doctest: +SKIP
        ...     print(sample.image.shape, sample.captions[0])
        >>> position = captions.state_dict()  # doctest: +SKIP
    """

    report: ErrorReport
    """The samples skipped so far, each listed once."""

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
        if seed is not None and seed < 0:
            raise ValueError(f"{owner}: seed must be at least 0, or None, but it is {seed}.")
        _import_webdataset()
        import_pillow()
        try:
            self.shards = _expand(shards)
        except ValueError as error:
            raise ValueError(f"{owner}: shards={shards!r} cannot be expanded ({error}); close each brace.") from error
        self.resolution, self.seed, self.buffer, self.rank, self.ranks = resolution, seed, buffer, rank, ranks
        self.report = ErrorReport(on_error)
        if len(set(self.shards)) < len(self.shards):
            twice = next(name for name in self.shards if self.shards.count(name) > 1)
            raise ValueError(f"{owner}: shards names {twice} twice; its samples would be read twice per epoch.")
        for name in self.shards:
            if not _REMOTE.match(name) and not os.path.isfile(name):
                raise FileNotFoundError(f"{owner}: there is no shard {name}; pass tar files that exist.")
        self._check_workers(1)
        self._epoch, self._samples, self._next = 0, [0], 0
        self._seen = self._damaged = 0

    def __iter__(self) -> Iterator[CaptionedImage]:
        """The remaining samples of this epoch: all those of this rank or, in a worker process, its share of them.

        Raises:
            ValueError: A sample is damaged and `on_error` is "stop", or too many are.
        """
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        self._set_workers(workers)
        for loaded in self._load(worker, workers):
            yield from self._advance(loaded, workers)
        self.set_epoch(self._epoch + 1)

    def read(self, workers: int = 0) -> Iterator[CaptionedImage]:
        """The remaining samples of this epoch, prepared by worker processes that take turns in a fixed order.

        Args:
            workers: Number of worker processes; 0 prepares the samples in this process.

        Raises:
            ValueError: A sample is damaged and `on_error` is "stop", too many are, or there are fewer shards than
                workers of all ranks.
        """
        if workers == 0:
            yield from self
            return
        check_positive(self._owner, workers=workers)
        self._check_workers(workers)
        self._set_workers(workers)
        loader: DataLoader[Any] = DataLoader(
            _Turns(self, workers),
            batch_size=None,
            num_workers=workers,
            collate_fn=_identity,
            # Otherwise the loader draws from the global generator.
            generator=torch.Generator(),
        )
        ended = 0
        for loaded in loader:
            if loaded is not None:
                yield from self._advance(loaded, workers)
            # An exhausted worker returns None at each of its turns: `workers` times None in a row ends the epoch.
            ended = ended + 1 if loaded is None else 0
            if ended == workers:
                break
        self.set_epoch(self._epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Move to the start of an epoch, numbered from 0."""
        self._epoch, self._samples, self._next = epoch, [0], 0

    def state_dict(self) -> dict[str, Any]:
        """The position: the epoch, the number of its samples consumed from each worker, and the worker that is next."""
        return {"epoch": self._epoch, "samples": list(self._samples), "next": self._next}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a position; with the same number of workers, the stream continues exactly as it would have.

        Samples of the epoch already consumed are read again, but not decoded.

        Raises:
            ValueError: `state` is not a position.
        """
        fields = state if isinstance(state, Mapping) else {}
        samples = fields.get("samples")
        counts = samples if isinstance(samples, list | tuple) and samples else [None]
        numbers = (fields.get("epoch"), fields.get("next"), *counts)
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(
                f"{self._owner}: a position has an epoch, samples and the next worker, such as {self.state_dict()}, "
                f"but it is {state!r}."
            )
        self._epoch, self._samples, self._next = state["epoch"], list(state["samples"]), state["next"]

    def _set_workers(self, workers: int) -> None:
        """Start one sample count per worker, or require that the position has one for each."""
        if not any(self._samples):
            self._samples = [0] * workers
        if len(self._samples) != workers:
            raise ValueError(
                f"{self._owner}: the position belongs to {len(self._samples)} worker processes, but there are "
                f"{workers}; continue with the same number, or start an epoch with set_epoch."
            )

    def _check_workers(self, workers: int) -> None:
        if len(self.shards) < self.ranks * workers:
            raise ValueError(
                f"{self._owner}: {len(self.shards)} shards cannot be distributed over {self.ranks} ranks with "
                f"{workers} worker processes each; write more and smaller shards, or use fewer processes."
            )

    def _advance(self, loaded: _Loaded, workers: int) -> Iterator[CaptionedImage]:
        """Advance the position by one sample; yield the sample, or skip it if it is damaged."""
        self._samples[loaded.worker] = loaded.done
        self._next = (loaded.worker + 1) % workers
        self._seen += 1
        if isinstance(loaded.sample, CaptionedImage):
            yield loaded.sample
        elif loaded.sample.skipped not in self.report.skipped:
            self.report.add(self._owner, *loaded.sample.skipped)
            self._damaged += 1
            self.report.check(self._owner, self._damaged, max(self._seen, MIN_SAMPLES))

    def _load(self, worker: int, workers: int) -> Iterator[_Loaded]:
        """The remaining samples of one worker in this epoch."""
        self._check_workers(workers)
        before = self._samples[worker]
        for done, raw in enumerate(islice(self._shuffled(worker, workers), before, None), start=before + 1):
            yield _Loaded(worker, done, raw if isinstance(raw, DamagedSample) else self._decode(raw))

    def _shuffled(self, worker: int, workers: int) -> Iterator[_Raw | DamagedSample]:
        """All samples of one worker in this epoch, in their order, not decoded."""
        names = list(self.shards)
        if self.seed is not None:
            order = torch.randperm(len(names), generator=seeded(self.seed, 3, self._epoch))
            names = [names[i] for i in order.tolist()]
        part = self.rank * workers + worker
        part_names = names[part :: self.ranks * workers]
        samples = (sample for name in part_names for sample in _read_shard(self._owner, name))
        if self.seed is None:
            return samples
        return _shuffle_buffer(samples, self.buffer, seeded(self.seed, 4, self._epoch, part))

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
    """A sample as stored in a shard."""

    shard: str
    key: str
    """The part of the name that all members of the sample share."""
    files: dict[str, bytes]
    """Contents by the rest of the name."""


class _Loaded(NamedTuple):
    """A decoded or damaged sample from a worker."""

    worker: int
    done: int
    """Samples that the worker has produced in this epoch, including this one."""
    sample: CaptionedImage | DamagedSample


class _Turns(IterableDataset["_Loaded | None"]):
    """The data set of a worker process: its samples, then None forever.

    A loader drops an exhausted worker from the turns at a moment that depends on timing, so no worker may end.
    """

    def __init__(self, captions: WebDatasetCaptions, workers: int) -> None:
        self.captions, self.workers = captions, workers

    def __iter__(self) -> Iterator[_Loaded | None]:
        info = get_worker_info()
        # A loader starts with its first process, a restored position with the worker whose turn was next.
        worker = (self.captions._next + (0 if info is None else info.id)) % self.workers
        yield from self.captions._load(worker, self.workers)
        while True:
            yield None


def _identity(loaded: _T) -> _T:
    return loaded


def _read_shard(owner: str, name: str) -> Iterator[_Raw | DamagedSample]:
    """The samples of a shard in order, with a `DamagedSample` where it cannot be read."""
    webdataset = _import_webdataset()
    errors: list[Exception] = []

    def record(error: Exception) -> bool:
        errors.append(error)
        return True

    def recorded() -> Iterator[DamagedSample]:
        if errors:
            reason = reason_of(errors[0])
            errors.clear()
            yield DamagedSample(owner, name, f"cannot be read completely ({reason})")

    is_empty = True
    # Grouped within one shard: members at the torn end of a shard must not join members of the next one.
    for sample in webdataset.tariterators.group_by_keys(_read_files(name, record), handler=record):
        yield from recorded()
        files = {suffix: content for suffix, content in sample.items() if isinstance(content, bytes)}
        yield _Raw(name, sample["__key__"], files)
        is_empty = False
    if is_empty and not errors:
        errors.append(ValueError("it holds no sample"))
    yield from recorded()


def _read_files(name: str, record: Callable[[Exception], object]) -> Iterator[dict[str, Any]]:
    """The members of a shard in webdataset's form, up to the first error, which is passed to `record`.

    webdataset's own reader takes a damaged header for the end of the shard and silently loses the remainder.
    """
    try:
        with _open(name) as stream, tarfile.open(fileobj=stream, mode="r|*", tarinfo=Member) as tar:
            while (member := tar.next()) is not None:
                # tarfile keeps a list of all members, which would grow with the shard.
                tar.members = []  # type: ignore[attr-defined]
                is_read = member.isreg() and split_member(member.name) is not None
                content = tar.extractfile(member) if is_read else None
                if content is not None:
                    yield {"fname": member.name, "data": content.read(), "__url__": name}
            check_end(tar.fileobj)
    # Opening and decompressing a shard raises errors of many types.
    except Exception as error:  # noqa: BLE001
        record(error)


def _open(name: str) -> Any:
    if os.path.isfile(name):
        return open(name, "rb")
    from webdataset.gopen import gopen, set_options

    stream = gopen(name)
    # Closing the pipe early is not a failure of the command: 23 is curl's status for it, 141 and -13 are SIGPIPE.
    set_options(stream, ignore_status=[0, 23, 141, -13])
    return stream


def _shuffle_buffer(items: Iterator[_T], size: int, generator: torch.Generator) -> Iterator[_T]:
    """Hold `size` items in a buffer; each further item releases a random one."""
    held: list[_T] = []

    def draw() -> _T:
        i = int(torch.randint(len(held), (1,), generator=generator))
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
