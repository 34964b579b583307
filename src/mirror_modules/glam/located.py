"""Images with their subject in a given place, a box or key points: the generators of GAWWN (Reed et al., NIPS 2016)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirror_modules._bottleneck import Bottleneck
from mirror_modules._checks import (
    check_batch,
    check_features,
    check_positive,
    check_precision,
    check_sizes,
    check_tensors,
    shape_of,
)
from mirror_modules._norms import FeatureBatchNorm, MapBatchNorm
from mirror_modules._placing import check_points, keypoint_gate, maps_of, place_in_box
from mirror_modules._typing import TypedCall
from mirror_modules.glam.deconvolution import DeconvolutionStage, doubling
from mirror_modules.glam.generator import GeneratedImages
from mirror_modules.glam.placing import TextPlacer
from mirror_modules.glam.stages import concatenate

# Height and width of the maps in which places are given: two doublings of a 4 x 4 map.
MAP_SIZE = 16


class LocatedGenerator(TypedCall, nn.Module):
    """Noise, condition and box -> images whose subject is inside the box (GAWWN, Sec. 4.1).

        t = W s,    global = up(z', CNN(place(t, box))),    local = ReLU(place(up(z'', t), box))
        I = tanh(up(conv(global, local)))

    The global path sees where the text is and makes the whole map; the local path makes the subject without knowing
    where it will be, and its map is shrunk into the box (`place_in_box`), outside of which it is zero. Both maps are 16
    x 16.

    Args:
        noise_dim: Features Z of the noise.
        condition_dim: Features E of the condition: the sentence itself in the published code.
        channels: Channels C; both paths have 8C, 4C and 2C channels at 4 x 4, 8 x 8 and 16 x 16.
        hidden_dim: Features to which noise and condition are projected.
        upsampled: Channels after each doubling of the resolution beyond 16 x 16; one more doubling makes the image. Two
            of them are for images of 128 x 128.

    Raises:
        ValueError: A size is not a whole number of at least 1.

    Examples:
        >>> import torch
        >>> from mirror_modules import LocatedGenerator
        >>> generator = LocatedGenerator(noise_dim=5, condition_dim=7, channels=4, hidden_dim=8, upsampled=(4,))
        >>> box = torch.tensor([[0.5, 0.25, 0.5, 0.5], [0.0, 0.0, 0.3, 0.4]])  # x, y, width and height
        >>> generator(torch.randn(2, 5), torch.randn(2, 7), box).images[-1].shape
        torch.Size([2, 3, 64, 64])
    """

    def __init__(
        self,
        noise_dim: int = 100,
        condition_dim: int = 1024,
        *,
        channels: int = 128,
        hidden_dim: int = 512,
        upsampled: Sequence[int] = (128, 32),
    ) -> None:
        super().__init__()
        owner = "LocatedGenerator"
        check_positive(
            owner, noise_dim=noise_dim, condition_dim=condition_dim, channels=channels, hidden_dim=hidden_dim
        )
        check_sizes(owner, upsampled=upsampled)
        self.noise_dim, self.condition_dim = noise_dim, condition_dim
        self.resolutions = (MAP_SIZE * 2 ** (len(upsampled) + 1),)
        self.text = nn.Linear(condition_dim, hidden_dim)
        self.noise_global = nn.Linear(noise_dim, hidden_dim)
        self.noise_local = nn.Linear(noise_dim, hidden_dim)
        self.placer = TextPlacer(MAP_SIZE)
        # Batch norm subtracts any bias of the convolution before it.
        self.placed_text = _map_encoder(hidden_dim, hidden_dim, hidden_dim, hidden_dim)
        widths = (8 * channels, 4 * channels, 2 * channels)
        self.global_path = DeconvolutionStage(2 * hidden_dim, widths, bottlenecks=0)
        self.local_path = DeconvolutionStage(2 * hidden_dim, widths, bottlenecks=2, final_activation=False)
        joint = nn.Conv2d(4 * channels, 2 * channels, 3, padding=1, bias=False)
        fused = (joint, nn.BatchNorm2d(2 * channels), nn.ReLU())
        self.merge = nn.Sequential(*fused, *_doublings(2 * channels, *upsampled))
        self.head = doubling((2 * channels, *upsampled)[-1], 3, bias=True)

    def forward(self, noise: Tensor, condition: Tensor, box: Tensor) -> GeneratedImages:
        """Generate a batch of images.

        Args:
            noise: Standard normal, (B, Z).
            condition: Features of the sentence, (B, E).
            box: Left, top, width and height (x, y, w, h) as shares of the image, (B, 4), or (B, K, 4) for K boxes per
                image, each with the same subject; their maps are averaged.

        Returns:
            Images in [-1, 1], a list of one batch (B, 3, resolution, resolution), and no attention maps.

        Raises:
            ValueError: Sizes disagree, or a box is unsuitable; see `place_in_box`.
        """
        owner = "LocatedGenerator"
        check_features(owner, "noise", noise, "(B, D)", self.noise_dim, "noise_dim")
        check_features(owner, "condition", condition, "(B, D)", self.condition_dim, "condition_dim")
        check_tensors(owner, box=box)
        if box.ndim not in (2, 3) or box.shape[-1] != 4:
            raise ValueError(f"{owner}: box must be (B, 4) or (B, K, 4), but it is {shape_of(box)}.")
        check_batch(owner, noise=noise, condition=condition, box=box)
        check_precision(owner, self.head, noise=noise, condition=condition)
        text = self.text(condition)
        placed_text = self.placed_text(self.placer(text, box)).flatten(1)
        global_map = self.global_path(F.relu(concatenate(self.noise_global(noise), placed_text)))
        local_map = place_in_box(self.local_path(F.relu(concatenate(self.noise_local(noise), text))), box)
        local_map = F.relu(local_map.mean(dim=1) if box.ndim == 3 else local_map)
        images = torch.tanh(self.head(self.merge(concatenate(global_map, local_map))))
        return GeneratedImages([images], [], [])


class KeypointImageGenerator(TypedCall, nn.Module):
    """Noise, condition and key points -> images whose subject has its parts there (GAWWN, Sec. 4.2).

        h = ReLU(W z, V s),    gate = min(sum_k maps[k], 1)
        global = up(A h, CNN(maps)),    local = CNN(gate * B h)
        I = tanh(up(residual(conv(global, local, maps))))

    The global path sees the key points and makes the whole map; the local path is zero except at key points
    (`keypoint_gate`). Both maps are 16 x 16. `maps` are those of `keypoint_maps`.

    Args:
        noise_dim: Features Z of the noise.
        condition_dim: Features E of the condition: the sentence itself in the published code.
        point_count: Key points K.
        channels: Channels C; the global path has 4C, 2C and C channels at 4 x 4, 8 x 8 and 16 x 16, the local one 4C.
        hidden_dim: Features to which noise and condition are projected.
        upsampled: Channels after each doubling of the resolution beyond 16 x 16; one more doubling makes the image. Two
            of them are for images of 128 x 128.

    Raises:
        ValueError: A size is not a whole number of at least 1.

    Examples:
        >>> import torch
        >>> from mirror_modules import KeypointImageGenerator
        >>> generator = KeypointImageGenerator(5, 7, point_count=2, channels=2, hidden_dim=8, upsampled=(4,))
        >>> points = torch.tensor([[0.5, 0.25, 1.0], [0.0, 0.0, 0.0]])  # x, y and visibility
        >>> generator(torch.randn(3, 5), torch.randn(3, 7), points.expand(3, 2, 3)).images[-1].shape
        torch.Size([3, 3, 64, 64])
    """

    def __init__(
        self,
        noise_dim: int = 100,
        condition_dim: int = 1024,
        point_count: int = 15,
        *,
        channels: int = 128,
        hidden_dim: int = 512,
        upsampled: Sequence[int] = (256, 128),
    ) -> None:
        super().__init__()
        owner = "KeypointImageGenerator"
        check_positive(
            owner,
            noise_dim=noise_dim,
            condition_dim=condition_dim,
            point_count=point_count,
            channels=channels,
            hidden_dim=hidden_dim,
        )
        check_sizes(owner, upsampled=upsampled)
        self.noise_dim, self.condition_dim, self.point_count = noise_dim, condition_dim, point_count
        self.resolutions = (MAP_SIZE * 2 ** (len(upsampled) + 1),)
        wide = 4 * channels
        self.text = nn.Linear(condition_dim, hidden_dim)
        self.noise = nn.Linear(noise_dim, hidden_dim)
        self.to_global, self.to_local = (
            nn.Sequential(nn.Linear(2 * hidden_dim, hidden_dim, bias=False), FeatureBatchNorm(hidden_dim), nn.ReLU())
            for _ in range(2)
        )
        self.placed_points = _map_encoder(point_count, channels, 2 * channels, hidden_dim)
        self.global_path = DeconvolutionStage(2 * hidden_dim, (wide, 2 * channels, channels), bottlenecks=0)
        self.local_path = nn.Sequential(*_convolution(hidden_dim, wide), nn.ReLU())
        fused = (*_convolution(channels + wide + point_count, wide), nn.ReLU())
        refined = (*_convolution(wide, wide), Bottleneck(wide))
        self.merge = nn.Sequential(*fused, *refined, *_doublings(wide, *upsampled))
        self.head = doubling((wide, *upsampled)[-1], 3, bias=True)

    def forward(self, noise: Tensor, condition: Tensor, points: Tensor) -> GeneratedImages:
        """Generate a batch of images.

        Args:
            noise: Standard normal, (B, Z).
            condition: Features of the sentence, (B, E).
            points: x, y and visibility of each key point, (B, K, 3), x and y as shares of the image; or a map for each,
                (B, K, 16, 16), such as those of `KeypointMaps`.

        Returns:
            Images in [-1, 1], a list of one batch (B, 3, resolution, resolution), and no attention maps.

        Raises:
            ValueError: Sizes disagree.
        """
        owner = "KeypointImageGenerator"
        check_features(owner, "noise", noise, "(B, D)", self.noise_dim, "noise_dim")
        check_features(owner, "condition", condition, "(B, D)", self.condition_dim, "condition_dim")
        check_points(owner, "points", points, self.point_count, MAP_SIZE)
        check_batch(owner, noise=noise, condition=condition, points=points)
        check_precision(owner, self.head, noise=noise, condition=condition, points=points)
        maps = maps_of(points, MAP_SIZE)
        hidden = F.relu(concatenate(self.noise(noise), self.text(condition)))
        placed_points = self.placed_points(maps).flatten(1)
        global_map = self.global_path(concatenate(self.to_global(hidden), placed_points))
        local_map = self.local_path(keypoint_gate(self.to_local(hidden), maps))
        images = torch.tanh(self.head(self.merge(concatenate(global_map, local_map, maps))))
        return GeneratedImages([images], [], [])


def _map_encoder(in_channels: int, *widths: int) -> nn.Sequential:
    """A 16 x 16 map -> a single position, by a 4x4 convolution with norm and ReLU for each of three widths."""
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(itertools.pairwise((in_channels, *widths))):
        # The first two halve the map; the last spans what is left, 4 x 4.
        stride, padding = (2, 1) if i < 2 else (1, 0)
        convolution = nn.Conv2d(before, after, 4, stride=stride, padding=padding, bias=False)
        layers += [convolution, MapBatchNorm(after), nn.ReLU()]
    return nn.Sequential(*layers)


def _doublings(*widths: int) -> list[nn.Module]:
    """The doublings of the resolution from the first width to the last, each with norm and ReLU."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [doubling(before, after), nn.BatchNorm2d(after), nn.ReLU()]
    return layers


def _convolution(in_channels: int, out_channels: int) -> tuple[nn.Module, ...]:
    """A 3x3 convolution with norm."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels)
