"""The training step is measured on a GPU with equal losses and gradients on all sides; here, its code runs on a CPU."""

import pytest
import torch

pytest.importorskip("benchmarks", reason="run pytest as `python -m pytest` from the root")
from benchmarks import _measure, _record, published, run, step


@pytest.fixture
def recorded(fake_gpu, monkeypatch):
    """Run the command line for a GPU at the sizes of --quick, but record; returns the exit status and the records."""
    build = step.build_step
    monkeypatch.setattr(step, "build_step", lambda impl, sizes, _, dtype: build(impl, sizes, "cpu", dtype))
    monkeypatch.setattr(step, "Sizes", lambda batch: step.QUICK)
    monkeypatch.setattr(step, "SECONDS_ON_GPU", 0.0)
    # `quick_compile` compiles in another test.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)

    def measured(tmp_path, *words):
        # True for the command line alone: optimizers would look for a stream of the GPU.
        answers = iter([True])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: next(answers, False))
        arguments = ["step", "--device", "cuda", "--threads", "1", "--results", str(tmp_path)]
        # The default budget is seconds since the import, by another test maybe.
        arguments += ["--budget", "1e9", *words]
        status = run.main(arguments)
        path = tmp_path / "step.jsonl"
        return status, _record.read(path) if path.exists() else []

    return measured


def test_milliseconds_are_recorded_in_each_precision(recorded, tmp_path, capsys):
    status, records = recorded(tmp_path)
    assert status == 0
    assert [(record.dtype, record.impl) for record in records] == [
        (dtype, impl) for dtype in ("bfloat16", "float32") for impl in step.ON_GPU
    ]
    for record in records:
        assert (record.op, record.quantity, record.device) == ("training_step", "ms", "Fake GPU")
        assert (record.median, record.peak_memory_mib, record.rounds) == (0.25, 3, _measure.MIN_ROUNDS)
        assert 0 < record.error <= record.error_allowed
    printed = capsys.readouterr().out
    assert "training_step, ours, compiled, bfloat16, batch 3: 0.250 ms (0.250 to 0.250), 3 MiB" in printed
    assert printed.count("    12,000 images/s") == len(records)


def test_a_selection_is_measured(recorded, tmp_path):
    _, records = recorded(tmp_path, "--dtypes", "float32", "--impls", step.PUBLISHED, step.OURS)
    assert [(record.dtype, record.impl) for record in records] == [("float32", "ours"), ("float32", "published")]


@pytest.mark.parametrize("words", [["--quick"], ["--no-record"]])
def test_nothing_is_recorded(recorded, words, tmp_path):
    assert recorded(tmp_path, "--dtypes", "float32", "--impls", step.OURS, *words) == (0, [])


def test_a_wrong_step_is_not_timed(recorded, monkeypatch, tmp_path, capsys):
    use = step.use_published_convolutions

    def use_wrongly(model):
        use(model).generator.heads[-1].conv.weight.data.mul_(1.5)

    monkeypatch.setattr(step, "use_published_convolutions", use_wrongly)
    status, records = recorded(tmp_path, "--dtypes", "float32")
    assert status == 1
    assert {record.impl for record in records} == set(step.ON_GPU) - {
        step.PUBLISHED_CONVOLUTIONS,
        step.PUBLISHED_CONVOLUTIONS + step.COMPILED,
    }
    assert f"benchmarks: step, {step.PUBLISHED_CONVOLUTIONS}, float32 differs from" in capsys.readouterr().out


def test_a_failing_implementation_does_not_stop_the_others(recorded, monkeypatch, tmp_path, capsys):
    def fail(*_):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(step, "adversarial_step", fail)
    _, records = recorded(tmp_path, "--dtypes", "float32")
    assert {record.impl for record in records} == set(step.ON_GPU) - {step.OURS, step.OURS + step.COMPILED}
    assert "step, ours, float32: skipped, RuntimeError: no kernel" in capsys.readouterr().out


def test_a_precision_without_a_tolerance_does_not_stop_the_others(recorded, monkeypatch, tmp_path, capsys):
    """The published step, which sets it, may need more memory than there is."""
    build = step.build_step

    def fail(impl, sizes, device, dtype):
        if (impl, dtype) == (step.PUBLISHED, "bfloat16"):
            raise torch.OutOfMemoryError("out of memory")
        return build(impl, sizes, device, dtype)

    monkeypatch.setattr(step, "build_step", fail)
    status, records = recorded(tmp_path, "--impls", step.PUBLISHED, step.OURS)
    assert status == 0
    assert [(record.dtype, record.impl) for record in records] == [("float32", "ours"), ("float32", "published")]
    printed = capsys.readouterr().out
    assert printed.count("skipped") == 1
    assert "step, tolerance of bfloat16: skipped, OutOfMemoryError: out of memory" in printed


def test_a_budget_ends_the_run(recorded, tmp_path, capsys):
    assert recorded(tmp_path, "--budget", "0") == (0, [])
    assert capsys.readouterr().out.count("skipped, time budget exhausted") == 2 * len(step.ON_GPU)


@pytest.mark.usefixtures("quick_compile")
def test_compiled_steps_equal_the_published_one(capsys):
    compiled = [impl + step.COMPILED for impl in (step.OURS, step.PUBLISHED_CONVOLUTIONS)]
    with step.published_pairs():
        reference = step.first_step(step.build_step(step.PUBLISHED, step.QUICK, "cpu", "float64"))
        assert step.measure_on_gpu(step.QUICK, "bfloat16", compiled, reference, "cpu") == ([], [])
    printed = capsys.readouterr().out
    assert "skipped" not in printed
    assert printed.count(" allowed ") == len(compiled)


def test_all_of_the_published_step_is_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    built = step.build_step(step.PUBLISHED + step.COMPILED, step.QUICK)
    losses = [published.published_discriminator_loss, published.published_generator_loss]
    assert compiled == [built.args[0].model.generator._call_impl, *losses]
    step.build_step(step.PUBLISHED, step.QUICK)
    assert len(compiled) == 3


def test_cross_entropy_on_probabilities_is_computed_without_autocast(monkeypatch):
    """On a GPU, autocast raises an error for it."""
    cross_entropy, precisions = published.F.binary_cross_entropy, set()

    def checked(probabilities, targets):
        assert not torch.is_autocast_enabled("cpu")
        precisions.add(probabilities.dtype)
        return cross_entropy(probabilities, targets)

    monkeypatch.setattr(published.F, "binary_cross_entropy", checked)
    step.build_step(step.PUBLISHED, step.QUICK, dtype="bfloat16")()
    assert precisions == {torch.float32}
