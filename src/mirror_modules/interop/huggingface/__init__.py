"""Captioners and vision-language models of Hugging Face as captioners of the redescription loss and score."""

from mirror_modules.interop.huggingface.captioner import HuggingFaceCaptioner, captioner_from

__all__ = ["HuggingFaceCaptioner", "captioner_from"]
