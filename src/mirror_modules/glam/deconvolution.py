"""Images by transposed convolutions: the generator of GAN-INT-CLS (Reed et al., ICML 2016, Sec. 4.1), and its parts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mirror_modules._bottleneck import BOTTLENECK, Bottleneck
from mirror_modules._checks import check_batch, check_features, check_positive, check_precision
from mirror_modules._typing import TypedCall
from mirror_modules.glam.generator import GeneratedImages
from mirror_modules.glam.stages import SMALLEST_RESOLUTION, concatenate


class DeconvolutionStage(nn.Module):
    """A vector -> a feature map, by transposed convolutions from one position to 4 x 4, 8 x 8, and so on.

    Each is followed by a batch norm and, for the first `bottlenecks` maps, a `Bottleneck`, otherwise ReLU. Convolutions
    have no bias: that of GAN-INT-CLS is reset to zero before each of its steps, and batch norm subtracts any other.

    Args:
        features_dim: Features D of the vector.
        widths: Channels of the maps, from 4 x 4 on.
        bottlenecks: How many of the maps, from the first on, pass a bottleneck.
        final_activation: Whether the last map passes ReLU, if no bottleneck.
    """

    def __init__(
        self, features_dim: int, widths: Sequence[int], bottlenecks: int, *, final_activation: bool = True
    ) -> None:
        super().__init__()
        first = nn.ConvTranspose2d(features_dim, widths[0], SMALLEST_RESOLUTION, bias=False)
        deconvolutions = [first, *(doubling(before, after) for before, after in itertools.pairwise(widths))]
        layers: list[nn.Module] = []
        for i, (deconvolution, width) in enumerate(zip(deconvolutions, widths)):
            layers += [deconvolution, nn.BatchNorm2d(width)]
            if i < bottlenecks:
                layers.append(Bottleneck(width))
            elif i + 1 < len(widths) or final_activation:
                layers.append(nn.ReLU())
        self.layers = nn.Sequential(*layers)

    def forward(self, vector: Tensor) -> Tensor:
        """(B, D) -> (B, widths[-1], S, S) with S = 4 * 2**(len(widths) - 1)."""
        return self.layers(vector[:, :, None, None])


class DeconvolutionGenerator(TypedCall, nn.Module):
    """Noise and condition -> images of one resolution by transposed convolutions (Reed et al., ICML 2016, Sec. 4.1).

        I = tanh(deconv(... ReLU(norm(deconv(s, z))) ...))

    A transposed convolution makes a 4 x 4 map of condition and noise; each further one doubles the resolution and
    halves the channels, and the last makes the image. The first maps pass a residual block with a bottleneck.

    With 128 channels and the condition of `SentenceProjection(1024, 128)` this is the generator of GAN-INT-CLS;
    without bottlenecks it is that of DCGAN.

    Args:
        noise_dim: Features Z of the noise.
        condition_dim: Features E of the condition.
        channels: Channels C of the last map before the image.
        resolution: Height and width of the images, a power of two of at least 8.
        bottlenecks: How many of the maps, from 4 x 4 on, pass a residual block: at most log2(resolution / 4).

    Raises:
        ValueError: A size is not a whole number of at least 1, `resolution` is not a power of two of at least 8, or
            `bottlenecks` does not fit.

    Examples:
        >>> import torch
        >>> from mirror_modules import DeconvolutionGenerator
        >>> generator = DeconvolutionGenerator(noise_dim=5, condition_dim=7, channels=4, resolution=32)
        >>> generator(torch.randn(2, 5), torch.randn(2, 7)).images[-1].shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self,
        noise_dim: int = 100,
        condition_dim: int = 128,
        *,
        channels: int = 128,
        resolution: int = 64,
        bottlenecks: int = 2,
    ) -> None:
        super().__init__()
        owner = "DeconvolutionGenerator"
        check_positive(
            owner, noise_dim=noise_dim, condition_dim=condition_dim, channels=channels, resolution=resolution
        )
        if resolution <= SMALLEST_RESOLUTION or resolution & (resolution - 1):
            raise ValueError(
                f"{owner}: resolution must be a power of two of at least {2 * SMALLEST_RESOLUTION}, but it is "
                f"{resolution}."
            )
        maps = (resolution // SMALLEST_RESOLUTION).bit_length() - 1
        if not isinstance(bottlenecks, int) or not 0 <= bottlenecks <= maps:
            raise ValueError(
                f"{owner}: bottlenecks must be from 0 to {maps}, the number of maps before images of {resolution} "
                f"pixels, but it is {bottlenecks!r}."
            )
        widths = [channels * 2**i for i in reversed(range(maps))]
        if bottlenecks and widths[bottlenecks - 1] % BOTTLENECK:
            raise ValueError(
                f"{owner}: a bottleneck has a quarter of the channels, but map {bottlenecks - 1} has "
                f"{widths[bottlenecks - 1]} with channels={channels}; use more channels or fewer bottlenecks."
            )
        self.noise_dim, self.condition_dim, self.resolutions = noise_dim, condition_dim, (resolution,)
        self.stage = DeconvolutionStage(condition_dim + noise_dim, widths, bottlenecks)
        self.head = doubling(channels, 3)

    def forward(self, noise: Tensor, condition: Tensor) -> GeneratedImages:
        """Generate a batch of images.

        Args:
            noise: Standard normal, (B, Z).
            condition: Features of the sentence, (B, E), as of `SentenceProjection`.

        Returns:
            Images in [-1, 1], a list of one batch (B, 3, resolution, resolution), and no attention maps.

        Raises:
            ValueError: Sizes disagree.
        """
        owner = "DeconvolutionGenerator"
        check_features(owner, "noise", noise, "(B, D)", self.noise_dim, "noise_dim")
        check_features(owner, "condition", condition, "(B, D)", self.condition_dim, "condition_dim")
        check_batch(owner, noise=noise, condition=condition)
        check_precision(owner, self.head, noise=noise, condition=condition)
        return GeneratedImages([torch.tanh(self.head(self.stage(concatenate(condition, noise))))], [], [])


def doubling(in_channels: int, out_channels: int, *, bias: bool = False) -> nn.ConvTranspose2d:
    """Build a transposed convolution to twice the size."""
    return nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1, bias=bias)
