"""The command line: parse, call, print. Errors are one line, or tyro's box, with exit status 2."""

from __future__ import annotations

import importlib
import io
import sys
import warnings
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

from mirror_modules import __version__
from mirror_modules.cli.memory import keep_freed_memory

USAGE = """\
usage: mirror-modules COMMAND ...

  train [RECIPE]                 train a model, evaluate it, and write a report
  recipes                        list the recipes
  generate MODEL_DIR CAPTION...  generate images from captions
  describe MODEL_DIR IMAGE...    caption images, or folders of images
  evaluate RUN_DIR               evaluate a trained run again, and write its report
  data inspect PATH              summarize a folder of captioned images and list its damaged files
  data prepare PATH OUT          decode and resize a folder of captioned images once, for faster loading
  ablate [RECIPE]                train and evaluate the paper's ablation over several seeds
  compare                        train and evaluate several systems on equal terms, over several seeds
  study RUN RUN ...              write a page on which people compare images of runs, or summarize their answers

`mirror-modules COMMAND --help` lists every option with its default; `mirror-modules --version` prints the version."""

# Module and function of each command; imported on use.
COMMANDS = {
    "train": ("training", "train"),
    "recipes": ("training", "recipes"),
    "generate": ("images", "generate"),
    "describe": ("images", "describe"),
    "evaluate": ("evaluation", "evaluate"),
    "data": ("data", "data"),
    "ablate": ("training", "ablate"),
    "compare": ("compare", "compare"),
    "study": ("study", "study"),
}
# What an interrupted command leaves on disk.
_KEPT = {
    "train": "; finished phases and checkpoints are kept",
    "ablate": "; finished phases and checkpoints are kept",
    "compare": "; finished phases and checkpoints are kept",
    "data prepare": "; finished files are kept, and the same command continues with them",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:
        # Only a process of the command's own; other programs decide for themselves.
        keep_freed_memory()
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    if words[0] == "--version":
        print(f"mirror-modules {__version__}")
        return 0
    if words[0] not in COMMANDS:
        close = get_close_matches(words[0], COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(COMMANDS)}."
        print(f"mirror-modules: unknown command {words[0]!r}; {hint}", file=sys.stderr)
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):
        # File names and captions may hold characters that the terminal's encoding lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            _command(words[0])(words[1:])
        except (ValueError, OSError, ImportError, NotImplementedError, MemoryError, OverflowError) as error:
            reason = str(error) or "there is not enough memory"
            print(f"mirror-modules {words[0]}: {' '.join(reason.splitlines())}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            kept = _KEPT.get(" ".join(words[:2] if words[0] == "data" else words[:1]), "")
            print(f"mirror-modules {words[0]}: interrupted{kept}.", file=sys.stderr)
            return 130
        except RuntimeError as error:
            # Imported here because most commands run without the training code.
            from mirror_modules.training.errors import Interrupted, TrainingError, is_out_of_memory

            if not isinstance(error, TrainingError) and not is_out_of_memory(error):
                raise
            reason = str(error) if isinstance(error, TrainingError) else f"there is not enough memory ({error})"
            print(f"mirror-modules {words[0]}: {' '.join(reason.splitlines())}", file=sys.stderr)
            return error.status if isinstance(error, Interrupted) else 2
    return 0


def _command(name: str) -> Callable[[list[str]], None]:
    module, function = COMMANDS[name]
    command: Callable[[list[str]], None] = getattr(importlib.import_module(f"mirror_modules.cli.{module}"), function)
    return command


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"mirror-modules: {message}", file=sys.stderr)
