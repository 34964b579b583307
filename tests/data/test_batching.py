import numpy as np
import pytest
import torch

from mirror_modules.data import CaptionedImage, InMemoryCaptions, RepeatableBatches, to_float
from tests.layouts import NumberedImages

N, H, W = 11, 5, 7


def first_batches(data, batch_size, seed, count):
    batches = RepeatableBatches(data, batch_size, seed)
    return [batches[number] for number in range(count)]


def image_numbers(batches):
    return [batch.images[:, 0, 0, 0].tolist() for batch in batches]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one[:4], other[:4])) and one.captions == other.captions


@pytest.fixture(scope="module")
def data():
    return InMemoryCaptions(NumberedImages(N, H, W), max_words=18)


def test_all_fields_of_a_batch_belong_to_the_same_images(data):
    samples = NumberedImages(N, H, W)
    for batch in first_batches(data, 3, 0, 20):
        assert batch.images.shape == (3, H, W, 3)
        assert batch.images.dtype == torch.uint8
        for row, number in enumerate(batch.images[:, 2, 4, 1].tolist()):
            assert batch.class_ids[row] == 100 + number
            assert batch.captions[row] in samples[number].captions
            length = len(batch.captions[row].split())
            assert batch.word_mask[row].tolist() == [i < length for i in range(batch.tokens.shape[1])]
        assert data.vocabulary.decode(batch.tokens) == list(batch.captions)
        assert batch.tokens.shape[1] == batch.word_mask.sum(dim=1).max()


def test_rows_index_the_data_set(data):
    for batch in first_batches(data, 3, 0, 9):
        assert torch.equal(data.images[batch.image_rows], batch.images)
        assert torch.equal(data.tokens[batch.caption_rows, : batch.tokens.shape[1]], batch.tokens)


def test_an_epoch_has_no_image_twice_and_all_epochs_together_have_every_image(data):
    shown = image_numbers(first_batches(data, 3, 0, 300))
    epochs = [[*shown[i], *shown[i + 1], *shown[i + 2]] for i in range(0, 300, 3)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert {number for epoch in epochs for number in epoch} == set(range(N))
    assert len({tuple(epoch) for epoch in epochs}) == 100


def test_a_full_epoch_has_every_image_and_all_epochs_together_have_every_caption(data):
    batches = first_batches(data, N, 0, 60)
    assert all(sorted(shown) == list(range(N)) for shown in image_numbers(batches))
    captions = {caption for batch in batches for caption in batch.captions}
    assert captions == {caption for sample in NumberedImages(N, H, W) for caption in sample.captions}


def test_batches_are_reproducible_and_do_not_use_the_global_generator(data):
    before = torch.get_rng_state()
    one, again, other = (first_batches(data, 3, seed, 7) for seed in (1, 1, 2))
    assert all(equal(a, b) for a, b in zip(one, again))
    assert image_numbers(one) != image_numbers(other)
    assert torch.equal(torch.get_rng_state(), before)


def test_batch_n_is_a_function_of_the_seed_and_n(data):
    """Another object that reads the batches backwards reads the same ones."""
    forward = first_batches(data, 3, 4, 12)
    batches = RepeatableBatches(data, 3, 4)
    backward = [batches[number] for number in reversed(range(12))]
    assert all(equal(a, b) for a, b in zip(forward, reversed(backward)))


@pytest.mark.parametrize("crop", [None, 4])
def test_the_parts_of_all_ranks_make_up_the_batch(data, crop):
    whole = RepeatableBatches(data, 6, 4, crop=crop)
    parts = [RepeatableBatches(data, 6, 4, crop=crop, rank=rank, ranks=3) for rank in range(3)]
    for number in (0, 1, 5):
        local = [part[number] for part in parts]
        for field in ("images", "tokens", "word_mask", "class_ids", "image_rows", "caption_rows", "caption_ids"):
            gathered = torch.cat([getattr(part, field) for part in local])
            assert torch.equal(gathered, getattr(whole[number], field))


def test_images_whose_caption_mentions_a_side_are_not_flipped():
    """Each image grows lighter from left to right; half of the captions mention a side."""
    captions = [
        "a bird on the left",
        "its right_wing",
        "LEFT, then right!",
        "a bright bird, leftover",
        "an outright cleft",
        "two birds",
    ]
    ramp = np.tile(np.arange(H * 2, dtype=np.uint8)[None, :, None], (H * 2, 1, 3))
    samples = [CaptionedImage(ramp, (caption,), i, {}) for i, caption in enumerate(captions)]
    data = InMemoryCaptions(samples, max_words=18)
    assert data.mentions_side.tolist() == [True, True, True, False, False, False]
    whole = RepeatableBatches(data, 6, 0, crop=H)
    parts = [RepeatableBatches(data, 6, 0, crop=H, rank=rank, ranks=2) for rank in range(2)]
    flips = dict.fromkeys(range(6), 0)
    for number in range(40):
        assert torch.equal(whole[number].images, torch.cat([part[number].images for part in parts]))
        for row, image in zip(whole[number].image_rows.tolist(), whole[number].images):
            flips[row] += int(image[0, 0, 0] > image[0, -1, 0])
    assert [flips[row] for row in range(3)] == [0, 0, 0]
    assert all(8 < flips[row] < 32 for row in range(3, 6))


class LongCaptions(NumberedImages):
    """Image i has a caption of i + 1 different words, and a short one."""

    def __getitem__(self, index):
        words = [f"{letter}{index}" for letter in "abcdefghijklmn"]
        return super().__getitem__(index)._replace(captions=(" ".join(words[: index + 1]), "short"))


def test_subsampled_captions_keep_random_words_in_order():
    data = InMemoryCaptions(LongCaptions(N, H, W), max_words=5, long_captions="subsample")
    cut = InMemoryCaptions(LongCaptions(N, H, W), max_words=5)
    assert not cut.long_tokens
    assert {len(tokens) for tokens in data.long_tokens.values()} == {6, 7, 8, 9, 10, 11}
    kept = {}
    for batch, cut_batch in zip(first_batches(data, N, 0, 60), first_batches(cut, N, 0, 60)):
        assert torch.equal(batch.word_mask, cut_batch.word_mask)
        assert batch.captions == cut_batch.captions
        for row, caption in enumerate(batch.captions):
            words = caption.split()
            decoded = data.vocabulary.decode(batch.tokens[row : row + 1])[0].split()
            assert decoded == [word for word in words if word in decoded]
            assert len(decoded) == min(len(words), 5)
            if len(words) <= 5:
                assert torch.equal(batch.tokens[row], cut_batch.tokens[row])
            else:
                kept.setdefault(caption, set()).update(decoded)
                assert data.vocabulary.decode(cut_batch.tokens[row : row + 1])[0].split() == words[:5]
    assert all(words == set(caption.split()) for caption, words in kept.items())
    assert len(kept) == 6
    # Batches are copies: subsampling them does not change the data set.
    assert torch.equal(data.tokens, cut.tokens)


def test_subsampled_words_are_reproducible_and_the_same_on_all_ranks():
    data = InMemoryCaptions(LongCaptions(N, H, W), max_words=5, long_captions="subsample")
    one, again, other = (first_batches(data, N - 1, seed, 7) for seed in (1, 1, 2))
    assert all(equal(a, b) for a, b in zip(one, again))
    assert not all(torch.equal(a.tokens, b.tokens) for a, b in zip(one, other))
    parts = [RepeatableBatches(data, N - 1, 1, rank=rank, ranks=5) for rank in range(5)]
    for number, batch in enumerate(one):
        assert torch.equal(torch.cat([part[number].tokens for part in parts]), batch.tokens)


class SharedCaptions(NumberedImages):
    """Three captions, written in two ways, for all images; one has more than five words, of which most are the same."""

    def __getitem__(self, index):
        captions = ("a Red one.", "a red one", "a blue one", "one two two two two two two")
        return super().__getitem__(index)._replace(captions=(captions[index % 4],))


@pytest.mark.parametrize("long_captions", ["cut", "subsample"])
def test_caption_ids_are_equal_for_equal_tokens_on_all_ranks(long_captions):
    data = InMemoryCaptions(SharedCaptions(N, H, W), max_words=5, long_captions=long_captions)
    parts = [RepeatableBatches(data, N - 1, 1, rank=rank, ranks=5) for rank in range(5)]
    for number in range(7):
        tokens, ids = (
            torch.cat([getattr(part[number], field) for part in parts]).tolist() for field in ("tokens", "caption_ids")
        )
        for i in range(N - 1):
            assert [ids[i] == other for other in ids] == [tokens[i] == other for other in tokens]
    batch = data.batch(torch.tensor([0, 1, 2, 4]), torch.zeros(4, dtype=torch.long))
    first, second, third, fourth = batch.caption_ids.tolist()
    assert first == second == fourth != third


@pytest.mark.parametrize("crop", [None, 5])
def test_without_images_all_other_fields_are_the_same(data, crop):
    with_images = RepeatableBatches(data, 3, seed=1, crop=crop)
    without = RepeatableBatches(data, 3, seed=1, crop=crop, with_images=False)
    for number in range(5):
        expected, batch = with_images[number], without[number]
        assert batch.images.shape == (3, 0, 0, 3)
        assert to_float(batch.images).shape == (3, 3, 0, 0)
        for name in ("tokens", "word_mask", "class_ids", "image_rows", "caption_rows", "caption_ids"):
            assert torch.equal(getattr(batch, name), getattr(expected, name))
        assert batch.captions == expected.captions


def test_errors(data):
    with pytest.raises(ValueError, match="batch_size=12 exceeds the 11 samples"):
        RepeatableBatches(data, 12, 0)
    with pytest.raises(ValueError, match="batch_size=5 must be a multiple of ranks=2"):
        RepeatableBatches(data, 5, 0, ranks=2)
    for rank in (-1, 2, 0.5):
        with pytest.raises(ValueError, match=f"rank must be from 0 to 1 with ranks=2, but it is {rank}"):
            RepeatableBatches(data, 4, 0, rank=rank, ranks=2)
    with pytest.raises(ValueError, match="RepeatableBatches: seed must be at least 0, but it is -1"):
        RepeatableBatches(data, 3, -1)
    with pytest.raises(ValueError, match="crop must be a whole number of at least 1, but it is 0"):
        RepeatableBatches(data, 3, 0, crop=0)
    with pytest.raises(ValueError, match="crop=6 exceeds the images of 7 x 5 pixels"):
        RepeatableBatches(data, 3, 0, crop=6)
    with pytest.raises(IndexError, match="batches are numbered from 0, but the index is -1"):
        RepeatableBatches(data, 3, 0)[-1]


# Boxes and key points

SIZE, CROP = 20, 16
NAMES = ("left wing", "tail", "right wing")
COLORS = {"left wing": (255, 0, 0), "tail": (0, 255, 0), "right wing": (0, 0, 255)}


def marked_samples(count=24):
    """Images with a gray box and a pixel of its own color at each key point, and their places."""
    rng = np.random.default_rng(0)
    samples = []
    for i in range(count):
        image = np.zeros((SIZE, SIZE, 3), np.uint8)
        top, left, height, width = (int(number) for number in rng.integers((2, 2, 4, 4), (8, 8, 10, 10)))
        image[top : top + height, left : left + width] = 100
        points = []
        for name in NAMES:
            row, column = (int(number) for number in rng.integers(0, SIZE, 2))
            if (image[row, column] > 100).any():
                points.append((0.0, 0.0, 0.0))
                continue
            image[row, column] = COLORS[name]
            points.append(((column + 0.5) / SIZE, (row + 0.5) / SIZE, 1.0))
        box = (left / SIZE, top / SIZE, width / SIZE, height / SIZE)
        captions = (f"a bird {i}", f"a bird on the left {i}")
        samples.append(CaptionedImage(image, captions, i, {}, box, tuple(points), NAMES))
    return samples


def check_places(batch, samples):
    """Boxes and points are where the pixels are; returns how many images are seen to be mirrored."""
    mirrored = 0
    for image, row, box, points in zip(batch.images.numpy(), batch.image_rows.tolist(), batch.boxes, batch.points):
        x, y, w, h = (CROP * box).tolist()
        gray = (image == 100).all(axis=2)
        for start, extent, axis in ((x, w, 0), (y, h, 1)):
            places = np.flatnonzero(gray.any(axis=axis))
            bounds = max(start, 0), min(start + extent, CROP)
            assert bounds == pytest.approx((places.min(), places.max() + 1), abs=1e-4)
        seen = {name: np.argwhere((image == color).all(axis=2)) for name, color in COLORS.items()}
        places = dict(zip(NAMES, points.tolist()))
        # In a mirrored image, the pixel of the right wing is at the left wing's place.
        other = {"left wing": "right wing", "right wing": "left wing", "tail": "tail"}
        is_mirrored = any(
            shown and len(seen[other[name]]) and tuple(seen[other[name]][0]) == (int(y * CROP), int(x * CROP))
            for name, (x, y, shown) in places.items()
            if name != "tail"
        )
        mirrored += is_mirrored
        for name, (x, y, shown) in places.items():
            original = other[name] if is_mirrored else name
            if shown:
                assert seen[original].tolist() == [[int(y * CROP), int(x * CROP)]]
            elif is_mirrored or samples[row].points[NAMES.index(name)][2]:
                assert len(seen[original]) == 0
    return mirrored


def test_boxes_and_key_points_move_with_crops_and_flips():
    samples = marked_samples()
    data = InMemoryCaptions(samples, max_words=18)
    whole = RepeatableBatches(data, 8, 0, crop=CROP)
    parts = [RepeatableBatches(data, 8, 0, crop=CROP, rank=rank, ranks=2) for rank in range(2)]
    mirrored = 0
    for number in range(30):
        batch = whole[number]
        mirrored += check_places(batch, samples)
        for name in ("boxes", "points"):
            assert torch.equal(getattr(batch, name), torch.cat([getattr(part[number], name) for part in parts]))
        uncropped = RepeatableBatches(data, 8, 0)[number]
        assert torch.equal(uncropped.boxes, data.boxes[batch.image_rows])
        assert torch.equal(uncropped.points, data.points[batch.image_rows])
    # A quarter: captions that mention a side are not flipped, and some points are cut off.
    assert 30 < mirrored < 90


def test_images_and_captions_do_not_depend_on_boxes_and_key_points():
    samples = marked_samples()
    plain = [sample._replace(box=None, points=None, point_names=()) for sample in samples]
    one, other = (RepeatableBatches(InMemoryCaptions(each, max_words=18), 8, 3, crop=CROP) for each in (samples, plain))
    for number in range(9):
        assert equal(one[number], other[number])
        assert other[number].boxes is other[number].points is None
