"""A folder of WebDataset shards on a local disk: tar files, of which any image can be read at any time."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import ClassVar, NamedTuple

from mirror_modules.data.damage import DamagedSample
from mirror_modules.data.files import CaptionedFiles, Entry, Part, class_of
from mirror_modules.data.shards import Member, check_end, find_shards, image_suffix, read_captions, reason_of

# As webdataset divides names, and leaves out what is said of the shard itself.
_NAME = re.compile(r"(?!__[^/]*__(?:$|/))((?:.*/|)[^.]+)\.([^/]*)$")
# The first bytes of gzip, bzip2, xz and zstd.
_COMPRESSED = re.compile(rb"\x1f\x8b\x08|BZh[1-9]1AY&SY|\xfd7zXZ\x00|\x28\xb5\x2f\xfd")


class ShardFolder(CaptionedFiles):
    """Square images with their captions, out of a folder of shards in the format of the package `webdataset`.

    The samples are those of `WebDatasetCaptions`, in the order of the shards' names and of the files in them. When the
    folder is opened, the headers and captions of all shards are read; an image is read when it is asked for, from its
    place in the shard. That is why shards must not be compressed.

    Args:
        root: The folder.
        split: "train" or "validation".
        resolution: Height and width in pixels.
        on_error: "stop", "skip" or "list": see `ErrorReport`. What follows in a shard that is cut short is lost, and
            counts as one.

    Raises:
        FileNotFoundError: `root` is missing, or has no shard of the split.
        ValueError: A file does not hold what it should; the message names it.
        ImportError: Pillow is missing.
    """

    layout: ClassVar[str] = "the shards train-*.tar and validation-*.tar"

    def __init__(self, root: str | Path, *, split: str = "train", resolution: int = 64, on_error: str = "stop") -> None:
        super().__init__(root, split, resolution, on_error)

    def _read_entries(self) -> Iterator[Entry]:
        shards = find_shards(self.root, self.split)
        if not shards:
            self._require(f"{self.split}-*.tar")
        for shard in shards:
            is_empty, known = True, len(self.report.skipped)
            for key, files in groupby(self._read_files(shard), lambda file: file.key):
                yield from self._read_sample(shard, key, files)
                is_empty = False
            if is_empty and len(self.report.skipped) == known:
                self._leave_out(shard, "cannot be read as a whole (there is no sample in it)")

    def _read_files(self, shard: Path) -> Iterator[_File]:
        """What a shard holds, up to where it cannot be read."""
        try:
            with shard.open("rb") as file:
                length = shard.stat().st_size
                if length == 0:
                    raise tarfile.ReadError("empty file")
                if _COMPRESSED.match(file.read(10)):
                    raise tarfile.ReadError("it is compressed; unpack it, for images are read from their place in it")
                file.seek(0)
                with tarfile.open(fileobj=file, mode="r:", tarinfo=Member) as tar:
                    for member in tar:
                        if not member.isreg():
                            continue
                        if not 0 <= member.size <= length - member.offset_data:
                            raise tarfile.ReadError("unexpected end of data")
                        if name := _NAME.match(member.name):
                            suffix = name[2].lower()
                            stored = tar.extractfile(member) if suffix in ("json", "txt") else None
                            content = b"" if stored is None else stored.read()
                            yield _File(name[1], suffix, Part(shard, member.offset_data, member.size), content)
                    check_end(file)
        # Numbers in damaged headers may be none, or too large to go there.
        except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
            self._leave_out(shard, f"cannot be read as a whole ({reason_of(error)})")

    def _read_sample(self, shard: Path, key: str, group: Iterable[_File]) -> Iterator[Entry]:
        # Text, because a name in a tar file may begin with a slash.
        place = f"{shard}/{key}"
        files: dict[str, _File] = {}
        for file in group:
            if files.setdefault(file.suffix, file) is not file:
                self._leave_out(f"{place}.{file.suffix}", "occurs twice in one sample; the first one is read")
        try:
            suffix = image_suffix(self._owner, place, files)
            texts = {suffix: file.content for suffix, file in files.items() if suffix in ("json", "txt")}
            captions, class_id = read_captions(self._owner, place, texts)
        except DamagedSample as error:
            self._leave_out(*error.skipped)
        else:
            # By the shard's name alone, so that the folder may be moved.
            class_id = class_of(f"{shard.name}/{key}") if class_id is None else class_id
            yield Entry(Path(f"{place}.{suffix}"), captions, class_id, part=files[suffix].part)


class _File(NamedTuple):
    """A file in a shard."""

    key: str
    """What the files of a sample share of their names."""
    suffix: str
    """The rest."""
    part: Part
    content: bytes
    """Of a text; empty for others."""
