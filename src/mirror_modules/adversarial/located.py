"""Discriminators of images whose subject is in a given place: in a box, or at key points (GAWWN, Sec. 4).

Shape suffixes: B batch, K boxes or key points, C channels, M height and width of the map.
"""

from __future__ import annotations

import itertools
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirror_modules._checks import (
    check_batch,
    check_choice,
    check_features,
    check_images,
    check_positive,
    check_precision,
    check_tensors,
    shape_of,
)
from mirror_modules._norms import FeatureBatchNorm, MapBatchNorm
from mirror_modules._placing import check_box, check_points, crop_box, keypoint_gate, maps_of, place_in_box
from mirror_modules._sentence_conv import SentenceConv2d
from mirror_modules._typing import TypedCall
from mirror_modules.adversarial.discriminator import (
    JointLayers,
    Normalization,
    PairedLogits,
    check_map,
    check_rows,
    with_norm,
    with_spectral_norm,
)

TextMap = Literal["placed", "cropped"]

# Height and width of the maps in which boxes and key points are given.
MAP_SIZE = 16


class _PlaceDiscriminator(TypedCall, nn.Module):
    """The layers that both discriminators have: the map of the image, its part of both paths, and the head."""

    def __init__(
        self,
        resolution: int,
        text_dim: int,
        channels: int,
        text_projection: int,
        normalization: Normalization,
        map_channels: int,
    ) -> None:
        """`map_channels` are added to the local path, by maps of key points."""
        super().__init__()
        owner = type(self).__name__
        check_choice(owner, "normalization", normalization, ("batch", "spectral", "none"))
        check_positive(
            owner, resolution=resolution, text_dim=text_dim, channels=channels, text_projection=text_projection
        )
        if resolution < 2 * MAP_SIZE or resolution & (resolution - 1):
            raise ValueError(
                f"{owner}: resolution must be a power of two of at least {2 * MAP_SIZE}, but it is {resolution}."
            )
        self.resolution, self.text_dim, self.feature_dim = resolution, text_dim, 2 * channels
        has_norm = normalization == "batch"
        halvings = (resolution // MAP_SIZE).bit_length() - 1
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(itertools.pairwise([3, *[channels] * (halvings - 1), 2 * channels])):
            # As published, of the halvings only the last has a norm, which subtracts any bias before it.
            layers += _convolution(before, after, 4, 2, 1, has_norm=has_norm and i == halvings - 1)
        layers += _convolution(2 * channels, 2 * channels, 3, 1, 1, has_norm=has_norm)
        self.trunk = nn.Sequential(*layers)
        self.text_projection = nn.Sequential(nn.Linear(text_dim, text_projection), nn.LeakyReLU(0.2))
        joint = SentenceConv2d(2 * channels, text_projection, bias=not has_norm)
        self.local_joint = JointLayers(*with_norm(joint, has_norm))
        self.local_path = nn.Sequential(
            *_convolution(2 * channels + map_channels, 2 * channels, 1, 1, 0, has_norm=has_norm),
            nn.Conv2d(2 * channels, channels, 1),
        )
        self.global_path = nn.Sequential(
            *_convolution(2 * channels, 4 * channels, 4, 2, 1, has_norm=has_norm),
            *_convolution(4 * channels, 8 * channels, 4, 2, 1, has_norm=has_norm),
        )
        whole_map = nn.Conv2d(4 * channels, channels, MAP_SIZE // 4, bias=not has_norm)
        # A batch of one has a single position per channel.
        norms = [MapBatchNorm(channels)] if has_norm else []
        self.global_head = nn.Sequential(whole_map, *norms, nn.LeakyReLU(0.2))
        feature_norms = [FeatureBatchNorm(channels)] if has_norm else []
        self.consistency_head = nn.Sequential(
            nn.Linear(2 * channels, channels, bias=not has_norm),
            *feature_norms,
            nn.LeakyReLU(0.2),
            nn.Linear(channels, 1),
        )

    def features(self, images: Tensor) -> Tensor:
        """Extract the map of images, which `logits` takes with any number of sentences and places.

        Args:
            images: In [-1, 1], (B, 3, resolution, resolution).

        Returns:
            Features, (B, F, 16, 16) with F = `feature_dim`.

        Raises:
            ValueError: `images` are not floating point or have another shape.
        """
        owner = type(self).__name__
        check_images(owner, images)
        if tuple(images.shape[2:]) != (self.resolution, self.resolution):
            raise ValueError(
                f"{owner}: images are {shape_of(images)} but it was built with resolution={self.resolution}; "
                f"expected (B, 3, {self.resolution}, {self.resolution})."
            )
        check_precision(owner, self.consistency_head, images=images)
        return self.trunk(images)

    def logits(self, features: Tensor, sentence: Tensor, location: Tensor) -> PairedLogits:
        """Compute the logits from the features of images.

        Args:
            features: Image features from `features`, (B, F, 16, 16).
            sentence: Sentence features, (B, D).
            location: Where the subject is, as for a call.

        Returns:
            Logits of consistency, (B,), and no realism.

        Raises:
            ValueError: Sizes disagree, or the location is unsuitable.
        """
        owner = type(self).__name__
        check_features(owner, "features", features, "(B, C, H, W)", self.feature_dim, "feature_dim")
        check_map(owner, features, MAP_SIZE)
        check_features(owner, "sentence", sentence, "(B, D)", self.text_dim, "text_dim")
        self._check_location(owner, location)
        check_batch(owner, images=features, sentence=sentence, location=location)
        check_precision(owner, self.consistency_head, features=features, sentence=sentence)
        return PairedLogits(None, self._consistency(features, sentence, location))

    def forward(
        self,
        images: Tensor,
        sentence: Tensor,
        location: Tensor,
        *,
        mismatched_sentence: Tensor | None = None,
        mismatched_rows: Tensor | None = None,
    ) -> PairedLogits:
        """Compute the logits of images with sentences and places, and of mismatched pairs at the same places.

        Args:
            images: In [-1, 1], (B, 3, resolution, resolution).
            sentence: Sentence features, (B, D).
            location: Where the subject of each image is; see the class.
            mismatched_sentence: Features of other sentences for the same images, (B, D), or (K, D) for the images in
                `mismatched_rows`; None for no mismatched pairs.
            mismatched_rows: Integers from 0 to B - 1, (K,): the images of the mismatched pairs; None for all images.

        Returns:
            Logits of consistency, (B,), and of the mismatched pairs, (B,) or (K,); no realism.

        Raises:
            ValueError: `images` are not floating point, sizes disagree, the location is unsuitable, or rows are given
                without sentences.
        """
        features = self.features(images)
        logits = self.logits(features, sentence, location)
        if mismatched_rows is not None:
            check_rows(type(self).__name__, mismatched_sentence, mismatched_rows, features.shape[0])
            features, location = features[mismatched_rows], location[mismatched_rows]
        if mismatched_sentence is None:
            return logits
        return logits._replace(mismatched=self.logits(features, mismatched_sentence, location).consistency)

    def _check_location(self, owner: str, location: Tensor) -> None:
        raise NotImplementedError

    def _consistency(self, features: Tensor, sentence: Tensor, location: Tensor) -> Tensor:
        raise NotImplementedError

    def _head(self, local: Tensor, whole: Tensor) -> Tensor:
        """Features of the place (B, C) and of the image (B, C, 1, 1) -> logits (B,)."""
        return self.consistency_head(torch.cat((local, whole.flatten(1)), dim=1)).flatten()

    def extra_repr(self) -> str:
        """Sizes for `print`."""
        return f"resolution={self.resolution}, text_dim={self.text_dim}"


class LocatedDiscriminator(_PlaceDiscriminator):
    """Discriminate images paired with a sentence and the box of their subject (GAWWN, Sec. 4.1).

        h = CNN(image),    e = a(W s)
        local = mean(CNN(crop(conv(h, e), box))),    global = CNN(CNN(h), CNN(place(e, box)))
        consistency = MLP(local, global)

    The local path sees what is inside the box, the global one the whole image and where the box is. Images that are
    real, but have the sentence of another image, and generated ones should get negative logits:
    `discriminator_loss(weighting="gan-int-cls")`.

    Args:
        resolution: Height and width of the images, a power of two of at least 32.
        text_dim: Features D of the sentence.
        channels: Channels after the first convolution.
        text_projection: Features to which a linear layer and a leaky ReLU compress the sentence.
        normalization: "batch" uses batch norm as published, "spectral" instead divides each convolution by its largest
            singular value, "none" does neither.
        text_map: What the global path sees of the sentence: "placed", the sentence in the box, as in the paper's
            figure; "cropped" as the published code computes it, with the matrix that crops in place of its inverse. For
            boxes inside the image, the latter is the same map for every box.

    Raises:
        ValueError: `resolution` is not a power of two of at least 32, a size is not a positive integer, or an option is
            unknown.

    Examples:
        >>> import torch
        >>> from mirror_modules import LocatedDiscriminator
        >>> discriminator = LocatedDiscriminator(resolution=32, text_dim=5, channels=2, text_projection=4)
        >>> images, sentence = torch.rand(3, 3, 32, 32) * 2 - 1, torch.randn(3, 5)
        >>> box = torch.tensor([0.25, 0.0, 0.5, 1.0]).expand(3, 4)  # x, y, width and height
        >>> logits = discriminator(images, sentence, box, mismatched_sentence=sentence.roll(1, dims=0))
        >>> logits.realism, logits.consistency.shape, logits.mismatched.shape
        (None, torch.Size([3]), torch.Size([3]))
    """

    def __init__(
        self,
        resolution: int = 128,
        text_dim: int = 1024,
        *,
        channels: int = 128,
        text_projection: int = 128,
        normalization: Normalization = "batch",
        text_map: TextMap = "placed",
    ) -> None:
        super().__init__(resolution, text_dim, channels, text_projection, normalization, map_channels=0)
        check_choice("LocatedDiscriminator", "text_map", text_map, ("placed", "cropped"))
        self.text_map = text_map
        has_norm = normalization == "batch"
        layers: list[nn.Module] = []
        for before, after in ((text_projection, 4 * channels), (4 * channels, channels)):
            norms = [nn.BatchNorm2d(after)] if has_norm else []
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1, bias=not has_norm), *norms, nn.ReLU()]
        self.text_path = nn.Sequential(*layers)
        self.global_joint = nn.Sequential(*_convolution(9 * channels, 4 * channels, 1, 1, 0, has_norm=has_norm))
        if normalization == "spectral":
            with_spectral_norm(self)

    def _check_location(self, owner: str, location: Tensor) -> None:
        check_tensors(owner, location=location)
        check_box(owner, location)

    def _consistency(self, features: Tensor, sentence: Tensor, location: Tensor) -> Tensor:
        boxes_BK4 = location if location.ndim == 3 else location.unsqueeze(1)
        text = self.text_projection(sentence)
        cropped_BKCMM = crop_box(self.local_joint(features, text), boxes_BK4)
        local = self.local_path(cropped_BKCMM.flatten(0, 1)).mean(dim=(2, 3))
        local = F.leaky_relu(local, 0.2).unflatten(0, boxes_BK4.shape[:2]).mean(dim=1)
        size = (MAP_SIZE, MAP_SIZE)
        if self.text_map == "placed":
            text_map = place_in_box(text, boxes_BK4, size)
        else:
            text_map = crop_box(text[..., None, None].expand(-1, -1, *size), boxes_BK4)
        text_map = self.text_path(text_map.mean(dim=1))
        joint = torch.cat((self.global_path(features), text_map), dim=1)
        return self._head(local, self.global_head(self.global_joint(joint)))


class KeypointImageDiscriminator(_PlaceDiscriminator):
    """Discriminate images paired with a sentence and the key points of their subject (GAWWN, Sec. 4.2).

        h = CNN(image),    e = a(W s),    gate = min(sum_k maps[k], 1)
        local = mean(CNN(gate * conv(h, e), maps)),    global = CNN(CNN(h), e)
        consistency = MLP(local, global)

    The local path sees what is at the key points, the global one the whole image. `maps` are those of `keypoint_maps`.
    The location is x, y and visibility of each key point, (B, K, 3), or its map, (B, K, 16, 16).

    Args:
        resolution: Height and width of the images, a power of two of at least 32.
        text_dim: Features D of the sentence.
        point_count: Key points K.
        channels: Channels after the first convolution.
        text_projection: Features to which a linear layer and a leaky ReLU compress the sentence.
        normalization: As of `LocatedDiscriminator`.

    Raises:
        ValueError: `resolution` is not a power of two of at least 32, a size is not a positive integer, or
            `normalization` is unknown.

    Examples:
        >>> import torch
        >>> from mirror_modules import KeypointImageDiscriminator
        >>> discriminator = KeypointImageDiscriminator(32, text_dim=5, point_count=7, channels=2, text_projection=4)
        >>> images, sentence = torch.rand(3, 3, 32, 32) * 2 - 1, torch.randn(3, 5)
        >>> points = torch.cat((torch.rand(3, 7, 2), torch.ones(3, 7, 1)), dim=2)  # x, y and visibility
        >>> discriminator(images, sentence, points).consistency.shape
        torch.Size([3])
    """

    def __init__(
        self,
        resolution: int = 128,
        text_dim: int = 1024,
        point_count: int = 15,
        *,
        channels: int = 128,
        text_projection: int = 128,
        normalization: Normalization = "batch",
    ) -> None:
        check_positive("KeypointImageDiscriminator", point_count=point_count)
        super().__init__(resolution, text_dim, channels, text_projection, normalization, map_channels=point_count)
        self.point_count = point_count
        has_norm = normalization == "batch"
        joint = SentenceConv2d(8 * channels, text_projection, 1, out_channels=4 * channels, bias=not has_norm)
        self.global_joint = JointLayers(*with_norm(joint, has_norm))
        if normalization == "spectral":
            with_spectral_norm(self)

    def _check_location(self, owner: str, location: Tensor) -> None:
        check_points(owner, "location", location, self.point_count, MAP_SIZE)

    def _consistency(self, features: Tensor, sentence: Tensor, location: Tensor) -> Tensor:
        text, maps = self.text_projection(sentence), maps_of(location, MAP_SIZE)
        gated = keypoint_gate(self.local_joint(features, text), maps)
        local = self.local_path(torch.cat((gated, maps.to(gated.dtype)), dim=1)).mean(dim=(2, 3))
        whole = self.global_head(self.global_joint(self.global_path(features), text))
        return self._head(F.leaky_relu(local, 0.2), whole)


def _convolution(
    in_channels: int, out_channels: int, kernel: int, stride: int, padding: int, *, has_norm: bool
) -> list[nn.Module]:
    """A convolution, a batch norm if asked for, which subtracts any bias, and a leaky ReLU."""
    return with_norm(nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=not has_norm), has_norm)
