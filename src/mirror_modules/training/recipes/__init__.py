"""Recipes: everything that determines the result of a run, by name."""

from mirror_modules.training.recipes.named import (
    RECIPES,
    ablation,
    demo,
    describe_recipes,
    flowers_64,
    get_recipe,
    load_recipe,
    photos_64,
)
from mirror_modules.training.recipes.records import (
    PHASES,
    AdversarialRecipe,
    CaptionerRecipe,
    DataRecipe,
    EngineRecipe,
    EvaluationRecipe,
    LoggingRecipe,
    MatchingRecipe,
    PhaseRecipe,
    Recipe,
    differences,
)

__all__ = [
    "PHASES",
    "RECIPES",
    "AdversarialRecipe",
    "CaptionerRecipe",
    "DataRecipe",
    "EngineRecipe",
    "EvaluationRecipe",
    "LoggingRecipe",
    "MatchingRecipe",
    "PhaseRecipe",
    "Recipe",
    "ablation",
    "demo",
    "describe_recipes",
    "differences",
    "flowers_64",
    "get_recipe",
    "load_recipe",
    "photos_64",
]
