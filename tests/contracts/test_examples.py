"""The scripts of examples/: each runs offline in an empty folder, is short, and is shown in the documentation."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MAX_LINES = 120
# Words that the output contains. A script that is not listed must print something.
WORDS = {
    "best_of_n.py": ("best of 8", "petal_color", '"prompt": "a ', "chosen", "rejected"),
    "diffusion_with_redescription.py": ("unbalanced  balanced", "0.250\n", "Denoising loss"),
    "glam_in_unet.py": ("GlamBlock",),
    "region_word_loss.py": ("by sentence", "by words", "fine-tuned by all terms"),
    "reward_gradient.py": ("Gradient norm of saturation", "before", "sum of the rewards", "balanced, ratio"),
}
# The arguments of `main` that make the longest ones short.
SHORTER = {
    "glam_in_unet.py": {"steps": 20},
    "region_word_loss.py": {"steps": 20, "fine_tuning_steps": 20},
    "reward_gradient.py": {"score_steps": 20, "steps": 3},
}
# Calls the function `main` of a script.
RUN = "import json, runpy, sys; runpy.run_path(sys.argv[1])['main'](**json.loads(sys.argv[2]))"


def each_example(test):
    return pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)(test)


def imported(path):
    """The names of the packages that a script imports."""
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


def run(path, folder):
    # Hugging Face's libraries then raise instead of downloading.
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    environment = os.environ | offline | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, path]
    if path.name in SHORTER:
        command = [sys.executable, "-c", RUN, path, json.dumps(SHORTER[path.name])]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=3600)


@each_example
def test_runs(path, tmp_path):
    # Looked up without an import, which takes longer than some of the scripts.
    if missing := sorted(name for name in imported(path) if importlib.util.find_spec(name) is None):
        pytest.skip(f"{', '.join(missing)} not installed")
    done = run(path, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()
    for words in WORDS.get(path.name, ()):
        assert words in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_script_that_fails_is_seen(tmp_path):
    path = tmp_path / "fails.py"
    path.write_text("raise SystemExit(3)", encoding="utf-8")
    assert run(path, tmp_path).returncode == 3


@each_example
def test_is_short_and_says_what_it_shows(path):
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    assert ast.get_docstring(ast.parse(text))
    assert "For real weights" in text


@each_example
def test_is_in_the_documentation(path):
    assert f'--8<-- "examples/{path.name}"' in (ROOT / "docs/examples.md").read_text("utf-8")
