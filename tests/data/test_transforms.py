from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from mirror_modules.data import image_pyramid, random_crop_flip, to_bytes, to_float

B, H, W, R = 3, 11, 13, 7


def random_bytes(batch=B, height=H, width=W, seed=0):
    return torch.randint(
        256, (batch, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_to_float_by_loops():
    images = random_bytes()
    floats = to_float(images)
    assert floats.shape == (B, 3, H, W)
    assert floats.is_contiguous()
    for b in range(B):
        for h in range(H):
            for w in range(W):
                for c in range(3):
                    assert floats[b, c, h, w].item() == pytest.approx(images[b, h, w, c].item() / 127.5 - 1, abs=1e-6)


def test_every_byte_survives_the_round_trip_through_floats():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)
    floats = to_float(images)
    assert (floats.min().item(), floats.max().item()) == (-1, 1)
    assert torch.equal(to_bytes(floats), images)


def test_to_bytes_rounds_and_clips():
    values = torch.tensor([-7.0, -1.0, -0.9961, 0.0, 0.5, 1.0, 7.0])
    assert to_bytes(values.expand(1, 3, 1, 7))[0, 0, :, 0].tolist() == [0, 0, 0, 128, 191, 255, 255]


def test_crops_are_windows_of_their_own_image_some_of_them_flipped():
    images = random_bytes(41)
    crops = random_crop_flip(images, R, seeded(0))
    assert crops.shape == (41, R, R, 3)
    positions = []
    for image, crop in zip(images, crops):
        windows = {
            (top, left, mirrored): (window.flip(1) if mirrored else window)
            for top in range(H - R + 1)
            for left in range(W - R + 1)
            for window in [image[top : top + R, left : left + R]]
            for mirrored in (False, True)
        }
        matches = [position for position, window in windows.items() if torch.equal(window, crop)]
        assert len(matches) == 1
        positions += matches
    tops, lefts, mirrored = (set(values) for values in zip(*positions))
    assert tops == set(range(H - R + 1))
    assert lefts == set(range(W - R + 1))
    assert mirrored == {False, True}


def test_flip_false_never_flips():
    images = random_bytes(31, R, R)
    assert torch.equal(random_crop_flip(images, R, seeded(0), flip=False), images)
    assert not torch.equal(random_crop_flip(images, R, seeded(0)), images)


def test_crops_are_reproducible_and_do_not_use_the_global_generator():
    images = random_bytes()
    before = torch.get_rng_state()
    one, again, other = (random_crop_flip(images, R, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def area_mean_by_loops(image, resolution):
    """The mean over the area of each pixel, in exact fractions of pixels."""
    height, width = image.shape[1:]
    result = torch.zeros(3, resolution, resolution, dtype=torch.float64)
    for row in range(resolution):
        for column in range(resolution):
            top, bottom = Fraction(row * height, resolution), Fraction((row + 1) * height, resolution)
            left, right = Fraction(column * width, resolution), Fraction((column + 1) * width, resolution)
            for h in range(height):
                for w in range(width):
                    high, wide = min(bottom, h + 1) - max(top, h), min(right, w + 1) - max(left, w)
                    if high > 0 and wide > 0:
                        share = high * wide / ((bottom - top) * (right - left))
                        result[:, row, column] += float(share) * image[:, h, w].double()
    return result


@pytest.mark.parametrize(
    ("height", "width", "resolution"),
    [
        (12, 12, 1),
        (12, 12, 3),
        (12, 12, 4),
        (12, 12, 6),
        (12, 12, 12),
        (3, 3, 2),
        (7, 11, 5),
        (13, 13, 12),
        (10, 12, 5),
        (19, 19, 16),
    ],
)
def test_the_pyramid_by_loops(height, width, resolution):
    images = torch.randn(2, 3, height, width, generator=seeded(0))
    (small,) = image_pyramid(images, [resolution])
    for image, result in zip(images, small):
        torch.testing.assert_close(result, area_mean_by_loops(image, resolution).float())


def test_pixels_of_the_pyramid_are_means_at_the_ratio_of_random_crops():
    """76 to 64 pixels: constants stay, and the mean of the image is kept."""
    images = torch.randn(1, 3, 76, 76, dtype=torch.float64, generator=seeded(0))
    (small,) = image_pyramid(images, [64])
    torch.testing.assert_close(small.mean(dim=(2, 3)), images.mean(dim=(2, 3)))
    (constant,) = image_pyramid(torch.full_like(images, -0.7), [64])
    torch.testing.assert_close(constant, torch.full_like(constant, -0.7))


def test_whole_ratios_are_pooled_as_before():
    images = torch.randn(2, 3, 24, 36, generator=seeded(0))
    for resolution in (1, 2, 3, 4, 6, 12):
        expected = F.adaptive_avg_pool2d(images, resolution)
        assert torch.equal(image_pyramid(images, [resolution])[0], expected)


def test_the_pyramid_keeps_the_dtype_and_is_not_rounded_by_autocast():
    images = torch.randn(2, 3, 7, 7, generator=seeded(0))
    expected = image_pyramid(images, [5])[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(image_pyramid(images, [5])[0], expected)
    for dtype in (torch.float16, torch.bfloat16):
        rounded = images.to(dtype)
        assert torch.equal(image_pyramid(rounded, [5])[0], image_pyramid(rounded.float(), [5])[0].to(dtype))
    image_pyramid_of = torch.compile(lambda each: image_pyramid(each, [5])[0], fullgraph=True, backend="eager")
    torch.testing.assert_close(image_pyramid_of(images), expected)
    assert torch.autograd.gradcheck(lambda each: image_pyramid(each, [5])[0], images.double().requires_grad_())


def test_the_pyramid_keeps_the_order_and_the_full_resolution():
    images = torch.randn(B, 3, 16, 16)
    pyramid = image_pyramid(images, (4, 8, 16))
    assert [level.shape[2:] for level in pyramid] == [(4, 4), (8, 8), (16, 16)]
    assert torch.equal(pyramid[-1], images)


def test_errors():
    with pytest.raises(ValueError, match=r"to_float: images must be uint8 \(B, H, W, 3\), but they are torch.float32"):
        to_float(torch.zeros(2, 5, 5, 3))
    with pytest.raises(ValueError, match=r"to_bytes: images must be \(B, 3, H, W\), but they are \(2, 5, 5, 3\)"):
        to_bytes(torch.zeros(2, 5, 5, 3))
    with pytest.raises(ValueError, match=r"random_crop_flip: images must be uint8 .* \(3, 3, 11, 13\)"):
        random_crop_flip(random_bytes().permute(0, 3, 1, 2), R)
    with pytest.raises(ValueError, match=r"images are \(3, 11, 13, 3\), smaller than resolution=12"):
        random_crop_flip(random_bytes(), 12)
    with pytest.raises(ValueError, match=r"resolutions \(4, 32\) exceed the images \(2, 3, 16, 16\)"):
        image_pyramid(torch.zeros(2, 3, 16, 16), (4, 32))
    with pytest.raises(ValueError, match=r"resolutions\[1\] must be a whole number of at least 1, but it is 0"):
        image_pyramid(torch.zeros(2, 3, 16, 16), (4, 0))
