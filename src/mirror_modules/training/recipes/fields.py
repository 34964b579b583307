"""The fields of frozen records: marks, checks with clear errors, values from JSON, comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mirror_modules._checks import check_number


def harmless(default: Any) -> Any:
    """A field that may change when a run is resumed, because it does not affect the result of a step."""
    return dataclasses.field(default=default, metadata={"harmless": True})


def check_has_effect(owner: str, record: Any, name: str, condition: str) -> None:
    """Require the default of a field that is not read under a condition."""
    default = next(each.default for each in dataclasses.fields(record) if each.name == name)
    value = getattr(record, name)
    if value != default:
        raise ValueError(
            f"{owner}: {name}={value!r} has no effect with {condition}; leave {name} at {default!r}, or change the "
            "latter."
        )


def check_above_zero(owner: str, record: Any, *names: str) -> None:
    """Require numbers above 0, or None."""
    for name in names:
        value = getattr(record, name)
        if value is None:
            continue
        check_number(owner, **{name: value})
        if value <= 0:
            raise ValueError(f"{owner}: {name} must be above 0, but it is {value!r}.")


def check_not_negative(owner: str, record: Any, *names: str) -> None:
    """Require numbers of 0 or more, or None."""
    for name in names:
        value = getattr(record, name)
        if value is None:
            continue
        check_number(owner, **{name: value})
        if value < 0:
            raise ValueError(f"{owner}: {name} must be 0 or more, but it is {value!r}.")


def changed_fields(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Describe each field in which two records differ, with whether the field is marked harmless."""
    for each in dataclasses.fields(old):
        before, now, name = getattr(old, each.name), getattr(new, each.name), prefix + each.name
        if not each.compare and None in (before, now):
            # A record of what was found, which a recipe need not give.
            continue
        if dataclasses.is_dataclass(before) and type(before) is type(now):
            yield from changed_fields(before, now, f"{name}.")
        elif before != now:
            yield f"{name} is {before!r} there and {now!r} now", bool(each.metadata.get("harmless"))


def override(record: Any, fields: Any, prefix: str = "") -> Any:
    """Copy a frozen record with some fields replaced, nested ones included."""
    place = f" of {prefix.removesuffix('.')!r}" if prefix else ""
    if not isinstance(fields, dict):
        raise ValueError(f"Recipe: the value{place} must be an object of named fields, but it is {fields!r}.")
    hints, changes = get_type_hints(type(record)), {}
    for name, value in fields.items():
        if name not in hints:
            close = get_close_matches(name, hints, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; the fields are {', '.join(hints)}."
            raise ValueError(f"Recipe: unknown field {prefix + name!r}{hint}")
        before, nested = getattr(record, name), _record_in(hints[name])
        if nested is not None and isinstance(value, nested):
            changes[name] = value
        elif nested is not None and isinstance(value, str) and _is_named(nested):
            # Another name means other weights and sizes.
            changes[name] = nested(value)
        elif nested is not None and not (value is None and _has_type(None, hints[name])):
            changes[name] = _nested(before, nested, value, prefix + name)
        elif not _has_type(value, hints[name]):
            raise ValueError(f"Recipe: {prefix + name} must be {_describe_type(hints[name])}, but it is {value!r}.")
        else:
            changes[name] = tuple(value) if isinstance(value, list) else value
    return dataclasses.replace(record, **changes)


def _record_in(hint: Any) -> Any:
    """The dataclass of a field, or in its union with None; None if there is none."""
    return next((each for each in (hint, *get_args(hint)) if dataclasses.is_dataclass(each)), None)


def _is_named(record: Any) -> bool:
    """Whether a record is made from its first field, a name without a default."""
    first = dataclasses.fields(record)[0]
    return first.name == "name" and first.default is dataclasses.MISSING


def _nested(before: Any, record: Any, value: Any, name: str) -> Any:
    """The record of a nested field; one that was None starts from the defaults."""
    if before is None and _is_named(record):
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            raise ValueError(f"Recipe: {name} needs a name, as text or as its field 'name', but it is {value!r}.")
        before = record(value["name"])
    return override(record() if before is None else before, value, f"{name}.")


def _has_type(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of this type."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_has_type(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if tuple in (origin, hint):
        return isinstance(value, list | tuple) and all(_has_type(each, part) for each in value for part in parts[:1])
    if hint is Any:
        return True
    if hint is NoneType:
        return value is None
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    return isinstance(value, int | float if hint is float else origin or hint)


def _describe_type(hint: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(_describe_type, parts))
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is tuple and parts:
        return f"a list, each entry {_describe_type(parts[0])}"
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", NoneType: "null"}
    # A configuration of a user's own may have fields of any type.
    return names.get(hint) or f"of type {hint if origin else getattr(hint, '__name__', hint)}"
