"""Recipes survive JSON, and names that do not exist are answered with the ones that do."""

import dataclasses
import json

import pytest

from mirror_modules.training.recipes import RECIPES, Recipe, get_recipe


@pytest.mark.parametrize("name", RECIPES)
def test_survives_json(name):
    recipe = get_recipe(name)
    assert recipe.name == name
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_an_unknown_recipe_is_answered_with_a_close_one():
    with pytest.raises(ValueError, match=r"unknown recipe 'flower-64'; there are demo, flowers-64\. Did you mean"):
        get_recipe("flower-64")


@pytest.mark.parametrize("part", ["data", "model", "stem", "stream", "glam", "judge", "evaluation"])
def test_an_unknown_field_is_named(part):
    fields = get_recipe("demo").to_dict()
    fields[part]["resolution_of_dreams"] = 3
    with pytest.raises(ValueError, match="resolution_of_dreams"):
        Recipe.from_dict(fields)


def test_a_missing_part_is_named():
    fields = get_recipe("demo").to_dict()
    del fields["glam"]
    with pytest.raises(ValueError, match="glam"):
        Recipe.from_dict(fields)


def test_an_unknown_part_is_named():
    fields = {**get_recipe("demo").to_dict(), "dream": {}}
    with pytest.raises(ValueError, match="dream"):
        Recipe.from_dict(fields)


@pytest.mark.parametrize("value", [None, 3, [3], "words"])
@pytest.mark.parametrize("part", ["data", "model", "glam"])
def test_a_part_of_another_kind_is_refused(part, value):
    fields = {**get_recipe("demo").to_dict(), part: value}
    with pytest.raises(ValueError, match=r"Recipe|MirrorGANConfig"):
        Recipe.from_dict(fields)


@pytest.mark.parametrize(
    ("part", "field"),
    [
        ("data", "training_images"),
        ("data", "validation_images"),
        ("data", "min_count"),
        ("stem", "steps"),
        ("stem", "batch_size"),
        ("stem", "word_pairs"),
        ("stream", "steps"),
        ("stream", "batch_size"),
        ("glam", "steps"),
        ("glam", "batch_size"),
        ("judge", "steps"),
        ("evaluation", "candidates"),
        ("evaluation", "report_images"),
    ],
)
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_a_number_out_of_its_range_is_named(part, field, value):
    with pytest.raises(ValueError, match=f"Recipe: {field} must be a whole number of at least 1, but it is {value}"):
        dataclasses.replace(getattr(get_recipe("demo"), part), **{field: value})


def test_steps_between_two_lines_are_at_least_one():
    with pytest.raises(ValueError, match="log_every must be a whole number of at least 1, but it is 0"):
        dataclasses.replace(get_recipe("demo"), log_every=0)


def test_the_published_weighting_keeps_mismatched_pairs():
    glam = get_recipe("demo").glam
    with pytest.raises(ValueError, match="averages over mismatched pairs too"):
        dataclasses.replace(glam, adversarial_weighting="release", mismatched_pairs=False)


def test_a_recipe_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_recipe("demo").seed = 3
