"""Batch norms that are not the identity, so that a test notices a missing one."""

from torch import nn


def with_random_norms(module):
    """Draw the statistics, scales and biases of all batch norms of a module, and return it."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(part.running_var, 0.5, 2.0)
            nn.init.normal_(part.running_mean)
            nn.init.uniform_(part.weight, 0.5, 2.0)
            nn.init.normal_(part.bias)
    return module
