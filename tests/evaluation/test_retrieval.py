"""R-precision by several evaluators: splits, candidates, bounds, and when an evaluator cannot rank images."""

import dataclasses

import numpy as np
import pytest
import torch

from mirror_modules.data import CaptionedImage, InMemoryCaptions
from mirror_modules.evaluation.evaluation import evaluate
from mirror_modules.evaluation.retrieval import (
    Evaluator,
    OwnClass,
    RankedSplit,
    bounds,
    candidate_sets,
    cannot_rank,
    encoded_by,
    measure_retrieval,
    own_class,
    ranked_splits,
    text_queries,
)
from mirror_modules.metrics import class_oracle, r_precision_folds
from mirror_modules.training.batches import Splits, load_splits
from mirror_modules.training.loop import load_pair, train
from mirror_modules.training.recipes import DataRecipe
from mirror_modules.training.validation import image_features, sentence_features, unseen_pairs
from tests.layouts import make_flowers

N = 23


def make_captions(captions, classes, vocabulary=None):
    samples = [
        CaptionedImage(np.full((16, 16, 3), i, np.uint8), tuple(each), class_id, {})
        for i, (each, class_id) in enumerate(zip(captions, classes))
    ]
    return InMemoryCaptions(samples, vocabulary, max_words=9)


def make_split(classes, count=3):
    """A split whose image i has `count` captions of its own, of which the second one is evaluated."""
    training = make_captions([[f"w{i}" for i in range(99)]], [0])
    captions = [[f"w{i}", *(f"w{i} w{j}" for j in range(count - 1))] for i in range(len(classes))]
    validation = make_captions(captions, classes, training.vocabulary)
    splits = Splits(training, validation)
    return RankedSplit("validation", validation, unseen_pairs(splits, 9))


@pytest.fixture
def flowers_run(tiny_recipe, tmp_path):
    """A run on photographs with two training classes and another validation class, and a second evaluator."""
    root = make_flowers(tmp_path / "data", training=41, validation=13)
    data = DataRecipe("oxford-flowers", str(root), None, None, held_out_share=0.3)
    second = dataclasses.replace(tiny_recipe.evaluator, steps=2, learning_rate=0.01)
    recipe = dataclasses.replace(tiny_recipe, data=data, second_evaluator=second)
    return train(recipe, tmp_path / "run"), recipe


def test_a_run_on_photographs_is_evaluated_on_unseen_and_on_training_classes(flowers_run):
    folder, recipe = flowers_run
    metrics = evaluate(folder.path)
    assert list(metrics["evaluators"]) == ["evaluator", "second_evaluator"]
    result, second = metrics["evaluators"].values()
    # The standard figure is that of the first one.
    assert metrics["r_precision"]["real"] == result["validation"]["all_captions"]["real"]
    assert second["held_out"]["all_captions"]["real"] != result["held_out"]["all_captions"]["real"]
    # The class alone is a property of the captions.
    oracles = {each["held_out"]["all_captions"]["class_oracle"] for each in (result, second)}
    assert len(oracles) == 1
    assert set(result) == {"description", "validation", "held_out"}
    # All validation images have one class, so there are no candidates of other classes.
    assert set(result["validation"]) == {"images", "all_captions"}
    assert set(result["held_out"]) == {"images", "classes", "own_class", "all_captions", "other_classes"}
    held_out = result["held_out"]
    assert (held_out["images"], held_out["classes"]) == (12, 2)
    assert (held_out["all_captions"]["candidates"], held_out["all_captions"]["chance"]) == (11, 1 / 11)
    splits = load_splits(recipe.data, recipe.model, recipe.seed)
    fewer = 12 - int(splits.held_out.class_ids.unique(return_counts=True)[1].max()) + 1
    assert held_out["other_classes"]["candidates"] == fewer
    assert "class_oracle" not in held_out["other_classes"]

    split = ranked_splits(splits, recipe.model.max_words)[1]
    assert split.unseen.captions == [captions[0] for captions in splits.held_out.captions]
    oracle = class_oracle(split.unseen.class_ids, candidates=11)
    assert held_out["all_captions"]["class_oracle"] == pytest.approx(float(oracle.mean()))
    pair = load_pair(folder, "evaluator", recipe, splits)
    sentences = sentence_features(pair, split.unseen.tokens, split.unseen.word_mask)
    for name, candidates, classes in (
        ("all_captions", 11, None),
        ("other_classes", fewer, splits.held_out.class_ids),
    ):
        for source, features in (
            ("real", image_features(pair, split.unseen.images)),
            ("text_ceiling", text_queries(pair, split)),
        ):
            random = torch.Generator().manual_seed(recipe.seed)
            expected = r_precision_folds(
                features, sentences.to(features), classes, candidates=candidates, folds=6, generator=random
            )
            measured = held_out[name][source]
            assert (measured["top1"], measured["top3"]) == pytest.approx((expected.top1, expected.top3))
            assert measured["standard_errors"] == pytest.approx(expected.standard_errors)


def test_clip_is_a_further_evaluator(flowers_run, tmp_path):
    """It reads the captions as written, where other evaluators read at most `max_words` words of the vocabulary."""
    tiny = pytest.importorskip("tests.interop.tiny")
    folder, recipe = flowers_run
    without = evaluate(folder.path)
    metrics = evaluate(folder.path, clip=tiny.save_clip(tmp_path / "clip"))
    clip = metrics["evaluators"].pop("clip")
    assert metrics == without
    assert "no phase trained them" in clip["description"]
    assert str(tmp_path / "clip") in clip["description"]
    splits = load_splits(recipe.data, recipe.model, recipe.seed)
    model, tokenizer, image_processor = tiny.clip()
    assert set(clip) == {"description", "validation", "held_out"}
    for split in ranked_splits(splits, recipe.model.max_words):
        measured, reference = clip[split.name], without["evaluators"]["evaluator"][split.name]
        assert set(measured) == {*reference, "clip_score"}
        pixels = image_processor(images=list(split.unseen.images.permute(0, 3, 1, 2)), return_tensors="pt")
        with torch.no_grad():
            images = model.get_image_features(**pixels).pooler_output
            sentences, others = [], []
            for row, caption in zip(split.unseen.image_rows.tolist(), split.unseen.captions):
                own, *rest = (
                    model.get_text_features(input_ids=tokenizer(each, return_tensors="pt")["input_ids"]).pooler_output[
                        0
                    ]
                    for each in (caption, *(each for each in split.captions.captions[row] if each != caption))
                )
                sentences.append(own)
                others.append(sum(each / each.norm() for each in rest))
        for candidates in candidate_sets(split.unseen.class_ids, recipe.evaluation.candidates):
            if candidates.size < 2:
                continue
            figures = measured[candidates.name]
            for name in ("candidates", "chance", "class_oracle"):
                assert figures.get(name) == reference[candidates.name].get(name)
            for source, features in (("real", images), ("text_ceiling", torch.stack(others))):
                expected = r_precision_folds(
                    features,
                    torch.stack(sentences),
                    candidates.class_ids,
                    candidates=candidates.size,
                    folds=len(features) // 2,
                    generator=torch.Generator().manual_seed(recipe.seed),
                )
                assert figures[source]["top1"] == pytest.approx(expected.top1)
        scores = [
            100 * max(float(torch.cosine_similarity(image, sentence, dim=0)), 0)
            for image, sentence in zip(images, sentences)
        ]
        error = np.std(scores, ddof=1) / len(scores) ** 0.5
        real = measured["clip_score"]["real"]
        assert (real["mean"], real["standard_error"]) == pytest.approx((np.mean(scores), error), rel=1e-3)
        assert list(measured["clip_score"]) == ["generated", "real", "shuffled"]
        assert len({each["mean"] for each in measured["clip_score"].values()}) == 3
    page = folder.report.read_text(encoding="utf-8")
    assert "<b>CLIP:</b> the pretrained encoders of" in page
    assert "<td>CLIPScore</td>" in page


def test_captions_are_encoded_as_written():
    class Letters:
        def encode(self, captions):
            longest = max(map(len, captions))
            tokens = torch.tensor([[ord(letter) for letter in each.ljust(longest)] for each in captions])
            return tokens, tokens != ord(" ")

    split = make_split([i % 3 for i in range(N)])
    written = make_captions(
        [[f"W{i}!", f"w{i}," + "x" * i, "a 2nd?"] for i in range(N)], [0] * N, split.captions.vocabulary
    )
    split = split._replace(
        captions=written, unseen=split.unseen._replace(captions=[each[1] for each in written.captions])
    )
    encoded = encoded_by(Letters(), split)
    for tokens, captions in (
        (encoded.unseen.tokens, split.unseen.captions),
        (encoded.captions.tokens[::3], [f"W{i}!" for i in range(N)]),
    ):
        assert ["".join(map(chr, row)).strip() for row in tokens.tolist()] == captions
    assert encoded.unseen.word_mask.sum(1).tolist() == [len(each) for each in split.unseen.captions]
    # The split itself keeps its tokens.
    assert split.captions.tokens is written.tokens
    assert written.tokens.shape[1] == split.unseen.tokens.shape[1]
    assert encoded.captions.images is written.images


def test_splits_without_held_out_images_are_validation_only(tiny_recipe):
    splits = load_splits(tiny_recipe.data, tiny_recipe.model, tiny_recipe.seed)
    assert [split.name for split in ranked_splits(splits, 18)] == ["validation"]
    with pytest.raises(ValueError, match=r"these splits have no held-out images; see DataRecipe\.held_out_share"):
        unseen_pairs(splits, 18, held_out=True)
    # A single held-out image with an unseen caption has nothing to be compared with.
    one = make_captions([["a red thing"]], [0], splits.vocabulary)
    assert [split.name for split in ranked_splits(splits._replace(held_out=one), 18)] == ["validation"]


def test_candidates_are_as_many_as_there_are():
    (every,) = candidate_sets(torch.arange(N), 100)
    assert every == ("all_captions", N, None)
    classes = torch.tensor([3] * 11 + [5] * 12)
    every, others = candidate_sets(classes, 100)
    assert (every.size, others.name, others.size) == (N, "other_classes", 12)
    assert others.class_ids is classes
    assert [each.size for each in candidate_sets(classes, 7)] == [7, 7]
    assert len(candidate_sets(torch.zeros(N), 100)) == 1


def test_the_class_oracle_is_given_where_it_has_a_meaning():
    with_classes, without = make_split([i % 3 for i in range(N)]), make_split(range(N))
    every, others = candidate_sets(with_classes.unseen.class_ids, 7)
    expected = float(class_oracle(with_classes.unseen.class_ids, candidates=7).mean())
    assert bounds(with_classes, every) == {"chance": 1 / 7, "class_oracle": pytest.approx(expected)}
    assert bounds(with_classes, others) == {"chance": 1 / 7}
    # Every image has a class of its own: the oracle would know the image.
    assert bounds(without, candidate_sets(without.unseen.class_ids, 7)[0]) == {"chance": 1 / 7}


def test_text_queries_match_the_loops(monkeypatch):
    split = make_split([i % 3 for i in range(N)], count=4)
    vectors = torch.randn(len(split.captions.vocabulary), 7)

    def encode(pair, tokens, word_mask):
        return torch.stack([vectors[row[mask]].sum(0) for row, mask in zip(tokens, word_mask)])

    monkeypatch.setattr("mirror_modules.evaluation.retrieval.sentence_features", encode)
    queries = text_queries(None, split)
    for i, own in enumerate(split.unseen.captions):
        others = [caption for caption in split.captions.captions[i] if caption != own]
        assert len(others) == 3
        features = [encode(None, *split.captions.vocabulary.encode([other]))[0] for other in others]
        expected = sum(each / each.norm() for each in features) / 3
        torch.testing.assert_close(queries[i].float(), expected)


def test_images_with_a_single_caption_have_no_text_ceiling():
    split = make_split([0] * N, count=2)
    assert text_queries(None, split._replace(captions=make_captions([["w1"]] * N, [0] * N))) is None


def test_an_evaluator_that_knows_the_class_alone_cannot_rank(monkeypatch):
    """It passes among captions of other classes, where the class is all that is needed."""
    classes = [i % 4 for i in range(200)]
    split = make_split(classes)
    one_hot = torch.nn.functional.one_hot(torch.tensor(classes)).double()
    monkeypatch.setattr("mirror_modules.evaluation.retrieval.sentence_features", lambda *_: one_hot)
    monkeypatch.setattr("mirror_modules.evaluation.retrieval.text_queries", lambda *_: None)
    features = dict.fromkeys(("generated", "real", "shuffled"), one_hot)
    result = measure_retrieval(Evaluator("evaluator", "", None), split, features, 100, seed=0)
    every, others = result["all_captions"], result["other_classes"]
    assert every["real"]["top1"] == pytest.approx(every["class_oracle"], abs=0.01)
    assert every["cannot_rank"] is True
    assert result["own_class"]["real"] == {"share": 0.5, "standard_error": 0.0}
    assert "are not above an oracle that knows the class alone, at 4.0%, nor is their caption" in every["reasons"][0]
    assert (others["real"]["top1"], others["cannot_rank"], others["reasons"]) == (1.0, False, [])
    assert "text_ceiling" not in every


def test_comparisons_within_the_class_match_the_loops():
    class_ids = torch.tensor([5, 3, 5, 2, 5, 3, 3, 5, 3, 11, 5, 2])
    sentences = torch.randn(12, 7, dtype=torch.float64)
    sentences[4] = sentences[2]  # a tie
    images = sentences + 2 * torch.randn(12, 7, dtype=torch.float64)
    shares = []
    for i in range(12):
        scores = [float(torch.cosine_similarity(images[i], each, dim=0)) for each in sentences]
        others = [j for j in range(12) if j != i and class_ids[j] == class_ids[i]]
        wins = [1.0 if scores[i] > scores[j] + 1e-9 else 0.5 if scores[i] > scores[j] - 1e-9 else 0.0 for j in others]
        shares += [sum(wins) / len(wins)] if others else []
    assert len(shares) == 11
    result = own_class(images, sentences, class_ids)
    assert result.share == pytest.approx(np.mean(shares))
    assert result.standard_error == pytest.approx(np.std(shares, ddof=1) / 11**0.5)


def test_comparisons_within_the_class_need_more_than_the_class():
    class_ids = torch.arange(211) % 7
    one_hot = torch.nn.functional.one_hot(class_ids).double()
    assert own_class(one_hot, one_hot, class_ids) == (0.5, 0.0)
    assert not own_class(one_hot, one_hot, class_ids).is_above_chance
    content = torch.randn(211, 7)
    assert own_class(one_hot + content, one_hot + content, class_ids).is_above_chance


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({"real": 0.25, "error": 0.01, "chance": 0.01, "class_oracle": 0.1, "generated": 0.2}, []),
        ({"real": 0.029, "error": 0.001, "chance": 0.01}, ["at 2.9%, are below three times chance, 3.0%"]),
        ({"real": 0.03, "error": 0.001, "chance": 0.01}, []),
        (
            {"real": 0.11, "error": 0.01, "chance": 0.01, "class_oracle": 0.098},
            ["at 11.0% ± 1.0, are not above an oracle that knows the class alone, at 9.8%"],
        ),
        ({"real": 0.12, "error": 0.01, "chance": 0.01, "class_oracle": 0.098}, []),
        # Many classes: few evaluators know them all, but this one sees more than the class.
        (
            {"real": 0.11, "error": 0.01, "chance": 0.01, "class_oracle": 0.53, "own_class": OwnClass(0.53, 0.01)},
            [],
        ),
        (
            {"real": 0.11, "error": 0.01, "chance": 0.01, "class_oracle": 0.53, "own_class": OwnClass(0.51, 0.01)},
            ["at 53.0%, nor is their caption preferred to others of their class (51.0% ± 1.0 of the pairs)"],
        ),
        ({"real": 0.05, "error": 0.01, "chance": 0.01, "class_oracle": 0.098}, ["not above an oracle"]),
        (
            {"real": 0.09, "error": 0.01, "chance": 0.01, "generated": 0.12},
            ["at 9.0% ± 1.0, are below generated ones, at 12.0%"],
        ),
        # Within the error of each other: the generator may have reached the ceiling.
        ({"real": 0.8, "error": 0.01, "chance": 0.01, "generated": 0.81}, []),
        (
            {"real": 0.02, "error": 0.001, "chance": 0.01, "class_oracle": 0.1, "generated": 0.5},
            ["three times chance", "knows the class alone", "below generated ones"],
        ),
    ],
)
def test_reasons_for_which_an_evaluator_cannot_rank(figures, words):
    reasons = cannot_rank(**figures)
    assert len(reasons) == len(words)
    assert all(each in reason for each, reason in zip(words, reasons))
