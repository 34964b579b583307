"""Who imports whom, and what an import costs."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))

IMPORT_AND_USE = """
import sys
import torch

HEAVY = {"torchvision", "triton", "tyro", "tqdm", "matplotlib", "safetensors", "jinja2", "PIL"}
HEAVY |= {"sacrebleu", "webdataset"}
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

attention = mirror_modules.GlobalLocalAttention(3, 5, 7)
attention(torch.randn(1, 3, 2, 2), torch.randn(1, 4, 5), torch.randn(1, 7)).word_context.sum().backward()
mirror_modules.TextEncoder(11, feature_dim=6)(torch.tensor([[3, 4]])).sentence.sum().backward()

print(refused)
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


def test_layers_hold():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


VIOLATIONS = {
    "glam/stages.py": "import triton\nimport torchvision\nimport PIL\nimport mirror_modules.stem.vocabulary\n",
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
