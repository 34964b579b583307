"""The commands `generate` and `describe`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mirror_modules.cli.parsing import Device, check_out, device_of, parse, read_captions

if TYPE_CHECKING:
    from torch import Tensor

    from mirror_modules.models import TextToImage

# Images per batch: the memory does not grow with their number.
BATCH = 32
GRID_COLUMNS = 4


@dataclass(frozen=True)
class GenerateOptions:
    """Generate images from captions. An image depends on its caption and its seed alone."""

    model_dir: Path
    """Folder of the model, such as runs/demo/model."""
    caption: tuple[str, ...]
    """Captions; more can come from --captions."""
    captions: Path | None = None
    """Text file with further captions, one per line."""
    images: int = 1
    """Images per caption."""
    seed: int = 0
    """Seed of the first image; each further image has the next one. The seed of each image is printed: with it, the
    image can be generated alone."""
    best_of: int = 1
    """Candidates for each image, of which the one is written from which the model best recovers the caption."""
    truncation: float | None = None
    """Draw the noise from [-truncation, truncation] only: more typical, less diverse images."""
    box: tuple[float, float, float, float] | None = None
    """Where to place the subject, in systems that take it: left, top, width and height as shares of the image."""
    points: Path | None = None
    """JSON file of key points, x and y by name as shares of the image: {"center": [0.5, 0.4], "petal 8": null}. null
    hides a point; those that are not in the file are drawn from the caption, all of them without a file."""
    resolution: int | None = None
    """Height and width of the images: one of the model's resolutions; the finest by default."""
    out: Path = Path("generated.png")
    """File to write: .png, .jpg, .webp, .bmp or .tif. Several images are numbered: generated-000.png."""
    grid: bool = False
    """Write one picture with all images side by side, and captions below them."""
    no_captions: bool = False
    """Draw the grid without captions."""
    scale: int | None = None
    """Pixels of the grid per pixel of an image; 4 by default."""
    device: Device = "auto"
    """Device; auto uses a GPU if there is one."""


def generate(arguments: list[str]) -> None:
    """Run `mirror-modules generate`."""
    options: GenerateOptions = parse(GenerateOptions, arguments, "generate", positional=("model_dir", "caption"))
    captions = _captions(options)
    for name in ("images", "best_of", "scale"):
        if (number := getattr(options, name)) is not None and number < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, but it is {number}.")
    if not options.grid and (options.no_captions or options.scale is not None):
        name = "--no-captions" if options.no_captions else "--scale"
        raise ValueError(f"{name} needs --grid: without it, each image is written as it is.")
    check_out(options.out)
    from mirror_modules.cli.places import read_location
    from mirror_modules.models import TextToImage
    from mirror_modules.pictures.saving import numbered, save_images
    from mirror_modules.stem.vocabulary import split_words

    # The captioner, which may be larger than the generator, only chooses between candidates.
    only: Literal["images"] | None = "images" if options.best_of == 1 else None
    model = TextToImage.from_pretrained(options.model_dir, device=device_of(options.device), only=only)
    location = read_location(model, options.box, options.points)
    rows = [caption for caption in captions for _ in range(options.images)]
    # Encoding all captions first finds the errors of each before an image is written, and warns once.
    model.vocabulary.encode(rows, max_words=model.config.max_words)
    limit = model.config.max_words
    if long := [caption for caption in captions if len(split_words(caption)) > limit]:
        print(f"mirror-modules: the model reads {limit} words of a caption, not all of {long[0]!r}", file=sys.stderr)
    seeds = [options.seed + i for i in range(len(rows))]
    if options.best_of > 1:
        seeds = _best_seeds(model, options, rows, location)
    batches = _batches(model, options, rows, seeds, location)
    if options.grid:
        _write_grid(options, rows, list(batches))
        return
    files = iter([options.out] if len(rows) == 1 else numbered(options.out, len(rows)))
    images = (image for batch in batches for image in batch)
    for image, file, seed, caption in zip(images, files, seeds, rows):
        save_images(image.unsqueeze(0), file)
        print(f"{file}: seed {seed}, {caption}")


def _best_seeds(
    model: TextToImage, options: GenerateOptions, captions: list[str], location: Tensor | None
) -> list[int]:
    """The seed of the best candidate for each image."""
    seeds: list[int] = []
    with warnings.catch_warnings():
        # They were named before.
        warnings.filterwarnings("ignore", message="unknown words")
        for start in range(0, len(captions), BATCH):
            some, first = captions[start : start + BATCH], options.seed + start * options.best_of
            places = None if location is None else location.expand(len(some), *location.shape[1:])
            seeds += model.best_seeds(some, options.best_of, seed=first, truncation=options.truncation, location=places)
    return seeds


def _captions(options: GenerateOptions) -> list[str]:
    """The captions on the command line and those of the file."""
    for caption in options.caption:
        if _is_file(caption):
            raise ValueError(
                f"{caption!r} is a file, not a caption; to read captions from it, use --captions {caption}."
            )
    captions = list(options.caption)
    if options.captions is not None:
        captions += read_captions(options.captions)
    if not captions:
        raise ValueError("there is no caption; add at least one after the model's folder, or use --captions FILE.")
    return captions


def _is_file(caption: str) -> bool:
    try:
        return Path(caption).is_file()
    except OSError:
        # Longer than a name may be.
        return False


def _batches(
    model: TextToImage,
    options: GenerateOptions,
    captions: Sequence[str],
    seeds: Sequence[int],
    location: Tensor | None,
) -> Iterator[Tensor]:
    with warnings.catch_warnings():
        # They were named before.
        warnings.filterwarnings("ignore", message="unknown words")
        for start in range(0, len(captions), BATCH):
            chosen = slice(start, start + BATCH)
            places = None if location is None else location.expand(len(captions[chosen]), *location.shape[1:])
            images = model.generate(
                captions[chosen],
                seed=seeds[chosen],
                truncation=options.truncation,
                location=places,
                resolution=options.resolution,
            )
            yield images.cpu()


def _write_grid(options: GenerateOptions, captions: list[str], batches: list[Tensor]) -> None:
    import torch

    from mirror_modules.pictures.grids import captioned_grid, grid
    from mirror_modules.pictures.saving import save_images

    images = torch.cat(batches)
    columns, scale = min(len(images), GRID_COLUMNS), 4 if options.scale is None else options.scale
    if options.no_captions:
        picture = grid(images, columns=columns, scale=scale)
    else:
        picture = captioned_grid(images, captions, columns=columns, scale=scale)
    save_images(picture[None], options.out)
    print(options.out)


@dataclass(frozen=True)
class DescribeOptions:
    """Caption images."""

    model_dir: Path
    """Folder of the model, such as runs/demo/model."""
    images: tuple[Path, ...]
    """Image files, or folders of them; the center square is captioned."""
    beam_width: int = 3
    """Width of the beam search; 1 is greedy."""
    device: Device = "auto"
    """Device; auto uses a GPU if there is one."""


def describe(arguments: list[str]) -> None:
    """Run `mirror-modules describe`."""
    options: DescribeOptions = parse(DescribeOptions, arguments, "describe", positional=("model_dir", "images"))
    if not options.images:
        raise ValueError("there is no image; add at least one file or folder after the model's folder.")
    from mirror_modules.data import DamagedSample
    from mirror_modules.models import TextToImage

    files = [file for path in options.images for file in _image_files(path)]
    model = TextToImage.from_pretrained(options.model_dir, device=device_of(options.device), only="captions")
    failures = []
    for file in files:
        try:
            caption = model.describe(file, beam_width=options.beam_width)[0]
        except DamagedSample as error:
            failures.append(str(error))
        else:
            print(f"{file}: {caption}")
    if failures:
        more = f" (and {len(failures) - 1} other files)" if len(failures) > 1 else ""
        raise ValueError(f"{failures[0]}{more}")


def _image_files(path: Path) -> list[Path]:
    """A file itself, or the images of a folder in alphabetical order."""
    if not path.is_dir():
        return [path]
    from mirror_modules.data.readers.caption_folder import IMAGE_SUFFIXES
    from mirror_modules.data.readers.names import is_hidden

    files = [
        file for file in sorted(path.iterdir()) if file.suffix.lower() in IMAGE_SUFFIXES and not is_hidden(file.name)
    ]
    if not files:
        raise ValueError(f"the folder {path} has no image ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    return files
