"""Our modules with the weights of published ones, whose sizes are inferred from the weights."""

from __future__ import annotations

from functools import partial
from typing import Literal, TypeVar

from torch import nn

from mirror_modules._checks import shape_of
from mirror_modules.adversarial import PairedDiscriminator
from mirror_modules.glam import CascadedGenerator, GlobalLocalAttention
from mirror_modules.glam.generator import AttentionFactory
from mirror_modules.models.published.conversion import (
    CAPTIONER,
    CONDITIONING,
    DISCRIMINATOR,
    GENERATOR,
    IMAGE_ENCODER,
    TEXT_ENCODER,
    State,
    Table,
    both_states,
    converted_state,
    pattern_of,
    published_names,
    select,
    strip_prefix,
)
from mirror_modules.stem import ConditioningAugmentation, ImageEncoder, TextEncoder, TorchvisionBackbone
from mirror_modules.stream import Captioner

AnyModule = TypeVar("AnyModule", bound=nn.Module)
INCEPTION_SIZE, RESNET_SIZE = 299, 224
"""Height and width of the images that the backbones of the published image encoder and captioner receive."""


def load_published_generator(state: State) -> tuple[ConditioningAugmentation, CascadedGenerator]:
    """Build the conditioning augmentation and the generator of a published state, and load its weights.

    Sizes, number of stages, residual blocks, attention and heads are inferred from the state, which distinguishes
    AttnGAN, AttnDCGAN and MirrorGAN. As with every `load_published_...` function, the result is in evaluation mode.

    Args:
        state: The published state.

    Returns:
        Both modules.

    Raises:
        ValueError: A tensor is unknown, missing or of the wrong shape; the message names it.

    Examples:
        >>> from mirror_modules.models.published import load_published, load_published_generator
        >>> conditioning, generator = load_published_generator(load_published("netG.pth"))  # doctest: +SKIP
        >>> generator.resolutions  # doctest: +SKIP
        (64, 128, 256)
    """
    owner = "load_published_generator"
    state = strip_prefix(state)
    affine, text_dim = _shape(owner, state, "ca_net.fc.weight", 2)
    condition_dim = affine // 4
    one_head = "img_net.img.0.weight" in state
    channels = _shape(owner, state, "img_net.img.0.weight" if one_head else "img_net1.img.0.weight", 4)[1]
    coarsest = 4 * 2 ** _count(state, "h_net1.upsample<1>.")
    generator = CascadedGenerator(
        _shape(owner, state, "h_net1.fc.0.weight", 2)[1] - condition_dim,
        condition_dim,
        text_dim,
        channels=channels,
        resolutions=[coarsest * 2**stage for stage in range(_count(state, "h_net<1>."))],
        residual_blocks=_count(state, "h_net2.residual.<0>."),
        attention=_published_attention(state),
        intermediate_images=not one_head,
    )
    conditioning = ConditioningAugmentation(text_dim, condition_dim)
    return (
        _load(owner, conditioning, select(state, conditioning=True), CONDITIONING),
        _load(owner, generator, select(state, conditioning=False), GENERATOR),
    )


def load_published_discriminator(state: State) -> PairedDiscriminator:
    """Build the discriminator of a published state, and load its weights.

    See `load_published_generator` for arguments and errors.

    Examples:
        >>> from mirror_modules.models.published import load_published, load_published_discriminator
        >>> discriminator = load_published_discriminator(load_published("netD0.pth"))  # doctest: +SKIP
        >>> discriminator.resolution  # doctest: +SKIP
        64
    """
    owner = "load_published_discriminator"
    state = strip_prefix(state)
    width, joint_width, *_ = _shape(owner, state, "COND_DNET.jointConv.0.weight", 4)
    coarsest_map = 64 if _count(state, "img_code_s64.<0>.") else 32 if _count(state, "img_code_s32.<0>.") else 16
    channels = _shape(owner, state, "img_code_s16.0.weight", 4)[0]
    discriminator = PairedDiscriminator(4 * coarsest_map, joint_width - width, channels=channels)
    return _load(owner, discriminator, state, DISCRIMINATOR)


def load_published_text_encoder(state: State) -> TextEncoder:
    """Build the text encoder of a published state, and load its weights.

    See `load_published_generator` for arguments and errors.

    Examples:
        >>> from mirror_modules import TextEncoder
        >>> from mirror_modules.models.published import load_published_text_encoder
        >>> ours = TextEncoder(11, embedding_dim=5, feature_dim=6).state_dict()
        >>> published = {name.replace("embedding.", "encoder.").replace("lstm.", "rnn."): ours[name] for name in ours}
        >>> load_published_text_encoder(published).feature_dim
        6
    """
    owner = "load_published_text_encoder"
    state = strip_prefix(state)
    vocabulary_size, embedding_dim = _shape(owner, state, "encoder.weight", 2)
    feature_dim = 2 * _shape(owner, state, "rnn.weight_hh_l0", 2)[1]
    encoder = TextEncoder(vocabulary_size, embedding_dim=embedding_dim, feature_dim=feature_dim)
    return _load(owner, encoder, state, TEXT_ENCODER)


def load_published_image_encoder(state: State) -> ImageEncoder:
    """Build the image encoder of a published state, and load its weights.

    Its images are in [-1, 1], of any size; Inception receives them resized to 299 pixels, as in the published code. See
    `load_published_generator` for arguments and errors.

    Examples:
        >>> from mirror_modules.models.published import load_published, load_published_image_encoder
        >>> encoder = load_published_image_encoder(load_published("image_encoder200.pth"))  # doctest: +SKIP
        >>> encoder.image_dim  # doctest: +SKIP
        256
    """
    owner = "load_published_image_encoder"
    state = strip_prefix(state)
    feature_dim = _shape(owner, state, "emb_features.weight", 4)[0]
    backbone = TorchvisionBackbone("inception_v3", resize_to=INCEPTION_SIZE, antialias=False)
    encoder = ImageEncoder(backbone, feature_dim)
    return _load(owner, encoder, state, IMAGE_ENCODER)


def load_published_captioner(cnn_state: State, rnn_state: State, *, backbone: str = "resnet152") -> Captioner:
    """Build the captioner of a published pair of states, and load its weights.

    Its images are in [-1, 1], of any size; the ResNet receives them resized to 224 pixels and without ImageNet
    normalization, as in the published code. That code trains without an end token: use
    `describe(images, end_token=None)`.

    Args:
        cnn_state: State of the caption CNN.
        rnn_state: State of the caption RNN.
        backbone: The torchvision ResNet in the caption CNN.

    Returns:
        The captioner, in evaluation mode.

    Raises:
        ValueError: A tensor is unknown, missing or of the wrong shape; the message names it with the prefix "cnn." or
            "rnn.".

    Examples:
        >>> from mirror_modules.models.published import load_published, load_published_captioner
        >>> cnn_state, rnn_state = load_published("cnn.pth"), load_published("rnn.pth")  # doctest: +SKIP
        >>> captioner = load_published_captioner(cnn_state, rnn_state)  # doctest: +SKIP
        >>> captioner.vocabulary_size  # doctest: +SKIP
        5450
    """
    owner = "load_published_captioner"
    state = both_states(cnn_state, rnn_state)
    vocabulary_size, embedding_dim = _shape(owner, state, "rnn.embed.weight", 2)
    captioner = Captioner(
        TorchvisionBackbone(backbone, normalize=False, resize_to=RESNET_SIZE, antialias=False),
        vocabulary_size,
        embedding_dim=embedding_dim,
        hidden_dim=_shape(owner, state, "rnn.lstm.weight_hh_l0", 2)[1],
    )
    return _load(owner, captioner, state, CAPTIONER)


def _published_attention(state: State) -> Literal["word", "none"] | AttentionFactory:
    if "h_net2.att.linear.weight" in state:
        return partial(
            GlobalLocalAttention,
            fused_output=True,
            sentence_bias="h_net2.att.linear.bias" in state,
            score_projection="h_net2.att.conv_sentence_vis.weight" in state,
        )
    return "word" if "h_net2.att.conv_context.weight" in state else "none"


def _count(state: State, prefix: str) -> int:
    """Count the different numbers at the `<k>` of a prefix."""
    pattern = pattern_of(prefix)
    return len({match[1] for name in state if (match := pattern.match(name))})


def _shape(owner: str, state: State, name: str, axes: int) -> tuple[int, ...]:
    """Shape of a tensor from which sizes are inferred."""
    if name not in state:
        raise ValueError(f"{owner}: {name!r} is missing from the published state; does it belong to another part?")
    if state[name].ndim != axes:
        raise ValueError(f"{owner}: {name!r} is {shape_of(state[name])}, expected {axes} axes.")
    return tuple(state[name].shape)


def _load(owner: str, module: AnyModule, state: State, table: Table) -> AnyModule:
    published, converted = published_names(owner, state, table), converted_state(owner, state, table)
    expected = module.state_dict()
    for ours, tensor in converted.items():
        if ours not in expected:
            raise ValueError(f"{owner}: {published[ours]!r} is unexpected in this {type(module).__name__}.")
        if tensor.shape != expected[ours].shape:
            raise ValueError(
                f"{owner}: {published[ours]!r} is {shape_of(state[published[ours]])}, which does not fit our {ours!r} "
                f"{shape_of(expected[ours])}, whose size follows from the other tensors."
            )
    missing = [ours for ours in expected if ours not in converted]
    if missing:
        raise ValueError(f"{owner}: the published state has no tensor for our {missing[0]!r}; is the file complete?")
    module.load_state_dict(converted)
    return module.eval()
