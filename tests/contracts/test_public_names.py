"""The public face: a name that comes or goes must do so here too."""

from pathlib import Path

import mirror_modules
from mirror_modules import functional

ROOT = Path(__file__).parents[2]

PUBLIC_NAMES = [
    "Captioner",
    "CascadedGenerator",
    "Condition",
    "ConditioningAugmentation",
    "GeneratedImages",
    "GlobalLocalAttention",
    "GlobalLocalContext",
    "ImageEncoder",
    "ImageFeatures",
    "MatchingLoss",
    "MatchingTerms",
    "MirrorGAN",
    "MirrorGANConfig",
    "PairedDiscriminator",
    "PairedLogits",
    "RedescriptionLoss",
    "TextEncoder",
    "TextFeatures",
    "Vocabulary",
    "functional",
]
FUNCTIONS = [
    "balance_gradients",
    "discriminator_loss",
    "diversity",
    "explain",
    "frechet_distance",
    "generator_loss",
    "global_local_attention",
    "inception_score",
    "kernel_distance",
    "kl_divergence",
    "matching_loss",
    "r1_penalty",
    "r_precision",
    "r_precision_folds",
    "redescription_loss",
    "sentence_attention",
    "word_attention",
    "word_region_similarity",
]


def test_the_package_exports_these_names():
    assert mirror_modules.__all__ == PUBLIC_NAMES
    assert all(hasattr(mirror_modules, name) for name in PUBLIC_NAMES)


def test_functional_exports_these_functions():
    assert functional.__all__ == FUNCTIONS
    assert all(callable(getattr(functional, name)) for name in FUNCTIONS)


def test_functions_say_what_comes_out_and_what_may_be_raised():
    for name in FUNCTIONS:
        docstring = getattr(functional, name).__doc__
        for section in ("Args:", "Returns:", "Raises:"):
            assert section in docstring, f"{name} has no section {section}"


def test_the_documentation_mentions_every_name():
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md"))
    assert [name for name in PUBLIC_NAMES + FUNCTIONS if name not in pages] == []


def test_the_changelog_knows_this_version():
    assert f"## [{mirror_modules.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_package_is_typed():
    assert Path(mirror_modules.__file__).with_name("py.typed").exists()
