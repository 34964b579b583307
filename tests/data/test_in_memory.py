import numpy as np
import pytest
import torch

from mirror_modules.data import CaptionedImage, InMemoryCaptions, open_captions, prepare_captions
from mirror_modules.stem.vocabulary import Vocabulary
from tests.layouts import NumberedImages, make_birds

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


# Boxes and key points


def located(boxes, points, names=("left eye", "tail")):
    image = np.zeros((H, W, 3), np.uint8)
    return [
        CaptionedImage(image, (f"bird {i}",), i, {}, box, each, names if each is not None else ())
        for i, (box, each) in enumerate(zip(boxes, points))
    ]


def test_boxes_and_key_points_are_collected():
    box, points = (0.25, 0.5, 0.125, 0.75), ((0.5, 0.25, 1.0), (0.0, 0.0, 0.0))
    data = InMemoryCaptions(located([None, box, None], [points, None, None]), max_words=18)
    assert data.point_names == ("left eye", "tail")
    assert data.boxes.dtype == data.points.dtype == torch.float32
    assert data.boxes.isnan().all(dim=1).tolist() == [True, False, True]
    assert tuple(data.boxes[1].tolist()) == box
    assert data.points.tolist() == [[list(point) for point in points], [[0, 0, 0]] * 2, [[0, 0, 0]] * 2]
    batch = data.batch(torch.tensor([1, 0, 1]), torch.tensor([0, 0, 0]))
    assert torch.equal(batch.boxes[::2], data.boxes[[1, 1]])
    assert torch.equal(batch.points[1], data.points[0])


def test_without_boxes_and_key_points_there_are_none():
    data = InMemoryCaptions(numbered(), max_words=18)
    assert data.boxes is data.points is None
    assert data.point_names == ()
    batch = data.batch(torch.tensor([1]), torch.tensor([0]))
    assert batch.boxes is batch.points is None


def test_mapped_data_have_the_boxes_and_key_points_of_copied_data(tmp_path):
    pytest.importorskip("PIL.Image")
    root = make_birds(tmp_path / "originals", parts=True)
    prepare_captions(root, tmp_path / "cache", resolution=13)
    mapped, copied = (
        InMemoryCaptions(open_captions(path, resolution=13), max_words=18) for path in (tmp_path / "cache", root)
    )
    assert mapped._mapped is not None
    assert mapped.point_names == copied.point_names == ("left eye", "tail", "right eye")
    assert torch.equal(mapped.boxes, copied.boxes)
    assert torch.equal(mapped.points, copied.points)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"sample 1 has the box \(0.1, 0.2, 0.3\); expected x, y, width and height", {"box": (0.1, 0.2, 0.3)}),
        (r"sample 1 has the box \(0, 0, 0, 1\); .* of positive size", {"box": (0, 0, 0, 1)}),
        (r"sample 1 has the box \(nan, 0, 1, 1\)", {"box": (float("nan"), 0, 1, 1)}),
        (r"sample 1 has the points \(\(0.5, 0.5\),\) with the names", {"points": ((0.5, 0.5),), "point_names": ("a",)}),
        (r"sample 1 has the points .* with the names \(\)", {"points": ((0.5, 0.5, 1),)}),
        (
            r"the key points of image 1 are \('tail', 'left eye'\), but those of an earlier one are \('left eye', ",
            {"points": ((0.5, 0.5, 1),) * 2, "point_names": ("tail", "left eye")},
        ),
    ],
)
def test_invalid_boxes_and_key_points_are_refused(message, change):
    samples = located([None, None], [((0.5, 0.25, 1.0),) * 2, None])
    samples[1] = samples[1]._replace(**change)
    with pytest.raises(ValueError, match="InMemoryCaptions: " + message):
        InMemoryCaptions(samples, max_words=18)
