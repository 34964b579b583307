"""The six attributes of a drawn flower, whose combinations form 9,216 classes."""

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
"""Values of each attribute, by its name."""


def check_attributes(attributes: Mapping[str, str]) -> None:
    """Require exactly the attributes of `ATTRIBUTES`, each with a known value."""
    if set(attributes) != set(ATTRIBUTES):
        raise ValueError(f"Flower: attributes are {sorted(attributes)}; expected exactly {sorted(ATTRIBUTES)}.")
    for name, values in ATTRIBUTES.items():
        if attributes[name] not in values:
            raise ValueError(f"Flower: {name} must be one of {', '.join(values)}, but it is {attributes[name]!r}.")


def class_id_of(attributes: Mapping[str, str]) -> int:
    """Number a combination of attributes in mixed radix: the last attribute of `ATTRIBUTES` varies fastest.

    Args:
        attributes: One value for each attribute of `ATTRIBUTES`.

    Returns:
        The class id, from 0 to 9,215.

    Raises:
        ValueError: An attribute is missing or unknown, or has an unknown value.

    Examples:
        >>> from mirror_modules.data import ATTRIBUTES, class_id_of
        >>> first = {name: values[0] for name, values in ATTRIBUTES.items()}
        >>> class_id_of(first), class_id_of(first | {"background": "meadow"}), class_id_of(first | {"size": "large"})
        (0, 1, 6)
    """
    check_attributes(attributes)
    class_id = 0
    for name, values in ATTRIBUTES.items():
        class_id = class_id * len(values) + values.index(attributes[name])
    return class_id
