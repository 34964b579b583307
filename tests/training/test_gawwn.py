"""GAWWN's phase `glam`: locations in its batches, its losses by the published formulas, and whole runs."""

import copy
import dataclasses
import json

import pytest
import torch
from torch.nn.functional import softplus
from torch.testing import assert_close

from mirror_modules.data import CaptionBatch, prepare_captions
from mirror_modules.data.flowers.drawing import POINT_NAMES
from mirror_modules.evaluation.evaluation import evaluate
from mirror_modules.models import EncoderPair, TextToImage, build_model
from mirror_modules.stem import Vocabulary
from mirror_modules.training import engine
from mirror_modules.training.batches import load_splits
from mirror_modules.training.loop import train
from mirror_modules.training.recipes import DataRecipe, Recipe, get_recipe
from mirror_modules.training.state import start
from mirror_modules.training.step import adversarial_step, divide, generate, update_discriminators, update_generator
from tests.runs import drawn_batch, make_tiny_recipe

VOCABULARY = Vocabulary([f"word{i}" for i in range(19)])
B, L, K = 6, 7, len(POINT_NAMES)
PLACES = pytest.mark.parametrize("place", ["box", "points"])


def make_recipe(place, **changes):
    recipe = make_tiny_recipe("gawwn-demo" if place == "box" else "gawwn-points-demo")
    model = dataclasses.replace(recipe.model, channels=4)
    return dataclasses.replace(recipe, model=model, glam=dataclasses.replace(recipe.glam, **changes))


def still(place, **changes):
    """A recipe whose networks stay as they are."""
    options = {"generator_learning_rate": 1e-30, "discriminator_learning_rate": 1e-30, "max_grad_norm": None}
    return make_recipe(place, **{**options, **changes})


def make_batch():
    random = torch.Generator().manual_seed(1)
    word_mask = torch.arange(L) < torch.tensor([7, 3, 1, 5, 2, 4])[:, None]
    tokens = torch.randint(3, len(VOCABULARY), (B, L), generator=random) * word_mask
    images = torch.rand(B, 3, 32, 32, generator=random) * 2 - 1
    boxes = torch.rand(B, 4, generator=random) / 2 + 0.1
    boxes[2] = torch.nan
    points = torch.rand(B, K, 3, generator=random)
    points[..., 2] = points[..., 2].round()
    rows, class_ids = torch.arange(B), torch.tensor([0, 1, 2, 0, 4, 2])
    return CaptionBatch(images, tokens, word_mask, class_ids, ("",) * B, rows, rows, rows, boxes, points)


def make_state(recipe, vocabulary=VOCABULARY):
    torch.manual_seed(0)
    pair = EncoderPair(recipe.model, len(vocabulary))
    return start(build_model(recipe.model, vocabulary), recipe, torch.Generator().manual_seed(2), pair=pair)


@PLACES
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_each_part_of_a_batch_has_its_locations(place, accumulate):
    recipe, batch = still(place, accumulate=accumulate), make_batch()
    state = make_state(recipe)
    parts = divide(state, batch, recipe.glam)
    # The data know which points are hidden: none is missing, or the model would draw it.
    hidden = torch.tensor([0.0, 0.0, 1.0]) * (batch.points[..., 2:] == 0)
    expected = (
        batch.points - hidden
        if place == "points"
        else batch.boxes.where(batch.boxes.isfinite(), torch.tensor([0.1, 0.1, 0.8, 0.8]))
    )
    assert torch.equal(torch.cat([part.location for part in parts]), expected)


@PLACES
def test_the_losses_are_those_of_the_published_system(place):
    recipe = still(place)
    state = make_state(recipe)
    (part,) = parts = divide(state, make_batch(), recipe.glam)
    fake = generate(state, part)
    system = state.generator.module.system[0]
    # In training mode, a second forward pass has the same batch statistics.
    again = system.images(part.noise, [part.sentence], part.words, part.word_mask, part.location).images[0]
    assert_close(again, fake.images[0])
    assert fake.conditions == []
    assert_close(fake.text, part.sentence)

    # y is -log D and n is -log(1 - D): the real image with a wrong sentence keeps its place.
    discriminator = copy.deepcopy(state.paired_discriminators[0])
    features = discriminator.features(part.real[0])
    real = discriminator.logits(features, part.sentence, part.location).consistency
    wrong_sentence = part.sentence[part.partners]
    rows = part.mismatched_rows
    wrong = discriminator.logits(features[rows], wrong_sentence, part.location[rows]).consistency
    fake_logits = discriminator(fake.images[0].detach(), part.sentence, part.location).consistency
    expected = softplus(-real).mean() + (softplus(wrong).mean() + softplus(fake_logits).mean()) / 2
    losses = update_discriminators(state, parts, [fake], recipe.glam, [])
    assert_close(losses["discriminator_32"], expected.detach(), rtol=1e-5, atol=1e-6)
    losses = update_generator(state, parts, [fake], recipe.glam, [])
    assert_close(losses["generator_32"], softplus(-fake_logits).mean().detach(), rtol=1e-5, atol=1e-6)
    assert_close(losses["generator_total"], losses["generator_32"])


@PLACES
def test_a_step_trains_the_generator_and_the_discriminator(place):
    recipe = make_recipe(place, generator_learning_rate=1e-3, discriminator_learning_rate=1e-3)
    state = make_state(recipe)
    before = copy.deepcopy(state.model.state_dict())
    old = copy.deepcopy(state.paired_discriminators[0].state_dict())
    for _ in range(2):
        assert bool(adversarial_step(state, make_batch(), recipe.glam).finite)
    changed = {name for name, value in state.model.state_dict().items() if not torch.equal(before[name], value)}
    assert all(name.startswith("generator.") for name in changed)
    assert {name for name, _ in state.model.named_parameters() if name.startswith("generator.")} <= changed
    for name, parameter in state.paired_discriminators[0].named_parameters():
        assert not torch.equal(old[name], parameter), name


@PLACES
def test_the_losses_of_both_sides_decrease_on_drawn_flowers(place):
    recipe = make_recipe(place, generator_learning_rate=1e-30, discriminator_learning_rate=2e-3)
    vocabulary, batch = drawn_batch(recipe)
    state = make_state(recipe, vocabulary)
    losses = [adversarial_step(state, batch, recipe.glam).losses["discriminator_32"] for _ in range(100)]
    # A discriminator of three channels learns little in so many steps.
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])
    recipe = make_recipe(place, generator_learning_rate=5e-3, discriminator_learning_rate=1e-30)
    state = make_state(recipe, vocabulary)
    losses = [adversarial_step(state, batch, recipe.glam).losses["generator_total"] for _ in range(100)]
    # Nor can its untrained weights tell images far apart.
    assert sum(losses[-5:]) < sum(losses[:5])


class Stopped(Exception):
    """Ends a run in the middle of a step."""


@PLACES
def test_a_run_trains_resumes_bit_for_bit_loads_and_is_evaluated(place, tmp_path, monkeypatch):
    recipe = make_recipe(place)
    recipe = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, scatter=True, augment=True),
        engine=dataclasses.replace(recipe.engine, checkpoint_every=2),
        logging=dataclasses.replace(recipe.logging, validate_every=3),
    )
    finished = train(recipe, tmp_path / "finished")
    record = engine.PhaseRun.record

    def stop(self, result):
        if (self.phase, self.step) == ("glam", 2):
            raise Stopped
        record(self, result)

    with monkeypatch.context() as patch:
        patch.setattr(engine.PhaseRun, "record", stop)
        with pytest.raises(Stopped):
            train(recipe, tmp_path / "stopped", phases=[each for each in recipe.phases if each != "evaluator"])
    resumed = train(recipe, tmp_path / "stopped", phases=["glam"], resume=True)
    assert (resumed.model / "model.safetensors").read_bytes() == (finished.model / "model.safetensors").read_bytes()
    assert finished.read_recipe() == recipe
    model = TextToImage.from_pretrained(finished.model)
    assert model.config == recipe.model
    metrics = evaluate(finished.path, fit_classifier=False)
    assert finished.report.exists()
    overlap = metrics["box_overlap"]
    assert set(overlap) == {"generated", "real", "shuffled"}
    assert overlap["real"]["mean"] > 0.8
    assert 0 <= overlap["generated"]["mean"] < overlap["real"]["mean"]
    assert all(0 <= each["standard_error"] < 0.1 for each in overlap.values())
    # Colors are measured at the boxes: right for real images.
    colors = metrics["attributes"]["real"]["measured_colors"]
    assert set(metrics["attributes"]["real"]) == {"measured_colors"}
    assert colors["petal_color"]["share"] > 0.9


def test_data_without_places_are_refused_before_training(tmp_path):
    pytest.importorskip("PIL.Image")
    from tests.layouts import make_folder

    root = make_folder(tmp_path / "data", training=12, validation=12)
    recipe = dataclasses.replace(make_recipe("box"), data=DataRecipe(source="folder", path=str(root)))
    with pytest.raises(
        ValueError, match=r"the system 'gawwn' places its subject, but the training images have neither"
    ):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_places_of_images_that_are_not_trained_on_do_not_count(tmp_path):
    pytest.importorskip("PIL.Image")
    from tests.layouts import make_birds

    prepare_captions(make_birds(tmp_path / "data", training=13, validation=11), tmp_path / "cache", resolution=32)
    lines = tmp_path / "cache" / "train.jsonl"
    first, second, *rest = (json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines())
    rows = [first | {"box": None}, second, *(row | {"box": None} for row in rest)]
    lines.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    recipe = make_recipe("box")
    # Two of thirteen, which are the first and the seventh.
    data = DataRecipe(source="prepared", path=str(tmp_path / "cache"), training_images=2, held_out_share=0.0)
    assert load_splits(dataclasses.replace(data, training_images=None), recipe.model, 0).training.boxes is not None
    with pytest.raises(ValueError, match=r"'gawwn' places its subject, but the training images have neither"):
        load_splits(data, recipe.model, 0)


@pytest.mark.parametrize(("name", "place"), [("gawwn-demo", "box"), ("gawwn-points-demo", "points")])
def test_the_recipes(name, place):
    recipe = get_recipe(name)
    assert recipe.model.place == place
    assert recipe.data.scatter
    assert recipe.model.discriminator_normalization == "spectral"
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    if place == "points":
        assert recipe.model.point_names == POINT_NAMES


def test_photographs_cannot_be_scattered():
    message = r"DataRecipe: scatter=True has no effect with source='birds'; leave scatter at False"
    with pytest.raises(ValueError, match=message):
        DataRecipe(source="birds", scatter=True)
