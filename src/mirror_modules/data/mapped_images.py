"""Images in memory-mapped files, as a tensor that is read when it is indexed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor


class MappedImages:
    """Rows of images in one or more memory-mapped files, read when they are indexed.

    It behaves like a tensor of bytes (N, H, W, 3) on the CPU that can be indexed and split along its first axis only.

    Args:
        files: The images of each file, (N_k, H, W, 3), all of one size.
        rows: The rows to keep, counted through all files; None keeps all.
    """

    def __init__(self, files: Sequence[Tensor], rows: Sequence[int] | None = None) -> None:
        self._files, self._ends = files, list(accumulate(map(len, files)))
        every = torch.arange(self._ends[-1])
        self._rows = every if rows is None else every[torch.tensor(rows, dtype=torch.long)]
        self.shape = torch.Size((len(self._rows), *files[0].shape[1:]))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int | slice | Tensor) -> Tensor:
        """A single image, which is not copied, or a copy of the images at a slice or at rows (B,)."""
        rows = self._rows[index]
        if rows.ndim == 0:
            return self._image(int(rows))
        images = torch.empty(len(rows), *self.shape[1:], dtype=torch.uint8)
        for i, row in enumerate(rows.tolist()):
            images[i] = self._image(row)
        return images

    def split(self, size: int) -> Iterator[Tensor]:
        """Copies of consecutive chunks of `size` images, the last of which may be shorter."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def _image(self, row: int) -> Tensor:
        file = bisect_right(self._ends, row)
        return self._files[file][row - self._ends[file]]  # a negative index, from the end of the file
