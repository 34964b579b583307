"""Text encoder: word features and a sentence feature of captions, `w, s = RNN(T)` (MirrorGAN, Sec. 3.1)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from mirror_modules._checks import (
    check_number,
    check_padding_is_last,
    check_positive,
    check_tokens,
    check_word_mask,
    is_readable,
    zero_padding,
)
from mirror_modules._lstm import run_lstm
from mirror_modules._pretrained import FromModelFolder
from mirror_modules._typing import TypedCall


class TextFeatures(NamedTuple):
    """Features of a batch of captions."""

    words: Tensor
    """One feature per word, zero at padding. (B, L, D)"""
    sentence: Tensor
    """One feature per caption. (B, D)"""


class TextEncoder(FromModelFolder, TypedCall, nn.Module):
    """A bidirectional LSTM over word embeddings (MirrorGAN, Sec. 3.1).

        words = hidden states of both directions,    sentence = last hidden state of both directions

    Captions are packed by length, so that the backward direction starts at the last real word: padding does not change
    the features of a caption. Where lengths cannot be read, such as in `torch.compile` and `torch.export`, the backward
    direction runs over captions aligned at their ends instead, with equal results up to rounding.

    Args:
        vocabulary_size: Number of token ids.
        embedding_dim: Features of a word embedding.
        feature_dim: Features D of a word and of the sentence; even, half for each direction.
        dropout: Dropout probability of the elements of the embeddings, in training.

    Raises:
        ValueError: A size is not a whole number of at least 1, `feature_dim` is odd, or `dropout` is out of range.

    Examples:
        >>> import torch
        >>> from mirror_modules import TextEncoder
        >>> encoder = TextEncoder(vocabulary_size=50, feature_dim=16)
        >>> tokens = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]])
        >>> features = encoder(tokens, word_mask=tokens != 0)
        >>> features.words.shape, features.sentence.shape
        (torch.Size([2, 4, 16]), torch.Size([2, 16]))
    """

    def __init__(
        self, vocabulary_size: int, *, embedding_dim: int = 300, feature_dim: int = 256, dropout: float = 0.5
    ) -> None:
        super().__init__()
        owner = "TextEncoder"
        check_positive(owner, vocabulary_size=vocabulary_size, embedding_dim=embedding_dim, feature_dim=feature_dim)
        if feature_dim % 2:
            raise ValueError(f"{owner}: feature_dim must be even, half for each direction, but it is {feature_dim}.")
        check_number(owner, dropout=dropout)
        if not 0 <= dropout <= 1:
            raise ValueError(f"{owner}: dropout must be a probability from 0 to 1, but it is {dropout!r}.")
        self.vocabulary_size, self.feature_dim = vocabulary_size, feature_dim
        self.embedding = nn.Embedding(vocabulary_size, embedding_dim)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.dropout = nn.Dropout(dropout)
        self.lstm = nn.LSTM(embedding_dim, feature_dim // 2, batch_first=True, bidirectional=True)

    def forward(self, tokens: Tensor, word_mask: Tensor | None = None) -> TextFeatures:
        """Encode captions.

        Args:
            tokens: Token ids, (B, L).
            word_mask: True for a real word, (B, L), real words first; None if all are.

        Returns:
            Word features (B, L, D), zero at padding, and sentence features (B, D).

        Raises:
            ValueError: A token is outside the vocabulary, a caption has no real word, or padding precedes a word. A
                compiled or exported graph does not check these.
        """
        check_tokens("TextEncoder", tokens, self.vocabulary_size)
        word_mask = check_word_mask("TextEncoder", tokens, word_mask)
        if word_mask is None:
            word_mask = torch.ones_like(tokens, dtype=torch.bool)
        embedded = self.dropout(self.embedding(tokens))
        # An empty batch cannot be packed.
        can_pack = is_readable(word_mask) and tokens.shape[0] > 0
        return self._packed(embedded, word_mask) if can_pack else self._aligned(embedded, word_mask)

    def _packed(self, embedded: Tensor, word_mask: Tensor) -> TextFeatures:
        """Encode embedded captions (B, L, embedding_dim), packed by length."""
        check_padding_is_last("TextEncoder", word_mask, may_stall=True)
        lengths = word_mask.sum(dim=1).cpu()
        packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        states, (last, _) = self.lstm(packed)
        words, _ = pad_packed_sequence(states, batch_first=True, total_length=word_mask.shape[1])
        return TextFeatures(words, torch.cat((last[0], last[1]), dim=1))

    def _aligned(self, embedded: Tensor, word_mask: Tensor) -> TextFeatures:
        """Encode embedded captions (B, L, embedding_dim) without reading their lengths.

        One call of the LSTM takes each caption twice: followed by its padding, for the forward direction, and preceded
        by it, for the backward direction.
        """
        batch, longest = word_mask.shape
        lengths_B1, positions = word_mask.sum(dim=1, keepdim=True), torch.arange(longest, device=word_mask.device)
        # Rolling a row by its padding moves the padding to the front: position p takes what is at p + length.
        at_end = _take_rows(embedded, (positions + lengths_B1) % longest)
        states, _ = run_lstm(self.lstm, torch.cat((embedded, at_end)))
        forward, backward = states[:batch].chunk(2, dim=2)[0], states[batch:].chunk(2, dim=2)[1]
        backward = _take_rows(backward, (positions - lengths_B1) % longest)
        last = _take_rows(forward, (lengths_B1 - 1).clamp(min=0))
        sentence = torch.cat((last[:, 0], backward[:, 0]), dim=1)
        return TextFeatures(zero_padding(torch.cat((forward, backward), dim=2), word_mask), sentence)


def _take_rows(tensor_BLD: Tensor, rows_BK: Tensor) -> Tensor:
    """Row rows[b, k] of each sample, (B, K, D)."""
    # `take_along_dim` would specialize an exported graph to its batch size.
    return tensor_BLD.gather(1, rows_BK.unsqueeze(2).expand(-1, -1, tensor_BLD.shape[2]))
