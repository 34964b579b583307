"""What a WebDataset shard holds: a tar file of images and their captions, and where it is damaged."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from mirror_modules.data.damage import DamagedSample
from mirror_modules.data.files import clean_captions

IMAGES = ("jpg", "jpeg", "png", "webp")
# Programs fill a tar file up with zeros to a multiple of some size, rarely above 10 KiB.
MOST_ZEROS = 2**20


def find_shards(root: Path, split: str) -> list[Path]:
    """The shards of a split in a folder, in their order; compressed ones too, so that they are not overlooked."""
    pattern = rf"{split}-.*\.(tar|tar\.(gz|bz2|xz|zst)|tgz)"
    return sorted(path for path in root.iterdir() if re.fullmatch(pattern, path.name))


def image_suffix(owner: str, place: str, suffixes: Container[str]) -> str:
    """Which file of a sample is its image.

    Raises:
        ValueError: None is.
    """
    for suffix in IMAGES:
        if suffix in suffixes:
            return suffix
    raise DamagedSample(owner, place, f"has no image; expected one of {', '.join(IMAGES)}")


def read_captions(owner: str, place: str, files: Mapping[str, bytes]) -> tuple[tuple[str, ...], int | None]:
    """Captions and class of a sample, out of its json or its txt; the class may be missing.

    Raises:
        ValueError: They cannot be read, or no caption says anything.
    """
    class_id = None
    try:
        if "json" in files:
            lines, class_id = _from_json(json.loads(files["json"]))
        elif "txt" in files:
            lines = files["txt"].decode("utf-8-sig").split("\n")
        else:
            raise DamagedSample(owner, place, "has no captions; expected a txt or a json")
    except (ValueError, RecursionError) as error:
        if isinstance(error, DamagedSample):
            raise
        raise DamagedSample(owner, place, f"has captions that cannot be read ({error})") from error
    captions = clean_captions(lines)
    if not captions:
        raise DamagedSample(owner, place, "has no caption that says anything")
    return captions, class_id


def reason_of(error: Exception) -> str:
    """What an error says, without the objects that webdataset adds to it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    said = str(error.args[0]) if error.args else ""
    return " ".join(said.split(" @ ")[0].split()) or type(error).__name__


def _from_json(content: Any) -> tuple[list[str], int | None]:
    """Captions and class.

    Raises:
        ValueError: They are not as expected.
    """
    captions = content.get("captions") if isinstance(content, dict) else None
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError('expected {"captions": ["...", ...], "class": 3}')
    class_id = content.get("class")
    if class_id is not None and (type(class_id) is not int or not 0 <= class_id < 2**63):
        raise ValueError(f"the class must be a whole number from 0, but it is {class_id!r}")
    return captions, class_id


class Member(tarfile.TarInfo):
    """A header of a tar file; one that is damaged or cut is an error, where tarfile takes it for the end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Member:
        """Read a header.

        Raises:
            ReadError: It is damaged, or there is none where the end should be.
        """
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if not buf:
                raise tarfile.ReadError("its end is missing") from error
            if buf.strip(b"\0"):
                raise tarfile.ReadError(f"a header in it is damaged, or it is no tar file: {error}") from error
            raise


def check_end(file: Any) -> None:
    """Require that nothing but some zeros is left of a tar file.

    Raises:
        ReadError: There is more, or so many zeros that the file seems to have been reserved and not written to its end.
    """
    zeros = 0
    while rest := file.read(2**16):
        zeros += len(rest)
        if rest.strip(b"\0"):
            raise tarfile.ReadError("something follows the zeros that should be its end")
        if zeros > MOST_ZEROS:
            raise tarfile.ReadError("it ends in more than 1 MiB of zeros, as if it was not written to its end")
