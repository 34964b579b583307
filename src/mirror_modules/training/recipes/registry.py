"""All recipes by name, and recipes from files."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from mirror_modules._files import read_json
from mirror_modules.models import BackboneConfig
from mirror_modules.training.recipes.data import NOT_READ_FOR_DRAWN_FLOWERS, READ_FOR_DRAWN_FLOWERS_ALONE, DataRecipe
from mirror_modules.training.recipes.named import ablation, demo, flowers_64, flowers_128, flowers_256, photos_64
from mirror_modules.training.recipes.phases import EvaluatorRecipe
from mirror_modules.training.recipes.recipe import Recipe
from mirror_modules.training.recipes.systems import (
    attngan_demo,
    attngan_photos_64,
    gan_int_cls_demo,
    gan_int_cls_photos_64,
    gawwn_demo,
    gawwn_photos_64,
    gawwn_points_demo,
    ppgn_demo,
    ppgn_photos_64,
    stackgan_demo,
    stackgan_photos_64,
    stackgan_v2_demo,
    stackgan_v2_photos_64,
)

# Columns of the list of recipes, which is also indented in `train --help`.
WIDTH = 78

RECIPES: dict[str, Callable[[], Recipe]] = {
    "demo": demo,
    "photos-64": photos_64,
    "flowers-64": flowers_64,
    "flowers-128": flowers_128,
    "flowers-256": flowers_256,
    "ablation": ablation,
    "gan-int-cls-demo": gan_int_cls_demo,
    "gawwn-demo": gawwn_demo,
    "gawwn-points-demo": gawwn_points_demo,
    "stackgan-demo": stackgan_demo,
    "stackgan-v2-demo": stackgan_v2_demo,
    "ppgn-demo": ppgn_demo,
    "attngan-demo": attngan_demo,
    "gan-int-cls-photos-64": gan_int_cls_photos_64,
    "gawwn-photos-64": gawwn_photos_64,
    "stackgan-photos-64": stackgan_photos_64,
    "stackgan-v2-photos-64": stackgan_v2_photos_64,
    "ppgn-photos-64": ppgn_photos_64,
    "attngan-photos-64": attngan_photos_64,
}


def describe_recipes() -> str:
    """List the recipes of drawn flowers and those of photographs, each with the options of the data that it reads.

    Examples:
        >>> from mirror_modules.training.recipes import describe_recipes
        >>> print(describe_recipes().splitlines()[3])
          demo                   Drawn flowers at 64 pixels; minutes on two CPU cores.
    """
    made = {name: make().data for name, make in RECIPES.items()}
    indent = (4 + max(map(len, RECIPES))) * " "
    lines = []
    for kind, is_drawn in (("Drawn flowers", True), ("Photographs", False)):
        names = [name for name, data in made.items() if data.is_drawn == is_drawn]
        unread = NOT_READ_FOR_DRAWN_FLOWERS if is_drawn else READ_FOR_DRAWN_FLOWERS_ALONE
        read = [each.name for each in dataclasses.fields(DataRecipe) if each.name not in unread]
        # The field `path` has a short option.
        options = [f"--data.{each.replace('_', '-')}".replace("--data.path", "--data") for each in read]
        lines += _wrapped(f"{kind}; these recipes read {', '.join(options)}:")
        for name in names:
            summary = (inspect.getdoc(RECIPES[name]) or "").split("\n")[0]
            lines += _wrapped(summary, f"  {name:<{len(indent) - 2}}", indent)
    return "\n".join(lines)


def _wrapped(text: str, first: str = "", others: str = "") -> list[str]:
    return textwrap.wrap(text, width=WIDTH, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)


def get_recipe(name: str) -> Recipe:
    """A named recipe.

    Args:
        name: One of `describe_recipes`, such as "demo", "flowers-64" or "attngan-demo".

    Raises:
        ValueError: There is no recipe of this name.

    Examples:
        >>> from mirror_modules.training import get_recipe
        >>> get_recipe("demo").data.source
        'synthetic-flowers'
        >>> get_recipe("attngan-demo").model.system
        'attngan'
    """
    if name not in RECIPES:
        close = get_close_matches(name, RECIPES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown recipe {name!r}; there are {', '.join(RECIPES)}.{hint}")
    return RECIPES[name]()


def load_recipe(path: str | Path, base: Recipe) -> Recipe:
    """A recipe from a JSON file with the fields that differ from `base`, or from a run's config.json.

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


def from_scratch(recipe: Recipe) -> Recipe:
    """The recipe with a small network that trains from scratch in place of each pretrained backbone.

    A second evaluator is left out, because it would have the same backbone as the first.

    Examples:
        >>> from mirror_modules.training.recipes import from_scratch, get_recipe
        >>> recipe = from_scratch(get_recipe("flowers-64"))
        >>> recipe.model.image_backbone.name, recipe.stream.train_backbone, recipe.phases
        ('conv', True, ('stem', 'stream', 'glam', 'evaluator'))
        >>> from_scratch(get_recipe("demo")) == get_recipe("demo")
        True
    """
    used = [recipe.model.image_backbone, recipe.model.captioner_backbone]
    evaluators = [phase for phase in recipe.phases if isinstance(recipe.phase(phase), EvaluatorRecipe)]
    used += [each for phase in evaluators if (each := recipe.backbone(phase)) not in used]
    if all(each.weights is None for each in used):
        return recipe
    plain = BackboneConfig("conv")
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, image_backbone=plain, captioner_backbone=plain),
        # On photographs, a captioner on the frozen encoder of a phase `stem` from scratch nearly ignores the image.
        stream=dataclasses.replace(recipe.stream, train_backbone=True),
        evaluator=dataclasses.replace(recipe.evaluator, backbone=None),
        second_evaluator=None,
    )
