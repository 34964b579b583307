"""Recipes: everything that decides how a run comes out, as frozen records. A recipe is a function that returns one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mirror_modules._checks import check_number, check_positive
from mirror_modules.models import MirrorGANConfig
from mirror_modules.models.pretrained import read_json

PHASES = ("stem", "stream", "glam", "judge")
"""The phases of a run, in order."""


def _harmless(default: Any) -> Any:
    """A field that may differ when a run is resumed: it decides what is seen of a run, or how long it is."""
    return field(default=default, metadata={"harmless": True})


@dataclass(frozen=True)
class DataRecipe:
    """The captioned images."""

    source: Literal[
        "synthetic-flowers", "oxford-flowers", "birds", "coco", "folder", "webdataset", "prepared", "auto"
    ] = "synthetic-flowers"
    """Embedded synthetic flowers, or the format of the folder `path`, which auto recognizes; prepared is the cache that
    `mirror-modules data prepare` writes."""
    path: str | None = _harmless(None)
    """Folder of the photographs; not used for synthetic flowers."""
    training_images: int | None = 4096
    """Images of the training split; None takes all that there are."""
    validation_images: int | None = 1000
    """Images of the validation split; None takes all that there are."""
    min_count: int = 1
    """Words that are rarer in the training captions are read as unknown."""
    augment: bool = False
    """Random crops and mirror images in training; a caption that says left or right keeps its image unmirrored."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a damaged file does: end the run, or be left out and listed, as long as at most 5 % are."""
    long_captions: Literal["cut", "subsample"] = "cut"
    """What training reads of captions longer than the model's max_words: their first words, or random ones in order."""

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
    """Images per step, of all processes together; the other captions of a batch are the negatives."""
    learning_rate: float = 4e-3
    """Adam's peak step size."""
    largest_gradient_norm: float | None = 1.0
    """Longer gradients are shortened to this; None leaves them."""
    gamma_loss: float = 20.0
    """Sharpness of the cross entropy; 10 in the published code, too soft for short runs."""
    word_weight: float = 0.3
    """Weight of matching words with regions, beside that of the sentence with the image; 0 leaves it out."""
    word_pairs: int = 48
    """Pairs of each batch whose words are matched with regions, which costs the square of their number."""
    keep_best: Literal["r_precision"] | None = None
    """Figure on the validation images by which the best step is kept and used; None uses the last step."""

    def __post_init__(self) -> None:
        check_positive("MatchingRecipe", steps=self.steps, batch_size=self.batch_size, word_pairs=self.word_pairs)
        _check_above_zero("MatchingRecipe", self, "learning_rate", "gamma_loss", "largest_gradient_norm")
        _check_not_negative("MatchingRecipe", self, "word_weight")


@dataclass(frozen=True)
class CaptionerRecipe:
    """The captioner on real pairs: phase `stream`."""

    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 64
    """Images per step, of all processes together."""
    accumulate: int = 1
    """Parts in which each process takes its share of a batch, one after the other, to save memory."""
    learning_rate: float = 1e-2
    """Adam's peak step size."""
    largest_gradient_norm: float | None = 1.0
    """Longer gradients are shortened to this; None leaves them."""
    train_backbone: bool = False
    """Train the captioner's image backbone too; otherwise it stays as phase `stem` left it."""
    keep_best: Literal["cross_entropy", "word_accuracy"] | None = None
    """Figure on the validation images by which the best step is kept and used; None uses the last step."""

    def __post_init__(self) -> None:
        check_positive("CaptionerRecipe", steps=self.steps, batch_size=self.batch_size, accumulate=self.accumulate)
        _check_above_zero("CaptionerRecipe", self, "learning_rate", "largest_gradient_norm")


@dataclass(frozen=True)
class AdversarialRecipe:
    """The generator against its discriminators: phase `glam`."""

    steps: int = _harmless(700)
    """Optimizer steps of the generator, one of each discriminator with each."""
    batch_size: int = 32
    """Images per step, of all processes together."""
    accumulate: int = 1
    """Parts in which each process takes its share of a batch, one after the other, to save memory."""
    generator_learning_rate: float = 2e-4
    """Adam's step size for generator and conditioning."""
    discriminator_learning_rate: float = 2e-4
    """Adam's step size for each discriminator; larger than the generator's is known as TTUR."""
    largest_gradient_norm: float | None = None
    """Longer gradients of each network are shortened to this; None leaves them."""
    redescription_weight: float | None = 20.0
    """lambda, the weight of the redescription loss (20 in the paper, for a sum); 0 leaves the captioner out, None goes
    with a ratio."""
    redescription_ratio: float | None = None
    """In place of a weight: norm of the redescription loss's gradient at each finest image, as a share of the
    adversarial one's."""
    redescription_reduction: Literal["word", "sentence"] = "word"
    """Mean over words, or sum over each caption's words."""
    kl_weight: float = 1.0
    """Weight of the divergence of the conditions from a standard normal."""
    mismatched_pairs: bool = True
    """Show discriminators real images with other images' sentences."""
    adversarial_weighting: Literal["paper", "release"] = "paper"
    """Weights of the adversarial terms: the paper's, or the published code's."""
    adversarial_objective: Literal["logistic", "hinge"] = "logistic"
    """Logarithms of probabilities as in the paper, or the hinge loss."""
    r1_weight: float = 0.0
    """Weight of the R1 penalty, half the squared gradient of the verdicts at the real images; 0 leaves it out."""
    r1_every: int = 16
    """Steps between two R1 penalties, which count so many times as much."""
    average_decay: float = 0.999
    """Decay of the generator's moving average, reached gradually."""
    keep_best: Literal["r_precision", "redescription"] | None = None
    """Figure on the validation captions by which the best step is kept and used; None uses the last step."""

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
            "largest_gradient_norm",
            "redescription_ratio",
        )
        _check_not_negative(owner, self, "redescription_weight", "kl_weight", "r1_weight", "average_decay")
        weight, ratio = self.redescription_weight, self.redescription_ratio
        if weight is not None and ratio is not None:
            raise ValueError(
                f"{owner}: redescription_weight={weight:g} and redescription_ratio={ratio:g} are both given, but one "
                "stands in place of the other; set the other one to None (null in JSON)."
            )
        if weight is None and ratio is None:
            raise ValueError(
                f"{owner}: redescription_weight and redescription_ratio are both None; give one of them a number, or "
                "redescription_weight=0 to leave redescription out."
            )
        if self.average_decay >= 1:
            raise ValueError(f"{owner}: average_decay must be below 1, but it is {self.average_decay!r}.")
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
        if self.candidates < 2:
            raise ValueError(f"EvaluationRecipe: candidates must be at least 2, but it is {self.candidates}.")


@dataclass(frozen=True)
class EngineRecipe:
    """How it is computed."""

    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the large products, by autocast; weights, statistics and losses stay in float32."""
    channels_last: bool = True
    """Lay images and maps out channels last: faster on CPUs, and on GPUs with tensor cores."""
    compile: bool = False
    """Compile generator and discriminators by torch.compile; needs a C++ compiler, or Triton on a GPU."""
    deterministic: bool = False
    """Refuse operations that do not repeat bit for bit; on a CPU none of those used here differ."""
    synchronize_batch_norm: bool = False
    """Batch norm statistics over the images of all processes; otherwise over those of each process."""
    loader_workers: int = _harmless(0)
    """Processes that prepare batches beside the training; 0 prepares them in between."""
    cached_features_mib: int = 1024
    """Frozen encoders run once per caption or image, and not once per step, if their features fit into so many MiB."""
    most_skipped_in_a_row: int = 20
    """So many steps in a row whose loss or gradient is not finite stop the run; fewer are skipped and counted."""
    checkpoint_every: int = _harmless(250)
    """Steps between two checkpoints."""
    checkpoints_kept: int = _harmless(2)
    """Newest checkpoints kept of each phase, beside the best one."""

    def __post_init__(self) -> None:
        check_positive(
            "EngineRecipe",
            most_skipped_in_a_row=self.most_skipped_in_a_row,
            checkpoint_every=self.checkpoint_every,
            checkpoints_kept=self.checkpoints_kept,
        )
        _check_not_negative("EngineRecipe", self, "loader_workers", "cached_features_mib")


@dataclass(frozen=True)
class LoggingRecipe:
    """What people see of a run while it trains."""

    every: int = _harmless(10)
    """Steps between two lines of metrics.jsonl."""
    summary_minutes: float = _harmless(5.0)
    """Minutes between two printed lines where the output is not a terminal, which has a progress bar instead."""
    samples_every: int = _harmless(250)
    """Steps of phase `glam` between two sheets of samples, always of the same captions and noise; 0 writes none."""
    validate_every: int = _harmless(0)
    """Steps between two measurements on the validation images; 0 measures only what `keep_best` needs, with each
    checkpoint."""
    tensorboard: bool = _harmless(False)
    """Write everything for TensorBoard too, into the run's folder `tensorboard`."""

    def __post_init__(self) -> None:
        check_positive("LoggingRecipe", every=self.every)
        _check_above_zero("LoggingRecipe", self, "summary_minutes")
        _check_not_negative("LoggingRecipe", self, "samples_every", "validate_every")


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
    engine: EngineRecipe = field(default_factory=EngineRecipe)
    """How it is computed."""
    logging: LoggingRecipe = field(default_factory=LoggingRecipe)
    """What people see of a run while it trains."""

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"Recipe: seed must be a whole number from 0 to 2**32 - 1, but it is {self.seed!r}.")
        if self.engine.compile and self.glam.r1_weight > 0:
            raise ValueError(
                "Recipe: glam.r1_weight needs second derivatives, which torch.compile does not have; set it to 0, or "
                "leave engine.compile out."
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {**dataclasses.asdict(self), "model": self.model.to_dict()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any], base: Recipe | None = None) -> Recipe:
        """Build from the fields of `to_dict`, or from some of them.

        Args:
            fields: Names and values, nested as in `to_dict`.
            base: Where the other fields come from; None takes each field's default.

        Raises:
            ValueError: A field is unknown, of another type, or out of its range.
        """
        if base is None and not (isinstance(fields, dict) and isinstance(fields.get("name"), str)):
            raise ValueError("Recipe: the field 'name' is missing; expected the fields of a recipe.")
        return _override(base if base is not None else cls(name=fields["name"]), fields)


def differences(old: Recipe, new: Recipe) -> Iterator[tuple[str, bool]]:
    """What two recipes differ in, in words, each with whether it is harmless: it may change when a run is resumed."""
    keeps_best = any(getattr(new, phase).keep_best is not None for phase in PHASES)
    for words, harmless in _differences(old, new, ""):
        # The best step is one that has a checkpoint.
        yield words, harmless and not (keeps_best and words.startswith("engine.checkpoint_every "))


def _differences(old: Any, new: Any, prefix: str) -> Iterator[tuple[str, bool]]:
    for each in dataclasses.fields(old):
        before, now, name = getattr(old, each.name), getattr(new, each.name), prefix + each.name
        if dataclasses.is_dataclass(before):
            yield from _differences(before, now, f"{name}.")
        elif before != now:
            yield f"{name} is {before!r} there and {now!r} now", bool(each.metadata.get("harmless"))


def _override(record: Any, fields: Any, prefix: str = "") -> Any:
    """A copy of a frozen record with some fields replaced, nested ones too."""
    place = f" of {prefix.removesuffix('.')!r}" if prefix else ""
    if not isinstance(fields, dict):
        raise ValueError(f"Recipe: the value{place} must be an object of named fields, but it is {fields!r}.")
    hints, changes = get_type_hints(type(record)), {}
    for name, value in fields.items():
        if name not in hints:
            close = get_close_matches(name, hints, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(hints)}."
            raise ValueError(f"Recipe: unknown field {prefix + name!r}{hint}")
        before = getattr(record, name)
        if dataclasses.is_dataclass(before):
            changes[name] = _override(before, value, f"{prefix}{name}.")
        elif not _is_of(value, hints[name]):
            raise ValueError(f"Recipe: {prefix + name} must be {_in_words(hints[name])}, but it is {value!r}.")
        else:
            changes[name] = tuple(value) if isinstance(value, list) else value
    return dataclasses.replace(record, **changes)


def _is_of(value: Any, hint: Any) -> bool:
    """Is a value of JSON of this type?"""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_is_of(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_is_of(each, parts[0]) for each in value)
    if hint is NoneType:
        return value is None
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    return isinstance(value, int | float if hint is float else hint)


def _in_words(hint: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(_in_words, parts))
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is tuple:
        return f"a list of {_in_words(parts[0])}"
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false", NoneType: "null"}[hint]


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
            redescription_weight=None,
            redescription_ratio=0.25,
            kl_weight=0.1,
            average_decay=0.99,
        ),
    )


def flowers_64() -> Recipe:
    """The Oxford-102 photographs at 64 pixels, in one to two hours on two CPU cores."""
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
        stem=MatchingRecipe(steps=600, batch_size=64, learning_rate=2e-3, word_pairs=32),
        # On photographs the encoder's image features alone tell a captioner next to nothing.
        stream=CaptionerRecipe(steps=1600, learning_rate=5e-3, train_backbone=True),
        glam=AdversarialRecipe(
            steps=2400,
            generator_learning_rate=5e-4,
            discriminator_learning_rate=4e-4,
            redescription_weight=None,
            redescription_ratio=0.25,
            average_decay=0.998,
        ),
        judge=MatchingRecipe(steps=1200, learning_rate=2e-3, word_weight=0.0),
    )


def ablation() -> Recipe:
    """Synthetic flowers at 32 pixels, small enough to be trained some dozens of times on a CPU."""
    base = demo()
    return dataclasses.replace(
        base,
        name="ablation",
        model=dataclasses.replace(base.model, resolutions=(16, 32)),
        glam=dataclasses.replace(base.glam, steps=1000),
        logging=LoggingRecipe(samples_every=0),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {"demo": demo, "flowers-64": flowers_64, "ablation": ablation}


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


def load_recipe(path: str | Path, base: Recipe) -> Recipe:
    """The recipe of a JSON file that names the fields which differ from `base`, or of a run's config.json.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not JSON, or a field is unknown, of another type or out of its range.
    """
    content = read_json(Path(path))
    if isinstance(content, dict) and isinstance(content.get("recipe"), dict):
        content = content["recipe"]
    try:
        return Recipe.from_dict(content, base)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
