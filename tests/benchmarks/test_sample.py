"""Sampling is measured with equal images on all sides, on a CPU and with the code for a GPU."""

import contextlib

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("benchmarks", reason="run pytest as `python -m pytest` from the root")
from benchmarks import _record, run, sample
from benchmarks.published import PublishedAttention, PublishedDoubling
from mirror_modules.glam.stages import DoublingConv2d

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture
def without_onnx(monkeypatch):
    monkeypatch.setattr(sample, "PACKAGES_FOR_ONNX", ("a_package_that_is_not_there",))


@pytest.fixture
def recorded(monkeypatch):
    """Run the command line at the sizes of --quick, but record; returns the records."""
    monkeypatch.setattr(sample, "Sizes", lambda: sample.QUICK)
    monkeypatch.setattr(sample, "STARTS", 1)

    def measured(tmp_path, *words):
        arguments = ["sample", "--threads", "1", "--quiet", "inf", "--rounds", "2", "--results", str(tmp_path), *words]
        assert run.main(arguments) == 0
        return _record.read(tmp_path / "sample.jsonl")

    return measured


def test_ratios_and_shares_are_recorded_on_a_cpu(recorded, without_onnx, tmp_path, capsys):
    *sampling, start = recorded(tmp_path)
    assert "onnxruntime: not measured, because a_package_that_is_not_there are not installed" in capsys.readouterr().out
    impls, bases = (sample.EAGER, sample.CHANNELS_LAST, sample.COMPILED), (sample.PUBLISHED, sample.PUBLISHED_HALF)
    ours = {(impl, base) for impl in impls for base in bases}
    expected = {*ours, (sample.PUBLISHED_HALF, sample.PUBLISHED)}
    for batch in sample.QUICK.batches:
        found = [record for record in sampling if record.shape["batch"] == batch]
        assert {(record.impl, record.quantity.removeprefix("time / time of ")) for record in found} == expected
        assert len(found) == len(expected)
        assert {(record.op, record.device, record.rounds) for record in found} == {("sampling", "cpu", 2)}
    assert (start.op, start.quantity) == ("generate_start", "starts/s")
    assert set(start.shares) == {"import", "load", "first image", "rest"}
    assert all(share > 0 for share in start.shares.values())


def test_milliseconds_are_recorded_on_a_gpu(recorded, fake_gpu, monkeypatch, tmp_path, capsys):
    """With the code for a GPU on the CPU, where a graph is replayed by running the generator."""
    # Compiled on the CPU already.
    monkeypatch.setattr(torch, "compile", lambda module: module)
    builder, graphs = sample.build_sampler, []
    monkeypatch.setattr(sample, "build_sampler", lambda impl, sizes, batch, _: builder(impl, sizes, batch, "cpu"))
    monkeypatch.setattr(sample, "measure_start", lambda *_: [])

    class Graph:
        def replay(self):
            graphs.append(self)

    fakes = {
        "Stream": lambda: type("Stream", (), {"wait_stream": lambda *_: None})(),
        "current_stream": lambda: type("Stream", (), {"wait_stream": lambda *_: None})(),
        "stream": contextlib.nullcontext,
        "graph": contextlib.nullcontext,
        "CUDAGraph": Graph,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    records = recorded(tmp_path, "--device", "cuda")
    assert graphs
    assert [record.impl for record in records] == 2 * list(sample.IMPLEMENTATIONS["cuda"])
    assert {(record.quantity, record.device) for record in records} == {("ms", "Fake GPU")}
    assert "images/s" in capsys.readouterr().out


def test_nothing_is_recorded_with_quick(without_onnx, monkeypatch, tmp_path):
    monkeypatch.setattr(sample, "measure_start", lambda *_: [])
    monkeypatch.setitem(sample.IMPLEMENTATIONS, "cpu", (sample.PUBLISHED, sample.PUBLISHED_HALF, sample.EAGER))
    assert run.main(["sample", "--quick", "--threads", "1", "--results", str(tmp_path)]) == 0
    assert list(tmp_path.iterdir()) == []


def test_the_published_side_has_its_own_attention_and_convolutions(monkeypatch):
    models, build = [], sample.build_model
    monkeypatch.setattr(sample, "build_model", lambda sizes: models.append(build(sizes)) or models[-1])
    images = [sample.build_sampler(impl, sample.QUICK, 2, "cpu")() for impl in sample.IMPLEMENTATIONS["cpu"][:3]]
    for other in images[1:]:
        assert_close(other, images[0], atol=1e-5, rtol=1e-5)
    assert images[0].std() > 0.01
    own = [(has(model, PublishedAttention), has(model, PublishedDoubling)) for model in models]
    assert own == [(True, True), (True, False), (False, False)]
    assert all(has(model, DoublingConv2d) and not model.training for model in models)


def has(model, kind):
    return any(isinstance(part, kind) for part in model.modules())


def test_other_images_are_refused(monkeypatch, without_onnx):
    def use(model):
        model.generator.heads[-1].conv.weight.data.neg_()
        return model

    monkeypatch.setattr(sample, "use_published_convolutions", use)
    monkeypatch.setattr(torch, "compile", lambda module: module)
    with pytest.raises(ValueError, match=r"sampling, published, with our convolutions: images differ .* by up to"):
        sample.samplers(sample.QUICK, 1, "cpu")


def test_an_exported_generator_runs_in_onnxruntime():
    for package in sample.PACKAGES_FOR_ONNX:
        pytest.importorskip(package)
    images = [sample.build_sampler(impl, sample.QUICK, 2, "cpu")() for impl in (sample.ONNX, sample.EAGER)]
    assert_close(images[0], images[1], atol=1e-4, rtol=1e-4)


def test_a_failed_start_is_an_error(monkeypatch):
    monkeypatch.setattr(sample.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="start of generate"):
        sample.measure_start(sample.QUICK, 1, "cpu")
