"""Features of frozen encoders, computed once per caption or image instead of once per step.

Those of captions are kept in memory. Those of images are kept in files of the run's folder, which are memory-mapped:
with random crops, there are several views of each image.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mirror_modules._files import locked, write_whole
from mirror_modules._tiles import in_chunks
from mirror_modules.data import CaptionBatch, InMemoryCaptions, RepeatableBatches, to_float
from mirror_modules.data.mapped_images import MappedImages
from mirror_modules.data.seeding import seeded
from mirror_modules.data.transforms import Crops, crop_flip, draw_crops
from mirror_modules.interop.backbones import checksum
from mirror_modules.stem import ImageFeatures, TextEncoder, TextFeatures
from mirror_modules.training.distributed import ProcessGroup
from mirror_modules.training.errors import TrainingError
from mirror_modules.training.log import progress_bar

FrozenFeatures = Callable[[CaptionBatch], TextFeatures]
"""Maps a batch to the features of its captions."""

CHUNK = 256
# Images per chunk of the cache of images: what a killed run has to compute again.
CHUNK_IMAGES = 32
# Views encoded at a time. On a CPU, large batches of large maps leave its cache and take up to twice as long.
CPU_BATCH, GPU_BATCH = 8, 256
# Regions take most of the space.
TYPES: dict[str, np.dtype[Any]] = {"image": np.dtype("<f4"), "regions": np.dtype("<f2")}
# Between two printed lines.
REPORT_SECONDS = 120.0
# A byte per chunk: 1 if it is computed.
DONE = "done"


class Cache(NamedTuple):
    """Whether features are cached, and their size."""

    fits: bool
    mebibytes: float

    @classmethod
    def plan(cls, count: int, features: int, limit_mib: float) -> Cache:
        """Whether count * features float32 numbers fit into the limit."""
        mebibytes = count * features * 4 / 2**20
        return cls(mebibytes <= limit_mib, mebibytes)


def frozen_text(encoder: TextEncoder) -> FrozenFeatures:
    """Encode the captions of each batch, without a cache."""

    @torch.no_grad()
    def encode(batch: CaptionBatch) -> TextFeatures:
        return encoder(batch.tokens, batch.word_mask)

    return encode


@torch.no_grad()
def cached_text(encoder: TextEncoder, captions: InMemoryCaptions, device: torch.device) -> FrozenFeatures:
    """Encode all captions once, and index the features for each batch."""

    def encode(tokens: Tensor, word_mask: Tensor) -> Tensor:
        features = encoder(tokens.to(device), word_mask.to(device))
        return torch.cat([features.words, features.sentence.unsqueeze(1)], dim=1)

    features = in_chunks(encode, captions.tokens, captions.word_mask, size=CHUNK)
    words, sentences = features[:, :-1], features[:, -1]

    def look_up(batch: CaptionBatch) -> TextFeatures:
        rows = batch.caption_rows.to(device, non_blocking=True)
        return TextFeatures(words[rows, : batch.tokens.shape[1]], sentences[rows])

    return look_up


class Views(NamedTuple):
    """The fixed views of each training image of which features are cached: crops, and the mirror image of each.

    View 2 c + m of an image is its crop c, mirrored if m = 1; without random crops, the whole image is the only view.
    """

    resolution: int
    """Height and width of a view."""
    crops: Crops | None
    """Positions of crop c of image n in row n * crops + c; None takes whole images."""
    per_image: int
    """Number of views of each image."""

    @classmethod
    def of(cls, captions: InMemoryCaptions, resolution: int, crops: int) -> Views:
        """The views of a data set, which depend on the number and the size of its images only."""
        count, height, width, _ = captions.images.shape
        if min(height, width) <= resolution:
            return cls(resolution, None, 1)
        generator = torch.Generator().manual_seed(0)
        return cls(resolution, draw_crops(count * crops, height, width, resolution, generator), 2 * crops)

    def pixels(self, images: Tensor | MappedImages, rows: Tensor) -> Tensor:
        """All views of the images (N, H, W, 3) at `rows` (B,), in order: bytes (B * per_image, h, w, 3)."""
        if self.crops is None:
            return images[rows]
        crops = self.per_image // 2
        of_image = (rows.unsqueeze(1) * crops + torch.arange(crops)).flatten()
        positions = Crops(*(part[of_image] for part in self.crops))
        straight = positions._replace(mirrored=torch.zeros_like(positions.mirrored))
        cropped = crop_flip(images, rows.repeat_interleave(crops), self.resolution, straight)
        return torch.stack((cropped, cropped.flip(2)), dim=1).flatten(0, 1)


class ViewBatches(RepeatableBatches):
    """Batches whose `image_rows` are those of cached views, one at random for each image, instead of images.

    As in other batches, the choice depends on the seed and the number of the batch alone, and an image whose caption
    mentions left or right is not mirrored.
    """

    def __init__(self, views: Views, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options, with_images=False)
        self.views = views

    def __getitem__(self, number: int) -> CaptionBatch:
        """Batch `number`, from 0."""
        batch = super().__getitem__(number)
        if self.views.crops is None:
            return batch
        generator = seeded(self.seed, 1, number)
        crop = self._local(torch.randint(self.views.per_image // 2, (self.batch_size,), generator=generator))
        mirrored = self._local(torch.rand(self.batch_size, generator=generator) < 0.5)
        mirrored = mirrored & ~self.captions.mentions_side[batch.caption_rows]
        view = 2 * crop + mirrored.long()
        return batch._replace(image_rows=batch.image_rows * self.views.per_image + view)


class CachedImages(NamedTuple):
    """Features of all views of all training images by a frozen encoder, in memory-mapped files."""

    image: Tensor
    """Global features, float32 (N * views, D')."""
    regions: Tensor | None
    """Region features, float16 (N * views, R, D); None if they are not needed."""
    views: Views
    mebibytes: float
    """Size of the files in MiB."""

    def look_up(self, rows: Tensor, device: torch.device, regions: int | None = None) -> ImageFeatures:
        """Features of the views at `rows` (B,), and the regions of the first of them only, if a number is given.

        Without cached regions, those of the result are (B, 0, 1).
        """
        image = self.image[rows].to(device)
        if self.regions is None:
            return ImageFeatures(image.new_zeros(len(rows), 0, 1), image)
        return ImageFeatures(self.regions[rows[:regions]].to(device).float(), image)


def cache_images(
    encoder: nn.Module,
    captions: InMemoryCaptions,
    views: Views,
    folder: Path,
    *,
    name: str,
    with_regions: bool,
    limit_mib: float,
    group: ProcessGroup,
    stop: Callable[[], None] = lambda: None,
) -> CachedImages | str:
    """Compute the features of all views once, in files that phases with the same encoder, images and views share.

    Chunks that a killed run has finished are not computed again. With several ranks, each computes its share.

    Args:
        encoder: A frozen image encoder in evaluation mode, images -> `ImageFeatures`.
        captions: The training images.
        views: Their views.
        folder: Folder of all caches of a run; created if missing.
        name: What determines the features apart from weights and images, such as the input size.
        with_regions: Also cache the regions.
        limit_mib: Largest size in MiB.
        group: The process group.
        stop: Called between two chunks, on all ranks; may raise.

    Returns:
        The cache, or a sentence for the log if it would exceed the limit.

    Raises:
        TrainingError: A feature is not finite, or does not fit into float16; or a file cannot be written.
    """
    example = _encode(encoder, views.pixels(captions.images, torch.zeros(1, dtype=torch.long))[:1], group.device)
    rows = len(captions) * views.per_image
    shapes = {"image": (rows, *example.image.shape[1:])}
    if with_regions:
        shapes["regions"] = (rows, *example.regions.shape[1:])
    mebibytes = sum(math.prod(shape) * TYPES[part].itemsize for part, shape in shapes.items()) / 2**20
    what = f"of {len(captions)} images{_in_words(views)}"
    if mebibytes > limit_mib:
        return (
            f"the features {what} are computed in each step: they take {mebibytes:.1f} MiB, more than "
            f"engine.cached_features_mib={limit_mib:g}"
        )
    key = _key(encoder, captions, views, name)
    # Regions need most of the space and time: a phase without them uses the cache of one that has them.
    whole = folder / f"{key}-regions"
    target = whole if with_regions or _is_complete(whole) else folder / key
    chunks = -(-len(captions) // CHUNK_IMAGES)
    try:
        if group.is_main:
            _create(target, shapes, chunks)
        group.barrier()
        # Every rank takes part in every round, for `stop` may communicate.
        silent = None if group.is_main else True
        with progress_bar(total=chunks, desc="features", unit=" chunks", disable=silent) as bar:
            report = _Report(f"the features {what}, {mebibytes:.1f} MiB in {target}", group.is_main and bar.disable)
            for first in range(0, chunks, group.world_size):
                chunk = first + group.rank
                if chunk < chunks and not _is_done(target, chunk):
                    report.start()
                    start, end = chunk * CHUNK_IMAGES, min((chunk + 1) * CHUNK_IMAGES, len(captions))
                    pixels = views.pixels(captions.images, torch.arange(start, end))
                    features = _encode(encoder, pixels, group.device)
                    for part in shapes:
                        _write_rows(target, part, start * views.per_image, getattr(features, part))
                    _mark_done(target, chunk)
                bar.update(group.world_size)
                report.update(min(first + group.world_size, chunks) / chunks)
                stop()
        group.barrier()
    except OSError as error:
        raise TrainingError(
            f"the features {what} cannot be written into {target} ({error}): {mebibytes:.1f} MiB are needed there. "
            "Free some space, name another folder with engine.features_folder, or set engine.cached_features_mib=0 to "
            "compute them in each step."
        ) from error
    opened = {part: torch.from_numpy(np.load(target / f"{part}.npy", mmap_mode="c")) for part in shapes}
    return CachedImages(opened["image"], opened.get("regions"), views, mebibytes)


def describe_cache(cache: CachedImages, captions: InMemoryCaptions) -> str:
    """A line for the log."""
    return f"cached the features of {len(captions)} images{_in_words(cache.views)}, {cache.mebibytes:.1f} MiB"


class _Report:
    """Printed lines in place of a progress bar, where there is no terminal: at the start, and every few minutes."""

    def __init__(self, what: str, prints: bool) -> None:
        self.what, self.prints, self.printed = what, prints, math.inf

    def start(self) -> None:
        """Print that something is computed, once."""
        if self.prints and self.printed == math.inf:
            print(f"computing {self.what}, once", file=sys.stderr, flush=True)
            self.printed = time.monotonic()

    def update(self, share: float) -> None:
        """Print the share that is computed, if a line is due."""
        if self.prints and time.monotonic() - self.printed > REPORT_SECONDS:
            print(f"computed {share:.0%} of {self.what}", file=sys.stderr, flush=True)
            self.printed = time.monotonic()


def _in_words(views: Views) -> str:
    crops = views.per_image // 2
    if views.crops is None:
        return ""
    return " in 1 crop and its mirror image" if crops == 1 else f" in {crops} crops and their mirror images"


@torch.no_grad()
def _encode(encoder: nn.Module, pixels: Tensor, device: torch.device) -> ImageFeatures:
    """Features of bytes (B, h, w, 3), on the CPU."""
    size = GPU_BATCH if device.type == "cuda" else CPU_BATCH
    parts = [encoder(to_float(batch.to(device))) for batch in pixels.split(size)]
    regions, image = [part.regions.half().cpu() for part in parts], [part.image.float().cpu() for part in parts]
    return ImageFeatures(torch.cat(regions), torch.cat(image))


def _key(encoder: nn.Module, captions: InMemoryCaptions, views: Views, name: str) -> str:
    """Name of a cache: another one for other weights, images or views."""
    digest = hashlib.sha256(f"{name} {encoder} {checksum(encoder)} {views.resolution} {views.per_image}".encode())
    for images in captions.images.split(4096):
        digest.update(images.contiguous().numpy().data)
    return digest.hexdigest()[:16]


def _create(folder: Path, shapes: dict[str, tuple[int, ...]], chunks: int) -> None:
    """Create the files of a cache, unless they are there already and whole, or another run is just creating them."""
    marks, headers = folder / DONE, {part: _header(part, shape) for part, shape in shapes.items()}
    sizes = {part: len(headers[part]) + math.prod(shape) * TYPES[part].itemsize for part, shape in shapes.items()}

    def is_whole(part: str) -> bool:
        path = folder / f"{part}.npy"
        if not path.is_file() or path.stat().st_size != sizes[part]:
            return False
        with path.open("rb") as file:
            return file.read(len(headers[part])) == headers[part]

    folder.mkdir(parents=True, exist_ok=True)
    while True:
        with locked(folder / ".lock") as is_acquired:
            if not is_acquired:
                time.sleep(0.1)
                continue
            if marks.is_file() and marks.stat().st_size == chunks and all(map(is_whole, shapes)):
                return
            for part in shapes:
                with (folder / f"{part}.npy").open("wb") as file:
                    file.write(headers[part])
                    file.truncate(sizes[part])
            # Written last: without it, the files are created again.
            write_whole(marks, lambda path: path.write_bytes(bytes(chunks)))
            return


def _header(part: str, shape: tuple[int, ...]) -> bytes:
    """The first bytes of a file in NumPy's format."""
    header = io.BytesIO()
    description = {"descr": TYPES[part].str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, description)
    return header.getvalue()


def _write_rows(folder: Path, part: str, first: int, values: Tensor) -> None:
    """Write rows with file operations: on a full disk, a write into mapped memory would kill the process."""
    if not bool(values.isfinite().all()):
        raise TrainingError(
            f"the frozen image encoder computes {part} features that are not finite, or beyond 65504, for an image in "
            f"rows {first} to {first + len(values) - 1} of its cache; check its weights and its input, or set "
            "engine.cached_features_mib=0."
        )
    with (folder / f"{part}.npy").open("r+b") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        file.seek(first * values[0].numel() * TYPES[part].itemsize, os.SEEK_CUR)
        file.write(values.numpy().astype(TYPES[part]).tobytes())
        file.flush()
        os.fsync(file.fileno())


def _is_done(folder: Path, chunk: int) -> bool:
    return (folder / DONE).read_bytes()[chunk] == 1


def _is_complete(folder: Path) -> bool:
    return (folder / DONE).is_file() and all((folder / DONE).read_bytes())


def _mark_done(folder: Path, chunk: int) -> None:
    with (folder / DONE).open("r+b") as file:
        file.seek(chunk)
        file.write(b"\1")
