"""The redescription loss: can the caption be recovered from the image? (MirrorGAN, Sec. 3.3)"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirror_modules._checks import (
    at_least_float32,
    autocast_dtype,
    check_batch,
    check_choice,
    check_images,
    check_number,
    check_tensors,
    check_tokens,
    check_word_mask,
    is_readable,
    shape_of,
)
from mirror_modules._typing import TypedCall

Reduction = Literal["word", "sentence"]


def redescription_loss(
    logits: Tensor, tokens: Tensor, word_mask: Tensor | None = None, *, reduction: Reduction = "word"
) -> Tensor:
    """Compute the cross entropy between a captioner's predictions and the caption (MirrorGAN, Sec. 3.3).

        L_stream = - sum_t log p_t(T_t)

    Args:
        logits: (B, L, V); `logits[:, t]` predicts `tokens[:, t]`.
        tokens: Token ids, (B, L).
        word_mask: True for a real word, (B, L); None if all are. Padding does not count.
        reduction: "word" is the mean over all real words of the batch, as in the published code; "sentence" the sum
            over a caption's words, as in the paper, and the mean over captions.

    Returns:
        A scalar, at least 0.

    Raises:
        ValueError: Sizes disagree, a caption has no real word, or `reduction` is unknown.

    Examples:
        >>> import torch
        >>> from mirror_modules.functional import redescription_loss
        >>> logits, tokens = torch.zeros(1, 3, 4), torch.tensor([[2, 3, 0]])  # all 4 words equally likely
        >>> round(redescription_loss(logits, tokens, tokens != 0).item(), 4)  # log 4
        1.3863
        >>> round(redescription_loss(logits, tokens, tokens != 0, reduction="sentence").item(), 4)  # 2 log 4
        2.7726
    """
    owner = "redescription_loss"
    check_choice(owner, "reduction", reduction, ("word", "sentence"))
    check_tensors(owner, logits=logits)
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        raise ValueError(
            f"{owner}: logits must be (B, L, V) for tokens (B, L), but they are {shape_of(logits)} and "
            f"{shape_of(tokens)}."
        )
    check_tokens(owner, tokens, logits.shape[2])
    word_mask = check_word_mask(owner, tokens, word_mask, may_stall=False)
    if word_mask is not None:
        # Masked before the softmax: logits at padding may be infinite, and their gradient would be NaN.
        logits = logits.where(word_mask.unsqueeze(2), 0.0)
    losses_BL = F.cross_entropy(at_least_float32(logits).mT, tokens.long(), reduction="none")
    if word_mask is None:
        return losses_BL.mean() if reduction == "word" else losses_BL.sum(dim=1).mean()
    losses_BL = losses_BL.where(word_mask, 0.0)
    return losses_BL.sum() / (word_mask.sum() if reduction == "word" else tokens.shape[0])


class RedescriptionLoss(TypedCall, nn.Module):
    """Score generated images by the likelihood of their captions under a frozen captioner (MirrorGAN, Sec. 3.3).

        loss = redescription_loss(captioner(images, tokens), tokens)

    The gradient reaches the image, never the captioner. The captioner is frozen for good: its parameters require no
    gradient, its batch norm and dropout layers are in evaluation mode, and neither `train()` nor `requires_grad_()` on
    this loss, or on a model that contains it, unfreezes it. Only its recurrent layers stay in training mode, without
    dropout, because cuDNN cannot run backward through them otherwise.

    Args:
        captioner: Any Module `(images, tokens, word_mask) -> logits (B, L, V)` where `logits[:, t]` predicts
            `tokens[:, t]` from the image and `tokens[:, :t]`. It is modified in place.
        reduction: See `redescription_loss`.
        check: At the first call, run the captioner once more, on a few copies of one image with different tokens, and
            require that `logits[:, t]` depends on no token from t on. Logits that predict the next token, as those of
            Hugging Face's models, would otherwise be off by one without an error. Compiled graphs do not check.

    Raises:
        ValueError: `captioner` is not a Module, or `reduction` is unknown.

    Examples:
        >>> import torch
        >>> from mirror_modules import Captioner, RedescriptionLoss
        >>> from mirror_modules.stem import ConvBackbone
        >>> captioner = Captioner(ConvBackbone(), vocabulary_size=50, embedding_dim=16, hidden_dim=32)
        >>> redescription = RedescriptionLoss(captioner)
        >>> images = (torch.rand(2, 3, 32, 32) * 2 - 1).requires_grad_(True)
        >>> redescription(images, torch.tensor([[5, 9, 4], [8, 6, 7]])).backward()
        >>> images.grad.shape, all(parameter.grad is None for parameter in captioner.parameters())
        (torch.Size([2, 3, 32, 32]), True)
    """

    def __init__(self, captioner: nn.Module, *, reduction: Reduction = "word", check: bool = True) -> None:
        super().__init__()
        check_choice("RedescriptionLoss", "reduction", reduction, ("word", "sentence"))
        if not isinstance(captioner, nn.Module):
            raise ValueError(
                f"RedescriptionLoss: captioner must be an nn.Module, but it is a {type(captioner).__name__}."
            )
        self.captioner = captioner
        self.reduction: Reduction = reduction
        self._must_check = check
        self._freeze()

    def train(self, mode: bool = True) -> RedescriptionLoss:
        """Set the mode of this loss; the captioner stays frozen."""
        super().train(mode)
        self._freeze()
        return self

    def _freeze(self) -> None:
        self.captioner.eval()
        self.captioner.requires_grad_(False)
        # An optimizer updates every parameter with a gradient, even one that remains from the captioner's own training.
        self.captioner.zero_grad(set_to_none=True)
        for module in self.captioner.modules():
            if isinstance(module, nn.RNNBase):
                module.dropout = 0.0
                module.train()

    def _is_frozen(self) -> bool:
        """Check that no other owner of the captioner, such as a whole model, has changed its modes or gradients."""
        is_trainable = any(parameter.requires_grad for parameter in self.captioner.parameters())
        modules = self.captioner.modules()
        return not is_trainable and all(module.training == isinstance(module, nn.RNNBase) for module in modules)

    def forward(self, images: Tensor, tokens: Tensor, word_mask: Tensor | None = None) -> Tensor:
        """Compute the cross entropy of the captions, given the images.

        Args:
            images: In [-1, 1], (B, 3, H, W).
            tokens: Token ids, (B, L); with the end token (`append_end`) if the captioner was trained with it.
            word_mask: True for a real word, (B, L); None if all are. Padding does not count.

        Returns:
            A scalar.

        Raises:
            ValueError: Sizes disagree, a token is negative, a caption has no real word, or the captioner does not
                return logits (B, L, V) of which `logits[:, t]` depends on the image and `tokens[:, :t]` alone.
        """
        check_images("RedescriptionLoss", images)
        check_tokens("RedescriptionLoss", tokens, None)
        check_batch("RedescriptionLoss", images=images, tokens=tokens)
        word_mask = check_word_mask("RedescriptionLoss", tokens, word_mask, may_stall=False)
        if not self._is_frozen():
            self._freeze()
        if self._must_check and is_readable(images) and is_readable(tokens) and images.shape[0] > 0:
            check_causality(self.captioner, images, tokens, word_mask)
            self._must_check = False
        logits = _run(self.captioner, images, tokens, word_mask)
        return redescription_loss(logits, tokens, word_mask, reduction=self.reduction)


def _run(captioner: nn.Module, images: Tensor, tokens: Tensor, word_mask: Tensor | None) -> Tensor:
    logits = captioner(images, tokens, word_mask)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        kind = shape_of(logits) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        hint = "; return its `logits`" if hasattr(logits, "logits") else ""
        raise ValueError(
            f"RedescriptionLoss: the captioner {type(captioner).__name__} must return logits (B, L, V) for tokens "
            f"{shape_of(tokens)}, but it returned {kind}{hint}."
        )
    return logits


@torch.no_grad()
def check_causality(captioner: nn.Module, images: Tensor, tokens: Tensor, word_mask: Tensor | None) -> None:
    """Require that `logits[:, t]` of a captioner depends on no token from t on.

    The captioner runs on copies of the first image and its caption, in which the tokens from some t on are replaced.

    Raises:
        ValueError: The captioner returns no logits (B, L, V), or they depend on tokens that they must predict.
    """
    length, device = tokens.shape[1], tokens.device
    starts = sorted({0, min(1, length - 1), length // 2})
    starts_K1, positions_L = torch.tensor(starts, device=device).unsqueeze(1), torch.arange(length, device=device)
    # Ids of this call, or one below: they lie within the vocabulary, whose size is not known yet.
    low, high = tokens.min(), tokens.max()
    low = torch.where(low == high, (high - 1).clamp(min=0), low)
    caption_1L = tokens[:1]
    replaced_1L = torch.where(caption_1L == high, low, high)
    # Two unchanged copies first: if they differ, the captioner is random.
    tokens_NL = torch.cat((caption_1L, caption_1L, torch.where(positions_L >= starts_K1, replaced_1L, caption_1L)))
    copies = tokens_NL.shape[0]
    mask_NL = None if word_mask is None else word_mask[:1].repeat(copies, 1)
    with _without_side_effects(captioner, images.device):
        logits_NLV = _run(captioner, images[:1].repeat(copies, 1, 1, 1), tokens_NL, mask_NL)

    # Rounding may differ between rows of a batch, by the precision of autocast or of the captioner itself.
    precision = max(torch.finfo(dtype).eps for dtype in (logits_NLV.dtype, autocast_dtype(images)))
    difference_NL = (at_least_float32(logits_NLV[1:]) - logits_NLV[0]).nan_to_num(0.0).abs().amax(dim=2)
    scores_LV = at_least_float32(logits_NLV[0]).nan_to_num(0.0, 0.0, 0.0)
    spread = (scores_LV - scores_LV.mean(dim=1, keepdim=True)).abs().amax()
    tolerance = precision**0.5 * spread + 16 * precision * scores_LV.abs().amax() + 2 * difference_NL[0].amax()
    is_leak_KL = (difference_NL[1:] > tolerance) & (positions_L <= starts_K1)
    if word_mask is not None:
        is_leak_KL &= word_mask[:1]
    leaks = [(starts[k], position) for k, position in is_leak_KL.nonzero().tolist()]
    for start, position in leaks:
        if position < start:
            raise ValueError(
                f"RedescriptionLoss: logits[:, {position}] of the captioner {type(captioner).__name__} depends on "
                f"tokens[:, {start}:]. It must be causal: logits[:, t] predicts tokens[:, t] from the image and "
                "tokens[:, :t] alone. check=False skips this check."
            )
    if leaks:
        raise ValueError(
            f"RedescriptionLoss: logits[:, {leaks[0][0]}] of the captioner {type(captioner).__name__} depends on the "
            "token at the same position, which it must predict. If its logits predict the next token, as those of "
            "Hugging Face's models do, shift them by one: run it on a start token followed by the tokens, and return "
            "logits[:, :-1]. check=False skips this check."
        )


@contextmanager
def _without_side_effects(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore buffers and random states on exit."""
    buffers = [
        (owner._buffers, name, buffer, None if buffer.is_inference() else buffer._version, buffer.clone())
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None
    ]
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for owner, name, buffer, version, value in buffers:
            # Writing to a buffer that did not change would break the backward pass of earlier calls that saved it.
            if version is None or buffer._version != version:
                buffer.copy_(value)
            owner[name] = buffer


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

    Args:
        images: Generated images (B, ...).
        ratios: Weight r_0 of the first loss, then the gradient norm r_k of each further loss as a fraction of n_i; 0
            disables a loss. A number r is short for (1, r).
        reference: The norms n_i instead of |a_i|: a number or scalar tensor for all images, or (B,). It has the scale
            of the gradients: a mean over the batch divides them by B, and a `GradScaler` multiplies them.

    Returns:
        As many tensors as there are ratios, at least two for a number; each equals `images`. First derivatives only:
        a second one raises an error.

    Raises:
        ValueError: A ratio or `reference` is negative or not a finite number, there are no ratios, or the shape of
            `images` or `reference` is not as above.

    Examples:
        >>> import torch
        >>> from mirror_modules.functional import balance_gradients
        >>> images = torch.zeros(2, 4, requires_grad=True)
        >>> for_discriminator, for_captioner = balance_gradients(images, 0.25)
        >>> (for_discriminator.sum() + 1000 * for_captioner[:, 0].sum()).backward()
        >>> images.grad[0].tolist()  # (1, 1, 1, 1), of norm 2, plus 0.25 * 2 in the direction of (1, 0, 0, 0)
        [1.5, 1.0, 1.0, 1.0]
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
    further = [(ratio, other) for ratio, other in zip(ratios[1:], others) if other is not None]
    if reference is None and any(ratio > 0 for ratio, _ in further):
        _warn_of_zero(first)
    if first is None:
        first = at_least_float32(torch.zeros_like(like)).flatten(1)
    norm = torch.linalg.vector_norm(first, dim=1, keepdim=True) if reference is None else reference.reshape(-1, 1)
    total = ratios[0] * first
    for ratio, other in further:
        # A zero gradient has no direction; eps keeps it zero.
        total = total + ratio * norm * F.normalize(other, dim=1, eps=torch.finfo(other.dtype).tiny)
    return total.view(like.shape).to(like.dtype)


def _warn_of_zero(first: Tensor | None) -> None:
    """Warn if the first gradient is missing or, where that can be read without stalling, zero at every image."""
    if first is None or (is_readable(first) and first.device.type == "cpu" and first.numel() > 0 and not first.any()):
        warnings.warn(
            "balance_gradients: the first loss has no gradient at any image, so the others, which get fractions of its "
            "norm, have none either; if it does not depend on the images, pass the norm as reference=...",
            stacklevel=2,
        )
