"""The commands `data inspect` and `data prepare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mirror_modules.cli.parsing import check_out, parse

USAGE = """\
usage: mirror-modules data COMMAND ...

  inspect PATH      summarize a folder of captioned images and list its damaged files
  prepare PATH OUT  decode and resize a folder of captioned images once, for faster loading

`mirror-modules data COMMAND --help` lists every option with its default."""


@dataclass(frozen=True)
class InspectOptions:
    """Summarize a folder of captioned images, and list its damaged files."""

    path: Path
    """Folder of the data set."""
    source: Literal["auto", "oxford-flowers", "birds", "coco", "folder", "webdataset", "prepared"] = "auto"
    """Format of the data set; auto recognizes it."""
    out: Path = Path("contact.png")
    """File to write, .png or .jpg: some images of both splits, with captions."""
    resolution: int | None = None
    """Height and width of the images in it; 64 by default, or less if the folder was prepared at less."""
    max_words: int = 18
    """Captions with more words count as long."""
    min_count: int = 1
    """Minimum number of occurrences of a word in the vocabulary."""


@dataclass(frozen=True)
class PrepareOptions:
    """Decode and resize a folder of captioned images once. After an interruption, the same command continues."""

    path: Path
    """Folder of the data set."""
    out: Path
    """Folder to create."""
    resolution: int
    """Height and width of the images; data.augment needs 19/16 of the model's resolution."""
    source: Literal["auto", "oxford-flowers", "birds", "coco", "folder", "webdataset"] = "auto"
    """Format of the data set; auto recognizes it."""
    on_error: Literal["stop", "skip"] = "stop"
    """Whether a damaged file ends the command, or is skipped and listed as long as at most 5 % are damaged."""
    shard_size: int = 2000
    """Images per file."""


def data(arguments: list[str]) -> None:
    """Run `mirror-modules data`."""
    commands = {"inspect": inspect, "prepare": prepare}
    if arguments and arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    if not arguments or arguments[0] not in commands:
        given = repr(arguments[0]) if arguments else "nothing"
        raise ValueError(
            f"expected inspect or prepare, but got {given}; write `mirror-modules data inspect PATH` or "
            "`mirror-modules data prepare PATH OUT --resolution N`."
        )
    commands[arguments[0]](arguments[1:])


def prepare(arguments: list[str]) -> None:
    """Run `mirror-modules data prepare`."""
    options: PrepareOptions = parse(PrepareOptions, arguments, "data prepare", positional=("path", "out"))
    from tqdm import tqdm

    from mirror_modules.data import prepare_captions

    with tqdm(unit=" images", dynamic_ncols=True, disable=None) as bar:

        def show(split: str, done: int, total: int) -> None:
            bar.set_description(f"{split} images", refresh=False)
            bar.total = total
            bar.update(done - bar.n)

        made = prepare_captions(
            options.path,
            options.out,
            resolution=options.resolution,
            source=options.source,
            on_error=options.on_error,
            shard_size=options.shard_size,
            progress=show,
        )
    counts = ", ".join(f"{count:,} {split}" for split, count in made.images.items())
    print(f"{made.folder}: {counts} images of {made.resolution} x {made.resolution} pixels, from {made.source!r}")
    if made.skipped:
        print(f"skipped: {len(made.skipped):,}, listed in {made.folder / 'prepared.json'}")


def inspect(arguments: list[str]) -> None:
    """Run `mirror-modules data inspect`."""
    options: InspectOptions = parse(InspectOptions, arguments, "data inspect", positional=("path",))
    from mirror_modules.data.inspection import inspect_folder
    from mirror_modules.pictures.grids import sample_sheet
    from mirror_modules.pictures.saving import save_images

    check_out(options.out)
    found = inspect_folder(
        options.path,
        source=options.source,
        resolution=options.resolution,
        max_words=options.max_words,
        min_count=options.min_count,
    )
    print(found.text)
    if not found.samples:
        return
    try:
        save_images(sample_sheet(found.samples)[None], options.out)
    except OSError as error:
        raise OSError(f"--out {options.out} cannot be written ({error.strerror or error}).") from error
    print(f"Open {options.out}")
