"""Metrics of text-to-image models, on the features of any extractor, and of captions."""

from mirror_modules.metrics.box_overlap import box_overlap
from mirror_modules.metrics.class_oracle import class_oracle
from mirror_modules.metrics.clip_score import clip_score
from mirror_modules.metrics.diversity import Diversity, diversity
from mirror_modules.metrics.expected_hits import expected_hits
from mirror_modules.metrics.frechet_distance import frechet_distance
from mirror_modules.metrics.inception_score import InceptionScore, inception_score
from mirror_modules.metrics.kernel_distance import KernelDistance, kernel_distance
from mirror_modules.metrics.other_captions import other_captions
from mirror_modules.metrics.r_precision import RPrecision, RPrecisionFolds, r_precision, r_precision_folds
from mirror_modules.metrics.redescription_quality import RedescriptionQuality, redescription_quality, words_in_place

__all__ = [
    "Diversity",
    "InceptionScore",
    "KernelDistance",
    "RPrecision",
    "RPrecisionFolds",
    "RedescriptionQuality",
    "box_overlap",
    "class_oracle",
    "clip_score",
    "diversity",
    "expected_hits",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "other_captions",
    "r_precision",
    "r_precision_folds",
    "redescription_quality",
    "words_in_place",
]
