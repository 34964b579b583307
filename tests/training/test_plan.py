"""Which phases a run trains: a decision from recipe and folder that writes nothing."""

import dataclasses
import json

import pytest

from mirror_modules.training.folder import RunFolder
from mirror_modules.training.plan import REQUIRED, Plan, make_plan
from mirror_modules.training.recipes import PHASES, get_recipe


def make_folder(path, recipe, *, finished=(), checkpoints=()):
    """A run's folder with empty files: the plan depends on names alone."""
    folder = RunFolder(path)
    folder.begin(recipe)
    for phase in finished:
        folder.weights(phase).touch()
    folder.checkpoints.mkdir()
    for phase, step in checkpoints:
        (folder.checkpoints / f"{phase}-{step:08}-{'0' * 16}.pt").touch()
    return folder


def with_steps(recipe, phase, steps):
    return dataclasses.replace(recipe, **{phase: dataclasses.replace(recipe.phase(phase), steps=steps)})


def listing(folder):
    return sorted((path.as_posix(), path.stat().st_mtime_ns) for path in folder.path.rglob("*"))


@pytest.fixture
def recipe():
    return get_recipe("ablation")


def test_a_new_folder_gets_the_requested_phases_in_order_and_is_not_created(recipe, tmp_path):
    folder = RunFolder(tmp_path / "new")
    assert make_plan(recipe, folder, ["glam", "stream", "stem"], resume=False) == Plan(("stem", "stream", "glam"), ())
    assert make_plan(recipe, folder, PHASES, resume=True) == Plan(PHASES, ())
    assert not folder.path.exists()


@pytest.mark.parametrize("resume", [False, True])
def test_finished_phases_are_reused_and_nothing_is_written(recipe, tmp_path, resume):
    folder = make_folder(tmp_path, recipe, finished=["stem", "evaluator"], checkpoints=[("stem", recipe.stem.steps)])
    before = listing(folder)
    assert make_plan(recipe, folder, PHASES, resume=resume) == Plan(("stream", "glam"), ("stem", "evaluator"))
    assert listing(folder) == before


def test_an_interrupted_phase_needs_resume(recipe, tmp_path):
    folder = make_folder(tmp_path, recipe, finished=["stem"], checkpoints=[("stream", 10), ("stream", 20)])
    with pytest.raises(ValueError, match=r"holds phase 'stream' after 20 of 1000 steps; continue with --resume, or"):
        make_plan(recipe, folder, PHASES, resume=False)
    assert make_plan(recipe, folder, PHASES, resume=True) == Plan(("stream", "glam", "evaluator"), ("stem",))


@pytest.mark.parametrize(
    ("phase", "required"), [(phase, each) for phase in PHASES for each in REQUIRED[phase] if each in PHASES]
)
def test_a_phase_needs_the_weights_it_starts_from(recipe, tmp_path, phase, required):
    others = [each for each in REQUIRED[phase] if each != required]
    folder = make_folder(tmp_path, recipe, finished=others)
    with pytest.raises(ValueError, match=rf"phase '{phase}' needs phase '{required}', which .* lacks; train it too"):
        make_plan(recipe, folder, [phase], resume=False)
    assert make_plan(recipe, folder, [phase, required], resume=False).finished == ()


def test_pretraining_comes_before_the_phase_that_freezes_its_backbone(tmp_path):
    recipe = get_recipe("demo")
    folder = RunFolder(tmp_path / "new")
    order = ("pretraining", "stem", "stream", "glam", "evaluator_pretraining", "evaluator")
    assert make_plan(recipe, folder, sorted(order), resume=False) == Plan(order, ())
    for phase, required in {"stem": "pretraining", "evaluator": "evaluator_pretraining"}.items():
        with pytest.raises(ValueError, match=rf"phase '{phase}' needs phase '{required}', which .* lacks"):
            make_plan(recipe, folder, [phase], resume=False)
    with pytest.raises(ValueError, match=r"unknown phase 'pretraining'; .* needs the recipe's field pretraining"):
        make_plan(get_recipe("ablation"), folder, ["pretraining"], resume=False)


def test_unknown_phases_are_rejected(recipe, tmp_path):
    with pytest.raises(ValueError, match="unknown phase 'dream'; choose from stem, stream, glam, evaluator"):
        make_plan(recipe, RunFolder(tmp_path), ["dream"], resume=False)


def test_glam_can_only_be_extended_from_its_last_checkpoint(recipe, tmp_path):
    steps = recipe.glam.steps
    longer = dataclasses.replace(recipe, glam=dataclasses.replace(recipe.glam, steps=steps + 1))
    shorter = dataclasses.replace(recipe, glam=dataclasses.replace(recipe.glam, steps=steps - 1))
    folder = make_folder(tmp_path, recipe, finished=PHASES, checkpoints=[("glam", steps)])
    assert make_plan(longer, folder, PHASES, resume=True).to_train == ("glam",)
    with pytest.raises(ValueError, match=rf"after {steps} steps; glam\.steps={steps - 1} would be fewer"):
        make_plan(shorter, folder, PHASES, resume=True)
    with pytest.raises(ValueError, match="would make it longer, but it is not among the phases to train"):
        make_plan(longer, folder, ["stem"], resume=True)
    for path in folder.checkpoints.iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="would make it longer, but there is no checkpoint of its last step"):
        make_plan(longer, folder, PHASES, resume=True)


@pytest.mark.parametrize(("name", "phase"), [("stackgan-demo", "first_stage"), ("gawwn-points-demo", "keypoints")])
def test_a_phase_is_extended_only_before_glam_starts_from_its_weights(tmp_path, name, phase):
    recipe = get_recipe(name)
    steps = recipe.phase(phase).steps
    longer, shorter = (with_steps(recipe, phase, each) for each in (steps + 1, steps - 1))
    before = recipe.phases[: recipe.phases.index(phase)]
    phases = (*before, phase, "glam")
    folder = make_folder(tmp_path, recipe, finished=(*before, phase), checkpoints=[(phase, steps)])
    assert make_plan(longer, folder, phases, resume=True) == Plan((phase, "glam"), before)
    with pytest.raises(ValueError, match=rf"holds phase '{phase}' after {steps} steps; {phase}\.steps=.* be fewer"):
        make_plan(shorter, folder, phases, resume=True)
    with pytest.raises(ValueError, match=rf"{phase}\.steps=.* longer, but it is not among the phases to train"):
        make_plan(longer, folder, ["glam"], resume=True)
    message = rf"holds phase '{phase}' after {steps} steps; .* longer, but phase 'glam' has started from its weights"
    started = folder.checkpoints / f"glam-00000001-{'0' * 16}.pt"
    for sign in (started, folder.weights("glam")):
        sign.touch()
        with pytest.raises(ValueError, match=message):
            make_plan(longer, folder, phases, resume=True)
        sign.unlink()


@pytest.mark.parametrize("phase", ["first_stage", "glam"])
def test_an_interrupted_phase_may_get_other_steps_but_not_fewer_than_done(tmp_path, phase):
    recipe = get_recipe("stackgan-demo")
    finished = [each for each in ("stem", "stream", "first_stage") if each != phase]
    folder = make_folder(tmp_path, recipe, finished=finished, checkpoints=[(phase, 7)])
    for steps in (7, 8, 9_000):
        assert phase in make_plan(with_steps(recipe, phase, steps), folder, recipe.phases, resume=True).to_train
    with pytest.raises(ValueError, match=rf"after 7 steps; {phase}\.steps=6 would be fewer"):
        make_plan(with_steps(recipe, phase, 6), folder, recipe.phases, resume=True)


def test_the_finest_stage_joins_at_the_same_step_in_a_longer_run(tmp_path):
    base = get_recipe("ablation")
    recipe = dataclasses.replace(base, glam=dataclasses.replace(base.glam, steps=80, coarse_steps=90))
    folder = make_folder(tmp_path, recipe, finished=["stem", "stream"], checkpoints=[("glam", 60)])
    # Three quarters of 80 steps are done, as many as those of 81.
    for steps in (80, 81):
        assert "glam" in make_plan(with_steps(recipe, "glam", steps), folder, PHASES, resume=True).to_train
    assert "glam" in make_plan(with_steps(recipe, "glam", 200), folder, PHASES, resume=True).to_train
    (folder.checkpoints / f"glam-00000061-{'0' * 16}.pt").touch()
    message = (
        r"holds phase 'glam' after 61 steps, with the finest stage from step 61 on; glam\.steps=200 would begin it "
    )
    with pytest.raises(ValueError, match=message + "at step 91, which changes steps already done"):
        make_plan(with_steps(recipe, "glam", 200), folder, PHASES, resume=True)
    assert "glam" in make_plan(with_steps(recipe, "glam", 81), folder, PHASES, resume=True).to_train


def test_a_run_of_another_recipe_is_rejected(recipe, tmp_path):
    folder = make_folder(tmp_path, recipe)
    with pytest.raises(ValueError, match=r"other settings \(seed is 0 there and 7 now\)"):
        make_plan(dataclasses.replace(recipe, seed=7), folder, PHASES, resume=True)


def test_a_run_of_an_earlier_version_is_rejected_in_one_line(recipe, tmp_path):
    folder = make_folder(tmp_path, recipe)
    text = folder.config.read_text(encoding="utf-8").replace('"format": "mirror-modules run 2",', "")
    folder.config.write_text(text.replace('"max_grad_norm"', '"grad_norm"'), encoding="utf-8")
    with pytest.raises(ValueError, match=r"holds a run of another version of mirror-modules, .*None, not") as error:
        make_plan(recipe, folder, PHASES, resume=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["seed", "glam", "engine"])
def test_a_config_that_lacks_a_field_is_rejected(recipe, tmp_path, field):
    folder = make_folder(tmp_path, recipe)
    content = json.loads(folder.config.read_text(encoding="utf-8"))
    del content["recipe"][field]
    folder.config.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=f"written by another version, or edited: it lacks {field}"):
        make_plan(recipe, folder, PHASES, resume=True)


def test_a_run_from_before_phase_keypoints_is_read(recipe, tmp_path):
    folder = make_folder(tmp_path, recipe)
    content = json.loads(folder.config.read_text(encoding="utf-8"))
    del content["recipe"]["keypoints"]
    folder.config.write_text(json.dumps(content), encoding="utf-8")
    assert folder.read_recipe() == recipe


def test_a_nested_field_that_is_missing_is_named(recipe, tmp_path):
    folder = make_folder(tmp_path, recipe)
    content = json.loads(folder.config.read_text(encoding="utf-8"))
    del content["recipe"]["glam"]["kl_weight"], content["recipe"]["model"]["channels"]
    folder.config.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"it lacks model\.channels, glam\.kl_weight"):
        folder.read_recipe()


def test_an_ablation_is_not_a_run(recipe, tmp_path):
    folder = make_folder(tmp_path, recipe)
    content = {**json.loads(folder.config.read_text(encoding="utf-8")), "kind": "ablation"}
    folder.config.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="is not that of a single run; choose another folder"):
        make_plan(recipe, folder, PHASES, resume=True)
    assert folder.read_recipe("ablation") == recipe


def test_only_temporary_files_of_a_killed_run_are_removed(recipe, tmp_path):
    folder = make_folder(tmp_path, recipe)
    leftover, swap = tmp_path / ".config.json.a1b2c3_z", tmp_path / ".config.json.swp"
    leftover.touch()
    swap.touch()
    folder.begin(recipe)
    assert not leftover.exists()
    assert swap.exists()
