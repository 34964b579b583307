"""GAWWN: images from a sentence and the place of their subject (Reed et al., NIPS 2016)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mirror_modules._placing import check_box, check_points, check_visible
from mirror_modules.adversarial import KeypointDiscriminator, KeypointImageDiscriminator, LocatedDiscriminator
from mirror_modules.glam import GeneratedImages, KeypointGenerator, KeypointImageGenerator, LocatedGenerator
from mirror_modules.models.config import ModelConfig, Weighting
from mirror_modules.models.registry import register_system
from mirror_modules.models.text_to_image import TextToImage
from mirror_modules.stem import Condition

# Height and width of the maps in which places are given.
MAP_SIZE = 16
# The parts of CUB, in its order.
CUB_PARTS = (
    *("back", "beak", "belly", "breast", "crown", "forehead", "left eye", "left leg", "left wing", "nape"),
    *("right eye", "right leg", "right wing", "tail", "throat"),
)
# In place of a box that is not known: in the middle, with a tenth of the image at each side.
UNKNOWN_BOX = (0.1, 0.1, 0.8, 0.8)
# Visibility of a key point that is known to be hidden; one of visibility 0 is not known.
HIDDEN = -1.0


@dataclass(frozen=True)
class GAWWNConfig(ModelConfig):
    """Sizes and options of a `GAWWN`; the default sizes are those published for birds.

    Raises:
        ValueError: `resolutions` is not one power of two of at least 32, or an option is unknown.

    Examples:
        >>> from mirror_modules.models import GAWWNConfig
        >>> GAWWNConfig().resolutions, len(GAWWNConfig(place="points").point_names)
        ((128,), 15)
    """

    system = "gawwn"
    attends = False
    takes_location = True

    word_dim: int = 1024
    """Features D of a word and of the sentence."""
    condition_dim: int = 512
    """Features to which the generator projects noise and sentence."""
    channels: int = 128
    """Channels C of the generator; its widest maps have 8C channels with boxes, and 4C with key points."""
    resolutions: tuple[int, ...] = (128,)
    """The size of the images in pixels."""
    discriminator_channels: int = 128
    """Channels after the first convolution of the discriminator."""
    text_projection: int = 128
    """Features to which the discriminator projects the sentence."""
    place: Literal["box", "points"] = "box"
    """How the place of the subject is given: by its bounding box, or by its key points."""
    point_names: tuple[str, ...] = CUB_PARTS
    """Names of the key points, in the order of the data; with place="points" only."""
    keypoint_hidden_dim: int = 512
    """Features of the inner layers of the key-point generator and its discriminator; with place="points" only."""
    text_map: Literal["placed", "cropped"] = "placed"
    """What the discriminator's global path sees of the sentence; "cropped" is the published code's, which does not
    depend on the box. With place="box" only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "point_names", tuple(self.point_names))
        size = self.resolutions[0]
        if len(self.resolutions) != 1 or size < 2 * MAP_SIZE or size & (size - 1):
            raise ValueError(
                f"GAWWNConfig: resolutions must be one power of two of at least {2 * MAP_SIZE}, such as (128,), but "
                f"they are {self.resolutions}."
            )
        if self.place not in ("box", "points"):
            raise ValueError(f"GAWWNConfig: place must be 'box' or 'points', but it is {self.place!r}.")

    @property
    def condition_noise_dim(self) -> int:
        """The condition is not drawn; missing key points are."""
        return self.noise_dim if self.completes_points else 0

    @property
    def completes_points(self) -> bool:
        """With place="points"."""
        return self.place == "points"

    def weighting(self, phase: str) -> Weighting:
        """Consistency alone, with real pairs against the mean of generated and mismatched ones."""
        return "gan-int-cls"

    def without_effect(self) -> list[tuple[str, str]]:
        """Fields that are not read."""
        unread = ("point_names", "keypoint_hidden_dim") if self.place == "box" else ("text_map",)
        return [(name, f"place={self.place!r}") for name in unread]

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON can store them."""
        return {**super().to_dict(), "point_names": list(self.point_names)}


@register_system
class GAWWN(TextToImage):
    """A global path for the whole image and a local one for the subject, whose place is given.

        I = G(noise, sentence, box)    or    G(noise, sentence, points)

    The location is a box, (B, 4), x, y, width and height as shares of the image; or x, y and visibility of each key
    point, (B, K, 3). Without a location, the box is one in the middle, and all key points are missing. A key point has
    the visibility 1 if it is given, -1 if it is hidden, and 0 if it is missing: `KeypointGenerator` then draws
    place and visibility from the sentence and the points that are given (Sec. 4.3).

    Args:
        config: Sizes and options.
        vocabulary: Words that the text encoder and the captioner share.
        pretrained: Load the weights that `config.captioner_backbone` names; False leaves that to `load_state_dict`.

    Raises:
        ValueError: The config holds sizes that do not fit together.

    Examples:
        >>> import torch
        >>> from mirror_modules import Vocabulary
        >>> from mirror_modules.models import GAWWN, GAWWNConfig
        >>> config = GAWWNConfig(word_dim=8, condition_dim=8, channels=4, resolutions=(32,), captioner_backbone="conv")
        >>> model = GAWWN(config, Vocabulary.build(["a small red flower", "a white flower"]))
        >>> box = torch.tensor([[0.5, 0.25, 0.4, 0.4]])  # x, y, width and height
        >>> model.generate("a red flower", seed=0, location=box).shape
        torch.Size([1, 3, 32, 32])
    """

    config_type = GAWWNConfig
    config: GAWWNConfig

    def build(self, config: GAWWNConfig) -> None:
        """Build the generator."""
        doublings = (config.resolutions[0] // (2 * MAP_SIZE)).bit_length() - 1
        sizes: dict[str, Any] = {"channels": config.channels, "hidden_dim": config.condition_dim}
        self.generator: LocatedGenerator | KeypointImageGenerator
        if config.place == "box":
            upsampled = [max(config.channels // 4**i, 1) for i in range(doublings)]
            self.generator = LocatedGenerator(config.noise_dim, config.word_dim, upsampled=upsampled, **sizes)
        else:
            upsampled = [max(2 * config.channels // 2**i, 1) for i in range(doublings)]
            self.generator = KeypointImageGenerator(
                config.noise_dim, config.word_dim, len(config.point_names), upsampled=upsampled, **sizes
            )
            self.keypoint_generator = KeypointGenerator(
                len(config.point_names), config.noise_dim, config.word_dim, hidden_dim=config.keypoint_hidden_dim
            )

    def generator_parts(self) -> dict[str, nn.Module]:
        """The generator of images; phase `keypoints` trains that of key points."""
        return {name: part for name, part in super().generator_parts().items() if name != "keypoint_generator"}

    def conditions(self, sentence: Tensor, noise: Tensor) -> list[Condition | Tensor]:
        """The sentence itself; see `TextToImage.conditions`."""
        return [sentence]

    def images(
        self,
        noise: Tensor,
        samples: Sequence[Tensor],
        words: Tensor,
        word_mask: Tensor | None = None,
        location: Tensor | None = None,
        *,
        need_weights: bool = False,
    ) -> GeneratedImages:
        """Images of one size; see `TextToImage.images`."""
        if location is None:
            location = self.locate(None, None, len(noise)).to(noise)
        return self.generator(noise, samples[0], location)

    def locate(self, boxes: Tensor | None, points: Tensor | None, count: int) -> Tensor:
        """The boxes, with one in the middle where they are unknown; or the key points, of which the data know all.

        See `TextToImage.locate`. Without data, all key points are missing.
        """
        if self.config.place == "points":
            names = self.config.point_names
            if points is None and boxes is not None:
                raise ValueError("GAWWN: place='points' needs key points, but the data have boxes alone.")
            if points is not None and points.shape[1] != len(names):
                raise ValueError(
                    f"GAWWN: the data have {points.shape[1]} key points, but point_names names {len(names)}: "
                    f"{', '.join(names)}."
                )
            if points is None:
                return torch.zeros(count, len(names), 3)
            return torch.cat((points[..., :2], points[..., 2:].where(points[..., 2:] > 0, HIDDEN)), dim=2)
        if boxes is None and points is not None:
            raise ValueError("GAWWN: place='box' needs boxes, but the data have key points alone.")
        if boxes is None:
            return torch.tensor(UNKNOWN_BOX).repeat(count, 1)
        return boxes.where(boxes.isfinite(), boxes.new_tensor(UNKNOWN_BOX))

    def check_location(self, owner: str, location: Tensor | None, count: int) -> None:
        """Also require boxes or key points that can be placed; see `TextToImage.check_location`.

        Their values are checked on a CPU only, where a location is before it is moved to the device of the model.
        """
        super().check_location(owner, location, count)
        if location is None:
            return
        if self.config.place == "box":
            check_box(owner, location.float())
            return
        check_points(owner, "location", location, len(self.config.point_names), MAP_SIZE)
        if location.ndim == 3:
            check_visible(owner, location[..., :2], location[..., 2])

    def complete_location(self, location: Tensor | None, sentence: Tensor, noise: Tensor) -> Tensor | None:
        """The key points, with those that are missing drawn from the sentence; see `TextToImage.complete_location`.

        Points that are drawn are visible or missing still, with a visibility of 1 or 0 like those of the data.
        """
        if self.config.place == "box":
            return location
        if location is None:
            location = self.locate(None, None, len(sentence)).to(sentence)
        if location.ndim == 4:
            # Maps of key points, which show the visible ones and none that is missing.
            return location
        visibility = location[..., 2:]
        drawn = self.keypoint_generator(noise, sentence, location.where(visibility > 0, 0))
        drawn = torch.cat((drawn[..., :2], drawn[..., 2:].round()), dim=2)
        return drawn.where(visibility == 0, location)

    def keypoint_discriminator(self) -> KeypointDiscriminator:
        """A new discriminator for the key-point generator, for phase `keypoints`."""
        config = self.config
        return KeypointDiscriminator(len(config.point_names), config.word_dim, hidden_dim=config.keypoint_hidden_dim)

    def discriminators(self, phase: str = "glam") -> list[nn.Module]:
        """One discriminator without realism, which takes the location; see `TextToImage.discriminators`."""
        config = self.config
        options: dict[str, Any] = {
            "channels": config.discriminator_channels,
            "text_projection": config.text_projection,
            "normalization": config.discriminator_normalization,
        }
        resolution = config.resolutions[0]
        if config.place == "box":
            return [LocatedDiscriminator(resolution, config.word_dim, text_map=config.text_map, **options)]
        return [KeypointImageDiscriminator(resolution, config.word_dim, len(config.point_names), **options)]
