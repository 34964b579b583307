"""Recipes: everything that determines the result of a run, by name."""

from mirror_modules.training.recipes.data import DataRecipe
from mirror_modules.training.recipes.named import ablation, demo, flowers_64, flowers_128, flowers_256, photos_64
from mirror_modules.training.recipes.phases import (
    ADVERSARIAL_PHASES,
    ALL_PHASES,
    PHASES,
    PRETRAINING,
    WITHOUT_BACKBONE,
    AdversarialRecipe,
    CaptionerRecipe,
    EvaluatorRecipe,
    KeypointRecipe,
    MatchingRecipe,
    PhaseRecipe,
    PretrainingRecipe,
)
from mirror_modules.training.recipes.recipe import Recipe, differences
from mirror_modules.training.recipes.registry import (
    RECIPES,
    describe_recipes,
    from_scratch,
    get_recipe,
    load_recipe,
)
from mirror_modules.training.recipes.settings import EngineRecipe, EvaluationRecipe, LoggingRecipe
from mirror_modules.training.recipes.systems import (
    attngan_demo,
    gan_int_cls_demo,
    gawwn_demo,
    gawwn_points_demo,
    ppgn_demo,
    stackgan_demo,
    stackgan_v2_demo,
)

__all__ = [
    "ADVERSARIAL_PHASES",
    "ALL_PHASES",
    "PHASES",
    "PRETRAINING",
    "RECIPES",
    "WITHOUT_BACKBONE",
    "AdversarialRecipe",
    "CaptionerRecipe",
    "DataRecipe",
    "EngineRecipe",
    "EvaluationRecipe",
    "EvaluatorRecipe",
    "KeypointRecipe",
    "LoggingRecipe",
    "MatchingRecipe",
    "PhaseRecipe",
    "PretrainingRecipe",
    "Recipe",
    "ablation",
    "attngan_demo",
    "demo",
    "describe_recipes",
    "differences",
    "flowers_64",
    "flowers_128",
    "flowers_256",
    "from_scratch",
    "gan_int_cls_demo",
    "gawwn_demo",
    "gawwn_points_demo",
    "get_recipe",
    "load_recipe",
    "photos_64",
    "ppgn_demo",
    "stackgan_demo",
    "stackgan_v2_demo",
]
