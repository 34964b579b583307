"""Benchmark of an operation: check each implementation against the definition, time all interleaved, record.

One file per operation defines its `Operation`: shapes, implementations and definition. `run.py` builds the `Settings`
and calls `measure`.
"""

from __future__ import annotations

import gc
import importlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import _measure, _record
from benchmarks._measure import PeakMemory, Work

DIRECTIONS = ("forward", "backward", "both")
# In order of importance: headline results are in bfloat16; float16 comes last because it costs the same as bfloat16.
CUDA_DTYPES, CPU_DTYPES = ("bfloat16", "float32", "float16"), ("float32",)
# Added to twice the error of the definition, because implementations sum in another order; in half precision, the
# rounding error of one value is larger and replaces it.
FLOOR = 4e-6
SECONDS_PER_GROUP = 1.5

Implementation = Callable[..., tuple[Tensor, ...]]
"""Called with all leaves and the word mask; returns the outputs."""


class Inputs(NamedTuple):
    """Inputs of a call."""

    leaves: tuple[Tensor, ...]
    """The tensors that require gradients; the first axis of each is the batch."""
    word_mask: Tensor
    output_gradients: tuple[Tensor, ...]
    """The gradient of the loss with respect to each output."""


@dataclass(frozen=True)
class Shape:
    """A set of sizes to measure."""

    name: str
    sizes: dict[str, int]
    devices: tuple[str, ...] = ("cpu", "cuda")


@dataclass(frozen=True)
class Operation:
    """An operation with its implementations, and the definition that they are checked against."""

    name: str
    """Also the name of its file of results."""
    shapes: tuple[Shape, ...]
    """In order of importance."""
    quick: Shape
    """A small shape for smoke tests."""
    tiny: Shape
    """A shape for the interpreter, which takes milliseconds for each block of a kernel."""
    make_inputs: Callable[[dict[str, int], torch.dtype, torch.device], Inputs]
    definition: Implementation
    """A direct transcription of the equations."""
    implementations: Callable[[str], dict[str, Implementation]]
    """The implementations for "cpu", "cuda" or "interpreter" by name; compiled ones are compiled again per shape."""
    checked: int
    """Number of samples to compare with the definition."""
    block: Callable[[Tensor], tuple[Tensor, ...]]
    """Maps sample indices to the index of the output block that depends on these samples only."""
    least_bytes: Callable[[dict[str, int], str, int], int]
    """Minimum memory traffic, given sizes, direction and bytes per element."""
    least_operations: Callable[[dict[str, int], str], int]
    """Minimum floating-point operations, given sizes and direction."""
    too_much: Callable[[str, dict[str, int], str], str | None] = lambda impl, sizes, device: None
    """Reason to skip an implementation at these sizes on this device; None to measure it."""


@dataclass(frozen=True)
class Settings:
    """Options of a measurement."""

    device: str
    """ "cpu", "cuda", or "interpreter" for the kernels on a CPU."""
    results: Path | None = None
    """Folder of the files to append records to; None only prints them."""
    rounds: int = 6
    """Number of rounds on a CPU; on a GPU, as many as fit into `seconds`."""
    threads: int = 2
    quiet: float = math.inf
    """Maximum share of the processors that other programs may use."""
    memory: bool = True
    """Measure memory on a CPU, in a fresh process per implementation."""
    seconds: float = SECONDS_PER_GROUP
    """Time budget on a GPU per direction and shape; exceeded if the minimum number of rounds takes longer."""
    quick: bool = False
    """Measure the quick shape only."""
    shapes: tuple[str, ...] = ()
    """Names of the shapes to measure; all if empty."""
    dtypes: tuple[str, ...] = ()
    """Names of the precisions to measure; all if empty."""
    impls: tuple[str, ...] = ()
    """Names of the implementations to measure; all if empty."""
    deadline: float = math.inf
    """The value of `time.monotonic()` after which no new measurement starts."""

    @property
    def torch_device(self) -> torch.device:
        """The device of the tensors."""
        return _measure.CUDA if self.device == "cuda" else torch.device("cpu")

    def is_over(self) -> bool:
        """Check whether the deadline has passed."""
        return time.monotonic() > self.deadline


class Cell(NamedTuple):
    """A group of comparable measurements: all implementations of one operation at one shape in one precision."""

    operation: Operation
    shape: Shape
    dtype: str

    def __str__(self) -> str:
        return f"{self.operation.name}, {self.shape.name}, {self.dtype}"


class Contender(NamedTuple):
    """An implementation that passed the comparison with the definition."""

    implementation: Implementation
    output_gradients: tuple[Tensor, ...]
    """Gradients in the precision of its outputs."""
    error: float
    error_allowed: float
    memory: dict[str, PeakMemory]
    """Peak memory by direction; empty on a GPU, where it is measured later, and if memory is not measured."""


@dataclass
class Rates:
    """Copy bandwidth and matrix throughput of the GPU, measured on first use."""

    copy: float | None = None
    matrix: dict[str, float] = field(default_factory=dict)

    def measure(self, dtype: str) -> tuple[float, float]:
        """Bandwidth of a copy in GB/s, and throughput of a matrix product in TFLOP/s."""
        if self.copy is None:
            self.copy = _measure.copy_gb_per_s()
            _log(f"copy: {self.copy:.0f} GB/s, read and written")
        if dtype not in self.matrix:
            self.matrix[dtype] = _measure.matrix_tflops(getattr(torch, dtype))
            _log(f"matrix product in {dtype}: {self.matrix[dtype]:.1f} TFLOP/s")
        return self.copy, self.matrix[dtype]


def find(name: str) -> Operation:
    """Import the operation with this name."""
    return importlib.import_module(f"benchmarks.{name}").OPERATION


def measure(operations: Sequence[Operation], settings: Settings) -> list[str]:
    """Measure all cells, the most important first, and append each record as soon as it is available.

    Returns:
        The implementations that differ from the definition; they are not timed.
    """
    torch.set_num_threads(settings.threads)
    rates, wrong = Rates(), []
    cells = list(cells_of(operations, settings))
    try:
        for position, cell in enumerate(cells):
            if settings.is_over():
                _log("time budget exhausted; not measured: " + "; ".join(map(str, cells[position:])))
                break
            # Graphs compiled for other sizes could make the next ones more general, with dynamic shapes.
            torch.compiler.reset()
            _free()
            # Garbage is collected before each call; freezing the objects that exist now keeps that fast.
            gc.freeze()
            wrong += measure_cell(cell, settings, rates)
    finally:
        gc.unfreeze()
    return wrong


def cells_of(operations: Sequence[Operation], settings: Settings) -> Iterator[Cell]:
    """The cells that the settings select, by precision, then by importance of the shape."""
    dtypes = CUDA_DTYPES if settings.device == "cuda" else CPU_DTYPES
    lists: list[Sequence[Shape]] = [operation.shapes for operation in operations]
    if settings.quick:
        lists = [[operation.tiny if settings.device == "interpreter" else operation.quick] for operation in operations]
    for dtype in settings.dtypes or dtypes:
        for rank in range(max(map(len, lists))):
            for operation, shapes in zip(operations, lists):
                shape = shapes[rank] if rank < len(shapes) else None
                if shape is None or not is_selected(shape.name, settings.shapes):
                    continue
                if settings.quick or settings.device in shape.devices:
                    yield Cell(operation, shape, dtype)


def is_selected(name: str, names: Sequence[str]) -> bool:
    """Check for a name in a selection; an empty selection contains all names."""
    return not names or name in names


def measure_cell(cell: Cell, settings: Settings, rates: Rates) -> list[str]:
    """Compare all implementations with the definition and time those within tolerance; returns the others."""
    operation, shape, dtype = cell
    if settings.device == "cuda":
        rates.measure(dtype)
    inputs = operation.make_inputs(shape.sizes, getattr(torch, dtype), settings.torch_device)
    expected = expect(operation, inputs)
    contenders: dict[str, Contender] = {}
    wrong = []
    for impl, implementation in operation.implementations(settings.device).items():
        reason = operation.too_much(impl, shape.sizes, settings.device)
        if settings.is_over():
            reason = "time budget exhausted"
        if not is_selected(impl, settings.impls) or reason is not None:
            if reason is not None:
                _log(f"{cell}, {impl}: skipped, {reason}")
            continue
        with or_skip(f"{cell}, {impl}"):
            # Before everything else: if the call runs out of memory, it ends the child process and not this one.
            memory = _memory_on_cpu(cell, impl, settings)
            output_gradients, error, allowed = compare(operation, implementation, inputs, expected)
            if error <= allowed:
                rounded = (_record.significant(error, 3), _record.significant(allowed, 3))
                contenders[impl] = Contender(implementation, output_gradients, *rounded, memory)
            else:
                wrong.append(f"{cell}, {impl}")
                _log(f"{cell}, {impl}: WRONG, not timed: its error {error:.2g} exceeds the tolerance of {allowed:.2g}")
        _free()
    for direction in DIRECTIONS:
        with or_skip(f"{cell}, {direction}"):
            measure_direction(cell, direction, inputs, contenders, settings, rates)
        _free()
    return wrong


def measure_direction(
    cell: Cell, direction: str, inputs: Inputs, contenders: dict[str, Contender], settings: Settings, rates: Rates
) -> None:
    """Time the implementations interleaved; print and record the results."""
    works: dict[str, Work] = {}
    memory: dict[str, PeakMemory] = {}
    first_call: dict[str, float] = {}
    for impl, contender in contenders.items():
        with or_skip(f"{cell}, {direction}, {impl}"):
            work = work_of(direction, contender.implementation, inputs, contender.output_gradients)
            # The first call also compiles, and allocates cached buffers.
            first_call[impl] = _measure.seconds_of(work)
            if settings.device == "cuda":
                memory[impl] = _measure.peak_memory_on_gpu(work)
            else:
                memory[impl] = contender.memory.get(direction, PeakMemory(None, None))
            works[impl] = work
        _free()
    if not works:
        return
    common = {"others": None, **_record.environment(settings.device)}
    if settings.device == "cuda":
        values, quantity = _measure.time_interleaved_on_gpu(works, settings.seconds), "ms"
    else:
        baseline = next((impl for impl in ("published", "torch") if impl in works), None)
        if baseline is None:
            raise ValueError("neither 'published' nor 'torch' is available as the baseline")
        # Repeat short calls so that a round takes about a second; the shortest first call did not compile anything.
        repeats = 1 if settings.quick else round(1 / (len(works) * min(first_call[impl] for impl in works)))
        seconds, common["others"] = _measure.time_interleaved(
            works, settings.rounds, settings.quiet, min(max(repeats, 1), 20)
        )
        # Ratios within each round: a temporary slowdown of the machine affects all implementations.
        values = {impl: [own / base for own, base in zip(seconds[impl], seconds[baseline])] for impl in works}
        quantity = f"time / time of {baseline}"
    for impl, rounds in values.items():
        record = _record.Record(
            op=cell.operation.name,
            impl=impl,
            direction=direction,
            shape={"name": cell.shape.name, **cell.shape.sizes},
            dtype=cell.dtype,
            quantity=quantity,
            median=_record.significant(statistics.median(rounds), 5),
            spread=(_record.significant(min(rounds), 5), _record.significant(max(rounds), 5)),
            rounds=len(rounds),
            peak_memory_mib=memory[impl].call,
            process_memory_mib=memory[impl].process,
            shares={},
            error=contenders[impl].error,
            error_allowed=contenders[impl].error_allowed,
            **_minimum_work(cell, direction, statistics.median(rounds), rates if quantity == "ms" else None),
            **common,
        )
        _log(as_text(record))
        if settings.results is not None:
            _record.append(record, settings.results / f"{record.op}.jsonl")


@contextmanager
def or_skip(name: str) -> Iterator[None]:
    """Log an error in the block and continue after it, so that one failing implementation does not stop the others."""
    try:
        yield
    except _measure.BusyError:
        raise
    except Exception as error:  # noqa: BLE001
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        _log(f"{name}: skipped, {type(error).__name__}: {lines[0] if lines else ''}"[:300])


def as_text(record: _record.Record) -> str:
    """Format a record as one line."""
    low, high = record.spread
    text = f"{record.op}, {record.shape['name']}, {record.dtype}, {record.direction:8}  {record.impl:9}  "
    text += f"{record.median:.4g} {record.quantity} ({low:.4g} to {high:.4g})"
    if record.peak_memory_mib is not None:
        text += f", {record.peak_memory_mib:.0f} MiB"
    if record.bandwidth_share is not None:
        text += f", {record.bandwidth_share:.0%} of the copy rate, {record.matrix_share:.0%} of the matrix rate"
    return text


def work_of(direction: str, implementation: Implementation, inputs: Inputs, output_gradients: Sequence[Tensor]) -> Work:
    """The measured call of an implementation in one direction.

    "forward" runs without a graph, as when images are only generated. "backward" gets a graph that is built before each
    call, so that only one implementation's graph is in memory at a time. "both" builds its graph itself.
    """
    leaves, word_mask, _ = inputs

    def forward() -> object:
        with torch.no_grad():
            return implementation(*leaves, word_mask)

    def backward(outputs: tuple[Tensor, ...]) -> object:
        return torch.autograd.grad(outputs, leaves, output_gradients)

    if direction == "forward":
        return Work(forward)
    if direction == "backward":
        return Work(backward, prepare=lambda: (implementation(*leaves, word_mask),))
    return Work(lambda: backward(implementation(*leaves, word_mask)))


class Expected(NamedTuple):
    """Expected outputs and gradients of some samples, with tolerances."""

    samples: Tensor
    """Indices of the samples to compare."""
    output_gradients: tuple[Tensor, ...]
    """Zero except in the output block that depends on these samples only."""
    values: tuple[Tensor, ...]
    """Outputs and gradients of the samples by the definition in float64."""
    allowed: tuple[float, ...]
    """Tolerance of each: twice the error of the definition in the measured precision, plus a floor."""


def expect(operation: Operation, inputs: Inputs) -> Expected:
    """Compute the definition for evenly spaced samples, including the first and the last."""
    leaves, word_mask, output_gradients = inputs
    count = word_mask.shape[0]
    samples = torch.linspace(0, count - 1, min(operation.checked, count), device=word_mask.device).round().long()
    block = operation.block(samples)
    subset = Inputs(
        tuple(leaf.detach()[samples] for leaf in leaves),
        word_mask[samples],
        tuple(gradient[block] for gradient in output_gradients),
    )
    exact = _outputs_and_gradients(operation.definition, subset, torch.float64)
    rounded = _outputs_and_gradients(operation.definition, subset, leaves[0].dtype)
    masked_gradients = tuple(torch.zeros_like(gradient) for gradient in output_gradients)
    for masked, gradient in zip(masked_gradients, output_gradients):
        masked[block] = gradient[block]
    floor = max(FLOOR, torch.finfo(leaves[0].dtype).eps / 2)
    allowed = tuple(2 * relative_error(value, expected) + floor for value, expected in zip(rounded, exact))
    return Expected(samples, masked_gradients, exact, allowed)


def compare(
    operation: Operation, implementation: Implementation, inputs: Inputs, expected: Expected
) -> tuple[tuple[Tensor, ...], float, float]:
    """Run an implementation at the full size and compare outputs and gradients of the selected samples.

    Returns:
        The output gradients in the precision of the outputs; the error that is largest relative to its tolerance; that
        tolerance.
    """
    samples, masked_gradients, values, allowed = expected
    outputs = implementation(*inputs.leaves, inputs.word_mask)
    gradients = torch.autograd.grad(
        outputs, inputs.leaves, [gradient.to(output.dtype) for gradient, output in zip(masked_gradients, outputs)]
    )
    block = operation.block(samples)
    selected = [output.detach()[block] for output in outputs] + [gradient[samples] for gradient in gradients]
    errors = [relative_error(value, reference) for value, reference in zip(selected, values, strict=True)]
    for position, output in enumerate(outputs):
        if not bool(output.isfinite().all()):
            errors[position] = math.inf
    for position, gradient in enumerate(gradients, start=len(outputs)):
        # The selected outputs do not depend on the other samples, so the gradients of these must be zero.
        elsewhere = gradient.index_fill(0, samples, 0).abs().max().item()
        errors[position] = max(errors[position], _nan_is_infinite(elsewhere) / values[position].abs().max().item())
    error, limit = max(zip(errors, allowed), key=lambda pair: pair[0] / pair[1])
    converted = tuple(g.to(output.dtype) for g, output in zip(inputs.output_gradients, outputs))
    return converted, error, limit


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Maximum absolute error divided by the largest expected magnitude; infinite if a value is NaN."""
    if value.shape != expected.shape:
        raise ValueError(f"the shape is {tuple(value.shape)} and must be {tuple(expected.shape)}")
    return _nan_is_infinite(((value.double() - expected).abs().max() / expected.abs().max()).item())


def memory_here(name: str, shape: str, impl: str, dtype: str, threads: int) -> dict[str, PeakMemory]:
    """Peak memory of an implementation on a CPU in each direction, measured in this process."""
    torch.set_num_threads(threads)
    operation = find(name)
    sizes = next(known.sizes for known in (*operation.shapes, operation.quick, operation.tiny) if known.name == shape)
    inputs = operation.make_inputs(sizes, getattr(torch, dtype), torch.device("cpu"))
    implementation = operation.implementations("cpu")[impl]
    with torch.no_grad():
        outputs = implementation(*inputs.leaves, inputs.word_mask)
        gradients = [g.to(output.dtype) for g, output in zip(inputs.output_gradients, outputs)]
        del outputs
    memory = {}
    for direction in DIRECTIONS:
        work = work_of(direction, implementation, inputs, gradients)
        work.once()  # exclude compilation and other one-time costs
        arguments = work.prepare()
        memory[direction] = _measure.high_water(lambda work=work, arguments=arguments: work.run(*arguments))
        del arguments
    return memory


def _memory_on_cpu(cell: Cell, impl: str, settings: Settings) -> dict[str, PeakMemory]:
    if settings.device != "cpu" or not settings.memory:
        return {}
    return _measure.in_a_fresh_process(
        memory_here, cell.operation.name, cell.shape.name, impl, cell.dtype, settings.threads
    )


def _outputs_and_gradients(implementation: Implementation, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, ...]:
    leaves = tuple(leaf.to(dtype).requires_grad_() for leaf in inputs.leaves)
    outputs = implementation(*leaves, inputs.word_mask)
    gradients = torch.autograd.grad(outputs, leaves, [gradient.to(dtype) for gradient in inputs.output_gradients])
    return tuple(output.detach() for output in outputs) + gradients


def _minimum_work(cell: Cell, direction: str, ms: float, rates: Rates | None) -> dict[str, float]:
    """Minimum bytes and operations; with rates, also the achieved shares of these rates."""
    sizes, dtype = cell.shape.sizes, getattr(torch, cell.dtype)
    least_bytes = cell.operation.least_bytes(sizes, direction, dtype.itemsize)
    least_operations = cell.operation.least_operations(sizes, direction)
    fields: dict[str, float] = {"least_bytes": least_bytes, "least_operations": least_operations}
    if rates is None:
        return fields
    copy, matrix = rates.measure(cell.dtype)
    return fields | {
        "bandwidth_share": round(least_bytes / (ms * 1e6) / copy, 4),
        "matrix_share": round(least_operations / (ms * 1e9) / matrix, 4),
        "copy_gb_per_s": copy,
        "matrix_tflops": matrix,
    }


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()  # a no-op without a GPU


def _nan_is_infinite(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _log(line: str) -> None:
    print(line, flush=True)
