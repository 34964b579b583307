"""The public packages and their names, as their `__all__` lists them."""

import importlib
import pkgutil
from types import ModuleType
from typing import Any

import mirror_modules


def public_packages() -> list[str]:
    """`mirror_modules`, its packages, and `functional`."""
    found = [package.name for package in pkgutil.iter_modules(mirror_modules.__path__) if package.ispkg]
    return ["mirror_modules", *(f"mirror_modules.{name}" for name in sorted([*found, "functional"]))]


def public_names(package: str) -> list[str]:
    """The dotted public names of a package; a package without an `__all__` has none."""
    return [f"{package}.{name}" for name in getattr(importlib.import_module(package), "__all__", [])]


def resolve(path: str) -> Any:
    """The object at a dotted path, which may be a module."""
    found: Any = importlib.import_module(path.split(".")[0])
    for i, name in enumerate(path.split(".")[1:], start=1):
        if isinstance(found, ModuleType) and not hasattr(found, name):
            importlib.import_module(".".join(path.split(".")[: i + 1]))
        found = getattr(found, name)
    return found
