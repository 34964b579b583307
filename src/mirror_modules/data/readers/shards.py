"""WebDataset shards: the members of a tar file that form a sample, and the signs of damage."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from mirror_modules.data.readers.damage import DamagedSample
from mirror_modules.data.readers.files import clean_captions

IMAGES = ("jpg", "jpeg", "png", "webp")
# Programs pad tar files with zeros to a multiple of some block size, rarely above 10 KiB.
MAX_PADDING = 2**20


def find_shards(root: Path, split: str) -> list[Path]:
    """The shards of a split in a folder, sorted; compressed shards are included, so that they are not overlooked."""
    pattern = rf"{split}-.*\.(tar|tar\.(gz|bz2|xz|zst)|tgz)"
    return sorted(path for path in root.iterdir() if re.fullmatch(pattern, path.name))


def image_suffix(owner: str, place: str, suffixes: Container[str]) -> str:
    """The suffix of the member that holds a sample's image.

    Raises:
        ValueError: The sample has no image.
    """
    for suffix in IMAGES:
        if suffix in suffixes:
            return suffix
    raise DamagedSample(owner, place, f"has no image; expected one of {', '.join(IMAGES)}")


def read_captions(owner: str, place: str, files: Mapping[str, bytes]) -> tuple[tuple[str, ...], int | None]:
    """Captions and class of a sample, from its json or txt member; the class is None if not given.

    Raises:
        ValueError: The member cannot be read, or no caption contains a word.
    """
    class_id = None
    try:
        if "json" in files:
            lines, class_id = _parse_json(json.loads(files["json"]))
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
        raise DamagedSample(owner, place, "has no caption with a word")
    return captions, class_id


def reason_of(error: Exception) -> str:
    """The message of an error, without the objects that webdataset appends to it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    message = str(error.args[0]) if error.args else ""
    return " ".join(message.split(" @ ")[0].split()) or type(error).__name__


def _parse_json(content: Any) -> tuple[list[str], int | None]:
    """Captions and class.

    Raises:
        ValueError: A field is missing or of the wrong type.
    """
    captions = content.get("captions") if isinstance(content, dict) else None
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError('expected {"captions": ["...", ...], "class": 3}')
    class_id = content.get("class")
    if class_id is not None and (type(class_id) is not int or not 0 <= class_id < 2**63):
        raise ValueError(f"the class must be an integer from 0 to 2**63 - 1, but it is {class_id!r}")
    return captions, class_id


class Member(tarfile.TarInfo):
    """A tar header that raises if it is damaged or truncated; tarfile itself treats such headers as the end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Member:
        """Parse a header.

        Raises:
            ReadError: The header is damaged, or the end-of-archive marker is missing.
        """
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if not buf:
                raise tarfile.ReadError("its end is missing") from error
            if buf.strip(b"\0"):
                raise tarfile.ReadError(f"a header in it is damaged, or it is not a tar file: {error}") from error
            raise


def check_end(file: Any) -> None:
    """Require that the rest of a tar file is a little zero padding.

    Raises:
        ReadError: Data follows, or so much padding that the file was probably preallocated and not fully written.
    """
    zeros = 0
    while rest := file.read(2**16):
        zeros += len(rest)
        if rest.strip(b"\0"):
            raise tarfile.ReadError("data follows its end-of-archive marker")
        if zeros > MAX_PADDING:
            raise tarfile.ReadError("it ends in more than 1 MiB of zeros, as if it had not been fully written")
