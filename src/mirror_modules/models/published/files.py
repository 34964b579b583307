"""Published .pth files, read without executing code from them."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

COLOR_CODE = re.compile(r"\x1b\[[0-9;]*m")


def load_published(path: str | Path) -> dict[str, Tensor]:
    """Load a published .pth file, in any format that torch has written, without executing code from it.

    Args:
        path: The file.

    Returns:
        The published state, on the CPU.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged, or holds anything but named tensors.

    Examples:
        >>> from mirror_modules.models.published import load_published
        >>> state = load_published("netG.pth")  # doctest: +SKIP
        >>> state["ca_net.fc.weight"].shape  # doctest: +SKIP
        torch.Size([400, 256])
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a published .pth file.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = _reason(error)
        raise ValueError(f"{path} is damaged, or holds more than tensors ({reason}); download it again.") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, expected a dict of tensors such as a state_dict.")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(
                f"{path} holds a dict, expected a dict of tensors such as a state_dict, but it contains {name!r}: "
                f"{type(tensor).__name__}; if one of its entries is the state, save that one to a file of its own."
            )
    return state


def _reason(error: Exception) -> str:
    """Why `torch.load` failed, without its color codes and its advice to load the file unsafely."""
    message = COLOR_CODE.sub("", str(error))
    refused = re.search(r"GLOBAL (\S+)", message)
    if refused is not None:
        return f"it refers to {refused[1]}"
    return message.strip().partition("\n")[0].partition(". ")[0] or type(error).__name__
