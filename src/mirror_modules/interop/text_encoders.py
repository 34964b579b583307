"""Text encoders of Hugging Face as text encoders of this package.

Shape suffixes: B batch, L words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirror_modules._checks import (
    check_padding_is_last,
    check_tokens,
    check_word_mask,
    shape_of,
    zero_padding,
)
from mirror_modules.interop.adapters import (
    FAILURES,
    Adapter,
    Pooling,
    arguments_of,
    check_module,
    check_pooling,
    choose_pooling,
    example_of,
    pool,
)
from mirror_modules.stem import TextFeatures

ATTENDS_TO_PADDING = ("siglip_text_model", "siglip2_text_model")
"""Model types trained without an attention mask on captions padded to the full length."""


def text_encoder_from(
    model: nn.Module, tokenizer: Any, *, sentence: Pooling | None = None, trainable: bool = False
) -> TextEncoderAdapter:
    """Use a text encoder of Hugging Face as `TextEncoder` is used: `(tokens, word_mask) -> TextFeatures`.

        words = model(tokens).last_hidden_state, zero at padding
        sentence = pooler_output, its projection, or the mean of the real words

    For `CLIPTextModel`, `CLIPTextModelWithProjection`, `SiglipTextModel`, `T5EncoderModel`, `BertModel` and other
    models that take `input_ids` and `attention_mask` and return `last_hidden_state`; of a `CLIPModel` or `SiglipModel`,
    the text side. Padding has no influence, whatever ids it holds. SigLIP was trained without an attention mask, on
    captions padded to the full length, the last position of which becomes its pooled output: the adapter pads and runs
    it in this way, and returns the words of the given length.

    Args:
        model: The text encoder. Unless `trainable`, it is frozen in place.
        tokenizer: The tokenizer of the model, or its processor, which contains one; it needs a pad token.
        sentence: "pooled" is the model's pooled output, which for SigLIP is what it compares with images; "projection"
            is CLIP's projection of it to the space shared with images, not normalized; "mean" is the mean of the real
            words, special tokens included. None takes the first of these that the model has.
        trainable: Leave the parameters and the mode of the model to the caller instead of freezing them.

    Returns:
        The adapter; see `TextEncoderAdapter`.

    Raises:
        ValueError: `model` is not a text encoder as above or lacks the `sentence` asked for, `sentence` is unknown, or
            the tokenizer has no pad token.

    Examples:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel
        >>> from mirror_modules.interop import text_encoder_from
        >>> words = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1, "red": 2, "flower": 3, "?": 4}, unk_token="?"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="?")
        >>> model = T5EncoderModel(T5Config(vocab_size=5, d_model=16, d_kv=4, d_ff=8, num_layers=1, num_heads=4))
        >>> encoder = text_encoder_from(model, tokenizer)
        >>> tokens, word_mask = encoder.encode(["a red flower", "flower"])
        >>> features = encoder(tokens, word_mask)
        >>> features.words.shape, features.sentence.shape, encoder.sentence_kind
        (torch.Size([2, 3, 16]), torch.Size([2, 16]), 'mean')
    """
    return TextEncoderAdapter(model, tokenizer, sentence=sentence, trainable=trainable)


class TextEncoderAdapter(Adapter):
    """A text encoder of another library with the interface of `TextEncoder`; `text_encoder_from` builds it.

    Args:
        model: See `text_encoder_from`, as for the other arguments.
        tokenizer: The tokenizer of the model.
        sentence: "pooled", "projection", "mean", or None for the first that the model has.
        trainable: Leave the parameters and the mode of the model to the caller.

    Attributes:
        model: The encoder itself; of a model of text and images, its text side.
        tokenizer: The tokenizer.
        word_dim: Features D of a word.
        sentence_dim: Features D' of the sentence.
        sentence_kind: "pooled", "projection" or "mean".
        vocabulary_size: Number of token ids, or None if the model's configuration does not name it.

    Raises:
        ValueError: See `text_encoder_from`.

    Examples:
        >>> import torch
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast
        >>> from mirror_modules.interop import TextEncoderAdapter
        >>> words = Tokenizer(models.WordLevel({"<pad>": 0, "red": 1, "</s>": 2}, unk_token="<pad>"))
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
        >>> sizes = {"hidden_size": 16, "projection_dim": 12, "num_attention_heads": 2, "num_hidden_layers": 1}
        >>> ids = {"vocab_size": 3, "bos_token_id": 0, "eos_token_id": 2}
        >>> model = CLIPTextModelWithProjection(CLIPTextConfig(intermediate_size=8, **ids, **sizes))
        >>> encoder = TextEncoderAdapter(model, tokenizer, sentence="projection")
        >>> encoder.word_dim, encoder.sentence_dim
        (16, 12)
        >>> encoder(torch.tensor([[1, 1, 2], [1, 2, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])).sentence.shape
        torch.Size([2, 12])
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, *, sentence: Pooling | None = None, trainable: bool = False
    ) -> None:
        super().__init__(trainable)
        owner = "text_encoder_from"
        check_pooling(owner, "sentence", sentence)
        check_module(owner, model)
        self.model: nn.Module = getattr(model, "text_model", model)
        self.projection: nn.Module | None = getattr(model, "text_projection", None)
        _check_text_encoder(owner, self.model)
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self._pad_id = _pad_id_of(owner, self.tokenizer)
        config = getattr(self.model, "config", None)
        self.vocabulary_size: int | None = getattr(config, "vocab_size", None)
        self._positions: int | None = getattr(config, "max_position_embeddings", None)
        self._attends_to_padding = getattr(config, "model_type", None) in ATTENDS_TO_PADDING
        if not trainable:
            self._freeze()
        with self._probing(self.model):
            words, pooled = self._measure(owner)
            self.sentence_kind = choose_pooling(owner, "sentence", sentence, model, pooled, self.projection)
            sentence_feature = pool(self.sentence_kind, words, pooled, self.projection)
        if self.sentence_kind != "projection":
            self.projection = None
        self.word_dim, self.sentence_dim = words.shape[2], sentence_feature.shape[1]

    def encode(self, captions: str | Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode captions as token ids with the tokenizer of the model.

        Captions beyond the positions of the model are truncated.

        Args:
            captions: One string or several, each with at least one token.

        Returns:
            Tokens (B, L) and word_mask (B, L), True for a real token, special ones included, on the CPU; padding comes
            last, and L is the length of the longest caption. `forward` itself adds the padding that SigLIP needs.

        Raises:
            ValueError: `captions` holds no strings, or a caption has no token.
        """
        listed = [captions] if isinstance(captions, str) else captions
        is_sequence = isinstance(listed, Sequence) and len(listed) > 0
        if not is_sequence or not all(isinstance(caption, str) for caption in listed):
            raise ValueError(
                f"TextEncoderAdapter.encode: captions must be a string or a list of at least one, but it is "
                f"{captions!r}."
            )
        limits = [limit for limit in (self._positions, getattr(self.tokenizer, "model_max_length", None)) if limit]
        # Tokenizers without a limit of their own have one of 10^30.
        longest = min((limit for limit in limits if limit < 2**31), default=None)
        encoded = self.tokenizer(
            list(listed),
            padding=True,
            padding_side="right",
            truncation=longest is not None,
            max_length=longest,
            return_attention_mask=True,
            return_tensors="pt",
        )
        # The pad token may also be a real one: CLIP and SigLIP pad with the end token.
        word_mask = encoded["attention_mask"].bool()
        for i, has_tokens in enumerate(word_mask.any(dim=1).tolist()):
            if not has_tokens:
                raise ValueError(
                    f"TextEncoderAdapter.encode: caption {i} ({listed[i]!r}) has no token; write at least one word."
                )
        return encoded["input_ids"], word_mask

    def forward(self, tokens: Tensor, word_mask: Tensor | None = None) -> TextFeatures:
        """Encode captions.

        Args:
            tokens: Token ids, (B, L), with the special tokens that the model expects, as `encode` returns them.
            word_mask: True for a real token, (B, L), real tokens first; None if all are.

        Returns:
            Word features (B, L, D), zero at padding, and sentence features (B, D').

        Raises:
            ValueError: A token is outside the vocabulary, a caption has no real token, padding precedes one, or there
                are more tokens than positions of the model. What depends on values is checked on a CPU only.
        """
        owner = "TextEncoderAdapter"
        if not isinstance(tokens, Tensor):
            raise ValueError(
                f"{owner}: tokens must be a tensor of ids (B, L), but they are a {type(tokens).__name__}; its method "
                "`encode` turns captions into tokens and a word_mask."
            )
        check_tokens(owner, tokens, self.vocabulary_size)
        word_mask = check_word_mask(owner, tokens, word_mask, may_stall=False)
        if self._positions is not None and tokens.shape[1] > self._positions:
            raise ValueError(
                f"{owner}: tokens are {shape_of(tokens)}, but the model has {self._positions} positions; truncate the "
                "captions, as `encode` does."
            )
        self._keep_frozen()
        if word_mask is not None:
            check_padding_is_last(owner, word_mask)
            # CLIP finds its end token by its id, and SigLIP attends to padding: it must not hold other ids.
            tokens = tokens.masked_fill(~word_mask, self._pad_id)
        words, pooled = self._read(tokens, word_mask)
        return TextFeatures(
            zero_padding(words, word_mask), pool(self.sentence_kind, words, pooled, self.projection, word_mask)
        )

    def _read(self, tokens: Tensor, word_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Run the model: words (B, L, D), arbitrary at padding, and its pooled output (B, D), if it has one."""
        length = tokens.shape[1]
        if self._attends_to_padding:
            word_mask = None
            tokens = F.pad(tokens, (0, cast(int, self._positions) - length), value=self._pad_id)
        output = self.model(input_ids=tokens, attention_mask=None if word_mask is None else word_mask.long())
        return output.last_hidden_state[:, :length], getattr(output, "pooler_output", None)

    def _measure(self, owner: str) -> tuple[Tensor, Tensor | None]:
        tokens = torch.zeros(1, 2, dtype=torch.long, device=example_of(self.model).device)
        name = type(self.model).__name__
        try:
            words, pooled = self._read(tokens, None)
        except FAILURES as error:
            raise ValueError(
                f"{owner}: model must be a text encoder that takes `input_ids` and `attention_mask` and returns "
                f"`last_hidden_state`, such as the one inside a model with a head, but {name} failed on two tokens: "
                f"{error}"
            ) from error
        if words.shape[:-1] != tokens.shape or not words.is_floating_point():
            raise ValueError(
                f"{owner}: the last_hidden_state of {name} must be floats (B, L, D), but of two tokens (1, 2) it is "
                f"{words.dtype} {shape_of(words)}."
            )
        if pooled is not None and (not isinstance(pooled, Tensor) or pooled.ndim != 2 or len(pooled) != 1):
            came = shape_of(pooled) if isinstance(pooled, Tensor) else f"of the type {type(pooled).__name__}"
            raise ValueError(f"{owner}: the pooler_output of {name} must be (B, D), but of one caption it is {came}.")
        if not words.is_meta and not bool(words.isfinite().all()):
            raise ValueError(
                f"{owner}: the features that {name} computes of two tokens are not all finite; its weights are "
                "damaged, or not yet loaded, or its precision is too low."
            )
        return words, pooled


def _check_text_encoder(owner: str, model: nn.Module) -> None:
    arguments, name = arguments_of(model), type(model).__name__
    if "pixel_values" in arguments:
        raise ValueError(
            f"{owner}: model must be a text encoder, but {name} takes `pixel_values`; for an image encoder, use "
            "image_encoder_from."
        )
    if "decoder_input_ids" in arguments:
        raise ValueError(
            f"{owner}: model must be a text encoder, but {name} also has a decoder; pass its encoder, such as a "
            "T5EncoderModel or model.get_encoder()."
        )


def _pad_id_of(owner: str, tokenizer: Any) -> int:
    pad_id = getattr(tokenizer, "pad_token_id", None)
    if not callable(tokenizer) or not isinstance(pad_id, int):
        raise ValueError(
            f"{owner}: the tokenizer {type(tokenizer).__name__} has no pad token, without which captions of different "
            "lengths make no batch; set one, such as tokenizer.pad_token = tokenizer.eos_token."
        )
    return pad_id
