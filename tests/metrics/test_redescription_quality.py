"""Redescription quality against counts written out, and values known beforehand."""

import math
import random
import sys

import numpy as np
import pytest

from mirror_modules.metrics import redescription_quality, words_in_place

WORDS = ["a", "small", "red", "flower", "with", "round", "petals", "and", "yellow", "center", "on", "green", "leaves"]


def some_captions(count=41, seed=0):
    """Captions, and descriptions in which words are missing or replaced."""
    draw = random.Random(seed)
    captions = [draw.choices(WORDS, k=draw.randint(3, 13)) for _ in range(count)]
    described = [[word if draw.random() < 0.8 else draw.choice(WORDS) for word in caption] for caption in captions]
    described = [words if draw.random() < 0.7 else words[:-2] + draw.choices(WORDS, k=3) for words in described]
    described[0] = []
    return described, captions


def rows(sequence, length):
    return [tuple(sequence[i : i + length]) for i in range(len(sequence) - length + 1)]


def counts_by_loops(described, captions, length):
    """Rows in common, each as often as it is in both; rows of the descriptions; rows of the captions."""
    common = of_descriptions = of_captions = 0
    for words, others in zip(described, captions):
        ours, left = rows(words, length), rows(others, length)
        of_descriptions, of_captions = of_descriptions + len(ours), of_captions + len(left)
        for row in ours:
            if row in left:
                left.remove(row)
                common += 1
    return common, of_descriptions, of_captions


def bleu_by_loops(described, captions):
    logarithms = 0.0
    for length in (1, 2, 3, 4):
        common, ours, _ = counts_by_loops(described, captions, length)
        logarithms += math.log(common / ours) / 4
    written, wanted = (sum(map(len, texts)) for texts in (described, captions))
    return math.exp(logarithms + min(0.0, 1 - wanted / written))


def chrf_by_loops(described, captions):
    letters, wanted = (["".join(words) for words in texts] for texts in (described, captions))
    precision = recall = 0.0
    for length in range(1, 7):
        common, ours, theirs = counts_by_loops(letters, wanted, length)
        precision, recall = precision + common / ours / 6, recall + common / theirs / 6
    return 5 * precision * recall / (4 * precision + recall)


def in_place_by_loops(described, captions):
    right = 0
    for words, caption in zip(described, captions):
        for t in range(len(caption)):
            right += t < len(words) and words[t] == caption[t]
    return right / sum(map(len, captions))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_matches_the_loops(seed):
    described, captions = some_captions(seed=seed)
    result = redescription_quality([" ".join(words) for words in described], [" ".join(words) for words in captions])
    assert result.bleu4 == pytest.approx(bleu_by_loops(described, captions), rel=1e-9)
    assert result.chrf == pytest.approx(chrf_by_loops(described, captions), rel=1e-9)
    assert result.words_in_place == pytest.approx(in_place_by_loops(described, captions), rel=1e-12)


def test_the_caption_itself_is_perfect():
    captions = [" ".join(words) for words in some_captions()[1]]
    assert tuple(redescription_quality(captions, captions)) == pytest.approx((1, 1, 1))


def test_words_count_as_the_vocabulary_reads_them():
    assert tuple(redescription_quality(["A small, RED flower!"], ["a small red flower"])) == pytest.approx((1, 1, 1))


def test_nothing_in_common_is_zero():
    assert tuple(redescription_quality(["xx yy zz qq"], ["a small red flower"])) == (0, 0, 0)
    assert tuple(redescription_quality([""], ["a small red flower"])) == (0, 0, 0)


@pytest.mark.parametrize(
    ("description", "share"),
    [
        ("a small red flower", 1),
        ("a small red flower with round petals", 1),  # more words neither help nor harm
        ("a small", 1 / 2),
        ("a large red flower", 3 / 4),
        ("a very small red flower", 1 / 4),  # all that follows is shifted
        ("flower red small a", 0),
        ("", 0),
    ],
)
def test_words_in_place_are_as_known(description, share):
    assert words_in_place([description], ["a small red flower"]) == share


def test_long_captions_weigh_more():
    assert words_in_place(["red", "no"], ["red", "a small red flower"]) == 1 / 5


@pytest.mark.parametrize("measure", [redescription_quality, words_in_place])
def test_texts_come_in_any_container(measure):
    described, wanted = ["a red flower", "a small blue one"], ["a red flower", "a large blue flower"]
    expected = measure(described, wanted)
    assert measure((text for text in described), (text for text in wanted)) == expected
    assert measure(np.array(described), np.array(wanted)) == expected


def test_bleu_is_not_smoothed():
    assert redescription_quality(["a small flower red with"], ["a small red flower with"]).bleu4 == 0


def test_bleu_of_fewer_than_four_words_is_zero_and_said_so():
    assert redescription_quality(["red flower"], ["red flower"]).bleu4 == 0
    assert "it is 0 where no four words in a row agree" in redescription_quality.__doc__


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    with pytest.raises(ImportError, match=r"redescription_quality needs .*: pip install 'mirror-modules\[train\]'"):
        redescription_quality(["red"], ["red"])
    assert words_in_place(["red"], ["red"]) == 1


@pytest.mark.parametrize("measure", [redescription_quality, words_in_place])
@pytest.mark.parametrize(
    ("message", "descriptions", "captions"),
    [
        (r"descriptions must be a list of strings, one for each image; wrap a single one", "red", ["red"]),
        (r"captions must be a list of strings", ["red"], "red"),
        (r"captions must be a list of strings", ["red"], [["red", "a red flower"]]),
        (r"must be as many, at least one, but there are 2 and 1", ["red", "blue"], ["red"]),
        (r"must be as many, at least one, but there are 0 and 0", [], []),
        (r"caption 1 \('\.\.\.'\) holds no word to be repeated; leave it out", ["red", "blue"], ["red", "..."]),
    ],
)
def test_errors_say_what_is_wrong(measure, message, descriptions, captions):
    with pytest.raises(ValueError, match=f"{measure.__name__}: .*" + message):
        measure(descriptions, captions)
