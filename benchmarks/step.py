"""One training step of generator and discriminators against the published formulation, with equal sizes and weights."""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import _measure, _record
from benchmarks._measure import Work
from benchmarks._operation import or_skip
from benchmarks.published import (
    published_discriminator_loss,
    published_generator_loss,
    published_step,
    use_published_attention,
    use_published_convolutions,
)
from mirror_modules import MirrorGAN, MirrorGANConfig, Vocabulary
from mirror_modules.adversarial.pairing import Mismatch
from mirror_modules.data.in_memory import CaptionBatch
from mirror_modules.training.distributed import ProcessGroup
from mirror_modules.training.recipes import AdversarialRecipe, EngineRecipe, Recipe
from mirror_modules.training.state import start
from mirror_modules.training.step import adversarial_step

# The first two of the published form have our convolutions, so that they understate the difference.
OURS, PUBLISHED, PUBLISHED_HELD = "ours", "published", "published, discriminators held fixed"
PUBLISHED_CONVOLUTIONS = "published, with its convolutions"
IMPLEMENTATIONS = (OURS, PUBLISHED, PUBLISHED_HELD, PUBLISHED_CONVOLUTIONS)
COMPILED = ", compiled"
# In order of importance; compilation is slow, and comes last in case the time budget runs out.
ON_GPU = (OURS, PUBLISHED_CONVOLUTIONS, PUBLISHED, PUBLISHED_HELD)
ON_GPU += (OURS + COMPILED, PUBLISHED_CONVOLUTIONS + COMPILED, PUBLISHED_HELD + COMPILED, PUBLISHED + COMPILED)
PRECISIONS_ON_GPU = ("bfloat16", "float32")
SECONDS_ON_GPU = 10.0
FLOOR = {"float32": 2**-10, "bfloat16": 2**-7}
"""Added to twice the error of the published step: one rounding of a product. On a GPU, convolutions round to TF32."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a step; the defaults are those of the published model for birds, with a batch for small machines."""

    batch: int = 4
    words: int = 18
    word_dim: int = 256
    channels: int = 32
    discriminator_channels: int = 64
    resolutions: tuple[int, ...] = (64, 128, 256)


BATCH_ON_GPU = 16
QUICK = Sizes(batch=3, words=3, word_dim=8, channels=4, discriminator_channels=2, resolutions=(8, 16))


def build_step(impl: str, sizes: Sizes, device: str = "cpu", dtype: str = "float32") -> partial[Any]:
    """Set up networks, optimizers and a batch; each call of the result runs one training step.

    Args:
        impl: A name of `IMPLEMENTATIONS` or `ON_GPU`.
        sizes: Sizes of the step.
        device: "cpu" or "cuda".
        dtype: "float32"; "bfloat16" by autocast; or "float64", for the published step only.
    """
    torch.manual_seed(0)
    form, compiled = impl.removesuffix(COMPILED), impl.endswith(COMPILED)
    config = MirrorGANConfig.release(
        word_dim=sizes.word_dim,
        max_words=sizes.words,
        channels=sizes.channels,
        resolutions=sizes.resolutions,
        discriminator_channels=sizes.discriminator_channels,
        # Neither side uses the captioner, so it is as small as possible.
        captioner_backbone="conv",
        captioner_embedding_dim=1,
        captioner_hidden_dim=1,
    )
    recipe = AdversarialRecipe(redescription_weight=0.0, adversarial_weighting="release", mismatched_pairs=True)
    precision: Any = "float32" if dtype == "float64" else dtype
    engine = EngineRecipe(precision=precision, compile=compiled and form == OURS)
    model = MirrorGAN(config, Vocabulary(["flower"]))
    if form != OURS:
        use_published_attention(model)
    if form == PUBLISHED_CONVOLUTIONS:
        use_published_convolutions(model)
    torch.manual_seed(1)  # again, so that the discriminators also start with equal weights
    group = ProcessGroup(device=torch.device(device))
    whole = Recipe("step", model=config, glam=recipe, engine=engine)
    state = start(model, whole, torch.Generator().manual_seed(0), group)
    batch = make_batch(sizes, len(model.vocabulary))
    batch = batch._replace(
        images=batch.images.to(device), tokens=batch.tokens.to(device), word_mask=batch.word_mask.to(device)
    )
    if form == OURS:
        return partial(adversarial_step, state, batch, recipe)
    if dtype == "float64":
        batch = batch._replace(images=batch.images.double())
        for part in (model, state.average.module, *state.paired_discriminators):
            part.double()
    options: dict[str, Any] = {"hold_discriminators": form == PUBLISHED_HELD}
    if compiled:
        # Each discriminator is compiled for its own size, not once with a variable size.
        model.generator.compile(fullgraph=True, dynamic=False)
        options["discriminator_loss"] = torch.compile(published_discriminator_loss, fullgraph=True, dynamic=False)
        options["generator_loss"] = torch.compile(published_generator_loss, fullgraph=True, dynamic=False)
    return partial(published_step, state, batch, recipe, **options)


def make_batch(sizes: Sizes, vocabulary_size: int) -> CaptionBatch:
    """Random images, and captions of equal length, because the published masks are wrong for different lengths."""
    finest = sizes.resolutions[-1]
    random = torch.Generator().manual_seed(1)
    images = 2 * torch.rand(sizes.batch, 3, finest, finest, generator=random) - 1
    word_mask = torch.arange(sizes.words).repeat(sizes.batch, 1) < max(1, 2 * sizes.words // 3)
    tokens = torch.randint(2, vocabulary_size, (sizes.batch, sizes.words), generator=random) * word_mask
    rows = torch.arange(sizes.batch)
    return CaptionBatch(images, tokens, word_mask, rows, ("",) * sizes.batch, rows, rows, rows)


@contextmanager
def published_pairs() -> Iterator[None]:
    """Let our step form mismatched pairs as the published code: each image but the last with the next caption."""

    def mismatch(class_ids: Tensor, caption_ids: Tensor, *, generator: torch.Generator) -> Mismatch:
        rows = torch.arange(len(class_ids))
        return Mismatch(rows.roll(-1), rows < len(rows) - 1)

    with patch("mirror_modules.training.step.mismatch", mismatch):
        yield


def measure(sizes: Sizes, rounds: int, threads: int, quiet: float) -> list[_record.Record]:
    """Time all implementations interleaved in one process, and measure the memory of each in a fresh process."""
    torch.set_num_threads(threads)
    steps = {impl: build_step(impl, sizes) for impl in IMPLEMENTATIONS}
    seconds, others = _measure.time_interleaved(steps, rounds, quiet)
    environment = _record.environment()
    peaks = {impl: _measure.peak_memory(build_step, impl, sizes, threads=threads) for impl in IMPLEMENTATIONS}
    records = []
    for impl, baseline in [
        (OURS, PUBLISHED_CONVOLUTIONS),
        (OURS, PUBLISHED),
        (OURS, PUBLISHED_HELD),
        (PUBLISHED_HELD, PUBLISHED),
    ]:
        # Ratios within each round: a temporary slowdown of the machine affects both.
        ratios = [own / base for own, base in zip(seconds[impl], seconds[baseline])]
        records.append(
            record_of(sizes, impl, "float32", f"time / time of {baseline}", ratios, peaks[impl], others, environment)
        )
    return records


def record_of(
    sizes: Sizes,
    impl: str,
    dtype: str,
    quantity: str,
    values: list[float],
    memory: _measure.PeakMemory,
    others: float | None,
    environment: dict[str, Any],
) -> _record.Record:
    """The record of one implementation."""
    return _record.Record(
        op="training_step",
        impl=impl,
        direction="forward+backward+update",
        shape=dataclasses.asdict(sizes),
        dtype=dtype,
        quantity=quantity,
        median=round(statistics.median(values), 4),
        spread=(round(min(values), 4), round(max(values), 4)),
        rounds=len(values),
        peak_memory_mib=memory.call,
        process_memory_mib=memory.process,
        shares={},
        others=others,
        **environment,
    )


class Outcome(NamedTuple):
    """Results of the first step, to compare implementations."""

    losses: Tensor
    """All losses of the published step, in one vector."""
    gradient: Tensor
    """Of the generator's weights, after the discriminators were updated, in one vector."""


class Contender(NamedTuple):
    """An implementation whose first step equals the published one."""

    step: partial[Any]
    error: float
    error_allowed: float
    memory: _measure.PeakMemory


def first_step(step: partial[Any]) -> Outcome:
    """Run the first step of an implementation."""
    result = step()
    losses = result if isinstance(result, dict) else result.losses
    state = step.args[0]
    names = [f"{part}_{size}" for part in ("discriminator", "generator") for size in state.resolutions]
    gradients = [p.grad.flatten() for p in state.generator.module.parameters() if p.grad is not None]
    return Outcome(torch.stack([losses[name] for name in [*names, "kl"]]).double(), torch.cat(gradients).double())


def errors(outcome: Outcome, expected: Outcome) -> tuple[float, float]:
    """Norms of the differences of losses and gradient, relative to the norms of the expected ones."""
    found = [float((own - other).norm() / other.norm()) for own, other in zip(outcome, expected, strict=True)]
    loss, gradient = (math.inf if math.isnan(error) else error for error in found)
    return loss, gradient


def measure_on_gpu(
    sizes: Sizes,
    dtype: str,
    impls: Sequence[str],
    reference: Outcome,
    device: str = "cuda",
    deadline: float = math.inf,
) -> tuple[list[_record.Record], list[str]]:
    """Compare the first step of each implementation with the published one in float64, and time those within tolerance.

    Called within `published_pairs`.

    Args:
        sizes: Sizes of the step.
        dtype: The precision.
        impls: The implementations, in order of importance.
        reference: The first step of the published form in float64.
        device: "cuda"; "cpu" compares, and measures nothing.
        deadline: The value of `time.monotonic()` after which no further implementation is set up.

    Returns:
        The records, and the implementations that differ from the published step.
    """
    torch.compiler.reset()
    _free()
    limits: list[float] = []
    with or_skip(f"step, tolerance of {dtype}"):
        published = errors(first_step(build_step(PUBLISHED, sizes, device, dtype)), reference)
        limits = [2 * error + FLOOR[dtype] for error in published]
    if not limits:
        return [], []
    contenders: dict[str, Contender] = {}
    wrong: list[str] = []
    for impl in impls:
        name = f"step, {impl}, {dtype}"
        if time.monotonic() > deadline:
            print(f"{name}: skipped, time budget exhausted", flush=True)
            continue
        with or_skip(name):
            _free()
            step = build_step(impl, sizes, device, dtype)
            own = errors(first_step(step), reference)
            # The one that is closest to its tolerance, of losses and gradient.
            error, allowed = max(zip(own, limits), key=lambda pair: pair[0] / pair[1])
            if error <= allowed:
                print(f"{name}: error {error:.2g}, allowed {allowed:.2g}", flush=True)
                memory = _measure.PeakMemory(None, None)
                if device == "cuda":
                    memory = _measure.peak_memory_on_gpu(Work(step, prepare=partial(_clear, step)))
                contenders[impl] = Contender(step, error, allowed, memory)
            else:
                wrong.append(name)
                print(f"{name}: WRONG, not timed: its error {error:.2g} exceeds the tolerance of {allowed:.2g}")
    if device != "cuda" or not contenders:
        return [], wrong
    works = {impl: Work(contender.step) for impl, contender in contenders.items()}
    times = _measure.time_interleaved_on_gpu(works, SECONDS_ON_GPU)
    environment = _record.environment(device)
    records = [
        dataclasses.replace(
            record_of(sizes, impl, dtype, "ms", times[impl], contender.memory, None, environment),
            error=_record.significant(contender.error, 3),
            error_allowed=_record.significant(contender.error_allowed, 3),
        )
        for impl, contender in contenders.items()
    ]
    return records, wrong


def _clear(step: partial[Any]) -> tuple[()]:
    """Free all gradients, so that those of the measured step count."""
    for network in step.args[0].networks().values():
        network.optimizer.zero_grad()
    return ()


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()  # a no-op without a GPU
