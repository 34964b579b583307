"""Steps of phases `stem` and `stream`: which weights change, and that the losses decrease."""

import copy
import dataclasses

import pytest
import torch

from mirror_modules import BackboneConfig, MirrorGAN
from mirror_modules.data import CaptionBatch
from mirror_modules.models.encoder_pair import EncoderPair
from mirror_modules.stem import Vocabulary
from mirror_modules.training import pretrain
from mirror_modules.training.distributed import SINGLE_PROCESS
from mirror_modules.training.features import CachedImages, Views
from mirror_modules.training.network import prepare
from mirror_modules.training.pretrain import (
    CachedCaptioner,
    CachedPair,
    captioning_step,
    matching_step,
    start_pretraining,
)
from mirror_modules.training.recipes import EngineRecipe

B, L, V = 5, 7, 22


@pytest.fixture
def batch():
    random = torch.Generator().manual_seed(1)
    word_mask = torch.arange(L) < torch.tensor([[7], [3], [1], [5], [2]])
    tokens = torch.randint(3, V, (B, L), generator=random) * word_mask
    images = torch.rand(B, 3, 16, 16, generator=random) * 2 - 1
    rows = torch.arange(B)
    return CaptionBatch(images, tokens, word_mask, rows, ("",) * B, rows, rows, rows)


def fit(step, module, batch, recipe):
    """The losses of a phase trained on a single batch."""
    module = CachedPair(module) if isinstance(module, EncoderPair) else module
    state = start_pretraining(module, recipe, EngineRecipe(), SINGLE_PROCESS)
    return [step(state, batch, recipe).losses for _ in range(recipe.steps)]


def make_captioner(recipe):
    torch.manual_seed(0)
    return MirrorGAN(recipe.model, Vocabulary([f"word{i}" for i in range(V - 3)])).captioner


def freeze_image_encoder(captioner):
    captioner.image_encoder.requires_grad_(False).eval()
    return captioner


def changed(before, module):
    """Names of the tensors that differ from an earlier state_dict."""
    return {name for name, tensor in module.state_dict().items() if not torch.equal(before[name], tensor)}


def test_both_encoders_are_trained_together(tiny_recipe, batch):
    pair = EncoderPair(tiny_recipe.model, V)
    before = copy.deepcopy(pair.state_dict())
    losses = fit(matching_step, pair, batch, dataclasses.replace(tiny_recipe.stem, steps=40))
    assert {name for name, _ in pair.named_parameters()} <= changed(before, pair)
    names = ["caption_by_sentence", "image_by_sentence", "caption_by_words", "image_by_words"]
    assert all(losses[-1][name] < losses[0][name] for name in names)


def test_without_word_weight_the_word_terms_are_not_computed(tiny_recipe, batch, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("the word terms were computed")

    monkeypatch.setattr(pretrain, "word_region_similarity", fail)
    recipe = dataclasses.replace(tiny_recipe.stem, word_weight=0.0)
    losses = fit(matching_step, EncoderPair(tiny_recipe.model, V), batch, recipe)
    assert losses[0].keys() == {"caption_by_sentence", "image_by_sentence", "gradient_norm"}


def test_word_pairs_limits_the_pairs_of_the_word_terms(tiny_recipe, batch, monkeypatch):
    sizes = []

    def similarity(regions, words, word_mask):
        sizes.append((len(regions), len(words), len(word_mask)))
        return inner(regions, words, word_mask)

    inner = pretrain.word_region_similarity
    monkeypatch.setattr(pretrain, "word_region_similarity", similarity)
    recipe = dataclasses.replace(tiny_recipe.stem, word_pairs=3, steps=2)
    fit(matching_step, EncoderPair(tiny_recipe.model, V), batch, recipe)
    assert sizes == [(3, 3, 3)] * 2


def test_the_captioner_is_trained_with_a_frozen_image_encoder(tiny_recipe, batch):
    captioner = freeze_image_encoder(make_captioner(tiny_recipe))
    before = copy.deepcopy(captioner.state_dict())
    losses = fit(captioning_step, CachedCaptioner(captioner), batch, dataclasses.replace(tiny_recipe.stream, steps=40))
    names = changed(before, captioner)
    assert not any(name.startswith("image_encoder.") for name in names)
    trained = {name for name, _ in captioner.named_parameters() if not name.startswith("image_encoder.")}
    # The end token is never an input: its row of the embedding stays, but other rows of the tensor change.
    assert trained <= names
    assert losses[-1]["cross_entropy"] < 0.8 * losses[0]["cross_entropy"]


def test_an_image_encoder_that_is_not_frozen_is_trained(tiny_recipe, batch):
    captioner = make_captioner(tiny_recipe)
    before = copy.deepcopy(captioner.state_dict())
    fit(captioning_step, CachedCaptioner(captioner), batch, tiny_recipe.stream)
    assert any(name.startswith("image_encoder.") for name in changed(before, captioner))


def test_cached_image_features_give_the_same_losses(tiny_recipe, batch):
    captioner = freeze_image_encoder(make_captioner(tiny_recipe))
    with torch.no_grad():
        image = captioner.image_encoder(batch.images).image[[3, 1, 4, 0, 2]]
    features = CachedImages(image, None, Views(16, None, 1), 0.0)
    rows = torch.tensor([3, 1, 4, 0, 2]).argsort()
    losses = [
        fit(captioning_step, module, batch._replace(image_rows=rows), tiny_recipe.stream)
        for module in (CachedCaptioner(copy.deepcopy(captioner)), CachedCaptioner(captioner, features))
    ]
    for uncached, cached in zip(*losses, strict=True):
        torch.testing.assert_close(uncached["cross_entropy"], cached["cross_entropy"])


@pytest.mark.parametrize("word_weight", [0.0, 0.3])
def test_cached_features_of_a_frozen_backbone_give_a_pair_the_same_losses(tiny_recipe, batch, word_weight):
    """Regions of the first rows only: no others enter the word-region terms."""
    recipe = dataclasses.replace(tiny_recipe.stem, word_weight=word_weight, word_pairs=3 if word_weight else 48)
    torch.manual_seed(0)
    pair = EncoderPair(tiny_recipe.model, V, backbone=BackboneConfig("conv", trainable=False))
    order = torch.tensor([3, 1, 4, 0, 2])
    cached = pair.image_encoder.backbone(batch.images)
    regions = cached.regions[order] if word_weight else None
    features = CachedImages(cached.image[order], regions, Views(16, None, 1), 0.0)
    modules = CachedPair(copy.deepcopy(pair)), CachedPair(pair, features, 3)
    losses = []
    for each in modules:
        # Dropout of the words.
        torch.manual_seed(1)
        losses.append(fit(matching_step, each, batch._replace(image_rows=order.argsort()), recipe))
    for uncached, cached in zip(*losses, strict=True):
        torch.testing.assert_close(uncached, cached, rtol=1e-4, atol=1e-5)


def test_the_captioner_is_trained_to_predict_the_end_token(tiny_recipe, batch, monkeypatch):
    calls = []

    def loss(logits, tokens, word_mask):
        calls.append((tokens, word_mask))
        return inner(logits, tokens, word_mask)

    inner = pretrain.redescription_loss
    monkeypatch.setattr(pretrain, "redescription_loss", loss)
    recipe = dataclasses.replace(tiny_recipe.stream, steps=1)
    fit(captioning_step, CachedCaptioner(make_captioner(tiny_recipe)), batch, recipe)
    tokens, word_mask = calls[0]
    for row, words in zip(range(B), (7, 3, 1, 5, 2)):
        assert tokens[row, :words].tolist() == batch.tokens[row, :words].tolist()
        assert tokens[row, words] == 1
        assert int(word_mask[row].sum()) == words + 1


def test_accumulated_gradients_match_the_whole_batch(tiny_recipe, batch):
    """The parts have different numbers of words. In evaluation mode: batch norm's statistics would be per part."""
    gradients, values = [], []
    for accumulate in (1, 2, 5):
        module = CachedCaptioner(freeze_image_encoder(make_captioner(tiny_recipe)).eval())
        recipe = dataclasses.replace(tiny_recipe.stream, accumulate=accumulate, max_grad_norm=None)
        state = start_pretraining(module, recipe, EngineRecipe(), SINGLE_PROCESS)
        values.append(captioning_step(state, batch, recipe).losses["cross_entropy"])
        gradients.append([p.grad for p in module.parameters() if p.grad is not None])
    for other, value in zip(gradients[1:], values[1:]):
        torch.testing.assert_close(value, values[0])
        torch.testing.assert_close(other, gradients[0])


@pytest.mark.parametrize("max_grad_norm", [0.01, None])
def test_gradients_are_clipped(tiny_recipe, batch, max_grad_norm):
    pair = EncoderPair(tiny_recipe.model, V)
    recipe = dataclasses.replace(tiny_recipe.stem, steps=1, max_grad_norm=max_grad_norm)
    norm = fit(matching_step, pair, batch, recipe)[0]["gradient_norm"]
    clipped = torch.cat([parameter.grad.flatten() for parameter in pair.parameters()]).norm()
    expected = norm if max_grad_norm is None else torch.tensor(max_grad_norm)
    torch.testing.assert_close(clipped, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("steps", range(1, 12))
def test_the_learning_rate_cycles_over_any_number_of_steps(steps):
    network = prepare(torch.nn.Linear(2, 3), SINGLE_PROCESS, EngineRecipe(), learning_rate=0.5, cycle=steps)
    rates = []
    for _ in range(steps):
        network.optimizer.zero_grad()
        loss = network.parallel(torch.ones(1, 2)).sum()
        network.backward(loss)
        network.optimizer_step(loss)
        rates.append(network.learning_rate)
    assert all(0 < rate <= 0.5 for rate in rates)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision_stays_finite_and_lowers_the_loss(tiny_recipe, batch, precision):
    pair = EncoderPair(tiny_recipe.model, V)
    recipe = dataclasses.replace(tiny_recipe.stem, steps=20)
    state = start_pretraining(CachedPair(pair), recipe, EngineRecipe(precision=precision), SINGLE_PROCESS)
    results = [matching_step(state, batch, recipe) for _ in range(recipe.steps)]
    # In float16, the first steps are skipped until the loss scale is small enough.
    settled = results[10:] if precision == "float16" else results
    assert all(bool(result.finite) for result in settled)
    assert results[-1].losses["caption_by_sentence"] < results[0].losses["caption_by_sentence"]
