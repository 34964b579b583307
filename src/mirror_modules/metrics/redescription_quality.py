"""Redescription quality: how close is what a captioner reads in an image to the caption it was drawn from?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from mirror_modules.stem.vocabulary import split_words


class RedescriptionQuality(NamedTuple):
    """How close descriptions are to captions, each in [0, 1]."""

    bleu4: float
    """Geometric mean of the precisions of 1 to 4 words in a row, times the brevity penalty."""
    chrf: float
    """F-score of 1 to 6 letters in a row, in which recall counts twice."""
    words_in_place: float
    """Share of the captions' words that stand at the same place of the description."""


def words_in_place(descriptions: Iterable[str], captions: Iterable[str]) -> float:
    """Share of the captions' words that the descriptions repeat at the same place.

        share = sum_n |{ t < L_n : description_n[t] = caption_n[t] }| / sum_n L_n,    L_n words in caption n

    Words are those of `Vocabulary`: lower case, without punctuation. A description that ends early misses the words it
    lacks; words beyond the caption's end neither help nor harm; one word inserted shifts all that follow.

    Args:
        descriptions: What was read in each image; may be without words.
        captions: What each image was drawn from.

    Returns:
        The share, in [0, 1]. Long captions weigh more than short ones.

    Raises:
        ValueError: Not two lists of strings of the same length, or a caption holds no word.
    """
    described, wanted = _split("words_in_place", descriptions, captions)
    return _share_in_place(described, wanted)


def redescription_quality(descriptions: Iterable[str], captions: Iterable[str]) -> RedescriptionQuality:
    """Compare descriptions with the captions that the images were drawn from (MirrorGAN, Sec. 3.3).

        bleu4 = min(1, exp(1 - r/d)) (p_1 p_2 p_3 p_4)^(1/4),    chrf = 5 P R / (4 P + R)

    p_k is the share of the descriptions' rows of k words that the caption has, d and r are the numbers of words in all
    descriptions and captions (Papineni et al., 2002); P and R are precision and recall of rows of letters, averaged
    over lengths 1 to 6 (Popović, 2015). Both count over the whole list and are sacrebleu's, on words split as
    `Vocabulary` splits them.

    Args:
        descriptions: What was read in each image; may be without words.
        captions: What each image was drawn from: one reference for each.

    Returns:
        BLEU-4, not smoothed, so that it is 0 where no four words in a row agree; chrF; `words_in_place`.

    Raises:
        ValueError: Not two lists of strings of the same length, or a caption holds no word.
        ImportError: sacrebleu is not installed.
    """
    described, wanted = _split("redescription_quality", descriptions, captions)
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise ImportError("redescription_quality needs more packages: pip install 'mirror-modules[train]'") from error
    lines, references = [" ".join(words) for words in described], [[" ".join(words) for words in wanted]]
    # The words are split already. `force` only silences a warning about that.
    bleu = BLEU(tokenize="none", smooth_method="none", force=True).corpus_score(lines, references)
    chrf = CHRF(char_order=6, word_order=0, beta=2).corpus_score(lines, references)
    # sacrebleu counts in percent, and its logarithms may end a digit above.
    return RedescriptionQuality(
        min(1.0, bleu.score / 100), min(1.0, chrf.score / 100), _share_in_place(described, wanted)
    )


def _share_in_place(described: list[list[str]], wanted: list[list[str]]) -> float:
    right = sum(word == other for words, others in zip(described, wanted) for word, other in zip(words, others))
    return right / sum(map(len, wanted))


def _split(owner: str, descriptions: Iterable[str], captions: Iterable[str]) -> tuple[list[list[str]], list[list[str]]]:
    descriptions = _listed(owner, "descriptions", descriptions)
    captions = _listed(owner, "captions", captions)
    if not captions or len(descriptions) != len(captions):
        raise ValueError(
            f"{owner}: descriptions and captions must be as many, at least one, but there are {len(descriptions)} and "
            f"{len(captions)}."
        )
    wanted = [split_words(caption) for caption in captions]
    for i, words in enumerate(wanted):
        if not words:
            raise ValueError(f"{owner}: caption {i} ({captions[i]!r}) holds no word to be repeated; leave it out.")
    return [split_words(description) for description in descriptions], wanted


def _listed(owner: str, name: str, texts: Iterable[str]) -> list[str]:
    listed = [] if isinstance(texts, str) else list(texts)
    if isinstance(texts, str) or not all(isinstance(text, str) for text in listed):
        raise ValueError(f"{owner}: {name} must be a list of strings, one for each image; wrap a single one.")
    return listed
