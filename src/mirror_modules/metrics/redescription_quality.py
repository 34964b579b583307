"""Redescription quality: how close is a description of a generated image to the caption behind it?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import NamedTuple

from mirror_modules.stem.vocabulary import split_words


class RedescriptionQuality(NamedTuple):
    """Similarity of descriptions and captions, each in [0, 1]."""

    bleu4: float
    """Geometric mean of the precisions of word n-grams, n = 1 to 4, times the brevity penalty."""
    chrf: float
    """F-score of character n-grams, n = 1 to 6, in which recall counts twice."""
    words_in_place: float
    """Fraction of the captions' words that appear at the same position in the description."""


def words_in_place(descriptions: Iterable[str], captions: Iterable[str]) -> float:
    """Compute the fraction of the captions' words that the descriptions repeat at the same position.

        fraction = sum_n |{ t < L_n : description_n[t] = caption_n[t] }| / sum_n L_n,    L_n words in caption n

    Words are those of `Vocabulary`: lower case, without punctuation. The words that a short description lacks count as
    missed; words beyond the end of the caption have no effect; an inserted word shifts all that follow.

    Args:
        descriptions: A description of each image; may be empty.
        captions: The caption that each image was generated from.

    Returns:
        The fraction, in [0, 1]. Long captions weigh more than short ones.

    Raises:
        ValueError: Not two lists of strings of the same length, or a caption contains no word.

    Examples:
        >>> from mirror_modules.functional import words_in_place
        >>> words_in_place(["A large red flower."], ["a small red flower"])
        0.75
        >>> words_in_place(["a very small red flower"], ["a small red flower"])
        0.25
    """
    described, references = _split("words_in_place", descriptions, captions)
    return _fraction_in_place(described, references)


def redescription_quality(descriptions: Iterable[str], captions: Iterable[str]) -> RedescriptionQuality:
    """Compare descriptions of images with the captions that the images were generated from (MirrorGAN, Sec. 3.3).

        bleu4 = min(1, exp(1 - r/d)) (p_1 p_2 p_3 p_4)^(1/4),    chrf = 5 P R / (4 P + R)

    p_k is the precision of the descriptions' word k-grams, d and r are the numbers of words in all descriptions and
    captions (Papineni et al., 2002); P and R are precision and recall of character n-grams, averaged over lengths 1 to
    6 (Popović, 2015). Both are corpus scores and computed by sacrebleu, on words split as `Vocabulary` splits them.

    Args:
        descriptions: A description of each image; may be empty.
        captions: The caption that each image was generated from: one reference each.

    Returns:
        BLEU-4, not smoothed, so that it is 0 where no four words in a row agree; chrF; `words_in_place`.

    Raises:
        ValueError: Not two lists of strings of the same length, or a caption contains no word.
        ImportError: sacrebleu is not installed.

    Examples:
        >>> from mirror_modules.functional import redescription_quality
        >>> redescription_quality(["a small red flower"], ["A small red flower."])
        RedescriptionQuality(bleu4=1.0, chrf=1.0, words_in_place=1.0)
        >>> redescription_quality(["a red small flower"], ["a small red flower"]).words_in_place
        0.5
    """
    described, references = _split("redescription_quality", descriptions, captions)
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise ImportError("redescription_quality needs more packages: pip install 'mirror-modules[train]'") from error
    lines, reference_lines = ([" ".join(words) for words in texts] for texts in (described, references))
    # The words are split already; `force` only silences a warning about that.
    bleu = BLEU(tokenize="none", smooth_method="none", force=True).corpus_score(lines, [reference_lines])
    chrf = CHRF(char_order=6, word_order=0, beta=2).corpus_score(lines, [reference_lines])
    # sacrebleu scores in percent, and rounding in its logarithms may exceed 100.
    return RedescriptionQuality(
        min(1.0, bleu.score / 100), min(1.0, chrf.score / 100), _fraction_in_place(described, references)
    )


def _fraction_in_place(described: list[list[str]], references: list[list[str]]) -> float:
    correct = sum(word == other for words, others in zip(described, references) for word, other in zip(words, others))
    return correct / sum(map(len, references))


def _split(owner: str, descriptions: Iterable[str], captions: Iterable[str]) -> tuple[list[list[str]], list[list[str]]]:
    descriptions = _as_list(owner, "descriptions", descriptions)
    captions = _as_list(owner, "captions", captions)
    if not captions or len(descriptions) != len(captions):
        raise ValueError(
            f"{owner}: there must be one description per caption, and at least one caption, but there are "
            f"{len(descriptions)} descriptions and {len(captions)} captions."
        )
    references = [split_words(caption) for caption in captions]
    for i, words in enumerate(references):
        if not words:
            raise ValueError(f"{owner}: caption {i} ({captions[i]!r}) contains no word; remove it.")
    return [split_words(description) for description in descriptions], references


def _as_list(owner: str, name: str, texts: Iterable[str]) -> list[str]:
    # A set has no order, and a dictionary would yield its keys.
    is_list = not isinstance(texts, str | Set | Mapping)
    try:
        entries = iter(texts)
    except TypeError:
        is_list = False
    listed = list(entries) if is_list else []
    if not is_list or not all(isinstance(text, str) for text in listed):
        raise ValueError(f"{owner}: {name} must be a list of strings, one for each image; wrap a single one.")
    return listed
