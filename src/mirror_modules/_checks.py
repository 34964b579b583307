"""Argument checks shared by all parts. Each message names the caller, the value it received, and the fix."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import Parameter


def shape_of(tensor: Tensor) -> str:
    """Format the shape of a tensor, such as (8, 18, 256)."""
    return str(tuple(tensor.shape))


def check_tensors(owner: str, **values: object) -> None:
    """Require tensors rather than arrays or lists of numbers."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{owner}: {name} must be a tensor, but it is a {type(value).__name__}; torch.as_tensor makes one."
            )


def check_features(owner: str, name: str, tensor: Tensor, layout: str, size: int, argument: str) -> None:
    """Require one axis per letter of `layout`, with `size` features on the axis named C or D."""
    check_tensors(owner, **{name: tensor})
    axes = layout.strip("()").replace(" ", "").split(",")
    if tensor.ndim != len(axes):
        raise ValueError(f"{owner}: {name} must be {layout}, but it is {shape_of(tensor)}.")
    axis = next(i for i, letter in enumerate(axes) if letter in ("C", "D"))
    if tensor.shape[axis] != size:
        raise ValueError(
            f"{owner}: {name} has {tensor.shape[axis]} features but the layer was built with {argument}={size} "
            f"({name}: {shape_of(tensor)}, expected {layout})."
        )


def check_batch(owner: str, **tensors: Tensor) -> None:
    """Require that the first axes of all tensors have the same size."""
    first, *others = (tensor.shape[0] for tensor in tensors.values())
    # Comparisons instead of a set: hashing a dynamic size would specialize a compiled graph to it.
    if any(size != first for size in others):
        listed = ", ".join(f"{name}: {shape_of(tensor)}" for name, tensor in tensors.items())
        raise ValueError(f"{owner}: batch sizes disagree ({listed}).")


def check_alike(owner: str, word_mask: Tensor | None, **tensors: Tensor) -> None:
    """Require floating point tensors that have the same precision after the casts of autocast, on the same device."""
    check_tensors(owner, **tensors)
    dtypes = {name: autocast_dtype(tensor) for name, tensor in tensors.items()}
    if len(set(dtypes.values())) > 1 or not all(tensor.is_floating_point() for tensor in tensors.values()):
        listed = ", ".join(f"{name}: {dtype}".replace("torch.", "") for name, dtype in dtypes.items())
        raise ValueError(f"{owner}: the inputs must have one floating point precision ({listed}); convert them to one.")
    devices = {name: tensor.device for name, tensor in tensors.items()}
    if word_mask is not None:
        devices["word_mask"] = word_mask.device
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name}: {device}" for name, device in devices.items())
        raise ValueError(f"{owner}: the inputs must be on one device ({listed}); move them to one.")


def check_precision(owner: str, layer: nn.Module, **tensors: Tensor) -> None:
    """Require floating point tensors in the precision of the weights of a layer, after the casts of autocast."""
    check_tensors(owner, **tensors)
    weight = next(layer.parameters(), None)
    if weight is not None and not (weight.is_floating_point() and is_readable(weight)):
        weight = None  # Quantized and distributed weights are converted later.
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{owner}: {name} must be floating point, but its dtype is {tensor.dtype}.")
        if weight is not None and autocast_dtype(tensor) != autocast_dtype(weight):
            raise ValueError(
                f"{owner}: the dtype of {name} is {tensor.dtype} but that of the weights is {weight.dtype}; convert "
                "one of them, or use torch.autocast."
            )


def check_number(owner: str, **values: object) -> None:
    """Require finite numbers."""
    for name, value in values.items():
        # An integer of any size is finite, but may exceed a float.
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
        if not is_number or (isinstance(value, int) and value.bit_length() > 1023):
            raise ValueError(f"{owner}: {name} must be a finite number, but it is {value!r}.")


def check_word_mask(
    owner: str, tokens_or_words: Tensor, word_mask: Tensor | None, *, may_stall: bool = True
) -> Tensor | None:
    """Return the mask as bool (B, L), True for a real word; None stays None: all words are real.

    Accepts bool, or integers that are 0 or 1, as the attention masks of tokenizers. Requires at least one real word in
    each caption. A mask with padding as the first word of every caption is probably inverted and causes a warning; the
    mask that is returned does not cause another one, in the functions to which the caller passes it.

    Requirements on values are not checked where values cannot be read (see `is_readable`), nor on a GPU with
    `may_stall=False`, because reading them forces a synchronization; see `is_unchecked`.
    """
    expected = tuple(tokens_or_words.shape[:2])
    if len(expected) < 2:
        raise ValueError(f"{owner}: captions must be (B, L) or (B, L, D), but they are {shape_of(tokens_or_words)}.")
    if expected[1] == 0:
        raise ValueError(f"{owner}: captions of length 0 ({shape_of(tokens_or_words)}); each needs at least one word.")
    if word_mask is None:
        return None
    if not isinstance(word_mask, Tensor):
        raise ValueError(f"{owner}: word_mask must be a bool tensor, but it is a {type(word_mask).__name__}.")
    if word_mask.is_floating_point() or word_mask.is_complex():
        raise ValueError(
            f"{owner}: word_mask must be bool, True for a real word, or integers 0 and 1, but it is {word_mask.dtype}; "
            "convert it, such as with attention_mask.bool()."
        )
    if tuple(word_mask.shape) != expected:
        raise ValueError(f"{owner}: word_mask is {shape_of(word_mask)} but the captions are {expected} (B, L).")
    real = word_mask if word_mask.dtype == torch.bool else word_mask != 0
    is_on_cpu = word_mask.device.type == "cpu"
    if not is_readable(word_mask) or word_mask.numel() == 0 or not (is_on_cpu or may_stall):
        return real
    if word_mask.dtype != torch.bool and bool(((word_mask != 0) & (word_mask != 1)).any()):
        raise ValueError(
            f"{owner}: word_mask has integers from {int(word_mask.min())} to {int(word_mask.max())}, but only 0 "
            "(padding) and 1 (a real word) are allowed; pass attention_mask.bool(), not the token ids."
        )
    first_words = real.select(1, 0)
    if bool(first_words.all()):
        return real
    has_words = real.any(dim=1)
    if not bool(has_words.all()):
        row = int((~has_words).nonzero()[0, 0])
        raise ValueError(f"{owner}: caption {row} has no real word in word_mask; each caption needs at least one.")
    if is_on_cpu and not bool(first_words.any()) and not getattr(word_mask, "_is_checked", False):
        warnings.warn(
            f"{owner}: word_mask marks the first word of every caption as padding; if it is True for padding, pass "
            "~word_mask. For captions padded on the left, ignore this warning.",
            stacklevel=2,
        )
        return as_checked(real)
    return real


def check_padding_is_last(owner: str, word_mask: Tensor | None, *, may_stall: bool = False) -> None:
    """Require that no padding precedes a real word in a mask that `check_word_mask` has returned.

    Checked where values can be read (see `is_readable`), and on a GPU with `may_stall` only, because it forces a
    synchronization.
    """
    if word_mask is None or not is_readable(word_mask) or not (word_mask.device.type == "cpu" or may_stall):
        return
    if bool((word_mask[:, 1:] & ~word_mask[:, :-1]).any()):
        raise ValueError(
            f"{owner}: word_mask has padding before a real word; put the real words first, such as with "
            "padding_side='right' of the tokenizer."
        )


def as_checked(word_mask: Tensor) -> Tensor:
    """Return a view of a mask, or of a part of one, that `check_word_mask` has checked already and does not warn of.

    The mark is on the view: the mask of the user stays as it is, and the next call warns again.
    """
    if not is_readable(word_mask):
        return word_mask
    view = word_mask.view_as(word_mask)
    view._is_checked = True  # type: ignore[attr-defined]
    return view


def is_unchecked(word_mask: Tensor) -> bool:
    """Whether `check_word_mask` may have skipped the check for captions without a word, which must not produce NaN."""
    return not is_readable(word_mask) or word_mask.device.type != "cpu"


def is_readable(tensor: Tensor) -> bool:
    """Whether Python may branch on the values of a tensor.

    It may not in a graph that is being compiled or exported, under `torch.func.vmap`, nor for tensors without values of
    their own: on the meta device, fake, or distributed.
    """
    if torch.compiler.is_compiling() or tensor.is_meta or type(tensor) not in (Tensor, Parameter):
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return False
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return True


def zero_padding(words: Tensor, word_mask: Tensor | None) -> Tensor:
    """Replace the features of padding by zeros, (B, L, D): a weight of zero would not remove infinity or NaN."""
    return words if word_mask is None else words.masked_fill(~word_mask.unsqueeze(2), 0.0)


def check_images(owner: str, images: Tensor, smallest: int = 1) -> None:
    """Require floating point images (B, 3, H, W) with at least `smallest` pixels on each side.

    A batch without a negative value is probably not in [-1, 1] and causes a warning, on a CPU only.
    """
    check_tensors(owner, images=images)
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"{owner}: images must be (B, 3, H, W), but they are {shape_of(images)}.")
    if not images.is_floating_point():
        raise ValueError(f"{owner}: images must be floats in [-1, 1], but they are {images.dtype}; use x / 127.5 - 1.")
    if min(images.shape[2:]) < smallest:
        raise ValueError(f"{owner}: images are {shape_of(images)}; each side needs at least {smallest} pixels.")
    if not is_readable(images) or images.device.type != "cpu" or images.numel() == 0:
        return
    low, high = images.detach().aminmax()
    # Blank images are zero everywhere.
    if bool(low >= 0) and bool(high > 0):
        warnings.warn(
            f"{owner}: no value of the images is negative, but images are expected in [-1, 1]; if they are in [0, 1], "
            "pass 2 * images - 1.",
            stacklevel=2,
        )


def check_encoded(owner: str, encoder: nn.Module, encoded: object, **shapes: tuple[int, int]) -> None:
    """Require that an encoder returned tensors in fields of these names, each of a number of axes and of features."""
    for name, (axes, size) in shapes.items():
        value = getattr(encoded, name, None)
        if not isinstance(value, Tensor) or value.ndim != axes or value.shape[-1] != size:
            came = shape_of(value) if isinstance(value, Tensor) else f"an object of the type {type(encoded).__name__}"
            expected = f"({'B, R, ' if axes == 3 else 'B, '}{size})"
            raise ValueError(
                f"{owner}: {type(encoder).__name__} must return its features in a field `{name}`, {expected} as it "
                f"declares, such as `ImageFeatures`, but it returned {came}."
            )


def declared_size(owner: str, encoder: object, name: str) -> int:
    """The number of features that an encoder declares in an attribute."""
    size = getattr(encoder, name, None)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(
            f"{owner}: {type(encoder).__name__} must declare the size of its features as a positive int `{name}`, but "
            f"that is {size!r}; interop.build_backbone makes a backbone of any Module that returns a map or tokens."
        )
    return size


def check_tokens(owner: str, tokens: Tensor, vocabulary_size: int | None) -> None:
    """Require integer tokens (B, L), not negative and below `vocabulary_size`, unless that is None: unknown.

    The range depends on values and is checked on a CPU only: on a GPU it would force a synchronization. There, and
    where values cannot be read (see `is_readable`), an index out of range raises torch's own, less helpful error.
    """
    if not isinstance(tokens, Tensor):
        raise ValueError(
            f"{owner}: tokens must be a tensor of ids (B, L), but they are a {type(tokens).__name__}; encode captions "
            "with Vocabulary.encode."
        )
    if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{owner}: tokens must be int64 (B, L), but they are {tokens.dtype} {shape_of(tokens)}.")
    if not is_readable(tokens) or tokens.device.type != "cpu" or tokens.numel() == 0:
        return
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0:
        raise ValueError(
            f"{owner}: tokens range from {low} to {high}, but no id is negative; replace labels of -100 by any id, and "
            "mark them as padding in word_mask."
        )
    if vocabulary_size is not None and high >= vocabulary_size:
        raise ValueError(
            f"{owner}: tokens range from {low} to {high} but vocabulary_size={vocabulary_size}; "
            "were they encoded with another vocabulary?"
        )


def check_positive(owner: str, **sizes: int) -> None:
    """Require integers of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{owner}: {name} must be a whole number of at least 1, but it is {size!r}.")


def check_sizes(owner: str, **sizes: Sequence[int]) -> None:
    """Require sequences of integers of at least 1."""
    for name, listed in sizes.items():
        if not isinstance(listed, Sequence) or isinstance(listed, str):
            raise ValueError(f"{owner}: {name} must be a sequence of whole numbers, but it is {listed!r}.")
        check_positive(owner, **{f"{name}[{i}]": size for i, size in enumerate(listed)})


def check_generator(owner: str, generator: object) -> None:
    """Require a random generator of torch, or None, rather than a seed."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(
            f"{owner}: generator must be a torch.Generator or None, but it is a {type(generator).__name__}; "
            "torch.Generator().manual_seed(seed) makes one."
        )


def check_choice(owner: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    """Require one of the listed strings."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{owner}: {name} must be one of {listed}, but it is {value!r}.")


def at_least_float32(tensor: Tensor) -> Tensor:
    """Convert half precision to float32 and keep other dtypes: softmaxes and loss sums need the precision."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype to which a matrix product casts this tensor: that of autocast if it is enabled, else its own."""
    device = tensor.device.type
    # As in autocast itself, which does not cast float64.
    if tensor.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return tensor.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype
