"""The building blocks of the cascade: the first stage, a refinement stage, and the image head.

Shape suffixes as in `attention.py`.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirror_modules._norms import FeatureBatchNorm
from mirror_modules.glam.attention import GlobalLocalAttention, SentenceAxis, word_attention

SMALLEST_RESOLUTION = 4


def gate(features: Tensor) -> Tensor:
    """The gated linear unit, `F.glu(features, dim=1)`, in a form whose gradient is laid out as the features are.

    That of torch's own is contiguous even if they are channels-last, and a batch norm takes several times as long for a
    mixture of both.
    """
    value, openness = features.chunk(2, dim=1)
    return value * openness.sigmoid()


class DoublingConv2d(nn.Conv2d):
    """A 3x3 convolution of the map at twice its size, which is never made.

        conv2d(interpolate(features, scale_factor=2, mode="nearest"), weight, padding=1)

    Where weights of the kernel meet copies of one pixel, their sum meets the pixel. With the sums taken beforehand, it
    is a transposed convolution of stride 2 by a 4x4 kernel: 16 multiplications per pixel instead of 36.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, 2H, 2W)."""
        turned = self.weight.flip(2, 3).transpose(0, 1)
        rows = F.pad(turned, (0, 0, 0, 1)) + F.pad(turned, (0, 0, 1, 0))
        kernel = F.pad(rows, (0, 1)) + F.pad(rows, (1, 0))
        return F.conv_transpose2d(input, kernel, stride=2, padding=1)


class UpBlock(nn.Module):
    """Double the resolution: nearest neighbor, 3x3 convolution, batch norm, gated linear unit."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = DoublingConv2d(in_channels, 2 * out_channels)
        self.norm = nn.BatchNorm2d(2 * out_channels)

    def forward(self, features: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, 2H, 2W)."""
        return gate(self.norm(self.conv(features)))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a gated linear unit between them, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(2 * channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        inner = gate(self.norm1(self.conv1(features)))
        return features + self.norm2(self.conv2(inner))


class InitialStage(nn.Module):
    """Noise and condition -> features of the first resolution: `f_0 = F_0(z, s_ca)` (Sec. 3.2).

    A linear layer makes a 4x4 map; each doubling of the resolution halves the channels, down to `channels`.
    """

    def __init__(self, noise_dim: int, condition_dim: int, channels: int, resolution: int) -> None:
        super().__init__()
        doublings = (resolution // SMALLEST_RESOLUTION).bit_length() - 1
        self.base_channels = channels * 2**doublings
        base_features = self.base_channels * SMALLEST_RESOLUTION**2
        self.linear = nn.Linear(condition_dim + noise_dim, 2 * base_features, bias=False)
        self.norm = FeatureBatchNorm(2 * base_features)
        widths = [channels * 2**i for i in range(doublings, -1, -1)]
        self.upsample = nn.Sequential(*(UpBlock(wide, narrow) for wide, narrow in itertools.pairwise(widths)))

    def forward(self, noise: Tensor, condition: Tensor) -> Tensor:
        """(B, Z), (B, E) -> (B, C, H, W)."""
        base = gate(self.norm(self.linear(torch.cat((condition, noise), dim=1))))
        return self.upsample(base.view(-1, self.base_channels, SMALLEST_RESOLUTION, SMALLEST_RESOLUTION))


class WordAttention(nn.Module):
    """Word attention alone, `sum_l (U w_l) * softmax_l(f^T U w_l)`: the attention of AttnGAN, an ablation here."""

    def __init__(self, feature_dim: int, word_dim: int) -> None:
        super().__init__()
        self.word_projection = nn.Linear(word_dim, feature_dim, bias=False)

    def forward(self, features: Tensor, words: Tensor, word_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, C, H, W), (B, L, D) -> context (B, C, H, W), weights (B, L, H, W)."""
        return word_attention(features, self.word_projection(words), word_mask)


class RefinementStage(nn.Module):
    """Features of one resolution -> features of the next: `f_i = F_i(f_{i-1}, Att_i(f_{i-1}, w, s_ca))` (Sec. 3.2).

    Features and contexts are concatenated, brought to 2C channels by a 1x1 convolution (left out where they have
    2C already, which is so with word attention alone), refined by residual blocks and upsampled to C channels.
    """

    def __init__(
        self,
        word_dim: int,
        condition_dim: int,
        channels: int,
        doublings: int,
        residual_blocks: int,
        attention: str,
        *,
        impl: str = "auto",
        sentence_bias: bool = False,
        score_projection: bool = False,
        sentence_axis: SentenceAxis = "channels",
    ) -> None:
        super().__init__()
        self.attention: GlobalLocalAttention | WordAttention | None = None
        if attention == "global-local":
            self.attention = GlobalLocalAttention(
                channels,
                word_dim,
                condition_dim,
                impl=impl,
                sentence_bias=sentence_bias,
                score_projection=score_projection,
                sentence_axis=sentence_axis,
            )
        elif attention == "word":
            self.attention = WordAttention(channels, word_dim)
        inputs = {"global-local": 3, "word": 2, "none": 1}[attention]
        self.fusion = nn.Identity() if inputs == 2 else nn.Conv2d(inputs * channels, 2 * channels, 1, bias=False)
        self.residual = nn.Sequential(*(ResidualBlock(2 * channels) for _ in range(residual_blocks)))
        widths = [2 * channels] + [channels] * doublings
        self.upsample = nn.Sequential(*(UpBlock(before, after) for before, after in itertools.pairwise(widths)))

    def forward(
        self, features: Tensor, condition: Tensor, words: Tensor, word_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(B, C, H, W) -> (B, C, growth * H, growth * W), and the attention maps, None where there are none."""
        word_weights = sentence_weights = None
        inputs = [features]
        if isinstance(self.attention, GlobalLocalAttention):
            context = self.attention(features, words, condition, word_mask, need_weights=True)
            inputs += [context.word_context, context.sentence_context]
            word_weights, sentence_weights = context.word_weights, context.sentence_weights
        elif self.attention is not None:
            word_context, word_weights = self.attention(features, words, word_mask)
            inputs.append(word_context)
        fused = self.fusion(torch.cat(inputs, dim=1))
        return self.upsample(self.residual(fused)), word_weights, sentence_weights


class ImageHead(nn.Module):
    """Features -> image in [-1, 1]: 3x3 convolution and tanh, `I_i = G_i(f_i)` (Sec. 3.2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 3, 3, padding=1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 3, H, W)."""
        return torch.tanh(self.conv(features))
