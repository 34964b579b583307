"""Triton kernels as custom operators of torch, and the choice between them and the PyTorch definitions."""

from mirror_modules.kernels.attention import global_local_attention
from mirror_modules.kernels.choice import LARGEST_GAMMA, Choice, Facts, Machine, check_impl, choose, machine_of
from mirror_modules.kernels.similarity import word_region_similarity

__all__ = [
    "LARGEST_GAMMA",
    "Choice",
    "Facts",
    "Machine",
    "check_impl",
    "choose",
    "global_local_attention",
    "machine_of",
    "word_region_similarity",
]
