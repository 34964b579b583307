"""Shared by the adapters of external encoders: freezing, pooling, checks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from mirror_modules._checks import (
    at_least_float32,
    check_choice,
    zero_padding,
)
from mirror_modules._freezing import freeze, is_frozen
from mirror_modules._typing import TypedCall

Pooling = Literal["pooled", "projection", "mean"]
POOLINGS: tuple[Pooling, ...] = ("pooled", "projection", "mean")
FAILURES = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, ZeroDivisionError)
"""What a Module raises on inputs that it does not take."""


class Adapter(TypedCall, nn.Module):
    """A Module that keeps the model inside it frozen, unless it is trainable."""

    def __init__(self, trainable: bool) -> None:
        super().__init__()
        self.trainable = trainable

    def train(self, mode: bool = True) -> Self:
        """Set the mode of this adapter; a frozen model stays frozen."""
        super().train(mode)
        if not self.trainable:
            self._freeze()
        return self

    def _freeze(self) -> None:
        for child in self.children():
            freeze(child)

    def _keep_frozen(self) -> None:
        """Freeze again if another owner of the model, or a Module that contains it, has changed modes or gradients."""
        if not self.trainable and not all(map(is_frozen, self.children())):
            self._freeze()

    @contextmanager
    def _probing(self, model: nn.Module) -> Iterator[None]:
        """Run in evaluation mode without gradients; on exit, the modes of the model are restored."""
        modes = [(module, module.training) for module in model.modules()]
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            # Parents come before their children, and `train` of a parent sets the mode of all of them.
            self.train(modes[0][1])
            for module, mode in modes:
                module.train(mode)


def pool(
    kind: Pooling, parts: Tensor, pooled: Tensor | None, projection: nn.Module | None, mask: Tensor | None = None
) -> Tensor:
    """One feature (B, D) of words or regions (B, N, D), of which those in `mask` are real, or of the pooled output."""
    if kind == "mean":
        wide = at_least_float32(zero_padding(parts, mask))
        # On a GPU, a caption without a word is not refused and must not give NaN.
        mean = wide.mean(dim=1) if mask is None else wide.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        return mean.to(parts.dtype)
    pooled = cast(Tensor, pooled)
    return pooled if kind == "pooled" else cast(nn.Module, projection)(pooled)


def choose_pooling(
    owner: str,
    argument: str,
    given: Pooling | None,
    model: nn.Module,
    pooled: Tensor | None,
    projection: nn.Module | None,
) -> Pooling:
    """The pooling asked for, or else the first that the model has.

    Raises:
        ValueError: The model has no such output.
    """
    available = {"pooled": pooled is not None, "projection": pooled is not None and projection is not None}
    kinds = [kind for kind in POOLINGS if available.get(kind, True)]
    if given is not None and given not in kinds:
        raise ValueError(
            f"{owner}: {argument}={given!r}, but {type(model).__name__} has no such output; it has "
            f"{', '.join(map(repr, kinds))}."
        )
    return kinds[0] if given is None else given


def check_pooling(owner: str, argument: str, value: Pooling | None) -> None:
    """Require one of `POOLINGS`, or None."""
    if value is not None:
        check_choice(owner, argument, value, POOLINGS)


def check_module(owner: str, model: object) -> None:
    """Require a Module rather than a name or a class."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"{owner}: model must be an nn.Module, but it is a {type(model).__name__}; load it first.")


def arguments_of(model: nn.Module) -> set[str]:
    """Names of the arguments of a model's forward."""
    return set(inspect.signature(model.forward).parameters)


def example_of(model: nn.Module) -> Tensor:
    """A floating point tensor of the device and precision of a model."""
    return next((weight for weight in model.parameters() if weight.is_floating_point()), torch.empty(0))
