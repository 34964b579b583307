"""The adversarial phases of all systems: losses against formulas written out, wrong pairs, and whole runs."""

import copy
import dataclasses
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import softplus
from torch.testing import assert_close

from mirror_modules.adversarial import AdversarialWeights
from mirror_modules.data import CaptionBatch
from mirror_modules.evaluation.evaluation import evaluate
from mirror_modules.glam import GeneratedImages
from mirror_modules.models import (
    EncoderPair,
    GANIntCLS,
    GANIntCLSConfig,
    TextToImage,
    build_model,
    register_system,
    registry,
)
from mirror_modules.pictures import grids
from mirror_modules.stem import Vocabulary
from mirror_modules.training import engine
from mirror_modules.training.folder import RunFolder
from mirror_modules.training.loop import train
from mirror_modules.training.recipes import Recipe, get_recipe
from mirror_modules.training.state import start
from mirror_modules.training.step import adversarial_step, divide, generate, update_discriminators, update_generator
from tests.runs import drawn_batch, make_tiny_recipe

VOCABULARY = Vocabulary([f"word{i}" for i in range(19)])
B, L = 6, 7
OTHERS = ("gan-int-cls", "stackgan", "stackgan-v2", "ppgn", "attngan")
PHASES = [
    ("mirrorgan", "glam"),
    ("gan-int-cls", "glam"),
    ("stackgan", "first_stage"),
    ("stackgan", "glam"),
    ("stackgan-v2", "glam"),
    ("ppgn", "glam"),
    ("attngan", "glam"),
]


def make_recipe(system, phase="glam", **changes):
    """The tiny recipe of a system, whose networks stay as they are."""
    recipe = make_tiny_recipe("demo" if system == "mirrorgan" else f"{system}-demo")
    still = {"generator_learning_rate": 1e-30, "discriminator_learning_rate": 1e-30, "max_grad_norm": None}
    return dataclasses.replace(recipe, **{phase: dataclasses.replace(recipe.phase(phase), **still, **changes)})


def make_batch(class_ids=(0, 1, 2, 0, 4, 2), caption_ids=None):
    random, count = torch.Generator().manual_seed(1), len(class_ids)
    lengths = torch.tensor([7, 3, 1, 5, 2, 4]).repeat(-(-count // 6))[:count, None]
    word_mask = torch.arange(L) < lengths
    tokens = torch.randint(3, len(VOCABULARY), (count, L), generator=random) * word_mask
    images = torch.rand(count, 3, 16, 16, generator=random) * 2 - 1
    rows = torch.arange(count)
    caption_ids = rows if caption_ids is None else torch.tensor(caption_ids)
    return CaptionBatch(images, tokens, word_mask, torch.tensor(class_ids), ("",) * count, rows, rows, caption_ids)


def make_state(recipe, phase="glam", vocabulary=VOCABULARY):
    torch.manual_seed(0)
    pair = EncoderPair(recipe.model, len(vocabulary))
    random = torch.Generator().manual_seed(2)
    return start(build_model(recipe.model, vocabulary), recipe, random, pair=pair, phase=phase)


def step_by_formula(system, phase, state, part, fake, recipe):
    """The losses of the published systems, written out: y is -log D and n is -log(1 - D)."""

    def y(logits):
        return softplus(-logits).mean()

    def n(logits):
        return softplus(logits).mean()

    losses = {}
    texts = fake.text.detach()[:B]
    for i, resolution in enumerate(state.resolutions):
        discriminator = copy.deepcopy(state.paired_discriminators[i])
        images, real = fake.images[i].detach(), part.real[i]
        features = discriminator.features(real)
        r, f = discriminator.logits(features, texts), discriminator.logits(discriminator.features(images[:B]), texts)
        rows = part.mismatched_rows
        m = None if rows is None else discriminator.logits(features[rows], texts[part.partners]).consistency
        g = discriminator(images, fake.text.detach())
        if system == "mirrorgan":
            terms = y(r.realism) + n(f.realism) + y(r.consistency) + n(f.consistency) + n(m)
            losses[f"discriminator_{resolution}"] = terms / 2
            losses[f"generator_{resolution}"] = (y(g.realism) + y(g.consistency)) / 2
        elif system == "gan-int-cls" or phase == "first_stage":
            losses[f"discriminator_{resolution}"] = y(r.consistency) + (n(m) + n(f.consistency)) / 2
            losses[f"generator_{resolution}"] = y(g.consistency[:B])
            if system == "gan-int-cls":
                losses[f"interpolation_{resolution}"] = y(g.consistency[B:])
        elif system == "stackgan-v2":
            terms = [y(r.consistency), y(r.realism), n(m), y(r.realism[rows]), n(f.consistency), n(f.realism)]
            losses[f"discriminator_{resolution}"] = sum(terms)
            losses[f"generator_{resolution}"] = y(g.consistency) + y(g.realism)
        elif system == "ppgn":
            losses[f"discriminator_{resolution}"] = y(r.realism) + n(f.realism)
            losses[f"generator_{resolution}"] = y(g.realism)
        else:
            negative = n(f.consistency) + n(m) + n(f.realism)
            losses[f"discriminator_{resolution}"] = (y(r.consistency) + y(r.realism)) / 2 + negative / 3
            losses[f"generator_{resolution}"] = y(g.consistency) + y(g.realism)
    total = sum(loss for name, loss in losses.items() if name.startswith("generator"))
    total = total + 0.5 * sum(loss for name, loss in losses.items() if name.startswith("interpolation"))
    if system not in ("gan-int-cls", "ppgn"):
        (condition,) = fake.conditions
        mean, log_variance = condition.mean, condition.log_variance
        losses["kl"] = ((mean**2 + log_variance.exp() - 1 - log_variance) / 2).mean()
        total = total + recipe.kl_weight * losses["kl"]
    return losses, total


@pytest.mark.parametrize(("system", "phase"), PHASES)
def test_the_losses_are_those_of_the_published_system(system, phase):
    changes = {"matching_ratio": None, "fine_ratios": 1.0} if system == "attngan" else {}
    changes |= {"redescription_weight": 0.0, "redescription_ratio": None} if system == "mirrorgan" else {}
    recipe = make_recipe(system, phase, **changes)
    state, glam = make_state(recipe, phase), recipe.phase(phase)
    parts = divide(state, make_batch(), glam)
    generated = [generate(state, part) for part in parts]
    expected, total = step_by_formula(system, phase, state, parts[0], generated[0], glam)
    losses = update_discriminators(state, parts, generated, glam, [])
    losses |= update_generator(state, parts, generated, glam, [])
    for name, loss in expected.items():
        assert_close(losses[name], loss.detach(), msg=name, rtol=1e-5, atol=1e-6)
    assert_close(losses["generator_total"], total.detach(), rtol=1e-5, atol=1e-6)
    assert ("kl" in losses) == ("kl" in expected)
    assert {name for name in losses if "generator_" in name} >= {f"generator_{size}" for size in state.resolutions}


@pytest.mark.parametrize(("system", "phase"), PHASES)
def test_a_step_trains_the_generating_parts_and_no_others(system, phase):
    recipe = make_recipe(system, phase)
    glam = dataclasses.replace(recipe.phase(phase), generator_learning_rate=1e-3, discriminator_learning_rate=1e-3)
    state = make_state(dataclasses.replace(recipe, **{phase: glam}), phase)
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    discriminators = [copy.deepcopy(each.state_dict()) for each in state.paired_discriminators]
    results = [adversarial_step(state, make_batch(), glam) for _ in range(2)]
    assert all(bool(result.finite) for result in results)
    changed = {name for name, value in state.model.state_dict().items() if not torch.equal(before[name], value)}
    trained = {name for name, each in state.generator.module.named_parameters() if each.requires_grad}
    assert trained <= changed
    frozen = ("text_encoder", "captioner", *(("first_",) if phase == "glam" else ("conditioning", "second_")))
    assert not [name for name in changed if name.startswith(frozen) and system == "stackgan"]
    assert not [name for name in changed if name.startswith(("text_encoder", "captioner"))]
    # PPGN has discriminators of realism alone: their other half has no gradient.
    unused = ("joint", "consistency_head") if system == "ppgn" else ()
    for old, discriminator in zip(discriminators, state.paired_discriminators, strict=True):
        for name, parameter in discriminator.named_parameters():
            assert torch.equal(old[name], parameter) == name.startswith(unused), name


@pytest.mark.parametrize("system", ["stackgan", "stackgan-v2"])
def test_only_stackgan_v2_trains_its_text_layer_through_the_discriminators(system):
    recipe = make_recipe(system, kl_weight=0.0)
    state = make_state(recipe)
    (part,) = divide(state, make_batch(), recipe.glam)
    text = generate(state, part).text
    assert text.requires_grad == (system == "stackgan-v2")
    losses = update_generator(state, [part], [generate(state, part)], recipe.glam, [])
    assert bool(torch.isfinite(losses["generator_total"]))
    gradient = state.model.conditioning.linear.weight.grad
    # Through the images in any case.
    assert gradient.abs().max() > 0


def test_the_colors_of_consecutive_stages_are_compared():
    recipe = make_recipe("stackgan-v2", color_weight=50.0)
    state = make_state(recipe)
    parts = divide(state, make_batch(), recipe.glam)
    generated = [generate(state, part) for part in parts]
    plain = dataclasses.replace(recipe.glam, color_weight=0.0)
    without = update_generator(state, parts, [generate(state, part) for part in parts], plain, [])
    losses = update_generator(state, parts, generated, recipe.glam, [])
    coarse, fine = (images.flatten(2) for images in generated[0].images)
    expected = 0.0
    for i in range(B):
        mean, other = fine[i].mean(dim=1), coarse[i].mean(dim=1)
        covariance, other_covariance = (torch.cov(pixels[i], correction=0) for pixels in (fine, coarse))
        expected += ((mean - other) ** 2).mean() / B + 5 * ((covariance - other_covariance) ** 2).mean() / B
    assert_close(losses["color"], expected.detach(), rtol=1e-4, atol=1e-7)
    assert_close(losses["generator_total"], without["generator_total"] + 50 * losses["color"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_mixtures_of_sentences_share_the_forward_pass_of_the_generator(accumulate):
    recipe = make_recipe("gan-int-cls", accumulate=accumulate)
    state = make_state(recipe)
    parts = divide(state, make_batch(), recipe.glam)
    rows = B // accumulate
    for part in parts:
        assert (len(part.sentence), len(part.noise), len(part.tokens)) == (rows, rows + rows // 2, rows)
        generated = generate(state, part)
        mixtures = (part.sentence[: rows // 2] + part.sentence[rows // 2 : 2 * (rows // 2)]) / 2
        assert_close(generated.text[rows:], mixtures)
        assert len(generated.images[0]) == rows + rows // 2
    # The discriminators do not see them.
    losses = adversarial_step(state, make_batch(), recipe.glam).losses
    assert bool(torch.isfinite(losses["interpolation_16"]))


def test_odd_batches_leave_one_sentence_out():
    recipe = make_recipe("gan-int-cls")
    (part,) = divide(make_state(recipe), make_batch((0, 1, 2, 3, 4)), recipe.glam)
    assert len(part.noise) == 7


def test_a_balanced_matching_loss_ignores_the_mixtures():
    recipe = make_recipe("gan-int-cls", matching_ratio=0.5, redescription_weight=None, redescription_ratio=0.5)
    losses = adversarial_step(make_state(recipe), make_batch(), recipe.glam).losses
    assert {"matching", "redescription", "interpolation_16"} <= losses.keys()
    assert all(bool(torch.isfinite(loss)) for loss in losses.values())


STATES = {}


@settings(max_examples=40)
@given(
    ids=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=6, max_size=12),
    captions_differ=st.booleans(),
    accumulate=st.sampled_from([1, 3]),
    system=st.sampled_from(["gan-int-cls", "stackgan-v2"]),
)
def test_wrong_pairs_are_never_right_ones(ids, captions_differ, accumulate, system):
    """Images, classes and captions occur several times in a batch, and in several parts of it."""
    class_ids, caption_ids = zip(*ids[: len(ids) // 3 * 3])
    recipe = make_recipe(system, accumulate=accumulate, batch_size=12)
    state = STATES.setdefault(system, make_state(recipe))
    batch = make_batch(class_ids, None if captions_differ else caption_ids)
    parts = divide(state, batch, recipe.glam)
    classes, captions, first, found = batch.class_ids, batch.caption_ids, 0, 0
    for part in parts:
        rows = torch.arange(first, first + len(part.tokens))
        first += len(rows)
        if part.mismatched_rows is None:
            continue
        assert (classes[part.partners] != classes[rows[part.mismatched_rows]]).all()
        assert (captions[part.partners] != captions[rows[part.mismatched_rows]]).all()
        found += len(part.mismatched_rows)
    if not captions_differ:
        return
    largest = torch.bincount(classes).max()
    # As many as possible: all, unless one class fills more than half of the batch.
    assert found == len(class_ids) if 2 * largest <= len(class_ids) else found == 2 * (len(class_ids) - largest)


def test_the_text_of_a_wrong_pair_is_that_of_its_partner(monkeypatch):
    recipe = make_recipe("stackgan-v2", accumulate=3)
    state, seen = make_state(recipe), []
    forward = type(state.discriminators[0].module).forward

    def record(self, real, fake, text, rows, mismatched_text, *others):
        seen.append((text, rows, mismatched_text))
        return forward(self, real, fake, text, rows, mismatched_text, *others)

    monkeypatch.setattr(type(state.discriminators[0].module), "forward", record)
    parts = divide(state, make_batch(), recipe.glam)
    with torch.no_grad():
        generated = [generate(state, part) for part in parts]
    update_discriminators(state, parts, generated, recipe.glam, [])
    whole = torch.cat([text for text, *_ in seen[:3]])
    for part, (_, rows, mismatched_text) in zip(parts, seen[:3], strict=True):
        assert_close(mismatched_text, whole[part.partners])
        assert torch.equal(rows, part.mismatched_rows)


@pytest.mark.parametrize("system", OTHERS)
def test_losses_of_the_discriminators_decrease_on_drawn_flowers(system):
    recipe = make_tiny_recipe(f"{system}-demo")
    glam = dataclasses.replace(recipe.glam, generator_learning_rate=1e-30, discriminator_learning_rate=2e-3)
    vocabulary, batch = drawn_batch(recipe)
    state = make_state(dataclasses.replace(recipe, glam=glam), vocabulary=vocabulary)
    losses = [adversarial_step(state, batch, glam).losses["discriminator_16"] for _ in range(100)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize("system", OTHERS)
def test_losses_of_the_generator_decrease_on_drawn_flowers(system):
    recipe = make_tiny_recipe(f"{system}-demo")
    # With a large ratio, the balanced gradients are far from those of the sum of the losses.
    ratio = None if recipe.glam.matching_ratio is None else 0.25
    glam = dataclasses.replace(recipe.glam, matching_ratio=ratio, kl_weight=0.1)
    glam = dataclasses.replace(glam, generator_learning_rate=5e-3, discriminator_learning_rate=1e-30)
    vocabulary, batch = drawn_batch(recipe)
    state = make_state(dataclasses.replace(recipe, glam=glam), vocabulary=vocabulary)
    losses = [adversarial_step(state, batch, glam).losses["generator_total"] for _ in range(100)]
    # The discriminators stay as they are.
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize("system", OTHERS)
def test_systems_train_in_low_precision_with_spectral_norm_and_r1(system):
    recipe = make_tiny_recipe(f"{system}-demo")
    glam = dataclasses.replace(recipe.glam, r1_weight=0.5, r1_every=2, adversarial_objective="hinge", accumulate=2)
    recipe = dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, discriminator_normalization="spectral"),
        glam=dataclasses.replace(glam, batch_size=6),
        engine=dataclasses.replace(recipe.engine, precision="bfloat16"),
    )
    state = make_state(recipe)
    for _ in range(3):
        result = adversarial_step(state, make_batch(), recipe.glam)
        assert bool(result.finite)
        assert all(bool(torch.isfinite(loss)) and loss.dtype == torch.float32 for loss in result.losses.values())
    assert all(parameter.dtype == torch.float32 for parameter in state.generator.module.parameters())


@pytest.mark.parametrize("system", OTHERS)
def test_compiled_networks_of_a_system_take_the_same_step(system, monkeypatch):
    torch.compiler.reset()
    compile_in_place = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_in_place(module, backend="aot_eager"))
    recipe = make_recipe(system)
    compiled = dataclasses.replace(recipe, engine=dataclasses.replace(recipe.engine, compile=True))
    expected = adversarial_step(make_state(recipe), make_batch(), recipe.glam).losses
    losses = adversarial_step(make_state(compiled), make_batch(), recipe.glam).losses
    for name, loss in losses.items():
        assert_close(loss, expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_run_without_the_name_of_its_system_is_that_of_a_mirrorgan(tmp_path):
    recipe, folder = make_tiny_recipe(), RunFolder(tmp_path)
    folder.begin(recipe)
    content = json.loads(folder.config.read_text())
    assert content["recipe"]["model"].pop("system") == "mirrorgan"
    folder.config.write_text(json.dumps(content))
    assert folder.read_recipe() == recipe


class Stopped(Exception):
    """Ends a run in the middle of a step."""


@pytest.mark.parametrize("system", OTHERS)
def test_a_run_trains_resumes_bit_for_bit_loads_and_is_evaluated(system, tmp_path, monkeypatch):
    recipe = make_tiny_recipe(f"{system}-demo")
    recipe = dataclasses.replace(
        recipe,
        engine=dataclasses.replace(recipe.engine, checkpoint_every=2),
        logging=dataclasses.replace(recipe.logging, validate_every=3),
    )
    finished = train(recipe, tmp_path / "finished")
    phase = recipe.model.adversarial_phases[0]
    record = engine.PhaseRun.record

    def stop(self, result):
        if (self.phase, self.step) == (phase, 2):
            raise Stopped
        record(self, result)

    with monkeypatch.context() as patch:
        patch.setattr(engine.PhaseRun, "record", stop)
        with pytest.raises(Stopped):
            train(recipe, tmp_path / "stopped", phases=[each for each in recipe.phases if each != "evaluator"])
    resumed = train(recipe, tmp_path / "stopped", phases=["glam", phase], resume=True)
    assert (resumed.model / "model.safetensors").read_bytes() == (finished.model / "model.safetensors").read_bytes()
    assert RunFolder(finished.path).read_recipe() == recipe
    model = TextToImage.from_pretrained(finished.model)
    assert model.config == recipe.model
    assert model.generate("a red flower", seed=0).shape == (1, 3, 16, 16)
    metrics = evaluate(finished.path, fit_classifier=False)
    assert set(metrics["r_precision"]) >= {"generated", "real"}
    assert finished.report.exists()


def test_the_first_stage_of_stackgan_is_frozen_afterwards(tmp_path):
    recipe = make_tiny_recipe("stackgan-demo")
    folder = train(recipe, tmp_path / "run", phases=["stem", "stream", "first_stage", "glam"])
    first = load_file(folder.weights("first_stage"))
    both = load_file(folder.weights("glam"))
    assert {name.partition(".")[0] for name in first} == {"first_conditioning", "first_stage"}
    assert all(torch.equal(both[name], value) for name, value in first.items())
    assert sorted(path.name for path in folder.samples.iterdir())[:1] == ["first_stage-00000002.png"]


def test_samples_show_the_finest_stage_that_is_trained(tmp_path, monkeypatch):
    sheets = []
    draw = grids.captioned_grid

    def record(images, *arguments, **options):
        sheets.append(images.shape[2])
        return draw(images, *arguments, **options)

    monkeypatch.setattr(grids, "captioned_grid", record)
    # The generator of the last phase returns the images of the frozen first stage, too.
    train(make_tiny_recipe("stackgan-demo"), tmp_path / "run", phases=["stem", "stream", "first_stage", "glam"])
    assert sheets == [8, 8, 16, 16]
    recipe, sheets[:] = make_tiny_recipe(), []
    recipe = dataclasses.replace(recipe, glam=dataclasses.replace(recipe.glam, steps=5, coarse_steps=3))
    train(recipe, tmp_path / "coarse", phases=["stem", "stream", "glam"])
    assert sheets == [8, 16, 16]


def test_the_first_stage_of_stackgan_can_be_extended(tmp_path):
    shorter = make_tiny_recipe("stackgan-demo")
    longer = dataclasses.replace(shorter, first_stage=dataclasses.replace(shorter.first_stage, steps=5))
    phases = ["stem", "stream", "first_stage"]
    expected = train(longer, tmp_path / "longer", phases=phases)
    train(shorter, tmp_path / "extended", phases=phases)
    extended = train(longer, tmp_path / "extended", phases=phases, resume=True)
    assert extended.weights("first_stage").read_bytes() == expected.weights("first_stage").read_bytes()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model": {"system": "stackgan", "resolutions": [16, 64]}},
            r"'stackgan' is trained in first_stage and glam, but",
        ),
        (
            {"first_stage": {"steps": 3}},
            r"'mirrorgan' is trained in glam, but first_stage is .*; leave first_stage out",
        ),
        (
            {"glam": {"interpolation_weight": 1.0}},
            r"glam\.interpolation_weight mixes sentences, but the system 'mirrorgan'",
        ),
        ({"model": {"system": "nothing"}}, r"Recipe: model\.system: unknown system 'nothing'"),
        ({"model": {"system": "gan-int-cls"}}, r"GANIntCLSConfig: resolutions must be one image size"),
        (
            {"model": {"system": "gan-int-cls", "resolutions": [64]}, "glam": {"color_weight": 1.0}},
            r"glam\.color_weight compares the stages of the generator, but this phase trains one",
        ),
        (
            {"model": {"system": "attngan"}, "glam": {"mismatched_pairs": False}},
            r"the adversarial weights 'release' of the system 'attngan' average over mismatched pairs too",
        ),
        (
            {"glam": {"adversarial_weighting": "gan-int-cls", "mismatched_pairs": False}},
            r"averages over mismatched pairs",
        ),
        (
            {
                "model": {"system": "gan-int-cls", "resolutions": [64]},
                "glam": {"interpolation_weight": 1.0, "accumulate": 16},
            },
            r"interpolation_weight mixes the sentences of two images, but batch_size=16 leaves one image per part",
        ),
    ],
)
def test_options_that_do_not_fit_the_system_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict(fields, get_recipe("ablation"))


def test_the_system_of_a_recipe_can_be_changed_with_its_own_fields():
    base = get_recipe("demo")
    recipe = Recipe.from_dict({"model": {"system": "attngan", "residual_blocks": 3}}, base)
    assert (recipe.model.system, recipe.model.residual_blocks) == ("attngan", 3)
    assert recipe.model.channels == base.model.channels
    assert Recipe.from_dict({"model": {"residual_blocks": 1}}, recipe).model.residual_blocks == 1
    with pytest.raises(ValueError, match=r"unknown field 'model\.attention'"):
        Recipe.from_dict({"model": {"system": "attngan", "attention": "word"}}, base)


@pytest.mark.parametrize("system", OTHERS)
def test_the_recipes_follow_demo(system):
    base, recipe = get_recipe("demo"), get_recipe(f"{system}-demo")
    assert recipe.model.system == system
    for name in ("data", "stem", "stream", "evaluator", "evaluation"):
        assert getattr(recipe, name) == getattr(base, name)
    steps = [recipe.phase(phase).steps for phase in recipe.model.adversarial_phases]
    assert sum(steps) == base.glam.steps
    assert recipe.glam.redescription_weight == 0
    assert recipe.glam.has_matching == (system == "attngan")


def test_weights_of_ones_own_reach_the_losses(monkeypatch):
    recipe = make_recipe("stackgan-v2")
    weights = AdversarialWeights(1, 1, 0, 0, 0, 0)
    monkeypatch.setattr(type(recipe.model), "weighting", lambda self, phase: weights)
    state = make_state(recipe)
    parts = divide(state, make_batch(), recipe.glam)
    generated = [generate(state, part) for part in parts]
    discriminator = copy.deepcopy(state.paired_discriminators[0])
    losses = update_discriminators(state, parts, generated, recipe.glam, [])
    text = generated[0].text.detach()
    real, fake = discriminator(parts[0].real[0], text), discriminator(generated[0].images[0].detach(), text)
    expected = softplus(-real.consistency).mean() + softplus(fake.consistency).mean()
    assert_close(losses["discriminator_8"], expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.fixture
def own_systems(monkeypatch):
    """A function that registers a variant of GAN-INT-CLS, and returns the tiny recipe of it."""
    monkeypatch.setattr(registry, "_SYSTEMS", dict(registry._SYSTEMS))

    def make(system_changes, config_changes):
        base = make_tiny_recipe("gan-int-cls-demo")
        config_type = dataclasses.dataclass(frozen=True)(
            type("OwnConfig", (GANIntCLSConfig,), {"system": "own", **config_changes})
        )
        register_system(type("Own", (GANIntCLS,), {"config_type": config_type, **system_changes}))
        sizes = {each.name: getattr(base.model, each.name) for each in dataclasses.fields(base.model)}
        return dataclasses.replace(base, model=config_type(**sizes))

    return make


def small_images(self, noise, samples, *_, **__):
    (images,) = self.generator(noise, samples[0]).images
    return GeneratedImages([images[..., ::2, ::2]], [], [])


def reads_values(self, sentence, noise):
    return [self.conditioning(sentence) * float(sentence.sum() >= 0)]


@pytest.mark.parametrize(
    ("system", "config", "message"),
    [
        ({"build": lambda self, config: None}, {}, r"the generator has no weights; define its parts as attributes in"),
        (
            {"discriminators": lambda self, phase: []},
            {},
            r"must return one for each of config\.trained_resolutions, \(16,\), but there are 0",
        ),
        (
            {"discriminators": lambda self, phase: [nn.Linear(3, 3)]},
            {},
            r"fails on a batch of 2 captions \(AttributeError: 'Linear' object has no attribute 'features'",
        ),
        ({"conditions": lambda self, sentence, noise: None}, {}, r"fails on a batch of 2 captions \(TypeError: "),
        ({"images": lambda self, noise, samples, words: None}, {}, r"fails on a batch of 2 captions \(TypeError: "),
        ({"images": lambda self, noise, *_: noise}, {}, r"\(AttributeError: 'Tensor' object has no attribute 'images'"),
        (
            {"images": small_images},
            {},
            r"images must return images \(B, 3, size, size\) of the sizes \(16,\), .* are \[\(2, 3, 8, 8\)\]",
        ),
        (
            {"discriminator_text": lambda self, sentence, conditions: sentence[:, 1:]},
            {},
            r"\(ValueError: PairedDiscriminator: sentence has 9 features",
        ),
        ({}, {"weighting": lambda self, phase: "paperr"}, r"\(ValueError: generator_loss: weighting must be"),
    ],
)
def test_mistakes_in_a_system_of_ones_own_are_found_before_anything_is_trained(
    own_systems, system, config, message, tmp_path
):
    recipe = own_systems(system, config)
    with pytest.raises(ValueError, match=r"the system 'own' in phase 'glam'.*" + message):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_system_of_ones_own_may_read_values(own_systems, tmp_path):
    recipe = own_systems({"conditions": reads_values}, {})
    folder = train(recipe, tmp_path / "run", phases=["stem", "stream", "glam"])
    assert TextToImage.from_pretrained(folder.model).config.system == "own"


def test_a_system_is_trained_in_known_phases(own_systems):
    for phases in ((), ("first_stage",), ("glam", "third_stage")):
        with pytest.raises(ValueError, match=r"adversarial_phases of the system 'own' must be \('glam',\) or"):
            own_systems({}, {"adversarial_phases": phases})


def test_configurations_of_ones_own_have_fields_of_any_type(own_systems):
    types = {"names": tuple, "widths": dict[str, int], "anything": Any}
    recipe = own_systems({}, {"__annotations__": types, "names": (), "widths": None, "anything": 3})
    fields = {"names": ["a", "b"], "widths": {"first": 3}, "anything": None}
    model = Recipe.from_dict({"model": fields}, recipe).model
    assert (model.names, model.widths, model.anything) == (("a", "b"), {"first": 3}, None)
    for name, message in (("names", "of type tuple"), ("widths", r"of type dict\[str, int\]")):
        with pytest.raises(ValueError, match=rf"model\.{name} must be {message}, but it is 3"):
            Recipe.from_dict({"model": {name: 3}}, recipe)
