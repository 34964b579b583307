"""Train a run phase by phase; the weights of each phase are saved as soon as it is finished.

Phase `stem` trains text and image encoder with the matching loss, `stream` the captioner on real pairs, `glam` the
generator against one discriminator per stage, and `evaluator` another encoder pair, used for evaluation only; so does
`second_evaluator`, if the recipe has it. `pretraining` and `evaluator_pretraining` train the image backbone of `stem`
and of `evaluator`. `first_stage`, before `glam`, trains the first stage of StackGAN, and `keypoints` the key-point
generator of GAWWN.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mirror_modules._files import write_whole
from mirror_modules._freezing import evaluating, freeze
from mirror_modules.data.seeding import seeded
from mirror_modules.models import GAWWN, BackboneConfig, EncoderPair, TextToImage, build_model
from mirror_modules.models.pretrained import load_weights, save_weights
from mirror_modules.stream import Captioner
from mirror_modules.training.batches import Splits, announce_candidates, load_splits
from mirror_modules.training.distributed import ProcessGroup, count_cores, cpu_threads, process_group
from mirror_modules.training.engine import NOISE, WEIGHTS, PhaseRun, Run, make_batches
from mirror_modules.training.features import (
    Cache,
    CachedImages,
    FrozenFeatures,
    Views,
    cache_images,
    cached_text,
    describe_cache,
)
from mirror_modules.training.folder import RunFolder
from mirror_modules.training.plan import Plan, make_plan
from mirror_modules.training.pretrain import (
    CachedCaptioner,
    CachedPair,
    captioning_step,
    keypoint_step,
    matching_step,
    region_rows,
    start_keypoints,
    start_pretraining,
)
from mirror_modules.training.recipes import ADVERSARIAL_PHASES, ALL_PHASES, PRETRAINING, WITHOUT_BACKBONE, Recipe
from mirror_modules.training.state import AdversarialState, ConditionedGenerator, check_system, start
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
    phases: Sequence[str] | None = None,
    device: str = "cpu",
    resume: bool = False,
) -> RunFolder:
    """Train the phases that a run's folder lacks; with several processes if torchrun started them.

    The caller's global random state and number of threads are restored at the end.

    Args:
        recipe: Data, model and training of the run.
        out: The run's folder, the same for all processes. Finished phases in it are reused.
        phases: Phases to train, in any order; None trains all phases of the recipe.
        device: "cpu", "cuda" or "auto", which uses a GPU if there is one.
        resume: Continue interrupted phases from their newest checkpoints; on a CPU the result equals that of an
            uninterrupted run bit for bit. In a new folder, the run simply starts.

    Returns:
        The run's folder.

    Raises:
        ValueError: An argument is not as above, a phase requires others, the folder holds another run or an interrupted
            phase, or the recipe cannot be trained and evaluated on its data.
        FileNotFoundError: A file of pretrained weights does not exist.
        ImportError: A backbone, or its weights, needs a package that is not installed.
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
    phases = recipe.phases if phases is None else phases
    if isinstance(phases, str) or not (phases := tuple(phases)):
        raise ValueError(
            f"train: phases must be a list of one or more of {', '.join(recipe.phases)}, but it is {phases!r}."
        )
    folder = RunFolder(out)
    with cpu_threads(recipe.engine.threads), process_group(device) as group:
        plan = _common_plan(recipe, folder, phases, resume, group)
        if group.is_main:
            for phase in plan.finished:
                print(f"{phase}: already trained, reusing {folder.weights(phase)}")
        if plan.to_train:
            recipe = _recorded(recipe, folder, plan)
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
    trainers: dict[str, Callable[[Run], nn.Module]] = {
        "pretraining": partial(_pretrain, phase="pretraining"),
        "stem": train_stem,
        "stream": train_stream,
        "first_stage": train_first_stage,
        "keypoints": train_keypoints,
        "glam": train_glam,
        "evaluator_pretraining": partial(_pretrain, phase="evaluator_pretraining"),
        "evaluator": train_evaluator,
        "second_evaluator": train_second_evaluator,
    }
    for phase in plan.to_train:
        torch.manual_seed(seeded(run.recipe.seed, WEIGHTS, ALL_PHASES.index(phase)).initial_seed())
        module = trainers[phase](run)
        if run.group.is_main:
            save_weights(module, run.folder.weights(phase))
        run.stop_if_interrupted()
    pretraining = [phase for phase in run.recipe.phases if phase not in WITHOUT_BACKBONE]
    if run.group.is_main and all(run.folder.weights(phase).exists() for phase in pretraining):
        # No phase will read them again.
        shutil.rmtree(run.folder.features, ignore_errors=True)


def _recorded(recipe: Recipe, folder: RunFolder, plan: Plan) -> Recipe:
    """The recipe with the checksums of the pretrained weights: of those that the phases load, and of earlier phases."""
    before = folder.read_recipe() if folder.config.exists() else None
    loading = [phase for phase in plan.to_train if phase not in WITHOUT_BACKBONE]
    try:
        with torch.random.fork_rng(devices=[]):
            recorded = recipe.recorded(loading, before)
    except ImportError as error:
        raise ImportError(
            f"{error} To train without pretrained backbones: --from-scratch (in Python, recipes.from_scratch)."
        ) from error
    if before is not None:
        folder.check(recorded)
    return recorded


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


def _pretrain(run: Run, phase: str) -> nn.Module:
    """Train an image backbone from scratch by captioning, as VirTex does (Desai and Johnson, 2021).

    The likelihood of a caption depends on each of its words, while a contrastive loss is low once a few words
    distinguish most captions of a batch. On drawn flowers, a captioner learns the number of petals in fewer steps.
    """
    sizes = run.recipe.model
    captioner = Captioner(
        run.recipe.backbone(phase).build(),
        len(run.splits.vocabulary),
        embedding_dim=sizes.captioner_embedding_dim,
        hidden_dim=sizes.captioner_hidden_dim,
        image_skip=True,
    )
    return _train_captioner(run, phase, captioner, train_backbone=True).image_encoder


def train_stem(run: Run) -> nn.Module:
    """Train text and image encoder with the matching loss."""
    return _train_pair(run, "stem")


def train_evaluator(run: Run) -> nn.Module:
    """Train another encoder pair with its own seed; no other phase uses it."""
    return _train_pair(run, "evaluator")


def train_second_evaluator(run: Run) -> nn.Module:
    """Train a further encoder pair, as `train_evaluator` does."""
    return _train_pair(run, "second_evaluator")


def _train_pair(run: Run, phase: str) -> nn.Module:
    recipe: Any = run.recipe.phase(phase)
    backbone = run.recipe.backbone(phase)
    pair = EncoderPair(run.recipe.model, len(run.splits.vocabulary), backbone=backbone)
    pair.to(run.group.device).train()
    features, message = None, ""
    encoder, before = pair.image_encoder.backbone, PRETRAINING.get(phase)
    if before in run.recipe.phases:
        load_weights(encoder, run.folder.weights(before))
        freeze(encoder)
    if not backbone.is_trainable or before in run.recipe.phases:
        features, message = _cache_images(run, phase, encoder, with_regions=recipe.word_weight > 0)
    cached = CachedPair(pair, features, region_rows(recipe, run.group))
    state = start_pretraining(cached, recipe, run.recipe.engine, run.group)
    views = None if features is None else features.views
    with PhaseRun(run, phase, state, recipe, {phase: state.network}, views=views) as steps:
        if message:
            steps.log.info(message)
        for batch in steps.batches():
            steps.record(matching_step(state, batch, recipe))
            if steps.validation_due:
                steps.validated(measure_pair(pair, run.unseen, run.candidates, run.recipe.seed))
        steps.restore_best()
    return pair.eval()


def train_stream(run: Run) -> nn.Module:
    """Train the captioner on real pairs, from the image encoder of phase `stem` if it has the same backbone."""
    recipe, model = run.recipe.stream, run.recipe.model
    is_shared = model.captioner_backbone == model.image_backbone
    captioner = build_model(model, run.splits.vocabulary, pretrained=not is_shared).captioner
    if is_shared:
        encoder = load_pair(run.folder, "stem", run.recipe, run.splits).image_encoder
        captioner.image_encoder = encoder if model.captioner_projection else encoder.backbone
    return _train_captioner(run, "stream", captioner, train_backbone=recipe.train_backbone)


def _train_captioner(run: Run, phase: str, captioner: Captioner, *, train_backbone: bool) -> Captioner:
    recipe: Any = run.recipe.phase(phase)
    captioner.to(run.group.device).train()
    features, message = None, ""
    if not train_backbone:
        captioner.image_encoder.requires_grad_(False).eval()
        features, message = _cache_images(run, phase, captioner.image_encoder, with_regions=False)
    state = start_pretraining(CachedCaptioner(captioner, features), recipe, run.recipe.engine, run.group)
    views = None if features is None else features.views
    with PhaseRun(run, phase, state, recipe, {phase: state.network}, views=views) as steps:
        if message:
            steps.log.info(message)
        for batch in steps.batches():
            steps.record(captioning_step(state, batch, recipe))
            if steps.validation_due:
                steps.validated(measure_captioner(captioner, run.unseen, run.recipe.seed))
        steps.restore_best()
    return captioner.eval()


def _cache_images(run: Run, phase: str, encoder: nn.Module, *, with_regions: bool) -> tuple[CachedImages | None, str]:
    """Features of all training images by a frozen image encoder, if they fit, and a message for the log."""
    captions, engine = run.splits.training, run.recipe.engine
    if run.recipe.engine.channels_last:
        encoder.to(memory_format=torch.channels_last)
    with evaluating(encoder):
        cache = cache_images(
            encoder,
            captions,
            Views.of(captions, run.recipe.model.resolutions[-1], engine.cached_crops),
            run.folder.features if engine.features_folder is None else Path(engine.features_folder),
            name=repr(dataclasses.replace(run.recipe.backbone(phase), sha256=None)),
            with_regions=with_regions,
            limit_mib=engine.cached_features_mib,
            group=run.group,
            stop=run.stop_if_interrupted,
        )
    return (None, cache) if isinstance(cache, str) else (cache, describe_cache(cache, captions))


def train_first_stage(run: Run) -> nn.Module:
    """Train the first stage of a generator whose stages are trained one after the other."""
    return _train_generator(run, "first_stage")[1]


def train_keypoints(run: Run) -> nn.Module:
    """Train the generator of missing key points against its discriminator, with the text encoder of phase `stem`."""
    recipe: Any = run.recipe.phase("keypoints")
    model = cast(GAWWN, build_model(run.recipe.model, run.splits.vocabulary, pretrained=False))
    pair = load_pair(run.folder, "stem", run.recipe, run.splits)
    model.text_encoder.load_state_dict(pair.text_encoder.state_dict())
    model.to(run.group.device)
    text, message = _cache_captions(run, model)
    random = seeded(run.recipe.seed, NOISE, ALL_PHASES.index("keypoints"))
    state = start_keypoints(model, recipe, run.recipe.engine, random, run.group, text)
    with PhaseRun(run, "keypoints", state, recipe, state.networks()) as steps:
        if message:
            steps.log.info(message)
        for batch in steps.batches():
            steps.record(keypoint_step(state, batch))
    return state.generator.module


def train_glam(run: Run) -> nn.Module:
    """Train the generator against its discriminators; the model is saved with the averaged generator."""
    model, generator = _train_generator(run, "glam")
    if run.group.is_main:
        model.requires_grad_(True).eval().save_pretrained(run.folder.model)
    return generator


def _train_generator(run: Run, phase: str) -> tuple[TextToImage, nn.Module]:
    """The model, and its generator with the averaged weights."""
    recipe, folder, seed = run.recipe, run.folder, run.recipe.seed
    glam, earlier = recipe.adversarial(phase), ADVERSARIAL_PHASES[: ADVERSARIAL_PHASES.index(phase)]
    # The weights of the captioner's backbone are in those of phase `stream`.
    model = build_model(recipe.model, run.splits.vocabulary, pretrained=False)
    pair = load_pair(folder, "stem", recipe, run.splits)
    model.text_encoder.load_state_dict(pair.text_encoder.state_dict())
    load_weights(model.captioner, folder.weights("stream"))
    for trained in (each for each in earlier if each in recipe.phases):
        load_weights(ConditionedGenerator(model.trained_in(trained)), folder.weights(trained))
    if isinstance(model, GAWWN) and recipe.keypoints is not None:
        load_weights(model.keypoint_generator, folder.weights("keypoints"))
    model.to(run.group.device)
    text, message = _cache_captions(run, model)
    random = seeded(seed, NOISE, ALL_PHASES.index(phase))
    state = start(model, recipe, random, run.group, text, pair, phase=phase)
    with PhaseRun(run, phase, state, glam, state.networks()) as steps:
        if message:
            steps.log.info(message)
        for batch in steps.batches():
            steps.record(adversarial_step(state, batch, glam))
            if steps.samples_due:
                _write_samples(steps, state, run.unseen.spread(SAMPLES))
            if steps.validation_due:
                steps.validated(measure_generator(state, pair.to(run.group.device), run.unseen, run.candidates, seed))
        steps.restore_best()
    state.generator.module.load_state_dict(state.average.module.state_dict())
    return model, state.generator.module


def _cache_captions(run: Run, model: TextToImage) -> tuple[FrozenFeatures | None, str]:
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
    # Without a stage that is not trained yet; the images of an earlier phase's stages come before those of this one.
    finest = generated.images[state.stages - len(state.resolutions) - 1]
    sheet = captioned_grid(finest, unseen.captions[: len(finest)], columns=4, scale=max(1, 128 // finest.shape[2]))
    folder.mkdir(exist_ok=True)
    write_png(sheet, folder / f"{steps.phase}-{steps.step:08}.png")
    steps.log.show("samples", sheet)
    if recipe.logging.tensorboard:
        attention = attention_sheet(state.model, unseen.captions[: len(finest)], generated)
        if attention is not None:
            steps.log.show("attention", attention)


def load_pair(folder: RunFolder, phase: str, recipe: Recipe, splits: Splits) -> EncoderPair:
    """The encoder pair of phase `stem`, `evaluator` or `second_evaluator`, in evaluation mode.

    Raises:
        FileNotFoundError: The phase is not trained.
        ValueError: The recipe has no such phase, or its weights do not fit.
    """
    # The weights of the backbone are in those of the phase.
    pair = EncoderPair(recipe.model, len(splits.vocabulary), backbone=recipe.backbone(phase), pretrained=False)
    load_weights(pair, folder.weights(phase))
    return pair.eval()


def _try_backbone(phase: str, backbone: BackboneConfig, encode: Callable[[Tensor], Any], images: Tensor) -> None:
    """Encode images of the size of a run; an error names the phase."""
    try:
        encode(images)
    except RuntimeError as error:
        raise ValueError(
            f"the backbone {backbone.name!r} of phase {phase!r}, with input_size={backbone.input_size}, fails on "
            f"images of {images.shape[2]} pixels ({error}); use a larger input_size, or leave it out."
        ) from error


def _check_feasible(run: Run, plan: Plan) -> None:
    """Raise the errors of invalid sizes, data and batches before anything is written or trained."""
    recipe, splits = run.recipe, run.splits
    if len(splits.training) < 2:
        raise ValueError("training needs at least 2 training images, but there is 1; use more images.")
    training = splits.training
    candidates = run.candidates
    if run.group.is_main:
        announce_candidates(recipe.evaluation.candidates, candidates)
    # Networks on the meta device raise the errors of invalid sizes and of images too small for a backbone.
    sizes = recipe.model
    with torch.device("meta"):
        model = build_model(sizes, splits.vocabulary, pretrained=False)
        images = torch.zeros(2, 3, sizes.resolutions[-1], sizes.resolutions[-1])
        for phase in (phase for phase in recipe.phases if phase not in ("stream", *WITHOUT_BACKBONE)):
            backbone = recipe.backbone(phase)
            pair = EncoderPair(sizes, len(splits.vocabulary), backbone=backbone, pretrained=False)
            _try_backbone(phase, backbone, pair.image_encoder, images)
        _try_backbone("stream", sizes.captioner_backbone, model.captioner.encode_images, images)
    captioner_backbone = recipe.model.captioner_backbone
    is_random = captioner_backbone.weights is None and captioner_backbone != recipe.model.image_backbone
    if "stream" in plan.to_train and is_random and not recipe.stream.train_backbone:
        raise ValueError(
            f"phase 'stream' freezes the captioner's backbone {captioner_backbone.name!r}, whose weights are random, "
            "because it is not that of phase 'stem' and has no pretrained weights; give model.captioner_backbone the "
            "fields of model.image_backbone, or turn stream.train_backbone on."
        )
    # Also raises what this system misses in the locations.
    boxes, points = (None if each is None else each[:2] for each in (training.boxes, training.points))
    location = model.locate(boxes, points, 2)
    with torch.device("meta"):
        for phase in sizes.adversarial_phases:
            check_system(model, phase, location)
    for phase in plan.to_train:
        make_batches(run, phase, recipe.phase(phase))
