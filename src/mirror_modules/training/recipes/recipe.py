"""A recipe: everything that determines the result of a run, as frozen dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mirror_modules.models import BackboneConfig, MirrorGANConfig, ModelConfig, get_system
from mirror_modules.training.recipes.data import DataRecipe
from mirror_modules.training.recipes.fields import changed_fields, check_has_effect, override
from mirror_modules.training.recipes.phases import (
    ADVERSARIAL_PHASES,
    ALL_PHASES,
    FIRST_STAGE,
    KEYPOINTS,
    NEED_MISMATCHED,
    PRETRAINING,
    SECOND_EVALUATOR,
    AdversarialRecipe,
    CaptionerRecipe,
    EvaluatorRecipe,
    KeypointRecipe,
    MatchingRecipe,
    PhaseRecipe,
    PretrainingRecipe,
)
from mirror_modules.training.recipes.settings import EngineRecipe, EvaluationRecipe, LoggingRecipe


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
    keypoints: KeypointRecipe | None = None
    """Phase `keypoints`, before `glam`: the generator of the key points that a user leaves out, in GAWWN; None for
    others."""
    evaluator_pretraining: PretrainingRecipe | None = None
    """Phase `evaluator_pretraining`: trains the backbone of phase `evaluator`, as `pretraining` does that of phase
    `stem`, but with its own seed; None leaves it out."""
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
            check_has_effect("Recipe: model", self.model, name, condition)
        required = self.model.adversarial_phases
        if required not in (("glam",), (FIRST_STAGE, "glam")):
            raise ValueError(
                f"Recipe: adversarial_phases of the system {self.model.system!r} must be ('glam',) or "
                f"({FIRST_STAGE!r}, 'glam'), but they are {required!r}."
            )
        if (FIRST_STAGE in required) != (self.first_stage is not None):
            change = "give it one" if FIRST_STAGE in required else "leave first_stage out"
            raise ValueError(
                f"Recipe: the generator of the system {self.model.system!r} is trained in {' and '.join(required)}, "
                f"but first_stage is {self.first_stage!r}; {change}."
            )
        if self.model.completes_points != (self.keypoints is not None):
            does, change = (
                ("completes", "give it one")
                if self.model.completes_points
                else ("does not complete", "leave keypoints out")
            )
            raise ValueError(
                f"Recipe: this model of the system {self.model.system!r} {does} missing key points, but keypoints is "
                f"{self.keypoints!r}; {change}."
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
        encoders = (before, "stem", "stream")
        order = (*encoders, FIRST_STAGE, KEYPOINTS, "glam", before_evaluator, "evaluator", SECOND_EVALUATOR)
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
        """The image backbone of a phase other than `WITHOUT_BACKBONE`."""
        section, name = _place(self, phase)
        found: BackboneConfig = getattr(getattr(self, section), name)
        return found

    def recorded(self, phases: Sequence[str], before: Recipe | None = None) -> Recipe:
        """A copy with the checksums of the pretrained weights of some phases, which are loaded for it.

        Args:
            phases: Phases other than `WITHOUT_BACKBONE`.
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
    harmful = []
    if any(new.phase(phase).keep_best is not None for phase in new.phases):
        # The best step is selected among those with a checkpoint.
        harmful.append("engine.checkpoint_every ")
    if new.second_evaluator is None:
        # It may be added. Left out, its weights would be taken for those of another one that is added later.
        harmful.append("second_evaluator ")
    for words, harmless in changed_fields(old, new):
        yield words, harmless and not words.startswith(tuple(harmful))


def _place(recipe: Recipe, phase: str) -> tuple[str, str]:
    """Section and field of the backbone of a phase."""
    if phase == "stream":
        return "model", "captioner_backbone"
    phase = next((name for name, before in PRETRAINING.items() if before == phase), phase)
    own = getattr(recipe.phase(phase), "backbone", None)
    return ("model", "image_backbone") if own is None else (phase, "backbone")
