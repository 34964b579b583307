"""Train a run phase by phase; the weights of each phase are saved as soon as it is finished.

Phase `stem` trains text and image encoder with the matching loss, `stream` the captioner on real pairs, `glam` the
generator against one discriminator per stage, and `evaluator` another encoder pair, used for evaluation only.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mirror_modules._files import write_whole
from mirror_modules.adversarial import PairedDiscriminator
from mirror_modules.data.seeding import seeded
from mirror_modules.models import MirrorGAN
from mirror_modules.models.encoder_pair import EncoderPair
from mirror_modules.models.pretrained import load_weights, save_weights
from mirror_modules.stream import Captioner
from mirror_modules.training.batches import Splits, announce_candidates, load_splits
from mirror_modules.training.distributed import ProcessGroup, count_cores, cpu_threads, process_group
from mirror_modules.training.engine import NOISE, WEIGHTS, PhaseRun, Run, make_batches
from mirror_modules.training.features import Cache, FrozenFeatures, cached_images, cached_text
from mirror_modules.training.folder import RunFolder
from mirror_modules.training.plan import Plan, make_plan
from mirror_modules.training.pretrain import CachedCaptioner, captioning_step, matching_step, start_pretraining
from mirror_modules.training.recipes import PHASES, Recipe
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


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    phases: Sequence[str] = PHASES,
    device: str = "cpu",
    resume: bool = False,
) -> RunFolder:
    """Train the phases that a run's folder lacks; with several processes if torchrun started them.

    The caller's global random state and number of threads are restored at the end.

    Args:
        recipe: Data, model and training of the run.
        out: The run's folder, the same for all processes. Finished phases in it are reused.
        phases: Phases to train, in any order.
        device: "cpu", "cuda" or "auto", which uses a GPU if there is one.
        resume: Continue interrupted phases from their newest checkpoints; on a CPU the result equals that of an
            uninterrupted run bit for bit. In a new folder, the run simply starts.

    Returns:
        The run's folder.

    Raises:
        ValueError: An argument is not as above, a phase requires others, the folder holds another run or an interrupted
            phase, or the recipe cannot be trained and evaluated on its data.
        TrainingError: Training cannot continue; the message gives the reason.
        Interrupted: SIGINT or SIGTERM was received; the step was finished and a checkpoint written.

    Examples:
        >>> from dataclasses import replace
        >>> from mirror_modules.training import get_recipe, train
        >>> recipe = get_recipe("demo")
        >>> recipe = replace(recipe, glam=replace(recipe.glam, steps=400))
        >>> folder = train(recipe, "runs/short", phases=["stem", "stream", "glam"])  # doctest: +SKIP
        >>> folder.model  # doctest: +SKIP
        PosixPath('runs/short/model')
    """
    if not isinstance(recipe, Recipe):
        raise ValueError(f"train: recipe must be a Recipe such as get_recipe('demo'), but it is {recipe!r}.")
    if isinstance(phases, str) or not (phases := tuple(phases)):
        raise ValueError(f"train: phases must be a list of one or more of {', '.join(PHASES)}, but it is {phases!r}.")
    folder = RunFolder(out)
    with cpu_threads(recipe.engine.threads), process_group(device) as group:
        plan = _common_plan(recipe, folder, phases, resume, group)
        if group.is_main:
            for phase in plan.finished:
                print(f"{phase}: already trained, reusing {folder.weights(phase)}")
        if plan.to_train:
            splits = load_splits(recipe.data, recipe.model, recipe.seed)
            folder.check_vocabulary(splits.vocabulary)
            run = Run(recipe, folder, splits, group)
            _check_feasible(run, plan)
            group.barrier()
            with folder.locked() if group.is_main else nullcontext():
                if group.is_main:
                    if make_plan(recipe, folder, phases, resume=resume) != plan:
                        raise ValueError(f"{folder.path} was changed by another process meanwhile; try again.")
                    folder.begin(recipe)
                    write_whole(folder.vocabulary, splits.vocabulary.save)
                    _announce(run.group)
                with ExitStack() as stack:
                    stack.enter_context(run.signals)
                    stack.enter_context(_determinism(recipe.engine.deterministic))
                    stack.enter_context(group.fork_rng())
                    # The caller may have turned gradients off.
                    stack.enter_context(torch.inference_mode(False))
                    stack.enter_context(torch.enable_grad())
                    _train_phases(run, plan)
        elif group.is_main and folder.read_recipe() != recipe:
            # Only fields that may change in a finished run, such as the path of the data.
            folder.begin(recipe)
    return folder


def _common_plan(recipe: Recipe, folder: RunFolder, phases: Sequence[str], resume: bool, group: ProcessGroup) -> Plan:
    """Rank 0's plan on all ranks; an error of rank 0 is raised on all of them."""
    plan: Plan | str = ""
    if group.is_main:
        try:
            plan = make_plan(recipe, folder, phases, resume=resume)
        except (ValueError, OSError) as error:
            if group.world_size == 1:
                raise
            plan = str(error)
    plan = group.broadcast(plan)
    if isinstance(plan, str):
        raise ValueError(plan)
    return plan


def _train_phases(run: Run, plan: Plan) -> None:
    trainers = {"stem": train_stem, "stream": train_stream, "glam": train_glam, "evaluator": train_evaluator}
    for phase in plan.to_train:
        torch.manual_seed(seeded(run.recipe.seed, WEIGHTS, PHASES.index(phase)).initial_seed())
        module = trainers[phase](run)
        if run.group.is_main:
            save_weights(module, run.folder.weights(phase))
        run.stop_if_interrupted()


def _announce(group: ProcessGroup) -> None:
    """Print the device and the number of threads."""
    threads = torch.get_num_threads()
    each = f" in each of {group.world_size} processes" if group.world_size > 1 else ""
    print(
        f"training on {group.device.type} with {threads} {'thread' if threads == 1 else 'threads'}{each}, on a machine "
        f"with {count_cores()} cores (--threads N changes the number of threads)",
        file=sys.stderr,
    )


@contextmanager
def _determinism(required: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or required)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def train_stem(run: Run) -> nn.Module:
    """Train text and image encoder with the matching loss."""
    return _train_pair(run, "stem")


def train_evaluator(run: Run) -> nn.Module:
    """Train a second encoder pair with its own seed; no other phase uses it."""
    return _train_pair(run, "evaluator")


def _train_pair(run: Run, phase: str) -> nn.Module:
    recipe = run.recipe.stem if phase == "stem" else run.recipe.evaluator
    pair = EncoderPair(run.recipe.model, len(run.splits.vocabulary))
    state = start_pretraining(pair, recipe, run.recipe.engine, run.group)
    pair.train()
    with PhaseRun(run, phase, state, recipe, {phase: state.network}) as steps:
        for batch in steps.batches():
            steps.record(matching_step(state, batch, recipe))
            if steps.validation_due:
                steps.validated(measure_pair(pair, run.unseen, run.candidates, run.recipe.seed))
        steps.restore_best()
    return pair.eval()


def train_stream(run: Run) -> nn.Module:
    """Train the captioner on real pairs, from the image encoder of phase `stem` if it has the same backbone."""
    recipe, model = run.recipe.stream, run.recipe.model
    captioner = MirrorGAN(model, run.splits.vocabulary).captioner
    if model.captioner_backbone == model.image_backbone:
        encoder = load_pair(run.folder, "stem", run.recipe, run.splits).image_encoder
        captioner.image_encoder = encoder if model.captioner_projection else encoder.backbone
    captioner.to(run.group.device).train()
    features = None
    if not recipe.train_backbone:
        captioner.image_encoder.requires_grad_(False).eval()
        features = _cache_images(run, captioner)
    state = start_pretraining(CachedCaptioner(captioner, features), recipe, run.recipe.engine, run.group)
    with PhaseRun(run, "stream", state, recipe, {"stream": state.network}, with_images=features is None) as steps:
        if features is not None:
            mebibytes = features.numel() * features.element_size() / 2**20
            steps.log.info(f"cached the features of {len(features)} images, {mebibytes:.1f} MiB")
        for batch in steps.batches():
            steps.record(captioning_step(state, batch, recipe))
            if steps.validation_due:
                steps.validated(measure_captioner(captioner, run.unseen, run.recipe.seed))
        steps.restore_best()
    return captioner.eval()


def _cache_images(run: Run, captioner: Captioner) -> Tensor | None:
    """Features of all training images by the frozen image encoder, if they fit; None where images are cropped."""
    captions = run.splits.training
    encoder: Any = captioner.image_encoder
    if captions.images.shape[1] != run.recipe.model.resolutions[-1]:
        return None
    cache = Cache.plan(len(captions), encoder.image_dim, run.recipe.engine.cached_features_mib)
    return cached_images(encoder, captions, run.group.device) if cache.fits else None


def train_glam(run: Run) -> nn.Module:
    """Train the generator against its discriminators; the model is saved with the averaged generator."""
    recipe, folder, seed = run.recipe, run.folder, run.recipe.seed
    model = MirrorGAN(recipe.model, run.splits.vocabulary)
    pair = load_pair(folder, "stem", recipe, run.splits)
    model.text_encoder.load_state_dict(pair.text_encoder.state_dict())
    load_weights(model.captioner, folder.weights("stream"))
    model.to(run.group.device)
    text, message = _cache_captions(run, model)
    random = seeded(seed, NOISE, PHASES.index("glam"))
    state = start(model, recipe, random, run.group, text)
    with PhaseRun(run, "glam", state, recipe.glam, state.networks()) as steps:
        if message:
            steps.log.info(message)
        for batch in steps.batches():
            steps.record(adversarial_step(state, batch, recipe.glam))
            if steps.samples_due:
                _write_samples(steps, state, run.unseen.spread(SAMPLES))
            if steps.validation_due:
                steps.validated(measure_generator(state, pair.to(run.group.device), run.unseen, run.candidates, seed))
        steps.restore_best()
    state.generator.module.load_state_dict(state.average.module.state_dict())
    if run.group.is_main:
        model.requires_grad_(True).eval().save_pretrained(folder.model)
    return state.generator.module


def _cache_captions(run: Run, model: MirrorGAN) -> tuple[FrozenFeatures | None, str]:
    """Cached features of all training captions, if they fit, and a message for the log."""
    captions = run.splits.training
    numbers = model.text_encoder.feature_dim * (captions.tokens.shape[1] + 1)
    # Must not depend on the number of steps: a run that is extended later would differ.
    cache = Cache.plan(len(captions.tokens), numbers, run.recipe.engine.cached_features_mib)
    # A subsampled caption has different words, and thus different features, in each batch.
    if not cache.fits or captions.long_tokens:
        return None, ""
    text = cached_text(model.text_encoder.eval(), captions, run.group.device)
    return text, f"cached the features of {len(captions.tokens)} captions, {cache.mebibytes:.1f} MiB"


def _write_samples(steps: PhaseRun, state: AdversarialState, unseen: Unseen) -> None:
    """Write a sheet of images of fixed captions and noise, and for TensorBoard their attention maps."""
    from mirror_modules.pictures.attention import attention_sheet
    from mirror_modules.pictures.grids import captioned_grid, write_png

    recipe, folder = steps.run.recipe, steps.run.folder.samples
    generated = draw_samples(state, unseen, recipe.seed, need_weights=recipe.logging.tensorboard)
    finest = generated.images[-1]
    sheet = captioned_grid(finest, unseen.captions[: len(finest)], columns=4, scale=max(1, 128 // finest.shape[2]))
    folder.mkdir(exist_ok=True)
    write_png(sheet, folder / f"glam-{steps.step:08}.png")
    steps.log.show("samples", sheet)
    if recipe.logging.tensorboard:
        attention = attention_sheet(state.model, unseen.captions[: len(finest)], generated)
        if attention is not None:
            steps.log.show("attention", attention)


def load_pair(folder: RunFolder, phase: str, recipe: Recipe, splits: Splits) -> EncoderPair:
    """The encoder pair of phase `stem` or `evaluator`, in evaluation mode."""
    pair = EncoderPair(recipe.model, len(splits.vocabulary))
    load_weights(pair, folder.weights(phase))
    return pair.eval()


def _check_feasible(run: Run, plan: Plan) -> None:
    """Raise the errors of invalid sizes, data and batches before anything is written or trained."""
    recipe, splits = run.recipe, run.splits
    if len(splits.training) < 2:
        raise ValueError("training needs at least 2 training images, but there is 1; use more images.")
    candidates = run.candidates
    if run.group.is_main:
        announce_candidates(recipe.evaluation.candidates, candidates)
    # Networks on the meta device raise the errors of invalid sizes and of images too small for a backbone.
    sizes = recipe.model
    with torch.device("meta"):
        model = MirrorGAN(sizes, splits.vocabulary)
        pair = EncoderPair(sizes, len(splits.vocabulary))
        for resolution in sizes.resolutions:
            PairedDiscriminator(resolution, sizes.word_dim, channels=sizes.discriminator_channels)
        images = torch.zeros(2, 3, sizes.resolutions[-1], sizes.resolutions[-1])
        pair.image_encoder(images)
        model.captioner.encode_images(images)
    for phase in plan.to_train:
        make_batches(run, phase, recipe.phase(phase))
