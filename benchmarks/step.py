"""One training step of generator and discriminators against the published formulation, with equal sizes and weights."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import _measure, _record
from benchmarks.published import published_step, use_published_attention, use_published_convolutions
from mirror_modules import MirrorGAN, MirrorGANConfig, Vocabulary
from mirror_modules.data.in_memory import CaptionBatch
from mirror_modules.training.recipes import AdversarialRecipe, Recipe
from mirror_modules.training.state import start
from mirror_modules.training.step import adversarial_step

# The first two of the published form have our convolutions, so that they understate the difference.
OURS, PUBLISHED, PUBLISHED_HELD = "ours", "published", "published, discriminators held fixed"
PUBLISHED_CONVOLUTIONS = "published, with its convolutions"
IMPLEMENTATIONS = (OURS, PUBLISHED, PUBLISHED_HELD, PUBLISHED_CONVOLUTIONS)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a step; the defaults are those of the published model for birds, with a batch for small machines."""

    batch: int = 4
    words: int = 18
    word_dim: int = 256
    channels: int = 32
    discriminator_channels: int = 64
    resolutions: tuple[int, ...] = (64, 128, 256)


def build_step(impl: str, sizes: Sizes) -> _measure.Call:
    """Set up networks, optimizers and a batch; each call of the result runs one training step."""
    torch.manual_seed(0)
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
    model = MirrorGAN(config, Vocabulary(["flower"]))
    if impl != OURS:
        use_published_attention(model)
    if impl == PUBLISHED_CONVOLUTIONS:
        use_published_convolutions(model)
    torch.manual_seed(1)  # again, so that the discriminators also start with equal weights
    state = start(model, Recipe("step", model=config, glam=recipe), torch.Generator().manual_seed(0))
    batch = make_batch(sizes, len(model.vocabulary))
    if impl == OURS:
        return partial(adversarial_step, state, batch, recipe)
    return partial(published_step, state, batch, recipe, hold_discriminators=impl == PUBLISHED_HELD)


def make_batch(sizes: Sizes, vocabulary_size: int) -> CaptionBatch:
    """Random images, and captions of equal length, because the published masks are wrong for different lengths."""
    finest = sizes.resolutions[-1]
    random = torch.Generator().manual_seed(1)
    images = 2 * torch.rand(sizes.batch, 3, finest, finest, generator=random) - 1
    word_mask = torch.arange(sizes.words).repeat(sizes.batch, 1) < max(1, 2 * sizes.words // 3)
    tokens = torch.randint(2, vocabulary_size, (sizes.batch, sizes.words), generator=random) * word_mask
    rows = torch.arange(sizes.batch)
    return CaptionBatch(images, tokens, word_mask, rows, ("",) * sizes.batch, rows, rows)


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
            _record.Record(
                op="training_step",
                impl=impl,
                direction="forward+backward+update",
                shape=dataclasses.asdict(sizes),
                dtype="float32",
                quantity=f"time / time of {baseline}",
                median=round(statistics.median(ratios), 4),
                spread=(round(min(ratios), 4), round(max(ratios), 4)),
                rounds=rounds,
                peak_memory_mib=peaks[impl].call,
                process_memory_mib=peaks[impl].process,
                shares={},
                others=others,
                **environment,
            )
        )
    return records
