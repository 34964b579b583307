"""Benchmarks of the operations: equal results, no times for wrong ones, and a log of what is skipped."""

import dataclasses
import math

import pytest
import torch

pytest.importorskip("benchmarks", reason="run pytest as `python -m pytest` from the root")
from benchmarks import _measure, _operation, _record, global_local_attention, word_region_similarity

ATTENTION, SIMILARITY = global_local_attention.OPERATION, word_region_similarity.OPERATION
OPERATIONS = pytest.mark.parametrize("operation", [ATTENTION, SIMILARITY], ids=lambda operation: operation.name)
TINY = {
    ATTENTION.name: {"batch": 3, "channels": 5, "height": 7, "width": 11, "words": 13},
    SIMILARITY.name: {"batch": 3, "regions": 7, "words": 13, "features": 5},
}
CPU = torch.device("cpu")


def tiny(operation, **changes):
    """The operation with a single small shape."""
    return dataclasses.replace(operation, shapes=(_operation.Shape("tiny", TINY[operation.name]),), **changes)


def settings(tmp_path, **changes):
    defaults = {"device": "cpu", "results": tmp_path, "rounds": 2, "threads": 1, "memory": False, "seconds": 0.0}
    return _operation.Settings(**{**defaults, **changes})


def records(tmp_path, operation):
    path = tmp_path / f"{operation.name}.jsonl"
    return _record.read(path) if path.exists() else []


def outputs_and_gradients(implementation, inputs):
    outputs = implementation(*inputs.leaves, inputs.word_mask)
    return [*outputs, *torch.autograd.grad(outputs, inputs.leaves, inputs.output_gradients)]


SAME = [(ATTENTION, impl) for impl in ("published", "torch", "sdpa", "compiled")]
SAME += [(SIMILARITY, impl) for impl in ("published", "loop", "torch", "compiled")]


@pytest.mark.parametrize(("operation", "impl"), SAME, ids=[f"{o.name}-{impl}" for o, impl in SAME])
@pytest.mark.usefixtures("quick_compile")
def test_the_implementations_equal_the_definition(operation, impl):
    inputs = operation.make_inputs(TINY[operation.name], torch.float64, CPU)
    assert len(set(inputs.word_mask.sum(dim=1).tolist())) > 1, "captions must differ in length"
    implementation = operation.implementations("cpu")[impl]
    expected = outputs_and_gradients(operation.definition, inputs)
    for value, reference in zip(outputs_and_gradients(implementation, inputs), expected, strict=True):
        torch.testing.assert_close(value, reference)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_equals_the_definition():
    leaves, word_mask, _ = ATTENTION.make_inputs(TINY[ATTENTION.name], torch.float64, CPU)
    leaves = [leaf.detach() for leaf in leaves]  # no backward pass on a CPU
    outputs = global_local_attention.flex(*leaves, word_mask)
    torch.testing.assert_close(outputs, ATTENTION.definition(*leaves, word_mask))


@OPERATIONS
def test_all_that_should_be_measured_is(operation):
    known = {"published", "torch", "triton", "compiled"}
    known |= {"sdpa", "flex"} if operation is ATTENTION else {"loop"}
    assert set(operation.implementations("cuda")) == known
    assert set(operation.implementations("cpu")) == known - {"triton", "flex"}
    assert {shape.name for shape in operation.shapes} == (
        {"paper64", "paper128", "headline", "coco64", "coco128", "modern", "large"}
        if operation is ATTENTION
        else {"b48", "b128", "b256", "b512", "b1024", "b2048"}
    )


def test_least_bytes_and_operations_of_the_attention():
    sizes = {"batch": 1, "channels": 2, "height": 3, "width": 5, "words": 7}
    # 30 features; 7 words and a sentence of 2 channels each; 7 bytes of mask.
    assert ATTENTION.least_bytes(sizes, "forward", 4) == 3 * 30 * 4 + 16 * 4 + 7
    assert ATTENTION.least_bytes(sizes, "backward", 4) == 4 * 30 * 4 + 2 * 16 * 4 + 7
    assert ATTENTION.least_bytes(sizes, "both", 4) == 7 * 30 * 4 + 3 * 16 * 4 + 14
    # Each of 15 positions with each of 7 words: 2 products and 2 sums.
    assert ATTENTION.least_operations(sizes, "forward") == 2 * 15 * 7 * 2 * 2
    assert ATTENTION.least_operations(sizes, "backward") == 4 * 15 * 7 * 2 * 2
    assert ATTENTION.least_operations(sizes, "both") == 6 * 15 * 7 * 2 * 2


def test_least_bytes_and_operations_of_the_similarity():
    sizes = {"batch": 2, "regions": 3, "words": 5, "features": 7}
    # 6 regions and 10 words of 7 features each; 4 pairs; 10 bytes of mask.
    assert SIMILARITY.least_bytes(sizes, "forward", 2) == 16 * 7 * 2 + 4 * 2 + 10
    assert SIMILARITY.least_bytes(sizes, "backward", 2) == 2 * 16 * 7 * 2 + 4 * 2 + 10
    assert SIMILARITY.least_bytes(sizes, "both", 2) == 3 * 16 * 7 * 2 + 2 * 4 * 2 + 20
    assert SIMILARITY.least_operations(sizes, "forward") == 2 * 4 * 3 * 5 * 7 * 2
    assert SIMILARITY.least_operations(sizes, "backward") == 4 * 4 * 3 * 5 * 7 * 2
    assert SIMILARITY.least_operations(sizes, "both") == 6 * 4 * 3 * 5 * 7 * 2


@OPERATIONS
@pytest.mark.usefixtures("quick_compile")
def test_measurements_are_recorded(operation, tmp_path):
    assert _operation.measure([tiny(operation)], settings(tmp_path)) == []
    found = records(tmp_path, operation)
    names = list(operation.implementations("cpu"))
    assert [(r.direction, r.impl) for r in found] == [(d, n) for d in _operation.DIRECTIONS for n in names]
    for record in found:
        assert record.op == operation.name
        assert record.shape == {"name": "tiny", **TINY[operation.name]}
        assert (record.dtype, record.device, record.rounds) == ("float32", "cpu", 2)
        assert record.quantity == "time / time of published"
        assert (record.median == 1) == (record.impl == "published")
        assert 0 <= record.error <= record.error_allowed < 1e-4
        assert record.least_bytes == operation.least_bytes(TINY[operation.name], record.direction, 4)
        assert record.least_operations == operation.least_operations(TINY[operation.name], record.direction)
        assert record.bandwidth_share is record.matrix_share is None


def test_ratios_are_taken_within_each_round(tmp_path, monkeypatch):
    seconds = {"published": [4.0, 8.0, 10.0], "torch": [2.0, 2.0, 9.0]}
    monkeypatch.setattr(_measure, "time_interleaved", lambda works, *_: (seconds, 0.125))
    _operation.measure([tiny(SIMILARITY)], settings(tmp_path, impls=("published", "torch")))
    record = records(tmp_path, SIMILARITY)[1]
    assert (record.impl, record.median, record.spread, record.others) == ("torch", 0.5, (0.25, 0.9), 0.125)
    assert record.rounds == 3


def other_values(*tensors):
    return tuple(1.01 * output for output in ATTENTION.definition(*tensors))


def other_gradients(*tensors):
    return tuple(0.99 * output + 0.01 * output.detach() for output in ATTENTION.definition(*tensors))


def nan_outside_the_samples(*tensors):
    word_context, sentence_context = ATTENTION.definition(*tensors)
    word_context = word_context.clone()
    word_context[1] = math.nan
    return word_context, sentence_context


def samples_mixed(features, *tensors):
    # Correct values, but the last sample's output also has a gradient for the sample before, which is not compared.
    before = features[1:2] - features[1:2].detach()
    return ATTENTION.definition(features.index_add(0, torch.tensor([2]), before), *tensors)


def masks_mixed(features, words, sentence, word_mask):
    """The order in which the published code repeats the caption masks."""
    row_mask = word_mask.repeat(features.shape[2] * features.shape[3], 1)
    return global_local_attention.published_attention(features, words, sentence, row_mask)[:2]


WRONG = [other_values, other_gradients, nan_outside_the_samples, samples_mixed, masks_mixed]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda function: function.__name__)
def test_a_wrong_implementation_is_not_timed(wrong, tmp_path, capsys):
    implementations = {"wrong": wrong, "published": global_local_attention.published}
    operation = tiny(ATTENTION, implementations=lambda device: implementations, checked=2)
    assert _operation.measure([operation], settings(tmp_path)) == ["global_local_attention, tiny, float32, wrong"]
    assert {record.impl for record in records(tmp_path, operation)} == {"published"}
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "wrong" in line]
    assert "WRONG, not timed: its error" in line


def test_evenly_spaced_samples_are_compared():
    """Including the first and the last, at the measured size."""
    inputs = SIMILARITY.make_inputs({"batch": 7, "regions": 3, "words": 5, "features": 2}, torch.float32, CPU)
    expected = _operation.expect(dataclasses.replace(SIMILARITY, checked=3), inputs)
    assert expected.samples.tolist() == [0, 3, 6]
    (masked,) = expected.output_gradients
    assert masked.count_nonzero() == 9
    (similarity,) = SIMILARITY.definition(*inputs.leaves, inputs.word_mask)
    torch.testing.assert_close(expected.values[0].float(), similarity[[0, 3, 6]][:, [0, 3, 6]])


@pytest.mark.parametrize("fails", ["at once", "backward", "without a graph"])
def test_an_implementation_that_raises_is_skipped_with_its_error(fails, tmp_path, capsys):
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise NotImplementedError("no such kernel\nand much more")

    def failing(features, *tensors):
        if fails == "at once" or (fails == "without a graph" and not torch.is_grad_enabled()):
            raise NotImplementedError("no such kernel\nand much more")
        return ATTENTION.definition(Failing.apply(features) if fails == "backward" else features, *tensors)

    implementations = {"failing": failing, "published": global_local_attention.published}
    operation = tiny(ATTENTION, implementations=lambda device: implementations)
    assert _operation.measure([operation], settings(tmp_path)) == []
    found = [(record.impl, record.direction) for record in records(tmp_path, operation)]
    assert [direction for impl, direction in found if impl == "published"] == list(_operation.DIRECTIONS)
    others = [direction for impl, direction in found if impl == "failing"]
    assert others == (["backward", "both"] if fails == "without a graph" else [])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert line.endswith("failing: skipped, NotImplementedError: no such kernel")


def test_too_expensive_implementations_are_skipped(tmp_path, capsys):
    def published(*tensors):
        raise AssertionError("it was called")

    operation = tiny(
        SIMILARITY,
        implementations=lambda device: {"published": published, "torch": SIMILARITY.definition},
        too_much=lambda impl, sizes, device: "it is too large" if impl == "published" else None,
    )
    assert _operation.measure([operation], settings(tmp_path)) == []
    assert "published: skipped, it is too large" in capsys.readouterr().out
    assert {record.quantity for record in records(tmp_path, operation)} == {"time / time of torch"}


def test_the_published_similarity_is_skipped_for_large_batches_on_a_cpu():
    assert SIMILARITY.too_much("published", {"batch": 128}, "cpu") is None
    assert "square of the batch" in SIMILARITY.too_much("published", {"batch": 256}, "cpu")
    assert SIMILARITY.too_much("published", {"batch": 256}, "cuda") is None
    assert SIMILARITY.too_much("torch", {"batch": 256}, "cpu") is None


def test_a_missing_baseline_is_reported(tmp_path, capsys):
    operation = tiny(SIMILARITY, implementations=lambda device: {"compiled": SIMILARITY.definition})
    assert _operation.measure([operation], settings(tmp_path)) == []
    assert "neither 'published' nor 'torch' is available" in capsys.readouterr().out
    assert records(tmp_path, operation) == []


def test_shapes_beyond_the_time_budget_are_listed(tmp_path, capsys):
    assert _operation.measure([ATTENTION, SIMILARITY], settings(tmp_path, deadline=0.0)) == []
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(
        "time budget exhausted; not measured: word_region_similarity, b48, float32; global_local_attention, "
    )
    assert line.count(", float32") == 5 + 3
    assert list(tmp_path.iterdir()) == []


def test_a_time_budget_that_ends_within_a_shape_skips_its_other_implementations(tmp_path, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(_operation.time, "monotonic", lambda: now[0])

    def slow(*tensors):
        now[0] = 11.0
        return SIMILARITY.definition(*tensors)

    operation = tiny(SIMILARITY, implementations=lambda device: {"published": slow, "torch": SIMILARITY.definition})
    _operation.measure([operation, operation], settings(tmp_path, deadline=10.0))
    out = capsys.readouterr().out
    assert "torch: skipped, time budget exhausted" in out
    assert "time budget exhausted; not measured: word_region_similarity, tiny, float32\n" in out
    assert [record.impl for record in records(tmp_path, operation)] == ["published"] * 3


def test_the_most_important_cells_come_first():
    on_gpu = list(_operation.cells_of([ATTENTION, SIMILARITY], _operation.Settings("cuda")))
    names = [(cell.shape.name, cell.dtype) for cell in on_gpu]
    assert names[:4] == [("headline", "bfloat16"), ("b48", "bfloat16"), ("paper128", "bfloat16"), ("b1024", "bfloat16")]
    assert [dtype for _, dtype in names] == ["bfloat16"] * 12 + ["float32"] * 12 + ["float16"] * 12
    on_cpu = {cell.shape.name for cell in _operation.cells_of([ATTENTION, SIMILARITY], _operation.Settings("cpu"))}
    assert on_cpu == {"paper64", "paper128", "coco64", "coco128", "modern", "b48", "b128", "b256"}
    selected = _operation.Settings("cuda", shapes=("b48", "modern"), dtypes=("float16",))
    assert [cell.shape.name for cell in _operation.cells_of([ATTENTION, SIMILARITY], selected)] == ["b48", "modern"]
    quick = list(_operation.cells_of([ATTENTION, SIMILARITY], _operation.Settings("cpu", quick=True)))
    assert [cell.shape.name for cell in quick] == ["quick", "quick"]


def test_memory_is_measured_for_each_direction():
    memory = _operation.memory_here(ATTENTION.name, "quick", "published", "float32", torch.get_num_threads())
    assert list(memory) == list(_operation.DIRECTIONS)
    if memory["both"].call is None:
        pytest.skip("the system does not report memory")
    # More than two outputs of 3 x 32 x 32 x 32 floats: there are attention maps, too.
    assert memory["both"].call > 2 * 3 * 32**3 * 4 / 2**20


@OPERATIONS
@pytest.mark.usefixtures("fake_gpu", "quick_compile")
def test_records_of_a_gpu_have_milliseconds_and_shares(operation, tmp_path, capsys):
    implementations = {"published": operation.implementations("cuda")["published"], "triton": operation.definition}
    operation = tiny(operation, implementations=lambda device: implementations)
    assert _operation.measure([operation], settings(tmp_path, device="cuda")) == []
    found = records(tmp_path, operation)
    assert [record.dtype for record in found] == ["bfloat16"] * 6 + ["float32"] * 6 + ["float16"] * 6
    sizes = TINY[operation.name]
    for record in found:
        assert (record.quantity, record.median, record.spread) == ("ms", 0.25, (0.25, 0.25))
        assert (record.device, record.peak_memory_mib, record.process_memory_mib) == ("Fake GPU", 3, None)
        assert record.rounds == _measure.MIN_ROUNDS
        least_bytes = operation.least_bytes(sizes, record.direction, 4 if record.dtype == "float32" else 2)
        # A quarter of a millisecond per call, relative to 2000 GB/s and 500 TFLOP/s.
        assert record.bandwidth_share == round(least_bytes / 0.25e-3 / 2000e9, 4)
        assert record.matrix_share == round(operation.least_operations(sizes, record.direction) / 0.25e-3 / 500e12, 4)
        assert (record.copy_gb_per_s, record.matrix_tflops) == (2000, 500)
        assert record.error <= record.error_allowed
    assert len({record.error_allowed for record in found}) > 1
    assert "copy: 2000 GB/s" in capsys.readouterr().out


@pytest.mark.usefixtures("fake_gpu")
def test_calls_on_a_gpu_are_interleaved_and_prepared_each_time():
    order = []
    works = {
        name: _measure.Work(lambda mark, name=name: order.append(name + mark), lambda: ("!",)) for name in ("a", "b")
    }
    times = _measure.time_interleaved_on_gpu(works, seconds=0.0)
    assert "".join(order) == "a!b!" + "a!b!b!a!" * 2 + "a!b!"
    assert times == {"a": [0.25] * 5, "b": [0.25] * 5}


@pytest.mark.gpu
@OPERATIONS
def test_all_implementations_run_on_a_gpu(operation, tmp_path, capsys):
    assert _operation.measure([operation], settings(tmp_path, device="cuda", quick=True)) == []
    assert {record.impl for record in records(tmp_path, operation)} == set(operation.implementations("cuda"))
    assert "skipped" not in capsys.readouterr().out
