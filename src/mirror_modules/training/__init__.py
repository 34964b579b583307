"""Training of the systems phase by phase: recipes, training steps, checkpoints, distributed training."""

from mirror_modules.training.errors import Interrupted, TrainingError
from mirror_modules.training.folder import RunFolder
from mirror_modules.training.loop import train
from mirror_modules.training.recipes import Recipe, get_recipe

__all__ = ["Interrupted", "Recipe", "RunFolder", "TrainingError", "get_recipe", "train"]
