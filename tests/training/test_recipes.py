"""Recipes: round trip through JSON, checks of names, types and ranges, and differences between two."""

import dataclasses
import json
from pathlib import Path

import pytest

from mirror_modules.training.recipes import (
    RECIPES,
    AdversarialRecipe,
    DataRecipe,
    LoggingRecipe,
    Recipe,
    describe_recipes,
    differences,
    get_recipe,
    load_recipe,
)


@pytest.mark.parametrize("name", RECIPES)
def test_json_round_trip(name):
    recipe = get_recipe(name)
    assert recipe.name == name
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_an_unknown_recipe_is_rejected_with_a_suggestion():
    with pytest.raises(
        ValueError, match=r"unknown recipe 'flower-64'; there are demo, photos-64, .*\. Did you mean 'flowers-64'\?"
    ):
        get_recipe("flower-64")


@pytest.mark.parametrize("section", ["data", "model", "stem", "stream", "glam", "evaluator", "evaluation"])
def test_an_unknown_field_is_rejected(section):
    fields = get_recipe("demo").to_dict()
    fields[section]["resolution_of_dreams"] = 3
    with pytest.raises(ValueError, match="resolution_of_dreams"):
        Recipe.from_dict(fields)


def test_missing_fields_come_from_the_base_or_are_defaults():
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
        ({"model": {"resolutions": [8, 1.5]}}, r"model\.resolutions must be a list, each entry a whole number"),
        ({"engine": {"compile": 1}}, r"engine\.compile must be true or false, but it is 1"),
        ({"engine": {"compile": True}, "glam": {"r1_weight": 1}}, r"glam\.r1_weight needs second derivatives"),
        ({"glam": {"average_decay": 1.0}}, r"average_decay must be below 1"),
        ({"glam": {"max_grad_norm": 0}}, r"max_grad_norm must be above 0"),
        ({"glam": {"redescription_ratio": 0, "redescription_weight": None}}, r"redescription_ratio must be above 0"),
        (
            {"glam": {"redescription_ratio": 0.25, "redescription_weight": 5}},
            r"redescription_weight=5 and redescription_ratio=0\.25 are both given.*; set one of them to None",
        ),
        (
            {"glam": {"redescription_ratio": None}},
            r"are both None; give one of them a number, or redescription_weight=0",
        ),
        ({"glam": {"matching_weight": -1}}, r"matching_weight must be 0 or more"),
        (
            {"glam": {"matching_weight": 5, "matching_ratio": 0.5}},
            r"matching_weight=5 and matching_ratio=0\.5 are both given.*; leave one of them out",
        ),
        (
            {"glam": {"diversity_ratio": 0.3, "accumulate": 5}},
            r"diversity_ratio gives one of 4 captions a second image, but batch_size=16 leaves 3 per part with accum",
        ),
        ({"engine": {"cached_features_mib": -1}}, r"cached_features_mib must be 0 or more"),
        ({"engine": {"threads": 0}}, r"EngineRecipe: threads must be a whole number of at least 1, but it is 0"),
    ],
)
def test_a_field_of_the_wrong_type_or_range_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict(fields, get_recipe("demo"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"data": {"path": "my photos"}},
            r"DataRecipe: source='synthetic-flowers' draws its images and does not read path='my photos'; to train on "
            r"that folder, use `mirror-modules train photos-64 --data 'my photos'`",
        ),
        ({"data": {"on_error": "skip"}}, r"DataRecipe: on_error='skip' has no effect with source='synthetic-flowers'"),
        ({"data": {"held_out_share": 0.2}}, r"DataRecipe: held_out_share=0\.2 has no effect with source='synthetic-"),
        ({"data": {"source": "auto", "held_out_share": 0.51}}, r"held_out_share must be at most 0\.5, but it is 0\.51"),
        ({"data": {"source": "auto", "held_out_share": -0.1}}, r"held_out_share must be 0 or more, but it is -0\.1"),
        (
            {"stem": {"word_weight": 0, "word_pairs": 3}},
            r"word_pairs=3 has no effect with word_weight=0; leave .* at 48",
        ),
        (
            {
                "glam": {
                    "redescription_ratio": None,
                    "redescription_weight": 0,
                    "redescription_reduction": "sentence",
                }
            },
            r"redescription_reduction='sentence' has no effect with redescription_weight=0",
        ),
        ({"glam": {"r1_every": 4}}, r"AdversarialRecipe: r1_every=4 has no effect with r1_weight=0"),
        ({"glam": {"fine_ratios": -1}}, r"fine_ratios must be above 0, but it is -1"),
        (
            {"glam": {"redescription_ratio": None, "redescription_weight": 1, "matching_ratio": None}},
            r"fine_ratios=0\.4 has no effect with none of redescription, matching and diversity has a ratio",
        ),
        (
            {"model": {"attention": "word", "sentence_axis": "positions"}},
            r"Recipe: model: sentence_axis='positions' has no effect with attention='word'",
        ),
        (
            {"model": {"attention": "word", "sentence_noise": False}},
            r"Recipe: model: sentence_noise=False has no effect with attention='word'",
        ),
        (
            {"model": {"attention": "none", "sentence_axis": "positions"}},
            r"sentence_axis='positions' has no effect with attention='none'",
        ),
    ],
)
def test_a_field_that_is_not_read_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict(fields, get_recipe("demo"))


@pytest.mark.parametrize(
    "fields",
    [
        {"data": {"source": "auto", "path": "photos", "on_error": "skip"}},
        {"stem": {"word_weight": 0}},
        {"glam": {"redescription_ratio": None, "redescription_weight": 0}},
        {"glam": {"r1_every": 4, "r1_weight": 1.0}},
        {"model": {"attention": "word", "sentence_bias": True, "score_projection": True}},
    ],
)
def test_a_field_that_is_read_or_has_its_default_is_accepted(fields):
    assert Recipe.from_dict(fields, get_recipe("demo")) != get_recipe("demo")


def test_photographs_of_every_format_are_read():
    photos, flowers = get_recipe("photos-64"), get_recipe("flowers-64")
    assert photos.data == DataRecipe("auto", training_images=None, validation_images=None, min_count=1, augment=True)
    data = dataclasses.replace(photos.data, min_count=5)
    assert dataclasses.replace(photos, name="flowers-64", data=data) == flowers


def test_the_list_of_recipes_names_their_data_and_the_options_that_they_read():
    groups = []
    for line in describe_recipes().splitlines():
        if not line.startswith(" "):
            if not groups or groups[-1][1]:
                groups.append(([], {}))
            groups[-1][0].append(line)
        elif not line.startswith("   "):
            name, _, summary = line.strip().partition(" ")
            groups[-1][1][name] = [summary.strip()]
        else:
            groups[-1][1][name].append(line.strip())
    drawn, photographs = groups
    assert {**drawn[1], **photographs[1]}.keys() == RECIPES.keys()
    assert all(get_recipe(name).data.source == "synthetic-flowers" for name in drawn[1])
    assert not any(get_recipe(name).data.source == "synthetic-flowers" for name in photographs[1])
    assert max(map(len, describe_recipes().splitlines())) <= 78
    whole = [" ".join(lines) for group in groups for lines in group[1].values()]
    assert all(text.endswith(("on two CPU cores.", "for a GPU.")) for text in whole)
    read = [" ".join(heading).partition("read ")[2].rstrip(":").split(", ") for heading, _ in groups]
    everything = ["--data.source", "--data", "--data.training-images", "--data.validation-images", "--data.min-count"]
    everything += ["--data.augment", "--data.on-error", "--data.long-captions", "--data.held-out-share"]
    assert read[1] == everything
    assert set(everything) - set(read[0]) == {"--data", "--data.on-error", "--data.held-out-share"}
    assert set(read[0]) - set(everything) == {"--data.scatter"}


@pytest.mark.parametrize("system", ["gan-int-cls", "gawwn", "stackgan", "stackgan-v2", "ppgn", "attngan"])
def test_systems_on_photographs_have_the_sizes_and_losses_of_their_demo(system):
    demo, photos = get_recipe(f"{system}-demo"), get_recipe(f"{system}-photos-64")
    of_demo, of_photos = demo.model.to_dict(), photos.model.to_dict()
    bases = get_recipe("demo").model.to_dict(), get_recipe("photos-64").model.to_dict()
    for name in of_demo:
        if of_demo[name] != of_photos[name]:
            # As in the recipes of MirrorGAN.
            assert (of_demo[name], of_photos[name]) == (bases[0][name], bases[1][name])
    for name in (
        "matching_weight",
        "redescription_ratio",
        "redescription_weight",
        "mismatched_pairs",
        "adversarial_weighting",
    ):
        assert getattr(demo.glam, name) == getattr(photos.glam, name)
    assert photos.data == get_recipe("photos-64").data
    assert photos.phases == tuple(phase for phase in (*demo.phases, "second_evaluator") if "pretraining" not in phase)


def test_a_recipe_is_loaded_from_a_file_and_errors_name_it(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text('{"glam": {"steps": 7}}')
    assert load_recipe(path, get_recipe("demo")).glam.steps == 7
    path.write_text(json.dumps({"recipe": get_recipe("flowers-64").to_dict(), "versions": {}}))
    assert load_recipe(path, get_recipe("demo")) == get_recipe("flowers-64")
    path.write_text('{"glam": {"stepz": 7}}')
    with pytest.raises(ValueError, match=r"recipe\.json: Recipe: unknown field 'glam\.stepz'; did you mean"):
        load_recipe(path, get_recipe("demo"))


def test_differences_are_harmless_only_in_logging_and_length():
    old = get_recipe("demo")
    glam = dataclasses.replace(old.glam, steps=1, kl_weight=3.0)
    new = dataclasses.replace(old, seed=1, glam=glam, logging=LoggingRecipe(every=3))
    assert list(differences(old, new)) == [
        ("seed is 0 there and 1 now", False),
        (f"glam.steps is {old.glam.steps} there and 1 now", True),
        (f"glam.kl_weight is {old.glam.kl_weight} there and 3.0 now", False),
        ("logging.every is 10 there and 3 now", True),
    ]
    old_points = get_recipe("gawwn-points-demo")
    keypoints = dataclasses.replace(old_points.keypoints, steps=7)
    assert list(differences(old_points, dataclasses.replace(old_points, keypoints=keypoints))) == [
        (f"keypoints.steps is {old_points.keypoints.steps} there and 7 now", True)
    ]
    # The learning rate's cycle depends on the number of steps.
    stem = dataclasses.replace(old.stem, steps=1)
    assert list(differences(old, dataclasses.replace(old, stem=stem))) == [
        (f"stem.steps is {old.stem.steps} there and 1 now", False)
    ]


def test_settings_that_may_change_in_a_run_are_documented():
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    listed = page[page.index("**Settings.**") : page.index("**Checkpoints.**")]
    found = []
    for section in dataclasses.fields(Recipe):
        record = getattr(get_recipe("demo"), section.name)
        inner = dataclasses.fields(record) if dataclasses.is_dataclass(record) else ()
        found += [f"{section.name}.{each.name}" for each in inner if each.metadata.get("harmless")]
        found += [section.name] if section.metadata.get("harmless") else []
    assert len(found) == 13
    assert [name for name in found if f"`{name}`" not in listed] == []


def test_an_unknown_section_is_rejected():
    fields = {**get_recipe("demo").to_dict(), "dream": {}}
    with pytest.raises(ValueError, match="dream"):
        Recipe.from_dict(fields)


@pytest.mark.parametrize("value", [None, 3, [3], "words"])
@pytest.mark.parametrize("section", ["data", "model", "glam"])
def test_a_section_that_is_no_object_is_rejected(section, value):
    fields = {**get_recipe("demo").to_dict(), section: value}
    with pytest.raises(ValueError, match=r"Recipe|MirrorGANConfig"):
        Recipe.from_dict(fields)


@pytest.mark.parametrize(
    ("section", "field"),
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
        ("evaluator", "steps"),
        ("evaluation", "candidates"),
        ("evaluation", "report_images"),
    ],
)
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_a_number_out_of_range_is_rejected(section, field, value):
    with pytest.raises(ValueError, match=f"Recipe: {field} must be a whole number of at least 1, but it is {value}"):
        dataclasses.replace(getattr(get_recipe("demo"), section), **{field: value})


def test_logging_every_must_be_positive():
    with pytest.raises(ValueError, match="every must be a whole number of at least 1, but it is 0"):
        LoggingRecipe(every=0)


def test_the_published_weighting_requires_mismatched_pairs():
    glam = get_recipe("demo").glam
    with pytest.raises(ValueError, match="averages over mismatched pairs too"):
        dataclasses.replace(glam, adversarial_weighting="release", mismatched_pairs=False)


def test_a_recipe_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_recipe("demo").seed = 3
