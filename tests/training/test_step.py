"""One adversarial step: who moves, who stands still, and what the average is."""

import copy
import dataclasses

import pytest
import torch

from mirror_modules import MirrorGAN
from mirror_modules.adversarial import discriminator_loss, r1_penalty
from mirror_modules.data import CaptionBatch
from mirror_modules.stem import Vocabulary
from mirror_modules.training import step
from mirror_modules.training.state import Judge, start
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
    return CaptionBatch(images, tokens, word_mask, torch.tensor(class_ids), ("",) * B, torch.arange(B), torch.arange(B))


def make_state(vocabulary, recipe):
    torch.manual_seed(0)
    return start(MirrorGAN(recipe.model, vocabulary), recipe, torch.Generator().manual_seed(2))


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
    glam = dataclasses.replace(tiny_recipe.glam, average_decay=0.16)
    state = make_state(vocabulary, dataclasses.replace(tiny_recipe, glam=glam))
    expected = copy.deepcopy(state.painter.module.state_dict())
    for updates in range(4):
        adversarial_step(state, make_batch(vocabulary), glam)
        # 1/10, 2/11, 3/12 reach the decay at the second.
        decay = min(0.16, (1 + updates) / (10 + updates))
        for name, value in copy.deepcopy(state.painter.module.state_dict()).items():
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
    average, live = state.average.module.state_dict()[name], state.painter.module.state_dict()[name]
    assert not torch.equal(average, live)
    assert not torch.equal(average, torch.ones_like(average))


def test_without_redescription_the_captioner_is_not_asked(vocabulary, tiny_recipe, monkeypatch):
    glam = dataclasses.replace(tiny_recipe.glam, redescription_weight=0.0, redescription_ratio=None)
    state = make_state(vocabulary, dataclasses.replace(tiny_recipe, glam=glam))

    def refuse(*_):
        raise AssertionError("asked")

    monkeypatch.setattr(state.model.captioner, "forward", refuse)
    assert "redescription" not in adversarial_step(state, make_batch(vocabulary), glam).losses


def test_the_total_is_the_sum_of_its_terms(vocabulary, tiny_recipe):
    glam = dataclasses.replace(tiny_recipe.glam, redescription_weight=2.0, redescription_ratio=None, kl_weight=3.0)
    state = make_state(vocabulary, dataclasses.replace(tiny_recipe, glam=glam))
    losses = adversarial_step(state, make_batch(vocabulary), glam).losses
    expected = 3 * losses["kl"] + losses["generator_8"] + losses["generator_16"] + 2 * losses["redescription"]
    torch.testing.assert_close(losses["generator_total"], expected)


def painter_gradients(vocabulary, tiny_recipe, **options):
    glam = dataclasses.replace(tiny_recipe.glam, **options)
    state = make_state(vocabulary, dataclasses.replace(tiny_recipe, glam=glam))
    adversarial_step(state, make_batch(vocabulary), glam)
    return {name: weight.grad for name, weight in state.painter.module.named_parameters()}


def test_in_balance_the_captioner_adds_what_the_ratio_says(vocabulary, tiny_recipe):
    one, more, none = (
        painter_gradients(vocabulary, tiny_recipe, redescription_weight=weight, redescription_ratio=ratio)
        for weight, ratio in ((None, 0.5), (None, 1.0), (0.0, None))
    )
    for name, expected in one.items():
        # Backward is linear: what the captioner adds is twice as much.
        added, twice = expected - none[name], more[name] - none[name]
        torch.testing.assert_close(twice, 2 * added, rtol=1e-3, atol=1e-6, msg=name)
    assert any((one[name] - none[name]).abs().max() > 1e-5 for name in one)


def test_parts_in_balance_make_the_step_of_the_whole(vocabulary, tiny_recipe):
    steps = []
    for accumulate in (1, 5):
        glam = dataclasses.replace(
            tiny_recipe.glam, accumulate=accumulate, redescription_weight=None, redescription_ratio=0.5
        )
        state = make_state(vocabulary, dataclasses.replace(tiny_recipe, glam=glam))
        for trainee in state.trainees().values():
            trainee.module.eval()
        adversarial_step(state, make_batch(vocabulary), glam)
        steps.append(state.painter.module)
    for mine, theirs in zip(steps[0].parameters(), steps[1].parameters()):
        torch.testing.assert_close(theirs.grad, mine.grad, rtol=1e-4, atol=1e-6)


def test_mismatched_pairs_are_a_term_of_the_judges(vocabulary, tiny_recipe):
    without = dataclasses.replace(tiny_recipe.glam, mismatched_pairs=False)
    first = adversarial_step(make_state(vocabulary, tiny_recipe), make_batch(vocabulary), tiny_recipe.glam)
    second = adversarial_step(make_state(vocabulary, tiny_recipe), make_batch(vocabulary), without)
    assert first.losses["discriminator_8"] > second.losses["discriminator_8"]


def test_a_batch_of_one_class_has_no_mismatched_pairs(vocabulary, tiny_recipe):
    outcome = adversarial_step(make_state(vocabulary, tiny_recipe), make_batch(vocabulary, (3,) * B), tiny_recipe.glam)
    assert outcome.finite
    assert all(torch.isfinite(loss) for loss in outcome.losses.values())


def test_without_mismatched_pairs_the_term_is_left_out(vocabulary, tiny_recipe, monkeypatch):
    given = []

    def loss(real, fake, mismatched, **options):
        given.append(mismatched.numel())
        return discriminator_loss(real, fake, mismatched, **options)

    monkeypatch.setattr(step, "discriminator_loss", loss)
    without = dataclasses.replace(tiny_recipe.glam, mismatched_pairs=False)
    adversarial_step(make_state(vocabulary, tiny_recipe), make_batch(vocabulary), without)
    adversarial_step(make_state(vocabulary, tiny_recipe), make_batch(vocabulary), tiny_recipe.glam)
    adversarial_step(make_state(vocabulary, tiny_recipe), make_batch(vocabulary, (3,) * B), tiny_recipe.glam)
    adversarial_step(make_state(vocabulary, tiny_recipe), make_batch(vocabulary, (3, 3, 3, 3, 4)), tiny_recipe.glam)
    stages = len(tiny_recipe.model.resolutions)
    assert given == [0] * stages + [B] * stages + [0] * stages + [2] * stages


def test_mismatched_pairs_are_real_images_with_sentences_of_other_classes(vocabulary, tiny_recipe):
    discriminator = make_state(vocabulary, tiny_recipe).discriminators[1].eval()
    random = torch.Generator().manual_seed(3)
    real, fake = torch.randn(2, B, 3, 16, 16, generator=random)
    sentence = torch.randn(B, tiny_recipe.model.word_dim, generator=random)
    partner, wrong = torch.tensor([2, 0, 1, 4, 3]), torch.tensor([0, 2, 3])
    judge = Judge(discriminator)
    by_real, by_fake, mismatched, _ = judge(real, fake, sentence, wrong, sentence[partner[wrong]], False)
    torch.testing.assert_close(by_real.consistency, discriminator(real, sentence).consistency)
    torch.testing.assert_close(by_fake.realism, discriminator(fake, sentence).realism)
    for logit, row in zip(mismatched, wrong.tolist(), strict=True):
        pair = discriminator(real[row : row + 1], sentence[partner[row]].unsqueeze(0))
        torch.testing.assert_close(logit, pair.consistency[0])


def test_the_generator_leaves_no_gradient_in_what_it_does_not_train(vocabulary, tiny_recipe):
    state = make_state(vocabulary, tiny_recipe)
    adversarial_step(state, make_batch(vocabulary), tiny_recipe.glam)
    frozen = [*state.model.text_encoder.parameters(), *state.model.captioner.parameters()]
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in frozen)
    assert all(parameter.requires_grad for net in state.discriminators for parameter in net.parameters())


def test_the_same_seeds_give_the_same_step(vocabulary, tiny_recipe):
    first, second = (
        adversarial_step(make_state(vocabulary, tiny_recipe), make_batch(vocabulary), tiny_recipe.glam) for _ in "ab"
    )
    assert first == second


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision_learns_without_an_infinity(vocabulary, tiny_recipe, precision):
    recipe = dataclasses.replace(tiny_recipe, engine=dataclasses.replace(tiny_recipe.engine, precision=precision))
    full, half = make_state(vocabulary, tiny_recipe), make_state(vocabulary, recipe)
    batch = make_batch(vocabulary)
    expected = adversarial_step(full, batch, recipe.glam)
    outcomes = [adversarial_step(half, batch, recipe.glam) for _ in range(10)]
    # The scale of a float16 loss is found by trying.
    settled = outcomes[5:] if precision == "float16" else outcomes
    assert all(bool(outcome.finite) for outcome in settled)
    for name, loss in outcomes[0].losses.items():
        assert loss.dtype == torch.float32
        if "norm" not in name and "accuracy" not in name:
            torch.testing.assert_close(loss, expected.losses[name], rtol=0.05, atol=0.02, msg=name)
    assert all(value.dtype == torch.float32 for value in half.painter.module.parameters())


@pytest.mark.parametrize(
    ("model", "glam"),
    [
        ({}, {"adversarial_objective": "hinge"}),
        ({"discriminator_normalization": "spectral"}, {"adversarial_objective": "hinge", "accumulate": 2}),
        ({"discriminator_normalization": "none"}, {"r1_weight": 1.0, "r1_every": 2}),
        ({}, {"adversarial_weighting": "release", "redescription_reduction": "sentence"}),
        ({}, {"largest_gradient_norm": 0.5, "discriminator_learning_rate": 1e-3}),
    ],
)
def test_every_choice_learns(vocabulary, tiny_recipe, model, glam):
    recipe = dataclasses.replace(
        tiny_recipe,
        model=dataclasses.replace(tiny_recipe.model, **model),
        glam=dataclasses.replace(tiny_recipe.glam, **{"generator_learning_rate": 1e-3, **glam}),
    )
    state, batch = make_state(vocabulary, recipe), make_batch(vocabulary)
    outcomes = [adversarial_step(state, batch, recipe.glam) for _ in range(12)]
    assert all(bool(outcome.finite) for outcome in outcomes)
    assert outcomes[-1].losses["discriminator_16"] < outcomes[0].losses["discriminator_16"]


def test_r1_counts_so_many_times_as_it_is_left_out(vocabulary, tiny_recipe):
    """In the first step of every three: the loss differs from the one without by three times the penalty."""
    losses = {}
    for weight in (0.0, 2.0):
        glam = dataclasses.replace(
            tiny_recipe.glam,
            r1_weight=weight,
            r1_every=3,
            discriminator_learning_rate=1e-30,
            generator_learning_rate=1e-30,
        )
        recipe = dataclasses.replace(tiny_recipe, glam=glam)
        state, batch = make_state(vocabulary, recipe), make_batch(vocabulary)
        losses[weight] = [adversarial_step(state, batch, glam).losses["discriminator_16"] for _ in range(4)]
    judge, text = state.judges[1].module, state.text(batch)
    images = batch.images.requires_grad_(True)
    penalty = r1_penalty(images, judge.discriminator(images, text.sentence))
    more = torch.stack(losses[2.0]) - torch.stack(losses[0.0])
    torch.testing.assert_close(more, 6 * penalty * torch.tensor([1, 0, 0, 1]), rtol=1e-3, atol=1e-5)


def test_parts_of_a_batch_make_the_step_of_the_whole(vocabulary, tiny_recipe):
    """Without batch norm's statistics, which are those of a part."""
    states = []
    for accumulate in (1, 5):
        glam = dataclasses.replace(tiny_recipe.glam, accumulate=accumulate)
        state = make_state(vocabulary, dataclasses.replace(tiny_recipe, glam=glam))
        for trainee in state.trainees().values():
            trainee.module.eval()
        outcome = adversarial_step(state, make_batch(vocabulary, (0, 0, 0, 0, 1)), glam)
        states.append((state, outcome))
    (whole, expected), (parts, outcome) = states
    for name in ("kl", "redescription", "generator_total", "discriminator_8", "discriminator_16"):
        torch.testing.assert_close(outcome.losses[name], expected.losses[name], msg=name)
    for one, other in zip(whole.trainees().values(), parts.trainees().values()):
        for mine, theirs in zip(one.module.parameters(), other.module.parameters()):
            torch.testing.assert_close(theirs.grad, mine.grad, rtol=1e-4, atol=1e-6)


def test_compiled_networks_take_the_same_step(vocabulary, tiny_recipe, monkeypatch):
    torch.compiler.reset()
    compile_in_place, compiled = torch.nn.Module.compile, []

    def without_code(module):
        compiled.append(type(module).__name__)
        compile_in_place(module, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", without_code)
    recipe = dataclasses.replace(tiny_recipe, engine=dataclasses.replace(tiny_recipe.engine, compile=True))
    plain, fast = make_state(vocabulary, tiny_recipe), make_state(vocabulary, recipe)
    assert compiled == [*["PairedDiscriminator"] * 2, "Painter", *["Judge"] * 2]
    for _ in range(2):
        expected = adversarial_step(plain, make_batch(vocabulary), recipe.glam).losses
        losses = adversarial_step(fast, make_batch(vocabulary), recipe.glam).losses
        for name, loss in losses.items():
            torch.testing.assert_close(loss, expected[name], rtol=1e-3, atol=1e-4, msg=name)
    assert fast.painter.module.state_dict().keys() == plain.painter.module.state_dict().keys()
