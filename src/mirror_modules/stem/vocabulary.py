"""Vocabulary shared by STEM's text encoder and STREAM's captioner: captions to token ids and back."""

from __future__ import annotations

import json
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mirror_modules._checks import check_positive, check_tensors, shape_of

PAD = 0
"""Token id of padding."""
END = 1
"""Token id that ends a caption."""
UNKNOWN = 2
"""Token id of every word that the vocabulary lacks."""
SPECIAL_TOKENS = ("<pad>", "<end>", "<unknown>")
FORMAT = "mirror-modules vocabulary 1"
VOCABULARY_FILE = "vocabulary.json"  # its name in a model's folder


def split_words(caption: str) -> list[str]:
    """Split a caption into lower-case words: runs of Unicode letters, combining marks and digits.

    Marks belong to a word because some scripts write vowels as marks. Marks without a letter or a digit, such as those
    of an emoji, are not a word.
    """
    if not isinstance(caption, str):
        raise ValueError(f"a caption must be a string, but one is of the type {type(caption).__name__}.")
    # Compose after lower-casing: some capitals have no composed form although their small letters do.
    normal = unicodedata.normalize("NFC", caption.lower())
    runs = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in normal).split()
    return [run for run in runs if any(unicodedata.category(c)[0] in "LN" for c in run)]


class Vocabulary:
    """Bidirectional map between words and token ids: 0 is padding, 1 the end of a caption, 2 any unknown word.

    Args:
        words: The known words, most important first; ids start at 3.

    Raises:
        ValueError: `words` is one string, or a word is listed twice, or is not a lower-case word.

    Examples:
        >>> from mirror_modules import Vocabulary
        >>> vocabulary = Vocabulary.build(["A small red flower.", "a large blue flower"])
        >>> tokens, word_mask = vocabulary.encode(["a blue flower", "a small red flower"])
        >>> word_mask.tolist()
        [[True, True, True, False], [True, True, True, True]]
        >>> vocabulary.decode(tokens)
        ['a blue flower', 'a small red flower']
    """

    def __init__(self, words: Sequence[str]) -> None:
        if isinstance(words, str):
            raise ValueError("Vocabulary: words must be a list of strings, but it is one string; use Vocabulary.build.")
        self._words = (*SPECIAL_TOKENS, *words)
        self._ids = {word: i for i, word in enumerate(self._words)}
        if len(self._ids) != len(self._words):
            twice = next(word for word, count in Counter(self._words).items() if count > 1)
            raise ValueError(f"Vocabulary: the word {twice!r} is listed twice.")
        for word in words:
            if split_words(word) != [word]:
                raise ValueError(f"Vocabulary: {word!r} is not a lower-case word of letters and digits.")

    @classmethod
    def build(cls, captions: Iterable[str], min_count: int = 1) -> Vocabulary:
        """Collect the words that occur at least `min_count` times, most frequent first, ties in alphabetical order.

        Raises:
            ValueError: No word occurs that often, or `min_count` is not a whole number of at least 1.
        """
        check_positive("Vocabulary.build", min_count=min_count)
        if isinstance(captions, str):
            raise ValueError("Vocabulary.build: captions must be a list of strings, but it is one string.")
        counts = Counter(word for caption in captions for word in split_words(caption))
        kept = sorted((word for word, n in counts.items() if n >= min_count), key=lambda word: (-counts[word], word))
        if not kept:
            raise ValueError(f"Vocabulary.build: no word occurs min_count={min_count} times in the captions.")
        return cls(kept)

    @property
    def words(self) -> tuple[str, ...]:
        """All entries in the order of their ids; the first three are the special tokens."""
        return self._words

    def __len__(self) -> int:
        return len(self._words)

    def __contains__(self, word: object) -> bool:
        return self._ids.get(word, PAD) > UNKNOWN  # type: ignore[call-overload]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self._words == other._words

    def __hash__(self) -> int:
        return hash(self._words)

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} entries)"

    def encode(
        self, captions: Sequence[str], *, max_words: int | None = None, warn_unknown: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Encode captions as token ids.

        Args:
            captions: Strings, each with at least one word.
            max_words: Truncate captions to this many words; None keeps them whole.
            warn_unknown: Warn once, naming the words that are not in the vocabulary.

        Returns:
            Tokens (B, L) and word_mask (B, L), True for a real word; L is the length of the longest caption. There is
            no end token: see `append_end`.

        Raises:
            ValueError: `captions` is empty, a caption has no word, or `max_words` is below 1.
        """
        if isinstance(captions, str):
            raise ValueError("Vocabulary.encode: captions must be a list of strings, but it is one string; wrap it.")
        if max_words is not None:
            check_positive("Vocabulary.encode", max_words=max_words)
        split = [split_words(caption)[:max_words] for caption in captions]
        if not split:
            raise ValueError("Vocabulary.encode: captions is empty; give at least one.")
        for i, words in enumerate(split):
            if not words:
                raise ValueError(f"Vocabulary.encode: caption {i} ({captions[i]!r}) has no word; write at least one.")
        unknown = list(dict.fromkeys(word for words in split for word in words if word not in self))
        if unknown and warn_unknown:
            listed = ", ".join(unknown[:10]) + (f" and {len(unknown) - 10} more" if len(unknown) > 10 else "")
            warnings.warn(f"unknown words, encoded as {SPECIAL_TOKENS[UNKNOWN]}: {listed}", stacklevel=2)
        tokens = torch.full((len(split), max(map(len, split))), PAD, dtype=torch.long)
        for row, words in zip(tokens, split):
            row[: len(words)] = torch.tensor([self._ids[word] if word in self else UNKNOWN for word in words])
        return tokens, tokens != PAD

    def decode(self, tokens: Tensor) -> list[str]:
        """Decode token ids (B, L) into captions, each up to its first end or padding token.

        Raises:
            ValueError: `tokens` are not integers (B, L), or an id is outside the vocabulary.
        """
        check_tensors("Vocabulary.decode", tokens=tokens)
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise ValueError(
                f"Vocabulary.decode: tokens must be integers (B, L), but they are {tokens.dtype} {shape_of(tokens)}."
            )
        captions = []
        for row in tokens.tolist():
            words = []
            for token in row:
                if not 0 <= token < len(self):
                    raise ValueError(f"Vocabulary.decode: token {token} is outside the {len(self)} entries.")
                if token in (PAD, END):
                    break
                words.append(self._words[token])
            captions.append(" ".join(words))
        return captions

    def save(self, path: str | Path) -> None:
        """Write the vocabulary to a JSON file."""
        content = {"format": FORMAT, "words": self._words[len(SPECIAL_TOKENS) :]}
        text = json.dumps(content, ensure_ascii=False, indent=0) + "\n"
        Path(path).write_text(text, encoding="utf-8", newline="\n")

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Read a vocabulary from a file written by `save`.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: The file is not a vocabulary.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"Vocabulary.load: {path} is not JSON text ({error}).") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"Vocabulary.load: {path} is not a {FORMAT!r} file; write it with Vocabulary.save.")
        words = content.get("words")
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"Vocabulary.load: 'words' in {path} is not a list of strings; the file is damaged.")
        return cls(words)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Vocabulary:
        """Read the vocabulary of a saved model from its folder.

        Raises:
            FileNotFoundError: The folder holds no vocabulary.
            ValueError: The file is damaged.
        """
        return cls.load(Path(folder) / VOCABULARY_FILE)
