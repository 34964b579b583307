import re
from collections import Counter

import numpy as np
import pytest

from mirror_modules.data import ATTRIBUTES, attributes_named, write_captions
from mirror_modules.data.flowers.captions import CENTERS, FLOWERS, PLACES, TEMPLATES, WORDS


def random_attributes(rng):
    return {name: str(rng.choice(values)) for name, values in ATTRIBUTES.items()}


@pytest.fixture(scope="module")
def written():
    """Pairs (attributes, caption) of many flowers."""
    rng = np.random.default_rng(11)
    flowers = [random_attributes(rng) for _ in range(400)]
    return [(flower, caption) for flower in flowers for caption in write_captions(flower, rng, 5)]


def test_captions_name_at_least_four_attributes_all_correctly(written):
    for attributes, caption in written:
        named = attributes_named(caption)
        assert "petal_color" in named
        assert len(named) >= 4, caption
        assert named.items() <= attributes.items(), caption


def test_captions_name_no_attribute_twice(written):
    meanings = {word: name for name, values in WORDS.items() for words in values.values() for word in words}
    for _, caption in written:
        names = [meanings[word] for word in caption.split() if word in meanings]
        assert len(names) == len(set(names)), caption


def test_captions_have_6_to_18_plain_words(written):
    for _, caption in written:
        assert re.fullmatch(r"[a-z]+( [a-z]+){5,17}", caption), caption


def test_the_petal_color_qualifies_the_petals(written):
    colors = "|".join(word for words in WORDS["petal_color"].values() for word in words)
    for _, caption in written:
        assert re.search(rf"\b({colors}) petals|petals of this [a-z ]+ are ({colors})\b", caption), caption


def test_articles_agree_with_the_next_word(written):
    for _, caption in written:
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", caption), caption


def test_distribution_of_the_number_of_named_attributes(written):
    counts = Counter(len(attributes_named(caption)) - 1 for _, caption in written)
    shares = [counts[k] / len(written) for k in (3, 4, 5)]
    # Three standard deviations for 2,000 draws.
    assert shares == pytest.approx([0.3, 0.4, 0.3], abs=0.033)


def test_every_word_and_place_occurs_and_the_vocabulary_is_small(written):
    seen = {word for _, caption in written for word in caption.split()}
    assert {word for values in WORDS.values() for words in values.values() for word in words} <= seen
    assert len(seen) < 150
    text = "\n".join(caption for _, caption in written)
    assert all(place in text for places in PLACES.values() for place in places)


def test_every_word_names_one_value():
    words = [word for values in WORDS.values() for words in values.values() for word in words]
    assert len(words) == len(set(words))
    assert {name: tuple(values) for name, values in WORDS.items()} == ATTRIBUTES


def test_places_name_their_background_and_templates_name_nothing():
    for background, places in PLACES.items():
        for place in places:
            assert attributes_named(place) == {"background": background}
    for text in (*FLOWERS, *CENTERS, *(re.sub(r"\{\w+\}", " ", template) for template in TEMPLATES)):
        assert attributes_named(text) == {}


def test_attributes_named_parses_any_text():
    assert attributes_named("A SCARLET flower, heart-shaped; tiny!") == {
        "petal_color": "red",
        "petal_shape": "heart",
        "size": "small",
    }
    assert attributes_named("red petals, then blue ones") == {"petal_color": "red"}
    assert attributes_named("a bird on a wire") == {}


def test_captions_are_reproducible_from_the_generator():
    flower = random_attributes(np.random.default_rng(0))
    one, again, other = (write_captions(flower, np.random.default_rng(seed), 7) for seed in (1, 1, 2))
    assert len(one) == 7
    assert one == again != other


def test_an_unknown_attribute_value_is_refused():
    flower = random_attributes(np.random.default_rng(0)) | {"size": "medium"}
    with pytest.raises(ValueError, match="size must be one of small, large, but it is 'medium'"):
        write_captions(flower, np.random.default_rng(0), 1)
