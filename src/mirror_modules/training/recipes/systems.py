"""The recipes of the other systems, at the sizes of MirrorGAN's `demo` and `photos-64` and with as many images seen."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from mirror_modules.data.flowers.drawing import POINT_NAMES
from mirror_modules.models import (
    AttnGANConfig,
    GANIntCLSConfig,
    GAWWNConfig,
    MirrorGANConfig,
    ModelConfig,
    PPGNConfig,
    StackGANConfig,
    StackGANv2Config,
)
from mirror_modules.training.recipes.named import demo, photos_64
from mirror_modules.training.recipes.phases import AdversarialRecipe, KeypointRecipe
from mirror_modules.training.recipes.recipe import Recipe


def gan_int_cls_demo() -> Recipe:
    """GAN-INT-CLS on the drawn flowers of demo; minutes on two CPU cores."""
    return _gan_int_cls(demo())


def gan_int_cls_photos_64() -> Recipe:
    """GAN-INT-CLS on captioned photographs, like photos-64; about an hour on two CPU cores."""
    return _gan_int_cls(photos_64())


def gawwn_demo() -> Recipe:
    """GAWWN on flowers drawn anywhere in the image, placed by boxes; minutes on two CPU cores."""
    return _gawwn("gawwn", demo(), {"place": "box"})


def gawwn_photos_64() -> Recipe:
    """GAWWN on captioned photographs with boxes, like photos-64; about an hour on two CPU cores."""
    return _gawwn("gawwn", photos_64(), {"place": "box"})


def gawwn_points_demo() -> Recipe:
    """GAWWN on flowers drawn anywhere in the image, placed by key points; minutes on two CPU cores."""
    sizes = {"place": "points", "point_names": POINT_NAMES, "keypoint_hidden_dim": 128}
    return _gawwn("gawwn-points", demo(), sizes)


def stackgan_demo() -> Recipe:
    """StackGAN on the drawn flowers of demo, one stage after the other; minutes on two CPU cores."""
    return _stackgan(demo())


def stackgan_photos_64() -> Recipe:
    """StackGAN on captioned photographs, like photos-64, one stage after the other; about an hour on two CPU cores."""
    return _stackgan(photos_64())


def stackgan_v2_demo() -> Recipe:
    """StackGAN++ on the drawn flowers of demo; minutes on two CPU cores."""
    return _stackgan_v2(demo())


def stackgan_v2_photos_64() -> Recipe:
    """StackGAN++ on captioned photographs, like photos-64; about an hour on two CPU cores."""
    return _stackgan_v2(photos_64())


def ppgn_demo() -> Recipe:
    """PPGN on the drawn flowers of demo, an unconditional generator; minutes on two CPU cores."""
    return _ppgn(demo())


def ppgn_photos_64() -> Recipe:
    """PPGN on captioned photographs, like photos-64, an unconditional generator; about an hour on two CPU cores."""
    return _ppgn(photos_64())


def attngan_demo() -> Recipe:
    """AttnGAN on the drawn flowers of demo; minutes on two CPU cores."""
    return _attngan(demo())


def attngan_photos_64() -> Recipe:
    """AttnGAN on captioned photographs, like photos-64; about an hour on two CPU cores."""
    return _attngan(photos_64())


def _gan_int_cls(base: Recipe) -> Recipe:
    # As wide as MirrorGAN's at 4 x 4.
    sizes = {"channels": 2 * base.model.channels, "resolutions": base.model.resolutions[-1:]}
    return _like(base, "gan-int-cls", GANIntCLSConfig, sizes, interpolation_weight=0.5)


def _gawwn(name: str, base: Recipe, place: dict[str, Any]) -> Recipe:
    sizes = {
        "channels": 2 * base.model.channels,
        "resolutions": base.model.resolutions[-1:],
        "text_projection": base.model.condition_dim,
        # With batch norm, images were noise after 800 steps, and flowers not in their boxes (trial at 32 pixels).
        "discriminator_normalization": "spectral",
        **place,
    }
    recipe = _like(base, name, GAWWNConfig, sizes)
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, scatter=recipe.data.is_drawn))


def _stackgan(base: Recipe) -> Recipe:
    coarse, *_, fine = base.model.resolutions
    sizes = {"channels": 2 * base.model.channels, "resolutions": (coarse, fine), "residual_blocks": 1}
    return _like(base, "stackgan", StackGANConfig, sizes)


def _stackgan_v2(base: Recipe) -> Recipe:
    sizes = {"channels": 2 * base.model.channels, "residual_blocks": 1}
    return _like(base, "stackgan-v2", StackGANv2Config, sizes)


def _ppgn(base: Recipe) -> Recipe:
    sizes = {"channels": 2 * base.model.channels, "residual_blocks": 1, "sampling_steps": 30}
    return _like(base, "ppgn", PPGNConfig, sizes, mismatched_pairs=False)


def _attngan(base: Recipe) -> Recipe:
    # As large a share of the gradient at the image as that of redescription in MirrorGAN's recipe.
    ratios = {"matching_ratio": base.glam.redescription_ratio or 0.25, "fine_ratios": base.glam.fine_ratios}
    sizes = {"residual_blocks": 1, "finest_upsampling": cast(MirrorGANConfig, base.model).finest_upsampling}
    return _like(base, "attngan", AttnGANConfig, sizes, **ratios)


def _like(base: Recipe, name: str, config_type: type[ModelConfig], model: dict[str, Any], **glam: Any) -> Recipe:
    """A recipe of MirrorGAN with another system, which is not trained against the captioner.

    Args:
        base: The recipe of MirrorGAN.
        name: Name of the system; the recipe's begins with it.
        config_type: Type of the system's configuration; sizes that all systems have are those of `base`.
        model: Other sizes and options of the system.
        **glam: Fields of phase `glam` that differ.
    """
    shared = {each.name: getattr(base.model, each.name) for each in dataclasses.fields(ModelConfig)}
    changes = {
        "redescription_weight": 0.0,
        "redescription_ratio": None,
        "redescription_reduction": AdversarialRecipe.redescription_reduction,
        "matching_weight": 0.0,
        "matching_ratio": None,
        "fine_ratios": AdversarialRecipe.fine_ratios,
        "adversarial_weighting": None,
        **glam,
    }
    phases: dict[str, Any] = {"glam": dataclasses.replace(base.glam, **changes)}
    config = config_type(**{**shared, **model})
    if len(config.trained_resolutions("glam")) < 2:
        phases["glam"] = dataclasses.replace(phases["glam"], coarse_steps=0)
    if config.completes_points:
        phases["keypoints"] = KeypointRecipe(generator_learning_rate=1e-3, discriminator_learning_rate=1e-3)
    if "first_stage" in config_type.adversarial_phases:
        # Half of the steps each, for as many images seen.
        steps = base.glam.steps // 2
        phases["first_stage"] = dataclasses.replace(phases["glam"], steps=steps)
        phases["glam"] = dataclasses.replace(phases["glam"], steps=base.glam.steps - steps)
    return dataclasses.replace(base, name=f"{name}-{base.name}", model=config, **phases)
