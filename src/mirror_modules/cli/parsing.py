"""Options from command-line words, with errors before the work begins.

Nothing here or in the modules of the commands imports torch before the words are parsed, where the options do not need
it: `--help` and errors in options are then shown several times as fast.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin, get_type_hints

Device = Literal["auto", "cpu", "cuda"]


def parse(
    options: type,
    arguments: list[str],
    command: str,
    *,
    positional: Sequence[str] = (),
    default: Any = None,
    description: str | None = None,
) -> Any:
    """Parse words into a dataclass of options; `--help` and errors of single options exit the program.

    Args:
        options: The dataclass.
        arguments: The words after the command.
        command: The command's name, for messages.
        positional: Names of the fields that are given without an option's name.
        default: An instance with a field `recipe`, whose fields become options themselves; those of a part that is None
            in it do not.
        description: Text above the options in `--help`; None takes the docstring.
    """
    try:
        import tyro
    except ImportError as error:
        raise ImportError("The command line needs more packages: pip install 'mirror-modules[train]'") from error
    # Annotated here and not in the classes, so that a missing tyro is a one-line error.
    hints = get_type_hints(options, include_extras=True)
    for name, hint in hints.items():
        if name in positional:
            several = "..." if get_origin(hint) is tuple else ""
            label = tyro.conf.arg(metavar=name.upper() + several)
            options.__annotations__[name] = Annotated[hint, tyro.conf.Positional, label]
        elif name.startswith("no_") or f"no_{name}" in hints:
            # A flag that turns something off has no opposite, or is itself a field beside it.
            options.__annotations__[name] = Annotated[hint, tyro.conf.FlagCreatePairsOff]
    keywords = {} if default is None else {"default": default, "config": (tyro.conf.AvoidSubcommands,)}
    if default is not None:
        options.__annotations__["recipe"] = Annotated[type(default.recipe), tyro.conf.arg(name="")]
    return tyro.cli(options, args=arguments, prog=f"mirror-modules {command}", description=description, **keywords)


def option(name: str, arguments: Sequence[str]) -> str | None:
    """The last value of an option that must be known before the others are parsed; that of a flag has no meaning."""
    value = None
    for word, following in zip(arguments, [*arguments[1:], ""]):
        given, equals, rest = word.partition("=")
        # tyro takes --from_scratch for --from-scratch.
        if given.replace("_", "-") == name:
            value = rest if equals else following
    return value


def device_of(name: str) -> str:
    """The device that "auto" stands for, or an error if a named one is missing."""
    # Imported here because it imports torch.distributed.
    from mirror_modules.training.distributed import resolve_device

    return resolve_device(name)


def read_captions(path: Path) -> list[str]:
    """The captions in the file that --captions names, one per line; at least one."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(
            f"--captions {path} cannot be read ({error.strerror}); it must be a text file with one caption per line."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--captions {path} is not UTF-8 text ({error}).") from error
    captions = [line.strip() for line in text.splitlines() if line.strip()]
    if not captions:
        raise ValueError(f"--captions {path} has no caption; write one per line.")
    return captions


def check_out(path: Path) -> None:
    """Require that a picture can be written to this file; called before the work, which may take long."""
    if path.is_dir():
        raise ValueError(f"--out {path} is a folder; give the name of a file, such as {path / 'picture.png'}.")
    # Imports torch.
    from mirror_modules.pictures.saving import check_image_name

    check_image_name("--out", path)
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"--out {path}: nothing can be written into {above}; name another file.")
