"""What is measured and drawn while a model trains, and what that leaves alone."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from mirror_modules import MirrorGAN
from mirror_modules.metrics import r_precision
from mirror_modules.training import loop
from mirror_modules.training.batches import load_splits
from mirror_modules.training.loop import load_pair, train
from mirror_modules.training.pretrain import EncoderPair
from mirror_modules.training.state import start
from mirror_modules.training.validation import (
    Unseen,
    draw_samples,
    image_information,
    measure_captioner,
    measure_pair,
    unseen_pairs,
    word_accuracy,
)


def validated(folder):
    lines = [json.loads(line) for line in folder.log.read_text().splitlines()]
    return [line for line in lines if any(name.startswith("validation") for name in line)]


def trained(folder):
    lines = [json.loads(line) for line in folder.log.read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in ("seconds", "waited")}
        for line in lines
        if "skipped" in line
    ]


@pytest.fixture
def splits(tiny_recipe):
    return load_splits(tiny_recipe.data, tiny_recipe.model, tiny_recipe.seed)


def test_validation_measures_every_phase_and_changes_none(tiny_run, tiny_recipe, tmp_path):
    logging = dataclasses.replace(tiny_recipe.logging, validate_every=2)
    folder = train(dataclasses.replace(tiny_recipe, logging=logging), tmp_path / "run")
    assert trained(folder) == trained(tiny_run)
    for phase in ("stem", "stream", "glam", "judge"):
        assert folder.weights(phase).read_bytes() == tiny_run.weights(phase).read_bytes()
    named = {
        (line["phase"], line["step"]): sorted(name for name in line if "validation" in name)
        for line in validated(folder)
    }
    assert named == {
        ("stem", 2): ["validation_r_precision"],
        ("stream", 2): ["validation_cross_entropy", "validation_image_information", "validation_word_accuracy"],
        ("glam", 2): ["validation_r_precision", "validation_redescription"],
        ("judge", 2): ["validation_r_precision"],
    }
    assert validated(tiny_run) == []


def test_a_few_pairs_are_of_all_parts_of_a_data_set():
    rows = torch.arange(11)
    unseen = Unseen([f"caption {i}" for i in range(11)], rows, rows, rows)
    few = unseen.spread(4)
    assert few.captions == ["caption 0", "caption 2", "caption 5", "caption 8"]
    assert few.images.tolist() == few.tokens.tolist() == few.word_mask.tolist() == [0, 2, 5, 8]
    assert unseen.spread(12).captions == unseen.captions


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_measuring_leaves_the_captioner_alone(tiny_recipe, tmp_path, weight):
    """Its statistics too, and also where no loss asks it."""
    recipe = dataclasses.replace(
        tiny_recipe,
        glam=dataclasses.replace(tiny_recipe.glam, redescription_weight=weight, redescription_ratio=None),
        logging=dataclasses.replace(tiny_recipe.logging, validate_every=1),
    )
    folder = train(recipe, tmp_path / "run", phases=["stem", "stream", "glam"])
    captioner = MirrorGAN.from_pretrained(folder.model).captioner.state_dict()
    assert all(torch.equal(captioner[name], value) for name, value in load_file(folder.weights("stream")).items())


def test_a_pair_is_measured_as_the_metric_says(tiny_run, tiny_recipe, splits):
    pair, unseen = load_pair(tiny_run, "stem", tiny_recipe, splits), unseen_pairs(splits, tiny_recipe.model.max_words)
    pair.train()
    measured = measure_pair(pair, unseen, candidates=11, seed=3)
    assert pair.training
    pair.eval()
    with torch.no_grad():
        images = pair.image_encoder(unseen.images.permute(0, 3, 1, 2) / 127.5 - 1).image
        sentences = pair.text_encoder(unseen.tokens, unseen.word_mask).sentence
    expected = r_precision(images, sentences, candidates=11, generator=torch.Generator().manual_seed(3))
    assert measured == {"r_precision": pytest.approx(expected.top1)}


def test_a_captioner_is_measured_word_by_word(tiny_run, tiny_recipe, splits):
    captioner = MirrorGAN.from_pretrained(tiny_run.model).captioner
    unseen = unseen_pairs(splits, tiny_recipe.model.max_words)
    right = total = words = 0.0
    measured = measure_captioner(captioner.train(), unseen, 5)
    assert captioner.training
    captioner.eval()
    for image, tokens, mask in zip(unseen.images, unseen.tokens, unseen.word_mask):
        length = int(mask.sum())
        told = torch.cat((tokens[:length], torch.tensor([1])))
        with torch.no_grad():
            logits = captioner((image.permute(2, 0, 1) / 127.5 - 1)[None], told[None])[0].log_softmax(dim=1)
        for i in range(length + 1):
            total -= float(logits[i, told[i]])
            right += int(logits[i].argmax() == told[i])
            words += 1
    assert measured["cross_entropy"] == pytest.approx(total / words, rel=1e-4)
    assert measured["word_accuracy"] == pytest.approx(right / words)


class Teller(torch.nn.Module):
    """Predicts with probability 0.7 the word whose number is the brightness of the image's first pixel."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(4, 1)

    def forward(self, images, tokens, word_mask):
        told = ((images[:, 0, 0, 0] + 1) * 127.5).round().long()
        probabilities = torch.full((*tokens.shape, 4), 0.1)
        probabilities[torch.arange(len(images)), :, told] = 0.7
        return probabilities.log()


def test_an_images_information_is_what_another_image_lacks():
    tokens = torch.tensor([[2], [3], [2]])
    mask = torch.ones(3, 1, dtype=torch.bool)
    images = torch.zeros(3, 3, 2, 2) + (tokens.view(3, 1, 1, 1) / 127.5 - 1)
    # In a round of three, image 1 meets caption 0 or 2, and its own caption another 2: one of three pairs still agrees.
    # End tokens are never told rightly, at whichever image.
    expected = 2 / 3 * math.log(7) / 2
    for shown, told in ((images, expected), (images[:1].expand(3, -1, -1, -1), 0)):
        _, own = word_accuracy(Teller(), shown, tokens, mask)
        assert image_information(Teller(), shown, tokens, mask, own, 0) == pytest.approx(told, rel=1e-5, abs=1e-6)


def test_the_evaluations_judge_is_never_asked(tiny_recipe, tmp_path, monkeypatch):
    asked = []
    measure = loop.measure_generator

    def watch(state, pair, *arguments):
        asked.append(pair)
        return measure(state, pair, *arguments)

    monkeypatch.setattr(loop, "measure_generator", watch)
    glam = dataclasses.replace(tiny_recipe.glam, keep_best="r_precision")
    folder = train(dataclasses.replace(tiny_recipe, glam=glam), tmp_path / "run")
    of_stem = load_file(folder.weights("stem"))
    (pair,) = asked
    assert isinstance(pair, EncoderPair)
    assert all(torch.equal(value, of_stem[name]) for name, value in pair.state_dict().items())


def test_samples_are_of_the_same_captions_and_noise(tiny_run, tiny_recipe, splits):
    sheets = sorted(tiny_run.samples.iterdir())
    assert [path.name for path in sheets] == ["glam-00000002.png", "glam-00000003.png"]
    assert sheets[0].read_bytes() != sheets[1].read_bytes()
    unseen = unseen_pairs(splits, tiny_recipe.model.max_words)
    state = start(MirrorGAN(tiny_recipe.model, splits.vocabulary), tiny_recipe, torch.Generator())
    first, again = (draw_samples(state, unseen, seed=3, need_weights=False).images for _ in range(2))
    other = draw_samples(state, unseen, seed=4, need_weights=False).images
    assert all(torch.equal(one, two) for one, two in zip(first, again))
    assert not torch.equal(first[-1], other[-1])
    # They are the averaged generator's: the one in training may be anywhere.
    with torch.no_grad():
        for parameter in state.painter.module.parameters():
            parameter.fill_(float("nan"))
    assert all(torch.equal(one, two) for one, two in zip(first, draw_samples(state, unseen, 3, False).images))


def test_tensorboard_has_everything(tiny_recipe, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging = dataclasses.replace(tiny_recipe.logging, tensorboard=True, validate_every=2)
    folder = train(
        dataclasses.replace(tiny_recipe, logging=logging), tmp_path / "run", phases=["stem", "stream", "glam"]
    )
    events = EventAccumulator(str(folder.path / "tensorboard"), size_guidance={"images": 0}).Reload()
    scalars = set(events.Tags()["scalars"])
    assert {
        "stem/gradient_norm",
        "stream/cross_entropy",
        "glam/generator_16",
        "glam/accuracy_real_8",
        "glam/accuracy_generated_16",
        "glam/accuracy_mismatched_16",
        "glam/learning_rate_discriminator_8",
        "glam/generator_gradient_norm",
        "glam/validation_r_precision",
    } <= scalars
    assert set(events.Tags()["images"]) == {"glam/samples", "glam/attention"}
    assert [event.step for event in events.Images("glam/attention")] == [2, 3]


def test_resumed_tensorboard_has_each_step_once(tiny_recipe, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging = dataclasses.replace(tiny_recipe.logging, tensorboard=True)
    engine = dataclasses.replace(tiny_recipe.engine, checkpoint_every=1)
    recipe = dataclasses.replace(tiny_recipe, logging=logging, engine=engine)
    step, calls = loop.matching_step, []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(loop, "matching_step", stop)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", phases=["stem"])
    monkeypatch.undo()
    folder = train(recipe, tmp_path / "run", phases=["stem"], resume=True)
    events = EventAccumulator(str(folder.path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("stem/gradient_norm")] == [1, 2, 3]
