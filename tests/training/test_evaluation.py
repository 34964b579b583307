"""Evaluation: unseen captions, a judge of its own, and files that say what was measured."""

import json
import shutil

import pytest

from mirror_modules.training.batches import load_splits, unseen_captions
from mirror_modules.training.evaluation import _derangement, evaluate, read_recipe
from mirror_modules.training.folder import RunFolder


def test_measures_and_writes(run_copy):
    metrics = evaluate(run_copy.path)
    assert json.loads(run_copy.metrics.read_text()) == metrics
    assert set(metrics["r_precision"]) == set(metrics["word_accuracy"]) == {"generated", "real", "shuffled"}
    assert metrics["candidates"] == 11
    assert metrics["chance"] == pytest.approx(1 / 11)
    assert run_copy.report.read_text(encoding="utf-8").lower().startswith("<!doctype html>")
    assert list(run_copy.pictures.glob("*.png"))


def test_repeats(run_copy):
    first = evaluate(run_copy.path)
    assert evaluate(run_copy.path) == first


def test_no_evaluated_caption_was_trained_on(tiny_recipe):
    splits = load_splits(tiny_recipe.data, tiny_recipe.model, tiny_recipe.seed)
    seen = {caption for captions in splits.training.captions for caption in captions}
    unseen = unseen_captions(splits)
    assert unseen
    assert not seen & {entry.caption for entry in unseen}
    assert all(entry.caption in splits.validation.captions[entry.image] for entry in unseen)


def test_a_caption_of_the_training_split_is_passed_over(tiny_recipe):
    splits = load_splits(tiny_recipe.data, tiny_recipe.model, tiny_recipe.seed)
    splits.training.captions[0] = splits.validation.captions[5][:1]
    splits.training.captions[1] = splits.validation.captions[6]
    chosen = dict(unseen_captions(splits))
    assert chosen[5] == splits.validation.captions[5][1]
    assert 6 not in chosen


def test_the_recipe_comes_back(tiny_run, tiny_recipe):
    assert read_recipe(tiny_run) == tiny_recipe


@pytest.mark.parametrize("phase", ["stem", "stream", "glam", "judge"])
def test_a_missing_phase_is_named(run_copy, phase):
    run_copy.weights(phase).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks phase '{phase}'"):
        evaluate(run_copy.path)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a run"):
        evaluate(tmp_path)


def test_a_damaged_judge_is_named(run_copy):
    shutil.copy(run_copy.config, run_copy.weights("judge"))
    with pytest.raises(ValueError, match=r"judge\.safetensors is damaged"):
        evaluate(run_copy.path)


def test_the_config_of_something_else_is_refused(tmp_path):
    folder = RunFolder(tmp_path)
    folder.config.write_text('{"name": "other"}')
    with pytest.raises(ValueError, match="holds no recipe"):
        read_recipe(folder)


@pytest.mark.parametrize("count", [2, 3, 31])
def test_shuffled_images_all_meet_another_caption(count):
    partner = _derangement(count, seed=0)
    assert sorted(partner.tolist()) == list(range(count))
    assert all(partner[i] != i for i in range(count))
