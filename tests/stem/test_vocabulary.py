"""Vocabulary: words of any script, encoding and decoding, and damaged files."""

import json
import unicodedata
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mirror_modules import Vocabulary
from mirror_modules.stem import END, PAD, UNKNOWN
from mirror_modules.stem.vocabulary import split_words

CAPTIONS = ["A red flower.", "a red, red flower with 5 petals"]


def captions_of_any_script():
    return st.text(max_size=23)


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A red-and-white Flower, isn't it?", ["a", "red", "and", "white", "flower", "isn", "t", "it"]),
        ("5 petals_of 2½ cm", ["5", "petals", "of", "2½", "cm"]),
        ("빨간 꽃이 있다", ["빨간", "꽃이", "있다"]),
        ("लाल फूल की पंखुड़ियाँ", ["लाल", "फूल", "की", "पंखुड़ियाँ"]),
        ("ÉTÉ à Zürich: ÑANDÚ", ["été", "à", "zürich", "ñandú"]),
        ("красный ЦВЕТОК", ["красный", "цветок"]),
        ("红色的花 🌸 Ⅷ", ["红色的花", "ⅷ"]),
        ("a 🌹 rose ❤️ for 👩‍🌾 and 👍🏽!", ["a", "rose", "for", "and"]),
        ("\u0301 \ufe0f", []),
        (" \t\n.,;", []),
    ],
)
def test_words_are_runs_of_letters_marks_and_digits(caption, words):
    expected = [unicodedata.normalize("NFC", word) for word in words]
    assert split_words(caption) == expected


@given(captions_of_any_script())
def test_composed_and_decomposed_letters_are_the_same_words(caption):
    composed, decomposed = (unicodedata.normalize(form, caption) for form in ("NFC", "NFD"))
    assert split_words(composed) == split_words(decomposed)


@given(captions_of_any_script())
def test_splitting_a_word_returns_it(caption):
    for word in split_words(caption):
        assert split_words(word) == [word]


def test_capitals_compose_after_lower_casing():
    # J with caron has no composed capital, but a composed small letter.
    assert Vocabulary.build(["J\u030c"]).words[3:] == ("\u01f0",)


def test_build_counts_and_sorts():
    vocabulary = Vocabulary.build(CAPTIONS)
    assert vocabulary.words == ("<pad>", "<end>", "<unknown>", "red", "a", "flower", "5", "petals", "with")
    assert Vocabulary.build(CAPTIONS, min_count=2).words[3:] == ("red", "a", "flower")
    assert Vocabulary.build(reversed(CAPTIONS)) == vocabulary


def test_ids_start_after_the_special_tokens():
    vocabulary = Vocabulary(["red", "flower"])
    assert (PAD, END, UNKNOWN) == (0, 1, 2)
    assert len(vocabulary) == 5
    tokens, word_mask = vocabulary.encode(["red flower red", "Flower"])
    assert tokens.tolist() == [[3, 4, 3], [4, 0, 0]]
    assert tokens.dtype == torch.long
    assert word_mask.tolist() == [[True, True, True], [True, False, False]]


def test_special_tokens_are_not_members():
    vocabulary = Vocabulary(["red"])
    assert "red" in vocabulary
    assert "blue" not in vocabulary
    assert "<pad>" not in vocabulary
    assert "<unknown>" not in vocabulary


def test_vocabularies_with_equal_words_are_equal():
    assert Vocabulary(["red"]) == Vocabulary(["red"])
    assert hash(Vocabulary(["red"])) == hash(Vocabulary(["red"]))
    assert Vocabulary(["red"]) != Vocabulary(["blue"])
    assert Vocabulary(["red"]) != ("red",)
    assert repr(Vocabulary(["red"])) == "Vocabulary(4 entries)"


def test_unknown_words_are_named_in_one_warning():
    vocabulary = Vocabulary(["red"])
    with pytest.warns(UserWarning, match=r"encoded as <unknown>: zebra, lilac$") as warned:
        tokens, word_mask = vocabulary.encode(["zebra red zebra", "lilac"])
    assert len(warned) == 1
    assert tokens.tolist() == [[2, 3, 2], [2, 0, 0]]
    assert word_mask.sum().item() == 4


def test_many_unknown_words_are_counted():
    with pytest.warns(UserWarning, match=r": a, b, c, d, e, f, g, h, i, j and 3 more$"):
        Vocabulary(["red"]).encode(["a b c d e f g h i j k l m"])


def test_no_warning_without_unknown_words_or_with_warn_unknown_false():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Vocabulary(["red"]).encode(["Red, red!"])
        Vocabulary(["red"]).encode(["zebra"], warn_unknown=False)


def test_max_words_truncates_captions():
    tokens, _ = Vocabulary.build(CAPTIONS).encode(CAPTIONS, max_words=2)
    assert tokens.shape == (2, 2)


@given(st.lists(st.sampled_from(["rot", "été", "빨간", "फूल", "5", "ñ"]), min_size=1, max_size=7))
def test_decoding_reverses_encoding(words):
    vocabulary = Vocabulary(["rot", "été", "빨간", "फूल", "5", "ñ"])
    tokens, word_mask = vocabulary.encode([" ".join(words), "rot"])
    assert vocabulary.decode(tokens) == [unicodedata.normalize("NFC", " ".join(words)), "rot"]
    assert_close(word_mask, tokens != PAD)


def test_decoding_stops_at_the_end_and_at_padding():
    tokens = torch.tensor([[3, END, 3, 3], [3, UNKNOWN, PAD, 3], [END, 3, 3, 3]])
    assert Vocabulary(["red"]).decode(tokens) == ["red", "red <unknown>", ""]


def test_save_and_load(tmp_path):
    vocabulary = Vocabulary.build(["빨간 꽃 été फूल", *CAPTIONS])
    vocabulary.save(tmp_path / "vocabulary.json")
    assert Vocabulary.load(tmp_path / "vocabulary.json") == vocabulary
    assert "빨간" in (tmp_path / "vocabulary.json").read_text(encoding="utf-8")


FORMAT = "mirror-modules vocabulary 1"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"format": "mirror-modules voc', r"vocabulary\.json is not JSON text"),
        (b"", r"vocabulary\.json is not JSON text"),
        (b"\xff\xfe\x00", r"vocabulary\.json is not JSON text"),
        (b"[1, 2]", r"is not a 'mirror-modules vocabulary 1' file; write it with Vocabulary\.save"),
        (json.dumps({"words": ["red"]}).encode(), r"is not a 'mirror-modules vocabulary 1' file"),
        (json.dumps({"format": FORMAT}).encode(), r"'words' in .* is not a list of strings; the file is damaged"),
        (json.dumps({"format": FORMAT, "words": ["red", 5]}).encode(), r"'words' in .* is not a list of strings"),
        (json.dumps({"format": FORMAT, "words": ["red", "red"]}).encode(), r"the word 'red' is listed twice"),
        (json.dumps({"format": FORMAT, "words": ["two words"]}).encode(), r"'two words' is not a lower-case word"),
    ],
)
def test_damaged_files_are_named(tmp_path, content, message):
    (tmp_path / "vocabulary.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Vocabulary.load(tmp_path / "vocabulary.json")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        Vocabulary.load(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"the word 'red' is listed twice", lambda: Vocabulary(["red", "blue", "red"])),
        (r"the word '<pad>' is listed twice", lambda: Vocabulary(["<pad>"])),
        (r"'Red' is not a lower-case word", lambda: Vocabulary(["Red"])),
        (r"'' is not a lower-case word", lambda: Vocabulary([""])),
        (r"build: captions must be a list of strings, but it is one string", lambda: Vocabulary.build("a red flower")),
        (r"build: no word occurs min_count=1 times in the captions", lambda: Vocabulary.build(["?!", "🌸"])),
        (r"build: no word occurs min_count=9 times in the captions", lambda: Vocabulary.build(CAPTIONS, 9)),
        (r"encode: captions must be a list .* it is one string; wrap it", lambda: Vocabulary(["red"]).encode("red")),
        (r"encode: captions is empty; give at least one", lambda: Vocabulary(["red"]).encode([])),
        (r"encode: caption 1 \('🌸 !'\) has no word", lambda: Vocabulary(["red"]).encode(["red", "🌸 !"])),
        (r"encode: caption 0 \(''\) has no word; write at least one", lambda: Vocabulary(["red"]).encode([""])),
        (r"words must be a list of strings, but it is one string", lambda: Vocabulary("red")),
        (r"build: min_count must be a whole number of at least 1", lambda: Vocabulary.build(CAPTIONS, "2")),
        (r"decode: tokens must be a tensor, but it is a list", lambda: Vocabulary(["red"]).decode([[3]])),
        (
            r"decode: tokens must be integers \(B, L\), but they are torch\.int64 \(3,\)",
            lambda: Vocabulary(["red"]).decode(torch.tensor([3, 3, 3])),
        ),
        (r"decode: tokens must be integers .* torch\.float32", lambda: Vocabulary(["red"]).decode(torch.zeros(1, 3))),
        (r"decode: token 4 is outside the 4 entries", lambda: Vocabulary(["red"]).decode(torch.tensor([[3, 4]]))),
        (r"decode: token -1 is outside the 4 entries", lambda: Vocabulary(["red"]).decode(torch.tensor([[-1]]))),
    ],
)
def test_errors(message, call):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("max_words", [0, -1, 1.5, True])
def test_a_length_that_keeps_no_word_is_rejected(max_words):
    vocabulary = Vocabulary.build(CAPTIONS)
    with pytest.raises(ValueError, match=r"Vocabulary\.encode: max_words must be .* at least 1"):
        vocabulary.encode(CAPTIONS, max_words=max_words)


@pytest.mark.parametrize("captions", [[7], ["a flower", None], [["a flower"]]])
def test_captions_that_are_no_strings(captions):
    for call in (Vocabulary.build, Vocabulary(["a", "flower"]).encode):
        with pytest.raises(ValueError, match=r"a caption must be a string, but one is of the type (int|NoneType|list)"):
            call(captions)
