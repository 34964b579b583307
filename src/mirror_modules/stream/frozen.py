"""Base class of the modules that score images under a captioner, which stays frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import cast

from torch import Tensor, nn
from typing_extensions import Self

from mirror_modules._checks import (
    check_batch,
    check_images,
    check_tensors,
    check_tokens,
    check_word_mask,
    is_readable,
    shape_of,
)
from mirror_modules._freezing import freeze, is_frozen
from mirror_modules.stream.probing import can_probe, needs_gradient, probe_captioner, run_captioner

Encoder = Callable[[list[str]], tuple[Tensor, Tensor]]
"""Strings -> tokens (B, L) and word_mask (B, L)."""


class FrozenCaptioner(nn.Module):
    """Keep a captioner frozen, turn strings into its tokens, and check its contract at the first call.

    The gradient reaches the image, never the captioner: its parameters require no gradient, its batch norm and dropout
    layers are in evaluation mode, and neither `train()` nor `requires_grad_()` on this module, or on a model that
    contains it, unfreezes it. Only its recurrent layers stay in training mode, without dropout, because cuDNN cannot
    run backward through them otherwise.

    Args:
        captioner: Any Module `(images, tokens, word_mask) -> logits (B, L, V)`. It is modified in place.
        encode: Function that turns a list of strings into (tokens, word_mask). By default, the captioner's own method
            `encode`.
        check: Check its contract at the first call, and at the first one whose images require a gradient; see
            `probe_captioner`. Compiled graphs and transforms of `torch.func` do not check.

    Raises:
        ValueError: `captioner` is not a Module.
    """

    def __init__(self, captioner: nn.Module, *, encode: Encoder | None = None, check: bool = True) -> None:
        super().__init__()
        if not isinstance(captioner, nn.Module):
            raise ValueError(
                f"{type(self).__name__}: captioner must be an nn.Module, but it is a {type(captioner).__name__}."
            )
        self.captioner = captioner
        self._encode = encode
        # The first call may need no gradient; whether one arrives is then checked later.
        self._unchecked = {"contract", "gradient"} if check else set[str]()
        freeze(self.captioner)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of this module; the captioner stays frozen."""
        super().train(mode)
        freeze(self.captioner)
        return self

    def encode(self, captions: str | Sequence[str]) -> tuple[Tensor, Tensor]:
        """Turn strings into (tokens, word_mask) of the captioner.

        Raises:
            ValueError: Neither this Module nor its captioner has an encoder, or it returns something else.
        """
        encode = self._encode or getattr(self.captioner, "encode", None)
        if encode is None:
            owner = type(self).__name__
            raise ValueError(
                f"{owner}: captions are strings, but the captioner {type(self.captioner).__name__} has no method "
                "`encode`; pass token ids, or a function as encode=..., which for a Vocabulary is\n"
                "    from mirror_modules.functional import append_end\n"
                f"    {owner}(captioner, encode=lambda captions: append_end(*vocabulary.encode(captions)))"
            )
        listed = [captions] if isinstance(captions, str) else list(captions)
        return _pair(type(self).__name__, encode(listed), len(listed))

    def _strings(self, images: Tensor, captions: str | Sequence[str], word_mask: Tensor | None) -> list[str]:
        """Check captions that are no token ids; a single one belongs to all images."""
        owner = type(self).__name__
        check_tensors(owner, images=images)
        if isinstance(captions, str):
            captions = [captions] * len(images)
        listed = list(captions) if isinstance(captions, Iterable) else [captions]
        if not listed or not all(isinstance(caption, str) for caption in listed):
            raise ValueError(
                f"{owner}: captions must be token ids (B, L), or strings, at least one, but they are a "
                f"{type(captions).__name__} that starts with {listed[:3]!r}; torch.as_tensor makes a tensor of ids."
            )
        if word_mask is not None:
            raise ValueError(f"{owner}: word_mask belongs to token ids; with strings, leave it out.")
        return listed

    def _tokens(
        self, images: Tensor, captions: Tensor | str | Sequence[str], word_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Token ids and their mask, on the device of the images if the captions are strings."""
        if isinstance(captions, Tensor):
            return captions, word_mask
        tokens, word_mask = self.encode(self._strings(images, captions, word_mask))
        return tokens.to(images.device), word_mask.to(images.device)

    def _checked(
        self,
        images: Tensor,
        tokens: Tensor,
        word_mask: Tensor | None,
        *,
        paired: bool = True,
        probed: tuple[Tensor, Tensor | None] | None = None,
    ) -> Tensor | None:
        """Check the inputs and, at the first call, the captioner; return the mask as bool.

        Args:
            images: (B, 3, H, W).
            tokens: (B, L).
            word_mask: (B, L) or None.
            paired: Whether each image has one caption.
            probed: Tokens and mask for the check of the captioner, if words of `tokens` cannot be replaced.
        """
        owner = type(self).__name__
        check_images(owner, images)
        check_tokens(owner, tokens, None)
        if paired:
            check_batch(owner, images=images, tokens=tokens)
        word_mask = check_word_mask(owner, tokens, word_mask, may_stall=False)
        if not is_frozen(self.captioner):
            freeze(self.captioner)
        is_empty = images.shape[0] == 0 or tokens.shape[0] == 0
        if self._unchecked and can_probe(images) and is_readable(tokens) and not is_empty:
            due = self._unchecked & ({"contract", "gradient"} if needs_gradient(images) else {"contract"})
            if due:
                probe_captioner(owner, self.captioner, images, *(probed or (tokens, word_mask)))
            self._unchecked = self._unchecked - due
        return word_mask

    def _logits(
        self, images: Tensor, tokens: Tensor, word_mask: Tensor | None, options: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The captioner's logits (B, L, V) of checked inputs."""
        return run_captioner(type(self).__name__, self.captioner, images, tokens, word_mask, options)


def _pair(owner: str, encoded: object, count: int) -> tuple[Tensor, Tensor]:
    """What an encoder returned for `count` captions, if it is tokens and word_mask.

    Unpacking alone would take the names of a tokenizer's fields, or two rows of one tensor, for them.
    """
    parts = encoded if isinstance(encoded, tuple | list) else (encoded,)
    if len(parts) != 2 or not all(isinstance(part, Tensor) and part.shape[:-1] == (count,) for part in parts):
        came = " and ".join(shape_of(part) if isinstance(part, Tensor) else type(part).__name__ for part in parts)
        raise ValueError(
            f"{owner}: encode must return two tensors, tokens and word_mask, both ({count}, L), a row for each "
            f"caption, but it returned {came or 'nothing'}; with a tokenizer of transformers, return batch.input_ids, "
            'batch.attention_mask of\n    batch = tokenizer(captions, padding=True, return_tensors="pt")'
        )
    return cast(tuple[Tensor, Tensor], tuple(parts))
