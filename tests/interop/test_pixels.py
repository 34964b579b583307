"""Preprocessing as tensors: equal to processors of Hugging Face and to timm's settings, differentiable, checked."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mirror_modules.interop import Preprocess

transformers = pytest.importorskip("transformers")

MEAN, STD = (0.4, 0.5, 0.6), (0.3, 0.2, 0.25)
B, H, W = 2, 37, 53
PROCESSORS = ["BlipImageProcessor", "CLIPImageProcessor", "SiglipImageProcessor", "ViTImageProcessor"]
PROCESSORS += ["BitImageProcessor"]


def draw(count=B, height=H, width=W):
    random = torch.Generator().manual_seed(4)
    # Smooth, so that rounding to bytes and different filters matter little.
    coarse = torch.rand(count, 3, 7, 9, generator=random)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    return (smooth * 255).round().to(torch.uint8)


def pixels_of(processor, content):
    images = [image.permute(1, 2, 0).numpy() for image in content]
    return processor(images=images, return_tensors="pt")["pixel_values"]


BYTES = {"do_rescale": False, "image_mean": [127.0] * 3, "image_std": [60.0] * 3}


@pytest.mark.parametrize("options", [{}, {"do_normalize": False}, BYTES])
@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_those_of_the_processor_up_to_rounding(name, options):
    processor = getattr(transformers, name)(**options)
    content = draw()
    expected = pixels_of(processor, content)
    ours = Preprocess.of_processor(processor)(content / 127.5 - 1)
    assert ours.shape == expected.shape
    # Processors round after resizing to one of 256 values.
    step = 1 / 255 if processor.do_rescale else 1
    step *= 1 / min(processor.image_std) if processor.do_normalize else 1
    assert float((ours - expected).abs().max()) <= 3 * step


@pytest.mark.parametrize("options", [{"do_center_crop": False}, {"size": {"shortest_edge": 20}, "crop_size": 30}])
def test_sizes_of_a_side_and_crops_beyond_the_image(options):
    processor = transformers.CLIPImageProcessor(**options)
    for height, width in ((H, W), (W, H)):
        content = draw(height=height, width=width)
        ours = Preprocess.of_processor(processor)(content / 127.5 - 1)
        assert ours.shape == pixels_of(processor, content).shape


@pytest.mark.parametrize("name", ["Idefics3ImageProcessor", "Qwen2VLImageProcessor", "LlavaNextImageProcessor"])
def test_processors_of_tiles_and_patches_are_refused(name):
    message = f"{name} returns pixel_values .*; processors that pad, or cut images into tiles or patches, are not"
    with pytest.raises(ValueError, match=message):
        Preprocess.of_processor(getattr(transformers, name)())


def test_a_processor_that_changes_colors_is_refused():
    class Inverted(transformers.BlipImageProcessor):
        def __call__(self, images, **options):
            return super().__call__(images=[255 - image for image in images], **options)

    with pytest.raises(ValueError, match=r"Inverted does more than resize, .* differ by \d\.\d\d standard deviations"):
        Preprocess.of_processor(Inverted())


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(11, 13), 11, None])
@pytest.mark.parametrize("crop", [None, (7, 5)])
def test_the_gradient(interpolation, size, crop):
    preprocess = Preprocess(size, MEAN, STD, interpolation=interpolation, crop=crop)
    images = (0.8 * torch.rand(1, 3, 17, 19, dtype=torch.float64) - 0.4).requires_grad_()
    assert torch.autograd.gradcheck(preprocess, (images,))


def test_without_resizing_it_is_a_formula():
    images = torch.rand(B, 3, H, W) * 2 - 1
    expected = ((images + 1) / 2 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert_close(Preprocess(None, MEAN, STD)(images), expected)
    assert_close(Preprocess((H, W), MEAN, STD)(images), expected)


def test_the_middle_is_cropped():
    images = torch.arange(7 * 9).view(1, 1, 7, 9).expand(1, 3, -1, -1) / 63 - 0.5
    cropped = Preprocess(None, (0.5,) * 3, (0.5,) * 3, crop=(3, 5))(images)
    assert_close(cropped, images[:, :, 2:5, 2:7])


def test_an_image_alone_equals_itself_in_a_batch():
    preprocess, images = Preprocess((11, 13), MEAN, STD), torch.rand(B, 3, H, W) * 2 - 1
    assert_close(preprocess(images)[1:], preprocess(images[1:]))


def test_resized_pixels_stay_in_the_range_of_bytes():
    edges = (torch.rand(B, 3, 8, 8) > 0.5).float() * 2 - 1
    pixels = Preprocess((40, 40), (0.0,) * 3, (1.0,) * 3)(edges)
    assert pixels.min() >= 0
    assert pixels.max() <= 1


def test_half_precision_is_computed_in_float32():
    images = torch.rand(B, 3, H, W) * 2 - 1
    assert Preprocess((11, 13), MEAN, STD)(images.bfloat16()).dtype == torch.float32


def test_settings_of_timm():
    config = {"input_size": (3, 24, 32), "mean": MEAN, "std": STD, "interpolation": "bilinear"}
    preprocess = Preprocess.of_timm(config)
    assert (preprocess.size, preprocess.interpolation) == ((24, 32), "bilinear")
    assert (preprocess.mean, preprocess.std) == (MEAN, STD)
    with pytest.raises(ValueError, match=r"configuration of timm needs input_size, .* but it lacks input_size, std"):
        Preprocess.of_timm({"mean": MEAN, "do_resize": True})
    with pytest.raises(ValueError, match=r"needs input_size, \(3, height, width\), .* but its input_size is 24"):
        Preprocess.of_timm({**config, "input_size": 24})


def test_the_statistics_of_imagenet_are_those_of_torchvision():
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    images = torch.rand(B, 3, H, W)
    expected = functional.normalize(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert_close(Preprocess.imagenet(None)(2 * images - 1), expected)


def test_it_is_not_saved_with_the_network():
    assert Preprocess.imagenet().state_dict() == {}


@pytest.mark.parametrize(
    ("message", "images"),
    [
        (r"images must be a tensor, but it is a ndarray", np.zeros((1, 3, 8, 8))),
        (r"images must be \(B, 3, H, W\), but they are \(1, 4, 8, 8\)", torch.zeros(1, 4, 8, 8)),
        (r"images must be floats in \[-1, 1\], but they are torch\.uint8", torch.zeros(1, 3, 8, 8).byte()),
    ],
)
def test_invalid_images(message, images):
    with pytest.raises(ValueError, match="Preprocess: " + message):
        Preprocess.imagenet()(images)


def test_an_unknown_filter():
    with pytest.raises(ValueError, match=r"Preprocess: interpolation must be one of .* but it is 'lanczos'"):
        Preprocess(8, MEAN, STD, interpolation="lanczos")


@pytest.mark.parametrize(
    ("message", "size", "mean", "std", "crop"),
    [
        (r"size must be \(height, width\), one number for the shorter side or None, .* '8'", "8", MEAN, STD, None),
        (r"size must be .* but it is \(0, 4\)", (0, 4), MEAN, STD, None),
        (r"size must be .* but it is 8\.0", 8.0, MEAN, STD, None),
        (r"crop must be \(height, width\) or None, each at least 1, but it is 8", None, MEAN, STD, 8),
        (r"mean must hold three numbers, one per color channel, but it is 0\.5", 8, 0.5, STD, None),
        (r"std must hold three numbers, .* but it is \(1\.0,\)", 8, MEAN, (1.0,), None),
        (r"mean must hold three numbers, .* but it is 'abc'", 8, "abc", STD, None),
        (r"std must hold three numbers, .* but it is \(1\.0, nan, 1\.0\)", 8, MEAN, (1.0, float("nan"), 1.0), None),
        (r"std must be above 0, but it is \(1\.0, 0\.0, 1\.0\)", 8, MEAN, (1.0, 0.0, 1.0), None),
    ],
)
def test_settings_that_are_no_preprocessing(message, size, mean, std, crop):
    with pytest.raises(ValueError, match="Preprocess: " + message):
        Preprocess(size, mean, std, crop=crop)


def test_a_list_is_a_size():
    images = torch.rand(B, 3, H, W) * 2 - 1
    assert Preprocess([11, 13], MEAN, STD)(images).shape == (B, 3, 11, 13)
