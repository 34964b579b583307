"""The redescription loss: can the caption be recovered from the image? (MirrorGAN, Sec. 3.3)"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mirror_modules._checks import (
    at_least_float32,
    check_batch,
    check_choice,
    check_images,
    check_number,
    check_tokens,
    check_word_mask,
    shape_of,
)

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
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        raise ValueError(
            f"{owner}: logits must be (B, L, V) for tokens (B, L), but they are {shape_of(logits)} and "
            f"{shape_of(tokens)}."
        )
    check_tokens(owner, tokens, logits.shape[2])
    check_word_mask(owner, tokens, word_mask, may_stall=False)
    if word_mask is not None:
        # Masked before the softmax: logits at padding may be infinite, and their gradient would be NaN.
        logits = logits.where(word_mask.unsqueeze(2), 0.0)
    losses_BL = F.cross_entropy(at_least_float32(logits).mT, tokens.long(), reduction="none")
    if word_mask is None:
        return losses_BL.mean() if reduction == "word" else losses_BL.sum(dim=1).mean()
    losses_BL = losses_BL.where(word_mask, 0.0)
    return losses_BL.sum() / (word_mask.sum() if reduction == "word" else len(tokens))


class RedescriptionLoss(nn.Module):
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

    Raises:
        ValueError: `reduction` is unknown.

    Examples:
        >>> import torch
        >>> from mirror_modules import Captioner, RedescriptionLoss
        >>> from mirror_modules.stem import ConvBackbone
        >>> captioner = Captioner(ConvBackbone(), vocabulary_size=50, embedding_dim=16, hidden_dim=32)
        >>> redescription = RedescriptionLoss(captioner)
        >>> images = torch.rand(2, 3, 32, 32, requires_grad=True)
        >>> redescription(images, torch.tensor([[5, 9, 4], [8, 6, 7]])).backward()
        >>> images.grad.shape, all(parameter.grad is None for parameter in captioner.parameters())
        (torch.Size([2, 3, 32, 32]), True)
    """

    def __init__(self, captioner: nn.Module, *, reduction: Reduction = "word") -> None:
        super().__init__()
        check_choice("RedescriptionLoss", "reduction", reduction, ("word", "sentence"))
        self.captioner = captioner
        self.reduction: Reduction = reduction
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
            ValueError: Sizes disagree, or a caption has no real word.
        """
        check_images("RedescriptionLoss", images)
        check_batch("RedescriptionLoss", images=images, tokens=tokens)
        if not self._is_frozen():
            self._freeze()
        return redescription_loss(
            self.captioner(images, tokens, word_mask), tokens, word_mask, reduction=self.reduction
        )


def balance_gradients(images: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Rescale the gradient of a second loss at each image to `ratio` times the norm of the first one's.

        g_i = a_i + ratio * |a_i| * b_i / |b_i|

    Returns the images twice, one copy for each loss. a_i is the gradient that reaches image i through the first copy,
    b_i the one through the second, and g_i is the gradient that the generator receives: a weight on the second loss has
    no effect. With a fixed weight, a few images receive redescription gradients tens of times larger than the others
    and dominate the update.

        for_discriminator, for_captioner = balance_gradients(images, 0.25)
        loss = adversarial_loss(for_discriminator) + redescription(for_captioner, tokens)

    Args:
        images: Generated images (B, ...).
        ratio: Gradient norm of the second loss as a fraction of the first one's; 0 disables the second loss.

    Returns:
        Two tensors that equal `images`. First derivatives only: torch raises on second ones.

    Raises:
        ValueError: `ratio` is negative or not a finite number.

    Examples:
        >>> import torch
        >>> from mirror_modules.functional import balance_gradients
        >>> images = torch.zeros(2, 4, requires_grad=True)
        >>> for_discriminator, for_captioner = balance_gradients(images, ratio=0.25)
        >>> (for_discriminator.sum() + 1000 * for_captioner[:, 0].sum()).backward()
        >>> images.grad[0].tolist()  # (1, 1, 1, 1), of norm 2, plus 0.25 * 2 in the direction of (1, 0, 0, 0)
        [1.5, 1.0, 1.0, 1.0]
    """
    check_number("balance_gradients", ratio=ratio)
    if ratio < 0:
        raise ValueError(f"balance_gradients: ratio must be 0 or more, but it is {ratio!r}.")
    return cast(tuple[Tensor, Tensor], _Balance.apply(images, ratio))


class _Balance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
        ctx.ratio = ratio
        return images.view_as(images), images.view_as(images)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # In float32: squares of half-precision gradients, especially of scaled losses, overflow or underflow.
        first, second = (at_least_float32(gradient).flatten(1) for gradient in gradients)
        # A zero gradient has no direction; eps keeps it zero.
        second = F.normalize(second, dim=1, eps=torch.finfo(second.dtype).tiny)
        rescaled = ctx.ratio * torch.linalg.vector_norm(first, dim=1, keepdim=True) * second
        return (first + rescaled).view(gradients[0].shape).to(gradients[0].dtype), None
