"""Validation metrics and samples during training, and that they do not affect it."""

import dataclasses
import json
import math
import weakref

import pytest
import torch
from safetensors.torch import load_file

from mirror_modules import MirrorGAN
from mirror_modules.metrics import r_precision
from mirror_modules.models.encoder_pair import EncoderPair
from mirror_modules.training import loop, validation
from mirror_modules.training.batches import load_splits
from mirror_modules.training.loop import load_pair, train
from mirror_modules.training.state import start
from mirror_modules.training.validation import (
    Rotation,
    Unseen,
    WordAccuracy,
    derangement,
    draw_samples,
    mean_image_information,
    measure_captioner,
    measure_generator,
    measure_pair,
    predict_words,
    unseen_pairs,
)


def validation_lines(folder):
    lines = [json.loads(line) for line in folder.log.read_text().splitlines()]
    return [line for line in lines if any(name.startswith("validation") for name in line)]


def training_lines(folder):
    lines = [json.loads(line) for line in folder.log.read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in ("seconds", "waited")}
        for line in lines
        if "skipped" in line
    ]


@pytest.fixture
def splits(tiny_recipe):
    return load_splits(tiny_recipe.data, tiny_recipe.model, tiny_recipe.seed)


def test_validation_measures_every_phase_without_affecting_it(tiny_run, tiny_recipe, tmp_path):
    logging = dataclasses.replace(tiny_recipe.logging, validate_every=2)
    folder = train(dataclasses.replace(tiny_recipe, logging=logging), tmp_path / "run")
    assert training_lines(folder) == training_lines(tiny_run)
    for phase in ("stem", "stream", "glam", "evaluator"):
        assert folder.weights(phase).read_bytes() == tiny_run.weights(phase).read_bytes()
    names = {
        (line["phase"], line["step"]): sorted(name for name in line if "validation" in name)
        for line in validation_lines(folder)
    }
    assert names == {
        ("stem", 2): ["validation_r_precision"],
        ("stream", 2): ["validation_cross_entropy", "validation_image_information", "validation_word_accuracy"],
        ("glam", 2): ["validation_r_precision", "validation_redescription"],
        ("evaluator", 2): ["validation_r_precision"],
    }
    assert validation_lines(tiny_run) == []


def test_spread_selects_evenly_spaced_pairs():
    rows = torch.arange(11)
    unseen = Unseen([f"caption {i}" for i in range(11)], *[rows] * 6)
    few = unseen.spread(4)
    assert few.captions == ["caption 0", "caption 2", "caption 5", "caption 8"]
    assert all(tensor.tolist() == [0, 2, 5, 8] for tensor in few[2:7])
    assert few.split_images is rows
    assert few.images.tolist() == [0, 2, 5, 8]
    assert few.boxes is few.points is None
    located = unseen._replace(boxes=torch.rand(11, 4))
    assert torch.equal(located.spread(4).boxes, located.boxes[[0, 2, 5, 8]])
    assert unseen.spread(12).captions == unseen.captions


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_validation_does_not_change_the_captioner(tiny_recipe, tmp_path, weight):
    """Nor its batch-norm statistics, with and without a redescription loss."""
    recipe = dataclasses.replace(
        tiny_recipe,
        glam=dataclasses.replace(tiny_recipe.glam, redescription_weight=weight, redescription_ratio=None),
        logging=dataclasses.replace(tiny_recipe.logging, validate_every=1),
    )
    folder = train(recipe, tmp_path / "run", phases=["stem", "stream", "glam"])
    captioner = MirrorGAN.from_pretrained(folder.model).captioner.state_dict()
    assert all(torch.equal(captioner[name], value) for name, value in load_file(folder.weights("stream")).items())


def test_the_r_precision_of_a_pair_matches_the_metric(tiny_run, tiny_recipe, splits):
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


def test_the_metrics_of_a_captioner_match_the_loops(tiny_run, tiny_recipe, splits):
    captioner = MirrorGAN.from_pretrained(tiny_run.model).captioner
    unseen = unseen_pairs(splits, tiny_recipe.model.max_words)
    correct = total = words = 0.0
    measured = measure_captioner(captioner.train(), unseen, 5)
    assert captioner.training
    captioner.eval()
    for image, tokens, mask in zip(unseen.images, unseen.tokens, unseen.word_mask):
        length = int(mask.sum())
        targets = torch.cat((tokens[:length], torch.tensor([1])))
        with torch.no_grad():
            logits = captioner((image.permute(2, 0, 1) / 127.5 - 1)[None], targets[None])[0].log_softmax(dim=1)
        for i in range(length + 1):
            total -= float(logits[i, targets[i]])
            correct += int(logits[i].argmax() == targets[i])
            words += 1
    assert measured["cross_entropy"] == pytest.approx(total / words, rel=1e-4)
    assert measured["word_accuracy"] == pytest.approx(correct / words)


class PixelCaptioner(torch.nn.Module):
    """Predicts, with probability 0.7, the token whose id is the byte value of the image's first pixel."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(4, 1)

    def forward(self, images, tokens, word_mask):
        predicted = ((images[:, 0, 0, 0] + 1) * 127.5).round().long()
        probabilities = torch.full((*tokens.shape, 4), 0.1)
        probabilities[torch.arange(len(images)), :, predicted] = 0.7
        return probabilities.log()


def test_image_information_is_the_mean_log_ratio_to_another_image():
    tokens = torch.tensor([[2], [3], [2]])
    mask = torch.ones(3, 1, dtype=torch.bool)
    images = torch.zeros(3, 3, 2, 2) + (tokens.view(3, 1, 1, 1) / 127.5 - 1)
    # Each image gets another one's caption, in a cycle of three: one of these pairs still matches, the other two lower
    # the log-probability of the word by log 7. The end token, one of two tokens per caption, is never predicted.
    expected = 2 / 3 * math.log(7) / 2
    captioner, others = PixelCaptioner(), derangement(3, 0)
    for given, information in ((images, expected), (images[:1].expand(3, -1, -1, -1), 0)):
        own, other = (WordAccuracy.of(predict_words(captioner, each, tokens, mask)) for each in (given, given[others]))
        assert mean_image_information(own, other) == pytest.approx(information, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_captions_meet_the_images_of_their_neighbors_in_a_rotation(count, monkeypatch):
    """Chunks of images give the result of each caption with its image, and with those at distances 1 and 2."""
    monkeypatch.setattr(validation, "CHUNK", 3)
    tokens = torch.randint(2, 4, (count, 5))
    mask = torch.arange(5) < torch.randint(1, 6, (count, 1))
    pixels = torch.randint(0, 4, (count, 2, 2, 3), dtype=torch.uint8)
    rows = torch.arange(count)
    unseen = Unseen([str(i) for i in range(count)], pixels, tokens, mask, rows, rows, rows)
    captioner, rotation = PixelCaptioner(), Rotation(unseen, seed=5)
    predicted = unseen.in_chunks(lambda part, rows: rotation.predict(captioner, part.images, rows))
    assert predicted.shape == (count, 3, 3)
    next_image = derangement(count, 5)
    for distance in range(3):
        image_of = list(range(count))
        for _ in range(distance):
            image_of = [int(next_image[image]) for image in image_of]
        expected = WordAccuracy.of(predict_words(captioner, pixels[image_of], tokens, mask))
        result = rotation.accuracy(predicted, distance)
        assert (result.accuracy, result.cross_entropy) == pytest.approx((expected.accuracy, expected.cross_entropy))
        torch.testing.assert_close(result.log_likelihood, expected.log_likelihood)
        assert torch.equal(result.word_count, mask.sum(dim=1) + 1.0)


def test_validation_keeps_the_images_of_a_single_chunk(tiny_run, tiny_recipe, splits, monkeypatch):
    """And its metrics do not depend on the chunks."""
    model, unseen = MirrorGAN.from_pretrained(tiny_run.model), unseen_pairs(splits, tiny_recipe.model.max_words)
    pair = load_pair(tiny_run, "stem", tiny_recipe, splits)
    state = start(model, tiny_recipe, torch.Generator())
    generate, chunks = validation.generate_images, []

    def generate_and_follow(*arguments):
        assert not any(image() is not None for image in chunks), "the images of an earlier chunk are still in memory"
        images = generate(*arguments)
        chunks.append(weakref.ref(images))
        return images

    whole = measure_generator(state, pair, unseen, 11, 3), measure_captioner(model.captioner, unseen, 3)
    monkeypatch.setattr(validation, "generate_images", generate_and_follow)
    monkeypatch.setattr(validation, "CHUNK", 7)
    in_chunks = measure_generator(state, pair, unseen, 11, 3), measure_captioner(model.captioner, unseen, 3)
    assert len(chunks) == 5
    for expected, measured in zip(whole, in_chunks):
        # The information of an untrained captioner is the small difference of two cross entropies of 5 nats.
        assert measured == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_model_selection_uses_the_encoders_of_stem(tiny_recipe, tmp_path, monkeypatch):
    pairs = []
    measure = loop.measure_generator

    def record(state, pair, *arguments):
        pairs.append(pair)
        return measure(state, pair, *arguments)

    monkeypatch.setattr(loop, "measure_generator", record)
    glam = dataclasses.replace(tiny_recipe.glam, keep_best="r_precision")
    folder = train(dataclasses.replace(tiny_recipe, glam=glam), tmp_path / "run")
    stem = load_file(folder.weights("stem"))
    (pair,) = pairs
    assert isinstance(pair, EncoderPair)
    assert all(torch.equal(value, stem[name]) for name, value in pair.state_dict().items())


def test_samples_use_fixed_captions_and_noise_and_the_averaged_generator(tiny_run, tiny_recipe, splits):
    sheets = sorted(tiny_run.samples.iterdir())
    assert [path.name for path in sheets] == ["glam-00000002.png", "glam-00000003.png"]
    assert sheets[0].read_bytes() != sheets[1].read_bytes()
    unseen = unseen_pairs(splits, tiny_recipe.model.max_words)
    state = start(MirrorGAN(tiny_recipe.model, splits.vocabulary), tiny_recipe, torch.Generator())
    first, again = (draw_samples(state, unseen, seed=3, need_weights=False).images for _ in range(2))
    other = draw_samples(state, unseen, seed=4, need_weights=False).images
    assert all(torch.equal(one, two) for one, two in zip(first, again))
    assert not torch.equal(first[-1], other[-1])
    # The generator in training is not used.
    with torch.no_grad():
        for parameter in state.generator.module.parameters():
            parameter.fill_(float("nan"))
    assert all(torch.equal(one, two) for one, two in zip(first, draw_samples(state, unseen, 3, False).images))


def test_tensorboard_gets_all_scalars_and_images(tiny_recipe, tmp_path):
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


def test_tensorboard_of_a_resumed_run_has_each_step_once(tiny_recipe, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging = dataclasses.replace(tiny_recipe.logging, tensorboard=True)
    engine = dataclasses.replace(tiny_recipe.engine, checkpoint_every=1)
    recipe = dataclasses.replace(tiny_recipe, logging=logging, engine=engine)
    step, calls = loop.matching_step, []

    def interrupt_third_step(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(loop, "matching_step", interrupt_third_step)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", phases=["stem"])
    monkeypatch.undo()
    folder = train(recipe, tmp_path / "run", phases=["stem"], resume=True)
    events = EventAccumulator(str(folder.path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("stem/gradient_norm")] == [1, 2, 3]
