"""The names of published tensors -> ours.

Each part has a table of (published prefix, our prefix). `<k>` stands for a number, counted from k on either side: with
`h_net<2>.` and `refinements.<0>.`, the published `h_net3.` is our `refinements.1.`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

State = Mapping[str, Tensor]
Table = tuple[tuple[str, str], ...]

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
    return converted_state("convert_conditioning", select(state, conditioning=True), CONDITIONING)


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
    return converted_state("convert_attention", state, ATTENTION)


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
    return converted_state("convert_generator", select(state, conditioning=False), GENERATOR)


def convert_discriminator(state: State) -> dict[str, Tensor]:
    """Convert a published discriminator of any stage to a state of `PairedDiscriminator`.

    See `convert_generator` for arguments and errors.

    Examples:
        >>> import torch
        >>> from mirror_modules.models.published import convert_discriminator
        >>> list(convert_discriminator({"UNCOND_DNET.outlogits.0.bias": torch.zeros(1)}))
        ['realism_head.bias']
    """
    return converted_state("convert_discriminator", state, DISCRIMINATOR)


def convert_text_encoder(state: State) -> dict[str, Tensor]:
    """Convert a published text encoder to a state of `TextEncoder`.

    See `convert_generator` for arguments and errors.

    Examples:
        >>> import torch
        >>> from mirror_modules.models.published import convert_text_encoder
        >>> list(convert_text_encoder({"encoder.weight": torch.zeros(11, 5)}))
        ['embedding.weight']
    """
    return converted_state("convert_text_encoder", state, TEXT_ENCODER)


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
    return converted_state("convert_image_encoder", state, IMAGE_ENCODER)


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
    return converted_state("convert_captioner", both_states(cnn_state, rnn_state), CAPTIONER)


def strip_prefix(state: State) -> dict[str, Tensor]:
    """Remove the prefix that DataParallel adds to each name.

    Raises:
        ValueError: The state is no mapping from names, such as the path of a file.
    """
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise ValueError(
            f"a published state must be a dict of tensors by name, but it is a {type(state).__name__}; "
            "`load_published` reads one from a file."
        )
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def select(state: State, *, conditioning: bool) -> dict[str, Tensor]:
    """The tensors of a published generator that belong to its conditioning augmentation, or those that do not."""
    return {name: tensor for name, tensor in strip_prefix(state).items() if name.startswith("ca_net.") == conditioning}


def both_states(cnn_state: State, rnn_state: State) -> dict[str, Tensor]:
    """One state of the two of a published captioner."""
    parts = {"cnn": strip_prefix(cnn_state), "rnn": strip_prefix(rnn_state)}
    return {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}


def pattern_of(prefix: str) -> re.Pattern[str]:
    """Match a prefix with any number at each `<k>`, which is a group."""
    return re.compile(NUMBER.sub(r"(\\d+)", re.escape(prefix)))


def _rename(published: str, table: Table) -> str | None:
    """Our name of a published tensor; None if no prefix of the table matches."""
    for before, after in table:
        match = pattern_of(before).match(published)
        if match is None:
            continue
        offsets = [int(number) - int(first) for number, first in zip(match.groups(), NUMBER.findall(before))]
        if all(offset >= 0 for offset in offsets):
            return _numbered(after, offsets) + published[match.end() :]
    return None


def _numbered(prefix: str, offsets: list[int]) -> str:
    remaining = iter(offsets)
    return NUMBER.sub(lambda first: str(int(first[1]) + next(remaining)), prefix)


def published_names(owner: str, state: State, table: Table) -> dict[str, str]:
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


def converted_state(owner: str, state: State, table: Table) -> dict[str, Tensor]:
    """The state under our names, with counters of batch norm where the file has none."""
    state = strip_prefix(state)
    converted = {
        ours: _as_linear(state[published]) if ours.endswith(POINTWISE) else state[published]
        for ours, published in published_names(owner, state, table).items()
    }
    for ours, tensor in list(converted.items()):
        if ours.endswith("running_var"):
            counter = ours.replace("running_var", "num_batches_tracked")
            converted.setdefault(counter, torch.zeros((), dtype=torch.long, device=tensor.device))
    return converted
