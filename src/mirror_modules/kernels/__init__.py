"""Which implementation of an operation runs, and why."""

from mirror_modules.kernels.choice import Choice, choose_implementation

__all__ = ["Choice", "choose_implementation"]
