import numpy as np
import pytest
import torch

from mirror_modules.data import CaptionedImage, InMemoryCaptions, RepeatableBatches, to_float
from mirror_modules.stem.vocabulary import Vocabulary

N, H, W = 11, 5, 7


class Numbered:
    """Image i is filled with i and has 1 to 3 captions, of which each word tells the image."""

    def __init__(self, size=N):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        captions = tuple(" ".join([f"w{index}"] * (2 + choice)) for choice in range(1 + index % 3))
        return CaptionedImage(np.full((H, W, 3), index, dtype=np.uint8), captions, 100 + index, {"number": str(index)})


class Broken(Numbered):
    def __init__(self, **replaced):
        super().__init__()
        self.replaced = replaced

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return sample._replace(**self.replaced) if index == 3 else sample


def read(data, batch_size, seed, count):
    batches = RepeatableBatches(data, batch_size, seed)
    return [batches[number] for number in range(count)]


def numbers(batches):
    return [batch.images[:, 0, 0, 0].tolist() for batch in batches]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one[:4], other[:4])) and one.captions == other.captions


@pytest.fixture(scope="module")
def data():
    return InMemoryCaptions(Numbered(), max_words=18)


def test_everything_in_a_batch_belongs_together(data):
    for batch in read(data, 3, 0, 20):
        assert batch.images.shape == (3, H, W, 3)
        assert batch.images.dtype == torch.uint8
        for row, number in enumerate(batch.images[:, 2, 4, 1].tolist()):
            assert batch.class_ids[row] == 100 + number
            assert batch.captions[row] in Numbered()[number].captions
            length = len(batch.captions[row].split())
            assert batch.word_mask[row].tolist() == [i < length for i in range(batch.tokens.shape[1])]
        assert data.vocabulary.decode(batch.tokens) == list(batch.captions)
        assert batch.tokens.shape[1] == batch.word_mask.sum(dim=1).max()


def test_each_epoch_shows_every_image_at_most_once_and_over_time_all(data):
    shown = numbers(read(data, 3, 0, 300))
    epochs = [[*shown[i], *shown[i + 1], *shown[i + 2]] for i in range(0, 300, 3)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert {number for epoch in epochs for number in epoch} == set(range(N))
    assert len({tuple(epoch) for epoch in epochs}) == 100


def test_a_whole_epoch_shows_every_image_and_in_time_every_caption(data):
    batches = read(data, N, 0, 60)
    assert all(sorted(shown) == list(range(N)) for shown in numbers(batches))
    seen = {caption for batch in batches for caption in batch.captions}
    assert seen == {caption for i in range(N) for caption in Numbered()[i].captions}


def test_batches_repeat_with_the_generator_and_leave_the_global_one_alone(data):
    before = torch.get_rng_state()
    one, again, other = (read(data, 3, seed, 7) for seed in (1, 1, 2))
    assert all(same(a, b) for a, b in zip(one, again))
    assert numbers(one) != numbers(other)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_depends_on_its_number_alone(data):
    """Read backward, by another object, the batches are the same."""
    forward = read(data, 3, 4, 12)
    batches = RepeatableBatches(data, 3, 4)
    backward = [batches[number] for number in reversed(range(12))]
    assert all(same(a, b) for a, b in zip(forward, reversed(backward)))


@pytest.mark.parametrize("crop", [None, 4])
def test_the_parts_of_the_ranks_are_the_whole(data, crop):
    whole = RepeatableBatches(data, 6, 4, crop=crop)
    parts = [RepeatableBatches(data, 6, 4, crop=crop, rank=rank, ranks=3) for rank in range(3)]
    for number in (0, 1, 5):
        mine = [part[number] for part in parts]
        for field in ("images", "tokens", "word_mask", "class_ids", "image_rows", "caption_rows"):
            together = torch.cat([getattr(part, field) for part in mine])
            assert torch.equal(together, getattr(whole[number], field))


def test_rows_lead_back_to_the_data_set(data):
    for batch in read(data, 3, 0, 9):
        assert torch.equal(data.images[batch.image_rows], batch.images)
        assert torch.equal(data.tokens[batch.caption_rows, : batch.tokens.shape[1]], batch.tokens)


def test_chosen_images_and_captions(data):
    batch = data.batch(torch.tensor([5, 2, 5]), torch.tensor([2, 0, 1]))
    assert batch.captions == ("w5 w5 w5 w5", "w2 w2", "w5 w5 w5")
    assert batch.class_ids.tolist() == [105, 102, 105]
    with pytest.raises(IndexError, match="choices names a caption that its image does not have"):
        data.batch(torch.tensor([0]), torch.tensor([1]))


def test_long_captions_are_cut_but_kept_as_written():
    batch = InMemoryCaptions(Numbered(), max_words=3).batch(torch.tensor([5]), torch.tensor([2]))
    assert batch.tokens.shape == (1, 3)
    assert batch.captions == ("w5 w5 w5 w5",)


def test_what_tells_left_from_right_is_not_mirrored():
    """Each image grows lighter from left to right; half of the captions mention a side."""
    said = [
        "a bird on the left",
        "its right_wing",
        "LEFT, then right!",
        "a bright bird, leftover",
        "an outright cleft",
        "two birds",
    ]
    ramp = np.tile(np.arange(H * 2, dtype=np.uint8)[None, :, None], (H * 2, 1, 3))
    data = InMemoryCaptions([CaptionedImage(ramp, (caption,), i, {}) for i, caption in enumerate(said)], max_words=18)
    assert data.tells_sides.tolist() == [True, True, True, False, False, False]
    whole = RepeatableBatches(data, 6, 0, crop=H)
    parts = [RepeatableBatches(data, 6, 0, crop=H, rank=rank, ranks=2) for rank in range(2)]
    mirrored = dict.fromkeys(range(6), 0)
    for number in range(40):
        assert torch.equal(whole[number].images, torch.cat([part[number].images for part in parts]))
        for row, image in zip(whole[number].image_rows.tolist(), whole[number].images):
            mirrored[row] += int(image[0, 0, 0] > image[0, -1, 0])
    assert [mirrored[row] for row in range(3)] == [0, 0, 0]
    assert all(8 < mirrored[row] < 32 for row in range(3, 6))


@pytest.mark.parametrize(
    ("word", "is_side"),
    [
        *((word, True) for word in ("Leftmost", "right-hand", "lefthand", "righthanded", "leftward", "rightwards")),
        *((word, False) for word in ("leftover", "upright", "rightful", "bright", "cleft")),
    ],
)
def test_words_that_tell_a_side(word, is_side):
    sample = CaptionedImage(np.zeros((H, W, 3), np.uint8), (f"its {word} wing",), 0, {})
    assert InMemoryCaptions([sample], max_words=18).tells_sides.tolist() == [is_side]


def test_mirrored_images_and_numbers_of_numpy_are_taken():
    image = np.arange(H * W * 3, dtype=np.uint8).reshape(H, W, 3)
    data = InMemoryCaptions([CaptionedImage(image[:, ::-1], ["a bird"], np.int64(3), {})], max_words=18)
    assert np.array_equal(data.images[0].numpy(), image[:, ::-1])
    assert data.class_ids.tolist() == [3]


class Counting(Numbered):
    """Image i has a caption of i + 1 different words, in order, and a short one."""

    def __getitem__(self, index):
        words = [f"{letter}{index}" for letter in "abcdefghijklmn"]
        return super().__getitem__(index)._replace(captions=(" ".join(words[: index + 1]), "short"))


def test_long_captions_keep_random_words_in_their_order():
    data = InMemoryCaptions(Counting(), max_words=5, long_captions="subsample")
    cut = InMemoryCaptions(Counting(), max_words=5)
    assert not cut.long_tokens
    assert {len(tokens) for tokens in data.long_tokens.values()} == {6, 7, 8, 9, 10, 11}
    seen = {}
    for batch, plain in zip(read(data, N, 0, 60), read(cut, N, 0, 60)):
        assert torch.equal(batch.word_mask, plain.word_mask)
        assert batch.captions == plain.captions
        for row, caption in enumerate(batch.captions):
            words = caption.split()
            read_words = data.vocabulary.decode(batch.tokens[row : row + 1])[0].split()
            assert read_words == [word for word in words if word in read_words]
            assert len(read_words) == min(len(words), 5)
            if len(words) <= 5:
                assert torch.equal(batch.tokens[row], plain.tokens[row])
            else:
                seen.setdefault(caption, set()).update(read_words)
                assert data.vocabulary.decode(plain.tokens[row : row + 1])[0].split() == words[:5]
    assert all(words == set(caption.split()) for caption, words in seen.items())
    assert len(seen) == 6
    # What is kept is not changed by what was read.
    assert torch.equal(data.tokens, cut.tokens)


def test_the_words_that_are_kept_repeat_and_belong_to_the_batch():
    data = InMemoryCaptions(Counting(), max_words=5, long_captions="subsample")
    one, again, other = (read(data, N - 1, seed, 7) for seed in (1, 1, 2))
    assert all(same(a, b) for a, b in zip(one, again))
    assert not all(torch.equal(a.tokens, b.tokens) for a, b in zip(one, other))
    parts = [RepeatableBatches(data, N - 1, 1, rank=rank, ranks=5) for rank in range(5)]
    for number, batch in enumerate(one):
        assert torch.equal(torch.cat([part[number].tokens for part in parts]), batch.tokens)


def test_given_vocabulary_reads_other_words_as_unknown(recwarn):
    data = InMemoryCaptions(Numbered(), Vocabulary(["w1"]), max_words=18)
    assert data.batch(torch.tensor([1, 2]), torch.tensor([0, 0])).tokens.tolist() == [[3, 3], [2, 2]]
    assert not recwarn


def test_built_vocabulary_drops_rare_words():
    vocabulary = InMemoryCaptions(Numbered(), max_words=18, min_count=9).vocabulary
    assert set(vocabulary.words[3:]) == {"w2", "w5", "w8"}


def test_keeps_what_is_known_and_tells_the_progress():
    calls = []
    data = InMemoryCaptions(Numbered(5), max_words=18, progress=lambda done, total: calls.append((done, total)))
    assert len(data) == 5
    assert calls == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]
    assert data.attributes[3] == {"number": "3"}
    assert data.captions[1] == ("w1 w1", "w1 w1 w1")


def test_errors(data):
    with pytest.raises(ValueError, match="the data set is empty"):
        InMemoryCaptions(Numbered(0), max_words=18)
    with pytest.raises(ValueError, match=r"image 3 is \(4, 4, 3\), but the first is \(5, 7, 3\)"):
        InMemoryCaptions(Broken(image=np.zeros((4, 4, 3), dtype=np.uint8)), max_words=18)
    for image, found in (
        (np.full((H, W, 3), 0.9, np.float32), r"float32 \(5, 7, 3\)"),
        (np.zeros((3, H, W), np.uint8), r"uint8 \(3, 5, 7\)"),
        (np.zeros((H, W), np.uint8), r"uint8 \(5, 7\)"),
        (torch.zeros(H, W, 3, dtype=torch.uint8), "of type Tensor"),
    ):
        with pytest.raises(ValueError, match=rf"image 3 is {found}; expected a numpy array, uint8 \(H, W, 3\)"):
            InMemoryCaptions(Broken(image=image), max_words=18)
    for captions in ("abc", (b"a",), None):
        with pytest.raises(ValueError, match=r"sample 3 has the captions .*; expected a tuple of texts"):
            InMemoryCaptions(Broken(captions=captions), max_words=18)
    for class_id in (None, 1.5, -1, 10**30, True):
        with pytest.raises(
            ValueError, match=r"sample 3 has the class .*; expected a whole number from 0, below 2\*\*63"
        ):
            InMemoryCaptions(Broken(class_id=class_id), max_words=18)
    with pytest.raises(ValueError, match="sample 3 has no caption"):
        InMemoryCaptions(Broken(captions=()), max_words=18)
    with pytest.raises(ValueError, match="max_words must be a whole number of at least 1, but it is 0"):
        InMemoryCaptions(Numbered(), max_words=0)
    with pytest.raises(ValueError, match="long_captions must be one of 'cut', 'subsample', but it is 'fold'"):
        InMemoryCaptions(Numbered(), max_words=18, long_captions="fold")
    with pytest.raises(ValueError, match="batch_size=12 exceeds the 11 samples"):
        RepeatableBatches(data, 12, 0)
    with pytest.raises(ValueError, match="batch_size=5 must be a multiple of ranks=2"):
        RepeatableBatches(data, 5, 0, ranks=2)
    for rank in (-1, 2, 0.5):
        with pytest.raises(ValueError, match=f"rank must be from 0 to 1 with ranks=2, but it is {rank}"):
            RepeatableBatches(data, 4, 0, rank=rank, ranks=2)
    with pytest.raises(ValueError, match="crop must be a whole number of at least 1, but it is 0"):
        RepeatableBatches(data, 3, 0, crop=0)
    with pytest.raises(ValueError, match="crop=6 exceeds the images of 7 x 5 pixels"):
        RepeatableBatches(data, 3, 0, crop=6)
    with pytest.raises(IndexError, match="batches are counted from 0, and -1 was asked for"):
        RepeatableBatches(data, 3, 0)[-1]


@pytest.mark.parametrize("crop", [None, 5])
def test_without_images_all_else_is_the_same(data, crop):
    with_images = RepeatableBatches(data, 3, seed=1, crop=crop)
    without = RepeatableBatches(data, 3, seed=1, crop=crop, with_images=False)
    for number in range(5):
        expected, batch = with_images[number], without[number]
        assert batch.images.shape == (3, 0, 0, 3)
        assert to_float(batch.images).shape == (3, 3, 0, 0)
        for name in ("tokens", "word_mask", "class_ids", "image_rows", "caption_rows"):
            assert torch.equal(getattr(batch, name), getattr(expected, name))
        assert batch.captions == expected.captions
