"""Pictures from tensors: image files, image grids with captions, attention maps."""

from mirror_modules.pictures.saving import save_images

__all__ = ["save_images"]
