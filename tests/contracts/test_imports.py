"""Who imports whom, and what an import costs."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mirror_modules

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))

IMPORT_AND_USE = """
import sys
import torch

HEAVY = {"torchvision", "triton", "tyro", "tqdm", "matplotlib", "safetensors", "jinja2", "PIL"}
HEAVY |= {"sacrebleu", "webdataset", "transformers", "timm"}
refused = []

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HEAVY:
            refused.append(name)
            raise ImportError(f"{name} is refused here")

# What torch itself has loaded must not hide an import of ours.
for name in [name for name in sys.modules if name.split(".")[0] in HEAVY]:
    del sys.modules[name]
sys.meta_path.insert(0, Refuse())

import mirror_modules
from mirror_modules import *

attention = mirror_modules.GlobalLocalAttention(3, 5, 7)
attention(torch.randn(1, 3, 2, 2), torch.randn(1, 4, 5), torch.randn(1, 7)).word_context.sum().backward()
mirror_modules.TextEncoder(11, feature_dim=6)(torch.tensor([[3, 4]])).sentence.sum().backward()

print(refused)
"""


IMPORT_ALONE = """
import sys

before = set(sys.modules)
import mirror_modules

dir(mirror_modules), mirror_modules.__version__, mirror_modules.__doc__
print(sorted({name.split(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))
"""
# Each runs in a process of its own, in which nothing was imported before.
USES = {
    "attributes": """
import mirror_modules

for name in ("adversarial", "data", "functional", "glam", "kernels", "metrics", "models", "stem", "stream"):
    assert getattr(mirror_modules, name).__name__ == f"mirror_modules.{name}"
assert mirror_modules.Vocabulary is mirror_modules.stem.Vocabulary
""",
    "imports": """
from mirror_modules import TextEncoder, functional
assert TextEncoder.__module__ == "mirror_modules.stem.text_encoder" and functional.diversity
from mirror_modules import *
import mirror_modules
assert all(globals()[name] is getattr(mirror_modules, name) for name in mirror_modules.__all__)
""",
    "help and pickle": """
import inspect, pickle, pydoc
import mirror_modules
assert "class MatchingLoss(" in pydoc.plain(pydoc.render_doc(mirror_modules))
assert dict(inspect.getmembers(mirror_modules))["MirrorGAN"] is mirror_modules.MirrorGAN
assert pickle.loads(pickle.dumps(mirror_modules.MirrorGAN)) is mirror_modules.MirrorGAN
""",
    "after another module": """
import mirror_modules.pictures
assert mirror_modules.stem.ConvBackbone
""",
}

# `python -m mirror_modules` with an option, and the large packages that it has loaded at its end.
RUN_COMMAND = """
import runpy
import sys

sys.argv = ["mirror-modules", "OPTION"]
try:
    runpy.run_module("mirror_modules", run_name="__main__")
except SystemExit as end:
    print("status", end.code, *sorted({"torch", "numpy", "tyro"} & set(sys.modules)))
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    # As users run it, and not as the tests of the kernels do.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as lint; lint()", "--no-cache"],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(folder / "src"), "COLUMNS": "200"},
        check=False,
    )


def test_importing_the_package_needs_no_heavy_package():
    done = run_python(IMPORT_AND_USE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["triton", "tqdm"])
def test_a_heavy_import_would_be_seen(package):
    guarded = f"import mirror_modules\ntry:\n    import {package}\nexcept ImportError:\n    pass\n"
    done = run_python(IMPORT_AND_USE.replace("import mirror_modules\n", guarded, 1))
    assert done.stdout.strip() == f"['{package}']", done.stderr


def test_importing_the_package_imports_nothing_else():
    done = run_python(IMPORT_ALONE)
    assert (done.returncode, done.stdout.strip()) == (0, "['mirror_modules']"), done.stderr


@pytest.mark.parametrize("use", USES)
def test_names_are_imported_when_used(use):
    done = run_python(USES[use])
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_the_usual_error():
    with pytest.raises(AttributeError, match=r"^module 'mirror_modules' has no attribute 'TextEncodr'$"):
        _ = mirror_modules.TextEncodr
    with pytest.raises(ImportError, match=r"^cannot import name 'TextEncodr' from 'mirror_modules'"):
        from mirror_modules import TextEncodr  # noqa: F401


def test_the_package_runs_as_the_command():
    command = [sys.executable, "-m", "mirror_modules"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"mirror-modules {mirror_modules.__version__}\n"), done.stderr
    done = subprocess.run([*command, "draw"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("mirror-modules: unknown command 'draw'")


@pytest.mark.parametrize(
    ("option", "first_words"), [("--help", "usage: mirror-modules COMMAND"), ("--version", "mirror-modules 0.")]
)
def test_the_command_prints_its_usage_and_version_without_torch(option, first_words):
    done = run_python(RUN_COMMAND.replace("OPTION", option))
    assert done.stdout.startswith(first_words), done.stderr
    assert done.stdout.splitlines()[-1] == "status 0"


def test_layers_hold():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


VIOLATIONS = {
    "glam/stages.py": "import triton\nimport torchvision\nimport PIL\nimport mirror_modules.stem.vocabulary\n",
    "stream/captioner.py": "import transformers\n",
    "data/readers/files.py": "import mirror_modules.data.sources\n",
    "training/errors.py": "import mirror_modules.training.engine\n",
    "evaluation/curves.py": "import mirror_modules.evaluation.report\n",
    "models/pretrained.py": "import mirror_modules.models.mirrorgan\n",
}


def test_each_contract_can_break(tmp_path):
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name, imports in VIOLATIONS.items():
        with (tmp_path / "src/mirror_modules" / name).open("a", encoding="utf-8") as file:
            file.write(imports)
    done = lint_imports(tmp_path)
    assert done.returncode == 1
    contracts = (ROOT / "pyproject.toml").read_text(encoding="utf-8").count("[[tool.importlinter.contracts]]")
    assert f"0 kept, {contracts} broken" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("folder", sorted({source.parent for source in SOURCES}), ids=lambda folder: folder.name)
def test_no_folder_has_two_jobs(folder):
    assert len(list(folder.glob("*.py"))) <= 16


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.relative_to(ROOT / "src").as_posix())
def test_no_bare_assert(source):
    lines = [
        node.lineno for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))) if isinstance(node, ast.Assert)
    ]
    assert lines == [], f"{source.name}: raise a ValueError with words instead, lines {lines}"
