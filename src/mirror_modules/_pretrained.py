"""Loading one part of a saved model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from typing_extensions import Self

if TYPE_CHECKING:
    import torch


class FromModelFolder:
    """A part of a system such as `MirrorGAN` that can be loaded alone from the folder of a saved model."""

    needed_for: ClassVar[Literal["images", "captions"]] = "images"
    """Whether the part generates images, or captions them."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> Self:
        """Load this part of a model that `save_pretrained` or a training wrote, in evaluation mode.

        Args:
            folder: The folder of the model, such as runs/demo/model.
            device: Device of the weights.

        Raises:
            FileNotFoundError: The folder or one of its files is missing.
            ValueError: A file is damaged.
            TypeError: The model has no part of this class.
        """
        # The only import that climbs, made when it is called: a model is built from the parts.
        from mirror_modules.models import TextToImage

        model = TextToImage.from_pretrained(folder, device=device, only=cls.needed_for)
        for part in model.children():
            if isinstance(part, cls):
                return part
        raise TypeError(f"{cls.__name__}.from_pretrained: the parts of the model in {folder} have other classes.")
