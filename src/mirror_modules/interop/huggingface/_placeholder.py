"""Models with placeholders for the image in their prompt: PaliGemma, LLaVA, Gemma 3, BLIP-2 and others."""

from __future__ import annotations

import inspect
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from mirror_modules.interop.huggingface._family import check_length, positions_of, repeated

# What a processor returns for a prompt with one image; anything else, such as sizes of tiles, would be needed per
# image.
_KNOWN_INPUTS = {"input_ids", "attention_mask", "pixel_values", "token_type_ids", "mm_token_type_ids", "labels"}


class Placeholder:
    """A language model whose prompt holds placeholders that the features of the image replace.

    The whole model runs for each caption, because nothing is known of how it combines image and text.
    """

    def __init__(self, model: Any, processor: Any, tokenizer: Any, prompt: str | None) -> None:
        self.tokenizer, self.processor, self.positions = tokenizer, processor, positions_of(model)
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
        check_length(ids, tokens, self.positions)
        attention_mask = torch.cat((torch.ones_like(start), word_mask.long()), dim=1)[:, :-1]
        options: dict[str, Any] = {}
        kept = min(tokens.shape[1], ids.shape[1])
        if self.keeps_logits:
            # The logits of hundreds of image tokens are not computed.
            options["logits_to_keep"] = kept
        inputs = self.image_and_text(model, repeated(encoded, tokens), ids)
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


class SeparateFeatures(Placeholder):
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


class Blip2(SeparateFeatures):
    """The model itself would not run without pixels; all that it does with the embeddings is to pass them on."""

    def decoder(self, model: Any) -> Any:
        return model.language_model


def _unwrapped(model: Any) -> Any:
    """The model inside wrappers that hide the arguments of its forward: compiled models, and those of PEFT."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def _image_token(config: Any) -> int | None:
    for name in ("image_token_id", "image_token_index"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    return None
