"""What a text-to-image model is measured by."""

from mirror_modules.metrics.r_precision import RPrecision, r_precision

__all__ = ["RPrecision", "r_precision"]
