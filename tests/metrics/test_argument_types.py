"""An argument of a wrong type is a ValueError of the metric that names the argument."""

import numpy as np
import pytest
import torch

from mirror_modules import functional

N, D = 11, 3
FEATURES = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
IDS, CAPTIONS, RANDOM = torch.arange(N), ["a red flower"] * 2, torch.Generator()
PAIRS = {"images": FEATURES, "sentences": FEATURES}
SETS = {"features_a": FEATURES, "features_b": FEATURES}
DRAWN = {**PAIRS, "class_ids": IDS, "image_ids": IDS, "candidates": 5, "generator": RANDOM}
TEXTS = {"descriptions": CAPTIONS, "captions": CAPTIONS}
ARGUMENTS = {
    "class_oracle": {"class_ids": IDS, "image_ids": IDS, "candidates": 5},
    "clip_score": {"images": FEATURES, "captions": FEATURES, "scale": 2.5},
    "diversity": {"features": torch.ones(2, N, D)},
    "expected_hits": {**PAIRS, "class_ids": IDS, "image_ids": IDS, "candidates": 5},
    "frechet_distance": SETS,
    "inception_score": {"predictions": FEATURES, "kind": "logits", "splits": 2, "generator": RANDOM},
    "kernel_distance": {
        **SETS,
        "kernel": "rbf",
        "bandwidth": 10.0,
        "estimate": "biased",
        "scale": 1000,
        "subsets": 2,
        "subset_size": 5,
        "generator": RANDOM,
    },
    "other_captions": {"sentences": FEATURES, "image_ids": torch.zeros(N)},
    "r_precision": DRAWN,
    "r_precision_folds": {**DRAWN, "folds": 2},
    "redescription_quality": TEXTS,
    "words_in_place": TEXTS,
}
OPTIONAL = ("class_ids", "image_ids", "generator", "bandwidth", "subset_size")
REQUIRED = (("class_oracle", "class_ids"), ("other_captions", "image_ids"))
NUMBERS = ("bandwidth", "scale")
WRONG = [None, "text", 1.5, True, object(), {"a": 1}, {1, 2}, np.random.default_rng(0), FEATURES.to_sparse()]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: type(wrong).__name__)
@pytest.mark.parametrize(("metric", "name"), [(metric, name) for metric, names in ARGUMENTS.items() for name in names])
def test_wrong_types_are_named(metric, name, wrong):
    function = getattr(functional, metric)
    is_optional = name in OPTIONAL and (metric, name) not in REQUIRED
    if (wrong is None and is_optional) or (isinstance(wrong, float) and name in NUMBERS):
        function(**{**ARGUMENTS[metric], name: wrong})
        return
    with pytest.raises(ValueError, match=f"^{metric}: .*{name}"):
        function(**{**ARGUMENTS[metric], name: wrong})


def test_a_seed_is_no_generator():
    with pytest.raises(
        ValueError, match=r"generator must be a torch\.Generator or None, but it is a int; .* makes one"
    ):
        functional.kernel_distance(FEATURES, FEATURES, subset_size=5, generator=0)
