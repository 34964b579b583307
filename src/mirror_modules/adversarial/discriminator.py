"""A paired discriminator judges an image alone and an image with a sentence (MirrorGAN, Sec. 3.4)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from mirror_modules._checks import check_batch, check_choice, check_features, check_images, check_positive, shape_of

Normalization = Literal["batch", "spectral", "none"]

SMALLEST_RESOLUTION = 4
# After so many halvings the map of a 64 pixel image is 4 x 4; larger images are narrowed to the same width again.
FULL_WIDTH_HALVINGS = 4


class PairedLogits(NamedTuple):
    """What a paired discriminator says of a batch of images."""

    realism: Tensor
    """Is it a photograph? The sentence is not looked at. (B,)"""
    consistency: Tensor
    """Does it belong to this sentence? (B,)"""


class SentenceConv2d(nn.Conv2d):
    """A 3x3 convolution of features with a sentence at each of their positions, where it is never laid out.

        conv2d(cat(features, sentence at each position), weight, padding=1)

    The sentence is the same everywhere: each of the kernel's nine places multiplies it once, and a matrix of zeros and
    ones adds those up that lie within the map.
    """

    def __init__(self, channels: int, text_dim: int, *, bias: bool = False) -> None:
        super().__init__(channels + text_dim, channels, 3, padding=1, bias=bias)

    def forward(self, features: Tensor, sentence: Tensor) -> Tensor:  # type: ignore[override]
        """(B, C, H, W), (B, D) -> (B, C, H, W)."""
        of_features, of_sentence = self.weight.split([features.shape[1], sentence.shape[1]], dim=1)
        places = F.linear(sentence, of_sentence.permute(0, 2, 3, 1).flatten(0, 2)).unflatten(1, (-1, 9))
        is_within = F.unfold(places.new_ones(1, 1, *features.shape[2:]), 3, padding=1)
        said = (places @ is_within).unflatten(2, features.shape[2:])
        return F.conv2d(features, of_features, self.bias, padding=1) + said


class WholeMapConv2d(nn.Conv2d):
    """A convolution whose kernel is as large as the map, to one number: a product, (B, C, 4, 4) -> (B,)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 1, SMALLEST_RESOLUTION)

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, 4, 4) -> (B,)."""
        return F.linear(input.flatten(1), self.weight.flatten(1), self.bias).flatten()


class PairedDiscriminator(nn.Module):
    """Judge images of one resolution, alone and with a sentence (MirrorGAN, Sec. 3.4).

        h = CNN(image),    realism = a(h),    consistency = b(conv(h, sentence))

    Convolutions of stride 2 halve the image down to 4 x 4 and double the channels each time; past 64 pixels, 3x3
    convolutions narrow them again to 8 * channels. Both heads see the whole 4 x 4 map. The results are logits: use
    them with `discriminator_loss` and `generator_loss`.

    Args:
        resolution: Height and width of the images, a power of two from 4 up.
        text_dim: Features D of the sentence.
        channels: Channels after the first convolution.
        normalization: "batch" has batch norms as published, "spectral" instead divides each convolution by its largest
            singular value, "none" does neither.
    """

    def __init__(
        self, resolution: int, text_dim: int = 256, *, channels: int = 64, normalization: Normalization = "batch"
    ) -> None:
        super().__init__()
        owner = "PairedDiscriminator"
        check_choice(owner, "normalization", normalization, ("batch", "spectral", "none"))
        check_positive(owner, resolution=resolution, text_dim=text_dim, channels=channels)
        if resolution < SMALLEST_RESOLUTION or resolution & (resolution - 1):
            raise ValueError(
                f"{owner}: resolution must be a power of two from {SMALLEST_RESOLUTION} up, but it is {resolution}."
            )
        self.resolution, self.text_dim = resolution, text_dim
        halvings = (resolution // SMALLEST_RESOLUTION).bit_length() - 1
        # A batch norm takes a bias away again.
        has_norm = normalization == "batch"
        # A 4 x 4 image is not halved: one convolution that keeps its size.
        layers: list[nn.Module] = [
            nn.Conv2d(3, channels, 4, stride=2, padding=1, bias=False)
            if halvings
            else nn.Conv2d(3, channels, 3, padding=1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
        ]
        width = channels
        for _ in range(halvings - 1):
            halving = nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=not has_norm)
            layers += _with_norm(halving, has_norm)
            width *= 2
        for _ in range(halvings - FULL_WIDTH_HALVINGS):
            layers += _with_norm(nn.Conv2d(width, width // 2, 3, padding=1, bias=not has_norm), has_norm)
            width //= 2
        self.feature_dim = width
        self.trunk = nn.Sequential(*layers)
        self.realism_head = WholeMapConv2d(width)
        self.joint = nn.Sequential(*_with_norm(SentenceConv2d(width, text_dim, bias=not has_norm), has_norm))
        self.consistency_head = WholeMapConv2d(width)
        if normalization == "spectral":
            for module in [m for m in self.modules() if isinstance(m, nn.Conv2d)]:
                nn.utils.parametrizations.spectral_norm(module)

    def features(self, images: Tensor) -> Tensor:
        """Look at images (B, 3, resolution, resolution) in [-1, 1]; features (B, F, 4, 4) for `judge`."""
        check_images("PairedDiscriminator", images)
        if tuple(images.shape[2:]) != (self.resolution, self.resolution):
            raise ValueError(
                f"PairedDiscriminator: images are {shape_of(images)} but it was built with resolution="
                f"{self.resolution}; expected (B, 3, {self.resolution}, {self.resolution})."
            )
        return self.trunk(images)

    def judge(self, features: Tensor, sentence: Tensor) -> PairedLogits:
        """Judge features (B, F, 4, 4) with sentences (B, D)."""
        check_features("PairedDiscriminator", "features", features, "(B, C, H, W)", self.feature_dim, "feature_dim")
        check_features("PairedDiscriminator", "sentence", sentence, "(B, D)", self.text_dim, "text_dim")
        check_batch("PairedDiscriminator", images=features, sentence=sentence)
        convolution, *rest = self.joint
        joint = convolution(features, sentence)
        for layer in rest:
            joint = layer(joint)
        return PairedLogits(self.realism_head(features), self.consistency_head(joint))

    def forward(self, images: Tensor, sentence: Tensor) -> PairedLogits:
        """Judge images with sentences.

        Args:
            images: In [-1, 1], (B, 3, resolution, resolution).
            sentence: Sentence features, (B, D).

        Returns:
            Logits of realism and consistency, each (B,).

        Raises:
            ValueError: Sizes disagree.
        """
        return self.judge(self.features(images), sentence)

    def extra_repr(self) -> str:
        """The sizes, as `print` shows them."""
        return f"resolution={self.resolution}, text_dim={self.text_dim}"


def _with_norm(convolution: nn.Conv2d, has_norm: bool) -> list[nn.Module]:
    norm = [nn.BatchNorm2d(convolution.out_channels)] if has_norm else []
    return [convolution, *norm, nn.LeakyReLU(0.2, inplace=True)]
