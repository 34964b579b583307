"""The redescription loss: can the caption be recovered from the image? (MirrorGAN, Sec. 3.3)"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from mirror_modules._checks import (
    at_least_float32,
    check_choice,
    check_tensors,
    check_tokens,
    check_word_mask,
    shape_of,
)
from mirror_modules._typing import TypedCall
from mirror_modules.stream.frozen import Encoder, FrozenCaptioner

Reduction = Literal["word", "sentence", "none"]
REDUCTIONS = ("word", "sentence", "none")


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
            over a caption's words, as in the paper, and the mean over captions; "none" the mean over the words of each
            caption, one value per caption.

    Returns:
        A scalar in nats, at least 0; with "none" (B,), in nats per word.

    Raises:
        ValueError: Sizes or types disagree, a caption has no real word, or `reduction` is unknown.

    Examples:
        >>> import torch
        >>> from mirror_modules.functional import redescription_loss
        >>> logits, tokens = torch.zeros(1, 3, 4), torch.tensor([[2, 3, 0]])  # all 4 words equally likely
        >>> round(redescription_loss(logits, tokens, tokens != 0).item(), 4)  # log 4
        1.3863
        >>> round(redescription_loss(logits, tokens, tokens != 0, reduction="sentence").item(), 4)  # 2 log 4
        2.7726
        >>> redescription_loss(logits.expand(5, -1, -1), tokens.expand(5, -1), reduction="none").shape
        torch.Size([5])
    """
    check_choice("redescription_loss", "reduction", reduction, REDUCTIONS)
    losses_BL, word_mask = word_losses("redescription_loss", logits, tokens, word_mask)
    if reduction == "none":
        return losses_BL.mean(dim=1) if word_mask is None else losses_BL.sum(dim=1) / word_mask.sum(dim=1)
    if reduction == "sentence":
        return losses_BL.sum(dim=1).mean() if word_mask is None else losses_BL.sum() / tokens.shape[0]
    return losses_BL.mean() if word_mask is None else losses_BL.sum() / word_mask.sum()


def word_losses(owner: str, logits: Tensor, tokens: Tensor, word_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Compute the cross entropy of each word, (B, L), which is 0 at padding; also return the mask as bool."""
    check_tensors(owner, logits=logits, tokens=tokens)
    if not logits.is_floating_point():
        raise ValueError(f"{owner}: logits must be floating point, but they are {logits.dtype}.")
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
    return losses_BL if word_mask is None else losses_BL.where(word_mask, 0.0), word_mask


class RedescriptionLoss(TypedCall, FrozenCaptioner):
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
        encode: Function that turns a list of strings into (tokens, word_mask), with the end token if the captioner was
            trained with it. By default, the captioner's own method `encode`. Needed only for captions that are strings.
        check: At the first call, run the captioner once more, on a few copies of one image with different tokens, and
            require that it keeps this contract: `logits[:, t]` depends on no token from t on, and on no padding; logits
            are finite and no probabilities; if the images require a gradient, it reaches them. Logits that predict the
            next token, as those of Hugging Face's models, would otherwise be off by one without an error. Compiled
            graphs and transforms of `torch.func` do not check.

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

        With strings:

        >>> from mirror_modules import Vocabulary
        >>> from mirror_modules.functional import append_end
        >>> vocabulary = Vocabulary.build(["a red flower", "a blue bird"])
        >>> encode = lambda captions: append_end(*vocabulary.encode(captions))
        >>> RedescriptionLoss(captioner, encode=encode)(images, ["a red flower", "a blue bird"]).shape
        torch.Size([])
    """

    def __init__(
        self,
        captioner: nn.Module,
        *,
        reduction: Reduction = "word",
        encode: Encoder | None = None,
        check: bool = True,
    ) -> None:
        check_choice("RedescriptionLoss", "reduction", reduction, REDUCTIONS)
        super().__init__(captioner, encode=encode, check=check)
        self.reduction: Reduction = reduction

    def forward(self, images: Tensor, tokens: Tensor | str | Sequence[str], word_mask: Tensor | None = None) -> Tensor:
        """Compute the cross entropy of the captions, given the images.

        Args:
            images: In [-1, 1], (B, 3, H, W).
            tokens: Token ids, (B, L), with the end token (`append_end`) if the captioner was trained with it; or
                captions as strings, one per image, or one for all images.
            word_mask: True for a real word, (B, L); None if all are. Padding does not count. Only with token ids.

        Returns:
            A scalar, or (B,) with the reduction "none".

        Raises:
            ValueError: Sizes disagree, a token is negative, a caption has no real word, captions are strings and there
                is no encoder, or the captioner breaks its contract.
        """
        tokens, word_mask = self._tokens(images, tokens, word_mask)
        word_mask = self._checked(images, tokens, word_mask)
        logits = self._logits(images, tokens, word_mask)
        return redescription_loss(logits, tokens, word_mask, reduction=self.reduction)
