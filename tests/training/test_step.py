"""One adversarial step: which weights change, which do not, and the moving average."""

import copy
import dataclasses

import pytest
import torch

from mirror_modules import MirrorGAN
from mirror_modules.adversarial import discriminator_loss, mode_seeking_loss, r1_penalty
from mirror_modules.data import CaptionBatch
from mirror_modules.models import BackboneConfig, EncoderPair
from mirror_modules.stem import TextFeatures, Vocabulary, matching_loss
from mirror_modules.training import step
from mirror_modules.training.recipes import AdversarialRecipe
from mirror_modules.training.state import DiscriminatorPass, start
from mirror_modules.training.step import (
    adversarial_step,
    divide,
    generate,
    generator_terms,
    update_average,
    update_discriminators,
    update_generator,
)

B, L = 5, 7


@pytest.fixture
def vocabulary():
    return Vocabulary([f"word{i}" for i in range(19)])


def make_batch(vocabulary, class_ids=(0, 1, 2, 3, 4), caption_ids=(0, 1, 2, 3, 4)):
    random = torch.Generator().manual_seed(1)
    lengths = torch.tensor([[7], [3], [1], [5], [2]])
    word_mask = torch.arange(L) < lengths
    tokens = torch.randint(3, len(vocabulary), (B, L), generator=random) * word_mask
    images = torch.rand(B, 3, 16, 16, generator=random) * 2 - 1
    class_ids, caption_ids, rows = torch.tensor(class_ids), torch.tensor(caption_ids), torch.arange(B)
    return CaptionBatch(images, tokens, word_mask, class_ids, ("",) * B, rows, rows, caption_ids)


def make_state(vocabulary, recipe):
    torch.manual_seed(0)
    model = MirrorGAN(recipe.model, vocabulary)
    pair = EncoderPair(recipe.model, len(vocabulary)) if recipe.glam.has_matching else None
    return start(model, recipe, torch.Generator().manual_seed(2), pair=pair)


def changed(before, module):
    """Names of the tensors that differ from an earlier state_dict."""
    after = module.state_dict()
    return {name for name in before if not torch.equal(before[name], after[name])}


def snapshot(*modules):
    return [copy.deepcopy(module.state_dict()) for module in modules]


def prepare_updates(vocabulary, recipe):
    """The state, and the arguments of the two updates of a step."""
    state = make_state(vocabulary, recipe)
    parts = divide(state, make_batch(vocabulary), recipe.glam)
    return state, (parts, [generate(state, part) for part in parts], recipe.glam, [])


def test_trains_only_the_generator_and_the_discriminators(vocabulary, tiny_recipe):
    state = make_state(vocabulary, tiny_recipe)
    frozen = [state.model.text_encoder, state.model.captioner]
    trained = [state.model.conditioning, state.model.generator, *state.paired_discriminators]
    before = snapshot(*frozen, *trained)
    for _ in range(2):
        adversarial_step(state, make_batch(vocabulary), tiny_recipe.glam)
    for old, module in zip(before, frozen):
        assert not changed(old, module)
    for old, module in zip(before[2:], trained):
        weights = {name for name, _ in module.named_parameters()}
        assert weights <= changed(old, module)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_finest_stage_does_not_train_in_the_coarse_steps(vocabulary, tiny_recipe, parts):
    glam = dataclasses.replace(tiny_recipe.glam, steps=8, coarse_steps=2, accumulate=parts)
    # The captioner cannot read images of 8 pixels.
    model = dataclasses.replace(tiny_recipe.model, captioner_backbone=BackboneConfig("conv", input_size=16))
    state = make_state(vocabulary, dataclasses.replace(tiny_recipe, glam=glam, model=model))
    generator = state.model.generator
    coarse = [generator.initial, generator.heads[0], state.paired_discriminators[0]]
    finest = [generator.refinements[0], generator.heads[1], state.paired_discriminators[1]]
    for number in range(3):
        before = snapshot(*coarse, *finest)
        losses = adversarial_step(state, make_batch(vocabulary), glam).losses
        assert "redescription" in losses
        trains = [*coarse, *finest] if number == 2 else coarse
        assert ("generator_16" in losses) == ("discriminator_16" in losses) == (number == 2)
        for old, module in zip(before, [*coarse, *finest], strict=True):
            weights = {name for name, _ in module.named_parameters()}
            assert weights <= changed(old, module) if module in trains else not changed(old, module)
    # Its first step is as large as any other one, and images of the average have all stages.
    steps = [state.generator.optimizer.state[weight]["step"].item() for weight in generator.heads[1].parameters()]
    assert set(steps) == {1.0}
    part = divide(state, make_batch(vocabulary), glam)[0]
    assert [images.shape[2] for images in generate(state, part).images] == [8, 16]


@pytest.mark.parametrize(("input_size", "seen"), [(None, 16), (32, 8)])
def test_frozen_networks_see_coarse_images_at_the_size_that_they_learned_from(
    vocabulary, tiny_recipe, input_size, seen
):
    glam = dataclasses.replace(tiny_recipe.glam, steps=8, coarse_steps=2, matching_ratio=0.5)
    backbone = BackboneConfig("conv", input_size=input_size)
    model = dataclasses.replace(tiny_recipe.model, captioner_backbone=backbone, image_backbone=backbone)
    state = make_state(vocabulary, dataclasses.replace(tiny_recipe, glam=glam, model=model))
    sizes = []
    for network in (state.redescription, state.matching):
        network.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[2:]))
    losses = adversarial_step(state, make_batch(vocabulary), glam).losses
    assert {"redescription", "matching"} <= losses.keys()
    assert sizes == [(seen, seen)] * 2


@pytest.mark.parametrize(("steps_done", "factor"), [(0, 1.0), (5, 0.3)])
def test_ratios_are_smaller_once_the_finest_stage_trains(vocabulary, tiny_recipe, steps_done, factor):
    glam = dataclasses.replace(
        tiny_recipe.glam, steps=8, coarse_steps=2, redescription_ratio=0.7, redescription_weight=None, fine_ratios=0.3
    )
    state = make_state(vocabulary, dataclasses.replace(tiny_recipe, glam=glam))
    state.steps_done = steps_done
    state.set_stages(glam)
    part = divide(state, make_batch(vocabulary), glam)[0]
    fake = generate(state, part)

    def gradient(recipe):
        total = generator_terms(state, part, fake, recipe)["generator_total"]
        return torch.autograd.grad(total, fake.images[-1], retain_graph=True)[0].flatten(1)

    adversarial = gradient(
        dataclasses.replace(glam, redescription_ratio=None, redescription_weight=0.0, fine_ratios=1.0)
    )
    share = (gradient(glam) - adversarial).norm(dim=1) / adversarial.norm(dim=1)
    torch.testing.assert_close(share, torch.full_like(share, 0.7 * factor), rtol=1e-4, atol=0)


@pytest.mark.parametrize("parts", [1, 2])
def test_second_images_of_captions_enter_the_loss_of_diversity_alone(vocabulary, tiny_recipe, parts):
    glam = dataclasses.replace(tiny_recipe.glam, diversity_ratio=0.3, batch_size=8, accumulate=parts)
    recipe = dataclasses.replace(tiny_recipe, glam=glam)
    state = make_state(vocabulary, recipe)
    divided = divide(state, make_batch(vocabulary), glam)
    # A fourth of the captions of each part: with two parts, of three and two captions, none.
    assert [len(part.noise) - len(part.tokens) for part in divided] == ([1] if parts == 1 else [0, 0])
    part = divided[0]
    fake = generate(state, part)
    terms = generator_terms(state, part, fake, glam)
    assert ("diversity" in terms) == (parts == 1)
    if parts == 1:
        images, others = fake.images[-1].split([B, 1])
        assert torch.equal(terms["diversity"], mode_seeking_loss(images, others))
        assert not torch.equal(images[0], others[0])
        # Discriminators and captioner see the first image of each caption only.
        plain = generator_terms(state, part, fake, dataclasses.replace(glam, diversity_ratio=None))
        for name in ("generator_8", "generator_16", "redescription"):
            assert torch.equal(terms[name], plain[name])
    losses = adversarial_step(state, make_batch(vocabulary), glam).losses
    assert all(bool(loss.isfinite().all()) for loss in losses.values())


@pytest.mark.parametrize(("steps", "coarse_steps", "expected"), [(8, 2, 2), (8, 100, 6), (3, 100, 2), (8, 0, 0)])
def test_at_most_three_quarters_of_the_steps_are_coarse(vocabulary, tiny_recipe, steps, coarse_steps, expected):
    glam = dataclasses.replace(tiny_recipe.glam, steps=steps, coarse_steps=coarse_steps)
    state = make_state(vocabulary, tiny_recipe)
    stages = []
    for state.steps_done in range(steps):
        state.set_stages(glam)
        stages.append(state.stages)
    assert stages == [1] * expected + [2] * (steps - expected)


@pytest.mark.parametrize("parts", [1, 2])
def test_update_discriminators_changes_only_the_discriminators(vocabulary, tiny_recipe, parts):
    recipe = dataclasses.replace(tiny_recipe, glam=dataclasses.replace(tiny_recipe.glam, accumulate=parts))
    state, arguments = prepare_updates(vocabulary, recipe)
    finite = arguments[-1]
    others = [state.model, state.average.module]
    before, discriminators_before = snapshot(*others), snapshot(*state.paired_discriminators)
    losses = update_discriminators(state, *arguments)
    assert [bool(flag) for flag in finite] == [True] * len(state.discriminators)
    assert {"discriminator_8", "discriminator_gradient_norm_16", "accuracy_mismatched_8"} <= losses.keys()
    for old, module in zip(before, others, strict=True):
        assert not changed(old, module)
    for old, discriminator in zip(discriminators_before, state.paired_discriminators, strict=True):
        assert {name for name, _ in discriminator.named_parameters()} <= changed(old, discriminator)
    assert all(parameter.grad is None for parameter in state.model.parameters())


@pytest.mark.parametrize("parts", [1, 2])
def test_update_generator_changes_only_generator_and_conditioning(vocabulary, tiny_recipe, parts):
    recipe = dataclasses.replace(tiny_recipe, glam=dataclasses.replace(tiny_recipe.glam, accumulate=parts))
    state, arguments = prepare_updates(vocabulary, recipe)
    finite = arguments[-1]
    others = [state.model.text_encoder, state.model.captioner, state.average.module]
    trained = [state.model.conditioning, state.model.generator]
    before, trained_before = snapshot(*others), snapshot(*trained)
    weights = [parameter.detach().clone() for net in state.paired_discriminators for parameter in net.parameters()]
    losses = update_generator(state, *arguments)
    assert [bool(flag) for flag in finite] == [True]
    assert {"kl", "redescription", "generator_total", "generator_gradient_norm"} <= losses.keys()
    for old, module in zip(before, others, strict=True):
        assert not changed(old, module)
    for old, module in zip(trained_before, trained, strict=True):
        assert {name for name, _ in module.named_parameters()} <= changed(old, module)
    after = [parameter for net in state.paired_discriminators for parameter in net.parameters()]
    assert all(torch.equal(old, new) for old, new in zip(weights, after, strict=True))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in after)


def test_discriminators_require_gradients_again_after_an_error_in_the_generator_update(
    vocabulary, tiny_recipe, monkeypatch
):
    state, arguments = prepare_updates(vocabulary, tiny_recipe)
    parameters = [parameter for net in state.discriminators for parameter in net.module.parameters()]
    frozen_inside = []

    def fail(*_, **__):
        frozen_inside.extend(not parameter.requires_grad for parameter in parameters)
        raise RuntimeError("in the middle of the update")

    monkeypatch.setattr(step, "generator_loss", fail)
    with pytest.raises(RuntimeError, match="in the middle of the update"):
        update_generator(state, *arguments)
    assert frozen_inside
    assert all(frozen_inside)
    assert all(parameter.requires_grad for parameter in parameters)


@pytest.mark.parametrize("finite", [True, False])
def test_update_average_changes_nothing_in_a_skipped_step(vocabulary, tiny_recipe, finite):
    state = make_state(vocabulary, tiny_recipe)
    with torch.no_grad():
        for parameter in state.generator.module.parameters():
            parameter.add_(1)
    modules = [state.model, *state.paired_discriminators]
    before, average_before = snapshot(*modules), snapshot(state.average.module)[0]
    update_average(state, torch.tensor(finite))
    assert bool(changed(average_before, state.average.module)) == finite
    for old, module in zip(before, modules, strict=True):
        assert not changed(old, module)


def test_the_average_follows_its_formula(vocabulary, tiny_recipe):
    glam = dataclasses.replace(tiny_recipe.glam, average_decay=0.16)
    state = make_state(vocabulary, dataclasses.replace(tiny_recipe, glam=glam))
    expected = copy.deepcopy(state.generator.module.state_dict())
    for updates in range(4):
        adversarial_step(state, make_batch(vocabulary), glam)
        # The decays grow as 1/10, 2/11, 3/12 and are limited to 0.16 from the second update on.
        decay = min(0.16, (1 + updates) / (10 + updates))
        for name, value in copy.deepcopy(state.generator.module.state_dict()).items():
            if value.is_floating_point():
                value = decay * expected[name] + (1 - decay) * value
            expected[name] = value
    average = state.average.module.state_dict()
    assert average.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(average[name], value)


def test_batch_norm_statistics_are_averaged_too(vocabulary, tiny_recipe):
    state = make_state(vocabulary, tiny_recipe)
    for _ in range(3):
        adversarial_step(state, make_batch(vocabulary), tiny_recipe.glam)
    name = "generator.initial.norm.running_var"
    average, live = state.average.module.state_dict()[name], state.generator.module.state_dict()[name]
    assert not torch.equal(average, live)
    assert not torch.equal(average, torch.ones_like(average))


def test_without_redescription_the_captioner_is_not_run(vocabulary, tiny_recipe, monkeypatch):
    glam = dataclasses.replace(tiny_recipe.glam, redescription_weight=0.0, redescription_ratio=None)
    state = make_state(vocabulary, dataclasses.replace(tiny_recipe, glam=glam))

    def fail(*_):
        raise AssertionError("the captioner was run")

    monkeypatch.setattr(state.model.captioner, "forward", fail)
    assert "redescription" not in adversarial_step(state, make_batch(vocabulary), glam).losses


def test_the_total_is_the_sum_of_its_terms(vocabulary, tiny_recipe):
    glam = dataclasses.replace(tiny_recipe.glam, redescription_weight=2.0, redescription_ratio=None, kl_weight=3.0)
    state = make_state(vocabulary, dataclasses.replace(tiny_recipe, glam=glam))
    losses = adversarial_step(state, make_batch(vocabulary), glam).losses
    expected = 3 * losses["kl"] + losses["generator_8"] + losses["generator_16"] + 2 * losses["redescription"]
    torch.testing.assert_close(losses["generator_total"], expected)


def generator_gradients(vocabulary, tiny_recipe, **options):
    glam = dataclasses.replace(tiny_recipe.glam, **options)
    state = make_state(vocabulary, dataclasses.replace(tiny_recipe, glam=glam))
    adversarial_step(state, make_batch(vocabulary), glam)
    return {name: weight.grad for name, weight in state.generator.module.named_parameters()}


def test_the_redescription_gradient_is_proportional_to_the_ratio(vocabulary, tiny_recipe):
    half, full, without = (
        generator_gradients(vocabulary, tiny_recipe, redescription_weight=weight, redescription_ratio=ratio)
        for weight, ratio in ((None, 0.5), (None, 1.0), (0.0, None))
    )
    for name, gradient in half.items():
        # Backward is linear in the gradient at the image: twice the ratio adds twice the gradient.
        added, twice = gradient - without[name], full[name] - without[name]
        torch.testing.assert_close(twice, 2 * added, rtol=1e-3, atol=1e-6, msg=name)
    assert any((half[name] - without[name]).abs().max() > 1e-5 for name in half)


def test_the_matching_loss_is_that_of_attngan_at_the_finest_images(vocabulary, tiny_recipe):
    """Word and sentence terms with equal weights, gamma 10, and no negatives of the same class."""
    stem = dataclasses.replace(tiny_recipe.stem, gamma_loss=10.0, word_weight=1.0)
    glam = dataclasses.replace(
        tiny_recipe.glam, redescription_weight=0.0, redescription_ratio=None, kl_weight=3.0, matching_weight=5.0
    )
    state = make_state(vocabulary, dataclasses.replace(tiny_recipe, stem=stem, glam=glam))
    batch = make_batch(vocabulary, class_ids=(0, 1, 0, 3, 1))
    encoder = state.matching.image_encoder
    before = snapshot(encoder)[0]
    parts = divide(state, batch, glam)
    losses = update_generator(state, parts, generated := [generate(state, part) for part in parts], glam, [])
    text = TextFeatures(*state.text(batch))
    terms = matching_loss(encoder(generated[0].images[-1]), text, batch.word_mask, batch.class_ids)
    torch.testing.assert_close(losses["matching"], terms.total.detach())
    expected = 3 * losses["kl"] + losses["generator_8"] + losses["generator_16"] + 5 * losses["matching"]
    torch.testing.assert_close(losses["generator_total"], expected)
    assert not changed(before, encoder)
    assert not encoder.training
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in encoder.parameters())


def test_the_matching_encoder_cannot_be_unfrozen(vocabulary, tiny_recipe):
    glam = dataclasses.replace(tiny_recipe.glam, matching_weight=1.0)
    matching = make_state(vocabulary, dataclasses.replace(tiny_recipe, glam=glam)).matching.train()
    assert not matching.image_encoder.training


def test_the_matching_loss_needs_the_encoders(vocabulary, tiny_recipe):
    recipe = dataclasses.replace(tiny_recipe, glam=dataclasses.replace(tiny_recipe.glam, matching_ratio=0.5))
    with pytest.raises(ValueError, match="the matching loss needs the encoders of phase `stem`; pass pair="):
        start(MirrorGAN(recipe.model, vocabulary), recipe, torch.Generator())


@pytest.mark.parametrize("matching", [{"matching_ratio": 0.25}, {"matching_weight": 7.0}])
@pytest.mark.parametrize(
    "redescription",
    [
        {"redescription_weight": None, "redescription_ratio": 0.5},
        {"redescription_weight": 2.0, "redescription_ratio": None},
    ],
)
def test_each_ratio_is_a_share_of_the_adversarial_gradient_alone(vocabulary, tiny_recipe, redescription, matching):
    glam = dataclasses.replace(tiny_recipe.glam, kl_weight=0.0, **redescription, **matching)
    state = make_state(vocabulary, dataclasses.replace(tiny_recipe, glam=glam))
    (part,) = divide(state, make_batch(vocabulary), glam)
    generated = generate(state, part)
    images = generated.images[-1].detach().requires_grad_(True)
    fake = generated._replace(images=[generated.images[0], images])
    terms = generator_terms(state, part, fake, glam)
    (gradient,) = torch.autograd.grad(terms["generator_total"], images)
    alone = generator_terms(
        state,
        part,
        fake,
        dataclasses.replace(
            glam, redescription_weight=1.0, redescription_ratio=None, matching_weight=1.0, matching_ratio=None
        ),
    )
    names = ("generator_16", "redescription", "matching")
    adversarial, *others = (
        torch.autograd.grad(alone[name], images, retain_graph=True, allow_unused=True)[0] for name in names
    )
    expected = adversarial
    norm = adversarial.flatten(1).norm(dim=1)
    weights = (redescription["redescription_weight"], matching.get("matching_weight"))
    ratios = (redescription["redescription_ratio"], matching.get("matching_ratio"))
    for other, weight, ratio in zip(others, weights, ratios, strict=True):
        scale = weight if ratio is None else (ratio * norm / other.flatten(1).norm(dim=1))[:, None, None, None]
        expected = expected + scale * other
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)
    assert gradient.abs().max() > 1e-3


def test_negatives_of_an_accumulated_matching_loss_are_those_of_the_part(vocabulary, tiny_recipe):
    glam = dataclasses.replace(tiny_recipe.glam, matching_weight=1.0, accumulate=2)
    state = make_state(vocabulary, dataclasses.replace(tiny_recipe, glam=glam))
    parts = divide(state, make_batch(vocabulary), glam)
    assert [len(part.class_ids) for part in parts] == [3, 2]
    losses = adversarial_step(state, make_batch(vocabulary), glam).losses
    assert bool(torch.isfinite(losses["matching"]))


def test_accumulated_balanced_gradients_match_the_whole_batch(vocabulary, tiny_recipe):
    steps = []
    for accumulate in (1, 5):
        glam = dataclasses.replace(
            tiny_recipe.glam, accumulate=accumulate, redescription_weight=None, redescription_ratio=0.5
        )
        state = make_state(vocabulary, dataclasses.replace(tiny_recipe, glam=glam))
        for network in state.networks().values():
            network.module.eval()
        adversarial_step(state, make_batch(vocabulary), glam)
        steps.append(state.generator.module)
    for whole, accumulated in zip(steps[0].parameters(), steps[1].parameters(), strict=True):
        torch.testing.assert_close(accumulated.grad, whole.grad, rtol=1e-4, atol=1e-6)


def test_mismatched_pairs_add_a_term_to_the_discriminator_loss(vocabulary, tiny_recipe):
    without = dataclasses.replace(tiny_recipe.glam, mismatched_pairs=False)
    first = adversarial_step(make_state(vocabulary, tiny_recipe), make_batch(vocabulary), tiny_recipe.glam)
    second = adversarial_step(make_state(vocabulary, tiny_recipe), make_batch(vocabulary), without)
    assert first.losses["discriminator_8"] > second.losses["discriminator_8"]


def test_a_batch_of_one_class_has_no_mismatched_pairs(vocabulary, tiny_recipe):
    result = adversarial_step(make_state(vocabulary, tiny_recipe), make_batch(vocabulary, (3,) * B), tiny_recipe.glam)
    assert result.finite
    assert all(torch.isfinite(loss) for loss in result.losses.values())


def test_the_discriminator_loss_gets_the_mismatched_pairs_of_the_batch(vocabulary, tiny_recipe, monkeypatch):
    counts = []

    def loss(real, fake, mismatched, **options):
        counts.append(mismatched.numel())
        return discriminator_loss(real, fake, mismatched, **options)

    monkeypatch.setattr(step, "discriminator_loss", loss)
    without = dataclasses.replace(tiny_recipe.glam, mismatched_pairs=False)
    adversarial_step(make_state(vocabulary, tiny_recipe), make_batch(vocabulary), without)
    adversarial_step(make_state(vocabulary, tiny_recipe), make_batch(vocabulary), tiny_recipe.glam)
    adversarial_step(make_state(vocabulary, tiny_recipe), make_batch(vocabulary, (3,) * B), tiny_recipe.glam)
    adversarial_step(make_state(vocabulary, tiny_recipe), make_batch(vocabulary, (3, 3, 3, 3, 4)), tiny_recipe.glam)
    equal_captions = make_batch(vocabulary, caption_ids=(6,) * B)
    adversarial_step(make_state(vocabulary, tiny_recipe), equal_captions, tiny_recipe.glam)
    stages = len(tiny_recipe.model.resolutions)
    assert counts == [0] * stages + [B] * stages + [0] * stages + [2] * stages + [0] * stages


def test_mismatched_logits_are_of_real_images_with_other_sentences(vocabulary, tiny_recipe):
    discriminator = make_state(vocabulary, tiny_recipe).paired_discriminators[1].eval()
    random = torch.Generator().manual_seed(3)
    real, fake = torch.randn(2, B, 3, 16, 16, generator=random)
    sentence = torch.randn(B, tiny_recipe.model.word_dim, generator=random)
    partner, wrong = torch.tensor([2, 0, 1, 4, 3]), torch.tensor([0, 2, 3])
    outputs = DiscriminatorPass(discriminator)(real, fake, sentence, wrong, sentence[partner[wrong]], False)
    torch.testing.assert_close(outputs.real.consistency, discriminator(real, sentence).consistency)
    torch.testing.assert_close(outputs.fake.realism, discriminator(fake, sentence).realism)
    for logit, row in zip(outputs.mismatched, wrong.tolist(), strict=True):
        pair = discriminator(real[row : row + 1], sentence[partner[row]].unsqueeze(0))
        torch.testing.assert_close(logit, pair.consistency[0])


def test_frozen_networks_get_no_gradient(vocabulary, tiny_recipe):
    state = make_state(vocabulary, tiny_recipe)
    adversarial_step(state, make_batch(vocabulary), tiny_recipe.glam)
    frozen = [*state.model.text_encoder.parameters(), *state.model.captioner.parameters()]
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in frozen)
    assert all(parameter.requires_grad for net in state.paired_discriminators for parameter in net.parameters())


def test_the_same_seeds_give_the_same_step(vocabulary, tiny_recipe):
    first, second = (
        adversarial_step(make_state(vocabulary, tiny_recipe), make_batch(vocabulary), tiny_recipe.glam) for _ in "ab"
    )
    assert first == second


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision_stays_finite_and_close_to_float32(vocabulary, tiny_recipe, precision):
    recipe = dataclasses.replace(tiny_recipe, engine=dataclasses.replace(tiny_recipe.engine, precision=precision))
    full, half = make_state(vocabulary, tiny_recipe), make_state(vocabulary, recipe)
    batch = make_batch(vocabulary)
    expected = adversarial_step(full, batch, recipe.glam)
    results = [adversarial_step(half, batch, recipe.glam) for _ in range(10)]
    # In float16, the first steps are skipped until the loss scale is small enough.
    settled = results[5:] if precision == "float16" else results
    assert all(bool(result.finite) for result in settled)
    for name, loss in results[0].losses.items():
        assert loss.dtype == torch.float32
        if "norm" not in name and "accuracy" not in name:
            torch.testing.assert_close(loss, expected.losses[name], rtol=0.05, atol=0.02, msg=name)
    assert all(value.dtype == torch.float32 for value in half.generator.module.parameters())


@pytest.mark.parametrize(
    ("model", "glam"),
    [
        ({}, {"adversarial_objective": "hinge"}),
        ({"discriminator_normalization": "spectral"}, {"adversarial_objective": "hinge", "accumulate": 2}),
        ({"discriminator_normalization": "none"}, {"r1_weight": 1.0, "r1_every": 2}),
        ({}, {"adversarial_weighting": "release", "redescription_reduction": "sentence"}),
        ({}, {"matching_ratio": 0.5, "accumulate": 2, "discriminator_learning_rate": 1e-3}),
        ({}, {"max_grad_norm": 0.5, "discriminator_learning_rate": 1e-3}),
    ],
)
def test_every_option_trains(vocabulary, tiny_recipe, model, glam):
    recipe = dataclasses.replace(
        tiny_recipe,
        model=dataclasses.replace(tiny_recipe.model, **model),
        glam=dataclasses.replace(tiny_recipe.glam, **{"generator_learning_rate": 1e-3, **glam}),
    )
    state, batch = make_state(vocabulary, recipe), make_batch(vocabulary)
    results = [adversarial_step(state, batch, recipe.glam) for _ in range(12)]
    assert all(bool(result.finite) for result in results)
    assert results[-1].losses["discriminator_16"] < results[0].losses["discriminator_16"]


def test_r1_every_third_step_has_three_times_its_weight(vocabulary, tiny_recipe):
    """Lazy regularization: the first of three steps adds three times the weighted penalty to the loss."""
    losses = {}
    for weight in (0.0, 2.0):
        glam = dataclasses.replace(
            tiny_recipe.glam,
            r1_weight=weight,
            # Without a weight, another interval would have no effect and is refused.
            r1_every=3 if weight else AdversarialRecipe.r1_every,
            discriminator_learning_rate=1e-30,
            generator_learning_rate=1e-30,
        )
        recipe = dataclasses.replace(tiny_recipe, glam=glam)
        state, batch = make_state(vocabulary, recipe), make_batch(vocabulary)
        losses[weight] = [adversarial_step(state, batch, glam).losses["discriminator_16"] for _ in range(4)]
    discriminator, text = state.discriminators[1].module, state.text(batch)
    images = batch.images.requires_grad_(True)
    penalty = r1_penalty(images, discriminator.discriminator(images, text.sentence))
    added = torch.stack(losses[2.0]) - torch.stack(losses[0.0])
    torch.testing.assert_close(added, 6 * penalty * torch.tensor([1, 0, 0, 1]), rtol=1e-3, atol=1e-5)


def test_accumulated_gradients_match_the_whole_batch(vocabulary, tiny_recipe):
    """In evaluation mode: batch norm's statistics would be those of each part."""
    steps = []
    for accumulate in (1, 5):
        glam = dataclasses.replace(tiny_recipe.glam, accumulate=accumulate)
        state = make_state(vocabulary, dataclasses.replace(tiny_recipe, glam=glam))
        for network in state.networks().values():
            network.module.eval()
        result = adversarial_step(state, make_batch(vocabulary, (0, 0, 0, 0, 1)), glam)
        steps.append((state, result))
    (whole, expected), (accumulated, result) = steps
    for name in ("kl", "redescription", "generator_total", "discriminator_8", "discriminator_16"):
        torch.testing.assert_close(result.losses[name], expected.losses[name], msg=name)
    for name, network in whole.networks().items():
        others = accumulated.networks()[name].module.parameters()
        for parameter, other in zip(network.module.parameters(), others, strict=True):
            torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-4, atol=1e-6)


def test_compiled_networks_take_the_same_step(vocabulary, tiny_recipe, monkeypatch):
    torch.compiler.reset()
    compile_in_place, compiled = torch.nn.Module.compile, []

    def compile_without_code_generation(module):
        compiled.append(type(module).__name__)
        compile_in_place(module, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_without_code_generation)
    recipe = dataclasses.replace(tiny_recipe, engine=dataclasses.replace(tiny_recipe.engine, compile=True))
    eager, fast = make_state(vocabulary, tiny_recipe), make_state(vocabulary, recipe)
    assert compiled == [*["PairedDiscriminator"] * 2, "ConditionedGenerator", *["DiscriminatorPass"] * 2]
    for _ in range(2):
        expected = adversarial_step(eager, make_batch(vocabulary), recipe.glam).losses
        losses = adversarial_step(fast, make_batch(vocabulary), recipe.glam).losses
        for name, loss in losses.items():
            torch.testing.assert_close(loss, expected[name], rtol=1e-3, atol=1e-4, msg=name)
    assert fast.generator.module.state_dict().keys() == eager.generator.module.state_dict().keys()
