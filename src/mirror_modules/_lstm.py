"""An LSTM without autocast on a CPU, and as a single operator in exported graphs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

OPERATOR = "mirror_modules::lstm"
# torch 2.6 has no `is_exporting`: there, exported graphs keep the length of the example.
is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)


def run_lstm(
    lstm: nn.LSTM, inputs: Tensor, state: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Run an LSTM with one layer and `batch_first`.

    `torch.export` unrolls `nn.LSTM` and thereby fixes the length of the sequence to that of the example. A custom
    operator takes its place in exported graphs, which are for inference: it has no gradient.

    Args:
        lstm: The module that owns the weights.
        inputs: (B, L, D).
        state: Hidden state and cell state, each (directions, B, H); None for zeros.

    Returns:
        Hidden states (B, L, directions * H), and the last state.
    """
    weights = [weight for direction in lstm.all_weights for weight in direction]
    if is_exporting() and state is None:
        states, hidden, cell = exported_lstm(inputs.to(weights[0].dtype), weights, lstm.bidirectional)
        return states, (hidden, cell)
    if inputs.device.type != "cpu":
        return lstm(inputs, state)
    # Many CPUs have no bfloat16 LSTM, and torch raises.
    with torch.autocast("cpu", enabled=False):
        return lstm(inputs.to(weights[0].dtype), state)


@torch.library.custom_op(OPERATOR, mutates_args=())
def exported_lstm(inputs: Tensor, weights: list[Tensor], bidirectional: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, last hidden and cell state; `weights` are those of `nn.LSTM`, direction by direction."""
    zeros = inputs.new_zeros(1 + bidirectional, inputs.shape[0], weights[1].shape[1])
    states, hidden, cell = torch.lstm(inputs, (zeros, zeros), weights, True, 1, 0.0, False, bidirectional, True)
    return states.contiguous(), hidden, cell


@exported_lstm.register_fake
def _empty_results(inputs: Tensor, weights: list[Tensor], bidirectional: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, _ = inputs.shape
    directions, size = 1 + bidirectional, weights[1].shape[1]
    hidden, cell = (inputs.new_empty(directions, batch, size) for _ in range(2))
    return inputs.new_empty(batch, length, directions * size), hidden, cell
