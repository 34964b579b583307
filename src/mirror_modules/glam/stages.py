"""The building blocks of the cascade: the first stage, a refinement stage, and the image head.

Shape suffixes as in `attention.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirror_modules._checks import autocast_dtype, check_precision, shape_of
from mirror_modules._norms import FeatureBatchNorm
from mirror_modules._sentence_conv import SentenceConv2d

Activation = Literal["glu", "relu"]
ACTIVATIONS = ("glu", "relu")
Upsampling = Literal["nearest", "bilinear"]
UPSAMPLINGS = ("nearest", "bilinear")
SMALLEST_RESOLUTION = 4


class StageContext(Protocol):
    """Result of a `StageAttention`, such as `GlobalLocalContext` or `WordContext`.

    A further attribute `fused_output`, features and contexts in one tensor (B, C + context_dim, H, W), is optional and
    may be None; it spares the stage a concatenation.
    """

    @property
    def contexts(self) -> tuple[Tensor, ...]:
        """Tensors (B, c, H, W) at the size of the features; their channels c add up to `context_dim`."""
        ...

    @property
    def word_weights(self) -> Tensor | None:
        """Attention map over the words, (B, L, H, W); None without `need_weights`, or if there is no such map."""
        ...

    @property
    def sentence_weights(self) -> Tensor | None:
        """Attention map over the sentence, (B, C, H, W); None without `need_weights`, or if there is no such map."""
        ...


class StageAttention(Protocol):
    """Contract of the attention module of a `RefinementStage`: any `nn.Module` with this attribute and this forward.

    `GlobalLocalAttention` and `WordAttention` are examples.
    """

    context_dim: int
    """Number of channels that the contexts append to the features."""

    def forward(
        self,
        features: Tensor,
        words: Tensor,
        condition: Tensor,
        word_mask: Tensor | None = None,
        *,
        need_weights: bool = False,
    ) -> StageContext:
        """Attend from the features of a stage to the text.

        Args:
            features: Image features, (B, C, H, W).
            words: Word features, (B, L, D).
            condition: Augmented condition, (B, E).
            word_mask: True for a real word, (B, L); None if all are.
            need_weights: Also return the attention maps.

        Returns:
            The contexts, and the attention maps if requested.
        """
        ...


class StageResult(NamedTuple):
    """Features of a refinement stage, with the attention maps that led to them."""

    features: Tensor
    """(B, C, 2**doublings * H, 2**doublings * W)"""
    word_weights: Tensor | None
    """(B, L, H, W), or None; see `StageContext`."""
    sentence_weights: Tensor | None
    """(B, C, H, W), or None; see `StageContext`."""


def gate(features: Tensor) -> Tensor:
    """Gated linear unit, equal to `F.glu(features, dim=1)`, whose gradient has the memory format of the features.

    The gradient of `F.glu` is contiguous even for channels-last features, and the backward pass of a batch norm takes
    several times as long for mixed memory formats.
    """
    value, openness = features.chunk(2, dim=1)
    return value * openness.sigmoid()


def activate(features: Tensor, activation: Activation) -> Tensor:
    """Apply the gated linear unit, which halves the channels, or ReLU, which keeps them."""
    return gate(features) if activation == "glu" else F.relu(features)


def channels_before(activation: Activation, channels: int) -> int:
    """How many channels become `channels` by `activate`."""
    return 2 * channels if activation == "glu" else channels


def doubling_kernel(weight: Tensor) -> Tensor:
    """The 4x4 kernel of a transposed convolution of stride 2 that equals upsampling and a 3x3 convolution.

        kernel[i, o] = S weight[o, i] S^T,    S = [[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]]

    Kernel weights that meet copies of the same pixel act through their sum; a transposed convolution takes them in
    reversed order.

    Args:
        weight: Of the 3x3 convolution, (out, in, 3, 3).

    Returns:
        The kernel (in, out, 4, 4), in the memory format of the weight.
    """
    outputs, inputs = weight.shape[:2]
    # Made on the device, since a copy from the host would break the capture of a CUDA graph.
    reversed_rows = torch.eye(3, dtype=weight.dtype, device=weight.device).flip(0)
    sums = F.pad(reversed_rows, (0, 0, 0, 1)) + F.pad(reversed_rows, (0, 0, 1, 0))
    # One matrix product for both axes: additions of slices of three and four elements take several times as long.
    kernel = (weight.reshape(-1, 9) @ torch.kron(sums, sums).mT).view(outputs, inputs, 4, 4).transpose(0, 1)
    if weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous():
        # The format of the weights determines that of the result.
        return kernel.contiguous(memory_format=torch.channels_last)
    return kernel


def sums_weights(positions: int) -> bool:
    """Whether a doubling convolution of this many input positions takes less time with the summed kernel.

    Upsampling first takes 36 multiplications per position and pair of channels instead of 16, but no time for the sum,
    which does not depend on the number of positions.

    Args:
        positions: Batch size * height * width.
    """
    # Measured on CPUs, the two are equal somewhere between 64 and 256, depending on batch size and layout.
    return positions >= 256


class DoublingConv2d(nn.Conv2d):
    """A 3x3 convolution of the feature map at twice its size.

        conv2d(interpolate(features, scale_factor=2, mode=upsampling), weight, padding=1)

    With "nearest", except for small maps, the larger map is not computed: with the kernel weights summed in advance, it
    is a transposed convolution with 16 multiplications per input pixel instead of 36.
    """

    def __init__(self, in_channels: int, out_channels: int, upsampling: Upsampling = "nearest") -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=False)
        self.upsampling = upsampling

    def forward(self, input: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, 2H, 2W)."""
        if self.upsampling == "bilinear":
            return F.conv2d(F.interpolate(input, scale_factor=2.0, mode="bilinear"), self.weight, padding=1)
        positions = input.shape[2] * input.shape[3]
        if not torch.compiler.is_compiling():
            # A graph serves any batch size.
            positions = positions * input.shape[0]
        if sums_weights(positions):
            return F.conv_transpose2d(input, doubling_kernel(self.weight), stride=2, padding=1)
        return F.conv2d(F.interpolate(input, scale_factor=2.0, mode="nearest"), self.weight, padding=1)


class UpBlock(nn.Module):
    """Double the resolution: upsampling, 3x3 convolution, batch norm, activation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        activation: Activation = "glu",
        upsampling: Upsampling = "nearest",
    ) -> None:
        super().__init__()
        self.activation = activation
        before = channels_before(activation, out_channels)
        self.conv = DoublingConv2d(in_channels, before, upsampling)
        self.norm = nn.BatchNorm2d(before)

    def forward(self, features: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, 2H, 2W)."""
        return activate(self.norm(self.conv(features)), self.activation)


def up_blocks(widths: Sequence[int], activation: Activation, upsampling: Upsampling) -> nn.Sequential:
    """One `UpBlock` between each width and the next."""
    pairs = itertools.pairwise(widths)
    return nn.Sequential(*(UpBlock(before, after, activation, upsampling) for before, after in pairs))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with an activation between them, added to the input; with ReLU, another one after the sum.

    The gated linear unit is that of StackGAN++ and its successors, ReLU that of StackGAN.
    """

    def __init__(self, channels: int, activation: Activation = "glu") -> None:
        super().__init__()
        self.activation = activation
        before = channels_before(activation, channels)
        self.conv1 = nn.Conv2d(channels, before, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(before)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        inner = activate(self.norm1(self.conv1(features)), self.activation)
        refined = features + self.norm2(self.conv2(inner))
        return refined if self.activation == "glu" else F.relu(refined)


class InitialStage(nn.Module):
    """Noise and condition -> features of the first resolution: `f_0 = F_0(z, s_ca)` (Sec. 3.2).

    A linear layer makes a 4x4 map; each doubling of the resolution halves the channels, down to `channels`.

    Args:
        noise_dim: Features Z of the noise.
        condition_dim: Features E of the condition; 0 for a stage that has noise alone.
        channels: Channels C of the result.
        resolution: Height and width of the result, a power of two of at least 4.
        activation: "glu", or "relu" (StackGAN).
        upsampling: "nearest", or "bilinear".
    """

    def __init__(
        self,
        noise_dim: int,
        condition_dim: int,
        channels: int,
        resolution: int,
        activation: Activation = "glu",
        upsampling: Upsampling = "nearest",
    ) -> None:
        super().__init__()
        self.activation = activation
        doublings = (resolution // SMALLEST_RESOLUTION).bit_length() - 1
        self.base_channels = channels * 2**doublings
        base_features = channels_before(activation, self.base_channels * SMALLEST_RESOLUTION**2)
        self.linear = nn.Linear(condition_dim + noise_dim, base_features, bias=False)
        self.norm = FeatureBatchNorm(base_features)
        self.upsample = up_blocks([channels * 2**i for i in range(doublings, -1, -1)], activation, upsampling)

    def forward(self, noise: Tensor, condition: Tensor | None = None) -> Tensor:
        """(B, Z), (B, E) -> (B, C, H, W)."""
        inputs = {"noise": noise} if condition is None else {"condition": condition, "noise": noise}
        check_precision("InitialStage", self.linear, **inputs)
        base = activate(self.norm(self.linear(concatenate(*inputs.values()))), self.activation)
        return self.upsample(base.view(-1, self.base_channels, SMALLEST_RESOLUTION, SMALLEST_RESOLUTION))


class RefinementStage(nn.Module):
    """Features of one resolution -> features of the next: `f_i = F_i(f_{i-1}, Att_i(f_{i-1}, w, s_ca))` (Sec. 3.2).

    Features and contexts are concatenated, brought to 2C channels by a 1x1 convolution (omitted where they already have
    2C, as with word attention), refined by residual blocks and upsampled to C channels.

    Args:
        channels: Channels C of the features.
        doublings: How many times the resolution doubles.
        residual_blocks: Number of residual blocks.
        attention: A module that fulfills `StageAttention`; None for a stage without attention.
        out_channels: Channels of the result; None keeps those of the features.
        activation: "glu", or "relu".
        upsampling: "nearest", or "bilinear".

    Raises:
        ValueError: `attention` is not a Module with a `context_dim`.
    """

    def __init__(
        self,
        channels: int,
        doublings: int,
        residual_blocks: int,
        attention: nn.Module | None,
        *,
        out_channels: int | None = None,
        activation: Activation = "glu",
        upsampling: Upsampling = "nearest",
    ) -> None:
        super().__init__()
        context_dim = 0 if attention is None else _context_dim(attention)
        self.attention = attention
        fused, inputs = 2 * channels, channels + context_dim
        self.fusion = nn.Identity() if inputs == fused else nn.Conv2d(inputs, fused, 1, bias=False)
        self.residual = nn.Sequential(*(ResidualBlock(fused, activation) for _ in range(residual_blocks)))
        self.upsample = up_blocks([fused] + [out_channels or channels] * doublings, activation, upsampling)

    def forward(
        self,
        features: Tensor,
        condition: Tensor,
        words: Tensor | None,
        word_mask: Tensor | None = None,
        *,
        need_weights: bool = False,
    ) -> StageResult:
        """Attend, fuse, refine and upsample.

        Args:
            features: Features of the stage before, (B, C, H, W).
            condition: Augmented condition, (B, E).
            words: Word features, (B, L, D); None only without attention.
            word_mask: True for a real word, (B, L); None if all are.
            need_weights: Also return the attention maps.

        Returns:
            Features (B, out_channels, 2**doublings * H, 2**doublings * W), and the attention maps if requested.

        Raises:
            ValueError: The result of the attention module is not as `StageContext` describes it.
        """
        if self.attention is None:
            return StageResult(self.upsample(self.residual(self.fusion(features))), None, None)
        attended = self.attention(features, words, condition, word_mask, need_weights=need_weights)
        fused = self.fusion(_with_contexts(features, self.attention, attended))
        refined = self.upsample(self.residual(fused))
        return StageResult(refined, attended.word_weights, attended.sentence_weights)


class ConditionStage(nn.Module):
    """Features of one resolution -> features of another, with the condition at every position (StackGAN, StackGAN++).

        f_i = up(residual(activation(norm(conv(f_{i-1}, s_ca)))))

    Args:
        channels: Channels C of the features.
        condition_dim: Features E of the condition.
        widths: Channels after each doubling of the resolution.
        residual_blocks: Number of residual blocks, at C channels.
        activation: "glu" (StackGAN++), or "relu" (StackGAN).
        upsampling: "nearest", or "bilinear".
    """

    def __init__(
        self,
        channels: int,
        condition_dim: int,
        widths: Sequence[int],
        residual_blocks: int,
        activation: Activation = "glu",
        upsampling: Upsampling = "nearest",
    ) -> None:
        super().__init__()
        self.activation = activation
        before = channels_before(activation, channels)
        self.joint = SentenceConv2d(channels, condition_dim, out_channels=before)
        self.norm = nn.BatchNorm2d(before)
        self.residual = nn.Sequential(*(ResidualBlock(channels, activation) for _ in range(residual_blocks)))
        self.upsample = up_blocks([channels, *widths], activation, upsampling)

    def forward(
        self,
        features: Tensor,
        condition: Tensor,
        words: Tensor | None = None,
        word_mask: Tensor | None = None,
        *,
        need_weights: bool = False,
    ) -> StageResult:
        """Join, refine and upsample; words and their mask are ignored.

        Args:
            features: Features of the stage before, (B, C, H, W).
            condition: Augmented condition, (B, E).
            words: Ignored, as the arguments after it, which are those of `RefinementStage`.
            word_mask: Ignored.
            need_weights: Ignored: there are no attention maps.

        Returns:
            Features (B, widths[-1], 2**len(widths) * H, 2**len(widths) * W).
        """
        check_precision("ConditionStage", self.joint, features=features, condition=condition)
        joint = activate(self.norm(self.joint(features, condition)), self.activation)
        return StageResult(self.upsample(self.residual(joint)), None, None)


class ImageHead(nn.Module):
    """Features -> image in [-1, 1]: 3x3 convolution and tanh, `I_i = G_i(f_i)` (Sec. 3.2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 3, 3, padding=1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 3, H, W)."""
        return torch.tanh(self.conv(features))


def concatenate(*tensors: Tensor) -> Tensor:
    """Concatenate channels. Autocast's own concatenation refuses any half precision but its own."""
    halves = (torch.float16, torch.bfloat16)
    cast = (tensor.to(autocast_dtype(tensor)) if tensor.dtype in halves else tensor for tensor in tensors)
    return torch.cat(tuple(cast), dim=1)


def _context_dim(attention: object) -> int:
    context_dim = getattr(attention, "context_dim", None)
    if not isinstance(attention, nn.Module) or not isinstance(context_dim, int) or context_dim < 1:
        raise ValueError(
            "RefinementStage: attention must be an nn.Module with a positive int attribute `context_dim`, the number "
            "of channels that its contexts append to the features (see mirror_modules.glam.StageAttention), but it is "
            f"a {type(attention).__name__} with context_dim={context_dim!r}."
        )
    return context_dim


def _with_contexts(features: Tensor, attention: nn.Module, attended: object) -> Tensor:
    """Features and contexts in one tensor; the attention may have written it already."""
    contexts = _contexts(attention, attended, features)
    fused = getattr(attended, "fused_output", None)
    if fused is None:
        return concatenate(features, *contexts)
    expected = features.shape[0], features.shape[1] + _context_dim(attention), *features.shape[2:]
    if not isinstance(fused, Tensor) or fused.shape != expected:
        found = shape_of(fused) if isinstance(fused, Tensor) else f"a {type(fused).__name__}"
        raise ValueError(
            f"RefinementStage: fused_output of {type(attention).__name__} must be {expected} (B, C + context_dim, H, "
            f"W), the features followed by the contexts, but it is {found}."
        )
    return fused


def _contexts(attention: nn.Module, attended: object, features: Tensor) -> tuple[Tensor, ...]:
    """The contexts of an attention module, which may be the user's own, as the stage can concatenate them."""
    name = type(attention).__name__
    missing = [field for field in ("contexts", "word_weights", "sentence_weights") if not hasattr(attended, field)]
    if missing:
        raise ValueError(
            f"RefinementStage: {name} must return an object with `contexts`, `word_weights` and `sentence_weights`, "
            f"such as a GlobalLocalContext, but it returned a {type(attended).__name__} without {', '.join(missing)}."
        )
    contexts = tuple(attended.contexts)  # type: ignore[attr-defined]
    size = features.shape[:1] + features.shape[2:]
    for context in contexts:
        if not isinstance(context, Tensor) or context.ndim != 4 or context.shape[:1] + context.shape[2:] != size:
            found = shape_of(context) if isinstance(context, Tensor) else f"a {type(context).__name__}"
            raise ValueError(
                f"RefinementStage: each context of {name} must be a tensor (B, c, H, W) at the size of the features "
                f"({shape_of(features)}), but one is {found}."
            )
        if context.device != features.device or autocast_dtype(context) != autocast_dtype(features):
            raise ValueError(
                f"RefinementStage: the contexts of {name} must have the dtype and device of the features "
                f"({features.dtype}, {features.device}), but one has {context.dtype}, {context.device}."
            )
    channels = sum(context.shape[1] for context in contexts)
    if channels != attention.context_dim:
        listed = ", ".join(map(shape_of, contexts))
        raise ValueError(
            f"RefinementStage: the contexts of {name} have {channels} channels in all ({listed}) but its context_dim "
            f"is {attention.context_dim}; the two must be equal."
        )
    return contexts
