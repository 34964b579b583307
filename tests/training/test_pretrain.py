"""Phases `stem` and `stream`: what learns, what stands still, and that learning lowers the loss."""

import copy
import dataclasses
from itertools import repeat

import pytest
import torch

from mirror_modules import MirrorGAN
from mirror_modules.data import CaptionBatch
from mirror_modules.stem import Vocabulary
from mirror_modules.training import pretrain
from mirror_modules.training.log import PhaseLog, read_log
from mirror_modules.training.pretrain import EncoderPair, train_captioner, train_encoders

B, L, V = 5, 7, 22


@pytest.fixture
def batch():
    random = torch.Generator().manual_seed(1)
    word_mask = torch.arange(L) < torch.tensor([[7], [3], [1], [5], [2]])
    tokens = torch.randint(3, V, (B, L), generator=random) * word_mask
    images = torch.rand(B, 3, 16, 16, generator=random) * 2 - 1
    return CaptionBatch(images, tokens, word_mask, torch.arange(B), ("",) * B)


def fit(train, module, batch, recipe, path):
    """The logged lines of a phase that sees one batch over and over."""
    with PhaseLog("phase", recipe.steps, path, 1) as log:
        train(module, repeat(batch), recipe, log)
    return read_log(path)


def make_captioner(recipe):
    torch.manual_seed(0)
    return MirrorGAN(recipe.model, Vocabulary([f"word{i}" for i in range(V - 3)])).captioner


def moved(before, module):
    return {name for name, tensor in module.state_dict().items() if not torch.equal(before[name], tensor)}


def test_the_encoders_learn_as_one(tiny_recipe, batch, tmp_path):
    pair = EncoderPair(tiny_recipe.model, V)
    before = copy.deepcopy(pair.state_dict())
    recipe = dataclasses.replace(tiny_recipe.stem, steps=40)
    lines = fit(train_encoders, pair, batch, recipe, tmp_path / "log")
    assert {name for name, _ in pair.named_parameters()} <= moved(before, pair)
    names = ["caption_by_sentence", "image_by_sentence", "caption_by_words", "image_by_words"]
    assert all(lines[-1][name] < lines[0][name] for name in names)
    assert not any(module.training for module in pair.modules())


def test_without_weight_words_are_not_matched(tiny_recipe, batch, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("matched")

    monkeypatch.setattr(pretrain, "word_region_similarity", refuse)
    recipe = dataclasses.replace(tiny_recipe.stem, word_weight=0.0)
    lines = fit(train_encoders, EncoderPair(tiny_recipe.model, V), batch, recipe, tmp_path / "log")
    assert lines[0].keys() - {"phase", "step", "seconds", "images"} == {"caption_by_sentence", "image_by_sentence"}


def test_words_are_matched_in_a_part_of_the_batch(tiny_recipe, batch, tmp_path, monkeypatch):
    sizes = []

    def similarity(regions, words, word_mask):
        sizes.append((len(regions), len(words), len(word_mask)))
        return inner(regions, words, word_mask)

    inner = pretrain.word_region_similarity
    monkeypatch.setattr(pretrain, "word_region_similarity", similarity)
    recipe = dataclasses.replace(tiny_recipe.stem, word_pairs=3, steps=2)
    fit(train_encoders, EncoderPair(tiny_recipe.model, V), batch, recipe, tmp_path / "log")
    assert sizes == [(3, 3, 3)] * 2


def test_the_captioner_learns_and_its_eye_stands_still(tiny_recipe, batch, tmp_path):
    captioner = make_captioner(tiny_recipe)
    before = copy.deepcopy(captioner.state_dict())
    recipe = dataclasses.replace(tiny_recipe.stream, steps=40)
    lines = fit(train_captioner, captioner, batch, recipe, tmp_path / "log")
    changed = moved(before, captioner)
    assert not any(name.startswith("image_encoder.") for name in changed)
    learning = {name for name, _ in captioner.named_parameters() if not name.startswith("image_encoder.")}
    # The embedding's row of the end token is never an input, yet the tensor as a whole moves.
    assert learning <= changed
    assert lines[-1]["cross_entropy"] < 0.8 * lines[0]["cross_entropy"]
    assert not captioner.training


def test_the_captioners_eye_learns_if_asked(tiny_recipe, batch, tmp_path):
    captioner = make_captioner(tiny_recipe)
    before = copy.deepcopy(captioner.state_dict())
    recipe = dataclasses.replace(tiny_recipe.stream, train_backbone=True)
    fit(train_captioner, captioner, batch, recipe, tmp_path / "log")
    assert any(name.startswith("image_encoder.") for name in moved(before, captioner))


def test_the_captioner_learns_where_a_caption_ends(tiny_recipe, batch, tmp_path, monkeypatch):
    seen = []

    def loss(logits, tokens, word_mask):
        seen.append((tokens, word_mask))
        return inner(logits, tokens, word_mask)

    inner = pretrain.redescription_loss
    monkeypatch.setattr(pretrain, "redescription_loss", loss)
    recipe = dataclasses.replace(tiny_recipe.stream, steps=1)
    fit(train_captioner, make_captioner(tiny_recipe), batch, recipe, tmp_path / "log")
    tokens, word_mask = seen[0]
    for row, words in zip(range(B), (7, 3, 1, 5, 2)):
        assert tokens[row, :words].tolist() == batch.tokens[row, :words].tolist()
        assert tokens[row, words] == 1
        assert int(word_mask[row].sum()) == words + 1


def test_gradients_are_clipped(tiny_recipe, batch, tmp_path, monkeypatch):
    norms = []

    def clip(parameters, largest):
        norms.append(largest)
        return inner(parameters, largest)

    inner = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    pair = EncoderPair(tiny_recipe.model, V)
    fit(train_encoders, pair, batch, tiny_recipe.stem, tmp_path / "log")
    assert norms == [pretrain.LARGEST_GRADIENT_NORM] * tiny_recipe.stem.steps
    last = torch.cat([parameter.grad.flatten() for parameter in pair.parameters()])
    assert last.norm() <= pretrain.LARGEST_GRADIENT_NORM * 1.001


@pytest.mark.parametrize("steps", range(1, 12))
def test_the_step_size_cycles_over_any_number_of_steps(steps):
    optimizer, schedule = pretrain._optimizer(torch.nn.Linear(2, 3), 0.5, steps)
    sizes = []
    for _ in range(steps):
        sizes.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert all(0 < size <= 0.5 for size in sizes)
