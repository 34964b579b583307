"""Conversion of the public AttnGAN and MirrorGAN checkpoints to our modules.

    conditioning, generator = load_published_generator(load_published("netG.pth"))

Each part has a table of (published prefix, our prefix). `<k>` stands for a number, counted from k on either side: with
`h_net<2>.` and `refinements.<0>.`, the published `h_net3.` is our `refinements.1.`.

The weights expect the token ids of the vocabulary that was published with them, not those of our `Vocabulary`, and
images in [-1, 1]. Backbones receive them as the published code gives them to its own: not normalized, resized to
`INCEPTION_SIZE` or `RESNET_SIZE`, bilinearly and without antialiasing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from mirror_modules._checks import shape_of
from mirror_modules.adversarial import PairedDiscriminator
from mirror_modules.glam import CascadedGenerator, GlobalLocalAttention
from mirror_modules.glam.generator import AttentionFactory
from mirror_modules.stem import ConditioningAugmentation, ImageEncoder, TextEncoder, TorchvisionBackbone
from mirror_modules.stream import Captioner

State = Mapping[str, Tensor]
Table = tuple[tuple[str, str], ...]
AnyModule = TypeVar("AnyModule", bound=nn.Module)

CONDITIONING: Table = (("ca_net.fc.", "linear."),)
ATTENTION: Table = (
    ("conv_context.", "word_projection."),
    ("conv_sentence_vis.", "score_projection."),
    ("linear.", "sentence_projection."),
)
GENERATOR: Table = (
    ("h_net1.fc.0.", "initial.linear."),
    ("h_net1.fc.1.", "initial.norm."),
    ("h_net1.upsample<1>.1.", "initial.upsample.<0>.conv."),
    ("h_net1.upsample<1>.2.", "initial.upsample.<0>.norm."),
    *((f"h_net<2>.att.{published}", f"refinements.<0>.attention.{ours}") for published, ours in ATTENTION),
    ("h_net<2>.conv.", "refinements.<0>.fusion."),
    ("h_net<2>.residual.<0>.block.0.", "refinements.<0>.residual.<0>.conv1."),
    ("h_net<2>.residual.<0>.block.1.", "refinements.<0>.residual.<0>.norm1."),
    ("h_net<2>.residual.<0>.block.3.", "refinements.<0>.residual.<0>.conv2."),
    ("h_net<2>.residual.<0>.block.4.", "refinements.<0>.residual.<0>.norm2."),
    ("h_net<2>.upsample.1.", "refinements.<0>.upsample.0.conv."),
    ("h_net<2>.upsample.2.", "refinements.<0>.upsample.0.norm."),
    ("img_net<1>.img.0.", "heads.<0>.conv."),
    ("img_net.img.0.", "heads.0.conv."),
)
DISCRIMINATOR: Table = (
    ("img_code_s16.<0>.", "trunk.<0>."),
    ("img_code_s32.<0>.", "trunk.<11>."),
    ("img_code_s32_1.<0>.", "trunk.<14>."),
    ("img_code_s64.<0>.", "trunk.<14>."),
    ("img_code_s64_1.<0>.", "trunk.<17>."),
    ("img_code_s64_2.<0>.", "trunk.<20>."),
    ("UNCOND_DNET.outlogits.0.", "realism_head."),
    ("COND_DNET.jointConv.<0>.", "joint.<0>."),
    ("COND_DNET.outlogits.0.", "consistency_head."),
)
TEXT_ENCODER: Table = (("encoder.", "embedding."), ("rnn.", "lstm."))
IMAGE_ENCODER: Table = (
    ("emb_features.", "region_projection."),
    ("emb_cnn_code.", "image_projection."),
    ("Conv2d_", "backbone.network.Conv2d_"),
    ("Mixed_", "backbone.network.Mixed_"),
)
# The captioner was published as two files; the prefixes "cnn." and "rnn." distinguish their tensors.
CAPTIONER: Table = (
    ("cnn.resnet.0.", "image_encoder.network.conv1."),
    ("cnn.resnet.1.", "image_encoder.network.bn1."),
    ("cnn.resnet.<4>.", "image_encoder.network.layer<1>."),
    ("cnn.linear.", "image_projection."),
    ("cnn.bn.", "image_norm."),
    ("rnn.embed.", "embedding."),
    ("rnn.lstm.", "lstm."),
    ("rnn.linear.", "output."),
)
# 1x1 convolutions in the published code, linear layers here.
POINTWISE = ("word_projection.weight", "score_projection.weight", "region_projection.weight")
NUMBER = re.compile(r"<(\d+)>")
INCEPTION_SIZE, RESNET_SIZE = 299, 224
"""Height and width of the images that the backbones of the published image encoder and captioner receive."""
COLOR_CODE = re.compile(r"\x1b\[[0-9;]*m")


def load_published(path: str | Path) -> dict[str, Tensor]:
    """Load a published .pth file, in any format that torch has written, without executing code from it.

    Args:
        path: The file.

    Returns:
        The published state, on the CPU.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged, or holds anything but named tensors.

    Examples:
        >>> from mirror_modules.models.published import load_published
        >>> state = load_published("netG.pth")  # doctest: +SKIP
        >>> state["ca_net.fc.weight"].shape  # doctest: +SKIP
        torch.Size([400, 256])
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a published .pth file.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = _reason(error)
        raise ValueError(f"{path} is damaged, or holds more than tensors ({reason}); download it again.") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, expected a dict of tensors such as a state_dict.")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(
                f"{path} holds a dict, expected a dict of tensors such as a state_dict, but it contains {name!r}: "
                f"{type(tensor).__name__}; if one of its entries is the state, save that one to a file of its own."
            )
    return state


def _reason(error: Exception) -> str:
    """Why `torch.load` failed, without its color codes and its advice to load the file unsafely."""
    message = COLOR_CODE.sub("", str(error))
    refused = re.search(r"GLOBAL (\S+)", message)
    if refused is not None:
        return f"it refers to {refused[1]}"
    return message.strip().partition("\n")[0].partition(". ")[0] or type(error).__name__


def convert_conditioning(state: State) -> dict[str, Tensor]:
    """Convert the conditioning augmentation in a published generator to a state of `ConditioningAugmentation`.

    See `convert_generator` for arguments and errors.

    Examples:
        >>> import torch
        >>> from mirror_modules.models.published import convert_conditioning
        >>> state = {"ca_net.fc.weight": torch.zeros(12, 5), "ca_net.fc.bias": torch.zeros(12)}
        >>> list(convert_conditioning(state))
        ['linear.weight', 'linear.bias']
    """
    return _convert("convert_conditioning", _select(state, conditioning=True), CONDITIONING)


def convert_attention(state: State) -> dict[str, Tensor]:
    """Convert a published attention to a state of `GlobalLocalAttention` with sentence_bias and score_projection.

    See `convert_generator` for arguments and errors.

    Examples:
        >>> import torch
        >>> from mirror_modules.models.published import convert_attention
        >>> converted = convert_attention({"conv_context.weight": torch.zeros(3, 5, 1, 1)})
        >>> {name: tuple(tensor.shape) for name, tensor in converted.items()}
        {'word_projection.weight': (3, 5)}
    """
    return _convert("convert_attention", state, ATTENTION)


def convert_generator(state: State) -> dict[str, Tensor]:
    """Convert a published generator, except its conditioning augmentation, to a state of `CascadedGenerator`.

    As in every `convert_...` function, names may begin with "module.", the prefix of DataParallel, and
    `num_batches_tracked`, which old files lack, becomes 0.

    Args:
        state: The published state, or a part of it.

    Returns:
        The same tensors under our names.

    Raises:
        ValueError: The state holds a tensor that the published part does not have.

    Examples:
        >>> import torch
        >>> from mirror_modules.models.published import convert_generator
        >>> list(convert_generator({"module.h_net3.att.conv_context.weight": torch.zeros(3, 5, 1, 1)}))
        ['refinements.1.attention.word_projection.weight']
    """
    return _convert("convert_generator", _select(state, conditioning=False), GENERATOR)


def convert_discriminator(state: State) -> dict[str, Tensor]:
    """Convert a published discriminator of any stage to a state of `PairedDiscriminator`.

    See `convert_generator` for arguments and errors.

    Examples:
        >>> import torch
        >>> from mirror_modules.models.published import convert_discriminator
        >>> list(convert_discriminator({"UNCOND_DNET.outlogits.0.bias": torch.zeros(1)}))
        ['realism_head.bias']
    """
    return _convert("convert_discriminator", state, DISCRIMINATOR)


def convert_text_encoder(state: State) -> dict[str, Tensor]:
    """Convert a published text encoder to a state of `TextEncoder`.

    See `convert_generator` for arguments and errors.

    Examples:
        >>> import torch
        >>> from mirror_modules.models.published import convert_text_encoder
        >>> list(convert_text_encoder({"encoder.weight": torch.zeros(11, 5)}))
        ['embedding.weight']
    """
    return _convert("convert_text_encoder", state, TEXT_ENCODER)


def convert_image_encoder(state: State) -> dict[str, Tensor]:
    """Convert a published image encoder to a state of `ImageEncoder` with torchvision's Inception v3.

    Use the backbone `TorchvisionBackbone("inception_v3", antialias=False)`, which resizes images as the published code
    does. See `convert_generator` for arguments and errors.

    Examples:
        >>> import torch
        >>> from mirror_modules.models.published import convert_image_encoder
        >>> list(convert_image_encoder({"emb_features.weight": torch.zeros(3, 5, 1, 1)}))
        ['region_projection.weight']
    """
    return _convert("convert_image_encoder", state, IMAGE_ENCODER)


def convert_captioner(cnn_state: State, rnn_state: State) -> dict[str, Tensor]:
    """Convert a published caption CNN and caption RNN to a state of `Captioner` with a torchvision ResNet.

    Use the backbone `TorchvisionBackbone("resnet152", normalize=False, resize_to=224, antialias=False)`, whose input is
    that of the published caption CNN. See `convert_generator` for errors.

    Args:
        cnn_state: State of the caption CNN; {} if not needed.
        rnn_state: State of the caption RNN; {} if not needed.

    Examples:
        >>> import torch
        >>> from mirror_modules.models.published import convert_captioner
        >>> list(convert_captioner({"linear.bias": torch.zeros(3)}, {"embed.weight": torch.zeros(11, 3)}))
        ['image_projection.bias', 'embedding.weight']
    """
    return _convert("convert_captioner", _both(cnn_state, rnn_state), CAPTIONER)


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
    state = _strip_prefix(state)
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
        _load(owner, conditioning, _select(state, conditioning=True), CONDITIONING),
        _load(owner, generator, _select(state, conditioning=False), GENERATOR),
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
    state = _strip_prefix(state)
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
    state = _strip_prefix(state)
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
    state = _strip_prefix(state)
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
    state = _both(cnn_state, rnn_state)
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
            sentence_bias="h_net2.att.linear.bias" in state,
            score_projection="h_net2.att.conv_sentence_vis.weight" in state,
        )
    return "word" if "h_net2.att.conv_context.weight" in state else "none"


def _strip_prefix(state: State) -> dict[str, Tensor]:
    """Remove the prefix that DataParallel adds to each name."""
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _select(state: State, *, conditioning: bool) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in _strip_prefix(state).items() if name.startswith("ca_net.") == conditioning}


def _both(cnn_state: State, rnn_state: State) -> dict[str, Tensor]:
    parts = {"cnn": _strip_prefix(cnn_state), "rnn": _strip_prefix(rnn_state)}
    return {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}


def _count(state: State, prefix: str) -> int:
    """Count the different numbers at the `<k>` of a prefix."""
    pattern = _pattern(prefix)
    return len({match[1] for name in state if (match := pattern.match(name))})


def _shape(owner: str, state: State, name: str, axes: int) -> tuple[int, ...]:
    """Shape of a tensor from which sizes are inferred."""
    if name not in state:
        raise ValueError(f"{owner}: {name!r} is missing from the published state; does it belong to another part?")
    if state[name].ndim != axes:
        raise ValueError(f"{owner}: {name!r} is {shape_of(state[name])}, expected {axes} axes.")
    return tuple(state[name].shape)


def _pattern(prefix: str) -> re.Pattern[str]:
    return re.compile(NUMBER.sub(r"(\\d+)", re.escape(prefix)))


def _rename(published: str, table: Table) -> str | None:
    """Our name of a published tensor; None if no prefix of the table matches."""
    for before, after in table:
        match = _pattern(before).match(published)
        if match is None:
            continue
        offsets = [int(number) - int(first) for number, first in zip(match.groups(), NUMBER.findall(before))]
        if all(offset >= 0 for offset in offsets):
            return _numbered(after, offsets) + published[match.end() :]
    return None


def _numbered(prefix: str, offsets: list[int]) -> str:
    remaining = iter(offsets)
    return NUMBER.sub(lambda first: str(int(first[1]) + next(remaining)), prefix)


def _published_names(owner: str, state: State, table: Table) -> dict[str, str]:
    """Map each of our tensor names to the published one."""
    names: dict[str, str] = {}
    for published in state:
        ours = _rename(published, table)
        if ours is None or ours in names:
            raise ValueError(f"{owner}: {published!r} is unexpected; does the state belong to another part?")
        names[ours] = published
    return names


def _as_linear(weight: Tensor) -> Tensor:
    """Weight of a 1x1 convolution -> weight of a linear layer; any other is kept, for the shape check to name."""
    return weight[:, :, 0, 0] if weight.shape[2:] == (1, 1) else weight


def _convert(owner: str, state: State, table: Table) -> dict[str, Tensor]:
    state = _strip_prefix(state)
    converted = {
        ours: _as_linear(state[published]) if ours.endswith(POINTWISE) else state[published]
        for ours, published in _published_names(owner, state, table).items()
    }
    for ours, tensor in list(converted.items()):
        if ours.endswith("running_var"):
            counter = ours.replace("running_var", "num_batches_tracked")
            converted.setdefault(counter, torch.zeros((), dtype=torch.long, device=tensor.device))
    return converted


def _load(owner: str, module: AnyModule, state: State, table: Table) -> AnyModule:
    published, converted = _published_names(owner, state, table), _convert(owner, state, table)
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
