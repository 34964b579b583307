"""The fields of a recipe: everything that determines the result of a run, as frozen dataclasses."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mirror_modules._checks import check_number, check_positive
from mirror_modules.models import BackboneConfig, MirrorGANConfig, ModelConfig, get_system
from mirror_modules.training.recipes.fields import changed_fields, override

PHASES = ("stem", "stream", "glam", "evaluator")
"""The phases that every run has, in order."""
SECOND_EVALUATOR, FIRST_STAGE = "second_evaluator", "first_stage"
PRETRAINING = {"stem": "pretraining", "evaluator": "evaluator_pretraining"}
"""The phases that can train the image backbone of a phase before it."""
# Random streams depend on the position of a phase in this tuple.
ALL_PHASES = (*PHASES, SECOND_EVALUATOR, FIRST_STAGE, *PRETRAINING.values())
"""The phases that a run can have; `Recipe.phases` are those of a recipe, in order."""
ADVERSARIAL_PHASES = (FIRST_STAGE, "glam")
"""The phases that train a generator against discriminators, in order."""

NEED_MISMATCHED = ("release", "gan-int-cls")
"""Weightings in which terms of real and generated pairs are smaller because there are mismatched pairs."""
NOT_READ_FOR_DRAWN_FLOWERS = ("path", "on_error", "held_out_share")
"""Fields of `DataRecipe` that apply to files only."""
READ_FOR_DRAWN_FLOWERS_ALONE = ("scatter",)
"""Fields of `DataRecipe` that do not apply to files."""


def _harmless(default: Any) -> Any:
    """A field that may change when a run is resumed, because it does not affect the result of a step."""
    return field(default=default, metadata={"harmless": True})


@dataclass(frozen=True)
class DataRecipe:
    """The captioned images."""

    source: Literal[
        "synthetic-flowers", "oxford-flowers", "birds", "coco", "folder", "webdataset", "prepared", "auto"
    ] = "synthetic-flowers"
    """Drawn flowers, or the format of the folder `path`, which auto recognizes; prepared is the cache written by
    `mirror-modules data prepare`."""
    path: str | None = _harmless(None)
    """Folder of the photographs; None for drawn flowers."""
    training_images: int | None = 4096
    """Number of training images; None takes all, or draws 4096 flowers."""
    validation_images: int | None = 1000
    """Number of validation images; None takes all, or draws 1000 flowers."""
    min_count: int = 1
    """Minimum number of occurrences in the training captions; rarer words become unknown."""
    augment: bool = False
    """Random crops and horizontal flips in training; images whose caption mentions left or right are not flipped."""
    on_error: Literal["stop", "skip"] = "stop"
    """Whether a damaged file ends the run, or is skipped and listed as long as at most 5 % are damaged."""
    long_captions: Literal["cut", "subsample"] = "cut"
    """Training keeps the first words of captions longer than the model's max_words, or random ones in their order."""
    scatter: bool = False
    """Draw flowers of more sizes, anywhere in the image, for systems that place them."""
    held_out_share: float = 0.1
    """Share of the training images kept from all training, to evaluate on training classes too, where validation has
    other classes; 0 trains on all images."""

    def __post_init__(self) -> None:
        limits = {"training_images": self.training_images, "validation_images": self.validation_images}
        given = {name: limit for name, limit in limits.items() if limit is not None}
        check_positive("DataRecipe", min_count=self.min_count, **given)
        _check_not_negative("DataRecipe", self, "held_out_share")
        if self.held_out_share > 0.5:
            raise ValueError(f"DataRecipe: held_out_share must be at most 0.5, but it is {self.held_out_share!r}.")
        if self.source != "synthetic-flowers":
            for name in READ_FOR_DRAWN_FLOWERS_ALONE:
                _check_has_effect("DataRecipe", self, name, f"source={self.source!r}")
            return
        if self.path is not None:
            raise ValueError(
                f"DataRecipe: source='synthetic-flowers' draws its images and does not read path={self.path!r}; to "
                f"train on that folder, use `mirror-modules train photos-64 --data {shlex.quote(self.path)}`."
            )
        for name in NOT_READ_FOR_DRAWN_FLOWERS:
            _check_has_effect("DataRecipe", self, name, "source='synthetic-flowers'")


@dataclass(frozen=True)
class MatchingRecipe:
    """Text and image encoder with the matching loss: phases `stem` and `evaluator`."""

    steps: int = 400
    """Optimizer steps."""
    batch_size: int = 96
    """Images per step over all processes; the other captions of a batch are the negatives."""
    learning_rate: float = 4e-3
    """Adam's peak learning rate."""
    max_grad_norm: float | None = 1.0
    """Gradients are clipped to this norm; None does not clip."""
    gamma_loss: float = 20.0
    """Inverse temperature of the cross entropy; 10 in the published code, too low for short runs."""
    word_weight: float = 0.3
    """Weight of the word-region terms relative to the sentence-image terms; 0 drops them."""
    word_pairs: int = 48
    """Pairs per batch in the word-region terms, whose cost is quadratic in this number."""
    keep_best: Literal["r_precision"] | None = None
    """Validation metric that selects the best step; None uses the last step."""

    def __post_init__(self) -> None:
        check_positive("MatchingRecipe", steps=self.steps, batch_size=self.batch_size, word_pairs=self.word_pairs)
        _check_above_zero("MatchingRecipe", self, "learning_rate", "gamma_loss", "max_grad_norm")
        _check_not_negative("MatchingRecipe", self, "word_weight")
        if self.word_weight == 0:
            _check_has_effect("MatchingRecipe", self, "word_pairs", "word_weight=0")


@dataclass(frozen=True)
class EvaluatorRecipe(MatchingRecipe):
    """An encoder pair for evaluation, which no other phase uses: phases `evaluator` and `second_evaluator`."""

    word_weight: float = 0.0
    """Weight of the word-region terms relative to the sentence-image terms; 0 drops them."""
    backbone: BackboneConfig | None = None
    """Backbone of the image encoder; None takes that of phase `stem`, model.image_backbone. A string is its name."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backbone is not None:
            object.__setattr__(self, "backbone", BackboneConfig.of(self.backbone))


@dataclass(frozen=True)
class PretrainingRecipe:
    """An image backbone from scratch that learns to caption: phases `pretraining` and `evaluator_pretraining`."""

    steps: int = 1500
    """Optimizer steps."""
    batch_size: int = 64
    """Images per step over all processes."""
    accumulate: int = 1
    """Gradient accumulation: parts into which each process divides its share of a batch, to save memory."""
    learning_rate: float = 3e-3
    """Adam's peak learning rate."""
    max_grad_norm: float | None = 1.0
    """Gradients are clipped to this norm; None does not clip."""
    keep_best: Literal["cross_entropy", "word_accuracy"] | None = None
    """Validation metric that selects the best step; None uses the last step."""

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_positive(owner, steps=self.steps, batch_size=self.batch_size, accumulate=self.accumulate)
        _check_above_zero(owner, self, "learning_rate", "max_grad_norm")


@dataclass(frozen=True)
class CaptionerRecipe(PretrainingRecipe):
    """The captioner on real pairs: phase `stream`."""

    steps: int = 1000
    """Optimizer steps."""
    learning_rate: float = 1e-2
    """Adam's peak learning rate."""
    train_backbone: bool = False
    """Train the captioner's image backbone too; otherwise it is frozen as trained by phase `stem`. A pretrained
    backbone also needs model.captioner_backbone.trainable."""


@dataclass(frozen=True)
class AdversarialRecipe:
    """The generator against its discriminators: phases `glam` and `first_stage`."""

    steps: int = _harmless(700)
    """Optimizer steps of the generator; each discriminator takes one step per generator step."""
    batch_size: int = 32
    """Images per step over all processes."""
    accumulate: int = 1
    """Gradient accumulation: parts into which each process divides its share of a batch, to save memory."""
    generator_learning_rate: float = 2e-4
    """Adam's learning rate for generator and conditioning."""
    discriminator_learning_rate: float = 2e-4
    """Adam's learning rate for each discriminator; a larger one than the generator's is known as TTUR."""
    max_grad_norm: float | None = None
    """Gradients of each network are clipped to this norm; None does not clip."""
    redescription_weight: float | None = 20.0
    """lambda, the weight of the redescription loss (20 in the paper, for a sum over words); 0 turns redescription off,
    None requires `redescription_ratio`."""
    redescription_ratio: float | None = None
    """Instead of a weight: gradient norm of the redescription loss at each finest image, as a fraction of the
    adversarial gradient's norm; see `balance_gradients`."""
    redescription_reduction: Literal["word", "sentence"] = "word"
    """Mean over words, or sum over each caption's words."""
    matching_weight: float = 0.0
    """Weight of the matching loss of the finest images by the frozen encoders of phase `stem` (AttnGAN); 0 turns it
    off. Temperature and weight of its word-region terms are those of phase `stem`."""
    matching_ratio: float | None = None
    """Instead of a weight: gradient norm of the matching loss, as `redescription_ratio`."""
    diversity_ratio: float | None = None
    """Ratio of the mode-seeking loss, which a fourth of the captions gets a second image for; see
    `redescription_ratio`. None leaves it out."""
    diversity_target: float = 0.25
    """Distance of two images of a caption, as a share of that of two captions, from which on they are diverse."""
    kl_weight: float = 1.0
    """Weight of the KL divergence of the conditions from a standard normal."""
    mismatched_pairs: bool = True
    """Also train the discriminators on real images with other images' sentences."""
    interpolation_weight: float = 0.0
    """Weight of the adversarial loss of images of mixtures of two sentences (GAN-INT-CLS), for systems that read no
    words; 0 turns it off. 1/2 is the published code's, 1 the paper's."""
    color_weight: float = 0.0
    """Weight of the differences between the colors of consecutive stages (StackGAN++); 0 turns them off."""
    adversarial_weighting: Literal["paper", "release", "gan-int-cls", "stackgan++"] | None = None
    """Weights of the adversarial terms, see `discriminator_loss`; None takes those of the system, for MirrorGAN those
    of the paper."""
    adversarial_objective: Literal["logistic", "hinge"] = "logistic"
    """Binary cross entropy as in the paper, or the hinge loss."""
    r1_weight: float = 0.0
    """Weight of the R1 penalty, half the squared gradient of the logits at real images; 0 turns it off."""
    r1_every: int = 16
    """Lazy regularization: the R1 penalty is computed every `r1_every` steps, with `r1_every` times its weight."""
    coarse_steps: int = 0
    """First steps, at most three quarters of all, in which the coarser stages train alone in a fraction of the time,
    before the finest one joins them (progressive growing)."""
    average_decay: float = 0.999
    """Decay of the generator's moving average, approached from 0.1 in the first steps."""
    keep_best: Literal["r_precision", "redescription"] | None = None
    """Validation metric that selects the best step; None uses the last step."""

    def __post_init__(self) -> None:
        owner = "AdversarialRecipe"
        check_positive(
            owner, steps=self.steps, batch_size=self.batch_size, accumulate=self.accumulate, r1_every=self.r1_every
        )
        _check_above_zero(
            owner,
            self,
            "generator_learning_rate",
            "discriminator_learning_rate",
            "max_grad_norm",
            "redescription_ratio",
            "matching_ratio",
            "diversity_ratio",
        )
        weights = ("redescription_weight", "matching_weight", "interpolation_weight", "color_weight", "kl_weight")
        _check_not_negative(owner, self, *weights, "r1_weight", "average_decay", "coarse_steps", "diversity_target")
        if self.diversity_ratio is None:
            _check_has_effect(owner, self, "diversity_target", "diversity_ratio=None")
        elif self.interpolation_weight > 0:
            raise ValueError(
                f"{owner}: diversity_ratio={self.diversity_ratio:g} and interpolation_weight="
                f"{self.interpolation_weight:g} both generate further images in a step; use one of them."
            )
        weight, ratio = self.redescription_weight, self.redescription_ratio
        if weight is not None and ratio is not None:
            raise ValueError(
                f"{owner}: redescription_weight={weight:g} and redescription_ratio={ratio:g} are both given, but they "
                "are alternatives; set one of them to None (null in JSON)."
            )
        if weight is None and ratio is None:
            raise ValueError(
                f"{owner}: redescription_weight and redescription_ratio are both None; give one of them a number, or "
                "redescription_weight=0 to turn redescription off."
            )
        if weight == 0:
            _check_has_effect(owner, self, "redescription_reduction", "redescription_weight=0")
        if self.matching_ratio is not None and self.matching_weight != 0:
            raise ValueError(
                f"{owner}: matching_weight={self.matching_weight:g} and matching_ratio={self.matching_ratio:g} are "
                "both given, but they are alternatives; leave one of them out."
            )
        if self.r1_weight == 0:
            _check_has_effect(owner, self, "r1_every", "r1_weight=0")
        if self.average_decay >= 1:
            raise ValueError(f"{owner}: average_decay must be below 1, but it is {self.average_decay!r}.")
        if self.adversarial_weighting in NEED_MISMATCHED and not self.mismatched_pairs:
            raise ValueError(
                f"{owner}: adversarial_weighting={self.adversarial_weighting!r} averages over mismatched pairs too; "
                "set mismatched_pairs=True."
            )
        if self.interpolation_weight > 0 and self.batch_size // self.accumulate < 2:
            raise ValueError(
                f"{owner}: interpolation_weight mixes the sentences of two images, but batch_size={self.batch_size} "
                f"leaves one image per part with accumulate={self.accumulate}; lower accumulate."
            )

    @property
    def has_matching(self) -> bool:
        """Whether the generator is trained with the matching loss."""
        return self.matching_weight > 0 or self.matching_ratio is not None


PhaseRecipe = MatchingRecipe | PretrainingRecipe | AdversarialRecipe


@dataclass(frozen=True)
class EvaluationRecipe:
    """Evaluation at the end of a run."""

    candidates: int = 100
    """Candidate captions per image for R-precision, its own included; at most as many as there are unseen validation
    captions."""
    report_images: int = 24
    """Captions shown in the report."""

    def __post_init__(self) -> None:
        check_positive("EvaluationRecipe", candidates=self.candidates, report_images=self.report_images)
        if self.candidates < 2:
            raise ValueError(f"EvaluationRecipe: candidates must be at least 2, but it is {self.candidates}.")


@dataclass(frozen=True)
class EngineRecipe:
    """Precision, layout, data loading and checkpoints."""

    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of convolutions and matrix products, by autocast; weights, statistics and losses stay in float32."""
    channels_last: bool = True
    """Channels-last memory format: faster on CPUs, and on GPUs with tensor cores."""
    compile: bool = False
    """Compile generator and discriminators with torch.compile; needs a C++ compiler, or Triton on a GPU."""
    deterministic: bool = False
    """Raise an error in operations that are not deterministic; on a CPU, all operations used here are."""
    synchronize_batch_norm: bool = False
    """Compute batch-norm statistics over the images of all processes instead of each process by itself."""
    threads: int | None = _harmless(None)
    """Threads of each process on the CPU; None takes torch's default."""
    loader_workers: int = _harmless(0)
    """Processes that load batches; 0 loads them in the training process."""
    cached_features_mib: int = 1024
    """Features of frozen encoders are computed once per caption or image and cached if they fit into this many MiB:
    those of captions in memory, those of images in files of the run's folder."""
    features_folder: str | None = _harmless(None)
    """Folder of the files of cached features, which runs with the same images and backbones can share; None keeps them
    in the run's folder until the phases that read them are trained."""
    cached_crops: int = 4
    """With random crops, features of frozen encoders are cached for this many fixed crops of each image and their
    mirror images, instead of a new crop in each step."""
    max_skipped_steps: int = 20
    """Stop after this many consecutive non-finite steps; shorter streaks are skipped and counted."""
    checkpoint_every: int = _harmless(250)
    """Steps between two checkpoints."""
    checkpoints_kept: int = _harmless(2)
    """Newest checkpoints kept per phase, in addition to the best one."""

    def __post_init__(self) -> None:
        check_positive(
            "EngineRecipe",
            max_skipped_steps=self.max_skipped_steps,
            checkpoint_every=self.checkpoint_every,
            checkpoints_kept=self.checkpoints_kept,
            cached_crops=self.cached_crops,
            **({} if self.threads is None else {"threads": self.threads}),
        )
        _check_not_negative("EngineRecipe", self, "loader_workers", "cached_features_mib")


@dataclass(frozen=True)
class LoggingRecipe:
    """Logging during training."""

    every: int = _harmless(10)
    """Steps between two lines of metrics.jsonl."""
    summary_minutes: float = _harmless(5.0)
    """Minutes between two printed lines if the output is not a terminal; terminals get a progress bar instead."""
    samples_every: int = _harmless(250)
    """Steps of phase `glam` between two sheets of samples, of fixed captions and noise; 0 writes none."""
    validate_every: int = _harmless(0)
    """Steps between two validations; 0 validates only where `keep_best` needs it, with each checkpoint."""
    tensorboard: bool = _harmless(False)
    """Also write TensorBoard events, into the folder `tensorboard` of the run."""

    def __post_init__(self) -> None:
        check_positive("LoggingRecipe", every=self.every)
        _check_above_zero("LoggingRecipe", self, "summary_minutes")
        _check_not_negative("LoggingRecipe", self, "samples_every", "validate_every")


@dataclass(frozen=True)
class Recipe:
    """Data, model, phases and settings of a run.

    Examples:
        >>> from dataclasses import replace
        >>> from mirror_modules.training import Recipe, get_recipe
        >>> recipe = get_recipe("demo")
        >>> recipe.model.resolutions, recipe.glam.redescription_ratio
        ((16, 32, 64), 1.0)
        >>> longer = replace(recipe, glam=replace(recipe.glam, steps=5000))
        >>> Recipe.from_dict(longer.to_dict()) == longer
        True
    """

    name: str
    """The recipe's name."""
    seed: int = 0
    """Seed of every random draw of the run."""
    data: DataRecipe = field(default_factory=DataRecipe)
    """The captioned images."""
    model: ModelConfig = field(default_factory=MirrorGANConfig)
    """Sizes and options of the model; the type determines the system."""
    pretraining: PretrainingRecipe | None = None
    """Phase `pretraining`: trains model.image_backbone, which phase `stem` then freezes, with a captioner; None leaves
    it out."""
    stem: MatchingRecipe = field(default_factory=MatchingRecipe)
    """Phase `stem`: text and image encoder."""
    stream: CaptionerRecipe = field(default_factory=CaptionerRecipe)
    """Phase `stream`: the captioner."""
    glam: AdversarialRecipe = field(default_factory=AdversarialRecipe)
    """Phase `glam`: the generator."""
    first_stage: AdversarialRecipe | None = None
    """Phase `first_stage`, before `glam`: the first stage of StackGAN, which phase `glam` freezes; None for others."""
    evaluator_pretraining: PretrainingRecipe | None = None
    """Phase `evaluator_pretraining`: the same for the backbone of phase `evaluator`, with its own seed."""
    evaluator: EvaluatorRecipe = field(default_factory=EvaluatorRecipe)
    """Phase `evaluator`: the encoder pair for evaluation, which no other phase uses."""
    second_evaluator: EvaluatorRecipe | None = field(default=None, metadata={"harmless": True})
    """Phase `second_evaluator`: another encoder pair for evaluation, of another backbone; None leaves it out."""
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)
    """Evaluation at the end of a run."""
    engine: EngineRecipe = field(default_factory=EngineRecipe)
    """Precision, layout, data loading and checkpoints."""
    logging: LoggingRecipe = field(default_factory=LoggingRecipe)
    """Logging during training."""

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"Recipe: seed must be a whole number from 0 to 2**32 - 1, but it is {self.seed!r}.")
        if self.stream.train_backbone and not self.model.captioner_backbone.is_trainable:
            raise ValueError(
                "Recipe: stream.train_backbone has no effect on a backbone that is frozen because it has pretrained "
                "weights; set model.captioner_backbone.trainable, or turn stream.train_backbone off."
            )
        for phase, before in PRETRAINING.items():
            if getattr(self, before) is not None and not self.backbone(phase).is_trainable:
                raise ValueError(
                    f"Recipe: phase {before!r} trains the backbone of phase {phase!r} from scratch, but it is frozen: "
                    f"{self.backbone(phase)}; leave {before} out, or choose a backbone without weights."
                )
        for name, condition in self.model.without_effect():
            _check_has_effect("Recipe: model", self.model, name, condition)
        required = self.model.adversarial_phases
        if (FIRST_STAGE in required) != (self.first_stage is not None):
            change = "give it one" if FIRST_STAGE in required else "leave first_stage out"
            raise ValueError(
                f"Recipe: the generator of the system {self.model.system!r} is trained in {' and '.join(required)}, "
                f"but first_stage is {self.first_stage!r}; {change}."
            )
        for phase in required:
            self._check_adversarial(phase)

    def _check_adversarial(self, phase: str) -> None:
        """Require options that fit the system and the engine."""
        recipe = self.adversarial(phase)
        if self.engine.compile and recipe.r1_weight > 0:
            raise ValueError(
                f"Recipe: {phase}.r1_weight needs second derivatives, which torch.compile does not support; set it to "
                "0, or turn engine.compile off."
            )
        weighting = self.model.weighting(phase)
        if recipe.adversarial_weighting is None and weighting in NEED_MISMATCHED and not recipe.mismatched_pairs:
            raise ValueError(
                f"Recipe: the adversarial weights {weighting!r} of the system {self.model.system!r} average over "
                f"mismatched pairs too; set {phase}.mismatched_pairs=True, or another {phase}.adversarial_weighting."
            )
        if self.model.attends and recipe.interpolation_weight > 0:
            raise ValueError(
                f"Recipe: {phase}.interpolation_weight mixes sentences, but the system {self.model.system!r} reads "
                "words too, which cannot be mixed; set it to 0."
            )
        if recipe.coarse_steps > 0 and len(self.model.trained_resolutions(phase)) < 2:
            raise ValueError(
                f"Recipe: {phase}.coarse_steps trains all stages but the finest, but this phase trains one; set it to "
                "0."
            )
        if recipe.color_weight > 0 and len(self.model.trained_resolutions(phase)) < 2:
            raise ValueError(
                f"Recipe: {phase}.color_weight compares the stages of the generator, but this phase trains one; set it "
                "to 0."
            )

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases of this recipe, in order: `PHASES`, and those of the others that are not None."""
        before, before_evaluator = PRETRAINING["stem"], PRETRAINING["evaluator"]
        order = (before, "stem", "stream", FIRST_STAGE, "glam", before_evaluator, "evaluator", SECOND_EVALUATOR)
        return tuple(phase for phase in order if getattr(self, phase) is not None)

    def phase(self, name: str) -> PhaseRecipe:
        """The fields of one of `phases`.

        Raises:
            ValueError: The recipe has no such phase.
        """
        fields: PhaseRecipe | None = getattr(self, name, None) if name in ALL_PHASES else None
        if fields is None:
            raise ValueError(f"Recipe: {self.name!r} has no phase {name!r}; it has {', '.join(self.phases)}.")
        return fields

    def adversarial(self, phase: str) -> AdversarialRecipe:
        """The fields of one of `ADVERSARIAL_PHASES`.

        Raises:
            ValueError: The recipe has no such phase.
        """
        fields = self.phase(phase)
        if not isinstance(fields, AdversarialRecipe):
            raise ValueError(f"Recipe: phase {phase!r} trains no generator; {' and '.join(ADVERSARIAL_PHASES)} do.")
        return fields

    def backbone(self, phase: str) -> BackboneConfig:
        """The image backbone of a phase other than `ADVERSARIAL_PHASES`."""
        section, name = _place(self, phase)
        found: BackboneConfig = getattr(getattr(self, section), name)
        return found

    def recorded(self, phases: Sequence[str], before: Recipe | None = None) -> Recipe:
        """A copy with the checksums of the pretrained weights of some phases, which are loaded for it.

        Args:
            phases: Phases other than `ADVERSARIAL_PHASES`.
            before: Recipe of the same run from which the other checksums are taken.

        Raises:
            ValueError: Weights do not fit, or have another checksum than the one given.
            FileNotFoundError: A file of weights does not exist.
            ImportError: A package is not installed.
        """
        loaded = {_place(self, phase) for phase in phases}

        def record(place: tuple[str, str]) -> BackboneConfig | None:
            found: BackboneConfig | None = getattr(getattr(self, place[0]), place[1], None)
            if found is None or found.weights is None:
                return found
            if place in loaded:
                return found.recorded()
            known = None if before is None else getattr(getattr(before, place[0]), place[1], None)
            if known is None or found.sha256 is not None:
                return found
            return dataclasses.replace(found, sha256=known.sha256)

        changes: dict[str, Any] = {}
        for section in ("model", "evaluator", SECOND_EVALUATOR):
            names = ("image_backbone", "captioner_backbone") if section == "model" else ("backbone",)
            if getattr(self, section) is not None:
                fields = {name: record((section, name)) for name in names}
                changes[section] = dataclasses.replace(getattr(self, section), **fields)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {**dataclasses.asdict(self), "model": {"system": self.model.system, **self.model.to_dict()}}

    @classmethod
    def from_dict(cls, fields: dict[str, Any], base: Recipe | None = None) -> Recipe:
        """Build from the fields of `to_dict`, or from some of them.

        Args:
            fields: Names and values, nested as in `to_dict`.
            base: Recipe that provides the other fields; None takes each field's default.

        Raises:
            ValueError: A field is unknown, of another type, or out of its range.
        """
        if base is None and not (isinstance(fields, dict) and isinstance(fields.get("name"), str)):
            raise ValueError("Recipe: the field 'name' is missing; expected the fields of a recipe.")
        base = cls(name=fields["name"]) if base is None else base
        return override(base, _with_system(fields, base.model) if isinstance(fields, dict) else fields)


def _with_system(fields: dict[str, Any], base: ModelConfig) -> dict[str, Any]:
    """The fields with a configuration in place of that of a model of another system than that of `base`.

    Sizes that all systems have are kept where `fields` does not change them.
    """
    model = fields.get("model")
    if not isinstance(model, dict) or "system" not in model:
        return fields
    given = {name: value for name, value in model.items() if name != "system"}
    if model["system"] == base.system:
        return {**fields, "model": given}
    try:
        config = get_system(str(model["system"])).config_type()
    except ValueError as error:
        raise ValueError(f"Recipe: model.system: {error}") from error
    shared = {each.name: getattr(base, each.name) for each in dataclasses.fields(ModelConfig)}
    return {**fields, "model": override(config, {**shared, **given}, "model.")}


def differences(old: Recipe, new: Recipe) -> Iterator[tuple[str, bool]]:
    """Describe each difference between two recipes, with whether it is allowed when a run is resumed."""
    keeps_best = any(new.phase(phase).keep_best is not None for phase in new.phases)
    for words, harmless in changed_fields(old, new):
        # The best step is selected among those with a checkpoint.
        yield words, harmless and not (keeps_best and words.startswith("engine.checkpoint_every "))


def _place(recipe: Recipe, phase: str) -> tuple[str, str]:
    """Section and field of the backbone of a phase."""
    if phase == "stream":
        return "model", "captioner_backbone"
    phase = next((name for name, before in PRETRAINING.items() if before == phase), phase)
    own = getattr(recipe.phase(phase), "backbone", None)
    return ("model", "image_backbone") if own is None else (phase, "backbone")


def _check_has_effect(owner: str, record: Any, name: str, condition: str) -> None:
    """Require the default of a field that is not read under a condition."""
    default = next(each.default for each in dataclasses.fields(record) if each.name == name)
    value = getattr(record, name)
    if value != default:
        raise ValueError(
            f"{owner}: {name}={value!r} has no effect with {condition}; leave {name} at {default!r}, or change the "
            "latter."
        )


def _check_above_zero(owner: str, record: Any, *names: str) -> None:
    for name in names:
        value = getattr(record, name)
        if value is None:
            continue
        check_number(owner, **{name: value})
        if value <= 0:
            raise ValueError(f"{owner}: {name} must be above 0, but it is {value!r}.")


def _check_not_negative(owner: str, record: Any, *names: str) -> None:
    for name in names:
        value = getattr(record, name)
        if value is None:
            continue
        check_number(owner, **{name: value})
        if value < 0:
            raise ValueError(f"{owner}: {name} must be 0 or more, but it is {value!r}.")
