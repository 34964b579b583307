"""The recipes of the other systems, at the sizes of MirrorGAN's recipe `demo` and with as many images seen."""

from __future__ import annotations

import dataclasses
from typing import Any

from mirror_modules.data.flowers.drawing import POINT_NAMES
from mirror_modules.models import (
    AttnGANConfig,
    GANIntCLSConfig,
    GAWWNConfig,
    ModelConfig,
    PPGNConfig,
    StackGANConfig,
    StackGANv2Config,
)
from mirror_modules.training.recipes.named import demo
from mirror_modules.training.recipes.phases import AdversarialRecipe, KeypointRecipe
from mirror_modules.training.recipes.recipe import Recipe


def gan_int_cls_demo() -> Recipe:
    """GAN-INT-CLS on the drawn flowers of demo; minutes on two CPU cores."""
    base = demo().model
    return _like_demo(
        "gan-int-cls-demo",
        GANIntCLSConfig,
        # As wide as MirrorGAN's at 4 x 4.
        {"channels": 2 * base.channels, "resolutions": base.resolutions[-1:]},
        interpolation_weight=0.5,
    )


def gawwn_demo() -> Recipe:
    """GAWWN on flowers drawn anywhere in the image, placed by boxes; minutes on two CPU cores."""
    return _placed("gawwn-demo", {"place": "box"})


def gawwn_points_demo() -> Recipe:
    """GAWWN on flowers drawn anywhere in the image, placed by key points; minutes on two CPU cores."""
    sizes = {"place": "points", "point_names": POINT_NAMES, "keypoint_hidden_dim": 128}
    return _placed("gawwn-points-demo", sizes)


def _placed(name: str, place: dict[str, Any]) -> Recipe:
    base = demo().model
    sizes = {
        "channels": 2 * base.channels,
        "resolutions": base.resolutions[-1:],
        "text_projection": base.condition_dim,
        # With batch norm, images were noise after 800 steps, and flowers not in their boxes (trial at 32 pixels).
        "discriminator_normalization": "spectral",
        **place,
    }
    recipe = _like_demo(name, GAWWNConfig, sizes)
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, scatter=True))


def stackgan_demo() -> Recipe:
    """StackGAN on the drawn flowers of demo, one stage after the other; minutes on two CPU cores."""
    base = demo()
    coarse, *_, fine = base.model.resolutions
    sizes = {"channels": 2 * base.model.channels, "resolutions": (coarse, fine), "residual_blocks": 1}
    return _like_demo("stackgan-demo", StackGANConfig, sizes)


def stackgan_v2_demo() -> Recipe:
    """StackGAN++ on the drawn flowers of demo; minutes on two CPU cores."""
    return _like_demo(
        "stackgan-v2-demo", StackGANv2Config, {"channels": 2 * demo().model.channels, "residual_blocks": 1}
    )


def ppgn_demo() -> Recipe:
    """PPGN on the drawn flowers of demo, an unconditional generator; minutes on two CPU cores."""
    sizes = {"channels": 2 * demo().model.channels, "residual_blocks": 1, "sampling_steps": 30}
    return _like_demo("ppgn-demo", PPGNConfig, sizes, mismatched_pairs=False)


def attngan_demo() -> Recipe:
    """AttnGAN on the drawn flowers of demo; minutes on two CPU cores."""
    # As large a share of the gradient at the image as that of redescription in demo.
    base = demo()
    sizes = {"residual_blocks": 1, "finest_upsampling": "bilinear"}
    ratios = {"matching_ratio": base.glam.redescription_ratio or 0.25, "fine_ratios": base.glam.fine_ratios}
    return _like_demo("attngan-demo", AttnGANConfig, sizes, **ratios)


def _like_demo(name: str, config_type: type[ModelConfig], model: dict[str, Any], **glam: Any) -> Recipe:
    """The recipe `demo` with another system, which is not trained against the captioner.

    Args:
        name: The recipe's name.
        config_type: Type of the system's configuration; sizes that all systems have are those of `demo`.
        model: Other sizes and options of the system.
        **glam: Fields of phase `glam` that differ.
    """
    base = demo()
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
    return dataclasses.replace(base, name=name, model=config, **phases)
