"""Evaluation: unseen captions, a judge of its own, and files that say what was measured."""

import dataclasses
import json
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from mirror_modules import MirrorGAN
from mirror_modules.data import ATTRIBUTES
from mirror_modules.data.batching import seeded
from mirror_modules.data.images import shrink
from mirror_modules.data.transforms import to_float
from mirror_modules.metrics import (
    expected_hits,
    frechet_distance,
    inception_score,
    kernel_distance,
    r_precision_folds,
)
from mirror_modules.stem.vocabulary import split_words
from mirror_modules.training import attributes, evaluation
from mirror_modules.training.attributes import fit_attribute_judge
from mirror_modules.training.batches import load_splits, unseen_captions
from mirror_modules.training.evaluation import _cases, _diversity, _feature_figures, _precision, evaluate
from mirror_modules.training.extractors import Extractor
from mirror_modules.training.folder import RunFolder
from mirror_modules.training.loop import load_pair
from mirror_modules.training.validation import derangement, unseen_pairs, word_accuracy


@pytest.fixture
def without_report(monkeypatch):
    """Drawing takes longer than measuring."""
    monkeypatch.setattr(evaluation, "write_report", lambda *_: None)


def make_quick_judges(monkeypatch):
    """Judges that learned next to nothing; returns a list that grows with each one that is trained."""
    fit, trained = attributes.fit_network, []

    def watch(*arguments):
        trained.append(arguments)
        fit(*arguments)

    monkeypatch.setattr(attributes, "ENOUGH", 0.0)
    monkeypatch.setattr(attributes, "HELD_OUT_IMAGES", 50)
    monkeypatch.setattr(attributes, "fit_network", watch)
    monkeypatch.setattr(evaluation, "fit_attribute_judge", partial(fit_attribute_judge, steps=2, images=70))
    return trained


@pytest.mark.filterwarnings("error")
def test_measures_and_writes(run_copy):
    metrics = evaluate(run_copy.path)
    assert json.loads(run_copy.evaluation.read_text()) == metrics
    assert set(metrics["r_precision"]) == set(metrics["word_accuracy"]) == {"generated", "real", "shuffled"}
    for figures in metrics["r_precision"].values():
        assert 0 <= figures["top1"] <= figures["top2"] <= figures["top3"] <= 1
        assert len(figures["standard_errors"]) == 3
        assert all(error >= 0 for error in figures["standard_errors"])
    assert all(0 <= share <= 1 for share in metrics["word_accuracy"].values())
    assert set(metrics["image_information"]) == set(metrics["r_precision"])
    assert set(metrics["seconds"]) == set(metrics["images_per_second"]) == {"stem", "stream", "glam", "judge"}
    assert metrics["images"] == 31
    assert metrics["candidates"] == 11
    assert metrics["chance"] == pytest.approx(1 / 11)
    for figures in metrics["redescription"].values():
        assert set(figures) == {"bleu4", "chrf", "words_in_place"}
    assert set(metrics["attributes"]["real"]) == {"measured_colors"}
    assert "features" not in metrics
    assert "not_measured" not in metrics
    assert metrics["left_out"] == {"training": 0, "validation": 0}
    assert run_copy.report.read_text(encoding="utf-8").lower().startswith("<!doctype html>")
    assert list(run_copy.pictures.glob("*.png"))


def test_repeats(run_copy, without_report):
    first = evaluate(run_copy.path)
    assert evaluate(run_copy.path) == first


def test_no_evaluated_caption_was_trained_on(tiny_recipe):
    splits = load_splits(tiny_recipe.data, tiny_recipe.model, tiny_recipe.seed)
    seen = {caption for captions in splits.training.captions for caption in captions}
    unseen = unseen_captions(splits)
    assert unseen
    assert not seen & {entry.caption for entry in unseen}
    assert all(entry.caption in splits.validation.captions[entry.image] for entry in unseen)


def test_a_caption_of_the_training_split_is_passed_over(tiny_recipe):
    splits = load_splits(tiny_recipe.data, tiny_recipe.model, tiny_recipe.seed)
    splits.training.captions[0] = splits.validation.captions[5][:1]
    splits.training.captions[1] = splits.validation.captions[6]
    chosen = dict(unseen_captions(splits))
    assert chosen[5] == splits.validation.captions[5][1]
    assert 6 not in chosen


def test_the_recipe_comes_back(tiny_run, tiny_recipe):
    assert tiny_run.read_recipe() == tiny_recipe


@pytest.mark.parametrize("phase", ["stem", "stream", "glam", "judge"])
def test_a_missing_phase_is_named(run_copy, phase):
    run_copy.weights(phase).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks phase '{phase}'"):
        evaluate(run_copy.path)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a run"):
        evaluate(tmp_path)


def test_a_damaged_judge_is_named(run_copy):
    shutil.copy(run_copy.config, run_copy.weights("judge"))
    with pytest.raises(ValueError, match=r"judge\.safetensors is damaged"):
        evaluate(run_copy.path)


def test_the_config_of_something_else_is_refused(tmp_path):
    folder = RunFolder(tmp_path)
    folder.config.write_text('{"name": "other"}')
    with pytest.raises(ValueError, match="holds no recipe"):
        folder.read_recipe()


@pytest.mark.parametrize("count", [2, 3, 31])
def test_shuffled_images_all_meet_another_caption(count):
    partner = derangement(count, seed=0)
    assert sorted(partner.tolist()) == list(range(count))
    assert all(partner[i] != i for i in range(count))


def test_the_judge_is_shown_the_images_that_it_should_rank(run_copy, tiny_recipe, monkeypatch, without_report):
    splits = load_splits(tiny_recipe.data, tiny_recipe.model, tiny_recipe.seed)
    unseen = unseen_captions(splits)
    ranked, hits = {}, []

    def rank(images, sentences, **options):
        ranked[len(ranked)] = (images, sentences)
        return r_precision_folds(images, sentences, **options)

    def expect(images, sentences, **options):
        hits.append(images)
        return expected_hits(images, sentences, **options)

    monkeypatch.setattr(evaluation, "r_precision_folds", rank)
    monkeypatch.setattr(evaluation, "expected_hits", expect)
    evaluate(run_copy.path)
    judge = load_pair(run_copy, "judge", tiny_recipe, splits)
    (generated, sentences), (real, _), (shuffled, _) = ranked.values()
    with torch.no_grad():
        for row in (0, 7, 30):
            image = to_float(splits.validation.images[unseen[row].image].unsqueeze(0))
            tokens, word_mask = splits.vocabulary.encode([unseen[row].caption], warn_unknown=False)
            torch.testing.assert_close(real[row], judge.image_encoder(image).image[0])
            torch.testing.assert_close(sentences[row], judge.text_encoder(tokens, word_mask).sentence[0])
    assert all(not torch.equal(moved, stayed) for moved, stayed in zip(shuffled, generated))
    assert sorted(shuffled.tolist()) == sorted(generated.tolist())
    # The best and the worst captions are those of the generated images.
    assert torch.equal(hits[0], generated)


def test_words_are_counted_one_by_one(run_copy, tiny_recipe):
    model = MirrorGAN.from_pretrained(run_copy.model)
    splits = load_splits(tiny_recipe.data, tiny_recipe.model, tiny_recipe.seed)
    images = to_float(splits.validation.images[:5])
    tokens, word_mask = splits.vocabulary.encode(
        [captions[0] for captions in splits.validation.captions[:5]], warn_unknown=False
    )
    right = count = 0
    with torch.no_grad():
        for image, row, mask in zip(images, tokens, word_mask):
            words = [*row[mask].tolist(), 1]
            logits = model.captioner(image.unsqueeze(0), torch.tensor([words]))
            for word, prediction in zip(words, logits[0]):
                right += int(prediction.argmax()) == word
                count += 1
        assert word_accuracy(model.captioner, images, tokens, word_mask)[0] == pytest.approx(right / count)


def test_a_failed_evaluation_leaves_the_figures_of_the_last(run_copy):
    evaluate(run_copy.path)
    before = run_copy.evaluation.read_bytes(), run_copy.report.read_bytes()
    run_copy.log.write_text("{}\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged: line 1"):
        evaluate(run_copy.path)
    assert (run_copy.evaluation.read_bytes(), run_copy.report.read_bytes()) == before


def test_judges_that_are_asked_for_are_trained_once_and_named(run_copy, monkeypatch):
    steps = make_quick_judges(monkeypatch)
    figures = evaluate(run_copy.path, fit_judge=True)
    assert "trained on drawn flowers" in figures["extractor"]
    for name in ("generated", "real"):
        assert figures["features"][name]["frechet_distance"] > 0
        assert 1 <= figures["features"][name]["inception_score"] <= 8
    assert 0 <= figures["features"]["generated"]["diversity"] <= 2
    assert figures["features"]["generated"]["diversity_standard_error"] > 0
    assert set(figures["attributes"]["generated"]["judge"]) == {*ATTRIBUTES, "all"}
    page = run_copy.report.read_text(encoding="utf-8")
    for words in ("Attributes", "Fréchet distance", "trained on drawn flowers", "Best and worst"):
        assert words in page
    again = evaluate(run_copy.path)
    assert again == figures
    assert len(steps) == 1


def test_no_figure_of_the_judges_is_of_a_network_that_the_generator_learned_from(run_copy, monkeypatch, without_report):
    """Whatever becomes of text encoder, image encoder and captioner of the training: the judge is another."""

    def forget(path, part):
        kept = load_file(path)
        assert any(name.startswith(part) for name in kept)
        forgotten = {name: torch.zeros_like(value) for name, value in kept.items() if name.startswith(part)}
        save_file({**kept, **forgotten}, path)

    make_quick_judges(monkeypatch)
    before = evaluate(run_copy.path, fit_judge=True)
    for path, part in (
        (run_copy.weights("stem"), ""),
        (run_copy.weights("stream"), ""),
        (run_copy.model / "model.safetensors", "captioner."),
    ):
        forget(path, part)
    after = evaluate(run_copy.path)
    assert after["word_accuracy"] != before["word_accuracy"]
    for figures in ("r_precision", "features", "attributes"):
        assert after[figures] == before[figures]
    # The generator reads its captions with the text encoder, but real images are what they are.
    forget(run_copy.model / "model.safetensors", "text_encoder.")
    without_text = evaluate(run_copy.path)
    for figures in ("r_precision", "features", "attributes"):
        assert without_text[figures]["real"] == before[figures]["real"]
    assert without_text["features"]["generated"] != before["features"]["generated"]
    judge, stem = (load_file(tiny) for tiny in (run_copy.weights("judge"), run_copy.weights("stem")))
    assert not [name for name in judge if judge[name].is_floating_point() and torch.equal(judge[name], stem[name])]


def test_real_images_are_compared_at_the_models_size_and_were_not_learned_from(tiny_recipe):
    """Training images are larger where random crops are taken from them."""
    splits = load_splits(dataclasses.replace(tiny_recipe.data, augment=True), tiny_recipe.model, tiny_recipe.seed)
    assert splits.training.images.shape[1] == 19
    real = to_float(splits.validation.images)
    images, seen = {"generated": -real, "real": real}, []

    def look(some):
        seen.append(some)
        return some.mean(dim=(2, 3))

    extractor = Extractor("means", look, lambda some: some.mean(dim=(2, 3)), slice(None, None, 4))
    figures = _feature_figures(extractor, splits.training.images, images, seed=0)
    reference, generated, photographs = seen
    assert torch.equal(reference, real)
    expected = [to_float(torch.from_numpy(shrink(image.numpy(), 16))[None]) for image in splits.training.images[::4]]
    assert sorted(photographs.flatten(1).tolist()) == sorted(torch.cat(expected).flatten(1).tolist())
    # As many of each: distances of few images are larger.
    assert len(generated) == len(photographs) == figures["real"]["distance_images"] == 11
    drawn = images["generated"].flatten(1).tolist()
    assert all(image in drawn for image in generated.flatten(1).tolist())
    assert figures["real"]["frechet_distance"] == frechet_distance(photographs.mean((2, 3)), real.mean((2, 3)))
    random = torch.Generator().manual_seed(0)
    kernel_distance(photographs.mean((2, 3)), real.mean((2, 3)), subsets=10, subset_size=11, generator=random)
    score = inception_score(real.mean((2, 3)), splits=10, generator=random)
    assert figures["real"]["inception_score"] == score.mean


def test_captions_that_have_changed_since_are_refused(run_copy, monkeypatch):
    """Every word would be read as another one."""

    def load_others(data, *arguments):
        return load_splits(dataclasses.replace(data, training_images=5), *arguments)

    monkeypatch.setattr(evaluation, "load_splits", load_others)
    with pytest.raises(ValueError, match=r"vocabulary\.json is not the vocabulary of the training captions"):
        evaluate(run_copy.path)
    run_copy.vocabulary.unlink()
    with pytest.raises(ValueError, match=r"model has another vocabulary than today's training captions"):
        evaluate(run_copy.path)
    assert not run_copy.evaluation.exists()


def test_what_no_judge_can_be_trained_for_is_named_and_the_rest_is_measured(run_copy, monkeypatch, without_report):
    monkeypatch.setattr(evaluation, "_is_synthetic", lambda recipe: False)
    figures = evaluate(run_copy.path, fit_judge=True)
    assert "a judge of classes needs at least 2 of them" in figures["not_measured"]
    assert "--inception needs no classes" in figures["not_measured"]
    assert "features" not in figures
    assert 0 <= figures["r_precision"]["generated"]["top1"] <= 1

    # Inception needs no judge of classes, and none is trained beside it.
    means = Extractor("means", lambda some: some.mean((2, 3)), lambda some: some.mean((2, 3)))
    monkeypatch.setattr(evaluation, "inception_extractor", lambda **_: means)
    figures = evaluate(run_copy.path, fit_judge=True, inception=True)
    assert "not_measured" not in figures
    assert figures["extractor"] == "means"
    assert figures["features"]["real"]["distance_images"] == 31


def test_diversity_is_that_of_one_captions_images(tiny_recipe, monkeypatch):
    splits = load_splits(tiny_recipe.data, tiny_recipe.model, tiny_recipe.seed)
    unseen = unseen_pairs(splits, tiny_recipe.model.max_words)
    drawn = []

    def draw(model, tokens, word_mask, seed):
        drawn.append(tokens)
        return torch.stack([torch.randn(3, 4, 4, generator=seeded(*row)) for row in tokens.tolist()])

    monkeypatch.setattr(evaluation, "generate_images", draw)
    monkeypatch.setattr(evaluation, "DIVERSE_CAPTIONS", 3)
    flat = Extractor("pixels", lambda some: some.flatten(1), lambda some: some.flatten(1))
    # Captions differ, images of a caption do not.
    assert _diversity(flat, None, unseen, seed=0).mean < 1e-9
    assert drawn[0][::10].tolist() == unseen.tokens[[0, 10, 20]].tolist()


def test_the_report_shows_captions_of_all_parts_of_the_data(run_copy, monkeypatch):
    shown = []
    monkeypatch.setattr(evaluation, "write_report", lambda folder, recipe, showcase, metrics: shown.append(showcase))
    evaluate(run_copy.path)
    recipe = run_copy.read_recipe()
    captions = [entry.caption for entry in unseen_captions(load_splits(recipe.data, recipe.model, recipe.seed))]
    assert shown[0].captions == [captions[0], captions[10], captions[20]]
    assert all(word in (*split_words(captions[10]), "<unknown>") for word in shown[0].words[1])


@pytest.mark.parametrize("count", [2, 3, 5])
def test_few_images_have_a_precision(count):
    found = _precision(torch.eye(count), torch.eye(count), candidates=2, seed=0)
    assert (found["top1"], found["standard_errors"]) == (1, [0, 0, 0])


def test_a_generator_of_no_numbers_is_named(run_copy):
    path = run_copy.model / "model.safetensors"
    spoiled = {
        name: value * torch.nan if name.startswith("generator.") and value.is_floating_point() else value
        for name, value in load_file(path).items()
    }
    save_file(spoiled, path)
    with pytest.raises(ValueError, match=r"the generator in .*model draws images that hold NaN or infinite values"):
        evaluate(run_copy.path)


def test_a_config_without_names_of_versions_is_damaged(run_copy):
    content = json.loads(run_copy.config.read_text())
    run_copy.config.write_text(json.dumps({**content, "versions": []}))
    with pytest.raises(ValueError, match=r"config\.json is damaged: versions must be an object"):
        evaluate(run_copy.path)


def test_best_and_worst_are_the_ends_of_the_order():
    hits = torch.tensor([0.5, 0.0, 1.0, 0.25, 0.75])
    images = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 4, 4)
    real = torch.zeros(5, 4, 4, 3, dtype=torch.uint8)
    cases = _cases(hits, list("abcde"), images, real)
    assert [case.caption for case in cases["best"]] == ["c", "e"]
    assert [case.caption for case in cases["worst"]] == ["b", "d"]
    assert float(cases["best"][1].generated.mean()) == 4
    assert cases["worst"][1].chance == 0.25
