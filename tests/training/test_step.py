"""One adversarial step: who moves, who stands still, and what the average is."""

import copy
import dataclasses

import pytest
import torch

from mirror_modules import MirrorGAN
from mirror_modules.data import CaptionBatch
from mirror_modules.stem import Vocabulary
from mirror_modules.training.state import start
from mirror_modules.training.step import adversarial_step

B, L = 5, 7


@pytest.fixture
def vocabulary():
    return Vocabulary([f"word{i}" for i in range(19)])


def make_batch(vocabulary, class_ids=(0, 1, 2, 3, 4)):
    random = torch.Generator().manual_seed(1)
    lengths = torch.tensor([[7], [3], [1], [5], [2]])
    word_mask = torch.arange(L) < lengths
    tokens = torch.randint(3, len(vocabulary), (B, L), generator=random) * word_mask
    images = torch.rand(B, 3, 16, 16, generator=random) * 2 - 1
    return CaptionBatch(images, tokens, word_mask, torch.tensor(class_ids), ("",) * B)


def make_state(vocabulary, recipe):
    torch.manual_seed(0)
    return start(MirrorGAN(recipe.model, vocabulary), recipe.glam, torch.Generator().manual_seed(2))


def moved(before, module):
    after = module.state_dict()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_trains_the_painters_and_the_judges_alone(vocabulary, tiny_recipe):
    state = make_state(vocabulary, tiny_recipe)
    frozen = [state.model.text_encoder, state.model.captioner]
    trained = [state.model.conditioning, state.model.generator, *state.discriminators]
    before = [copy.deepcopy(module.state_dict()) for module in (*frozen, *trained)]
    for _ in range(2):
        adversarial_step(state, make_batch(vocabulary), tiny_recipe.glam)
    for old, module in zip(before, frozen):
        assert not moved(old, module)
    for old, module in zip(before[2:], trained):
        weights = {name for name, _ in module.named_parameters()}
        assert weights <= moved(old, module)


def test_the_average_follows_its_formula(vocabulary, tiny_recipe):
    state = make_state(vocabulary, tiny_recipe)
    name = "generator.heads.0.conv.weight"
    expected = None
    for step in range(4):
        adversarial_step(state, make_batch(vocabulary), tiny_recipe.glam)
        value = state.painter.state_dict()[name].clone()
        # torch copies the first value and counts from 1 after it.
        decay = min(tiny_recipe.glam.average_decay, (1 + step) / (10 + step))
        expected = value if expected is None else decay * expected + (1 - decay) * value
    torch.testing.assert_close(state.average.module.state_dict()[name], expected)


def test_batch_norm_statistics_are_averaged_too(vocabulary, tiny_recipe):
    state = make_state(vocabulary, tiny_recipe)
    for _ in range(3):
        adversarial_step(state, make_batch(vocabulary), tiny_recipe.glam)
    name = "generator.initial.norm.running_var"
    average, live = state.average.module.state_dict()[name], state.painter.state_dict()[name]
    assert not torch.equal(average, live)
    assert not torch.equal(average, torch.ones_like(average))


def test_without_redescription_the_captioner_is_not_asked(vocabulary, tiny_recipe, monkeypatch):
    glam = dataclasses.replace(tiny_recipe.glam, redescription_weight=0.0)
    state = make_state(vocabulary, dataclasses.replace(tiny_recipe, glam=glam))

    def refuse(*_):
        raise AssertionError("asked")

    monkeypatch.setattr(state.model.captioner, "forward", refuse)
    assert "redescription" not in adversarial_step(state, make_batch(vocabulary), glam)


def test_the_total_is_the_sum_of_its_terms(vocabulary, tiny_recipe):
    glam = dataclasses.replace(tiny_recipe.glam, redescription_weight=2.0, kl_weight=3.0)
    state = make_state(vocabulary, dataclasses.replace(tiny_recipe, glam=glam))
    losses = adversarial_step(state, make_batch(vocabulary), glam)
    expected = 3 * losses["kl"] + losses["generator_8"] + losses["generator_16"] + 2 * losses["redescription"]
    torch.testing.assert_close(losses["generator_total"], expected)


def test_mismatched_pairs_are_a_term_of_the_judges(vocabulary, tiny_recipe):
    without = dataclasses.replace(tiny_recipe.glam, mismatched_pairs=False)
    first = adversarial_step(make_state(vocabulary, tiny_recipe), make_batch(vocabulary), tiny_recipe.glam)
    second = adversarial_step(make_state(vocabulary, tiny_recipe), make_batch(vocabulary), without)
    assert first["discriminator_8"] > second["discriminator_8"]


def test_a_batch_of_one_class_has_no_mismatched_pairs(vocabulary, tiny_recipe):
    losses = adversarial_step(make_state(vocabulary, tiny_recipe), make_batch(vocabulary, (3,) * B), tiny_recipe.glam)
    assert all(torch.isfinite(loss) for loss in losses.values())
