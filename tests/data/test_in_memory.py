import numpy as np
import pytest
import torch

from mirror_modules.data import CaptionedImage, InMemoryCaptions
from mirror_modules.stem.vocabulary import Vocabulary
from tests.layouts import NumberedImages

N, H, W = 11, 5, 7


def numbered(size=N):
    return NumberedImages(size, H, W)


class Altered(NumberedImages):
    """Sample 3 has other fields."""

    def __init__(self, **fields):
        super().__init__(N, H, W)
        self.fields = fields

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return sample._replace(**self.fields) if index == 3 else sample


@pytest.fixture(scope="module")
def data():
    return InMemoryCaptions(numbered(), max_words=18)


def test_attributes_captions_and_progress():
    calls = []
    data = InMemoryCaptions(numbered(5), max_words=18, progress=lambda done, total: calls.append((done, total)))
    assert len(data) == 5
    assert calls == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]
    assert data.attributes[3] == {"number": "3"}
    assert data.captions[1] == ("w1 w1", "w1 w1 w1")


def test_a_batch_of_chosen_images_and_captions(data):
    batch = data.batch(torch.tensor([5, 2, 5]), torch.tensor([2, 0, 1]))
    assert batch.captions == ("w5 w5 w5 w5", "w2 w2", "w5 w5 w5")
    assert batch.class_ids.tolist() == [105, 102, 105]
    with pytest.raises(IndexError, match="a caption index in choices is out of range for its image"):
        data.batch(torch.tensor([0]), torch.tensor([1]))
    for index in (-1, len(data)):
        with pytest.raises(IndexError, match=rf"an index in indices is out of range for {len(data)} images"):
            data.batch(torch.tensor([0, index]), torch.tensor([0, 0]))


def test_long_captions_are_cut_as_tokens_but_not_as_text():
    batch = InMemoryCaptions(numbered(), max_words=3).batch(torch.tensor([5]), torch.tensor([2]))
    assert batch.tokens.shape == (1, 3)
    assert batch.captions == ("w5 w5 w5 w5",)


def test_only_captions_above_max_words_are_kept_for_subsampling():
    captions = ("a b", "a b c", "a b c d", "a b c d e")
    sample = CaptionedImage(np.zeros((H, W, 3), np.uint8), captions, 0, {})
    data = InMemoryCaptions([sample], max_words=3, long_captions="subsample")
    assert {row: len(tokens) for row, tokens in data.long_tokens.items()} == {2: 4, 3: 5}
    assert InMemoryCaptions([sample], max_words=3).long_tokens == {}


@pytest.mark.parametrize(
    ("word", "is_side"),
    [
        *((word, True) for word in ("Leftmost", "right-hand", "lefthand", "righthanded", "leftward", "rightwards")),
        *((word, False) for word in ("leftover", "upright", "rightful", "bright", "cleft")),
    ],
)
def test_words_for_a_side_are_detected(word, is_side):
    sample = CaptionedImage(np.zeros((H, W, 3), np.uint8), (f"its {word} wing",), 0, {})
    assert InMemoryCaptions([sample], max_words=18).mentions_side.tolist() == [is_side]


def test_arrays_with_negative_strides_and_numpy_integers_are_accepted():
    image = np.arange(H * W * 3, dtype=np.uint8).reshape(H, W, 3)
    data = InMemoryCaptions([CaptionedImage(image[:, ::-1], ["a bird"], np.int64(3), {})], max_words=18)
    assert np.array_equal(data.images[0].numpy(), image[:, ::-1])
    assert data.class_ids.tolist() == [3]


def test_words_outside_a_given_vocabulary_are_unknown_without_a_warning(recwarn):
    data = InMemoryCaptions(numbered(), Vocabulary(["w1"]), max_words=18)
    assert data.batch(torch.tensor([1, 2]), torch.tensor([0, 0])).tokens.tolist() == [[3, 3], [2, 2]]
    assert not recwarn


def test_a_built_vocabulary_drops_rare_words():
    vocabulary = InMemoryCaptions(numbered(), max_words=18, min_count=9).vocabulary
    assert set(vocabulary.words[3:]) == {"w2", "w5", "w8"}


def test_samples_of_the_wrong_form_are_refused():
    with pytest.raises(ValueError, match="the data set is empty"):
        InMemoryCaptions(numbered(0), max_words=18)
    with pytest.raises(ValueError, match=r"image 3 is \(4, 4, 3\), but the first is \(5, 7, 3\)"):
        InMemoryCaptions(Altered(image=np.zeros((4, 4, 3), dtype=np.uint8)), max_words=18)
    for image, found in (
        (np.full((H, W, 3), 0.9, np.float32), r"float32 \(5, 7, 3\)"),
        (np.zeros((3, H, W), np.uint8), r"uint8 \(3, 5, 7\)"),
        (np.zeros((H, W), np.uint8), r"uint8 \(5, 7\)"),
        (torch.zeros(H, W, 3, dtype=torch.uint8), "of type Tensor"),
    ):
        with pytest.raises(ValueError, match=rf"image 3 is {found}; expected a numpy array, uint8 \(H, W, 3\)"):
            InMemoryCaptions(Altered(image=image), max_words=18)
    for captions in ("abc", (b"a",), None):
        with pytest.raises(ValueError, match=r"sample 3 has the captions .*; expected a tuple of strings"):
            InMemoryCaptions(Altered(captions=captions), max_words=18)
    for class_id in (None, 1.5, -1, 10**30, True):
        with pytest.raises(ValueError, match=r"sample 3 has the class .*; expected an integer from 0 to 2\*\*63 - 1"):
            InMemoryCaptions(Altered(class_id=class_id), max_words=18)
    with pytest.raises(ValueError, match="sample 3 has no caption"):
        InMemoryCaptions(Altered(captions=()), max_words=18)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="max_words must be a whole number of at least 1, but it is 0"):
        InMemoryCaptions(numbered(), max_words=0)
    with pytest.raises(ValueError, match="long_captions must be one of 'cut', 'subsample', but it is 'fold'"):
        InMemoryCaptions(numbered(), max_words=18, long_captions="fold")
