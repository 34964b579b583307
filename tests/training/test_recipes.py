"""Recipes survive JSON, and names that do not exist are answered with the ones that do."""

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


@pytest.mark.parametrize("part", ["glam", "model"])
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
