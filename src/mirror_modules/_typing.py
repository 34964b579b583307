"""Types for type checkers alone: nothing here changes what runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Protocol, TypeVar

    from typing_extensions import ParamSpec

    P = ParamSpec("P")
    Result = TypeVar("Result", covariant=True)

    class _HasForward(Protocol[P, Result]):
        def forward(self, *args: P.args, **kwargs: P.kwargs) -> Result: ...


class TypedCall:
    """A base class before `nn.Module`: to a type checker, a call has the arguments and the result of `forward`.

    `nn.Module` declares that a call returns Any. Unlike `__call__ = forward`, this type follows the `forward` of each
    subclass, and pyright accepts it.
    """

    if TYPE_CHECKING:

        def __call__(self: _HasForward[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result: ...
