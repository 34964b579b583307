"""WebDataset shards: the members of a tar file that form a sample, and the signs of damage."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable, Container, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from mirror_modules.data.readers.damage import DamagedSample
from mirror_modules.data.readers.fields import captions_in, class_in
from mirror_modules.data.readers.files import class_named, clean_captions, split_lines
from mirror_modules.data.readers.names import is_hidden

IMAGES = ("jpg", "jpeg", "png", "webp")
TEXTS = ("txt", "caption")
METADATA = ("json", "cls")
# webdataset's rule for splitting names, which excludes metadata of the shard itself.
_NAME = re.compile(r"(?!__[^/]*__(?:$|/))((?:.*/|)[^.]+)\.([^/]*)$")
_DOCUMENTS = ("readme", "license", "licence")
# Programs pad tar files with zeros to a multiple of some block size, rarely above 10 KiB.
MAX_PADDING = 2**20


def find_shards(root: Path, split: str) -> list[Path]:
    """The shards of a split in a folder, sorted; compressed shards are included, so that they are not overlooked."""
    pattern = rf"{split}-.*\.(tar|tar\.(gz|bz2|xz|zst)|tgz)"
    return sorted(path for path in root.iterdir() if re.fullmatch(pattern, path.name))


class MemberName(NamedTuple):
    """The name of a member that belongs to a sample."""

    key: str
    """The part that all members of the sample share, up to the first dot."""
    suffix: str
    """The rest, in lower case."""


def split_member(name: str) -> MemberName | None:
    """Split the name of a member; None for hidden files, documents and content that is not read."""
    match = _NAME.match(name)
    if match is None or is_hidden(name):
        return None
    member = MemberName(match[1], match[2].lower())
    is_document = member.suffix in TEXTS and PurePosixPath(member.key).name.lower() in _DOCUMENTS
    return member if member.suffix in (*IMAGES, *TEXTS, *METADATA) and not is_document else None


def image_suffix(owner: str, place: str, suffixes: Container[str]) -> str:
    """The suffix of the member that holds a sample's image.

    Raises:
        ValueError: The sample has no image.
    """
    for suffix in IMAGES:
        if suffix in suffixes:
            return suffix
    raise DamagedSample(owner, place, f"has no image; expected one of {', '.join(IMAGES)}")


def read_captions(
    owner: str, place: str, files: Mapping[str, bytes], ignore: Callable[[str], object] = lambda reason: None
) -> tuple[tuple[str, ...], int | None]:
    """Captions and class of a sample; the class is None if not given.

    Captions are the lines of a txt or, without one, those in a json. The class is that of a cls or, without one, that
    in a json. Other content of a json is ignored.

    Args:
        owner: The class that reads the sample.
        place: Name of the sample in error messages.
        files: Contents of its members by suffix.
        ignore: Called with a description of a damaged json that is not needed.

    Raises:
        ValueError: A member cannot be read, or no caption contains a word.
    """
    try:
        captions = _text_captions(files)
        fields = _json_fields(files, ignore if captions else None)
    except (ValueError, RecursionError) as error:
        raise DamagedSample(owner, place, f"has captions that cannot be read ({error})") from error
    if not captions:
        in_json = captions_in(fields)
        captions = captions if in_json is None else in_json
    if captions is None:
        raise DamagedSample(
            owner, place, 'has no captions; expected a txt, or a json such as {"captions": ["...", ...], "class": 3}'
        )
    if not captions:
        raise DamagedSample(owner, place, "has no caption with a word")
    try:
        return captions, _class_id(files, fields)
    except ValueError as error:
        raise DamagedSample(owner, place, f"has a class that cannot be read ({error})") from error


def reason_of(error: Exception) -> str:
    """The message of an error, without the objects that webdataset appends to it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    message = str(error.args[0]) if error.args else ""
    return " ".join(message.split(" @ ")[0].split()) or type(error).__name__


def _text_captions(files: Mapping[str, bytes]) -> tuple[str, ...] | None:
    """The captions in the first of `TEXTS` with a word; None if there is no such member."""
    captions = None
    for suffix in TEXTS:
        if not captions and suffix in files:
            captions = clean_captions(split_lines(files[suffix].decode("utf-8-sig")))
    return captions


def _json_fields(files: Mapping[str, bytes], ignore: Callable[[str], object] | None) -> dict[str, Any]:
    """The fields of the json, none if it is missing or holds something else.

    Raises:
        ValueError: It is damaged, and `ignore` is None.
    """
    try:
        fields = json.loads(files.get("json", b"{}"))
    except (ValueError, RecursionError) as error:
        if ignore is None:
            raise
        ignore(f"has a json that cannot be read ({error})")
        return {}
    return fields if isinstance(fields, dict) else {}


def _class_id(files: Mapping[str, bytes], fields: Mapping[str, Any]) -> int | None:
    """The number in the cls or else in the json, or the id of a class name; None without a class.

    Raises:
        ValueError: The class cannot be read.
    """
    value = files["cls"].decode("utf-8-sig").strip() if "cls" in files else class_in(fields)
    if value is None or value == "":
        return None
    try:
        number = int(value)
    except ValueError:
        return class_named(str(value))
    if not 0 <= number < 2**63:
        raise ValueError(f"the class must be a name, or an integer from 0 to 2**63 - 1, but it is {number}")
    return number


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
