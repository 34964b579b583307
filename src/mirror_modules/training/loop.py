"""A run: the phases one after the other, each kept on disk as soon as it is done.

Phase `stem` trains text and image encoder by the matching loss, `stream` the captioner on real pairs, `glam` the
generator against one discriminator per stage, and `judge` another encoder pair, for the evaluation alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mirror_modules.adversarial import PairedDiscriminator
from mirror_modules.models import MirrorGAN
from mirror_modules.models.pretrained import load_weights, save_weights, write_whole
from mirror_modules.training.batches import Splits, load_splits, unseen_captions
from mirror_modules.training.checkpoints import Checkpoints
from mirror_modules.training.engine import PhaseRun, Run, make_batches
from mirror_modules.training.features import Cache, FrozenFeatures, cached_images, cached_text
from mirror_modules.training.folder import RunFolder
from mirror_modules.training.pretrain import EncoderPair, Reader, captioning_step, matching_step, start_pretraining
from mirror_modules.training.recipes import PHASES, MatchingRecipe, Recipe
from mirror_modules.training.state import AdversarialState, start
from mirror_modules.training.step import adversarial_step
from mirror_modules.training.validation import (
    SAMPLES,
    Unseen,
    draw_samples,
    measure_captioner,
    measure_generator,
    measure_pair,
)
from mirror_modules.training.world import World, connected

NEEDS = {"stem": (), "stream": ("stem",), "glam": ("stem", "stream"), "judge": ()}
# Each phase has random streams of its own, so that it comes out the same whether or not others ran before it.
SEED_OFFSETS = {"stem": 100, "stream": 200, "glam": 300, "judge": 400}


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    phases: Sequence[str] = PHASES,
    device: str = "cpu",
    resume: bool = False,
) -> RunFolder:
    """Train the phases that the folder does not hold yet; by several processes, if torchrun started them.

    Args:
        recipe: What to train.
        out: The run's folder, the same for all processes. Finished phases in it are taken as they are.
        phases: Which to train, in any order.
        device: "cpu" or "cuda".
        resume: Go on with phases that were stopped, from their newest checkpoints; the result is that of an unbroken
            run. A new folder is begun as without it.

    Returns:
        The run's folder.

    Raises:
        ValueError: A phase is unknown or lacks the ones before it, the folder holds something else or a phase that was
            stopped, or the recipe cannot be trained and evaluated on its data.
        TrainingError: The run cannot go on, and says why.
        Interrupted: SIGINT or SIGTERM came; the step was finished and a checkpoint written.
    """
    folder = RunFolder(out)
    with connected(device) as world:
        todo = _agree_on_todo(recipe, folder, phases, resume, world)
        if todo:
            splits = load_splits(recipe.data, recipe.model, recipe.seed)
            folder.check_vocabulary(splits.vocabulary)
            run = Run(recipe, folder, splits, world)
            _check_feasible(run, todo)
            world.wait()
            with folder.locked() if world.is_main else nullcontext():
                if world.is_main:
                    folder.begin(recipe)
                    write_whole(folder.vocabulary, splits.vocabulary.save)
                with run.signals, _determinism(recipe.engine.deterministic):
                    _train_phases(run, todo)
    return folder


def _agree_on_todo(
    recipe: Recipe, folder: RunFolder, phases: Sequence[str], resume: bool, world: World
) -> Sequence[str]:
    """What rank 0 finds in the folder is to be done; all refuse what it refuses."""
    todo: Sequence[str] | str = []
    if world.is_main:
        try:
            todo = _find_todo(recipe, folder, phases, resume)
        except (ValueError, OSError) as error:
            if world.size == 1:
                raise
            todo = str(error)
    todo = world.agree(todo)
    if isinstance(todo, str):
        raise ValueError(todo)
    return todo


def _train_phases(run: Run, todo: Sequence[str]) -> None:
    trainers = {"stem": train_stem, "stream": train_stream, "glam": train_glam, "judge": train_judge}
    for phase in todo:
        torch.manual_seed(run.recipe.seed + SEED_OFFSETS[phase])
        module = trainers[phase](run)
        if run.world.is_main:
            save_weights(module, run.folder.weights(phase))
        run.stop_if_asked()


@contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def train_stem(run: Run) -> nn.Module:
    """Text and image encoder by the matching loss."""
    return _train_pair(run, "stem", run.recipe.stem)


def train_judge(run: Run) -> nn.Module:
    """An encoder pair of its own seed, which no other phase uses."""
    return _train_pair(run, "judge", run.recipe.judge)


def _train_pair(run: Run, phase: str, recipe: MatchingRecipe) -> nn.Module:
    pair = EncoderPair(run.recipe.model, len(run.splits.vocabulary))
    state = start_pretraining(pair, recipe, run.recipe.engine, run.world)
    pair.train()
    with PhaseRun(run, phase, state, recipe, {phase: state.trainee}) as steps:
        for batch in steps.batches():
            steps.record(matching_step(state, batch, recipe))
            if steps.validation_due:
                steps.validated(measure_pair(pair, run.unseen, run.recipe.evaluation.candidates, run.recipe.seed))
        steps.take_best()
    return pair.eval()


def train_stream(run: Run) -> nn.Module:
    """The captioner on real pairs; it starts from the image encoder of phase `stem` where they are alike."""
    recipe, model, captions = run.recipe.stream, run.recipe.model, run.splits.training
    captioner = MirrorGAN(model, run.splits.vocabulary).captioner
    if model.captioner_backbone == model.image_backbone:
        encoder = load_pair(run.folder, "stem", run.recipe, run.splits).image_encoder
        captioner.image_encoder = encoder if model.captioner_projection else encoder.backbone
    captioner.to(run.world.device).train()
    seen = None
    if not recipe.train_backbone:
        eye: Any = captioner.image_encoder.requires_grad_(False).eval()
        # Crops of an image are other images.
        if captions.images.shape[1] == model.resolutions[-1]:
            cache = Cache.plan(len(captions), eye.image_dim, run.recipe.engine.cached_features_mib)
            seen = cached_images(eye, captions, run.world.device) if cache.fits else None
    state = start_pretraining(Reader(captioner, seen), recipe, run.recipe.engine, run.world)
    with PhaseRun(run, "stream", state, recipe, {"stream": state.trainee}, with_images=seen is None) as steps:
        if seen is not None:
            steps.log.say(f"{len(captions)} image features kept, {cache.mebibytes:.1f} MiB")
        for batch in steps.batches():
            steps.record(captioning_step(state, batch, recipe))
            if steps.validation_due:
                steps.validated(measure_captioner(captioner, run.unseen, run.recipe.seed))
        steps.take_best()
    return captioner.eval()


def train_glam(run: Run) -> nn.Module:
    """The generator against its discriminators; the model is kept with the averaged generator."""
    recipe, folder, seed = run.recipe, run.folder, run.recipe.seed
    model = MirrorGAN(recipe.model, run.splits.vocabulary)
    pair = load_pair(folder, "stem", recipe, run.splits)
    model.text_encoder.load_state_dict(pair.text_encoder.state_dict())
    load_weights(model.captioner, folder.weights("stream"))
    model.to(run.world.device)
    text, cached = _read_captions(run, model)
    random = torch.Generator().manual_seed(seed + SEED_OFFSETS["glam"])
    state = start(model, recipe, random, run.world, text)
    with PhaseRun(run, "glam", state, recipe.glam, state.trainees()) as steps:
        if cached:
            steps.log.say(cached)
        for batch in steps.batches():
            steps.record(adversarial_step(state, batch, recipe.glam))
            if steps.samples_due:
                _show_samples(steps, state, run.unseen.spread(SAMPLES))
            if steps.validation_due:
                figures = measure_generator(
                    state, pair.to(run.world.device), run.unseen, recipe.evaluation.candidates, seed
                )
                steps.validated(figures)
        steps.take_best()
    state.painter.module.load_state_dict(state.average.module.state_dict())
    if run.world.is_main:
        model.requires_grad_(True).eval().save_pretrained(folder.model)
    return state.painter.module


def _read_captions(run: Run, model: MirrorGAN) -> tuple[FrozenFeatures | None, str]:
    """Features of all training captions, if they may be kept, and what is to be said of them."""
    captions = run.splits.training
    numbers = model.text_encoder.feature_dim * (captions.tokens.shape[1] + 1)
    # Whether they are kept must not depend on the number of steps: with more of them, the run must stay the same.
    cache = Cache.plan(len(captions.tokens), numbers, run.recipe.engine.cached_features_mib)
    # A caption of which each batch keeps other words has no features to keep.
    if not cache.fits or captions.long_tokens:
        return None, ""
    text = cached_text(model.text_encoder.eval(), captions, run.world.device)
    return text, f"features of {len(captions.tokens)} captions kept, {cache.mebibytes:.1f} MiB"


def _show_samples(steps: PhaseRun, state: AdversarialState, unseen: Unseen) -> None:
    """A sheet of images of fixed captions and noise, and where the generator looked."""
    from mirror_modules.training.pictures import captioned_grid, write_png
    from mirror_modules.training.report import attention_sheet

    recipe, folder = steps.run.recipe, steps.run.folder.samples
    made = draw_samples(state, unseen, recipe.seed, need_weights=recipe.logging.tensorboard)
    finest = made.images[-1]
    sheet = captioned_grid(finest, unseen.captions[: len(finest)], columns=4, scale=max(1, 128 // finest.shape[2]))
    folder.mkdir(exist_ok=True)
    write_png(sheet, folder / f"glam-{steps.step:08}.png")
    steps.log.show("samples", sheet)
    if recipe.logging.tensorboard:
        attention = attention_sheet(state.model, unseen.captions[: len(finest)], made)
        if attention is not None:
            steps.log.show("attention", attention)


def load_pair(folder: RunFolder, phase: str, recipe: Recipe, splits: Splits) -> EncoderPair:
    """The encoder pair of phase `stem` or `judge`, in evaluation mode."""
    pair = EncoderPair(recipe.model, len(splits.vocabulary))
    load_weights(pair, folder.weights(phase))
    return pair.eval()


def _find_todo(recipe: Recipe, folder: RunFolder, phases: Sequence[str], resume: bool) -> list[str]:
    """The phases to be trained, in order; nothing is written."""
    for phase in phases:
        if phase not in PHASES:
            raise ValueError(f"unknown phase {phase!r}; there are {', '.join(PHASES)}.")
        for needed in NEEDS[phase]:
            if needed not in phases and not folder.weights(needed).exists():
                raise ValueError(f"phase {phase!r} needs phase {needed!r}, which {folder.path} lacks; train it too.")
    folder.check(recipe)
    _check_glam_steps(recipe, folder, phases)
    todo = []
    for phase in (phase for phase in PHASES if phase in phases):
        steps_done = max(Checkpoints(folder.checkpoints, phase, 1).files(), default=0)
        is_finished = folder.weights(phase).exists()
        is_begun = 0 < steps_done < getattr(recipe, phase).steps
        if is_finished and not is_begun:
            print(f"{phase}: already trained, taken from {folder.weights(phase)}")
            continue
        if is_begun and not resume:
            raise ValueError(
                f"{folder.path} holds phase {phase!r} after {steps_done} of {getattr(recipe, phase).steps} steps; "
                "go on with --resume, or choose another --out."
            )
        todo.append(phase)
    return todo


def _check_glam_steps(recipe: Recipe, folder: RunFolder, phases: Sequence[str]) -> None:
    """Phase `glam` can be made longer, from its last checkpoint; nothing else about its steps can change."""
    if not folder.config.exists():
        return
    old, new = folder.read_recipe().glam.steps, recipe.glam.steps
    kept = max(Checkpoints(folder.checkpoints, "glam", 1).files(), default=0)
    is_finished = folder.weights("glam").exists()
    done = max(kept, old) if is_finished else kept
    if new < done:
        raise ValueError(f"{folder.path} holds phase 'glam' after {done} steps; glam.steps={new} would be fewer.")
    if is_finished and new > old and ("glam" not in phases or kept < old):
        why = (
            "it is not among the phases to train" if "glam" not in phases else "there is no checkpoint of its last step"
        )
        raise ValueError(
            f"{folder.path} holds phase 'glam' after {old} steps; glam.steps={new} would make it longer, but {why}."
        )


def _check_feasible(run: Run, todo: Sequence[str]) -> None:
    """Fail before anything is written and trained, and not at the end of it."""
    recipe, splits = run.recipe, run.splits
    unseen, candidates = len(unseen_captions(splits)), recipe.evaluation.candidates
    if unseen < candidates:
        raise ValueError(
            f"evaluation.candidates={candidates} needs as many validation images with a caption that no training image "
            f"has, but there are {unseen}; take more validation images, or lower evaluation.candidates."
        )
    # Sizes that no network can have, images that are too small for one, and batches that cannot be divided.
    sizes = recipe.model
    with torch.device("meta"):
        model = MirrorGAN(sizes, splits.vocabulary)
        pair = EncoderPair(sizes, len(splits.vocabulary))
        for resolution in sizes.resolutions:
            PairedDiscriminator(resolution, sizes.word_dim, channels=sizes.discriminator_channels)
        images = torch.zeros(2, 3, sizes.resolutions[-1], sizes.resolutions[-1])
        pair.image_encoder(images)
        model.captioner.first_input(images)
    for phase in todo:
        make_batches(run, phase, getattr(recipe, phase))
