"""Evaluation: unseen captions, independent encoders, and the files that it writes."""

import dataclasses
import json
import os
import shutil
import weakref
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mirror_modules import MirrorGAN
from mirror_modules.data import ATTRIBUTES, CaptionedImage, InMemoryCaptions
from mirror_modules.data.readers.images import shrink
from mirror_modules.data.seeding import seeded
from mirror_modules.data.transforms import to_float
from mirror_modules.evaluation import attributes, evaluation, networks, retrieval
from mirror_modules.evaluation.attributes import fit_attribute_classifier
from mirror_modules.evaluation.evaluation import _cases, evaluate
from mirror_modules.evaluation.extractors import Extractor
from mirror_modules.evaluation.networks import _feature_metrics, _images_of_the_same_caption, extract
from mirror_modules.metrics import (
    diversity,
    expected_hits,
    frechet_distance,
    inception_score,
    kernel_distance,
    r_precision_folds,
    redescription_quality,
)
from mirror_modules.stem.vocabulary import split_words
from mirror_modules.training.batches import load_splits, unseen_captions
from mirror_modules.training.folder import RunFolder
from mirror_modules.training.loop import load_pair
from mirror_modules.training.validation import (
    Unseen,
    WordAccuracy,
    derangement,
    mean_image_information,
    predict_words,
    unseen_pairs,
)


@pytest.fixture
def without_report(monkeypatch):
    """Skip the report, which takes longer than the evaluation itself."""
    monkeypatch.setattr(evaluation, "write_report", lambda *_: None)


def make_quick_classifiers(monkeypatch):
    """Train classifiers for two steps only; returns a list that grows with each training."""
    fit, trained = attributes.fit_network, []

    def fit_and_count(*arguments):
        trained.append(arguments)
        fit(*arguments)

    monkeypatch.setattr(attributes, "MIN_ACCURACY", 0.0)
    monkeypatch.setattr(attributes, "HELD_OUT_IMAGES", 50)
    # No other test's classifier is used, and none is kept.
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    monkeypatch.setattr(attributes, "fit_network", fit_and_count)
    monkeypatch.setattr(networks, "fit_attribute_classifier", partial(fit_attribute_classifier, steps=2, images=70))
    return trained


@pytest.mark.filterwarnings("error")
def test_evaluation_measures_and_writes(run_copy):
    metrics = evaluate(run_copy.path)
    assert json.loads(run_copy.evaluation.read_text()) == metrics
    assert set(metrics["r_precision"]) == set(metrics["word_accuracy"]) == {"generated", "real", "shuffled"}
    for precision in metrics["r_precision"].values():
        assert 0 <= precision["top1"] <= precision["top2"] <= precision["top3"] <= 1
        assert len(precision["standard_errors"]) == 3
        assert all(error >= 0 for error in precision["standard_errors"])
    assert all(0 <= share <= 1 for share in metrics["word_accuracy"].values())
    assert set(metrics["image_information"]) == set(metrics["r_precision"])
    assert set(metrics["seconds"]) == set(metrics["images_per_second"]) == {"stem", "stream", "glam", "evaluator"}
    assert metrics["images"] == 31
    assert metrics["candidates"] == 11
    assert metrics["chance"] == pytest.approx(1 / 11)
    (evaluator,) = metrics["evaluators"].values()
    # Drawn flowers: every image has a class of its own, and validation has the attributes of training.
    assert set(evaluator) == {"description", "validation"}
    assert set(evaluator["validation"]) == {"images", "all_captions"}
    figures = evaluator["validation"]["all_captions"]
    assert {name: figures[name] for name in metrics["r_precision"]} == metrics["r_precision"]
    assert (figures["candidates"], figures["chance"]) == (metrics["candidates"], metrics["chance"])
    assert 0 <= figures["text_ceiling"]["top1"] <= 1
    assert "class_oracle" not in figures
    # Three steps of training teach nothing.
    assert metrics["cannot_rank"] is figures["cannot_rank"] is True
    assert metrics["reasons"] == figures["reasons"]
    assert "are below three times chance, 27.3%" in metrics["reasons"][0]
    for quality in metrics["redescription"].values():
        assert set(quality) == {"bleu4", "chrf", "words_in_place"}
    assert set(metrics["attributes"]["real"]) == {"measured_colors"}
    assert "features" not in metrics
    assert "not_measured" not in metrics
    assert metrics["skipped"] == {"training": 0, "validation": 0}
    assert run_copy.report.read_text(encoding="utf-8").lower().startswith("<!doctype html>")
    assert list(run_copy.pictures.glob("*.png"))


def test_a_second_evaluation_gives_the_same_metrics(run_copy, without_report):
    first = evaluate(run_copy.path)
    assert evaluate(run_copy.path) == first


def test_no_evaluated_caption_was_trained_on(tiny_recipe):
    splits = load_splits(tiny_recipe.data, tiny_recipe.model, tiny_recipe.seed)
    seen = {caption for captions in splits.training.captions for caption in captions}
    unseen = unseen_captions(splits)
    assert unseen
    assert not seen & {entry.caption for entry in unseen}
    assert all(entry.caption in splits.validation.captions[entry.image] for entry in unseen)


def test_captions_of_the_training_split_are_not_evaluated(tiny_recipe):
    splits = load_splits(tiny_recipe.data, tiny_recipe.model, tiny_recipe.seed)
    captions = [splits.validation.captions[5][:1], splits.validation.captions[6], *splits.training.captions[2:]]
    samples = [CaptionedImage(np.zeros((2, 2, 3), np.uint8), each, 0, {}) for each in captions]
    training = InMemoryCaptions(samples, splits.vocabulary, max_words=tiny_recipe.model.max_words)
    splits = splits._replace(training=training)
    chosen = dict(unseen_captions(splits))
    assert chosen[5] == splits.validation.captions[5][1]
    assert 6 not in chosen


def test_a_run_stores_its_recipe(tiny_run, tiny_recipe):
    assert tiny_run.read_recipe() == tiny_recipe


@pytest.mark.parametrize("phase", ["stem", "stream", "glam", "evaluator"])
def test_a_missing_phase_is_named(run_copy, phase):
    run_copy.weights(phase).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks phase '{phase}'"):
        evaluate(run_copy.path)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a run"):
        evaluate(tmp_path)


def test_damaged_evaluator_weights_are_named(run_copy):
    shutil.copy(run_copy.config, run_copy.weights("evaluator"))
    with pytest.raises(ValueError, match=r"evaluator\.safetensors is damaged"):
        evaluate(run_copy.path)


def test_a_config_without_a_recipe_is_refused(tmp_path):
    folder = RunFolder(tmp_path)
    folder.config.write_text('{"name": "other"}')
    with pytest.raises(ValueError, match="holds no recipe"):
        folder.read_recipe()


@pytest.mark.parametrize("count", [2, 3, 31])
def test_shuffled_images_never_keep_their_caption(count):
    partner = derangement(count, seed=0)
    assert sorted(partner.tolist()) == list(range(count))
    assert all(partner[i] != i for i in range(count))


def test_the_evaluator_encodes_the_images_and_captions_of_each_source(
    run_copy, tiny_recipe, monkeypatch, without_report
):
    splits = load_splits(tiny_recipe.data, tiny_recipe.model, tiny_recipe.seed)
    unseen = unseen_captions(splits)
    ranked, expected = {}, []

    def rank(images, sentences, *classes, **options):
        ranked[len(ranked)] = (images, sentences)
        return r_precision_folds(images, sentences, *classes, **options)

    def expect(images, sentences, **options):
        expected.append(images)
        return expected_hits(images, sentences, **options)

    monkeypatch.setattr(retrieval, "r_precision_folds", rank)
    monkeypatch.setattr(evaluation, "expected_hits", expect)
    evaluate(run_copy.path)
    evaluator = load_pair(run_copy, "evaluator", tiny_recipe, splits)
    (generated, sentences), (real, _), (shuffled, _), (queries, own_sentences) = ranked.values()
    assert torch.equal(own_sentences, sentences.double())
    for row in (0, 7, 30):
        others = [
            caption for caption in splits.validation.captions[unseen[row].image] if caption != unseen[row].caption
        ]
        tokens, word_mask = splits.vocabulary.encode(others, warn_unknown=False)
        features = evaluator.text_encoder(tokens, word_mask).sentence
        query = sum(each / each.norm() for each in features) / len(others)
        torch.testing.assert_close(queries[row].float(), query, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for row in (0, 7, 30):
            image = to_float(splits.validation.images[unseen[row].image].unsqueeze(0))
            tokens, word_mask = splits.vocabulary.encode([unseen[row].caption], warn_unknown=False)
            torch.testing.assert_close(real[row], evaluator.image_encoder(image).image[0])
            torch.testing.assert_close(sentences[row], evaluator.text_encoder(tokens, word_mask).sentence[0])
    assert not any(torch.equal(a, b) for a, b in zip(shuffled, generated))
    assert sorted(shuffled.tolist()) == sorted(generated.tolist())
    # The best and the worst captions are selected by their generated images.
    assert torch.equal(expected[0], generated)


def test_word_accuracy_matches_a_loop_over_words(run_copy, tiny_recipe):
    model = MirrorGAN.from_pretrained(run_copy.model)
    splits = load_splits(tiny_recipe.data, tiny_recipe.model, tiny_recipe.seed)
    images = to_float(splits.validation.images[:5])
    tokens, word_mask = splits.vocabulary.encode(
        [captions[0] for captions in splits.validation.captions[:5]], warn_unknown=False
    )
    correct = count = 0
    with torch.no_grad():
        for image, row, mask in zip(images, tokens, word_mask):
            words = [*row[mask].tolist(), 1]
            logits = model.captioner(image.unsqueeze(0), torch.tensor([words]))
            for word, prediction in zip(words, logits[0]):
                correct += int(prediction.argmax()) == word
                count += 1
        predicted = predict_words(model.captioner, images, tokens, word_mask)
    assert WordAccuracy.of(predicted).accuracy == pytest.approx(correct / count)


def test_a_run_without_a_log_is_evaluated_without_curves_and_speed(run_copy):
    """Removing a damaged log is the way out that its error names."""
    expected = evaluate(run_copy.path)
    run_copy.log.unlink()
    metrics = evaluate(run_copy.path)
    speed = {"seconds", "images_per_second", "waited_for_data"}
    assert metrics == {name: value for name, value in expected.items() if name not in speed}
    page = run_copy.report.read_text(encoding="utf-8")
    assert "Loss curves" not in page
    assert "Training phases" not in page
    assert "Generated images" in page


def test_a_damaged_log_is_reported_before_images_are_generated(run_copy, monkeypatch):
    run_copy.log.write_text("{}\n")
    monkeypatch.setattr(evaluation, "generate_images", None)
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged: line 1"):
        evaluate(run_copy.path)


@pytest.mark.parametrize("gradients", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_random_state_and_gradients_of_the_caller_are_kept(run_copy, monkeypatch, without_report, gradients):
    make_quick_classifiers(monkeypatch)
    random = torch.get_rng_state()
    with gradients():
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        metrics = evaluate(run_copy.path, fit_classifier=True)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert "diversity" in metrics["features"]["generated"]


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "the device must be one of .* but it is 'gpu'"),
        pytest.param(
            "cuda",
            "it is 'cuda', but torch sees no GPU; use 'cpu' or 'auto'",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_a_device_that_cannot_be_used_is_refused(run_copy, device, message):
    with pytest.raises(ValueError, match=message):
        evaluate(run_copy.path, device=device)


def test_a_failed_evaluation_keeps_the_previous_files(run_copy):
    evaluate(run_copy.path)
    before = run_copy.evaluation.read_bytes(), run_copy.report.read_bytes()
    run_copy.log.write_text("{}\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged: line 1"):
        evaluate(run_copy.path)
    assert (run_copy.evaluation.read_bytes(), run_copy.report.read_bytes()) == before


def test_a_requested_classifier_is_trained_once_and_named(run_copy, monkeypatch):
    trained = make_quick_classifiers(monkeypatch)
    metrics = evaluate(run_copy.path, fit_classifier=True)
    assert "trained on drawn flowers" in metrics["extractor"]
    for name in ("generated", "real"):
        assert metrics["features"][name]["frechet_distance"] > 0
        assert 1 <= metrics["features"][name]["inception_score"] <= 8
    assert 0 <= metrics["features"]["generated"]["diversity"] <= 2
    assert metrics["features"]["generated"]["diversity_standard_error"] > 0
    assert set(metrics["attributes"]["generated"]["classifier"]) == {*ATTRIBUTES, "all"}
    assert [path.name for path in (run_copy.path / "classifiers").iterdir()] == ["attributes.safetensors"]
    page = run_copy.report.read_text(encoding="utf-8")
    for text in ("Attributes", "<td>classifier</td>", "Fréchet distance", "trained on drawn flowers", "Best and worst"):
        assert text in page
    assert evaluate(run_copy.path) == metrics
    assert len(trained) == 1
    # One that an earlier call has saved is not used either.
    assert "features" not in evaluate(run_copy.path, fit_classifier=False)


def test_a_classifier_is_trained_by_default_for_drawn_flowers_that_it_can_classify(
    run_copy, monkeypatch, without_report
):
    trained = make_quick_classifiers(monkeypatch)
    # At 16 pixels, it would not be accurate enough.
    assert "features" not in evaluate(run_copy.path)
    monkeypatch.setattr(networks, "LOWEST_CLASSIFIED_RESOLUTION", 16)
    assert "features" not in evaluate(run_copy.path, fit_classifier=False)
    assert trained == []
    metrics = evaluate(run_copy.path)
    assert set(metrics["attributes"]["generated"]["classifier"]) == {*ATTRIBUTES, "all"}
    assert evaluate(run_copy.path) == metrics
    assert len(trained) == 1
    # One that an earlier call has saved is not used either.
    assert "features" not in evaluate(run_copy.path, fit_classifier=False)


def test_photographs_get_a_classifier_on_request_only(run_copy, monkeypatch, without_report):
    monkeypatch.setattr(networks, "is_synthetic", lambda recipe: False)
    monkeypatch.setattr(networks, "LOWEST_CLASSIFIED_RESOLUTION", 16)
    assert "not_measured" not in evaluate(run_copy.path)
    assert "not_measured" in evaluate(run_copy.path, fit_classifier=True)


@pytest.mark.parametrize(("of_run", "threads", "used"), [(None, None, 1), (3, None, 3), (3, 2, 2)])
def test_the_number_of_threads_is_set_and_restored(run_copy, monkeypatch, without_report, of_run, threads, used):
    recipe = run_copy.read_recipe()
    run_copy.begin(dataclasses.replace(recipe, engine=dataclasses.replace(recipe.engine, threads=of_run)))
    counts, generate = [], evaluation.generate_images
    monkeypatch.setattr(
        evaluation, "generate_images", lambda *a: (counts.append(torch.get_num_threads()), generate(*a))[1]
    )
    evaluate(run_copy.path, threads=threads)
    assert set(counts) == {used}
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("threads", [0, 1.5])
def test_an_invalid_number_of_threads_is_refused(run_copy, threads):
    with pytest.raises(
        ValueError, match=f"evaluate: threads must be a whole number of at least 1, but it is {threads}"
    ):
        evaluate(run_copy.path, threads=threads)


def test_independent_metrics_use_no_network_that_the_generator_was_trained_with(run_copy, monkeypatch, without_report):
    """Zeroing the training's text encoder, image encoder and captioner does not change them."""

    def zero_weights(path, prefix):
        weights = load_file(path)
        assert any(name.startswith(prefix) for name in weights)
        zeros = {name: torch.zeros_like(value) for name, value in weights.items() if name.startswith(prefix)}
        save_file({**weights, **zeros}, path)

    make_quick_classifiers(monkeypatch)
    before = evaluate(run_copy.path, fit_classifier=True)
    for path, prefix in (
        (run_copy.weights("stem"), ""),
        (run_copy.weights("stream"), ""),
        (run_copy.model / "model.safetensors", "captioner."),
    ):
        zero_weights(path, prefix)
    after = evaluate(run_copy.path)
    assert after["word_accuracy"] != before["word_accuracy"]
    for name in ("r_precision", "features", "attributes"):
        assert after[name] == before[name]
    # The generator depends on the text encoder of phase `stem`; metrics of real images do not.
    zero_weights(run_copy.model / "model.safetensors", "text_encoder.")
    without_text = evaluate(run_copy.path)
    for name in ("r_precision", "features", "attributes"):
        assert without_text[name]["real"] == before[name]["real"]
    assert without_text["features"]["generated"] != before["features"]["generated"]


def test_the_evaluator_shares_no_weights_with_the_stem(tiny_run):
    evaluator, stem = (load_file(tiny_run.weights(phase)) for phase in ("evaluator", "stem"))
    floats = [name for name, value in evaluator.items() if value.is_floating_point()]
    assert not [name for name in floats if torch.equal(evaluator[name], stem[name])]


def test_the_real_baseline_is_held_out_and_at_the_models_resolution(tiny_recipe):
    """Training images are stored larger when random crops are taken from them."""
    splits = load_splits(dataclasses.replace(tiny_recipe.data, augment=True), tiny_recipe.model, tiny_recipe.seed)
    assert splits.training.images.shape[1] == 19
    real = to_float(splits.validation.images)
    images, batches = {"generated": -real, "real": real}, []
    same_caption = torch.randn(20, 3, 16, 16)

    def mean_colors(batch):
        batches.append(batch)
        return batch.mean(dim=(2, 3))

    extractor = Extractor("means", mean_colors, lambda batch: batch.mean(dim=(2, 3)), slice(None, None, 4))
    extracted = {name: extract(extractor, batch) for name, batch in images.items()}
    batches.clear()
    metrics = _feature_metrics(extractor, splits.training.images, extracted, same_caption, seed=0)
    held_out, of_two_captions = batches
    expected = [to_float(torch.from_numpy(shrink(image.numpy(), 16))[None]) for image in splits.training.images[::4]]
    assert sorted(held_out.flatten(1).tolist()) == sorted(torch.cat(expected).flatten(1).tolist())
    # The same number of each, because distances of fewer images are larger.
    assert len(held_out) == metrics["real"]["distance_images"] == metrics["generated"]["distance_images"] == 11
    assert metrics["real"]["frechet_distance"] == frechet_distance(held_out.mean((2, 3)), real.mean((2, 3)))
    # The complete sets: subsets of all images would be the same images ten times.
    kernel = kernel_distance(held_out.mean((2, 3)), real.mean((2, 3)), subset_size=None)
    assert metrics["real"]["kernel_distance"] == kernel.mean
    assert metrics["real"]["kernel_distance_standard_error"] == kernel.standard_error > 0
    score = inception_score(real.mean((2, 3)), splits=10, generator=torch.Generator().manual_seed(0))
    assert metrics["real"]["inception_score"] == score.mean
    assert torch.equal(of_two_captions, same_caption)
    spread = diversity(same_caption.mean((2, 3)).unflatten(0, (2, 10)))
    assert metrics["generated"]["diversity"] == spread.mean
    assert "diversity" not in metrics["real"]
    # A network without classes has no Inception Score.
    extractor = extractor._replace(logits=None)
    extracted = {name: extract(extractor, batch) for name, batch in images.items()}
    without = _feature_metrics(extractor, splits.training.images, extracted, same_caption, seed=0)
    for name, figures in metrics.items():
        assert without[name] == {key: value for key, value in figures.items() if "inception" not in key}


def test_changed_training_captions_are_refused(run_copy, monkeypatch):
    """Token ids would stand for other words."""

    def load_fewer(data, *arguments):
        return load_splits(dataclasses.replace(data, training_images=5), *arguments)

    monkeypatch.setattr(evaluation, "load_splits", load_fewer)
    with pytest.raises(ValueError, match=r"vocabulary\.json is not the vocabulary of the training captions"):
        evaluate(run_copy.path)
    run_copy.vocabulary.unlink()
    with pytest.raises(ValueError, match=r"model has a different vocabulary than the current training captions"):
        evaluate(run_copy.path)
    assert not run_copy.evaluation.exists()


def test_metrics_without_a_classifier_are_listed_and_the_others_measured(run_copy, monkeypatch, without_report):
    monkeypatch.setattr(networks, "is_synthetic", lambda recipe: False)
    metrics = evaluate(run_copy.path, fit_classifier=True)
    assert "a class classifier needs at least 2 classes" in metrics["not_measured"]
    assert "--inception needs no classes" in metrics["not_measured"]
    assert "features" not in metrics
    assert 0 <= metrics["r_precision"]["generated"]["top1"] <= 1

    # With Inception as the extractor, no class classifier is trained.
    means = Extractor("means", lambda batch: batch.mean((2, 3)), lambda batch: batch.mean((2, 3)))
    monkeypatch.setattr(networks, "inception_extractor", lambda **_: means)
    metrics = evaluate(run_copy.path, fit_classifier=True, inception=True)
    assert "not_measured" not in metrics
    assert metrics["extractor"] == "means"
    assert metrics["features"]["real"]["distance_images"] == 31


@pytest.mark.parametrize(
    ("is_synthetic", "options", "measured"),
    [
        (False, {}, ["first", "second"]),
        (False, {"inception": True}, ["inception"]),
        (False, {"fit_classifier": True}, []),
        (False, {"fit_classifier": False}, []),
        (True, {}, ["first", "second"]),
        (True, {"fit_classifier": True}, ["convolutional network trained on drawn flowers"]),
        (True, {"fit_classifier": True, "inception": True}, ["inception"]),
    ],
)
def test_which_networks_measure_distances(run_copy, monkeypatch, without_report, is_synthetic, options, measured):
    """Pretrained backbones of the evaluators by default, at a resolution without a classifier; others if asked for."""

    def extractor(name, shift):
        return Extractor(name, lambda batch: batch.mean((2, 3)) + shift, None)

    make_quick_classifiers(monkeypatch)
    monkeypatch.setattr(networks, "is_synthetic", lambda recipe: is_synthetic)
    monkeypatch.setattr(networks, "inception_extractor", lambda **_: extractor("inception", 0))
    monkeypatch.setattr(
        networks, "backbone_extractors", lambda *_: [extractor("first", 0), extractor("second", torch.arange(3) ** 2)]
    )
    metrics = evaluate(run_copy.path, **options)
    found = [each for each in [metrics, *metrics.get("further_extractors", [])] if "features" in each]
    assert len(found) == len(measured)
    assert all(each["extractor"].startswith(name) for each, name in zip(found, measured))
    assert ("classifier" in metrics.get("attributes", {}).get("real", {})) == (
        is_synthetic and "fit_classifier" in options
    )
    if len(found) == 2:
        assert set(found[1]) == {"extractor", "features"}
        first, second = (each["features"]["generated"] for each in found)
        assert first["frechet_distance"] == pytest.approx(second["frechet_distance"])
        assert first["diversity"] != second["diversity"]
    assert evaluate(run_copy.path, **options) == metrics


def test_a_later_evaluation_does_not_depend_on_a_saved_class_classifier(run_copy, monkeypatch, without_report):
    monkeypatch.setattr(networks, "is_synthetic", lambda recipe: False)
    means = Extractor("means", lambda batch: batch.mean((2, 3)), None)
    monkeypatch.setattr(networks, "backbone_extractors", lambda *_: [means])
    monkeypatch.setattr(networks, "fit_class_extractor", None)
    (run_copy.path / "classifiers").mkdir()
    (run_copy.path / "classifiers" / "classes.safetensors").touch()
    assert evaluate(run_copy.path)["extractor"] == "means"


def test_diversity_compares_images_of_the_same_caption(tiny_recipe, monkeypatch):
    splits = load_splits(tiny_recipe.data, tiny_recipe.model, tiny_recipe.seed)
    unseen = unseen_pairs(splits, tiny_recipe.model.max_words)
    batches = []

    def generate(model, tokens, word_mask, seed, location):
        assert location is None
        batches.append(tokens)
        return torch.stack([torch.randn(3, 4, 4, generator=seeded(*row)) for row in tokens.tolist()])

    monkeypatch.setattr(networks, "generate_images", generate)
    monkeypatch.setattr(networks, "DIVERSE_CAPTIONS", 3)
    # Images differ between captions, but not within a caption.
    model = SimpleNamespace(locate=lambda boxes, points, count: None)
    images = _images_of_the_same_caption(model, unseen, seed=0)
    assert diversity(images.flatten(1).unflatten(0, (3, 10))).mean < 1e-9
    assert not torch.equal(images[0], images[10])
    assert batches[0][::10].tolist() == unseen.tokens[[0, 10, 20]].tolist()


def test_the_report_shows_captions_spread_over_the_split(run_copy, monkeypatch):
    shown = []
    monkeypatch.setattr(evaluation, "write_report", lambda folder, recipe, showcase, metrics: shown.append(showcase))
    evaluate(run_copy.path)
    recipe = run_copy.read_recipe()
    captions = [entry.caption for entry in unseen_captions(load_splits(recipe.data, recipe.model, recipe.seed))]
    assert shown[0].captions == [captions[0], captions[10], captions[20]]
    assert all(word in (*split_words(captions[10]), "<unknown>") for word in shown[0].words[1])


@pytest.mark.filterwarnings("ignore:unknown words")
def test_evaluated_images_can_be_generated_again(run_copy, tiny_recipe, monkeypatch, without_report):
    model, chunks = MirrorGAN.from_pretrained(run_copy.model), []
    measure = evaluation.image_features
    monkeypatch.setattr(
        evaluation, "image_features", lambda pair, batch: (chunks.append(batch), measure(pair, batch))[1]
    )
    monkeypatch.setattr("mirror_modules.training.validation.CHUNK", 7)
    evaluate(run_copy.path)
    assert [len(chunk) for chunk in chunks] == [7, 7, 7, 7, 3] * 2
    images = torch.cat(chunks[:5]), torch.cat(chunks[5:])
    captions = [caption for _, caption in unseen_captions(load_splits(tiny_recipe.data, tiny_recipe.model, 0))]
    again = model.generate(captions, seed=tiny_recipe.seed)
    torch.testing.assert_close(images[0], again, rtol=0, atol=1e-5)
    alone = model.generate(captions[13], seed=tiny_recipe.seed + 13)
    torch.testing.assert_close(images[0][13:14], alone, rtol=0, atol=1e-5)
    splits = load_splits(tiny_recipe.data, tiny_recipe.model, 0)
    rows = [image for image, _ in unseen_captions(splits)]
    assert torch.equal(images[1], to_float(splits.validation.images[rows]))


def test_evaluation_keeps_the_images_of_a_single_chunk(run_copy, monkeypatch, without_report):
    """And its metrics do not depend on the chunks."""
    means = Extractor("means", lambda batch: batch.mean((2, 3)), lambda batch: batch.mean((2, 3)))
    monkeypatch.setattr(networks, "inception_extractor", lambda **_: means)
    whole = evaluate(run_copy.path, inception=True)
    generate, images = evaluation.generate_images, []

    def generate_and_follow(*arguments):
        # The images of cases, which come last, stay for the report.
        alive = [each for each in images[:6] if each() is not None]
        assert not alive, "the images of an earlier chunk are still in memory"
        batch = generate(*arguments)
        images.append(weakref.ref(batch))
        return batch

    for module in (evaluation, networks):
        monkeypatch.setattr(module, "generate_images", generate_and_follow)
    monkeypatch.setattr("mirror_modules.training.validation.CHUNK", 7)
    in_chunks = evaluate(run_copy.path, inception=True)
    # Five chunks, images of the same caption, and the best and the worst case.
    assert len(images) == 5 + 1 + 2
    assert in_chunks["features"]["generated"] == pytest.approx(whole["features"]["generated"], rel=1e-3)
    for name in ("r_precision", "attributes", "word_accuracy", "redescription"):
        assert in_chunks[name] == whole[name]
    assert in_chunks["image_information"] == pytest.approx(whole["image_information"], rel=1e-3, abs=1e-6)


def test_shuffled_images_are_generated_images_with_other_captions(run_copy, tiny_recipe, without_report):
    """Each of their metrics is that of the images in another order, computed here one image at a time."""
    metrics = evaluate(run_copy.path)
    model = MirrorGAN.from_pretrained(run_copy.model)
    unseen = unseen_pairs(load_splits(tiny_recipe.data, tiny_recipe.model, 0), tiny_recipe.model.max_words)
    images = evaluation.generate_images(model, unseen.tokens, unseen.word_mask, tiny_recipe.seed)
    order = derangement(31, tiny_recipe.seed)
    likelihood = {}
    for distance in (1, 2):
        images = images[order]
        predicted = torch.cat(
            [
                predict_words(model.captioner, images[i : i + 1], unseen.tokens[i : i + 1], unseen.word_mask[i : i + 1])
                for i in range(31)
            ]
        )
        likelihood[distance] = predicted[:, 1]
        if distance == 1:
            assert metrics["word_accuracy"]["shuffled"] == pytest.approx(
                float(predicted[:, 0].sum() / predicted[:, 2].sum())
            )
            descriptions = [model.describe(image)[0] for image in images.split(1)]
            quality = redescription_quality(descriptions, unseen.captions)._asdict()
            assert metrics["redescription"]["shuffled"] == quality
    own, other = (WordAccuracy(0.0, 0.0, likelihood[d], unseen.word_mask.sum(1) + 1) for d in (1, 2))
    assert metrics["image_information"]["shuffled"] == pytest.approx(mean_image_information(own, other), abs=1e-6)


def test_a_diverged_generator_is_refused(run_copy):
    path = run_copy.model / "model.safetensors"
    diverged = {
        name: value * torch.nan if name.startswith("generator.") and value.is_floating_point() else value
        for name, value in load_file(path).items()
    }
    save_file(diverged, path)
    with pytest.raises(ValueError, match=r"the generator in .*model generates images with NaN or infinite values"):
        evaluate(run_copy.path)


def test_a_config_with_malformed_versions_is_damaged(run_copy):
    content = json.loads(run_copy.config.read_text())
    run_copy.config.write_text(json.dumps({**content, "versions": []}))
    with pytest.raises(ValueError, match=r"config\.json is damaged: versions must be an object"):
        evaluate(run_copy.path)


def test_best_and_worst_cases_are_the_extremes_of_the_precision():
    precision = torch.tensor([0.5, 0.0, 1.0, 0.25, 0.75])
    rows = torch.arange(5)
    # Of a split of eight images, those at rows 7, 6 and so on.
    real = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).expand(8, 4, 4, 3)
    unseen = Unseen(list("abcde"), real, rows, rows, rows, 7 - rows, rows)
    cases = _cases(precision, unseen, lambda part, rows: rows.view(-1, 1, 1, 1).expand(-1, 3, 4, 4).float())
    assert [case.caption for case in cases["best"]] == ["c", "e"]
    assert [case.caption for case in cases["worst"]] == ["b", "d"]
    assert float(cases["best"][1].generated.mean()) == 4
    assert torch.equal(cases["best"][1].real, to_float(real[3:4])[0])
    assert cases["worst"][1].precision == 0.25
