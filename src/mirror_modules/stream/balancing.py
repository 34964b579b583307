"""Balanced gradients: losses whose gradients at each image have given ratios of norms."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mirror_modules._checks import at_least_float32, check_number, check_tensors, is_readable, shape_of


def balance_gradients(
    images: Tensor, ratios: float | Sequence[float], *, reference: float | Tensor | None = None
) -> tuple[Tensor, ...]:
    """Rescale the gradients of several losses at each image to given ratios of the norm of the first one's.

        g_i = r_0 a_i + sum_k r_k n_i b_ki / |b_ki|,    n_i = |a_i|

    Returns the images once per ratio, one copy for each loss. a_i is the gradient that reaches image i through the
    first copy, b_ki the one through copy k, and g_i is the gradient that the generator receives: a weight on any loss
    but the first has no effect. A single number r stands for the ratios (1, r). With fixed weights, a few images
    receive redescription gradients tens of times larger than the others and dominate the update.

        for_discriminator, for_captioner = balance_gradients(images, 0.25)
        loss = adversarial_loss(for_discriminator) + redescription(for_captioner, tokens)

    Where the first loss does not depend on the images, such as a diffusion loss on predicted noise, n_i is zero, and so
    is the gradient of every other loss. Pass the norm n_i as `reference` there, such as a moving average of the norm of
    another gradient at the images:

        _, for_captioner = balance_gradients(images, 0.25, reference=1e-3)
        loss = diffusion_loss(noise) + redescription(for_captioner, tokens)

    If none of the losses is the reference, as with two rewards, disable the first one with the ratio 0 and pass a
    constant norm as `reference`. With 1 / B, the gradient has the scale of that of a mean over the batch:

        _, for_captioner, for_reward = balance_gradients(images, (0, 1, 0.5), reference=1 / len(images))
        loss = redescription(for_captioner, tokens) - reward(for_reward).mean()

    A weight on the loss of an image has no effect either, unless it is zero: to remove a loss at some images, multiply
    their losses by 0, and those of the others by 1.

        loss = adversarial_loss(for_discriminator) + (is_kept * losses_of_captions(for_captioner)).sum()

    Args:
        images: Generated images, or any other tensor of floats with a gradient per row, such as latents, (B, ...).
        ratios: Weight r_0 of the first loss, then the gradient norm r_k of each further loss as a fraction of n_i; 0
            disables a loss. A number r is short for (1, r).
        reference: The norms n_i instead of |a_i|: a number or scalar tensor for all images, or (B,). It has the scale
            of the gradients: a mean over the batch divides them by B, and a `GradScaler` multiplies them.

    Returns:
        As many tensors as there are ratios, at least two for a number; each equals `images`. First derivatives only:
        a second one raises an error.

    Raises:
        ValueError: A ratio or `reference` is negative or not a number, there are no ratios, or the shape or type of
            `images` or `reference` is not as above. The values of a tensor are checked on a CPU only.

    Examples:
        >>> import torch
        >>> from mirror_modules.functional import balance_gradients
        >>> images = torch.zeros(2, 4, requires_grad=True)
        >>> for_discriminator, for_captioner = balance_gradients(images, 0.25)
        >>> (for_discriminator.sum() + 1000 * for_captioner[:, 0].sum()).backward()
        >>> images.grad[0].tolist()  # (1, 1, 1, 1), of norm 2, plus 0.25 * 2 in the direction of (1, 0, 0, 0)
        [1.5, 1.0, 1.0, 1.0]

        Two losses, none of which is the reference; the second one does not reach image 1:

        >>> images, is_kept = torch.zeros(2, 4, requires_grad=True), torch.tensor([1.0, 0.0])
        >>> _, one, other = balance_gradients(images, (0, 1, 0.5), reference=1 / 2)
        >>> (7 * one[:, 0].sum() + (is_kept * other[:, 1]).sum()).backward()
        >>> images.grad.tolist()
        [[0.5, 0.25, 0.0, 0.0], [0.5, 0.0, 0.0, 0.0]]
    """
    owner = "balance_gradients"
    is_sequence = isinstance(ratios, Sequence) and not isinstance(ratios, str)
    values = tuple(cast(Sequence[float], ratios)) if is_sequence else (1.0, cast(float, ratios))
    if not values:
        raise ValueError(f"{owner}: ratios must hold at least one number, one per loss, but they are {ratios!r}.")
    for ratio in values:
        check_number(owner, ratio=ratio)
        if ratio < 0:
            raise ValueError(f"{owner}: ratio must be 0 or more, but it is {ratio!r}.")
    check_tensors(owner, images=images)
    if not (images.is_floating_point() or images.is_complex()):
        raise ValueError(
            f"{owner}: images must be floating point, but they are {images.dtype}, which has no gradient; pass them as "
            "the generator returns them."
        )
    if images.ndim < 2:
        raise ValueError(f"{owner}: images must be (B, ...) with at least two axes, but they are {shape_of(images)}.")
    if reference is not None:
        _check_reference(owner, images, reference)
        dtype = torch.promote_types(images.dtype, torch.float32)
        reference = torch.as_tensor(reference, dtype=dtype, device=images.device)
    return cast(tuple[Tensor, ...], _Balance.apply(images, values, reference))


def _check_reference(owner: str, images: Tensor, reference: float | Tensor) -> None:
    if isinstance(reference, Tensor):
        if tuple(reference.shape) not in ((), (images.shape[0],)) or not reference.is_floating_point():
            raise ValueError(
                f"{owner}: reference must be a number or floats (B,), here ({images.shape[0]},), but it is "
                f"{reference.dtype} {shape_of(reference)}."
            )
        if is_readable(reference) and reference.device.type == "cpu" and not bool((reference >= 0).all()):
            raise ValueError(f"{owner}: reference must be 0 or more at every image, but it is {reference.tolist()}.")
        return
    check_number(owner, reference=reference)
    if reference < 0:
        raise ValueError(f"{owner}: reference must be 0 or more, but it is {reference!r}.")


class _Balance(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(images: Tensor, ratios: tuple[float, ...], reference: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(images.view_as(images) for _ in ratios)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, ctx.ratios, reference = inputs
        ctx.save_for_backward(reference)
        # The gradient of a copy that its loss does not use is None instead of zero.
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        if all(gradient is None for gradient in gradients):
            return None, None, None
        # A compiled graph has no second derivatives anyway, and the compiler would trace the one that raises.
        balanced = _balanced if torch.compiler.is_compiling() else _Balanced.apply
        return cast(Tensor, balanced(ctx.ratios, *ctx.saved_tensors, *gradients)), None, None


class _Balanced(torch.autograd.Function):
    """`_balanced` without a derivative: through its own inputs, autograd would balance the second derivatives again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(ratios: tuple[float, ...], reference: Tensor | None, *gradients: Tensor | None) -> Tensor:
        return _balanced(ratios, reference, *gradients)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing to save."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise NotImplementedError("balance_gradients has no second derivative; balance the losses by weights instead.")


def _balanced(ratios: tuple[float, ...], reference: Tensor | None, *gradients: Tensor | None) -> Tensor:
    """The gradient at the images, given that of each copy, at least one of which is not None."""
    like = next(gradient for gradient in gradients if gradient is not None)
    # In float32: squares of half-precision gradients, especially of scaled losses, overflow or underflow.
    first, *others = (None if gradient is None else at_least_float32(gradient).flatten(1) for gradient in gradients)
    # A disabled loss has no influence, not even by NaN.
    further = [(ratio, other) for ratio, other in zip(ratios[1:], others) if other is not None and ratio > 0]
    if reference is None and further:
        _warn_of_zero(first)
    if first is None:
        first = at_least_float32(torch.zeros_like(like)).flatten(1)
    norm = torch.linalg.vector_norm(first, dim=1, keepdim=True) if reference is None else reference.reshape(-1, 1)
    total = ratios[0] * first if ratios[0] > 0 else torch.zeros_like(first)
    for ratio, other in further:
        total = total + ratio * norm * _direction(other)
    return total.view(like.shape).to(like.dtype)


def _direction(gradient: Tensor) -> Tensor:
    """Divide the gradient of each image, (B, N), by its norm; a zero gradient has no direction and stays zero."""
    # Scaled first: of a captioner that is certain of a caption, gradients of 1e-23 remain, whose squares are zero.
    largest = gradient.abs().amax(dim=1, keepdim=True)
    return F.normalize(gradient / largest.masked_fill(largest == 0, 1.0), dim=1)


def _warn_of_zero(first: Tensor | None) -> None:
    """Warn if the first gradient is missing or, where that can be read without stalling, zero at every image."""
    if first is None or (is_readable(first) and first.device.type == "cpu" and first.numel() > 0 and not first.any()):
        warnings.warn(
            "balance_gradients: the first loss has no gradient at any image, so the others, which get fractions of its "
            "norm, have none either; if it does not depend on the images, pass the norm as reference=...",
            stacklevel=2,
        )
