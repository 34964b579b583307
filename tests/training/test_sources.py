"""Each format of data on disk is trained on and evaluated, damaged files and all."""

import dataclasses

import pytest
import torch

from mirror_modules.training.batches import load_splits
from mirror_modules.training.evaluation import evaluate
from mirror_modules.training.loop import train
from mirror_modules.training.recipes import DataRecipe, EvaluationRecipe, Recipe, differences
from tests.layouts import MAKERS, make_coco, make_folder


def on_disk(recipe, root, **changes):
    data = DataRecipe(path=str(root), training_images=None, validation_images=None, augment=True, **changes)
    evaluation = EvaluationRecipe(candidates=5, report_images=2)
    phases = {
        phase: dataclasses.replace(getattr(recipe, phase), steps=2, batch_size=6)
        for phase in ("stem", "stream", "glam", "judge")
    }
    return dataclasses.replace(recipe, data=data, evaluation=evaluation, **phases)


def split_sizes(recipe):
    splits = load_splits(recipe.data, recipe.model, recipe.seed)
    return len(splits.training), len(splits.validation)


@pytest.mark.parametrize("source", ["birds", "coco", "folder", "webdataset"])
def test_every_source_is_trained_on_and_evaluated(tiny_recipe, tmp_path, source):
    root = MAKERS[source](tmp_path / "data", training=21, validation=7)
    # Captions of the made data have ten words.
    model = dataclasses.replace(tiny_recipe.model, max_words=6)
    recipe = dataclasses.replace(on_disk(tiny_recipe, root, source=source, long_captions="subsample"), model=model)
    train(recipe, tmp_path / "run")
    metrics = evaluate(tmp_path / "run")
    assert metrics["images"] == 7
    assert 0 <= metrics["r_precision"]["generated"]["top1"] <= 1
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("source", MAKERS)
def test_auto_reads_what_the_name_reads(tiny_recipe, tmp_path, source):
    root = MAKERS[source](tmp_path, training=5, validation=3)
    named, found = (
        load_splits(recipe.data, recipe.model, recipe.seed)
        for recipe in (on_disk(tiny_recipe, root, source=each) for each in (source, "auto"))
    )
    for one, other in ((named.training, found.training), (named.validation, found.validation)):
        assert torch.equal(one.images, other.images)
        assert one.captions == other.captions
    assert named.training.images.shape == (5, 19, 19, 3)
    assert named.validation.images.shape == (3, 16, 16, 3)


def test_real_samples_are_trained_on_and_evaluated(tiny_recipe, tmp_path, real_sample):
    data = DataRecipe(source="auto", path=str(real_sample), training_images=24, validation_images=16, augment=True)
    recipe = dataclasses.replace(tiny_recipe, data=data)
    train(recipe, tmp_path / "run")
    metrics = evaluate(tmp_path / "run")
    assert metrics["left_out"] == {"training": 0, "validation": 0}
    assert 0 <= metrics["r_precision"]["generated"]["top1"] <= 1


def test_a_damaged_file_ends_the_loading_or_is_counted(tiny_recipe, tmp_path, capsys):
    root = make_coco(tmp_path, training=41, validation=7)
    for number in (3, 11):
        (root / "train2017" / f"{number:012}.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"03.jpg cannot be read as an image .it is empty.; mend it, or leave it out"):
        split_sizes(on_disk(tiny_recipe, root, source="coco"))
    assert capsys.readouterr().out == ""
    assert split_sizes(on_disk(tiny_recipe, root, source="coco", on_error="skip")) == (39, 7)
    printed = capsys.readouterr().out
    assert printed.startswith("training images: 2 left out, 39 read: ")
    assert printed.count("cannot be read as an image (it is empty)") == 2
    (root / "train2017" / f"{7:012}.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="3 samples cannot be read, more than 5% of them"):
        split_sizes(on_disk(tiny_recipe, root, source="coco", on_error="skip"))


def test_only_training_captions_are_subsampled(tiny_recipe, tmp_path):
    root = make_folder(tmp_path)
    model = dataclasses.replace(tiny_recipe.model, max_words=4)
    recipe = on_disk(tiny_recipe, root, source="folder", long_captions="subsample")
    splits = load_splits(recipe.data, model, recipe.seed)
    assert len(splits.training.long_tokens) == 18
    assert not splits.validation.long_tokens


def test_what_a_damaged_file_does_decides_how_a_run_comes_out(tiny_recipe):
    changes = {"on_error": "skip", "long_captions": "subsample", "path": "elsewhere"}
    other = dataclasses.replace(tiny_recipe, data=dataclasses.replace(tiny_recipe.data, **changes))
    found = dict(differences(tiny_recipe, other))
    assert found == {
        "data.path is None there and 'elsewhere' now": True,
        "data.on_error is 'stop' there and 'skip' now": False,
        "data.long_captions is 'cut' there and 'subsample' now": False,
    }
    fields = tiny_recipe.to_dict()
    fields["data"]["on_error"] = "list"
    with pytest.raises(ValueError, match=r"data\.on_error must be 'stop' or 'skip', but it is 'list'"):
        Recipe.from_dict(fields)
