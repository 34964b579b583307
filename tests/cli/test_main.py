"""Commands in general: usage, help, version, and errors in one line with exit status 2."""

import subprocess
import sys

import pytest
import torch

import mirror_modules
from mirror_modules.cli.evaluation import EvaluateOptions
from mirror_modules.cli.images import DescribeOptions, GenerateOptions
from mirror_modules.cli.training import AblateOptions, TrainOptions
from mirror_modules.models import TextToImage
from mirror_modules.training.recipes import ablation, demo
from tests.cli.commands import CAPTION, assert_rejected, flags, run


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("train", TrainOptions(demo())),
        ("generate", GenerateOptions),
        ("describe", DescribeOptions),
        ("evaluate", EvaluateOptions),
        ("ablate", AblateOptions(ablation())),
    ],
)
def test_help_shows_every_option_with_its_default(capsys, command, options):
    status, out, _ = run(capsys, command, "--help")
    assert status == 0
    # The images of `describe` are given by position.
    names = [name for name in flags(options) if (command, name) != ("describe", "images")]
    assert names
    for name in names:
        # A boolean option is listed as --x, --no-x.
        parent, _, last = name.rpartition(".")
        assert f"--{name} " in out or f"--{name}," in out or f"--{parent}.no-{last}" in out
    assert out.count("default:") >= len(names)


def test_without_a_command_the_usage_is_printed(capsys):
    assert run(capsys)[0] == 2
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert all(command in out for command in ("train", "generate", "describe", "evaluate", "data inspect"))


def test_an_unknown_command_is_rejected(capsys):
    assert_rejected(run(capsys, "draw"), "'draw'", "train, recipes, generate, describe, evaluate")
    assert_rejected(run(capsys, "descibe"), "unknown command 'descibe'; did you mean 'describe'?")


def test_an_invalid_option_is_rejected(capsys):
    assert run(capsys, "train", "--steps", "many")[0] == 2
    assert run(capsys, "generate", "--nonsense")[0] == 2


def test_error_messages_of_several_lines_are_joined(capsys, model, monkeypatch):
    def fail(*_, **__):
        raise ValueError("first\nsecond")

    monkeypatch.setattr(TextToImage, "from_pretrained", fail)
    assert_rejected(run(capsys, "generate", model, CAPTION), "mirror-modules generate: first second")


def test_an_interruption_is_reported_in_one_line(capsys, model, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(TextToImage, "from_pretrained", interrupt)
    status, _, err = run(capsys, "generate", model, CAPTION)
    assert (status, len(err.strip().splitlines())) == (130, 1)
    assert "interrupted." in err
    monkeypatch.setattr("mirror_modules.data.prepare_captions", interrupt)
    status, _, err = run(capsys, "data", "prepare", "data", "cache", "--resolution", 8)
    assert status == 130
    assert "interrupted; finished files are kept, and the same command continues with them." in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_is_rejected(capsys, model):
    assert_rejected(run(capsys, "generate", model, CAPTION, "--device", "cuda"), "torch sees no GPU")


def test_the_version_is_printed(capsys):
    assert run(capsys, "--version") == (0, f"mirror-modules {mirror_modules.__version__}\n", "")


WITHOUT_TORCH = (
    "",
    "data",
    "data inspect",
    "data prepare",
    "generate",
    "describe",
    "evaluate",
    "compare",
    "study",
)


@pytest.mark.parametrize("command", WITHOUT_TORCH)
def test_help_does_not_import_torch(command):
    """Importing torch takes ten times as long as everything else."""
    program = (
        "import sys\nfrom mirror_modules.cli import main\n"
        f"try:\n    main([*{command.split()!r}, '--help'])\nexcept SystemExit:\n    pass\n"
        "main(['--version'])\nsys.exit(sorted({'torch', 'numpy'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: mirror-modules" in done.stdout


@pytest.mark.parametrize("command", ["train", "recipes", "ablate"])
def test_help_of_recipes_does_not_import_the_evaluation(command):
    """Recipes hold configurations of models, which import torch; the evaluation, with matplotlib, waits."""
    program = (
        "import sys\nfrom mirror_modules.cli import main\n"
        f"try:\n    main(['{command}', '--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit(sorted({'matplotlib', 'mirror_modules.evaluation'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("words", "message"), [(("generate", "model"), "there is no caption"), (("describe", "model"), "there is no image")]
)
def test_errors_in_options_do_not_import_torch(words, message):
    program = f"import sys\nfrom mirror_modules.cli import main\nmain({words!r})\nsys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert done.returncode == 0
    assert message in done.stderr
