"""Running commands, and checking their errors."""

import dataclasses

from mirror_modules.cli import main

CAPTION = "a red flower"


def run(capsys, *words):
    """Exit status, stdout and stderr of a command."""
    try:
        status = main([str(word) for word in words])
    except SystemExit as error:
        status = error.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def assert_rejected(result, *fragments):
    """Require exit status 2 and a single line on stderr with these fragments."""
    status, _, err = result
    assert status == 2
    assert len(err.strip().splitlines()) == 1
    for fragment in fragments:
        assert fragment in err


def error_lines(err):
    """The lines of stderr that are not progress bars."""
    return [line for line in err.replace("\r", "\n").splitlines() if line.startswith("mirror-modules")]


PARTS_LEFT_OUT = (
    "evaluator.backbone",
    "second-evaluator",
    "first-stage",
    "keypoints",
    "pretraining",
    "evaluator-pretraining",
)


def flags(record, prefix=""):
    """Names of a command's options: the fields of its dataclass, nested ones too.

    A part that is None has no options until one of them is given.
    """
    for field in dataclasses.fields(record):
        name = prefix + field.name.replace("_", "-")
        value = getattr(record, field.name, None)
        if value is None and name in PARTS_LEFT_OUT:
            continue
        if dataclasses.is_dataclass(value):
            yield from flags(value, "" if name == "recipe" else f"{name}.")
        elif field.name not in ("model_dir", "caption", "run_dir"):
            yield name
