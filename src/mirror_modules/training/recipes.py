"""Recipes: everything that decides how a run comes out, as frozen records. A recipe is a function that returns one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

from mirror_modules._checks import check_positive
from mirror_modules.models import MirrorGANConfig

PHASES = ("stem", "stream", "glam", "judge")
"""The phases of a run, in order."""


@dataclass(frozen=True)
class DataRecipe:
    """The captioned images."""

    source: Literal["synthetic-flowers", "oxford-flowers"] = "synthetic-flowers"
    """Embedded synthetic flowers, or the Oxford-102 photographs in the folder `path`."""
    path: str | None = None
    """Folder of the photographs; not used for synthetic flowers."""
    training_images: int | None = 4096
    """Images of the training split; None takes all that there are."""
    validation_images: int | None = 1000
    """Images of the validation split; None takes all that there are."""
    min_count: int = 1
    """Words that are rarer in the training captions are read as unknown."""
    augment: bool = False
    """Random crops and mirror images in training."""

    def __post_init__(self) -> None:
        limits = {"training_images": self.training_images, "validation_images": self.validation_images}
        given = {name: limit for name, limit in limits.items() if limit is not None}
        check_positive("DataRecipe", min_count=self.min_count, **given)


@dataclass(frozen=True)
class MatchingRecipe:
    """Text and image encoder by the matching loss: phase `stem`, and the judge."""

    steps: int = 400
    """Optimizer steps."""
    batch_size: int = 96
    """Images per step; a large batch matters here, because the other captions are the negatives."""
    learning_rate: float = 4e-3
    """Adam's peak step size."""
    gamma_loss: float = 20.0
    """Sharpness of the cross entropy; 10 in the published code, too soft for short runs."""
    word_weight: float = 0.3
    """Weight of matching words with regions, beside that of the sentence with the image; 0 leaves it out."""
    word_pairs: int = 48
    """Pairs of each batch whose words are matched with regions, which costs the square of their number."""

    def __post_init__(self) -> None:
        check_positive("MatchingRecipe", steps=self.steps, batch_size=self.batch_size, word_pairs=self.word_pairs)


@dataclass(frozen=True)
class CaptionerRecipe:
    """The captioner on real pairs: phase `stream`."""

    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 64
    """Images per step."""
    learning_rate: float = 1e-2
    """Adam's peak step size."""
    train_backbone: bool = False
    """Train the captioner's image backbone too; otherwise it stays as phase `stem` left it."""

    def __post_init__(self) -> None:
        check_positive("CaptionerRecipe", steps=self.steps, batch_size=self.batch_size)


@dataclass(frozen=True)
class AdversarialRecipe:
    """The generator against its discriminators: phase `glam`."""

    steps: int = 700
    """Optimizer steps of the generator, one of each discriminator with each."""
    batch_size: int = 32
    """Images per step."""
    generator_learning_rate: float = 2e-4
    """Adam's step size for generator and conditioning."""
    discriminator_learning_rate: float = 2e-4
    """Adam's step size for each discriminator."""
    redescription_weight: float = 20.0
    """lambda, the weight of the redescription loss (20 in the paper, for a sum); 0 leaves the captioner out."""
    redescription_reduction: Literal["word", "sentence"] = "word"
    """Mean over words, or sum over each caption's words."""
    kl_weight: float = 1.0
    """Weight of the divergence of the conditions from a standard normal."""
    mismatched_pairs: bool = True
    """Show discriminators real images with other images' sentences."""
    adversarial_weighting: Literal["paper", "release"] = "paper"
    """Weights of the adversarial terms: the paper's, or the published code's."""
    average_decay: float = 0.999
    """Decay of the generator's moving average, reached gradually."""

    def __post_init__(self) -> None:
        check_positive("AdversarialRecipe", steps=self.steps, batch_size=self.batch_size)
        if self.adversarial_weighting == "release" and not self.mismatched_pairs:
            raise ValueError(
                "AdversarialRecipe: adversarial_weighting='release' averages over mismatched pairs too; keep them."
            )


@dataclass(frozen=True)
class EvaluationRecipe:
    """What is measured in the end."""

    candidates: int = 100
    """Captions that each image ranks for R-precision, its own included."""
    report_images: int = 24
    """Captions shown in the report."""

    def __post_init__(self) -> None:
        check_positive("EvaluationRecipe", candidates=self.candidates, report_images=self.report_images)


@dataclass(frozen=True)
class Recipe:
    """A whole run."""

    name: str
    """The recipe's name."""
    seed: int = 0
    """Decides every random draw of the run."""
    data: DataRecipe = field(default_factory=DataRecipe)
    """The captioned images."""
    model: MirrorGANConfig = field(default_factory=MirrorGANConfig)
    """Sizes and choices of the model."""
    stem: MatchingRecipe = field(default_factory=MatchingRecipe)
    """Phase `stem`: text and image encoder."""
    stream: CaptionerRecipe = field(default_factory=CaptionerRecipe)
    """Phase `stream`: the captioner."""
    glam: AdversarialRecipe = field(default_factory=AdversarialRecipe)
    """Phase `glam`: the generator."""
    judge: MatchingRecipe = field(default_factory=lambda: MatchingRecipe(word_weight=0.0))
    """Phase `judge`: the encoder pair that evaluates and that no training uses."""
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)
    """What is measured in the end."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""

    def __post_init__(self) -> None:
        check_positive("Recipe", log_every=self.log_every)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {**dataclasses.asdict(self), "model": self.model.to_dict()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Recipe:
        """Build from the fields of `to_dict`.

        Raises:
            ValueError: A field is unknown or missing, or a number is out of its range.
        """
        parts = {
            "data": DataRecipe,
            "stem": MatchingRecipe,
            "stream": CaptionerRecipe,
            "glam": AdversarialRecipe,
            "judge": MatchingRecipe,
            "evaluation": EvaluationRecipe,
        }
        try:
            nested = {name: part(**fields[name]) for name, part in parts.items()}
            return cls(**{**fields, **nested, "model": MirrorGANConfig.from_dict(fields["model"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"Recipe: a field is missing or unknown ({error}).") from error


def demo() -> Recipe:
    """Synthetic flowers at 64 pixels in minutes on two CPU cores."""
    return Recipe(
        name="demo",
        model=MirrorGANConfig(
            embedding_dim=64,
            word_dim=128,
            text_dropout=0.1,
            noise_dim=32,
            condition_dim=64,
            channels=16,
            resolutions=(16, 32, 64),
            residual_blocks=1,
            discriminator_channels=24,
            image_backbone="conv",
            captioner_backbone="conv",
            captioner_projection=True,
            captioner_embedding_dim=192,
            captioner_hidden_dim=192,
        ),
        glam=AdversarialRecipe(
            steps=1600,
            batch_size=16,
            generator_learning_rate=1e-3,
            discriminator_learning_rate=5e-4,
            redescription_weight=1.0,
            kl_weight=0.1,
            average_decay=0.99,
        ),
    )


def flowers_64() -> Recipe:
    """The Oxford-102 photographs at 64 pixels, in about an hour on two CPU cores."""
    base = demo()
    return dataclasses.replace(
        base,
        name="flowers-64",
        data=DataRecipe(
            source="oxford-flowers", training_images=None, validation_images=None, min_count=5, augment=True
        ),
        model=dataclasses.replace(
            base.model,
            text_dropout=0.5,
            discriminator_channels=32,
            captioner_projection=False,
            captioner_embedding_dim=128,
            captioner_hidden_dim=128,
        ),
        stem=MatchingRecipe(steps=600, batch_size=64, learning_rate=2e-3, word_pairs=64),
        stream=CaptionerRecipe(steps=600, learning_rate=5e-3),
        glam=AdversarialRecipe(
            steps=2400,
            generator_learning_rate=5e-4,
            discriminator_learning_rate=4e-4,
            redescription_weight=1.0,
            average_decay=0.998,
        ),
        judge=MatchingRecipe(steps=600, learning_rate=2e-3, word_weight=0.0),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {"demo": demo, "flowers-64": flowers_64}


def get_recipe(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        ValueError: There is none.
    """
    if name not in RECIPES:
        close = get_close_matches(name, RECIPES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown recipe {name!r}; there are {', '.join(RECIPES)}.{hint}")
    return RECIPES[name]()
