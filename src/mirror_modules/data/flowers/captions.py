"""Captions of a drawn flower, written from its attributes and parsed back into them.

Each word of `WORDS` names exactly one value of one attribute, whatever the sentence around it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from mirror_modules.data.flowers.attributes import ATTRIBUTES, check_attributes

MAX_WORDS = 18  # per caption

WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "petal_color": {
        "red": ("red", "scarlet"),
        "orange": ("orange", "tangerine"),
        "yellow": ("yellow", "lemon"),
        "pink": ("pink", "rosy"),
        "purple": ("purple", "violet"),
        "blue": ("blue", "sapphire"),
        "white": ("white", "snowy"),
        "maroon": ("maroon", "burgundy"),
    },
    "petal_count": {count: (count,) for count in ATTRIBUTES["petal_count"]},
    "petal_shape": {
        "round": ("round", "rounded"),
        "pointed": ("pointed", "sharp"),
        "heart": ("heart", "notched"),
        "narrow": ("narrow", "slender"),
    },
    "center_color": {
        "golden": ("golden", "amber"),
        "black": ("black", "ebony"),
        "green": ("green", "lime"),
        "turquoise": ("turquoise", "teal"),
    },
    "size": {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")},
    "background": {
        "sky": ("sky", "clouds"),
        "meadow": ("meadow", "grass"),
        "night": ("night", "stars"),
        "sand": ("sand", "beach"),
        "stripes": ("stripes", "striped"),
        "dots": ("dots", "dotted"),
    },
}
"""Words that name each value of each attribute."""

PLACES = {
    "sky": ("against the sky", "under a bright sky", "in front of clouds"),
    "meadow": ("in a meadow", "on a wild meadow", "in tall grass"),
    "night": ("at night", "in the dark night", "under the stars"),
    "sand": ("on warm sand", "in the sand", "on a beach"),
    "stripes": ("on a striped cloth", "before a striped wall", "over broad stripes"),
    "dots": ("on a dotted cloth", "before a dotted wall", "over pale dots"),
}

# Templates with {place} or {center} require that the caption names that attribute; other parts may be empty.
TEMPLATES = (
    "a {flower} with {petals}{and_center}{at_place}",
    "this {flower} has {petals}{and_center}{at_place}",
    "there is a {flower} with {petals}{and_center}{at_place}",
    "a {flower}{at_place} shows {petals}{around_center}",
    "look at this {flower} with its {petals}{around_center}{at_place}",
    "the {count}petals of this {flower} are {look}{around_center}{at_place}",
    "{petals} surround the {center} of a {flower}{at_place}",
    "the {center} of this {flower} sits between {petals}{at_place}",
    "{place} a {flower} opens its {petals}{around_center}",
    "{place} we see a {flower} with {petals}{and_center}",
)
FLOWERS = ("flower", "blossom", "bloom")
CENTERS = ("center", "middle", "eye")

_MEANINGS = {word: (name, value) for name, values in WORDS.items() for value, words in values.items() for word in words}


def write_captions(attributes: Mapping[str, str], rng: np.random.Generator, count: int) -> list[str]:
    """Describe a flower in `count` captions of 6 to 18 words.

    Each names the petal color and three (30 %), four (40 %) or all five (30 %) of the other attributes.

    Args:
        attributes: One value for each attribute of `ATTRIBUTES`.
        rng: Random generator that chooses the attributes, words and templates.
        count: Number of captions.

    Returns:
        The captions.

    Raises:
        ValueError: The attributes are not those of `ATTRIBUTES`.

    Examples:
        >>> import numpy as np
        >>> from mirror_modules.data import ATTRIBUTES, attributes_named, write_captions
        >>> flower = {name: values[0] for name, values in ATTRIBUTES.items()}
        >>> captions = write_captions(flower, np.random.default_rng(0), count=3)
        >>> len(captions), all(attributes_named(caption)["petal_color"] == "red" for caption in captions)
        (3, True)
    """
    check_attributes(attributes)
    others = [name for name in ATTRIBUTES if name != "petal_color"]
    captions = []
    for named_count in rng.choice([3, 4, 5], size=count, p=[0.3, 0.4, 0.3]):
        named = {others[i] for i in rng.permutation(len(others))[:named_count]}
        caption = _write_caption(attributes, named, rng)
        while len(caption.split()) > MAX_WORDS:
            caption = _write_caption(attributes, named, rng)
        captions.append(caption)
    return captions


def attributes_named(caption: str) -> dict[str, str]:
    """Parse the attributes named in a caption: {"petal_color": "red", ...}.

    Words that name no attribute are ignored. If a caption names two values of one attribute, the first counts.

    Args:
        caption: Any text.

    Returns:
        The value of each attribute that the caption names, in order of mention.

    Examples:
        >>> from mirror_modules.data import attributes_named
        >>> attributes_named("a tiny flower with scarlet heart shaped petals")
        {'size': 'small', 'petal_color': 'red', 'petal_shape': 'heart'}
    """
    named: dict[str, str] = {}
    for word in re.findall(r"[a-z0-9]+", caption.lower()):
        if word in _MEANINGS:
            name, value = _MEANINGS[word]
            named.setdefault(name, value)
    return named


def _write_caption(attributes: Mapping[str, str], named: set[str], rng: np.random.Generator) -> str:
    """One caption of any length that names the petal color and the attributes in `named`."""

    def word(name: str) -> str:
        """A word for an attribute with a trailing space, or an empty string if the attribute is not named."""
        return _pick(WORDS[name][attributes[name]], rng).replace("heart", "heart shaped") + " " if name in named else ""

    color = _pick(WORDS["petal_color"][attributes["petal_color"]], rng)
    count, shape = word("petal_count"), word("petal_shape")
    center = word("center_color") + _pick(CENTERS, rng) if "center_color" in named else ""
    place = _pick(PLACES[attributes["background"]], rng) if "background" in named else ""
    fitting = [t for t in TEMPLATES if ("{center}" not in t or center) and ("{place}" not in t or place)]
    caption = _pick(fitting, rng).format(
        flower=word("size") + _pick(FLOWERS, rng),
        petals=f"{count}{shape}{color} petals",
        count=count,
        look=f"{color} and {shape}".removesuffix(" and ").rstrip(),
        center=center,
        and_center=f" and a {center}" if center else "",
        around_center=f" around a {center}" if center else "",
        place=place,
        at_place=f" {place}" if place else "",
    )
    return re.sub(r"\ba (?=[aeiou])", "an ", caption)


def _pick(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]
