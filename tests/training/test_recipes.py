"""Recipes survive JSON, and names that do not exist are answered with the ones that do."""

import dataclasses
import json

import pytest

from mirror_modules.training.recipes import (
    RECIPES,
    AdversarialRecipe,
    LoggingRecipe,
    Recipe,
    differences,
    get_recipe,
    load_recipe,
)


@pytest.mark.parametrize("name", RECIPES)
def test_survives_json(name):
    recipe = get_recipe(name)
    assert recipe.name == name
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_an_unknown_recipe_is_answered_with_a_close_one():
    with pytest.raises(
        ValueError, match=r"unknown recipe 'flower-64'; there are demo, flowers-64, ablation\. Did you mean"
    ):
        get_recipe("flower-64")


@pytest.mark.parametrize("part", ["data", "model", "stem", "stream", "glam", "judge", "evaluation"])
def test_an_unknown_field_is_named(part):
    fields = get_recipe("demo").to_dict()
    fields[part]["resolution_of_dreams"] = 3
    with pytest.raises(ValueError, match="resolution_of_dreams"):
        Recipe.from_dict(fields)


def test_a_part_that_is_missing_has_its_defaults_or_those_of_a_base():
    fields = get_recipe("demo").to_dict()
    del fields["glam"]
    assert Recipe.from_dict(fields).glam == AdversarialRecipe()
    base = get_recipe("flowers-64")
    changed = Recipe.from_dict({"glam": {"steps": 7}}, base)
    assert changed == dataclasses.replace(base, glam=dataclasses.replace(base.glam, steps=7))
    with pytest.raises(ValueError, match="the field 'name' is missing"):
        Recipe.from_dict({"glam": {"steps": 7}})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"glam": {"stepz": 3}}, r"unknown field 'glam\.stepz'; did you mean 'steps'\?"),
        ({"glan": {}}, r"unknown field 'glan'; did you mean 'glam'\?"),
        ({"glam": {"steps": "many"}}, r"glam\.steps must be a whole number, but it is 'many'"),
        ({"glam": {"steps": True}}, r"glam\.steps must be a whole number, but it is True"),
        ({"glam": {"keep_best": "x"}}, r"glam\.keep_best must be 'r_precision' or 'redescription' or null"),
        ({"model": {"resolutions": [8, 1.5]}}, r"model\.resolutions must be a list of a whole number"),
        ({"engine": {"compile": 1}}, r"engine\.compile must be true or false, but it is 1"),
        ({"engine": {"compile": True}, "glam": {"r1_weight": 1}}, r"glam\.r1_weight needs second derivatives"),
        ({"glam": {"average_decay": 1.0}}, r"average_decay must be below 1"),
        ({"glam": {"largest_gradient_norm": 0}}, r"largest_gradient_norm must be above 0"),
        ({"glam": {"redescription_ratio": 0, "redescription_weight": None}}, r"redescription_ratio must be above 0"),
        (
            {"glam": {"redescription_ratio": 0.25, "redescription_weight": 5}},
            r"redescription_weight=5 and redescription_ratio=0\.25 are both given.*; set the other one to None",
        ),
        (
            {"glam": {"redescription_ratio": None}},
            r"are both None; give one of them a number, or redescription_weight=0",
        ),
        ({"engine": {"cached_features_mib": -1}}, r"cached_features_mib must be 0 or more"),
    ],
)
def test_a_field_that_does_not_fit_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict(fields, get_recipe("demo"))


def test_a_file_names_itself_in_its_errors(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"glam": {"steps": 7}}')
    assert load_recipe(path, get_recipe("demo")).glam.steps == 7
    path.write_text(json.dumps({"recipe": get_recipe("flowers-64").to_dict(), "versions": {}}))
    assert load_recipe(path, get_recipe("demo")) == get_recipe("flowers-64")
    path.write_text('{"glam": {"stepz": 7}}')
    with pytest.raises(ValueError, match=r"mine\.json: Recipe: unknown field 'glam\.stepz'; did you mean"):
        load_recipe(path, get_recipe("demo"))


def test_what_is_seen_of_a_run_is_harmless_and_what_decides_it_is_not():
    old = get_recipe("demo")
    glam = dataclasses.replace(old.glam, steps=1, kl_weight=3.0)
    new = dataclasses.replace(old, seed=1, glam=glam, logging=LoggingRecipe(every=3))
    assert list(differences(old, new)) == [
        ("seed is 0 there and 1 now", False),
        ("glam.steps is 1600 there and 1 now", True),
        ("glam.kl_weight is 0.1 there and 3.0 now", False),
        ("logging.every is 10 there and 3 now", True),
    ]
    # One cycle of the step size ends with the last step.
    stem = dataclasses.replace(old.stem, steps=1)
    assert list(differences(old, dataclasses.replace(old, stem=stem))) == [("stem.steps is 400 there and 1 now", False)]


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
    with pytest.raises(ValueError, match="every must be a whole number of at least 1, but it is 0"):
        LoggingRecipe(every=0)


def test_the_published_weighting_keeps_mismatched_pairs():
    glam = get_recipe("demo").glam
    with pytest.raises(ValueError, match="averages over mismatched pairs too"):
        dataclasses.replace(glam, adversarial_weighting="release", mismatched_pairs=False)


def test_a_recipe_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_recipe("demo").seed = 3
