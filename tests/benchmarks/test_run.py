"""The command line of the benchmarks."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("benchmarks", reason="run pytest as `python -m pytest` from the root")
from benchmarks import _operation, run, word_region_similarity
from benchmarks._operation import Shape

ROOT = Path(__file__).parents[2]
WITH_FEW_PACKAGES = """
import runpy
import sys

import torch

_, missing, *words = sys.argv
# As if they were not installed, for imports and for `importlib.util.find_spec`.
sys.modules.update(dict.fromkeys(missing.split()))
sys.argv = ["run.py", *words, "--threads", "1"]
del sys.path[0]  # the root, which a script does not have
runpy.run_path("benchmarks/run.py", run_name="__main__")
"""


@pytest.fixture
def tiny(monkeypatch):
    """The similarity at a single small shape, with the definition as our implementation."""
    shape = Shape("tiny", {"batch": 3, "regions": 7, "words": 13, "features": 5})
    operation = dataclasses.replace(
        word_region_similarity.OPERATION,
        shapes=(shape,),
        quick=shape,
        implementations=lambda device: {
            "published": word_region_similarity.published,
            "torch": word_region_similarity.definition,
        },
    )
    found = {"word_region_similarity": operation}
    monkeypatch.setattr(_operation, "find", lambda name: found[name])
    # A fresh process does not have the patched shape.
    monkeypatch.setattr(_operation, "_memory_on_cpu", lambda *arguments: {})
    return found


def test_help_needs_no_torch_and_works_from_any_folder(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-S", ROOT / "benchmarks/run.py", "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for option in ("{all,attention,similarity,sample,step,demo}", "--device", "--budget", "--results", "--quick"):
        assert option in done.stdout


def run_with_few_packages(missing, *words):
    """Run the command line in a fresh process in which these packages cannot be imported; returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", WITH_FEW_PACKAGES, missing, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        env={**os.environ, "PYTHONPATH": "src", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_operations_need_only_torch_and_einops():
    missing = "pytest matplotlib tqdm tyro torchvision PIL safetensors jinja2"
    printed = run_with_few_packages(missing, "all", "--quick", "--impls", "published", "torch")
    for op in run.OPERATIONS.values():
        assert f"{op}, quick, float32, both" in printed


def test_the_interpreter_runs_the_kernels():
    pytest.importorskip("triton", reason="Triton is not installed")
    printed = run_with_few_packages("", "all", "--device", "interpreter", "--impls", "published", "triton")
    for op in run.OPERATIONS.values():
        for direction in _operation.DIRECTIONS:
            assert f"{op}, tiny, float32, {direction:8}  triton " in printed
    assert "skipped" not in printed


@pytest.mark.parametrize("what", ["step", "sample"])
def test_models_need_no_packages_of_the_command_line(what):
    missing = (
        "tyro tqdm webdataset tensorboard matplotlib jinja2 timm transformers diffusers pytest pytest_markdown_docs"
    )
    printed = run_with_few_packages(missing, what, "--device", "interpreter")
    assert "Error" not in printed


def test_records_go_to_the_results_folder(tiny, tmp_path):
    words = ["similarity", "--results", str(tmp_path), "--rounds", "2", "--quiet", "inf", "--threads", "1"]
    assert run.main(words) == 0
    assert len((tmp_path / "word_region_similarity.jsonl").read_text().splitlines()) == 6
    assert run.main([*words, "--no-record"]) == 0
    assert run.main([*words, "--quick"]) == 0
    assert len((tmp_path / "word_region_similarity.jsonl").read_text().splitlines()) == 6


def test_a_wrong_implementation_gives_exit_status_1(tiny, tmp_path, capsys):
    def wrong(*tensors):
        return (word_region_similarity.definition(*tensors)[0] + 1,)

    (operation,) = tiny.values()
    tiny["word_region_similarity"] = dataclasses.replace(operation, implementations=lambda device: {"torch": wrong})
    assert run.main(["similarity", "--results", str(tmp_path), "--threads", "1"]) == 1
    assert list(tmp_path.iterdir()) == []
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == ("benchmarks: word_region_similarity, tiny, float32, torch differs from the definition.")


def test_a_budget_ends_the_run(tiny, tmp_path, capsys):
    assert run.main(["similarity", "--budget", "0", "--results", str(tmp_path), "--threads", "1"]) == 0
    assert "time budget exhausted; not measured: word_region_similarity, tiny, float32" in capsys.readouterr().out


@pytest.mark.parametrize(("device", "budget"), [("cpu", float("inf")), ("cuda", 500.0)])
def test_a_gpu_has_a_time_budget_and_no_training_steps(device, budget, monkeypatch):
    measured = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run, "measure_sampling", lambda options: measured.append("sample"))
    monkeypatch.setattr(run, "measure_training", lambda name, options: measured.append(name))
    monkeypatch.setattr(
        _operation, "measure", lambda operations, settings: measured.append((operations, settings)) or []
    )
    assert run.main(["--device", device, "--threads", "1"]) == 0
    (operations, settings), *training = measured
    assert [operation.name for operation in operations] == ["global_local_attention", "word_region_similarity"]
    assert settings.deadline == run.STARTED + budget
    assert training == ([] if device == "cuda" else ["sample", "step", "demo"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["demo", "--device", "cuda"], "'demo' is measured on a CPU only"),
        (["demo", "--quick"], "'demo' has no small shape"),
        (["attention", "--device", "cuda"], "torch finds no GPU here"),
        (["attention", "--shapes", "headline", "b48"], "--shapes: unknown b48; known are headline, paper128"),
        (["step", "--device", "cpu", "--impls", "our"], "--impls: unknown our; known are ours, published"),
        (["all", "--quick", "--dtypes", "float8"], "--dtypes: unknown float8; known are bfloat16, float32, float16"),
    ],
)
def test_unsupported_combinations_are_refused(words, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        run.main(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_sizes_on_the_command_line_reach_the_step(monkeypatch, capsys):
    from benchmarks import step

    sizes = []
    monkeypatch.setattr(step, "measure", lambda given, *_, **__: sizes.append(given) or [])
    assert run.main(["step", "--no-record", "--word-dim", "7", "--resolutions", "8", "16"]) == 0
    assert sizes == [step.Sizes(word_dim=7, resolutions=(8, 16))]
