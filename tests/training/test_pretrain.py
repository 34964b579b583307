"""Phases `stem` and `stream`: what learns, what stands still, and that learning lowers the loss."""

import copy
import dataclasses

import pytest
import torch

from mirror_modules import MirrorGAN
from mirror_modules.data import CaptionBatch
from mirror_modules.stem import Vocabulary
from mirror_modules.training import pretrain
from mirror_modules.training.pretrain import EncoderPair, Reader, captioning_step, matching_step, start_pretraining
from mirror_modules.training.recipes import EngineRecipe
from mirror_modules.training.trainee import enroll
from mirror_modules.training.world import ALONE

B, L, V = 5, 7, 22


@pytest.fixture
def batch():
    random = torch.Generator().manual_seed(1)
    word_mask = torch.arange(L) < torch.tensor([[7], [3], [1], [5], [2]])
    tokens = torch.randint(3, V, (B, L), generator=random) * word_mask
    images = torch.rand(B, 3, 16, 16, generator=random) * 2 - 1
    rows = torch.arange(B)
    return CaptionBatch(images, tokens, word_mask, rows, ("",) * B, rows, rows)


def fit(step, module, batch, recipe):
    """The losses of a phase that sees one batch over and over."""
    state = start_pretraining(module, recipe, EngineRecipe(), ALONE)
    return [step(state, batch, recipe).losses for _ in range(recipe.steps)]


def make_captioner(recipe):
    torch.manual_seed(0)
    return MirrorGAN(recipe.model, Vocabulary([f"word{i}" for i in range(V - 3)])).captioner


def with_frozen_eye(captioner):
    captioner.image_encoder.requires_grad_(False).eval()
    return captioner


def moved(before, module):
    return {name for name, tensor in module.state_dict().items() if not torch.equal(before[name], tensor)}


def test_the_encoders_learn_as_one(tiny_recipe, batch):
    pair = EncoderPair(tiny_recipe.model, V)
    before = copy.deepcopy(pair.state_dict())
    losses = fit(matching_step, pair, batch, dataclasses.replace(tiny_recipe.stem, steps=40))
    assert {name for name, _ in pair.named_parameters()} <= moved(before, pair)
    names = ["caption_by_sentence", "image_by_sentence", "caption_by_words", "image_by_words"]
    assert all(losses[-1][name] < losses[0][name] for name in names)


def test_without_weight_words_are_not_matched(tiny_recipe, batch, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("matched")

    monkeypatch.setattr(pretrain, "word_region_similarity", refuse)
    recipe = dataclasses.replace(tiny_recipe.stem, word_weight=0.0)
    losses = fit(matching_step, EncoderPair(tiny_recipe.model, V), batch, recipe)
    assert losses[0].keys() == {"caption_by_sentence", "image_by_sentence", "gradient_norm"}


def test_words_are_matched_in_a_part_of_the_batch(tiny_recipe, batch, monkeypatch):
    sizes = []

    def similarity(regions, words, word_mask):
        sizes.append((len(regions), len(words), len(word_mask)))
        return inner(regions, words, word_mask)

    inner = pretrain.word_region_similarity
    monkeypatch.setattr(pretrain, "word_region_similarity", similarity)
    recipe = dataclasses.replace(tiny_recipe.stem, word_pairs=3, steps=2)
    fit(matching_step, EncoderPair(tiny_recipe.model, V), batch, recipe)
    assert sizes == [(3, 3, 3)] * 2


def test_the_captioner_learns_and_its_eye_stands_still(tiny_recipe, batch):
    captioner = with_frozen_eye(make_captioner(tiny_recipe))
    before = copy.deepcopy(captioner.state_dict())
    losses = fit(captioning_step, Reader(captioner), batch, dataclasses.replace(tiny_recipe.stream, steps=40))
    changed = moved(before, captioner)
    assert not any(name.startswith("image_encoder.") for name in changed)
    learning = {name for name, _ in captioner.named_parameters() if not name.startswith("image_encoder.")}
    # The embedding's row of the end token is never an input, yet the tensor as a whole moves.
    assert learning <= changed
    assert losses[-1]["cross_entropy"] < 0.8 * losses[0]["cross_entropy"]


def test_the_captioners_eye_learns_if_asked(tiny_recipe, batch):
    captioner = make_captioner(tiny_recipe)
    before = copy.deepcopy(captioner.state_dict())
    fit(captioning_step, Reader(captioner), batch, tiny_recipe.stream)
    assert any(name.startswith("image_encoder.") for name in moved(before, captioner))


def test_what_was_seen_before_is_what_would_be_seen_now(tiny_recipe, batch):
    captioner = with_frozen_eye(make_captioner(tiny_recipe))
    with torch.no_grad():
        seen = captioner.image_encoder(batch.images).image[[3, 1, 4, 0, 2]]
    rows = torch.tensor([3, 1, 4, 0, 2]).argsort()
    losses = [
        fit(captioning_step, reader, batch._replace(image_rows=rows), tiny_recipe.stream)
        for reader in (Reader(copy.deepcopy(captioner)), Reader(captioner, seen))
    ]
    for alone, cached in zip(*losses):
        torch.testing.assert_close(alone["cross_entropy"], cached["cross_entropy"])


def test_the_captioner_learns_where_a_caption_ends(tiny_recipe, batch, monkeypatch):
    seen = []

    def loss(logits, tokens, word_mask):
        seen.append((tokens, word_mask))
        return inner(logits, tokens, word_mask)

    inner = pretrain.redescription_loss
    monkeypatch.setattr(pretrain, "redescription_loss", loss)
    recipe = dataclasses.replace(tiny_recipe.stream, steps=1)
    fit(captioning_step, Reader(make_captioner(tiny_recipe)), batch, recipe)
    tokens, word_mask = seen[0]
    for row, words in zip(range(B), (7, 3, 1, 5, 2)):
        assert tokens[row, :words].tolist() == batch.tokens[row, :words].tolist()
        assert tokens[row, words] == 1
        assert int(word_mask[row].sum()) == words + 1


def test_parts_of_a_batch_make_the_mean_of_the_whole(tiny_recipe, batch):
    """Parts have different numbers of words; without batch norm in training mode nothing else ties them together."""
    gradients, values = [], []
    for accumulate in (1, 2, 5):
        reader = Reader(with_frozen_eye(make_captioner(tiny_recipe)).eval())
        recipe = dataclasses.replace(tiny_recipe.stream, accumulate=accumulate, largest_gradient_norm=None)
        state = start_pretraining(reader, recipe, EngineRecipe(), ALONE)
        values.append(captioning_step(state, batch, recipe).losses["cross_entropy"])
        gradients.append([p.grad for p in reader.parameters() if p.grad is not None])
    for other, value in zip(gradients[1:], values[1:]):
        torch.testing.assert_close(value, values[0])
        torch.testing.assert_close(other, gradients[0])


@pytest.mark.parametrize("largest", [0.01, None])
def test_gradients_are_clipped(tiny_recipe, batch, largest):
    pair = EncoderPair(tiny_recipe.model, V)
    recipe = dataclasses.replace(tiny_recipe.stem, steps=1, largest_gradient_norm=largest)
    norm = fit(matching_step, pair, batch, recipe)[0]["gradient_norm"]
    last = torch.cat([parameter.grad.flatten() for parameter in pair.parameters()]).norm()
    torch.testing.assert_close(last, norm if largest is None else torch.tensor(largest), rtol=1e-4, atol=0)


@pytest.mark.parametrize("steps", range(1, 12))
def test_the_step_size_cycles_over_any_number_of_steps(steps):
    trainee = enroll(torch.nn.Linear(2, 3), ALONE, EngineRecipe(), learning_rate=0.5, cycle=steps)
    sizes = []
    for _ in range(steps):
        trainee.optimizer.zero_grad()
        loss = trainee.parallel(torch.ones(1, 2)).sum()
        trainee.backward(loss)
        trainee.descend(loss)
        sizes.append(trainee.learning_rate)
    assert all(0 < size <= 0.5 for size in sizes)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision_learns_without_an_infinity(tiny_recipe, batch, precision):
    pair = EncoderPair(tiny_recipe.model, V)
    recipe = dataclasses.replace(tiny_recipe.stem, steps=20)
    state = start_pretraining(pair, recipe, EngineRecipe(precision=precision), ALONE)
    outcomes = [matching_step(state, batch, recipe) for _ in range(recipe.steps)]
    # The scale of a float16 loss is found by trying.
    settled = outcomes[10:] if precision == "float16" else outcomes
    assert all(bool(outcome.finite) for outcome in settled)
    assert outcomes[-1].losses["caption_by_sentence"] < outcomes[0].losses["caption_by_sentence"]
