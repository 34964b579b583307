"""Conversion of the public AttnGAN and MirrorGAN checkpoints to our modules.

    conditioning, generator = load_published_generator(load_published("netG.pth"))

The weights expect the token ids of the vocabulary that was published with them, not those of our `Vocabulary`, and
images in [-1, 1]. Backbones receive them as the published code gives them to its own: not normalized, resized to
`INCEPTION_SIZE` or `RESNET_SIZE`, bilinearly and without antialiasing.
"""

from mirror_modules.models.published.conversion import (
    convert_attention,
    convert_captioner,
    convert_conditioning,
    convert_discriminator,
    convert_generator,
    convert_image_encoder,
    convert_text_encoder,
)
from mirror_modules.models.published.files import load_published
from mirror_modules.models.published.loading import (
    INCEPTION_SIZE,
    RESNET_SIZE,
    load_published_captioner,
    load_published_discriminator,
    load_published_generator,
    load_published_image_encoder,
    load_published_text_encoder,
)

__all__ = [
    "INCEPTION_SIZE",
    "RESNET_SIZE",
    "convert_attention",
    "convert_captioner",
    "convert_conditioning",
    "convert_discriminator",
    "convert_generator",
    "convert_image_encoder",
    "convert_text_encoder",
    "load_published",
    "load_published_captioner",
    "load_published_discriminator",
    "load_published_generator",
    "load_published_image_encoder",
    "load_published_text_encoder",
]
