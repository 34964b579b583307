import subprocess
import sys

import numpy as np
import pytest
import torch

from mirror_modules.data import ATTRIBUTES, SyntheticFlowers, class_id_of, measured_box
from mirror_modules.data.flowers import dataset
from mirror_modules.functional import box_overlap


def test_a_sample_is_a_function_of_seed_split_and_index():
    flowers = SyntheticFlowers(23, seed=5)
    sample, same = flowers[19], SyntheticFlowers(101, seed=5)[19]
    assert np.array_equal(sample.image, same.image)
    assert sample[1:] == same[1:]
    assert np.array_equal(flowers[-4].image, sample.image)


def test_seeds_splits_and_indices_all_change_the_image():
    images = [
        SyntheticFlowers(23, seed=seed, split=split, resolution=17)[index].image.tobytes()
        for seed in (0, 1, 2)
        for split in ("train", "validation")
        for index in range(5)
    ]
    assert len(set(images)) == len(images)


def test_neither_resolution_nor_number_of_captions_changes_the_flower():
    plain = SyntheticFlowers(3)[2]
    large = SyntheticFlowers(3, resolution=131)[2]
    seven = SyntheticFlowers(3, captions_per_image=7)[2]
    assert large.image.shape == (131, 131, 3)
    assert large[1:] == plain[1:]
    assert np.array_equal(seven.image, plain.image)
    assert seven.attributes == plain.attributes
    assert len(seven.captions) == 7


def test_fields_of_a_sample():
    for sample in (SyntheticFlowers(7)[i] for i in range(7)):
        assert sample.image.shape == (64, 64, 3)
        assert sample.image.dtype == np.uint8
        assert len(sample.captions) == 5
        assert sample.class_id == class_id_of(sample.attributes)
        assert sample.box is not None
        assert min(sample.box[2:]) > 0.4
        assert len(sample.points) == len(sample.point_names) == 9
        assert sample.point_names[:2] == ("center", "petal 1")


def test_scattered_flowers_are_anywhere_and_otherwise_the_same():
    plain, scattered = (SyntheticFlowers(60, resolution=32, scatter=scatter) for scatter in (False, True))
    boxes = np.array([sample.box for sample in scattered])
    assert all(one[1:4] == other[1:4] for one, other in zip(plain, scattered))
    assert (boxes[:, :2] > -0.01).all()
    assert (boxes[:, :2] + boxes[:, 2:] < 1.01).all()
    middles = boxes[:, :2] + boxes[:, 2:] / 2
    assert middles.min() < 0.25
    assert middles.max() > 0.75
    assert boxes[:, 2].min() < 0.35
    assert boxes[:, 2].max() > 0.7
    # Pixels, box and key points are those of the same flower.
    large = SyntheticFlowers(60, resolution=64, scatter=True)[3]
    assert large[1:] == scattered[3][1:]
    measured = measured_box(torch.from_numpy(np.stack([sample.image for sample in scattered])))
    assert box_overlap(measured, torch.tensor(boxes, dtype=torch.float32)).mean() > 0.85
    tips = np.array(scattered[3].points)
    x, y, w, h = scattered[3].box
    shown = tips[tips[:, 2] == 1]
    assert ((shown[:, :2] > (x - 0.01, y - 0.01)) & (shown[:, :2] < (x + w + 0.01, y + h + 0.01))).all()


@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize("resolution", range(8, 14))
def test_small_images_show_the_flowers_of_large_ones(resolution, scatter):
    """A hundred of each: few are so small, and so placed, that their center lies between the pixel centers."""
    small, large = (SyntheticFlowers(100, resolution=size, scatter=scatter, seed=3) for size in (resolution, 64))
    # By index: a loop over the data set would end at an IndexError.
    for i in range(100):
        sample = small[i]
        assert sample.image.shape == (resolution, resolution, 3)
        if i < 5:
            assert sample[1:] == large[i][1:]
        # The center has a color of its own, in the pixel in which it lies.
        other = "black" if sample.attributes["center_color"] == "golden" else "golden"
        x, y, _ = sample.points[0]
        changed = draw_again(small, i, center_color=other) != sample.image
        assert changed[int(y * resolution), int(x * resolution)].any()


def draw_again(flowers, index, **changes):
    """The image of a sample with other attributes."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        draw = dataset.draw_located_flower
        monkeypatch.setattr(
            dataset,
            "draw_located_flower",
            lambda attributes, *arguments, **options: draw({**attributes, **changes}, *arguments, **options),
        )
        return flowers[index].image


def test_all_attribute_values_occur():
    samples = list(SyntheticFlowers(120, resolution=8, captions_per_image=1))
    for name, values in ATTRIBUTES.items():
        assert {sample.attributes[name] for sample in samples} == set(values)


def test_errors():
    with pytest.raises(IndexError, match="index 3 is out of range for 3 samples"):
        SyntheticFlowers(3)[3]
    with pytest.raises(ValueError, match="size must be a whole number of at least 1, but it is 0"):
        SyntheticFlowers(0)
    with pytest.raises(ValueError, match="split must be one of 'train', 'validation', but it is 'test'"):
        SyntheticFlowers(3, split="test")
    for seed in (-1, 2**32, 1.5, "0", True):
        with pytest.raises(ValueError, match=rf"seed must be a whole number from 0 to 2\*\*32 - 1, but it is {seed!r}"):
            SyntheticFlowers(3, seed=seed)
    with pytest.raises(ValueError, match="resolution must be at least 8, but it is 4"):
        SyntheticFlowers(3, resolution=4)


def test_importing_the_data_package_imports_no_image_library():
    code = "import sys, mirror_modules.data; print({'PIL', 'torchvision', 'matplotlib', 'triton'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
