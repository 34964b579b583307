"""Images with their subject inside a given box: the generator of GAWWN (Reed et al., NIPS 2016, Sec. 4.1)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirror_modules._checks import check_batch, check_features, check_positive, check_precision, check_tensors, shape_of
from mirror_modules._norms import MapBatchNorm
from mirror_modules._placing import place_in_box
from mirror_modules._typing import TypedCall
from mirror_modules.glam.deconvolution import DeconvolutionStage, doubling
from mirror_modules.glam.generator import GeneratedImages
from mirror_modules.glam.placing import TextPlacer
from mirror_modules.glam.stages import concatenate

# Height and width of the maps in which the box is drawn: two doublings of a 4 x 4 map.
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
        for i, width in enumerate(upsampled):
            check_positive(owner, **{f"upsampled[{i}]": width})
        self.noise_dim, self.condition_dim = noise_dim, condition_dim
        self.resolutions = (MAP_SIZE * 2 ** (len(upsampled) + 1),)
        self.text = nn.Linear(condition_dim, hidden_dim)
        self.noise_global = nn.Linear(noise_dim, hidden_dim)
        self.noise_local = nn.Linear(noise_dim, hidden_dim)
        self.placer = TextPlacer(MAP_SIZE)
        # Batch norm subtracts any bias of the convolution before it.
        self.placed_text = nn.Sequential(
            *_halving(hidden_dim), *_halving(hidden_dim), *_halving(hidden_dim, stride=1, padding=0)
        )
        widths = (8 * channels, 4 * channels, 2 * channels)
        self.global_path = DeconvolutionStage(2 * hidden_dim, widths, bottlenecks=0)
        self.local_path = DeconvolutionStage(2 * hidden_dim, widths, bottlenecks=2, final_activation=False)
        joint = nn.Conv2d(4 * channels, 2 * channels, 3, padding=1, bias=False)
        layers: list[nn.Module] = [joint, nn.BatchNorm2d(2 * channels), nn.ReLU()]
        for before, after in itertools.pairwise((2 * channels, *upsampled)):
            layers += [doubling(before, after), nn.BatchNorm2d(after), nn.ReLU()]
        self.merge = nn.Sequential(*layers)
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


def _halving(channels: int, stride: int = 2, padding: int = 1) -> tuple[nn.Module, ...]:
    """A 4x4 convolution with norm and ReLU; without padding and at stride 1, from 4 x 4 to one position."""
    convolution = nn.Conv2d(channels, channels, 4, stride=stride, padding=padding, bias=False)
    return convolution, MapBatchNorm(channels), nn.ReLU()
