"""Phase `keypoints`: its losses by the published formulas, its draws, what it trains, and whole runs."""

import copy
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import softplus
from torch.testing import assert_close

from mirror_modules.data import CaptionBatch, InMemoryCaptions, RepeatableBatches, SyntheticFlowers
from mirror_modules.data.flowers.drawing import POINT_NAMES
from mirror_modules.functional import mismatch
from mirror_modules.models import build_model
from mirror_modules.stem import Vocabulary
from mirror_modules.training import engine
from mirror_modules.training.distributed import SINGLE_PROCESS
from mirror_modules.training.loop import train
from mirror_modules.training.pretrain import keypoint_step, start_keypoints
from mirror_modules.training.recipes import KeypointRecipe, Recipe, get_recipe
from tests.runs import make_tiny_recipe

VOCABULARY = Vocabulary([f"word{i}" for i in range(19)])
B, L, K = 7, 5, len(POINT_NAMES)
CLASSES = (0, 1, 2, 0, 4, 2, 3)


def make_recipe(**changes):
    recipe = make_tiny_recipe("gawwn-points-demo")
    return dataclasses.replace(recipe, keypoints=dataclasses.replace(recipe.keypoints, **changes))


# A rate at which the networks stay as they are.
STILL = {"generator_learning_rate": 1e-30, "discriminator_learning_rate": 1e-30}


def make_batch(class_ids=CLASSES):
    random, count = torch.Generator().manual_seed(1), len(class_ids)
    word_mask = torch.arange(L) < torch.randint(1, L + 1, (count, 1), generator=random)
    word_mask[0] = True
    tokens = torch.randint(3, len(VOCABULARY), (count, L), generator=random) * word_mask
    points = torch.rand(count, K, 3, generator=random)
    points *= (points[..., 2:] > 0.3).float()
    points[..., 2] = points[..., 2].ceil()
    images, rows, class_ids = torch.zeros(count, 3, 32, 32), torch.arange(count), torch.tensor(class_ids)
    return CaptionBatch(images, tokens, word_mask, class_ids, ("",) * count, rows, rows, rows, None, points)


def make_state(recipe, vocabulary=VOCABULARY):
    torch.manual_seed(0)
    model = build_model(recipe.model, vocabulary)
    random = torch.Generator().manual_seed(2)
    return model, start_keypoints(model, recipe.keypoints, recipe.engine, random, SINGLE_PROCESS)


def draws(count, noise_dim, class_ids, caption_ids):
    """The random draws of a step, in their order."""
    random = torch.Generator().manual_seed(2)
    noise, uniform = torch.randn(count, noise_dim, generator=random), torch.rand(count, K, generator=random)
    return noise, uniform, mismatch(torch.tensor(class_ids), caption_ids, generator=random)


def losses_by_loops(model, state, batch):
    """The losses of discriminator and generator, row by row: y is -log D, and n is -log(1 - D)."""
    generator, discriminator = (
        copy.deepcopy(part) for part in (model.keypoint_generator, state.discriminator.module.discriminator)
    )
    class_ids = batch.class_ids.tolist()
    noise, uniform, (partner, _) = draws(len(class_ids), generator.noise_dim, class_ids, batch.caption_ids)
    sentence = model.text_encoder(batch.tokens, batch.word_mask).sentence.detach()
    given = torch.zeros_like(batch.points)
    for row in range(len(class_ids)):
        for point in range(K):
            if uniform[row, point] >= 0.9:
                given[row, point] = batch.points[row, point]
    completed = generator(noise, sentence, given)
    real = discriminator(batch.points, sentence).consistency
    fake = discriminator(completed, sentence).consistency
    wrong = discriminator(batch.points, torch.stack([sentence[j] for j in partner.tolist()])).consistency
    captions = batch.caption_ids.tolist()
    pairs = [i for i, j in enumerate(partner.tolist()) if class_ids[i] != class_ids[j] and captions[i] != captions[j]]
    loss = sum(softplus(-logit) for logit in real) / len(real)
    loss = loss + sum(softplus(logit) for logit in fake) / len(fake) / 2
    if pairs:
        loss = loss + sum(softplus(wrong[i]) for i in pairs) / len(pairs) / 2
    return loss, sum(softplus(-logit) for logit in fake) / len(fake), generator, discriminator


@pytest.mark.parametrize("class_ids", [CLASSES, (0, 0, 0, 0, 0, 2, 1), (3,) * B])
def test_losses_and_gradients_are_those_of_the_formulas(class_ids):
    recipe, batch = make_recipe(**STILL), make_batch(class_ids)
    model, state = make_state(recipe)
    of_discriminator, of_generator, generator, discriminator = losses_by_loops(model, state, batch)
    result = keypoint_step(state, batch)
    assert result.finite
    assert_close(result.losses["discriminator"], of_discriminator.detach(), rtol=1e-5, atol=1e-6)
    assert_close(result.losses["generator"], of_generator.detach(), rtol=1e-5, atol=1e-6)
    # Neither network gets a gradient from the loss of the other.
    for loss, copied, trained in (
        (of_discriminator, discriminator, state.discriminator.module.discriminator),
        (of_generator, generator, model.keypoint_generator),
    ):
        expected = torch.autograd.grad(loss, list(copied.parameters()), retain_graph=True)
        for (name, parameter), gradient in zip(trained.named_parameters(), expected):
            assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6, msg=name)
            assert parameter.requires_grad


def test_a_caption_of_two_classes_is_never_mismatched():
    recipe, batch = make_recipe(**STILL), make_batch(tuple(range(B)))
    batch = batch._replace(caption_ids=torch.full((B,), 5))
    model, state = make_state(recipe)
    of_discriminator, *_ = losses_by_loops(model, state, batch)
    # Without pairs, the loss has no third term.
    assert_close(keypoint_step(state, batch).losses["discriminator"], of_discriminator.detach(), rtol=1e-5, atol=1e-6)


def spy(network):
    """Record the arguments and the result of a network's forward passes in training."""
    calls, module = [], network.parallel
    network.parallel = lambda *arguments: calls.append([*arguments, module(*arguments)]) or calls[-1][-1]
    return calls


def test_a_tenth_of_the_points_is_given_and_kept():
    recipe, count = make_recipe(), 211
    _, state = make_state(recipe)
    batch = make_batch(tuple(range(count)))
    generated, judged = spy(state.generator), spy(state.discriminator)
    keypoint_step(state, batch)
    _, _, given, completed = generated[0]
    visible = batch.points[..., 2] > 0
    is_given = given[..., 2] > 0
    assert torch.equal(given[is_given], batch.points[is_given])
    assert torch.equal(given[~is_given], torch.zeros_like(given[~is_given]))
    # Three standard errors of a share of 0.1 among all visible points.
    share, error = is_given[visible].float().mean(), (0.09 / visible.sum()) ** 0.5
    assert abs(share - 0.1) < 3 * error
    assert torch.equal(completed[is_given], batch.points[is_given])
    real, fake, *_ = judged[0]
    assert torch.equal(real, batch.points)
    assert torch.equal(fake, completed.detach())


def test_a_step_trains_both_networks_and_nothing_else():
    model, state = make_state(make_recipe(generator_learning_rate=1e-3, discriminator_learning_rate=1e-3))
    before, opponent = copy.deepcopy(model.state_dict()), copy.deepcopy(state.discriminator.module.state_dict())
    for _ in range(2):
        assert keypoint_step(state, make_batch()).finite
    changed = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
    assert changed >= {f"keypoint_generator.{name}" for name, _ in model.keypoint_generator.named_parameters()}
    assert all(name.startswith("keypoint_generator.") for name in changed)
    for name, parameter in state.discriminator.module.named_parameters():
        assert not torch.equal(opponent[name], parameter), name


def test_a_step_that_is_not_finite_changes_nothing():
    model, state = make_state(make_recipe())
    before = copy.deepcopy([model.state_dict(), state.discriminator.module.state_dict()])
    batch = make_batch()
    batch.points[3, 0] = torch.inf
    assert not keypoint_step(state, batch).finite
    after = [model.state_dict(), state.discriminator.module.state_dict()]
    for old, new in zip(before, after):
        assert all(torch.equal(old[name], value) for name, value in new.items())


def energy_distance(one, other):
    """Zero for equal distributions of the rows only (Székely and Rizzo, 2013)."""
    one, other = one.flatten(1), other.flatten(1)
    within = sum(torch.cdist(each, each).sum() / len(each) / (len(each) - 1) for each in (one, other))
    return 2 * torch.cdist(one, other).mean() - within


def test_completed_points_approach_the_distribution_of_drawn_flowers():
    recipe = make_recipe(generator_learning_rate=3e-3, discriminator_learning_rate=3e-3)
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, keypoint_hidden_dim=64))
    flowers = InMemoryCaptions(SyntheticFlowers(353, resolution=24, scatter=True), max_words=18)
    model, state = make_state(recipe, flowers.vocabulary)
    batches = RepeatableBatches(flowers, 61, seed=0, with_images=False)
    sentence, count = model.text_encoder(flowers.tokens, flowers.word_mask).sentence, len(flowers)
    sentence = sentence[flowers.caption_rows(torch.arange(count), torch.zeros(count, dtype=torch.long))].detach()
    noise = torch.randn(count, model.config.noise_dim, generator=torch.Generator().manual_seed(3))

    def distance():
        model.eval()
        completed = model.complete_location(None, sentence, noise).detach()
        model.keypoint_generator.train()
        return energy_distance(completed, flowers.points)

    untrained = distance()
    for number in range(100):
        assert keypoint_step(state, batches[number]).finite
    assert distance() < untrained / 2


class Stopped(Exception):
    """Ends a run in the middle of a step."""


PHASES = ["stem", "stream", "keypoints"]


def test_a_run_resumes_bit_for_bit_and_glam_takes_the_weights(tmp_path, monkeypatch):
    recipe = make_recipe(steps=5)
    data = dataclasses.replace(recipe.data, scatter=True, augment=True)
    recipe = dataclasses.replace(recipe, data=data, engine=dataclasses.replace(recipe.engine, checkpoint_every=2))
    finished = train(recipe, tmp_path / "finished", phases=PHASES)
    record = engine.PhaseRun.record

    def stop(self, result):
        if (self.phase, self.step) == ("keypoints", 3):
            raise Stopped
        record(self, result)

    with monkeypatch.context() as patch:
        patch.setattr(engine.PhaseRun, "record", stop)
        with pytest.raises(Stopped):
            train(recipe, tmp_path / "stopped", phases=PHASES)
    with pytest.raises(ValueError, match="phase 'keypoints' after 2 of 5 steps; continue with --resume"):
        train(recipe, tmp_path / "stopped", phases=["keypoints"])
    resumed = train(recipe, tmp_path / "stopped", phases=["keypoints"], resume=True)
    assert finished.weights("keypoints").read_bytes() == resumed.weights("keypoints").read_bytes()

    def figures(folder):
        lines = [json.loads(line) for line in folder.log.read_text().splitlines()]
        return [
            {name: value for name, value in line.items() if name not in ("seconds", "waited")}
            for line in lines
            if line["phase"] == "keypoints"
        ]

    assert figures(finished) == figures(resumed)
    assert [line["step"] for line in figures(finished)] == [1, 2, 3, 4, 5]
    losses = {"generator", "discriminator", "generator_gradient_norm", "discriminator_gradient_norm"}
    assert {*losses, "learning_rate_generator", "learning_rate_discriminator"} <= set(figures(finished)[0])

    # A finished phase can be extended.
    shorter = dataclasses.replace(recipe, keypoints=dataclasses.replace(recipe.keypoints, steps=3))
    train(shorter, tmp_path / "extended", phases=PHASES)
    extended = train(recipe, tmp_path / "extended", phases=["keypoints"], resume=True)
    assert finished.weights("keypoints").read_bytes() == extended.weights("keypoints").read_bytes()
    assert figures(finished) == figures(extended)

    train(recipe, tmp_path / "finished", phases=["glam"])
    trained, whole = load_file(finished.weights("keypoints")), load_file(finished.model / "model.safetensors")
    for name, value in trained.items():
        assert torch.equal(whole[f"keypoint_generator.{name}"], value), name
    assert not any("keypoint_generator" in name for name in load_file(finished.weights("glam")))


def test_the_phase_comes_before_glam_which_needs_it(tmp_path):
    recipe = make_recipe()
    assert recipe.phases == ("stem", "stream", "keypoints", "glam", "evaluator")
    with pytest.raises(ValueError, match=r"phase 'keypoints' needs phase 'stem', which .* lacks; train it too"):
        train(recipe, tmp_path / "run", phases=["keypoints"])
    with pytest.raises(ValueError, match=r"phase 'glam' needs phase 'keypoints', which .* lacks; train it too"):
        train(recipe, tmp_path / "run", phases=["stem", "stream", "glam"])
    with pytest.raises(ValueError, match=r"unknown phase 'keypoints'; choose from .* the recipe's field keypoints\."):
        train(make_tiny_recipe("gawwn-demo"), tmp_path / "run", phases=["keypoints"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("demo", {"keypoints": {"steps": 3}}, r"'mirrorgan' does not complete .* keypoints is .*; leave keypoints out"),
        ("gawwn-demo", {"keypoints": {}}, r"'gawwn' does not complete missing key points, .*; leave keypoints out"),
        ("gawwn-demo", {"model": {"place": "points"}}, r"'gawwn' completes .*, but keypoints is None; give it one"),
        ("gawwn-points-demo", {"keypoints": None}, r"'gawwn' completes .*, but keypoints is None; give it one"),
        ("gawwn-points-demo", {"keypoints": {"glam": 3}}, r"unknown field 'keypoints\.glam'"),
        ("gawwn-demo", {"model": {"keypoint_hidden_dim": 8}}, r"keypoint_hidden_dim=8 has no effect with place='box'"),
    ],
)
def test_recipes_that_do_not_fit_the_system_are_refused(name, fields, message):
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict(fields, get_recipe(name))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, but it is 0"),
        ({"batch_size": 2.5}, "batch_size must be a whole number of at least 1, but it is 2.5"),
        ({"generator_learning_rate": 0.0}, "generator_learning_rate must be above 0, but it is 0.0"),
        ({"discriminator_learning_rate": -1.0}, "discriminator_learning_rate must be above 0, but it is -1.0"),
    ],
)
def test_invalid_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=f"KeypointRecipe: {message}"):
        KeypointRecipe(**fields)


def test_the_recipe_is_stored_and_read():
    recipe = get_recipe("gawwn-points-demo")
    assert isinstance(recipe.keypoints, KeypointRecipe)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
