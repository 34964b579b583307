"""The paired discriminator: one logit for an image alone, one for an image with a sentence (MirrorGAN, Sec. 3.4)."""

from __future__ import annotations

import itertools
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirror_modules._bottleneck import BOTTLENECK, Bottleneck
from mirror_modules._checks import (
    check_batch,
    check_choice,
    check_features,
    check_images,
    check_positive,
    check_precision,
    check_tensors,
    is_readable,
    shape_of,
)
from mirror_modules._norms import FeatureBatchNorm
from mirror_modules._sentence_conv import SentenceConv2d
from mirror_modules._typing import TypedCall

Normalization = Literal["batch", "spectral", "none"]

SMALLEST_RESOLUTION = 4
# Stride-2 convolutions from 64 pixels to 4. Larger images need more; their channels are reduced to the same number.
FULL_WIDTH_HALVINGS = 4


class PairedLogits(NamedTuple):
    """Logits of a paired discriminator for a batch of images."""

    realism: Tensor | None
    """Is the image a photograph? Does not depend on the sentence. (B,); None if not discriminated."""
    consistency: Tensor
    """Does the image match the sentence? (B,)"""
    mismatched: Tensor | None = None
    """Does the image match a mismatched sentence? One per mismatched pair, (B,) or (K,); None if not requested."""


class JointLayers(nn.Sequential):
    """A `SentenceConv2d` and the layers that follow it: features (B, C, H, W), sentence (B, D) -> (B, C, H, W)."""

    def forward(self, features: Tensor, sentence: Tensor) -> Tensor:  # type: ignore[override]
        """(B, C, H, W), (B, D) -> (B, C, H, W)."""
        convolution, *layers = self
        joint = convolution(features, sentence)
        for layer in layers:
            joint = layer(joint)
        return joint


class WholeMapConv2d(nn.Conv2d):
    """A convolution to one channel whose kernel covers the whole map, as a matrix product: (B, C, 4, 4) -> (B,)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 1, SMALLEST_RESOLUTION)

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, 4, 4) -> (B,)."""
        return F.linear(input.flatten(1), self.weight.flatten(1), self.bias).flatten()


class PairedDiscriminator(TypedCall, nn.Module):
    """Discriminate images of one resolution, both alone and paired with a sentence (MirrorGAN, Sec. 3.4).

        h = CNN(image),    realism = a(h),    consistency = b(conv(h, sentence))

    Stride-2 convolutions downsample the image to 4 x 4 and double the channels each time; above 64 pixels, 3x3
    convolutions reduce them to 8 * channels again. Both heads cover the whole 4 x 4 map. The outputs are logits, for
    `discriminator_loss` and `generator_loss`.

    One call returns all logits that a loss needs, including those of mismatched pairs: wrappers that act on calls, such
    as DistributedDataParallel, FSDP and `torch.compile`, do not see `features` and `logits`.

    Without realism it is the discriminator of StackGAN's first stage; with `text_projection=128, joint_kernel=1,
    residual_block=True` as well, that of GAN-INT-CLS.

    Args:
        resolution: Height and width of the images, a power of two of at least 4.
        text_dim: Features D of the sentence.
        channels: Channels after the first convolution.
        normalization: "batch" uses batch norm as published, "spectral" instead divides each convolution by its largest
            singular value, "none" does neither.
        realism: Whether images are also discriminated alone; without it, `PairedLogits.realism` is None.
        text_projection: Features to which a linear layer, the normalization and a leaky ReLU compress the sentence
            before it joins the image; None leaves it as it is.
        joint_kernel: Kernel size of the convolution over image and sentence, odd.
        residual_block: Whether the 4 x 4 map of the image passes a residual block with a bottleneck. As published, the
            last two convolutions before it then have no activation.

    Raises:
        ValueError: `resolution` is not a power of two of at least 4, a size is not a positive integer, `joint_kernel`
            is even, `normalization` is unknown, or the map has too few channels for a bottleneck.

    Examples:
        >>> import torch
        >>> from mirror_modules import PairedDiscriminator
        >>> discriminator = PairedDiscriminator(resolution=16, text_dim=5, channels=2)
        >>> images, sentence = torch.rand(3, 3, 16, 16) * 2 - 1, torch.randn(3, 5)
        >>> logits = discriminator(images, sentence)
        >>> logits.realism.shape, logits.consistency.shape
        (torch.Size([3]), torch.Size([3]))
        >>> discriminator(images, sentence, mismatched_sentence=sentence.roll(1, dims=0)).mismatched.shape
        torch.Size([3])
        >>> features = discriminator.features(images)  # computed once, for any number of sentences
        >>> discriminator.logits(features, sentence.roll(1, dims=0)).consistency.shape
        torch.Size([3])
    """

    def __init__(
        self,
        resolution: int,
        text_dim: int = 256,
        *,
        channels: int = 64,
        normalization: Normalization = "batch",
        realism: bool = True,
        text_projection: int | None = None,
        joint_kernel: int = 3,
        residual_block: bool = False,
    ) -> None:
        super().__init__()
        owner = "PairedDiscriminator"
        check_choice(owner, "normalization", normalization, ("batch", "spectral", "none"))
        check_positive(owner, resolution=resolution, text_dim=text_dim, channels=channels, joint_kernel=joint_kernel)
        if joint_kernel % 2 == 0:
            raise ValueError(f"{owner}: joint_kernel must be odd, so that the map keeps its size, not {joint_kernel}.")
        if resolution < SMALLEST_RESOLUTION or resolution & (resolution - 1):
            raise ValueError(
                f"{owner}: resolution must be a power of two of at least {SMALLEST_RESOLUTION}, but it is {resolution}."
            )
        self.resolution, self.text_dim = resolution, text_dim
        halvings = (resolution // SMALLEST_RESOLUTION).bit_length() - 1
        # Batch norm subtracts the mean, and with it any bias.
        has_norm = normalization == "batch"
        # A 4 x 4 image is not downsampled: its only convolution keeps the size.
        layers: list[nn.Module] = [
            nn.Conv2d(3, channels, 4, stride=2, padding=1, bias=False)
            if halvings
            else nn.Conv2d(3, channels, 3, padding=1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
        ]
        width, deeper = channels, []
        for _ in range(halvings - 1):
            halving = nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=not has_norm)
            deeper.append(with_norm(halving, has_norm))
            width *= 2
        for _ in range(halvings - FULL_WIDTH_HALVINGS):
            deeper.append(with_norm(nn.Conv2d(width, width // 2, 3, padding=1, bias=not has_norm), has_norm))
            width //= 2
        if residual_block:
            if width % BOTTLENECK:
                raise ValueError(
                    f"{owner}: a residual block has a quarter of the channels inside, but the 4 x 4 map has {width} "
                    f"with channels={channels}; use a multiple of {BOTTLENECK}, or residual_block=False."
                )
            deeper[-2:] = [block[:-1] for block in deeper[-2:]]
            deeper.append([Bottleneck(width, negative_slope=0.2, has_norm=has_norm)])
        self.feature_dim = width
        self.trunk = nn.Sequential(*layers, *itertools.chain(*deeper))
        self.realism_head = WholeMapConv2d(width) if realism else None
        self.text_projection = None
        if text_projection is not None:
            check_positive(owner, text_projection=text_projection)
            norms = [FeatureBatchNorm(text_projection)] if has_norm else []
            self.text_projection = nn.Sequential(nn.Linear(text_dim, text_projection), *norms, nn.LeakyReLU(0.2))
            text_dim = text_projection
        joint = SentenceConv2d(width, text_dim, joint_kernel, bias=not has_norm)
        self.joint = JointLayers(*with_norm(joint, has_norm))
        self.consistency_head = WholeMapConv2d(width)
        if normalization == "spectral":
            with_spectral_norm(self)

    def features(self, images: Tensor) -> Tensor:
        """Extract the features of images, which `logits` takes with any number of sentences.

        Args:
            images: In [-1, 1], (B, 3, resolution, resolution).

        Returns:
            Features, (B, F, 4, 4) with F = `feature_dim`.

        Raises:
            ValueError: `images` are not floating point or have another shape.
        """
        check_images("PairedDiscriminator", images)
        if tuple(images.shape[2:]) != (self.resolution, self.resolution):
            raise ValueError(
                f"PairedDiscriminator: images are {shape_of(images)} but it was built with resolution="
                f"{self.resolution}; expected (B, 3, {self.resolution}, {self.resolution})."
            )
        check_precision("PairedDiscriminator", self.consistency_head, images=images)
        return self.trunk(images)

    def logits(self, features: Tensor, sentence: Tensor) -> PairedLogits:
        """Compute the logits from the features of images.

        Args:
            features: Image features from `features`, (B, F, 4, 4).
            sentence: Sentence features, (B, D).

        Returns:
            Logits of realism and consistency, each (B,); no realism if built without it.

        Raises:
            ValueError: `features` are not (B, F, 4, 4), `sentence` does not have D features, or batch sizes disagree.
        """
        check_features("PairedDiscriminator", "features", features, "(B, C, H, W)", self.feature_dim, "feature_dim")
        check_map("PairedDiscriminator", features, SMALLEST_RESOLUTION)
        check_features("PairedDiscriminator", "sentence", sentence, "(B, D)", self.text_dim, "text_dim")
        check_batch("PairedDiscriminator", images=features, sentence=sentence)
        check_precision("PairedDiscriminator", self.consistency_head, features=features, sentence=sentence)
        consistency = self._consistency(features, sentence)
        return PairedLogits(None if self.realism_head is None else self.realism_head(features), consistency)

    def forward(
        self,
        images: Tensor,
        sentence: Tensor,
        *,
        mismatched_sentence: Tensor | None = None,
        mismatched_rows: Tensor | None = None,
    ) -> PairedLogits:
        """Compute both logits of images paired with sentences, and the consistency logits of mismatched pairs.

        Args:
            images: In [-1, 1], (B, 3, resolution, resolution).
            sentence: Sentence features, (B, D).
            mismatched_sentence: Features of other sentences for the same images, (B, D), or (K, D) for the images in
                `mismatched_rows`; None for no mismatched pairs.
            mismatched_rows: Integers from 0 to B - 1, (K,): the images of the mismatched pairs; None for all images, in
                their order.

        Returns:
            Logits of realism and consistency, each (B,), and of the mismatched pairs, (B,) or (K,); no realism if
            built without it.

        Raises:
            ValueError: `images` are not floating point, sizes disagree, or rows are given without sentences.
        """
        features = self.features(images)
        logits = self.logits(features, sentence)
        if mismatched_rows is not None:
            check_rows("PairedDiscriminator", mismatched_sentence, mismatched_rows, features.shape[0])
            features = features[mismatched_rows]
        if mismatched_sentence is None:
            return logits
        check_features(
            "PairedDiscriminator", "mismatched_sentence", mismatched_sentence, "(B, D)", self.text_dim, "text_dim"
        )
        check_batch("PairedDiscriminator", images=features, mismatched_sentence=mismatched_sentence)
        check_precision("PairedDiscriminator", self.consistency_head, mismatched_sentence=mismatched_sentence)
        return logits._replace(mismatched=self._consistency(features, mismatched_sentence))

    def _consistency(self, features: Tensor, sentence: Tensor) -> Tensor:
        if self.text_projection is not None:
            sentence = self.text_projection(sentence)
        return self.consistency_head(self.joint(features, sentence))

    def extra_repr(self) -> str:
        """Sizes for `print`."""
        return f"resolution={self.resolution}, text_dim={self.text_dim}"


def check_map(owner: str, features: Tensor, size: int) -> None:
    """Require features (B, F, size, size)."""
    if tuple(features.shape[2:]) != (size, size):
        raise ValueError(
            f"{owner}: features are {shape_of(features)}, expected (B, F, {size}, {size}) as the method `features` "
            "returns them."
        )


def check_rows(owner: str, sentence: Tensor | None, rows: Tensor, count: int) -> None:
    """Require one mismatched sentence for each of the rows, which are integers from 0 to count - 1.

    The range depends on values and is checked on a CPU only.
    """
    if sentence is None:
        raise ValueError(f"{owner}: mismatched_rows need the sentences of these rows; pass mismatched_sentence (K, D).")
    check_tensors(owner, mismatched_sentence=sentence, mismatched_rows=rows)
    if rows.ndim != 1 or rows.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{owner}: mismatched_rows must be int64 (K,), but they are {rows.dtype} {shape_of(rows)}; "
            "for a mask (B,), use mask.nonzero().flatten()."
        )
    if sentence.ndim != 2:
        raise ValueError(f"{owner}: mismatched_sentence must be (K, D), but it is {shape_of(sentence)}.")
    check_batch(owner, mismatched_rows=rows, mismatched_sentence=sentence)
    if is_readable(rows) and rows.device.type == "cpu" and rows.numel() > 0:
        low, high = (int(bound) for bound in rows.aminmax())
        # A negative row would count from the end.
        if low < 0 or high >= count:
            raise ValueError(
                f"{owner}: mismatched_rows range from {low} to {high}, but the rows of the batch are 0 to {count - 1}."
            )


def with_norm(convolution: nn.Conv2d, has_norm: bool) -> list[nn.Module]:
    """A convolution, a batch norm if asked for, and a leaky ReLU."""
    norm = [nn.BatchNorm2d(convolution.out_channels)] if has_norm else []
    return [convolution, *norm, nn.LeakyReLU(0.2, inplace=True)]


def with_spectral_norm(module: nn.Module) -> None:
    """Divide the weight of each convolution and linear layer of a module by its largest singular value, in place."""
    for layer in [layer for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]:
        nn.utils.parametrizations.spectral_norm(layer)
