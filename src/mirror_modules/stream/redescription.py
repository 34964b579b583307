"""The redescription loss: can the caption be read off the image? (MirrorGAN, Sec. 3.3)"""

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
    """Cross entropy between the words that a captioner reads off an image and the caption (MirrorGAN, Sec. 3.3).

        L_stream = - sum_t log p_t(T_t)

    Args:
        logits: (B, L, V); `logits[:, t]` predicts `tokens[:, t]`.
        tokens: Token ids, (B, L).
        word_mask: True for a real word, (B, L); None if all are. Padding does not count.
        reduction: "word" is the mean over all real words of the batch, as the published code; "sentence" the sum over
            a caption's words, as the paper, and the mean over captions.

    Returns:
        A scalar, at least 0.

    Raises:
        ValueError: Sizes disagree, a caption has no real word, or `reduction` is unknown.
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
        # Selected before the softmax: what a captioner says at padding may be infinite, and its gradient then NaN.
        logits = logits.where(word_mask.unsqueeze(2), 0.0)
    losses_BL = F.cross_entropy(at_least_float32(logits).mT, tokens.long(), reduction="none")
    if word_mask is None:
        return losses_BL.mean() if reduction == "word" else losses_BL.sum(dim=1).mean()
    losses_BL = losses_BL.where(word_mask, 0.0)
    return losses_BL.sum() / (word_mask.sum() if reduction == "word" else len(tokens))


class RedescriptionLoss(nn.Module):
    """Ask a frozen captioner to read the caption off a generated image (MirrorGAN, Sec. 3.3).

    The gradient reaches the image, never the captioner. The captioner is frozen for good: its parameters need no
    gradient, its batch norms and dropouts are in evaluation mode, and neither `train()` nor `requires_grad_()` of this
    loss, or of a model that contains it, wakes it. Its recurrent layers alone stay in training mode, without dropout,
    because cuDNN cannot run backward through them otherwise.

    Args:
        captioner: Any Module `(images, tokens, word_mask) -> logits (B, L, V)` where `logits[:, t]` predicts
            `tokens[:, t]` from the image and `tokens[:, :t]`. It is changed in place.
        reduction: See `redescription_loss`.
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
        # An optimizer moves whatever has a gradient, even one left over from the captioner's own training.
        self.captioner.zero_grad(set_to_none=True)
        for module in self.captioner.modules():
            if isinstance(module, nn.RNNBase):
                module.dropout = 0.0
                module.train()

    def _is_frozen(self) -> bool:
        """False if somebody else who holds the captioner, such as a whole model, has set its modes or its gradients."""
        learns = any(parameter.requires_grad for parameter in self.captioner.parameters())
        modules = self.captioner.modules()
        return not learns and all(module.training == isinstance(module, nn.RNNBase) for module in modules)

    def forward(self, images: Tensor, tokens: Tensor, word_mask: Tensor | None = None) -> Tensor:
        """Compare what the captioner reads with the caption.

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
    """Let a loss pull at each image `ratio` times as hard as another one does, whatever their weights are.

        g_i = a_i + ratio * |a_i| * b_i / |b_i|

    The same images are given back twice. a_i is the gradient that comes back at image i through the first ones, b_i
    through the second ones, and g_i is what the generator gets. A redescription loss of a fixed weight pulls tens of
    times as hard at one image as at another, so that a few of them decide what it says.

        judged, read = balance_gradients(images, 0.25)
        loss = adversarial_loss(judged) + redescription(read, tokens)

    Args:
        images: Generated images (B, ...).
        ratio: Norm of the second loss's gradient, as a share of the first one's; 0 leaves the second loss out.

    Returns:
        Two tensors that equal `images`. Backward works once; second derivatives are refused by torch.

    Raises:
        ValueError: `ratio` is negative or no finite number.
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
        # In float32: the squares of half precision, and of scaled losses, leave its range.
        first, second = (at_least_float32(gradient).flatten(1) for gradient in gradients)
        # Where the second one is silent it has no direction.
        second = F.normalize(second, dim=1, eps=torch.finfo(second.dtype).tiny)
        pull = ctx.ratio * torch.linalg.vector_norm(first, dim=1, keepdim=True) * second
        return (first + pull).view(gradients[0].shape).to(gradients[0].dtype), None
