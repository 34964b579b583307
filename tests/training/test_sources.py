"""Training and evaluation on every data format, and with damaged files."""

import dataclasses

import pytest
import torch

from mirror_modules.evaluation.evaluation import evaluate
from mirror_modules.training.batches import load_splits
from mirror_modules.training.loop import train
from mirror_modules.training.recipes import (
    PHASES,
    DataRecipe,
    EvaluationRecipe,
    Recipe,
    differences,
    from_scratch,
    get_recipe,
)
from tests.layouts import MAKERS, make_coco, make_folder, write_image


def with_data(recipe, root, **changes):
    data = DataRecipe(path=str(root), training_images=None, validation_images=None, augment=True, **changes)
    evaluation = EvaluationRecipe(candidates=5, report_images=2)
    phases = {
        phase: dataclasses.replace(getattr(recipe, phase), steps=2, batch_size=6)
        for phase in ("stem", "stream", "glam", "evaluator")
    }
    return dataclasses.replace(recipe, data=data, evaluation=evaluation, **phases)


def split_sizes(recipe):
    splits = load_splits(recipe.data, recipe.model, recipe.seed)
    return len(splits.training), len(splits.validation)


@pytest.mark.parametrize("source", ["birds", "coco", "folder", "webdataset"])
def test_a_model_is_trained_and_evaluated_on_every_source(tiny_recipe, tmp_path, source):
    root = MAKERS[source](tmp_path / "data", training=21, validation=7)
    # The generated captions have ten words, and the seventh completes the number of the image.
    model = dataclasses.replace(tiny_recipe.model, max_words=7)
    recipe = dataclasses.replace(with_data(tiny_recipe, root, source=source, long_captions="subsample"), model=model)
    train(recipe, tmp_path / "run")
    metrics = evaluate(tmp_path / "run")
    assert metrics["images"] == 7
    assert 0 <= metrics["r_precision"]["generated"]["top1"] <= 1
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("source", MAKERS)
def test_auto_recognizes_every_format(tiny_recipe, tmp_path, source):
    root = MAKERS[source](tmp_path, training=5, validation=3)
    named, recognized = (
        load_splits(recipe.data, recipe.model, recipe.seed)
        for recipe in (with_data(tiny_recipe, root, source=each) for each in (source, "auto"))
    )
    for expected, split in ((named.training, recognized.training), (named.validation, recognized.validation)):
        assert torch.equal(split.images, expected.images)
        assert split.captions == expected.captions
    assert named.training.images.shape == (5, 19, 19, 3)
    assert named.validation.images.shape == (3, 16, 16, 3)


def test_a_model_is_trained_and_evaluated_on_real_samples(tiny_recipe, tmp_path, real_sample):
    data = DataRecipe(source="auto", path=str(real_sample), training_images=24, validation_images=16, augment=True)
    recipe = dataclasses.replace(tiny_recipe, data=data)
    train(recipe, tmp_path / "run")
    metrics = evaluate(tmp_path / "run")
    assert metrics["skipped"] == {"training": 0, "validation": 0}
    assert 0 <= metrics["r_precision"]["generated"]["top1"] <= 1


def test_a_damaged_file_raises_an_error_or_is_skipped_and_counted(tiny_recipe, tmp_path, capsys):
    root = make_coco(tmp_path, training=41, validation=7)
    for number in (3, 11):
        (root / "train2017" / f"{number:012}.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"03.jpg cannot be read as an image .it is empty.; fix it, or skip it"):
        split_sizes(with_data(tiny_recipe, root, source="coco"))
    assert capsys.readouterr().out == ""
    assert split_sizes(with_data(tiny_recipe, root, source="coco", on_error="skip")) == (39, 7)
    printed = capsys.readouterr().out
    assert printed.startswith("training images: 2 skipped, 39 read: ")
    assert printed.count("cannot be read as an image (it is empty)") == 2
    (root / "train2017" / f"{7:012}.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="3 samples cannot be read, more than 5% of them"):
        split_sizes(with_data(tiny_recipe, root, source="coco", on_error="skip"))


@pytest.mark.parametrize(("training", "validation"), [(1, 2), (2, 1)])
def test_too_few_images_are_counted_and_the_necessary_number_is_named(tiny_recipe, tmp_path, training, validation):
    root = make_folder(tmp_path / "data", training=training, validation=validation)
    message = (
        f"data has {training} training and {validation} validation images, and needs at least 2 of each; add images"
    )
    with pytest.raises(ValueError, match=message + r"\."):
        train(with_data(tiny_recipe, root, source="auto"), tmp_path / "run")
    # Names whose hash chooses the first one for validation.
    for i, name in enumerate(("image4.png", "image0.png", "image1.png")):
        write_image(tmp_path / "undivided" / name, i)
        (tmp_path / "undivided" / name).with_suffix(".txt").write_text(f"a thing number {i}")
    message = r"undivided has 2 training and 1 validation images, .*; add images, or divide the folder into train/ and"
    with pytest.raises(ValueError, match=message):
        train(with_data(tiny_recipe, tmp_path / "undivided", source="auto"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("training", "validation"), [(2, 2), (10, 2), (11, 3)])
def test_a_model_is_trained_and_evaluated_on_a_few_photographs(tiny_recipe, tmp_path, capsys, training, validation):
    """Batches, pairs and candidates are more than there are images."""
    root = make_folder(tmp_path / "data", training=training, validation=validation)
    base = from_scratch(get_recipe("photos-64"))
    recipe = dataclasses.replace(
        base,
        model=tiny_recipe.model,
        **{name: dataclasses.replace(base.phase(name), steps=2) for name in PHASES},
    )
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, path=str(root)))
    train(recipe, tmp_path / "run")
    assert evaluate(tmp_path / "run")["candidates"] == validation
    printed = capsys.readouterr().err
    assert printed.count(f"batch size reduced to {training}: there are too few training images") == len(PHASES)
    assert printed.count(f"R-precision among {validation} captions instead of evaluation.candidates=100") == 2


def test_only_training_captions_are_subsampled(tiny_recipe, tmp_path):
    root = make_folder(tmp_path)
    model = dataclasses.replace(tiny_recipe.model, max_words=4)
    recipe = with_data(tiny_recipe, root, source="folder", long_captions="subsample")
    splits = load_splits(recipe.data, model, recipe.seed)
    assert len(splits.training.long_tokens) == 18
    assert not splits.validation.long_tokens


def test_data_options_that_affect_the_result_cannot_change_in_a_resumed_run(tiny_recipe):
    changes = {"on_error": "skip", "long_captions": "subsample", "path": "elsewhere"}
    recipe = with_data(tiny_recipe, "here", source="folder")
    other = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **changes))
    assert dict(differences(recipe, other)) == {
        "data.path is 'here' there and 'elsewhere' now": True,
        "data.on_error is 'stop' there and 'skip' now": False,
        "data.long_captions is 'cut' there and 'subsample' now": False,
    }
    fields = tiny_recipe.to_dict()
    fields["data"]["on_error"] = "list"
    with pytest.raises(ValueError, match=r"data\.on_error must be 'stop' or 'skip', but it is 'list'"):
        Recipe.from_dict(fields)
