"""Models whose text decoder sees the image from outside the text: BLIP, GIT and vision-encoder-decoder models."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from mirror_modules.interop.huggingface._family import check_length, positions_of, repeated


class TextPrompt:
    """A start token, then the text of the prompt, then the caption."""

    def __init__(self, model: Any, processor: Any, tokenizer: Any, prompt: str | None) -> None:
        self.tokenizer, self.positions = tokenizer, positions_of(model)
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
        check_length(ids, tokens, self.positions)
        return ids, torch.cat((torch.ones_like(start), word_mask.long()), dim=1)[:, :-1]


class Blip(TextPrompt):
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
            encoder_hidden_states=repeated(encoded, tokens),
            use_cache=False,
        )
        return cast(Tensor, output.logits)[:, -tokens.shape[1] :]


class Git(TextPrompt):
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


class EncoderDecoder(TextPrompt):
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
            encoder_outputs=(repeated(encoded, tokens),),
            decoder_input_ids=ids,
            decoder_attention_mask=attention_mask,
            use_cache=False,
        )
        return cast(Tensor, output.logits)[:, -tokens.shape[1] :]
