"""The public names: adding or removing one must show here, and in the API reference."""

import ast
import re
from pathlib import Path

import pytest

import mirror_modules
from mirror_modules import functional
from tests.contracts.public import public_names, public_packages, resolve

ROOT = Path(__file__).parents[2]
API_PAGE = (ROOT / "docs/api.md").read_text(encoding="utf-8")

PUBLIC_NAMES = [
    "AdversarialWeights",
    "BackboneConfig",
    "Captioner",
    "CascadedGenerator",
    "Condition",
    "ConditioningAugmentation",
    "DeconvolutionGenerator",
    "DenoisingAutoencoder",
    "GeneratedImages",
    "GlamBlock",
    "GlobalLocalAttention",
    "GlobalLocalContext",
    "ImageEncoder",
    "ImageFeatures",
    "ImageRefinementStage",
    "KeypointDiscriminator",
    "KeypointGate",
    "KeypointGenerator",
    "KeypointImageDiscriminator",
    "KeypointImageGenerator",
    "KeypointMaps",
    "LatentSampler",
    "LatentSamples",
    "LocatedDiscriminator",
    "LocatedGenerator",
    "MatchingLoss",
    "MatchingTerms",
    "MirrorGAN",
    "MirrorGANConfig",
    "PairedDiscriminator",
    "PairedLogits",
    "RedescriptionLoss",
    "RedescriptionScore",
    "SentenceProjection",
    "TextEncoder",
    "TextFeatures",
    "TextPlacer",
    "Vocabulary",
    "WordAttention",
    "WordContext",
    "functional",
]
FUNCTIONS = [
    "append_end",
    "balance_gradients",
    "box_overlap",
    "class_oracle",
    "clip_score",
    "color_consistency_loss",
    "complete_keypoints",
    "contrastive_terms",
    "crop_box",
    "discriminator_loss",
    "diversity",
    "expected_hits",
    "explain",
    "frechet_distance",
    "gaussian_prior",
    "generator_loss",
    "global_local_attention",
    "image_information",
    "image_sentence_similarity",
    "inception_score",
    "interpolate_sentences",
    "kernel_distance",
    "keypoint_gate",
    "keypoint_maps",
    "kl_divergence",
    "latent_step",
    "matching_loss",
    "mismatch",
    "mode_seeking_loss",
    "other_captions",
    "place_in_box",
    "r1_penalty",
    "r_precision",
    "r_precision_folds",
    "redescription_loss",
    "redescription_quality",
    "sentence_attention",
    "word_attention",
    "word_region_attention",
    "word_region_similarity",
    "words_in_place",
]
PARTS = ["adversarial", "glam", "metrics", "stem", "stream"]


def documented_paths(page: str) -> set[str]:
    """The identifiers that mkdocstrings renders on a page: those of its `:::` lines and of their lists of members."""
    paths = set()
    for block in re.split(r"^::: ", page, flags=re.MULTILINE)[1:]:
        path, _, options = block.partition("\n")
        paths.add(path.strip())
        paths |= {f"{path.strip()}.{member}" for member in re.findall(r"^ +- (\w+)$", options, re.MULTILINE)}
    return paths


def undocumented(package: str, page: str) -> list[str]:
    """Public names of a package that are not on a page, under this path or under another path to the same object."""
    paths = documented_paths(page)
    objects = {id(resolve(path)) for path in paths if callable(resolve(path))}
    missing = [path for path in public_names(package) if path not in paths and id(resolve(path)) not in objects]
    # Prose may document a constant: mkdocstrings renders none that shares its assignment with others.
    return [path for path in missing if callable(resolve(path)) or f"`{path}`" not in page]


def test_the_package_exports_these_names():
    assert mirror_modules.__all__ == PUBLIC_NAMES
    assert all(hasattr(mirror_modules, name) for name in PUBLIC_NAMES)


def test_the_imports_of_type_checkers_are_those_at_run_time():
    tree = ast.parse(Path(mirror_modules.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    shown = {(node.module, alias.name) for node in block.body for alias in node.names}
    packages = {("mirror_modules", package) for package in mirror_modules._EXPORTS}
    names = {
        (f"mirror_modules.{package}", name) for package, names in mirror_modules._EXPORTS.items() for name in names
    }
    assert shown == packages | names
    assert sorted(name for _, name in names) == [name for name in PUBLIC_NAMES if name != "functional"]


def test_functional_exports_these_functions():
    assert functional.__all__ == FUNCTIONS
    assert all(callable(getattr(functional, name)) for name in FUNCTIONS)


def test_functional_exports_every_function_of_the_parts():
    functions = [path for part in PARTS for path in public_names(f"mirror_modules.{part}")]
    functions = [path for path in functions if not isinstance(resolve(path), type) and callable(resolve(path))]
    # These two call functions of the user, which may generate and score with any networks.
    expected = {"mirror_modules.stream.best_of", "mirror_modules.stream.preference_pairs"}
    assert {path for path in functions if path.rpartition(".")[2] not in FUNCTIONS} == expected


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_document_arguments_results_and_errors(name):
    for section in ("Args:", "Returns:", "Raises:"):
        assert section in getattr(functional, name).__doc__, f"{name} has no section {section}"


@pytest.mark.parametrize("package", public_packages())
def test_the_api_reference_has_every_public_name(package):
    assert undocumented(package, API_PAGE) == []


@pytest.mark.parametrize("path", sorted(documented_paths(API_PAGE)))
def test_every_name_of_the_api_reference_exists(path):
    resolve(path)


def test_a_name_missing_from_the_page_is_detected():
    page = API_PAGE.replace("functional.append_end\n", "functional\n").replace("stem.END`", "stem`")
    assert undocumented("mirror_modules.stream", page) == ["mirror_modules.stream.append_end"]
    assert undocumented("mirror_modules.stem", page) == ["mirror_modules.stem.END"]


def test_members_of_a_list_are_documented():
    page = "::: mirror_modules.stem\n    options:\n      members:\n        - PAD\n        - END\n"
    assert documented_paths(page) == {"mirror_modules.stem", "mirror_modules.stem.PAD", "mirror_modules.stem.END"}


def test_the_changelog_has_this_version():
    assert f"## [{mirror_modules.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_package_is_typed():
    assert Path(mirror_modules.__file__).with_name("py.typed").exists()
