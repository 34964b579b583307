"""What the operations share: compare each implementation with the definition, time them in turns, record.

A file per operation says what there is to measure (`Operation`); `run.py` says how (`Settings`) and calls `measure`.
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
# The headline figures are in the first; float16 costs what bfloat16 does, so it may be left out first.
CUDA_DTYPES, CPU_DTYPES = ("bfloat16", "float32", "float16"), ("float32",)
# Allowed beside twice the error of the definition, which sums in another order; in half precision, a rounding is more.
FLOOR = 4e-6
SECONDS_PER_GROUP = 1.5

Implementation = Callable[..., tuple[Tensor, ...]]
"""Called with all leaves and the word mask; returns the outputs."""


class Inputs(NamedTuple):
    """What a call gets."""

    leaves: tuple[Tensor, ...]
    """The tensors that need gradients; the first axis of each counts samples."""
    word_mask: Tensor
    output_gradients: tuple[Tensor, ...]
    """What backward begins with, one for each output."""


@dataclass(frozen=True)
class Shape:
    """Sizes that are measured."""

    name: str
    sizes: dict[str, int]
    devices: tuple[str, ...] = ("cpu", "cuda")


@dataclass(frozen=True)
class Operation:
    """What there is to measure of an operation, and what it is measured against."""

    name: str
    """Also the name of its file."""
    shapes: tuple[Shape, ...]
    """The most important ones first."""
    quick: Shape
    """A small one, to see that everything runs."""
    make_inputs: Callable[[dict[str, int], torch.dtype, torch.device], Inputs]
    definition: Implementation
    """As plain as the equations."""
    implementations: Callable[[str], dict[str, Implementation]]
    """Those for "cpu" or "cuda", by name; what is compiled is compiled anew for each shape."""
    checked: int
    """So many samples are compared with the definition."""
    block: Callable[[Tensor], tuple[Tensor, ...]]
    """Where an output lies that depends on these samples alone."""
    least_bytes: Callable[[dict[str, int], str, int], int]
    """Of sizes, direction and bytes per element."""
    least_operations: Callable[[dict[str, int], str], int]
    """Of sizes and direction."""
    too_much: Callable[[str, dict[str, int], str], str | None] = lambda impl, sizes, device: None
    """Why an implementation is not tried at these sizes on this device; None if it is."""


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    device: str
    """ "cpu" or "cuda"."""
    results: Path | None = None
    """The folder that records are appended to; None prints only."""
    rounds: int = 6
    """On a CPU; on a GPU there are as many as fit into `seconds`."""
    threads: int = 2
    quiet: float = math.inf
    """Largest share of a CPU that other programs may use."""
    memory: bool = True
    """Measure memory on a CPU, in a fresh process for each implementation."""
    seconds: float = SECONDS_PER_GROUP
    """On a GPU, for each direction of each shape; more where few rounds take longer."""
    quick: bool = False
    shapes: tuple[str, ...] = ()
    """Only these; all if empty. So are dtypes and implementations."""
    dtypes: tuple[str, ...] = ()
    impls: tuple[str, ...] = ()
    deadline: float = math.inf
    """`time.monotonic()` after which nothing new is begun."""

    @property
    def place(self) -> torch.device:
        """Where tensors lie."""
        return _measure.CUDA if self.device == "cuda" else torch.device("cpu")

    def over(self) -> bool:
        """Is the time used up?"""
        return time.monotonic() > self.deadline


class Cell(NamedTuple):
    """What is measured together: the implementations of one operation at one shape in one precision."""

    operation: Operation
    shape: Shape
    dtype: str

    def __str__(self) -> str:
        return f"{self.operation.name}, {self.shape.name}, {self.dtype}"


class Contender(NamedTuple):
    """An implementation that computes the right thing."""

    implementation: Implementation
    output_gradients: tuple[Tensor, ...]
    """In the precision of its outputs."""
    error: float
    error_allowed: float
    memory: dict[str, PeakMemory]
    """By direction; empty where it is measured later or not at all."""


@dataclass
class Rates:
    """What the GPU can do, measured when it is first asked for."""

    copy: float | None = None
    matrix: dict[str, float] = field(default_factory=dict)

    def of(self, dtype: str) -> tuple[float, float]:
        """Gigabytes per second of a copy, 10^12 operations per second of a matrix product."""
        if self.copy is None:
            self.copy = _measure.copy_gb_per_s()
            _say(f"copy: {self.copy:.0f} GB/s, read and written")
        if dtype not in self.matrix:
            self.matrix[dtype] = _measure.matrix_tflops(getattr(torch, dtype))
            _say(f"matrix product in {dtype}: {self.matrix[dtype]:.1f} TFLOP/s")
        return self.copy, self.matrix[dtype]


def find(name: str) -> Operation:
    """The operation of that name."""
    return importlib.import_module(f"benchmarks.{name}").OPERATION


def measure(operations: Sequence[Operation], settings: Settings) -> list[str]:
    """Measure, the most important shapes first, and append each record as soon as it is there.

    Returns:
        Which implementations compute something else than the definition; they are not timed.
    """
    torch.set_num_threads(settings.threads)
    rates, wrong = Rates(), []
    cells = list(cells_of(operations, settings))
    try:
        for position, cell in enumerate(cells):
            if settings.over():
                _say("time: used up; left out: " + "; ".join(map(str, cells[position:])))
                break
            # Nothing that was compiled for other sizes may make a graph more general than it has to be.
            torch.compiler.reset()
            _free()
            # Garbage is collected before each call, which takes long where much is loaded: that is left alone.
            gc.freeze()
            wrong += measure_cell(cell, settings, rates)
    finally:
        gc.unfreeze()
    return wrong


def cells_of(operations: Sequence[Operation], settings: Settings) -> Iterator[Cell]:
    """All that is asked for: by precision, then by importance of the shape."""
    dtypes = CUDA_DTYPES if settings.device == "cuda" else CPU_DTYPES
    lists = [[operation.quick] if settings.quick else operation.shapes for operation in operations]
    for dtype in settings.dtypes or dtypes:
        for rank in range(max(map(len, lists))):
            for operation, shapes in zip(operations, lists):
                shape = shapes[rank] if rank < len(shapes) else None
                if shape is not None and settings.device in shape.devices and chosen(shape.name, settings.shapes):
                    yield Cell(operation, shape, dtype)


def chosen(name: str, names: Sequence[str]) -> bool:
    """No names choose all."""
    return not names or name in names


def measure_cell(cell: Cell, settings: Settings, rates: Rates) -> list[str]:
    """Compare all implementations with the definition, then time those that are right; returns the wrong ones."""
    operation, shape, dtype = cell
    if settings.device == "cuda":
        rates.of(dtype)
    inputs = operation.make_inputs(shape.sizes, getattr(torch, dtype), settings.place)
    expected = expect(operation, inputs)
    contenders: dict[str, Contender] = {}
    wrong = []
    for impl, implementation in operation.implementations(settings.device).items():
        reason = operation.too_much(impl, shape.sizes, settings.device)
        if settings.over():
            reason = "the time is used up"
        if not chosen(impl, settings.impls) or reason is not None:
            if reason is not None:
                _say(f"{cell}, {impl}: skipped, {reason}")
            continue
        with or_skip(f"{cell}, {impl}"):
            # First of all, so that a call that needs more memory than there is ends that process and not this one.
            memory = _memory_on_cpu(cell, impl, settings)
            output_gradients, error, allowed = compare(operation, implementation, inputs, expected)
            if error <= allowed:
                figures = (_significant(error, 3), _significant(allowed, 3))
                contenders[impl] = Contender(implementation, output_gradients, *figures, memory)
            else:
                wrong.append(f"{cell}, {impl}")
                _say(f"{cell}, {impl}: WRONG, not timed: its error is {error:.2g} where {allowed:.2g} is allowed")
        _free()
    for direction in DIRECTIONS:
        with or_skip(f"{cell}, {direction}"):
            measure_direction(cell, direction, inputs, contenders, settings, rates)
        _free()
    return wrong


def measure_direction(
    cell: Cell, direction: str, inputs: Inputs, contenders: dict[str, Contender], settings: Settings, rates: Rates
) -> None:
    """Time the implementations in turns; print and record what came out."""
    works: dict[str, Work] = {}
    memory: dict[str, PeakMemory] = {}
    first_call: dict[str, float] = {}
    for impl, contender in contenders.items():
        with or_skip(f"{cell}, {direction}, {impl}"):
            work = work_of(direction, contender.implementation, inputs, contender.output_gradients)
            # It also compiles, and allocates what it keeps.
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
        figures, quantity = _measure.milliseconds_in_turns(works, settings.seconds), "ms"
    else:
        baseline = next((impl for impl in ("published", "torch") if impl in works), None)
        if baseline is None:
            raise ValueError("neither 'published' nor 'torch' is there to compare with")
        # Short calls are repeated, so that a round takes about a second; the shortest one had nothing to compile.
        repeats = 1 if settings.quick else round(1 / (len(works) * min(first_call[impl] for impl in works)))
        seconds, common["others"] = _measure.time_in_turns(
            works, settings.rounds, settings.quiet, min(max(repeats, 1), 20)
        )
        # Round by round: what slows the machine down for a while slows all of them.
        figures = {impl: [mine / its for mine, its in zip(seconds[impl], seconds[baseline])] for impl in works}
        quantity = f"time / time of {baseline}"
    for impl, values in figures.items():
        record = _record.Record(
            op=cell.operation.name,
            impl=impl,
            direction=direction,
            shape={"name": cell.shape.name, **cell.shape.sizes},
            dtype=cell.dtype,
            quantity=quantity,
            median=_significant(statistics.median(values), 5),
            spread=(_significant(min(values), 5), _significant(max(values), 5)),
            rounds=len(values),
            peak_memory_mib=memory[impl].call,
            process_memory_mib=memory[impl].process,
            shares={},
            error=contenders[impl].error,
            error_allowed=contenders[impl].error_allowed,
            **_least(cell, direction, statistics.median(values), rates if quantity == "ms" else None),
            **common,
        )
        _say(in_words(record))
        if settings.results is not None:
            _record.append(record, settings.results / f"{record.op}.jsonl")


@contextmanager
def or_skip(what: str) -> Iterator[None]:
    """Whatever stops one implementation must not stop the others: say why, and go on after the block."""
    try:
        yield
    except _measure.BusyError:
        raise
    except Exception as error:  # noqa: BLE001
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        _say(f"{what}: skipped, {type(error).__name__}: {lines[0] if lines else ''}"[:300])


def in_words(record: _record.Record) -> str:
    """A record as a line."""
    low, high = record.spread
    words = f"{record.op}, {record.shape['name']}, {record.dtype}, {record.direction:8}  {record.impl:9}  "
    words += f"{record.median:.4g} {record.quantity} ({low:.4g} to {high:.4g})"
    if record.peak_memory_mib is not None:
        words += f", {record.peak_memory_mib:.0f} MiB"
    if record.bandwidth_share is not None:
        words += f", {record.bandwidth_share:.0%} of a copy's rate, {record.matrix_share:.0%} of a matrix product's"
    return words


def work_of(direction: str, implementation: Implementation, inputs: Inputs, output_gradients: Sequence[Tensor]) -> Work:
    """The call that is measured.

    "forward" keeps nothing for a backward pass, as when images are only drawn. The graph of "backward" is built before
    each call, so that one implementation's graph is in memory at a time; "both" makes both.
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
    """What an implementation must return for some samples, and how far from it it may be."""

    samples: Tensor
    output_gradients: tuple[Tensor, ...]
    """0 but for what depends on these samples alone."""
    values: tuple[Tensor, ...]
    """Outputs and gradients of the samples by the definition in float64."""
    allowed: tuple[float, ...]
    """For each of them: twice the error of the definition in the precision that is measured, and a little more."""


def expect(operation: Operation, inputs: Inputs) -> Expected:
    """Compute the definition for the first, the last and some samples between."""
    leaves, word_mask, output_gradients = inputs
    count = word_mask.shape[0]
    samples = torch.linspace(0, count - 1, min(operation.checked, count), device=word_mask.device).round().long()
    block = operation.block(samples)
    chosen = Inputs(
        tuple(leaf.detach()[samples] for leaf in leaves),
        word_mask[samples],
        tuple(gradient[block] for gradient in output_gradients),
    )
    exact = _outputs_and_gradients(operation.definition, chosen, torch.float64)
    rough = _outputs_and_gradients(operation.definition, chosen, leaves[0].dtype)
    kept = tuple(torch.zeros_like(gradient) for gradient in output_gradients)
    for all_of_them, gradient in zip(kept, output_gradients):
        all_of_them[block] = gradient[block]
    floor = max(FLOOR, torch.finfo(leaves[0].dtype).eps / 2)
    allowed = tuple(2 * distance(value, truth) + floor for value, truth in zip(rough, exact))
    return Expected(samples, kept, exact, allowed)


def compare(
    operation: Operation, implementation: Implementation, inputs: Inputs, expected: Expected
) -> tuple[tuple[Tensor, ...], float, float]:
    """Run an implementation at the full size and compare outputs and gradients of the chosen samples.

    Returns:
        Output gradients in the precision of the outputs; the error that is worst beside what is allowed; what is.
    """
    samples, kept, values, allowed = expected
    outputs = implementation(*inputs.leaves, inputs.word_mask)
    gradients = torch.autograd.grad(
        outputs, inputs.leaves, [gradient.to(output.dtype) for gradient, output in zip(kept, outputs)]
    )
    block = operation.block(samples)
    picked = [output.detach()[block] for output in outputs] + [gradient[samples] for gradient in gradients]
    errors = [distance(value, truth) for value, truth in zip(picked, values, strict=True)]
    for position, output in enumerate(outputs):
        if not bool(output.isfinite().all()):
            errors[position] = math.inf
    for position, gradient in enumerate(gradients, start=len(outputs)):
        # Nothing of the other samples went into the chosen outputs.
        elsewhere = gradient.index_fill(0, samples, 0).abs().max().item()
        errors[position] = max(errors[position], _nan_is_infinite(elsewhere) / values[position].abs().max().item())
    error, limit = max(zip(errors, allowed), key=lambda pair: pair[0] / pair[1])
    converted = tuple(g.to(output.dtype) for g, output in zip(inputs.output_gradients, outputs))
    return converted, error, limit


def distance(value: Tensor, truth: Tensor) -> float:
    """Largest difference, as a share of the largest true value; infinite where something is not a number."""
    if value.shape != truth.shape:
        raise ValueError(f"the shape is {tuple(value.shape)} and must be {tuple(truth.shape)}")
    return _nan_is_infinite(((value.double() - truth).abs().max() / truth.abs().max()).item())


def memory_here(name: str, shape: str, impl: str, dtype: str, threads: int) -> dict[str, PeakMemory]:
    """Memory of all directions of an implementation on a CPU, in this process."""
    torch.set_num_threads(threads)
    operation = find(name)
    sizes = next(known.sizes for known in (*operation.shapes, operation.quick) if known.name == shape)
    inputs = operation.make_inputs(sizes, getattr(torch, dtype), torch.device("cpu"))
    implementation = operation.implementations("cpu")[impl]
    with torch.no_grad():
        outputs = implementation(*inputs.leaves, inputs.word_mask)
        gradients = [g.to(output.dtype) for g, output in zip(inputs.output_gradients, outputs)]
        del outputs
    memory = {}
    for direction in DIRECTIONS:
        work = work_of(direction, implementation, inputs, gradients)
        work.once()  # what is compiled or set up the first time does not count
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


def _least(cell: Cell, direction: str, ms: float, rates: Rates | None) -> dict[str, float]:
    """What cannot be avoided, and with rates also which share of them that makes."""
    sizes, dtype = cell.shape.sizes, getattr(torch, cell.dtype)
    least_bytes = cell.operation.least_bytes(sizes, direction, dtype.itemsize)
    least_operations = cell.operation.least_operations(sizes, direction)
    least: dict[str, float] = {"least_bytes": least_bytes, "least_operations": least_operations}
    if rates is None:
        return least
    copy, matrix = rates.of(cell.dtype)
    return least | {
        "bandwidth_share": round(least_bytes / (ms * 1e6) / copy, 4),
        "matrix_share": round(least_operations / (ms * 1e9) / matrix, 4),
        "copy_gb_per_s": copy,
        "matrix_tflops": matrix,
    }


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where there is no GPU


def _nan_is_infinite(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _significant(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")


def _say(line: str) -> None:
    print(line, flush=True)
