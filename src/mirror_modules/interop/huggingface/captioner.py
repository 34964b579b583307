"""Hugging Face's captioners and vision-language models as captioners: images in [-1, 1] with gradient, aligned logits.

Shapes: B captions, L tokens, V token ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mirror_modules._checks import check_padding_is_last, check_word_mask
from mirror_modules._typing import TypedCall
from mirror_modules.interop.adapters import example_of
from mirror_modules.interop.huggingface._family import Family
from mirror_modules.interop.huggingface._placeholder import Blip2, Placeholder, SeparateFeatures
from mirror_modules.interop.huggingface._text_prompt import Blip, EncoderDecoder, Git
from mirror_modules.interop.pixels import Preprocess

_FAMILIES: dict[str, type[Family]] = {
    "blip": Blip,
    "git": Git,
    "vision-encoder-decoder": EncoderDecoder,
    "blip-2": Blip2,
    "llava": SeparateFeatures,
    "paligemma": SeparateFeatures,
}


def captioner_from(
    model: nn.Module, processor: Any, *, image_processor: Any = None, prompt: str | None = None
) -> HuggingFaceCaptioner:
    """Turn a captioner or vision-language model of Hugging Face into one for the redescription loss and score.

        captioner = captioner_from(model, processor)
        score = RedescriptionScore(captioner)
        score(images, ["a small red flower", "a bird with a long beak"])  # images in [-1, 1], with gradient

    Images are resized and normalized as the processor's configuration says, as tensors, so that the gradient reaches
    them. A start token or prompt is added, logits are shifted and cut, so that `logits[:, t]` predicts `tokens[:, t]`,
    and the attention mask hides padding.

    Supported are BLIP, GIT and vision-encoder-decoder models, BLIP-2, and models with placeholders for the image in
    their prompt, such as PaliGemma, LLaVA and Gemma 3, as long as `pixel_values` are (B, 3, H, W). For several captions
    of an image, as in `RedescriptionScore.score_matrix`, all those named here but Gemma 3 encode it once; other models
    with placeholders encode it for each caption.

    Args:
        model: The model, loaded by its own `from_pretrained`. Its precision and device stay as they are.
        processor: Its processor; or its tokenizer, together with `image_processor`.
        image_processor: The image processor, if `processor` is a tokenizer.
        prompt: Text before the caption, which is tokenized apart from it. For models with a chat template it is the
            user's message, by default "Describe the image in one sentence."; for others, what their processor takes as
            text, by default nothing.

    Raises:
        ValueError: The model or its processor is not of a supported kind, or lacks a part, such as an end token.
        ImportError: transformers is missing.

    Examples:
        >>> from mirror_modules.interop import captioner_from
        >>> from transformers import AutoProcessor, BlipForConditionalGeneration  # doctest: +SKIP
        >>> name = "Salesforce/blip-image-captioning-base"
        >>> model = BlipForConditionalGeneration.from_pretrained(name)  # doctest: +SKIP
        >>> captioner = captioner_from(model, AutoProcessor.from_pretrained(name))  # doctest: +SKIP
        >>> tokens, word_mask = captioner.encode(["a small red flower"])  # doctest: +SKIP
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise ValueError(
            f"captioner_from: model must be a model of transformers, but it is a {type(model).__name__}; other "
            "captioners need no adapter: see RedescriptionLoss for their contract."
        )
    tokenizer = getattr(processor, "tokenizer", processor)
    image_processor = image_processor or getattr(processor, "image_processor", None)
    if not callable(tokenizer) or not hasattr(tokenizer, "decode"):
        raise ValueError(
            f"captioner_from: processor has no tokenizer; it is a {type(processor).__name__}. Pass "
            "AutoProcessor.from_pretrained(...), or a tokenizer with image_processor=..."
        )
    if image_processor is None:
        raise ValueError(
            f"captioner_from: {type(processor).__name__} has no image_processor; pass the model's processor, or "
            "image_processor=..."
        )
    kind: type[Family] = _FAMILIES.get(cast(Any, model).config.model_type, Placeholder)
    family = kind(model, processor, tokenizer, prompt)
    return HuggingFaceCaptioner(model, tokenizer, Preprocess.of_processor(image_processor), family)


class HuggingFaceCaptioner(TypedCall, nn.Module):
    """A captioner `(images, tokens, word_mask) -> logits (B, L, V)` around a model; see `captioner_from`.

    Attributes:
        model: The model itself.
        tokenizer: Its tokenizer.
        preprocess: From images in [-1, 1] to its pixels.

    Examples:
        >>> from mirror_modules.interop import captioner_from
        >>> captioner = captioner_from(model, processor)  # doctest: +SKIP
        >>> tokens, word_mask = captioner.encode(["a small red flower", "a blue bird"])  # doctest: +SKIP
        >>> logits = captioner(images, tokens, word_mask)  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, tokenizer: Any, preprocess: Preprocess, family: Family) -> None:
        super().__init__()
        self.model, self.tokenizer, self.preprocess = model, tokenizer, preprocess
        self._family = family

    def encode(self, captions: str | Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode captions as token ids, with the end token, padded on the right.

        Args:
            captions: One string or several.

        Returns:
            Tokens (B, L) and word_mask (B, L), True for a real token.

        Raises:
            ValueError: There is no caption, or one is not a string or has no token.
        """
        rows = [self._ids("encode", caption) + self._family.end for caption in _as_list("encode", captions)]
        tokens, lengths = self._padded(rows)
        return tokens, torch.arange(tokens.shape[1]) < lengths.unsqueeze(1)

    def encode_answer(self, questions: Sequence[str], answer: str) -> tuple[Tensor, Tensor, Tensor]:
        """Encode questions about the image with an answer.

        Args:
            questions: One string or several.
            answer: The answer to all of them.

        Returns:
            Tokens (B, L), word_mask (B, L) and the mask of the answer's tokens, (B, L).

        Raises:
            ValueError: There is no question, or a question or the answer is not a string or has no token.
        """
        prompts = [self._family.question(question) for question in _as_list("encode_answer", questions)]
        answer_ids = self._ids("encode_answer", answer)
        tokens, lengths = self._padded([ids + answer_ids for ids in prompts])
        positions_L, ends_B1 = torch.arange(tokens.shape[1]), lengths.unsqueeze(1)
        is_real = positions_L < ends_B1
        return tokens, is_real, is_real & (positions_L >= ends_B1 - len(answer_ids))

    def decode_text(self, tokens: Tensor) -> list[str]:
        """Decode token ids (B, L) into captions, without special tokens."""
        return [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def encode_images(self, images: Tensor) -> Tensor:
        """Compute all that depends on the images alone, for images in [-1, 1], (N, 3, H, W)."""
        # Not the first parameter: quantized weights are integers.
        pixels = self.preprocess(images).to(example_of(self.model).dtype)
        return self._family.encode_images(self.model, pixels)

    def decode(
        self, encoded: Tensor, tokens: Tensor, word_mask: Tensor | None = None, answer: Tensor | None = None
    ) -> Tensor:
        """Predict each token from the encoded images, the prompt and the tokens before it.

        Args:
            encoded: Images by `encode_images`, N of them.
            tokens: Token ids, (B, L), where B is a multiple of N: row k belongs to image k mod N.
            word_mask: True for a real token, (B, L), real tokens first; None if all are.
            answer: With tokens of `encode_answer`, the mask that it returns, (B, L); None for captions.

        Returns:
            Logits (B, L, V).

        Raises:
            ValueError: Sizes disagree, the model has too few positions for the captions, it needs `answer`, or padding
                precedes a real token, which is checked on a CPU only.
        """
        owner = "HuggingFaceCaptioner"
        if not isinstance(tokens, Tensor):
            raise ValueError(
                f"{owner}: tokens must be a tensor of ids (B, L), but they are a {type(tokens).__name__}; its method "
                "`encode` turns captions into tokens and a word_mask."
            )
        word_mask = check_word_mask(owner, tokens, word_mask, may_stall=False)
        if word_mask is None:
            word_mask = torch.ones_like(tokens, dtype=torch.bool)
        # The prompt precedes the padding, and the last padding would predict the first token.
        check_padding_is_last(owner, word_mask)
        return self._family.logits(self.model, encoded, tokens, word_mask, answer)

    def forward(
        self, images: Tensor, tokens: Tensor, word_mask: Tensor | None = None, answer: Tensor | None = None
    ) -> Tensor:
        """Predict each token of the captions.

        Args:
            images: In [-1, 1], (B, 3, H, W), of any size.
            tokens: Token ids, (B, L), as `encode` gives them.
            word_mask: True for a real token, (B, L), real tokens first; None if all are.
            answer: With tokens of `encode_answer`, the mask that it returns, (B, L); None for captions.

        Returns:
            Logits (B, L, V); `logits[:, t]` predicts `tokens[:, t]`.

        Raises:
            ValueError: See `decode`; or the images are not floats (B, 3, H, W).
        """
        return self.decode(self.encode_images(images), tokens, word_mask, answer)

    def _ids(self, owner: str, text: str) -> list[int]:
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if not ids:
            raise ValueError(f"HuggingFaceCaptioner.{owner}: {text!r} has no token; write at least one word.")
        return ids

    def _padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([len(row) for row in rows])
        pad = self.tokenizer.pad_token_id
        tokens = torch.full((len(rows), int(lengths.max())), 0 if pad is None else pad)
        for row, ids in zip(tokens, rows):
            row[: len(ids)] = torch.tensor(ids)
        return tokens, lengths


def _as_list(owner: str, texts: str | Sequence[str]) -> list[str]:
    listed = [texts] if isinstance(texts, str) else list(texts) if isinstance(texts, Iterable) else []
    if not listed or not all(isinstance(text, str) for text in listed):
        raise ValueError(f"HuggingFaceCaptioner.{owner}: pass one string or several, but it is {texts!r}.")
    return listed
