"""The published formulation computes the same images, losses and gradients as ours."""

import copy

import pytest
import torch

pytest.importorskip("benchmarks", reason="run pytest as `python -m pytest` from the root")
from benchmarks import step
from benchmarks.published import PublishedAttention, PublishedDoubling, published_step
from mirror_modules import GlobalLocalAttention
from mirror_modules.adversarial.pairing import Mismatch
from mirror_modules.glam.stages import DoublingConv2d
from mirror_modules.training.step import adversarial_step

SIZES = step.Sizes(batch=3, words=7, word_dim=10, channels=3, discriminator_channels=2, resolutions=(8, 16, 64))


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def with_the_next_caption(monkeypatch):
    """Mismatched pairs as in the published code: each image with the next caption."""

    def mismatch(class_ids, caption_ids, *, generator):
        rows = torch.arange(len(class_ids))
        return Mismatch(rows.roll(-1), rows < len(rows) - 1)

    monkeypatch.setattr("mirror_modules.training.step.mismatch", mismatch)


def one_step(impl):
    run = step.build_step(impl, SIZES)
    state = run.args[0]
    before = copy.deepcopy(state.generator.module.state_dict())
    return run(), state, before


@pytest.mark.parametrize("impl", [step.PUBLISHED, step.PUBLISHED_HELD, step.PUBLISHED_CONVOLUTIONS])
@pytest.mark.usefixtures("with_the_next_caption")
def test_a_published_step_equals_our_step(impl):
    ours, our_state, our_weights = one_step(step.OURS)
    published, published_state, published_weights = one_step(impl)
    assert all(isinstance(s.attention, PublishedAttention) for s in published_state.model.generator.refinements)
    doublings = [part for part in published_state.model.modules() if isinstance(part, DoublingConv2d)]
    own = impl == step.PUBLISHED_CONVOLUTIONS
    assert doublings
    assert all(isinstance(part, PublishedDoubling) == own for part in doublings)
    ours = ours.losses
    torch.testing.assert_close(our_weights, published_weights, rtol=0, atol=0)
    adversarial = {f"{part}_{size}" for part in ("discriminator", "generator") for size in SIZES.resolutions}
    assert set(published) == adversarial | {"kl", "generator_total"}
    for name in published:
        torch.testing.assert_close(ours[name], published[name], msg=lambda m, name=name: f"{name}: {m}")
    ours, published = (dict(s.generator.module.named_parameters()) for s in (our_state, published_state))
    assert len(ours) == len(published)
    for name, parameter in ours.items():
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(parameter.grad, published[name].grad, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(parameter, published[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("lengths", [(5, 5, 5), (7, 7, 7)])
def test_the_attention_is_equal_for_captions_of_equal_length(lengths):
    ours, published, inputs = an_attention(lengths)
    for value, reference in zip(ours(*inputs, need_weights=True), published(*inputs)):
        torch.testing.assert_close(value, reference)


def test_the_published_attention_mixes_masks_of_different_lengths():
    ours, published, inputs = an_attention((7, 2, 5))
    padding = ours(*inputs, need_weights=True).word_weights[1, 2:]
    assert padding.abs().max() == 0
    assert published(*inputs).word_weights[1, 2:].abs().max() > 0.01


def an_attention(lengths):
    torch.manual_seed(0)
    sizes = {"feature_dim": 3, "word_dim": 11, "condition_dim": 5}
    ours = GlobalLocalAttention(**sizes, sentence_bias=True, score_projection=True)
    published = PublishedAttention(**sizes, sentence_bias=True, score_projection=True)
    published.load_state_dict(ours.state_dict())
    word_mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    inputs = (torch.randn(3, 3, 2, 13), torch.randn(3, 7, 11), torch.randn(3, 5), word_mask)
    return ours, published, inputs


def test_only_the_plain_published_step_backpropagates_into_the_discriminators():
    gradients = {}
    for impl in (step.PUBLISHED, step.PUBLISHED_HELD):
        _, state, _ = one_step(impl)
        gradients[impl] = state.paired_discriminators[0].realism_head.weight.grad
    assert not torch.allclose(gradients[step.PUBLISHED], gradients[step.PUBLISHED_HELD])


def test_the_benchmark_runs_the_training_step():
    assert step.build_step(step.OURS, SIZES).func is adversarial_step
    assert step.build_step(step.PUBLISHED, SIZES).func is published_step
