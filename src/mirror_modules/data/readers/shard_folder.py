"""A local folder of WebDataset shards: tar files with random access to each image."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import ClassVar, NamedTuple

from mirror_modules.data.readers.damage import DamagedSample
from mirror_modules.data.readers.files import CaptionedFiles, Entry, Part, class_of
from mirror_modules.data.readers.shards import (
    IMAGES,
    Member,
    check_end,
    find_shards,
    image_suffix,
    read_captions,
    reason_of,
    split_member,
)

# The first bytes of gzip, bzip2, xz and zstd.
_COMPRESSED = re.compile(rb"\x1f\x8b\x08|BZh[1-9]1AY&SY|\xfd7zXZ\x00|\x28\xb5\x2f\xfd")


class ShardFolder(CaptionedFiles):
    """Square images with captions, from a folder of shards in the format of the package `webdataset`.

    The samples equal those of `WebDatasetCaptions`, in the order of the shard names and of the members in each shard.
    Opening the folder reads the headers and captions of all shards; an image is read on access, by its offset in the
    shard, so the shards must not be compressed.

    Args:
        root: The folder.
        split: "train" or "validation".
        resolution: Height and width in pixels.
        on_error: "stop", "skip" or "list": see `ErrorReport`. The remainder of a truncated shard is lost, and counts as
            one damaged sample.

    Raises:
        FileNotFoundError: `root` is missing, or has no shard of the split.
        ValueError: A file has invalid content; the message names the file.
        ImportError: Pillow is missing.

    Examples:
        >>> import tarfile, tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from mirror_modules.data import ShardFolder
        >>> root = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (40, 30), "red").save(root / "0.png")
        >>> _ = (root / "0.txt").write_text("a red sheet of paper")
        >>> with tarfile.open(root / "train-000.tar", "w") as tar:
        ...     for name in ("0.png", "0.txt"):
        ...         tar.add(root / name, name)
        >>> ShardFolder(root, resolution=16)[0].captions
        ('a red sheet of paper',)
    """

    layout: ClassVar[str] = "the shards train-*.tar and validation-*.tar"

    def __init__(self, root: str | Path, *, split: str = "train", resolution: int = 64, on_error: str = "stop") -> None:
        super().__init__(root, split, resolution, on_error)

    def _read_entries(self) -> Iterator[Entry]:
        shards = find_shards(self.root, self.split)
        if not shards:
            self._require(f"{self.split}-*.tar")
        for shard in shards:
            is_empty, skipped_before = True, len(self.report.skipped)
            for key, files in groupby(self._read_files(shard), lambda file: file.key):
                yield from self._read_sample(shard, key, files)
                is_empty = False
            if is_empty and len(self.report.skipped) == skipped_before:
                self._skip(shard, "cannot be read completely (it holds no sample)")

    def _read_files(self, shard: Path) -> Iterator[_File]:
        """The members of a shard, up to the first damaged one."""
        try:
            with shard.open("rb") as file:
                length = shard.stat().st_size
                if length == 0:
                    raise tarfile.ReadError("empty file")
                if _COMPRESSED.match(file.read(10)):
                    raise tarfile.ReadError("it is compressed; decompress it, since images are read by their offset")
                file.seek(0)
                with tarfile.open(fileobj=file, mode="r:", tarinfo=Member) as tar:
                    for member in tar:
                        if not member.isreg():
                            continue
                        if not 0 <= member.size <= length - member.offset_data:
                            raise tarfile.ReadError("unexpected end of data")
                        if name := split_member(member.name):
                            stored = None if name.suffix in IMAGES else tar.extractfile(member)
                            content = b"" if stored is None else stored.read()
                            yield _File(*name, Part(shard, member.offset_data, member.size), content)
                    check_end(file)
        # Number fields of damaged headers may be no numbers, or offsets too large to seek to.
        except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
            self._skip(shard, f"cannot be read completely ({reason_of(error)})")

    def _read_sample(self, shard: Path, key: str, group: Iterable[_File]) -> Iterator[Entry]:
        # A string, since a member name may start with a slash, which would replace the whole path.
        place = f"{shard}/{key}"
        files: dict[str, _File] = {}
        for file in group:
            if files.setdefault(file.suffix, file) is not file:
                self._skip(f"{place}.{file.suffix}", "occurs twice in one sample; the first one is read")
        try:
            suffix = image_suffix(self._owner, place, files)
            texts = {suffix: file.content for suffix, file in files.items() if suffix not in IMAGES}
            captions, class_id = read_captions(
                self._owner, place, texts, lambda reason: self.report.ignore(place, reason)
            )
        except DamagedSample as error:
            self._skip(*error.skipped)
        else:
            # The shard's name without its folder, which may be moved.
            class_id = class_of(f"{shard.name}/{key}") if class_id is None else class_id
            yield Entry(Path(f"{place}.{suffix}"), captions, class_id, part=files[suffix].part)


class _File(NamedTuple):
    """A member of a shard."""

    key: str
    """The part of the name that all members of a sample share."""
    suffix: str
    """The rest of the name."""
    part: Part
    content: bytes
    """Empty for an image."""
