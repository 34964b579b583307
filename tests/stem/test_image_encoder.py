"""Image encoders: regions in reading order, torchvision's networks unchanged, any backbone that states its sizes."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision import models

from mirror_modules import ImageEncoder, ImageFeatures
from mirror_modules.stem import ConvBackbone, TorchvisionBackbone
from mirror_modules.stem.image_encoder import build_backbone

B, CHANNELS, D = 2, 3, 7


def draw(height=17, width=23, batch=B):
    return torch.rand(batch, 3, height, width) * 2 - 1


def output_of(layer):
    """What a layer gave in its last forward."""
    seen = []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    return seen


class Means(nn.Module):
    """A foreign backbone: a region per row of pixels."""

    region_dim = image_dim = 3

    def forward(self, images):
        return ImageFeatures(images.mean(dim=3).mT, images.mean(dim=(2, 3)))


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 23), (64, 37), (31, 64)])
def test_conv_backbone_takes_odd_sizes(height, width):
    backbone = ConvBackbone(CHANNELS)
    regions, image = backbone(draw(height, width))
    assert regions.shape == (B, (height // 8) * (width // 8), 4 * CHANNELS)
    assert image.shape == (B, 2 * 8 * CHANNELS)
    assert (backbone.region_dim, backbone.image_dim) == (4 * CHANNELS, 2 * 8 * CHANNELS)


def test_regions_are_in_reading_order_and_the_image_is_mean_and_maximum():
    backbone = ConvBackbone(CHANNELS).eval()
    region_maps, image_maps = output_of(backbone.blocks[-2]), output_of(backbone.blocks[-1])
    regions, image = backbone(draw(17, 40))
    for b, y, x in product(range(B), range(2), range(5)):
        assert_close(regions[b, y * 5 + x], region_maps[0][b, :, y, x], atol=0, rtol=0)
    for b, c in product(range(B), range(8 * CHANNELS)):
        values = image_maps[0][b, c].flatten().tolist()
        assert image[b, c].item() == pytest.approx(sum(values) / len(values), abs=1e-6)
        assert image[b, 8 * CHANNELS + c].item() == max(values)


def test_the_number_of_blocks_sets_the_smallest_image():
    assert ConvBackbone(CHANNELS, blocks=2)(draw(4, 5)).image.shape == (B, 2 * 2 * CHANNELS)
    with pytest.raises(
        ValueError, match=r"ConvBackbone: images are \(2, 3, 15, 16\); each side needs at least 16 pixels"
    ):
        ConvBackbone(CHANNELS)(draw(15, 16))


@pytest.mark.parametrize("size", [16, 17, 33])
def test_a_batch_of_one_trains(size):
    encoder = ImageEncoder(ConvBackbone(CHANNELS), D).train()
    regions, image = encoder(draw(size, size, batch=1))
    (regions.square().sum() + image.square().sum()).backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_an_image_alone_equals_the_same_image_in_a_batch():
    encoder, images = ImageEncoder(ConvBackbone(CHANNELS), D).eval(), draw()
    together, alone = encoder(images), encoder(images[1:])
    assert_close(tuple(alone), tuple(part[1:] for part in together), atol=1e-5, rtol=0)


def test_projections_match_the_loops():
    encoder, images = ImageEncoder(Means(), D).requires_grad_(False), draw(5, 2)
    regions, image = encoder(images)
    assert regions.shape == (B, 5, D)
    for b, r, d in product(range(B), range(5), range(D)):
        row = sum(encoder.region_projection.weight[d, c] * images[b, c, r].mean() for c in range(3))
        assert regions[b, r, d].item() == pytest.approx(row.item(), abs=1e-6)
    for b, d in product(range(B), range(D)):
        mean = sum(encoder.image_projection.weight[d, c] * images[b, c].mean() for c in range(3))
        assert image[b, d].item() == pytest.approx((mean + encoder.image_projection.bias[d]).item(), abs=1e-6)


def test_an_encoder_is_itself_a_backbone_that_states_its_sizes():
    encoder = ImageEncoder(Means(), D)
    assert encoder.region_dim == encoder.image_dim == D
    assert ImageEncoder(encoder, 5)(draw()).image.shape == (B, 5)


def share_weights(ours, theirs):
    state = theirs.state_dict()
    ours.load_state_dict({name: state[name] for name in ours.state_dict()})


def normalize_by_loops(images):
    normalized = torch.empty_like(images)
    for c, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))):
        normalized[:, c] = ((images[:, c] + 1) / 2 - mean) / std
    return normalized


@torch.no_grad()
def test_resnet_gives_the_features_of_torchvisions_network():
    theirs, ours, images = models.resnet18(weights=None).eval(), TorchvisionBackbone("resnet18").eval(), draw(33, 47)
    share_weights(ours.network, theirs)
    region_maps, pooled = output_of(theirs.layer3), output_of(theirs.avgpool)
    theirs(normalize_by_loops(images))
    regions, image = ours(images)
    assert_close(image, pooled[0].flatten(1))
    assert_close(regions, region_maps[0].flatten(2).mT)
    assert (ours.region_dim, ours.image_dim) == (regions.shape[2], image.shape[1]) == (256, 512)


@torch.no_grad()
def test_resnet_without_normalization_takes_the_images_raw():
    theirs, ours = models.resnet18(weights=None).eval(), TorchvisionBackbone("resnet18", normalize=False).eval()
    share_weights(ours.network, theirs)
    images, pooled = draw(32, 32), output_of(theirs.avgpool)
    theirs(images)
    assert_close(ours(images).image, pooled[0].flatten(1))


@torch.no_grad()
def test_inception_gives_the_features_of_torchvisions_network():
    # `transform_input` is what torchvision sets together with its weights.
    theirs = models.inception_v3(weights=None, init_weights=False, transform_input=True).eval()
    ours, images = TorchvisionBackbone("inception_v3").eval(), draw(299, 299, batch=1)
    share_weights(ours.network, theirs)
    region_maps, pooled = output_of(theirs.Mixed_6e), output_of(theirs.avgpool)
    theirs(normalize_by_loops(images))
    regions, image = ours(images)
    assert (regions.shape, image.shape) == ((1, 17 * 17, 768), (1, 2048))
    assert (ours.region_dim, ours.image_dim) == (768, 2048)
    # Untrained, the network makes its features smaller and smaller.
    for ours_part, expected in ((image, pooled[0].flatten(1)), (regions, region_maps[0].flatten(2).mT)):
        assert_close(ours_part / expected.std(), expected / expected.std(), atol=1e-3, rtol=1e-3)
    assert ours(draw(31, 45, batch=1)).regions.shape == regions.shape


def test_a_network_made_on_the_meta_device_is_the_same_once_it_is_loaded():
    ours, images = TorchvisionBackbone("resnet18").eval(), draw(32, 32)
    with torch.device("meta"):
        empty = TorchvisionBackbone("resnet18")
    loaded = empty.to_empty(device="cpu").eval()
    loaded.load_state_dict(ours.state_dict())
    assert_close(loaded(images).image, ours(images).image, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["vgg16", "resnet19", "inception", ""])
def test_unknown_networks_are_named(name):
    with pytest.raises(ValueError, match=rf"must be 'inception_v3' or a torchvision ResNet, not '{name}'"):
        build_backbone(name)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"ConvBackbone: blocks must be at least 2, but it is 1", lambda: ConvBackbone(blocks=1)),
        (r"ConvBackbone: channels must be a whole number of at least 1", lambda: ConvBackbone(0)),
        (r"build_backbone: .* 'conv' has no published weights", lambda: ImageEncoder("conv", weights="DEFAULT")),
        (r"ImageEncoder: weights go with a backbone's name", lambda: ImageEncoder(Means(), weights="DEFAULT")),
        (r"ImageEncoder: feature_dim must be a whole number", lambda: ImageEncoder(Means(), 0)),
        (r"the backbone Identity must state its size as an int `region_dim`", lambda: ImageEncoder(nn.Identity())),
        (
            r"ImageEncoder: images must be \(B, 3, H, W\), but they are \(2, 17, 23\)",
            lambda: ImageEncoder(Means())(draw()[:, 0]),
        ),
        (r"ImageEncoder: images must be floats .* torch\.uint8", lambda: ImageEncoder(Means())(draw().byte())),
        (r"TorchvisionBackbone: images must be \(B, 3, H, W\)", lambda: TorchvisionBackbone("resnet18")(draw()[:, :2])),
    ],
)
def test_errors_say_what_is_wrong(message, call):
    with pytest.raises(ValueError, match=message):
        call()
