"""Image encoders: regions in row-major order, the same features as torchvision's networks, custom backbones."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision import models

from mirror_modules import ImageEncoder, ImageFeatures
from mirror_modules.stem import ConvBackbone, TorchvisionBackbone

B, CHANNELS, D = 2, 3, 7


def draw(height=17, width=23, batch=B):
    return torch.rand(batch, 3, height, width) * 2 - 1


def output_of(layer):
    """A list to which each forward pass of the layer appends its output."""
    outputs = []
    layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    return outputs


class Means(nn.Module):
    """A custom backbone with one region per row of pixels."""

    region_dim = image_dim = 3

    def forward(self, images):
        return ImageFeatures(images.mean(dim=3).mT, images.mean(dim=(2, 3)))


class Returns(nn.Module):
    """A backbone that returns the same for all images."""

    region_dim = 3

    def __init__(self, result, image_dim=3):
        super().__init__()
        self.result, self.image_dim = result, image_dim

    def forward(self, images):
        return self.result


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 23), (64, 37), (31, 64)])
def test_conv_backbone_accepts_odd_sizes(height, width):
    backbone = ConvBackbone(CHANNELS)
    regions, image = backbone(draw(height, width))
    assert regions.shape == (B, (height // 8) * (width // 8), 4 * CHANNELS)
    assert image.shape == (B, 2 * 8 * CHANNELS)
    assert (backbone.region_dim, backbone.image_dim) == (4 * CHANNELS, 2 * 8 * CHANNELS)


def test_regions_are_in_row_major_order_and_the_global_feature_is_mean_and_maximum():
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


def test_an_encoder_is_itself_a_backbone():
    encoder = ImageEncoder(Means(), D)
    assert encoder.region_dim == encoder.image_dim == D
    assert ImageEncoder(encoder, 5)(draw()).image.shape == (B, 5)


def copy_weights(source, target):
    state = source.state_dict()
    target.load_state_dict({name: state[name] for name in target.state_dict()})


def normalize_by_loops(images):
    normalized = torch.empty_like(images)
    for c, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))):
        normalized[:, c] = ((images[:, c] + 1) / 2 - mean) / std
    return normalized


@torch.no_grad()
def test_resnet_has_the_features_of_torchvisions_network():
    network, backbone, images = (
        models.resnet18(weights=None).eval(),
        TorchvisionBackbone("resnet18").eval(),
        draw(33, 47),
    )
    copy_weights(network, backbone.network)
    region_maps, pooled = output_of(network.layer3), output_of(network.avgpool)
    network(normalize_by_loops(images))
    regions, image = backbone(images)
    assert_close(image, pooled[0].flatten(1))
    assert_close(regions, region_maps[0].flatten(2).mT)
    assert (backbone.region_dim, backbone.image_dim) == (regions.shape[2], image.shape[1]) == (256, 512)


@torch.no_grad()
def test_resnet_without_normalization():
    network, backbone = models.resnet18(weights=None).eval(), TorchvisionBackbone("resnet18", normalize=False).eval()
    copy_weights(network, backbone.network)
    images, pooled = draw(32, 32), output_of(network.avgpool)
    network(images)
    assert_close(backbone(images).image, pooled[0].flatten(1))


@torch.no_grad()
def test_inception_has_the_features_of_torchvisions_network():
    # torchvision sets `transform_input` when it loads its own weights.
    network = models.inception_v3(weights=None, init_weights=False, transform_input=True).eval()
    backbone, images = TorchvisionBackbone("inception_v3").eval(), draw(299, 299, batch=1)
    copy_weights(network, backbone.network)
    region_maps, pooled = output_of(network.Mixed_6e), output_of(network.avgpool)
    network(normalize_by_loops(images))
    regions, image = backbone(images)
    assert (regions.shape, image.shape) == ((1, 17 * 17, 768), (1, 2048))
    assert (backbone.region_dim, backbone.image_dim) == (768, 2048)
    # The features of the untrained network shrink with depth: compare them at unit scale.
    for actual, expected in ((image, pooled[0].flatten(1)), (regions, region_maps[0].flatten(2).mT)):
        assert_close(actual / expected.std(), expected / expected.std(), atol=1e-3, rtol=1e-3)
    assert backbone(draw(31, 45, batch=1)).regions.shape == regions.shape


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 37), (17, 23), (32, 32)])
@pytest.mark.parametrize("antialias", [True, False])
def test_resized_images_are_those_of_torchs_own_resize(size, antialias):
    network = models.resnet18(weights=None).eval()
    backbone = TorchvisionBackbone("resnet18", normalize=False, resize_to=32, antialias=antialias).eval()
    copy_weights(network, backbone.network)
    images, pooled = draw(*size), output_of(network.avgpool)
    network(nn.functional.interpolate(images, (32, 32), mode="bilinear", antialias=antialias))
    assert_close(backbone(images).image, pooled[0].flatten(1))


def test_forward_hooks_of_the_network_and_its_layers_run():
    backbone, called = TorchvisionBackbone("resnet18").eval(), []
    for name in ("network", "network.layer3", "network.layer4.1.conv2"):
        backbone.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    backbone(draw(32, 32))
    assert called == ["network.layer3", "network.layer4.1.conv2", "network"]


def test_meta_device_construction_then_loading():
    backbone, images = TorchvisionBackbone("resnet18").eval(), draw(32, 32)
    with torch.device("meta"):
        empty = TorchvisionBackbone("resnet18")
    loaded = empty.to_empty(device="cpu").eval()
    loaded.load_state_dict(backbone.state_dict())
    assert_close(loaded(images).image, backbone(images).image, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["vgg16", "resnet19", "inception", ""])
def test_the_error_names_an_unknown_network(name):
    with pytest.raises(ValueError, match=rf"must be .*'inception_v3' or a torchvision ResNet, not '{name}'"):
        ImageEncoder(name)


def test_another_network_is_built_by_interop():
    with pytest.raises(ValueError, match=r"for another one, pass interop\.build_backbone\('timm:resnet18'\)"):
        ImageEncoder("timm:resnet18")


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"ConvBackbone: blocks must be at least 2, but it is 1", lambda: ConvBackbone(blocks=1)),
        (r"ConvBackbone: channels must be a whole number of at least 1", lambda: ConvBackbone(0)),
        (r"the backbone 'conv' has no published weights", lambda: ImageEncoder("conv", weights="DEFAULT")),
        (r"ImageEncoder: weights need the name of a backbone", lambda: ImageEncoder(Means(), weights="DEFAULT")),
        (r"ImageEncoder: feature_dim must be a whole number", lambda: ImageEncoder(Means(), 0)),
        (
            r"Identity must declare the size of its features as a positive int `region_dim`, but that is None; interop",
            lambda: ImageEncoder(nn.Identity()),
        ),
        (r"positive int `image_dim`, but that is -1", lambda: ImageEncoder(Returns(None, image_dim=-1))),
        (r"positive int `image_dim`, but that is True", lambda: ImageEncoder(Returns(None, image_dim=True))),
        (
            r"ImageEncoder: Returns must return its features in a field `regions`, \(B, R, 3\) as it declares, .* it "
            r"returned an object of the type tuple",
            lambda: ImageEncoder(Returns((torch.zeros(2, 5, 3), torch.zeros(2, 3))))(draw()),
        ),
        (
            r"in a field `image`, \(B, 3\) as it declares, such as `ImageFeatures`, but it returned \(2, 4\)",
            lambda: ImageEncoder(Returns(ImageFeatures(torch.zeros(2, 5, 3), torch.zeros(2, 4))))(draw()),
        ),
        (
            r"ImageEncoder: images must be \(B, 3, H, W\), but they are \(2, 17, 23\)",
            lambda: ImageEncoder(Means())(draw()[:, 0]),
        ),
        (r"ImageEncoder: images must be floats .* torch\.uint8", lambda: ImageEncoder(Means())(draw().byte())),
        (
            r"TorchvisionBackbone: resize_to must be a whole number of at least 1, but it is 0",
            lambda: TorchvisionBackbone("resnet18", resize_to=0),
        ),
        (r"TorchvisionBackbone: images must be \(B, 3, H, W\)", lambda: TorchvisionBackbone("resnet18")(draw()[:, :2])),
    ],
)
def test_errors(message, call):
    with pytest.raises(ValueError, match=message):
        call()
