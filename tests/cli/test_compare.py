"""The command `compare`."""

import pytest

from mirror_modules.cli.compare import SYSTEMS, SYSTEMS_ON_PHOTOGRAPHS, CompareOptions
from mirror_modules.evaluation import comparison
from mirror_modules.models.registry import _SYSTEMS
from mirror_modules.training.recipes import ADVERSARIAL_PHASES, RECIPES
from tests.cli.commands import assert_rejected, flags, run


@pytest.fixture
def received(monkeypatch):
    """The arguments of `compare`, which does not train."""
    found = {}

    def record(recipes, out, **options):
        found.update(options, recipes={recipe.name: recipe for recipe in recipes}, out=out)
        raise ValueError("not trained")

    monkeypatch.setattr(comparison, "compare", record)
    return found


def test_help_shows_every_option_with_its_default(capsys):
    status, out, _ = run(capsys, "compare", "--help")
    assert status == 0
    names = list(flags(CompareOptions))
    assert len(names) == 12
    for name in names:
        assert f"--{name} " in out or f"--{name}," in out


def test_the_seven_systems_are_compared_by_default_but_gawwn(capsys, received):
    recipes = [RECIPES[name]() for name in SYSTEMS]
    published = {"mirrorgan", "attngan", "stackgan", "stackgan-v2", "gan-int-cls", "gawwn", "ppgn"}
    assert {recipe.model.system for recipe in recipes} == published <= set(_SYSTEMS)
    status, _, err = run(capsys, "compare", "--out", "out")
    assert status == 2
    assert list(received["recipes"]) == [name for name in SYSTEMS if name != "gawwn-demo"]
    first, last = err.strip().splitlines()
    assert first.startswith("Without gawwn-demo, which places flowers and draws them anywhere in the image; --scatter")
    assert last == "mirror-modules compare: not trained"
    comparison._check_comparable(list(received["recipes"].values()))
    assert (received["seeds"], received["jobs"], received["baseline"]) == ((0, 1, 2), 1, None)


def test_scattered_flowers_are_for_all_seven(capsys, received):
    assert_rejected(run(capsys, "compare", "--scatter"), "not trained")
    assert list(received["recipes"]) == list(SYSTEMS)
    assert all(recipe.data.scatter for recipe in received["recipes"].values())
    comparison._check_comparable(list(received["recipes"].values()))


def test_photographs_are_for_the_same_systems(capsys, received):
    recipes = [RECIPES[name]() for name in SYSTEMS_ON_PHOTOGRAPHS]
    assert [recipe.model.system for recipe in recipes] == [RECIPES[name]().model.system for name in SYSTEMS]
    # With GAWWN, if it is named.
    comparison._check_comparable(recipes)
    status, _, err = run(capsys, "compare", "--data", "birds", "--from-scratch", "--steps", 9)
    assert status == 2
    first, _ = err.strip().splitlines()
    assert first.startswith("Without gawwn-photos-64, which needs photographs with boxes; if yours have them, name it")
    assert list(received["recipes"]) == [name for name in SYSTEMS_ON_PHOTOGRAPHS if name != "gawwn-photos-64"]
    assert {recipe.data.path for recipe in received["recipes"].values()} == {"birds"}
    assert {recipe.model.image_backbone.name for recipe in received["recipes"].values()} == {"conv"}
    assert {recipe.stem.steps for recipe in received["recipes"].values()} == {9}
    comparison._check_comparable(list(received["recipes"].values()))
    assert {recipe.data.on_error for recipe in received["recipes"].values()} == {"stop"}
    named = ("--systems", "photos-64", "gawwn-photos-64")
    assert_rejected(run(capsys, "compare", "--data", "birds", "--on-error", "skip", *named), "not trained")
    assert {recipe.data.on_error for recipe in received["recipes"].values()} == {"skip"}
    assert list(received["recipes"]) == list(named[1:])
    assert received["recipes"]["photos-64"].model.image_backbone.weights == "package"


def test_options_reach_the_function(capsys, received, tmp_path):
    words = ("--systems", "attngan-demo", "stackgan-demo", "demo", "--baseline", "demo", "--seeds", 4, 5, "--jobs", 2)
    words += ("--out", tmp_path, "--steps", 9, "--threads", 3, "--device", "cpu")
    assert_rejected(run(capsys, "compare", *words), "not trained")
    recipes = received.pop("recipes")
    assert received == {"out": tmp_path, "seeds": (4, 5), "jobs": 2, "device": "cpu", "baseline": "demo"}
    assert list(recipes) == ["attngan-demo", "stackgan-demo", "demo"]
    for name, recipe in recipes.items():
        assert recipe.engine.threads == 3
        steps = {phase: recipe.phase(phase).steps for phase in recipe.phases}
        of_generator = {phase: steps.pop(phase) for phase in ADVERSARIAL_PHASES if phase in steps}
        assert of_generator == ({"first_stage": 4, "glam": 5} if name == "stackgan-demo" else {"glam": 9})
        assert set(steps.values()) == {9}
    comparison._check_comparable(list(recipes.values()))


def test_invalid_words_are_rejected(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unknown = run(capsys, "compare", "--systems", "demo", "attngan")
    assert_rejected(unknown, "unknown recipe 'attngan'", "Did you mean 'attngan-demo'?")
    single = run(capsys, "compare", "--systems", "demo")
    assert_rejected(single, "recipes must be two or more, but they are ['demo']")
    placed = run(capsys, "compare", "--systems", "demo", "gawwn-demo")
    assert_rejected(placed, "'demo' and 'gawwn-demo' differ in data.scatter", "--scatter sets data.scatter")
    sizes = run(capsys, "compare", "--systems", "demo", "ablation")
    assert_rejected(
        sizes, "differ in stem.steps (800 and 400)", "pretraining (given and None)", "finest images (64 and 32)"
    )
    for option, value in (("--steps", 0), ("--threads", 0)):
        assert_rejected(
            run(capsys, "compare", "--systems", "demo", "attngan-demo", option, value),
            f"{option[2:]} must be a whole number of at least 1",
        )
    short = run(capsys, "compare", "--systems", "demo", "stackgan-demo", "--steps", 1)
    assert_rejected(
        short, "--steps must be at least 2 with stackgan-demo, whose phases first_stage and glam divide them"
    )
    assert_rejected(
        run(capsys, "compare", "--scatter", "--data", "birds"), "--scatter draws flowers", "give one of them"
    )
    assert_rejected(run(capsys, "compare", "--on-error", "skip"), "--on-error is about damaged photographs")
    drawn = run(capsys, "compare", "--systems", "demo", "attngan-demo", "--data", "birds")
    assert_rejected(
        drawn, "'demo' of --systems draws them; recipes for photographs are photos-64, gan-int-cls-photos-64,"
    )
    missing = run(capsys, "compare", "--data", "birds", "--systems", "photos-64", "attngan-photos-64")
    assert_rejected(missing, "there is no folder birds")
    unnamed = run(capsys, "compare", "--systems", "photos-64", "attngan-photos-64")
    assert_rejected(unnamed, "pass their folder with --data PATH")
    none = run(capsys, "compare", "--systems", "demo", "attngan-demo", "--baseline", "stackgan-demo")
    assert_rejected(none, "baseline must be one of 'demo', 'attngan-demo', but it is 'stackgan-demo'")
    assert not list(tmp_path.iterdir())
