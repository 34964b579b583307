"""Recipes: everything that determines the result of a run, by name."""

from mirror_modules.training.recipes.named import ablation, demo, flowers_64, photos_64
from mirror_modules.training.recipes.records import (
    ADVERSARIAL_PHASES,
    ALL_PHASES,
    PHASES,
    AdversarialRecipe,
    CaptionerRecipe,
    DataRecipe,
    EngineRecipe,
    EvaluationRecipe,
    EvaluatorRecipe,
    LoggingRecipe,
    MatchingRecipe,
    PhaseRecipe,
    Recipe,
    differences,
)
from mirror_modules.training.recipes.registry import (
    RECIPES,
    describe_recipes,
    from_scratch,
    get_recipe,
    load_recipe,
)
from mirror_modules.training.recipes.systems import (
    attngan_demo,
    gan_int_cls_demo,
    ppgn_demo,
    stackgan_demo,
    stackgan_v2_demo,
)

__all__ = [
    "ADVERSARIAL_PHASES",
    "ALL_PHASES",
    "PHASES",
    "RECIPES",
    "AdversarialRecipe",
    "CaptionerRecipe",
    "DataRecipe",
    "EngineRecipe",
    "EvaluationRecipe",
    "EvaluatorRecipe",
    "LoggingRecipe",
    "MatchingRecipe",
    "PhaseRecipe",
    "Recipe",
    "ablation",
    "attngan_demo",
    "demo",
    "describe_recipes",
    "differences",
    "flowers_64",
    "from_scratch",
    "gan_int_cls_demo",
    "get_recipe",
    "load_recipe",
    "photos_64",
    "ppgn_demo",
    "stackgan_demo",
    "stackgan_v2_demo",
]
