"""Random generators as pure functions of numbers such as seed, epoch and batch."""

from __future__ import annotations

import hashlib

import torch


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator whose seed is a hash of all `numbers`, of any size and sign, their order and their count.

    torch's CPU generator uses 32 bits of the seed, so any two streams coincide with a probability of 2**-32.

    Examples:
        >>> import torch
        >>> from mirror_modules.data.seeding import seeded
        >>> first, again, other = (torch.rand(3, generator=seeded(0, step)) for step in (1, 1, 2))
        >>> torch.equal(first, again), torch.equal(first, other)
        (True, False)
    """
    text = ",".join(f"{number:d}" for number in numbers)
    digest = hashlib.sha256(text.encode("ascii")).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") // 2)
