"""Networks that stay frozen, whoever else owns them, and modes that are restored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def freeze(module: nn.Module) -> None:
    """Freeze a module in place: no parameter requires a gradient, and batch norm and dropout are in evaluation mode.

    Only recurrent layers stay in training mode, without dropout, because cuDNN cannot run backward through them
    otherwise.
    """
    module.eval()
    module.requires_grad_(False)
    # An optimizer updates every parameter with a gradient, even one that remains from the module's own training.
    module.zero_grad(set_to_none=True)
    for layer in module.modules():
        if isinstance(layer, nn.RNNBase):
            layer.dropout = 0.0
            layer.train()


def is_frozen(module: nn.Module) -> bool:
    """Check that no other owner of the module, such as a whole model, has changed its modes or gradients."""
    if any(parameter.requires_grad for parameter in module.parameters()):
        return False
    return all(layer.training == isinstance(layer, nn.RNNBase) for layer in module.modules())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, and restore the mode of each submodule on exit, so that frozen ones stay frozen."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
