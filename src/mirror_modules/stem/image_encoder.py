"""Image encoders: region features and a global feature in the space of the words (MirrorGAN, Sec. 3.1).

A backbone is any Module `images (B, 3, H, W) in [-1, 1] -> ImageFeatures` with its sizes in the attributes `region_dim`
and `image_dim`. `ConvBackbone` trains from scratch; `TorchvisionBackbone` wraps torchvision's networks.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirror_modules._checks import check_encoded, check_images, check_positive, check_precision, declared_size
from mirror_modules._norms import MapBatchNorm
from mirror_modules._typing import TypedCall

# Mean and standard deviation of ImageNet's images in [0, 1], per color channel.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageFeatures(NamedTuple):
    """Local and global features of a batch of images."""

    regions: Tensor
    """One feature per region, in row-major order. (B, R, D)"""
    image: Tensor
    """One global feature per image. (B, D)"""


class ConvBackbone(TypedCall, nn.Module):
    """A small convolutional network that trains from scratch.

    Each block halves the resolution and doubles the channels. Regions are the positions of the second-to-last block
    (8 x 8 for 64 pixels and four blocks). The global feature concatenates the mean and the maximum of the last block:
    the maximum keeps small objects. Images are not normalized: the input is in [-1, 1].

    Args:
        channels: Channels of the first block.
        blocks: Number of blocks, at least 2; images need at least 2**blocks pixels on each side.

    Raises:
        ValueError: A size is not a whole number of at least 1, or there are fewer than 2 blocks.

    Examples:
        >>> import torch
        >>> from mirror_modules.stem import ConvBackbone
        >>> backbone = ConvBackbone(channels=4, blocks=3)
        >>> features = backbone(torch.rand(2, 3, 32, 24) * 2 - 1)
        >>> features.regions.shape, features.image.shape  # 8 x 6 regions
        (torch.Size([2, 48, 8]), torch.Size([2, 32]))
        >>> backbone.region_dim, backbone.image_dim
        (8, 32)
    """

    def __init__(self, channels: int = 32, blocks: int = 4) -> None:
        super().__init__()
        check_positive("ConvBackbone", channels=channels, blocks=blocks)
        if blocks < 2:
            raise ValueError(f"ConvBackbone: blocks must be at least 2, but it is {blocks}.")
        widths = [channels * 2**i for i in range(blocks)]
        self.smallest = 2**blocks
        self.region_dim, self.image_dim = widths[-2], 2 * widths[-1]
        self.blocks = nn.ModuleList(_block(before, after) for before, after in zip([3, *widths], widths))

    def forward(self, images: Tensor) -> ImageFeatures:
        """Encode images (B, 3, H, W) into regions (B, R, region_dim) and image (B, image_dim)."""
        check_images("ConvBackbone", images, self.smallest)
        check_precision("ConvBackbone", self, images=images)
        maps = [images]
        for block in self.blocks:
            maps.append(block(maps[-1]))
        image = torch.cat((maps[-1].mean(dim=(2, 3)), maps[-1].amax(dim=(2, 3))), dim=1)
        return ImageFeatures(maps[-2].flatten(2).mT, image)


def _block(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 4, stride=2, padding=1, bias=False),
        MapBatchNorm(after),
        nn.LeakyReLU(0.2, inplace=True),
    )


class TorchvisionBackbone(TypedCall, nn.Module):
    """torchvision's Inception v3 or one of its ResNets, without the classifier.

    Images in [-1, 1] are converted to the input on which torchvision's weights were trained: for a ResNet they are
    normalized with ImageNet's statistics; for Inception they are resized to 299 pixels and stay in [-1, 1], because
    torchvision's own network undoes ImageNet's normalization (its `transform_input`). A ResNet takes images of any
    size as they are, unless `resize_to` is given. Regions are the positions of Inception's `Mixed_6e` (17 x 17 x 768,
    as in the paper) or of a ResNet's `layer3`; the global feature is the mean of the last block.

    Args:
        name: "inception_v3", or the name of a ResNet such as "resnet18" or "resnet152".
        weights: As in torchvision, such as "DEFAULT", which torchvision downloads; None initializes at random.
        normalize: Normalize the input of a ResNet; the published captioners were trained on raw images in [-1, 1].
        resize_to: Height and width to which images are resized, bilinearly; None resizes to 299 for Inception and not
            at all for a ResNet. The published captioners resize to 224.
        antialias: Filter images when they shrink; the published code does not.

    Raises:
        ValueError: `name` is none of these, or `resize_to` is not a whole number of at least 1.

    Examples:
        >>> import torch
        >>> from mirror_modules.stem import TorchvisionBackbone
        >>> backbone = TorchvisionBackbone("resnet18").eval()
        >>> features = backbone(torch.rand(1, 3, 64, 64) * 2 - 1)
        >>> features.regions.shape, features.image.shape  # 4 x 4 regions
        (torch.Size([1, 16, 256]), torch.Size([1, 512]))
    """

    def __init__(
        self,
        name: str,
        weights: Any = None,
        *,
        normalize: bool = True,
        resize_to: int | None = None,
        antialias: bool = True,
    ) -> None:
        super().__init__()
        from torchvision import models

        if name != "inception_v3" and not (name.startswith("resnet") and name in models.list_models()):
            raise ValueError(f"TorchvisionBackbone: name must be 'inception_v3' or a torchvision ResNet, not {name!r}.")
        quiet = {"init_weights": False} if name == "inception_v3" and weights is None else {}
        network = models.get_model(name, weights=weights, **quiet)
        self.image_dim = network.fc.in_features
        self.normalize = normalize and name != "inception_v3"
        default_size, region_layer = (299, "Mixed_6e") if name == "inception_v3" else (None, "layer3")
        if resize_to is not None:
            check_positive("TorchvisionBackbone", resize_to=resize_to)
        self.resize_to, self.antialias = default_size if resize_to is None else resize_to, antialias
        # Both families are a sequence of their children up to the pooling, except for Inception's auxiliary classifier.
        layers = {layer: child for layer, child in network.named_children() if layer != "AuxLogits"}
        trunk = list(layers)[: list(layers).index("avgpool")]
        self.network = _Trunk(OrderedDict((layer, layers[layer]) for layer in trunk))
        self.network.region_layer = region_layer
        self.region_dim = 768 if name == "inception_v3" else layers["layer4"][0].conv1.in_channels

    def forward(self, images: Tensor) -> ImageFeatures:
        """Encode images (B, 3, H, W) in [-1, 1] into regions (B, R, region_dim) and image (B, image_dim)."""
        check_images("TorchvisionBackbone", images)
        check_precision("TorchvisionBackbone", self, images=images)
        if self.resize_to is not None:
            size = (self.resize_to, self.resize_to)
            images = F.interpolate(images, size, mode="bilinear", antialias=self.antialias)
        regions, features = self.network(_normalize_for_imagenet(images) if self.normalize else images)
        return ImageFeatures(regions.flatten(2).mT, features.mean(dim=(2, 3)))


class _Trunk(nn.Sequential):
    """Layers in sequence: images -> the output of `region_layer`, and that of the last layer."""

    region_layer: str

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        regions = features = images
        for name, layer in self.named_children():
            features = layer(features)
            if name == self.region_layer:
                regions = features
        return regions, features


def _normalize_for_imagenet(images: Tensor) -> Tensor:
    # Created in each call instead of registered as buffers, which `to_empty` would fill with uninitialized memory.
    mean = images.new_tensor(IMAGENET_MEAN).view(3, 1, 1)
    std = images.new_tensor(IMAGENET_STD).view(3, 1, 1)
    return ((images + 1) / 2 - mean) / std


def _named_backbone(name: str, weights: Any) -> nn.Module:
    if name != "conv":
        if name != "inception_v3" and not name.startswith("resnet"):
            raise ValueError(
                "ImageEncoder: the name of a backbone must be 'conv', 'inception_v3' or a torchvision ResNet, not "
                f"{name!r}; for another one, pass interop.build_backbone({name!r})."
            )
        return TorchvisionBackbone(name, weights)
    if weights is not None:
        raise ValueError("ImageEncoder: the backbone 'conv' has no published weights; use weights=None.")
    return ConvBackbone()


class ImageEncoder(TypedCall, nn.Module):
    """Encode images as region features and a global feature in the space of the words (MirrorGAN, Sec. 3.1; DAMSM).

        regions = backbone_regions W_r,    image = backbone_image W_g + b_g

    Args:
        backbone: A Module that maps images (B, 3, H, W) to `ImageFeatures` and has the int attributes `region_dim` and
            `image_dim`; or a name: "conv", "inception_v3" or a torchvision ResNet. `interop.build_backbone` builds
            others by name, and makes a backbone of any Module.
        feature_dim: Features D of regions and image, equal to those of the text encoder.
        weights: torchvision's weights for a named backbone, such as "DEFAULT"; the backbone then trains further, while
            `interop.build_backbone` freezes it.

    Raises:
        ValueError: The name is unknown, the Module has no sizes, or `weights` are given for another backbone.

    Examples:
        >>> import torch
        >>> from mirror_modules import ImageEncoder
        >>> encoder = ImageEncoder(feature_dim=16)  # a small convolutional backbone
        >>> features = encoder(torch.rand(2, 3, 64, 64) * 2 - 1)
        >>> features.regions.shape, features.image.shape
        (torch.Size([2, 64, 16]), torch.Size([2, 16]))
    """

    def __init__(self, backbone: nn.Module | str = "conv", feature_dim: int = 256, *, weights: Any = None) -> None:
        super().__init__()
        check_positive("ImageEncoder", feature_dim=feature_dim)
        if isinstance(backbone, str):
            backbone = _named_backbone(backbone, weights)
        elif weights is not None:
            raise ValueError("ImageEncoder: weights need the name of a backbone; load them into your Module yourself.")
        self.backbone = backbone
        self.region_dim = self.image_dim = feature_dim
        region_dim, image_dim = (declared_size("ImageEncoder", backbone, name) for name in ("region_dim", "image_dim"))
        self.region_projection = nn.Linear(region_dim, feature_dim, bias=False)
        self.image_projection = nn.Linear(image_dim, feature_dim)

    def forward(self, images: Tensor) -> ImageFeatures:
        """Encode images.

        Args:
            images: In [-1, 1], (B, 3, H, W).

        Returns:
            Regions (B, R, D) and image (B, D).

        Raises:
            ValueError: `images` are not floats (B, 3, H, W), or the backbone does not return `ImageFeatures` of the
                sizes that it declares.
        """
        check_images("ImageEncoder", images)
        features = self.backbone(images)
        shapes = {"regions": (3, self.region_projection.in_features), "image": (2, self.image_projection.in_features)}
        check_encoded("ImageEncoder", self.backbone, features, **shapes)
        return self.project(features)

    def project(self, features: ImageFeatures) -> ImageFeatures:
        """Project features of the backbone: regions (B, R, region_dim) and image (B', image_dim), to D features."""
        return ImageFeatures(self.region_projection(features.regions), self.image_projection(features.image))
