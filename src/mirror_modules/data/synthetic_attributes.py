"""What a synthetic flower can be: six attributes, whose values form 9,216 classes."""

from __future__ import annotations

from collections.abc import Mapping

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "petal_color": ("red", "orange", "yellow", "pink", "purple", "blue", "white", "maroon"),
    "petal_count": ("three", "four", "five", "six", "seven", "eight"),
    "petal_shape": ("round", "pointed", "heart", "narrow"),
    "center_color": ("golden", "black", "green", "turquoise"),
    "size": ("small", "large"),
    "background": ("sky", "meadow", "night", "sand", "stripes", "dots"),
}
"""The names of the attributes and the values of each."""


def check_attributes(attributes: Mapping[str, str]) -> None:
    """Require one known value for each attribute of `ATTRIBUTES`, and no other attribute."""
    if set(attributes) != set(ATTRIBUTES):
        raise ValueError(f"Flower: attributes are {sorted(attributes)}, expected exactly {sorted(ATTRIBUTES)}.")
    for name, values in ATTRIBUTES.items():
        if attributes[name] not in values:
            raise ValueError(f"Flower: {name} must be one of {', '.join(values)}, but it is {attributes[name]!r}.")


def class_id_of(attributes: Mapping[str, str]) -> int:
    """Number the attributes by mixed radix: the last attribute of `ATTRIBUTES` counts fastest.

    Raises:
        ValueError: An attribute is missing, foreign, or has an unknown value.
    """
    check_attributes(attributes)
    class_id = 0
    for name, values in ATTRIBUTES.items():
        class_id = class_id * len(values) + values.index(attributes[name])
    return class_id
