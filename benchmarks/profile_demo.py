"""Profile of the adversarial phase of the demo recipe: images per second, memory, share of each part of a step."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from functools import wraps
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from benchmarks import _measure, _record
from mirror_modules import MirrorGAN
from mirror_modules.data import InMemoryCaptions, RepeatableBatches, SyntheticFlowers
from mirror_modules.data.in_memory import CaptionBatch
from mirror_modules.models import EncoderPair
from mirror_modules.training.batches import load_batches, to_device
from mirror_modules.training.features import cached_text
from mirror_modules.training.network import StepResult
from mirror_modules.training.recipes import Recipe, get_recipe
from mirror_modules.training.state import AdversarialState, start
from mirror_modules.training.step import adversarial_step

WARM_UP_STEPS = 3
# The cost of a step does not depend on the size of the data set, and drawing all images takes longer than measuring.
IMAGES = 512


class Phase(NamedTuple):
    """The adversarial phase, ready to run; encoders and captioner are untrained, which does not change the cost."""

    recipe: Recipe
    state: AdversarialState
    batches: Iterator[CaptionBatch]

    def step(self) -> StepResult:
        """Run one step on the next batch."""
        return adversarial_step(self.state, next(self.batches), self.recipe.glam)


class Stopwatch(ExitStack):
    """Context manager that accumulates the seconds spent in each part of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def watch(self, part: str, owner: object, method: str) -> None:
        """Attribute the time of `owner.method` to a part. Watched methods must not call each other."""
        original = getattr(owner, method)

        @wraps(original)
        def timed(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return original(*arguments, **options)
            finally:
                self.seconds[part] += time.perf_counter() - started

        self.enter_context(patch.object(owner, method, timed))


def build_phase(name: str) -> Phase:
    """Set up data, networks and optimizers of a recipe for synthetic flowers."""
    torch.manual_seed(0)
    recipe = get_recipe(name)
    resolution = recipe.model.resolutions[-1]
    dataset = SyntheticFlowers(max(IMAGES, recipe.glam.batch_size), resolution=resolution)
    data = InMemoryCaptions(dataset, max_words=recipe.model.max_words)
    loaded = load_batches(RepeatableBatches(data, recipe.glam.batch_size, 0), 0, 2**31)
    batches = (to_device(batch, torch.device("cpu")) for batch in loaded)
    model = MirrorGAN(recipe.model, data.vocabulary)
    text = cached_text(model.text_encoder.eval(), data, torch.device("cpu"))
    pair = EncoderPair(recipe.model, len(data.vocabulary)) if recipe.glam.has_matching else None
    state = start(model, recipe, torch.Generator().manual_seed(0), text=text, pair=pair)
    return Phase(recipe, state, batches)


def build_step(name: str) -> _measure.Call:
    """The step of a recipe as a callable."""
    return build_phase(name).step


def shares_of_a_step(phase: Phase, steps: int) -> tuple[list[float], dict[str, float]]:
    """Seconds of each step, and the share of each part in their sum."""
    state = phase.state
    with Stopwatch() as watch:
        watch.watch("text features", state, "text")
        watch.watch("conditioning", state.model.conditioning, "forward")
        watch.watch("generator, forward", state.model.generator, "forward")
        for discriminator in state.paired_discriminators:
            watch.watch("discriminators, forward", discriminator, "features")
            watch.watch("discriminators, forward", discriminator, "logits")
        if state.redescription is not None:
            watch.watch("captioner, forward", state.redescription, "forward")
        if state.matching is not None:
            watch.watch("matching, forward", state.matching, "forward")
        watch.watch("backward", torch.Tensor, "backward")
        for network in state.networks().values():
            watch.watch("optimizers", network.optimizer, "step")
        watch.watch("average", state.average, "update")
        seconds = []
        for _ in range(steps):
            started = time.perf_counter()
            batch = next(phase.batches)
            watch.seconds["data"] += time.perf_counter() - started
            adversarial_step(state, batch, phase.recipe.glam)
            seconds.append(time.perf_counter() - started)
    shares = {part: time_of_part / sum(seconds) for part, time_of_part in watch.seconds.items()}
    return seconds, {**shares, "everything else": 1 - sum(shares.values())}


def measure(steps: int, threads: int, quiet: float, name: str = "demo") -> list[_record.Record]:
    """Measure speed, memory and shares of the adversarial phase of a recipe."""
    torch.set_num_threads(threads)
    phase = build_phase(name)
    for _ in range(WARM_UP_STEPS):
        phase.step()
    (seconds, shares), others = _measure.undisturbed(lambda: shares_of_a_step(phase, steps), quiet)
    environment = _record.environment()
    peak = _measure.peak_memory(build_step, name, threads=threads)
    rates = [phase.recipe.glam.batch_size / duration for duration in seconds]
    return [
        _record.Record(
            op=f"{name}_step",
            impl="ours",
            direction="data+forward+backward+update",
            shape={"batch": phase.recipe.glam.batch_size, **dataclasses.asdict(phase.recipe.model)},
            dtype="float32",
            quantity="images/s",
            median=round(statistics.median(rates), 2),
            spread=(round(min(rates), 2), round(max(rates), 2)),
            rounds=steps,
            peak_memory_mib=peak.call,
            process_memory_mib=peak.process,
            shares={part: round(share, 4) for part, share in shares.items()},
            others=others,
            **environment,
        )
    ]
