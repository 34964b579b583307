"""One vocabulary for STEM and STREAM: what the text encoder reads, the captioner writes."""

from __future__ import annotations

import json
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

PAD, END, UNKNOWN = 0, 1, 2
SPECIAL_TOKENS = ("<pad>", "<end>", "<unknown>")
FORMAT = "mirror-modules vocabulary 1"


def split_words(caption: str) -> list[str]:
    """Lower-case words of a caption: runs of Unicode letters, their marks, and digits.

    Marks count, so that scripts which write vowels as marks keep their words whole. Marks without a letter or a digit,
    such as those of an emoji, are no word.
    """
    # Composed after lowering: some capitals have no composed form where their small letters have one.
    normal = unicodedata.normalize("NFC", caption.lower())
    runs = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in normal).split()
    return [run for run in runs if any(unicodedata.category(c)[0] in "LN" for c in run)]


class Vocabulary:
    """Words and their token ids. 0 pads, 1 ends a caption, 2 stands for every unknown word.

    Args:
        words: The known words, the most important first; the first gets id 3.

    Raises:
        ValueError: A word is listed twice, or is not a lower-case word.
    """

    def __init__(self, words: Sequence[str]) -> None:
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
        """Collect the words that occur at least `min_count` times, the most frequent first.

        Raises:
            ValueError: There is no word to collect.
        """
        if isinstance(captions, str):
            raise ValueError("Vocabulary.build: captions must be a list of strings, but it is one string.")
        counts = Counter(word for caption in captions for word in split_words(caption))
        kept = sorted((word for word, n in counts.items() if n >= min_count), key=lambda word: (-counts[word], word))
        if not kept:
            raise ValueError(f"Vocabulary.build: the captions hold no word that occurs min_count={min_count} times.")
        return cls(kept)

    @property
    def words(self) -> tuple[str, ...]:
        """All entries by id; the first three are the special tokens."""
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
        """Turn captions into token ids.

        Args:
            captions: Strings, each with at least one word.
            max_words: Cut longer captions after so many words; None keeps them whole.
            warn_unknown: Warn once, naming the words that are not in the vocabulary.

        Returns:
            Tokens (B, L) and word_mask (B, L), True for a real word; L is the longest caption's length. The end token
            is not among them: see `append_end`.

        Raises:
            ValueError: There is no caption, or one holds no word.
        """
        if isinstance(captions, str):
            raise ValueError("Vocabulary.encode: captions must be a list of strings, but it is one string; wrap it.")
        split = [split_words(caption)[:max_words] for caption in captions]
        if not split:
            raise ValueError("Vocabulary.encode: there is no caption; give at least one.")
        for i, words in enumerate(split):
            if not words:
                raise ValueError(f"Vocabulary.encode: caption {i} ({captions[i]!r}) holds no word; write at least one.")
        unknown = list(dict.fromkeys(word for words in split for word in words if word not in self))
        if unknown and warn_unknown:
            listed = ", ".join(unknown[:10]) + (f" and {len(unknown) - 10} more" if len(unknown) > 10 else "")
            warnings.warn(f"unknown words, read as {SPECIAL_TOKENS[UNKNOWN]}: {listed}", stacklevel=2)
        tokens = torch.full((len(split), max(map(len, split))), PAD, dtype=torch.long)
        for row, words in zip(tokens, split):
            row[: len(words)] = torch.tensor([self._ids[word] if word in self else UNKNOWN for word in words])
        return tokens, tokens != PAD

    def decode(self, tokens: Tensor) -> list[str]:
        """Turn token ids (B, L) into captions, each up to its first end or padding token.

        Raises:
            ValueError: `tokens` is not (B, L), or an id lies outside the vocabulary.
        """
        if tokens.ndim != 2:
            raise ValueError(f"Vocabulary.decode: tokens must be (B, L), but they are {tuple(tokens.shape)}.")
        captions = []
        for row in tokens.tolist():
            words = []
            for token in row:
                if not 0 <= token < len(self):
                    raise ValueError(f"Vocabulary.decode: token {token} lies outside the {len(self)} entries.")
                if token in (PAD, END):
                    break
                words.append(self._words[token])
            captions.append(" ".join(words))
        return captions

    def save(self, path: str | Path) -> None:
        """Write the vocabulary as JSON."""
        content = {"format": FORMAT, "words": self._words[len(SPECIAL_TOKENS) :]}
        Path(path).write_text(json.dumps(content, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Read a vocabulary that `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is not a vocabulary.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"Vocabulary.load: {path} is not JSON text ({error}).") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"Vocabulary.load: {path} is not a {FORMAT!r} file; write it with Vocabulary.save.")
        words = content.get("words")
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"Vocabulary.load: 'words' in {path} is not a list of strings; the file is damaged.")
        return cls(words)
