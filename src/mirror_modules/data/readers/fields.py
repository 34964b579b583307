"""Captions and classes in metadata beside images, under the names that common tools give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mirror_modules.data.readers.files import clean_captions

# Names of a field in order of preference; the later ones are those of Hugging Face's image folders.
FILE_FIELDS = ("file", "file_name")
CAPTION_FIELDS = ("captions", "caption", "text")


def captions_in(fields: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The captions of the first of `CAPTION_FIELDS` that holds a word: a string, or a list of strings.

    Returns:
        The captions, empty if they are null or hold no word; None without such a field. A field of another type is
        metadata of unknown meaning.
    """
    captions = None
    for name in CAPTION_FIELDS:
        value = fields.get(name, 0)
        lines = value if isinstance(value, list) else [value]
        if all(line is None or isinstance(line, str) for line in lines):
            captions = clean_captions(line for line in lines if line is not None)
            if captions:
                break
    return captions


def class_in(fields: Mapping[str, Any]) -> int | str | None:
    """The class: a number or a name in the field `class`, else a number from 0 in the field `label`; None without one.

    Raises:
        ValueError: The field `class` has another type.
    """
    value, label = fields.get("class"), fields.get("label")
    if isinstance(value, str):
        value = value.strip() or None
    if value is not None:
        if not isinstance(value, int | str):
            raise ValueError(f"the class must be a number or a name, but it is {value!r}")
        return value
    # The rows of a table hold strings.
    is_number = (type(label) is int and label >= 0) or (isinstance(label, str) and label.isdecimal())
    return label if is_number else None
