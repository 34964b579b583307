"""Redescription quality against n-gram counts in loops, and against known values."""

import math
import random
import sys

import numpy as np
import pytest

from mirror_modules.metrics import redescription_quality, words_in_place

WORDS = ["a", "small", "red", "flower", "with", "round", "petals", "and", "yellow", "center", "on", "green", "leaves"]


def some_captions(count=41, seed=0):
    """Captions, and descriptions with missing or replaced words."""
    draw = random.Random(seed)
    captions = [draw.choices(WORDS, k=draw.randint(3, 13)) for _ in range(count)]
    described = [[word if draw.random() < 0.8 else draw.choice(WORDS) for word in caption] for caption in captions]
    described = [words if draw.random() < 0.7 else words[:-2] + draw.choices(WORDS, k=3) for words in described]
    described[0] = []
    return described, captions


def n_grams(sequence, n):
    return [tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1)]


def counts_by_loops(described, captions, n):
    """Numbers of common n-grams, with multiplicity, of the descriptions' n-grams, and of the captions' n-grams."""
    common = in_descriptions = in_captions = 0
    for words, others in zip(described, captions):
        grams, unmatched = n_grams(words, n), n_grams(others, n)
        in_descriptions, in_captions = in_descriptions + len(grams), in_captions + len(unmatched)
        for gram in grams:
            if gram in unmatched:
                unmatched.remove(gram)
                common += 1
    return common, in_descriptions, in_captions


def bleu_by_loops(described, captions):
    logarithms = 0.0
    for n in (1, 2, 3, 4):
        common, in_descriptions, _ = counts_by_loops(described, captions, n)
        logarithms += math.log(common / in_descriptions) / 4
    description_words, caption_words = (sum(map(len, texts)) for texts in (described, captions))
    return math.exp(logarithms + min(0.0, 1 - caption_words / description_words))


def chrf_by_loops(described, captions):
    letters, references = (["".join(words) for words in texts] for texts in (described, captions))
    precision = recall = 0.0
    for n in range(1, 7):
        common, in_descriptions, in_captions = counts_by_loops(letters, references, n)
        precision, recall = precision + common / in_descriptions / 6, recall + common / in_captions / 6
    return 5 * precision * recall / (4 * precision + recall)


def in_place_by_loops(described, captions):
    correct = 0
    for words, caption in zip(described, captions):
        for t in range(len(caption)):
            correct += t < len(words) and words[t] == caption[t]
    return correct / sum(map(len, captions))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_matches_the_loops(seed):
    described, captions = some_captions(seed=seed)
    result = redescription_quality([" ".join(words) for words in described], [" ".join(words) for words in captions])
    assert result.bleu4 == pytest.approx(bleu_by_loops(described, captions), rel=1e-9)
    assert result.chrf == pytest.approx(chrf_by_loops(described, captions), rel=1e-9)
    assert result.words_in_place == pytest.approx(in_place_by_loops(described, captions), rel=1e-12)


def test_the_caption_itself_scores_one():
    captions = [" ".join(words) for words in some_captions()[1]]
    assert tuple(redescription_quality(captions, captions)) == pytest.approx((1, 1, 1))


def test_words_are_split_as_by_the_vocabulary():
    assert tuple(redescription_quality(["A small, RED flower!"], ["a small red flower"])) == pytest.approx((1, 1, 1))


def test_no_common_words_score_zero():
    assert tuple(redescription_quality(["xx yy zz qq"], ["a small red flower"])) == (0, 0, 0)
    assert tuple(redescription_quality([""], ["a small red flower"])) == (0, 0, 0)


@pytest.mark.parametrize(
    ("description", "fraction"),
    [
        ("a small red flower", 1),
        ("a small red flower with round petals", 1),  # words beyond the end have no effect
        ("a small", 1 / 2),
        ("a large red flower", 3 / 4),
        ("a very small red flower", 1 / 4),  # all following words are shifted
        ("flower red small a", 0),
        ("", 0),
    ],
)
def test_known_values_of_words_in_place(description, fraction):
    assert words_in_place([description], ["a small red flower"]) == fraction


def test_long_captions_weigh_more():
    assert words_in_place(["red", "no"], ["red", "a small red flower"]) == 1 / 5


@pytest.mark.parametrize("metric", [redescription_quality, words_in_place])
def test_texts_may_come_in_any_iterable(metric):
    described, captions = ["a red flower", "a small blue one"], ["a red flower", "a large blue flower"]
    expected = metric(described, captions)
    assert metric((text for text in described), (text for text in captions)) == expected
    assert metric(np.array(described), np.array(captions)) == expected


@pytest.mark.parametrize("metric", [redescription_quality, words_in_place])
def test_errors_of_an_iterable_are_not_hidden(metric):
    def texts():
        yield "red"
        raise TypeError("the reason")

    with pytest.raises(TypeError, match="the reason"):
        metric(texts(), ["red", "blue"])


def test_bleu_is_not_smoothed():
    assert redescription_quality(["a small flower red with"], ["a small red flower with"]).bleu4 == 0


def test_bleu_of_fewer_than_four_words_is_zero_as_documented():
    assert redescription_quality(["red flower"], ["red flower"]).bleu4 == 0
    assert "it is 0 where no four words in a row agree" in redescription_quality.__doc__


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    with pytest.raises(ImportError, match=r"redescription_quality needs .*: pip install 'mirror-modules\[train\]'"):
        redescription_quality(["red"], ["red"])
    assert words_in_place(["red"], ["red"]) == 1


@pytest.mark.parametrize("metric", [redescription_quality, words_in_place])
@pytest.mark.parametrize(
    ("message", "descriptions", "captions"),
    [
        (r"descriptions must be a list of strings, one for each image; wrap a single one", "red", ["red"]),
        (r"captions must be a list of strings", ["red"], "red"),
        (r"descriptions must be a list of strings", None, None),
        (r"captions must be a list of strings", ["red"], None),
        (r"captions must be a list of strings", ["red"], 5),
        (r"captions must be a list of strings", ["red"], np.array("red")),
        (r"captions must be a list of strings", ["red"], b"red"),
        # Sets have no order, and dictionaries would yield their keys.
        (r"descriptions must be a list of strings", {"red", "blue"}, ["red", "blue"]),
        (r"captions must be a list of strings", ["red"], {"red": "a red flower"}),
        (r"captions must be a list of strings", ["red"], [["red", "a red flower"]]),
        (r"one description per caption, .* but there are 2 descriptions and 1 captions", ["red", "blue"], ["red"]),
        (r"and at least one caption, but there are 0 descriptions and 0 captions", [], []),
        (r"caption 1 \('\.\.\.'\) contains no word; remove it", ["red", "blue"], ["red", "..."]),
    ],
)
def test_invalid_texts_raise(metric, message, descriptions, captions):
    with pytest.raises(ValueError, match=f"{metric.__name__}: .*" + message):
        metric(descriptions, captions)
