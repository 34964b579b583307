"""Checkpoints of CLIP and SigLIP, by folder or by name, as encoders of images and captions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from mirror_modules.interop.adapters import Pooling
from mirror_modules.interop.image_encoders import ImageEncoderAdapter, image_encoder_from
from mirror_modules.interop.text_encoders import TextEncoderAdapter, text_encoder_from

COMPARED: dict[str, Pooling] = {"clip": "projection", "siglip": "pooled"}
"""For each model type of transformers, the output of both towers whose cosine it was trained with."""


class ClipEncoders(NamedTuple):
    """The two towers of CLIP or SigLIP, frozen; the cosine of their global features compares images and captions."""

    image_encoder: ImageEncoderAdapter
    """Images (B, 3, H, W) in [-1, 1], of any size -> regions and image."""
    text_encoder: TextEncoderAdapter
    """Tokens and word_mask of its own method `encode` -> words and sentence."""


def load_clip(checkpoint: str, *, device: str = "cpu") -> ClipEncoders:
    """Load a checkpoint of CLIP or SigLIP.

    Args:
        checkpoint: A folder with the model, its tokenizer and its image processor, as `save_pretrained` of transformers
            writes them, from which nothing is downloaded; or the name of a model on the Hugging Face Hub, which is
            downloaded unless it is cached.
        device: "cpu" or "cuda".

    Raises:
        ImportError: transformers, or a package that the tokenizer needs, is missing.
        OSError: There is no such folder or model, or a file is missing from it or cannot be downloaded.
        ValueError: It is a model of another type, a file is damaged, weights or tokens of the tokenizer are missing, or
            its preprocessing is not supported.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"clip={checkpoint} needs transformers: pip install 'mirror-modules[hf]'") from error
    options = {"local_files_only": Path(checkpoint).is_dir()}
    with _errors_of(checkpoint):
        kind = transformers.AutoConfig.from_pretrained(checkpoint, **options).model_type
    if kind not in COMPARED:
        raise ValueError(
            f"clip={checkpoint} is a model of type {kind!r}, but only {' and '.join(map(repr, COMPARED))} compare an "
            "image with a caption by the cosine of their features; name a checkpoint of one of these."
        )
    with _errors_of(checkpoint):
        model, loaded = transformers.AutoModel.from_pretrained(
            checkpoint, dtype=torch.float32, output_loading_info=True, **options
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint, **options)
        image_processor = transformers.AutoImageProcessor.from_pretrained(checkpoint, **options)
    # transformers initializes missing weights at random, and makes an empty tokenizer if its files are missing.
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(
            f"clip={checkpoint} lacks {len(missing)} weights of a {type(model).__name__}, such as {missing[0]!r}; "
            "name a checkpoint with both its image and its text tower."
        )
    if 2 * len(tokenizer) < (size := model.config.text_config.vocab_size):
        raise ValueError(
            f"clip={checkpoint} has a tokenizer of {len(tokenizer)} tokens for a model of {size}; add the files of "
            "the tokenizer, which its save_pretrained writes."
        )
    with _errors_of(checkpoint):
        return ClipEncoders(
            image_encoder_from(model, image_processor, image=COMPARED[kind]).to(device),
            text_encoder_from(model, tokenizer, sentence=COMPARED[kind]).to(device),
        )


@contextmanager
def _errors_of(checkpoint: str) -> Iterator[None]:
    """Name the argument and the checkpoint in the errors of transformers and of the adapters."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # A damaged or foreign file may raise any exception, and those of the Hub are built from other arguments.
        kind = next((kind for kind in (ImportError, OSError) if isinstance(error, kind)), ValueError)
        raise kind(
            f"clip={checkpoint} cannot be loaded ({' '.join(str(error).split())[:300]}); give a folder with a model "
            "of CLIP or SigLIP, its tokenizer and its image processor, or the name of one on the Hugging Face Hub."
        ) from error
