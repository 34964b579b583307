"""The phases of a recipe: their names and order, and how each trains its networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mirror_modules._checks import check_positive
from mirror_modules.models import BackboneConfig
from mirror_modules.training.recipes.fields import check_above_zero, check_has_effect, check_not_negative, harmless

PHASES = ("stem", "stream", "glam", "evaluator")
"""The phases that every run has, in order."""
SECOND_EVALUATOR, FIRST_STAGE, KEYPOINTS = "second_evaluator", "first_stage", "keypoints"
PRETRAINING = {"stem": "pretraining", "evaluator": "evaluator_pretraining"}
"""The phases that can train the image backbone of a phase before it."""
# Random streams depend on the position of a phase in this tuple.
ALL_PHASES = (*PHASES, SECOND_EVALUATOR, FIRST_STAGE, *PRETRAINING.values(), KEYPOINTS)
"""The phases that a run can have; `Recipe.phases` are those of a recipe, in order."""
ADVERSARIAL_PHASES = (FIRST_STAGE, "glam")
"""The phases that train a generator of images against discriminators, in order."""
WITHOUT_BACKBONE = (*ADVERSARIAL_PHASES, KEYPOINTS)
"""The phases that encode no image."""

NEED_MISMATCHED = ("release", "gan-int-cls")
"""Weightings in which terms of real and generated pairs are smaller because there are mismatched pairs."""
SHARE_OF_PAIRS = 4
"""With a loss of diversity, one caption of so many gets a second image."""


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
        check_above_zero("MatchingRecipe", self, "learning_rate", "gamma_loss", "max_grad_norm")
        check_not_negative("MatchingRecipe", self, "word_weight")
        if self.word_weight == 0:
            check_has_effect("MatchingRecipe", self, "word_pairs", "word_weight=0")


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
        check_above_zero(owner, self, "learning_rate", "max_grad_norm")


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

    steps: int = harmless(700)
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
    fine_ratios: float = 1.0
    """Factor of the ratios above in all steps after the `coarse_steps`. What the captions name is learned in coarse
    stages, by strong gradients of the frozen networks; on fine details, the same gradients are noise."""
    average_decay: float = 0.999
    """Decay of the generator's moving average, approached from 0.1 in the first steps."""
    keep_best: Literal["r_precision", "redescription"] | None = None
    """Validation metric that selects the best step; None uses the last step."""

    def __post_init__(self) -> None:
        owner = "AdversarialRecipe"
        check_positive(
            owner, steps=self.steps, batch_size=self.batch_size, accumulate=self.accumulate, r1_every=self.r1_every
        )
        check_above_zero(
            owner,
            self,
            "generator_learning_rate",
            "discriminator_learning_rate",
            "max_grad_norm",
            "redescription_ratio",
            "matching_ratio",
            "diversity_ratio",
            "fine_ratios",
        )
        weights = ("redescription_weight", "matching_weight", "interpolation_weight", "color_weight", "kl_weight")
        check_not_negative(owner, self, *weights, "r1_weight", "average_decay", "coarse_steps", "diversity_target")
        rows = self.batch_size // self.accumulate
        if self.diversity_ratio is None:
            check_has_effect(owner, self, "diversity_target", "diversity_ratio=None")
        elif self.interpolation_weight > 0:
            raise ValueError(
                f"{owner}: diversity_ratio={self.diversity_ratio:g} and interpolation_weight="
                f"{self.interpolation_weight:g} both generate further images in a step; use one of them."
            )
        elif rows < SHARE_OF_PAIRS:
            raise ValueError(
                f"{owner}: diversity_ratio gives one of {SHARE_OF_PAIRS} captions a second image, but batch_size="
                f"{self.batch_size} leaves {rows} per part with accumulate={self.accumulate}; use a larger batch, or "
                "lower accumulate."
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
            check_has_effect(owner, self, "redescription_reduction", "redescription_weight=0")
        if self.matching_ratio is not None and self.matching_weight != 0:
            raise ValueError(
                f"{owner}: matching_weight={self.matching_weight:g} and matching_ratio={self.matching_ratio:g} are "
                "both given, but they are alternatives; leave one of them out."
            )
        if not any(self.ratios):
            check_has_effect(owner, self, "fine_ratios", "none of redescription, matching and diversity has a ratio")
        if self.r1_weight == 0:
            check_has_effect(owner, self, "r1_every", "r1_weight=0")
        if self.average_decay >= 1:
            raise ValueError(f"{owner}: average_decay must be below 1, but it is {self.average_decay!r}.")
        if self.adversarial_weighting in NEED_MISMATCHED and not self.mismatched_pairs:
            raise ValueError(
                f"{owner}: adversarial_weighting={self.adversarial_weighting!r} averages over mismatched pairs too; "
                "set mismatched_pairs=True."
            )
        if self.interpolation_weight > 0 and rows < 2:
            raise ValueError(
                f"{owner}: interpolation_weight mixes the sentences of two images, but batch_size={self.batch_size} "
                f"leaves one image per part with accumulate={self.accumulate}; lower accumulate."
            )

    @property
    def effective_coarse_steps(self) -> int:
        """`coarse_steps`, or three quarters of all steps if those are fewer."""
        return min(self.coarse_steps, 3 * self.steps // 4)

    @property
    def has_matching(self) -> bool:
        """Whether the generator is trained with the matching loss."""
        return self.matching_weight > 0 or self.matching_ratio is not None

    @property
    def ratios(self) -> tuple[float | None, float | None, float | None]:
        """Gradient ratios of redescription, matching and diversity; None for those without one."""
        return self.redescription_ratio, self.matching_ratio, self.diversity_ratio


@dataclass(frozen=True)
class KeypointRecipe:
    """The generator of missing key points against its discriminator (GAWWN, Sec. 4.3): phase `keypoints`."""

    # No metric selects a step.
    keep_best = None

    steps: int = harmless(3000)
    """Optimizer steps of each of both networks."""
    batch_size: int = 64
    """Images per step over all processes, of which the key points are read."""
    generator_learning_rate: float = 2e-4
    """Adam's learning rate for the generator."""
    discriminator_learning_rate: float = 2e-4
    """Adam's learning rate for the discriminator."""

    def __post_init__(self) -> None:
        owner = "KeypointRecipe"
        check_positive(owner, steps=self.steps, batch_size=self.batch_size)
        check_above_zero(owner, self, "generator_learning_rate", "discriminator_learning_rate")


PhaseRecipe = MatchingRecipe | PretrainingRecipe | AdversarialRecipe | KeypointRecipe
