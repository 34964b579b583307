"""The choice between implementations: a pure function of facts, so that it can be tested without a GPU."""

from __future__ import annotations

from typing import NamedTuple

from mirror_modules._checks import check_choice

IMPLEMENTATIONS = ("auto", "torch", "triton")


class Choice(NamedTuple):
    """What runs and why."""

    implementation: str
    """ "torch" or "triton"."""
    reason: str
    """One sentence for people."""


def choose_implementation(operation: str, impl: str = "auto") -> Choice:
    """Choose the implementation of `operation`.

    Args:
        operation: The name of the operation, for messages.
        impl: "auto", "torch" or "triton". A named implementation runs or raises; "auto" takes the fastest that applies.

    Raises:
        ValueError: `impl` is none of the three.
        NotImplementedError: `impl` names an implementation that this operation does not have.
    """
    check_choice(operation, "impl", impl, IMPLEMENTATIONS)
    if impl == "triton":
        raise NotImplementedError(
            f"{operation}: impl='triton' cannot run: this release has no Triton kernel for it; use 'auto' or 'torch'."
        )
    reason = "asked for" if impl == "torch" else "the only implementation of this operation"
    return Choice("torch", reason)
