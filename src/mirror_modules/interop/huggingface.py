"""Hugging Face's captioners and vision-language models as captioners: images in [-1, 1] with gradient, aligned logits.

Shapes: B captions, L tokens, P prompt tokens, V token ids.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from mirror_modules._checks import check_word_mask, shape_of
from mirror_modules._typing import TypedCall
from mirror_modules.interop.adapters import check_padding_is_last, example_of
from mirror_modules.interop.pixels import Preprocess

# What a processor returns for a prompt with one image; anything else, such as sizes of tiles, would be needed per
# image.
_KNOWN_INPUTS = {"input_ids", "attention_mask", "pixel_values", "token_type_ids", "mm_token_type_ids", "labels"}


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
    kind: type[_Family] = _FAMILIES.get(cast(Any, model).config.model_type, _Placeholder)
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

    def __init__(self, model: nn.Module, tokenizer: Any, preprocess: Preprocess, family: _Family) -> None:
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


class _Family(Protocol):
    """What differs between the kinds of models.

    The model is an argument, not an attribute, so that replacing or replicating that of the captioner takes effect.
    """

    end: list[int]
    """Token ids that end a caption."""

    def __init__(self, model: Any, processor: Any, tokenizer: Any, prompt: str | None) -> None: ...

    def encode_images(self, model: Any, pixels: Tensor) -> Tensor:
        """What depends on the images alone."""
        ...

    def logits(self, model: Any, encoded: Tensor, tokens: Tensor, word_mask: Tensor, answer: Tensor | None) -> Tensor:
        """Logits (B, L, V) of tokens (B, L), of which row k belongs to image k mod N."""
        ...

    def question(self, text: str) -> list[int]:
        """Token ids of a question about the image."""
        ...


class _TextPrompt:
    """A start token, then the text of the prompt, then the caption."""

    def __init__(self, model: Any, processor: Any, tokenizer: Any, prompt: str | None) -> None:
        self.tokenizer, self.positions = tokenizer, _positions_of(model)
        start, end = self.special_tokens(model)
        if start is None or end is None:
            kind, setting = ("start", self.start_setting) if start is None else ("end", self.end_setting)
            raise ValueError(f"captioner_from: {type(model).__name__} has no {kind} token; set {setting}.")
        self.end = [end]
        self.start = [start, *(tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else [])]

    start_setting, end_setting = "config.text_config.bos_token_id", "config.text_config.sep_token_id"

    def special_tokens(self, model: Any) -> tuple[int | None, int | None]:
        raise NotImplementedError

    def question(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def inputs(self, tokens: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor]:
        """The start, the prompt and all tokens but the last, which predicts nothing, with their attention mask."""
        start = torch.tensor(self.start, device=tokens.device).expand(tokens.shape[0], -1)
        ids = torch.cat((start, tokens), dim=1)[:, :-1]
        _check_length(ids, tokens, self.positions)
        return ids, torch.cat((torch.ones_like(start), word_mask.long()), dim=1)[:, :-1]


class _Blip(_TextPrompt):
    """A text decoder with cross-attention to the image."""

    def special_tokens(self, model: Any) -> tuple[int | None, int | None]:
        config = model.config.text_config
        return config.bos_token_id, config.sep_token_id

    def encode_images(self, model: Any, pixels: Tensor) -> Tensor:
        return cast(Tensor, model.vision_model(pixel_values=pixels).last_hidden_state)

    def logits(self, model: Any, encoded: Tensor, tokens: Tensor, word_mask: Tensor, answer: Tensor | None) -> Tensor:
        ids, attention_mask = self.inputs(tokens, word_mask)
        output = model.text_decoder(
            input_ids=ids,
            attention_mask=attention_mask,
            encoder_hidden_states=_repeated(encoded, tokens),
            use_cache=False,
        )
        return cast(Tensor, output.logits)[:, -tokens.shape[1] :]


class _Git(_TextPrompt):
    """Tokens of the image, which the model itself repeats for several captions, then those of the text."""

    start_setting, end_setting = "tokenizer.cls_token", "tokenizer.sep_token"

    def special_tokens(self, model: Any) -> tuple[int | None, int | None]:
        return self.tokenizer.cls_token_id, self.tokenizer.sep_token_id

    def encode_images(self, model: Any, pixels: Tensor) -> Tensor:
        return pixels

    def logits(self, model: Any, encoded: Tensor, tokens: Tensor, word_mask: Tensor, answer: Tensor | None) -> Tensor:
        ids, attention_mask = self.inputs(tokens, word_mask)
        output = model(pixel_values=encoded, input_ids=ids, attention_mask=attention_mask, use_cache=False)
        return cast(Tensor, output.logits)[:, -tokens.shape[1] :]


class _EncoderDecoder(_TextPrompt):
    """An image encoder and a text decoder of any kind."""

    start_setting, end_setting = "config.decoder_start_token_id", "config.eos_token_id"

    def special_tokens(self, model: Any) -> tuple[int | None, int | None]:
        config, generation = model.config, getattr(model, "generation_config", None)

        def first(name: str, *more: int | None) -> int | None:
            known = [getattr(each, name, None) for each in (config, generation, config.decoder)]
            return next((value for value in (*known, *more) if isinstance(value, int)), None)

        tokenizer = self.tokenizer
        end = first("eos_token_id", tokenizer.eos_token_id, tokenizer.sep_token_id)
        return first("decoder_start_token_id", config.decoder.bos_token_id, tokenizer.bos_token_id), end

    def encode_images(self, model: Any, pixels: Tensor) -> Tensor:
        return cast(Tensor, model.encoder(pixel_values=pixels).last_hidden_state)

    def logits(self, model: Any, encoded: Tensor, tokens: Tensor, word_mask: Tensor, answer: Tensor | None) -> Tensor:
        ids, attention_mask = self.inputs(tokens, word_mask)
        output = model(
            encoder_outputs=(_repeated(encoded, tokens),),
            decoder_input_ids=ids,
            decoder_attention_mask=attention_mask,
            use_cache=False,
        )
        return cast(Tensor, output.logits)[:, -tokens.shape[1] :]


class _Placeholder:
    """A language model whose prompt holds placeholders that the features of the image replace.

    The whole model runs for each caption, because nothing is known of how it combines image and text.
    """

    def __init__(self, model: Any, processor: Any, tokenizer: Any, prompt: str | None) -> None:
        self.tokenizer, self.processor, self.positions = tokenizer, processor, _positions_of(model)
        image_id = _image_token(model.config)
        self.name, self.model_type = type(_unwrapped(model)).__name__, model.config.model_type
        if image_id is None or not callable(processor) or processor is tokenizer:
            raise ValueError(
                f"captioner_from: {self.name} (model_type {self.model_type!r}) is neither BLIP, GIT nor a "
                "vision-encoder-decoder, and has no image token with a processor that places it; wrap it in a Module "
                "with the contract of RedescriptionLoss."
            )
        self.image_id = image_id
        if getattr(model.config, "use_decoder_only_language_model", True) is False:
            raise ValueError(
                f"captioner_from: the language model of {self.name} is an encoder with a decoder, which is not "
                "supported; use a decoder-only one, such as OPT."
            )
        parameters = inspect.signature(_unwrapped(self.decoder(model)).forward).parameters
        self.takes_types = "token_type_ids" in parameters
        self.keeps_logits = "logits_to_keep" in parameters
        template = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
        self.is_chat = template is not None
        self.default = "Describe the image in one sentence." if self.is_chat else ""
        self.start = self._prompt_ids(self.default if prompt is None else prompt)
        end = tokenizer.eos_token_id
        if end is None:
            raise ValueError(f"captioner_from: the tokenizer of {self.name} has no end token; set tokenizer.eos_token.")
        self.end = [end]

    def decoder(self, model: Any) -> Any:
        """The module that computes the logits."""
        return model

    def encode_images(self, model: Any, pixels: Tensor) -> Tensor:
        return pixels

    def image_and_text(self, model: Any, encoded: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """The inputs of the decoder that hold one encoded image for each row of ids."""
        return {"pixel_values": encoded, "input_ids": ids}

    def question(self, text: str) -> list[int]:
        """The whole prompt with its placeholders, in place of the usual one."""
        return self._prompt_ids(text)

    def logits(self, model: Any, encoded: Tensor, tokens: Tensor, word_mask: Tensor, answer: Tensor | None) -> Tensor:
        has_prompt = bool(tokens[:1].eq(self.image_id).any())
        count = 0 if has_prompt else len(self.start)
        start = torch.tensor(self.start, device=tokens.device, dtype=tokens.dtype)[:count].expand(len(tokens), -1)
        ids = torch.cat((start, tokens), dim=1)[:, :-1]
        _check_length(ids, tokens, self.positions)
        attention_mask = torch.cat((torch.ones_like(start), word_mask.long()), dim=1)[:, :-1]
        options: dict[str, Any] = {}
        kept = min(tokens.shape[1], ids.shape[1])
        if self.keeps_logits:
            # The logits of hundreds of image tokens are not computed.
            options["logits_to_keep"] = kept
        inputs = self.image_and_text(model, _repeated(encoded, tokens), ids)
        if self.takes_types and self.model_type == "paligemma":
            if has_prompt and answer is None:
                raise ValueError(
                    f"HuggingFaceCaptioner: the attention of {self.name} is bidirectional in the prompt, which the "
                    "tokens contain; pass the third part of `encode_answer` as answer=..."
                )
            # 0 is the prompt, in which attention is bidirectional.
            types = torch.cat((torch.zeros_like(start), torch.ones_like(tokens)), dim=1) if answer is None else answer
            options["token_type_ids"] = types[:, :-1].long()
        elif self.takes_types:
            # As for Gemma 3: attention is bidirectional within the image.
            options["token_type_ids"] = (ids == self.image_id).long()
        output = self.decoder(model)(**inputs, attention_mask=attention_mask, use_cache=False, **options)
        logits = cast(Tensor, output.logits)[:, -kept:]
        if kept == tokens.shape[1]:
            return logits
        # Nothing predicts the first token of a prompt that begins the row.
        return torch.cat((logits.new_zeros(logits.shape[0], 1, logits.shape[2]), logits), dim=1)

    def _prompt_ids(self, text: str) -> list[int]:
        if self.is_chat:
            content = [{"type": "image"}, {"type": "text", "text": text}]
            messages = [{"role": "user", "content": content}]
            text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        elif self.model_type == "paligemma":
            text = f"{self.tokenizer.decode([self.image_id])}{text}"
        blank = np.zeros((64, 64, 3), np.uint8)
        begins = self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)
        inputs = self.processor(
            images=[blank], text=[text], return_tensors="pt", **({"add_special_tokens": False} if begins else {})
        )
        if unknown := sorted(set(inputs) - _KNOWN_INPUTS):
            raise ValueError(
                f"captioner_from: {self.name} needs {', '.join(unknown)} for each image; only pixel_values are "
                "supported."
            )
        ids = [int(token) for token in inputs["input_ids"][0]]
        if self.image_id not in ids:
            raise ValueError(
                f"captioner_from: the prompt {text!r} has no place for the image; {self.name} expects its image token "
                f"in it, {self.tokenizer.decode([self.image_id])!r}."
            )
        return ids


class _ImageFeatures(_Placeholder):
    """Placeholders whose features are computed separately, once per image.

    The model itself still builds its masks and positions from the embeddings and the token types: PaliGemma attends
    bidirectionally in the prompt.
    """

    def encode_images(self, model: Any, pixels: Tensor) -> Tensor:
        features = model.get_image_features(pixels).pooler_output
        # LLaVA lists one tensor per image.
        return features if isinstance(features, Tensor) else torch.stack(tuple(features))

    def image_and_text(self, model: Any, encoded: Tensor, ids: Tensor) -> dict[str, Tensor]:
        is_image = ids == self.image_id
        if bool((is_image.sum(dim=1) != encoded.shape[1]).any()):
            raise ValueError(
                f"HuggingFaceCaptioner: {self.name} has {encoded.shape[1]} features per image, but the "
                f"rows of tokens have {is_image.sum(dim=1).unique().tolist()} places for them; remove image tokens "
                "from captions, and check that processor and model belong together."
            )
        # The id of a placeholder may lie beyond the embeddings.
        embeddings = model.get_input_embeddings()(ids.masked_fill(is_image, 0))
        return {"inputs_embeds": embeddings.masked_scatter(is_image.unsqueeze(2), encoded.to(embeddings))}


class _Blip2(_ImageFeatures):
    """The model itself would not run without pixels; all that it does with the embeddings is to pass them on."""

    def decoder(self, model: Any) -> Any:
        return model.language_model


_FAMILIES: dict[str, type[_Family]] = {
    "blip": _Blip,
    "git": _Git,
    "vision-encoder-decoder": _EncoderDecoder,
    "blip-2": _Blip2,
    "llava": _ImageFeatures,
    "paligemma": _ImageFeatures,
}


def _unwrapped(model: Any) -> Any:
    """The model inside wrappers that hide the arguments of its forward: compiled models, and those of PEFT."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def _positions_of(model: Any) -> int | None:
    """The number of positions of the text decoder, or None if its configuration has none."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def _check_length(ids: Tensor, tokens: Tensor, positions: int | None) -> None:
    if positions is not None and ids.shape[1] > positions:
        raise ValueError(
            f"HuggingFaceCaptioner: tokens are {shape_of(tokens)} and need {ids.shape[1]} positions with the prompt, "
            f"but the model has {positions}; shorten the captions."
        )


def _image_token(config: Any) -> int | None:
    for name in ("image_token_id", "image_token_index"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    return None


def _repeated(encoded: Tensor, tokens: Tensor) -> Tensor:
    """N encoded images for a multiple of N captions: row k belongs to image k mod N."""
    images, captions = encoded.shape[0], tokens.shape[0]
    if images == captions:
        return encoded
    if images == 0 or captions % images:
        raise ValueError(
            f"HuggingFaceCaptioner: {captions} captions for {images} images; the number must be the same, or a "
            f"multiple."
        )
    return encoded.repeat(captions // images, *[1] * (encoded.ndim - 1))


def _as_list(owner: str, texts: str | Sequence[str]) -> list[str]:
    listed = [texts] if isinstance(texts, str) else list(texts) if isinstance(texts, Iterable) else []
    if not listed or not all(isinstance(text, str) for text in listed):
        raise ValueError(f"HuggingFaceCaptioner.{owner}: pass one string or several, but it is {texts!r}.")
    return listed
