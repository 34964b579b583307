"""The captioner: from an image back to its caption (MirrorGAN, Sec. 3.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirror_modules._checks import (
    check_batch,
    check_encoded,
    check_images,
    check_padding_is_last,
    check_positive,
    check_tokens,
    check_word_mask,
    declared_size,
)
from mirror_modules._lstm import run_lstm
from mirror_modules._norms import FeatureBatchNorm
from mirror_modules._pretrained import FromModelFolder
from mirror_modules._typing import TypedCall

# The ids that `Vocabulary` assigns, as plain numbers: this part works with any vocabulary.
PAD, END = 0, 1
FORGET_BIAS = 2.0


def append_end(tokens: Tensor, word_mask: Tensor | None = None, *, end_token: int = END) -> tuple[Tensor, Tensor]:
    """Append the end token after the last real word of each caption, so that a captioner learns when to stop.

    Args:
        tokens: Token ids, (B, L).
        word_mask: True for a real word, (B, L), real words first; None if all are.
        end_token: The id to append.

    Returns:
        Tokens (B, L + 1) and word_mask (B, L + 1), in which the end token counts as a word.

    Raises:
        ValueError: `tokens` are not integers (B, L), `word_mask` is not a bool tensor (B, L), `end_token` is not an
            id, a caption has no real word, or padding precedes a real word, which is checked on a CPU only.

    Examples:
        >>> import torch
        >>> from mirror_modules.functional import append_end
        >>> tokens = torch.tensor([[5, 9, 4], [8, 6, 0]])
        >>> longer, word_mask = append_end(tokens, tokens != 0)
        >>> longer.tolist()
        [[5, 9, 4, 1], [8, 6, 1, 0]]
        >>> word_mask.tolist()
        [[True, True, True, True], [True, True, True, False]]
    """
    check_tokens("append_end", tokens, None)
    _check_end("append_end", end_token, None)
    word_mask = check_word_mask("append_end", tokens, word_mask, may_stall=False)
    check_padding_is_last("append_end", word_mask)
    if word_mask is None:
        word_mask = torch.ones_like(tokens, dtype=torch.bool)
    mask_with_end = F.pad(word_mask, (1, 0), value=True)
    end = word_mask.sum(dim=1, keepdim=True)
    return F.pad(tokens, (0, 1), value=PAD).scatter(1, end, end_token), mask_with_end


def _check_end(owner: str, end_token: int, vocabulary_size: int | None) -> None:
    """Require an id of the vocabulary."""
    is_id = isinstance(end_token, int) and not isinstance(end_token, bool) and end_token >= 0
    if not is_id or (vocabulary_size is not None and end_token >= vocabulary_size):
        below = "" if vocabulary_size is None else f", below vocabulary_size={vocabulary_size}"
        raise ValueError(f"{owner}: end_token must be a token id{below}, but it is {end_token!r}.")


class Captioner(FromModelFolder, TypedCall, nn.Module):
    """Predict a caption with an LSTM whose first input is the image, followed by the words (MirrorGAN, Sec. 3.3).

        x_{-1} = CNN(image),    x_t = W_e T_t,    p_{t+1} = softmax(W LSTM(x_t)),    t = -1 .. L - 2

    Step t predicts word t from the image and the words before it. With `image_skip`, the output layer also sees the
    image itself, at every step (as in m-RNN; Mao et al., 2015):

        p_{t+1} = softmax(W (LSTM(x_t) + S x_{-1}))

    A gradient then reaches the image encoder from each word without passing through the LSTM, which otherwise has to
    carry the image along the whole caption. An image encoder that trains from scratch needs several times fewer steps.

    Args:
        image_encoder: A Module whose result has a field `image` (B, F), and which declares F as an int `image_dim`: an
            `ImageEncoder`, or a backbone. It takes images in [-1, 1] and does any further normalization itself.
        vocabulary_size: Number V of token ids.
        embedding_dim: Features of a word embedding, and of the projected image.
        hidden_dim: Features of the LSTM's hidden state.
        image_skip: Connect the image to the output of every step; the paper does not.

    Raises:
        ValueError: A size is not a positive integer, or the image encoder has no int `image_dim`.

    Examples:
        >>> import torch
        >>> from mirror_modules import Captioner
        >>> from mirror_modules.stem import ConvBackbone
        >>> captioner = Captioner(ConvBackbone(), vocabulary_size=50, embedding_dim=16, hidden_dim=32)
        >>> images, tokens = torch.rand(2, 3, 32, 32) * 2 - 1, torch.tensor([[5, 9, 4, 1], [8, 6, 1, 0]])
        >>> captioner(images, tokens, tokens != 0).shape
        torch.Size([2, 4, 50])
        >>> captioner.eval().describe(images, max_words=6).shape
        torch.Size([2, 6])
    """

    needed_for = "captions"

    def __init__(
        self,
        image_encoder: nn.Module,
        vocabulary_size: int,
        *,
        embedding_dim: int = 256,
        hidden_dim: int = 512,
        image_skip: bool = False,
    ) -> None:
        super().__init__()
        check_positive("Captioner", vocabulary_size=vocabulary_size, embedding_dim=embedding_dim, hidden_dim=hidden_dim)
        image_dim = declared_size("Captioner", image_encoder, "image_dim")
        self.vocabulary_size = vocabulary_size
        self.image_encoder = image_encoder
        self.image_projection = nn.Linear(image_dim, embedding_dim)
        self.image_norm = FeatureBatchNorm(embedding_dim)
        self.embedding = nn.Embedding(vocabulary_size, embedding_dim)
        self.lstm = nn.LSTM(embedding_dim, hidden_dim, batch_first=True)
        with torch.no_grad():
            # The image is the first input and must be remembered for the whole caption: forget gates that start half
            # closed lose it, and training then takes several times as long.
            self.lstm.get_parameter("bias_ih_l0")[hidden_dim : 2 * hidden_dim] = FORGET_BIAS
        self.image_skip = nn.Linear(embedding_dim, hidden_dim, bias=False) if image_skip else None
        self.output = nn.Linear(hidden_dim, vocabulary_size)

    def encode_images(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) as the first input of the LSTM, (B, embedding_dim)."""
        check_images("Captioner", images)
        encoded = self.image_encoder(images)
        check_encoded("Captioner", self.image_encoder, encoded, image=(2, self.image_projection.in_features))
        return self.project(encoded.image)

    def project(self, image_feature: Tensor) -> Tensor:
        """Project an image feature (B, image_dim) to the first input of the LSTM, (B, embedding_dim)."""
        return self.image_norm(self.image_projection(image_feature))

    def decode(self, first_input: Tensor, tokens: Tensor, word_mask: Tensor | None = None) -> Tensor:
        """Predict each word from the encoded image and the words before it.

        Args:
            first_input: Images by `encode_images`, (N, embedding_dim).
            tokens: Token ids, (B, L), where B is a multiple of N: row k belongs to image k mod N.
            word_mask: As in `forward`.

        Returns:
            Logits (B, L, V).

        Raises:
            ValueError: As `forward`.
        """
        check_tokens("Captioner", tokens, self.vocabulary_size)
        word_mask = check_word_mask("Captioner", tokens, word_mask, may_stall=False)
        # A causal network reads padding at the start.
        check_padding_is_last("Captioner", word_mask)
        images, captions = first_input.shape[0], tokens.shape[0]
        if images != captions and images > 0 and captions % images == 0:
            first_input = first_input.repeat(captions // images, 1)
        check_batch("Captioner", images=first_input, tokens=tokens)
        # The last word is dropped after the concatenation: `tokens[:, :-1]` is empty for captions of one word, which an
        # exported graph would not accept.
        inputs = torch.cat((first_input.unsqueeze(1), self.embedding(tokens)), dim=1)[:, :-1]
        return self._predict(run_lstm(self.lstm, inputs)[0], first_input.unsqueeze(1))

    def _predict(self, hidden: Tensor, first_input: Tensor) -> Tensor:
        """Logits of the words from the state of the LSTM, and from the image if there is a skip connection."""
        return self.output(hidden if self.image_skip is None else hidden + self.image_skip(first_input))

    def forward(self, images: Tensor, tokens: Tensor, word_mask: Tensor | None = None) -> Tensor:
        """Predict each word of the captions.

        Args:
            images: In [-1, 1], (B, 3, H, W).
            tokens: Token ids, (B, L), preferably with the end token (`append_end`).
            word_mask: True for a real word, (B, L), real words first. It is checked but has no effect: the LSTM is
                causal, so padding at the end has no influence.

        Returns:
            Logits (B, L, V); `logits[:, t]` predicts `tokens[:, t]`.

        Raises:
            ValueError: Sizes disagree, a token lies outside the vocabulary, or padding precedes a real word, which is
                checked on a CPU only.
        """
        first_input = self.encode_images(images)
        check_tokens("Captioner", tokens, self.vocabulary_size)
        # `decode` would give each image several captions.
        check_batch("Captioner", images=images, tokens=tokens)
        return self.decode(first_input, tokens, word_mask)

    @torch.no_grad()
    def describe(
        self, images: Tensor, *, beam_width: int = 1, max_words: int = 20, end_token: int | None = END
    ) -> Tensor:
        """Generate the most probable captions by beam search.

        Args:
            images: In [-1, 1], (B, 3, H, W).
            beam_width: Number of beams; 1 is greedy decoding.
            max_words: Maximum length of a caption, in words.
            end_token: The id that ends a caption; None always generates `max_words` words.

        Returns:
            Token ids (B, max_words), 0 after the end token.

        Raises:
            ValueError: `images` are not floating point (B, 3, H, W), a number is not a positive integer, or `end_token`
                is not in the vocabulary.
        """
        check_positive("Captioner.describe", beam_width=beam_width, max_words=max_words)
        if end_token is not None:
            _check_end("Captioner.describe", end_token, self.vocabulary_size)
        return self.search(self.encode_images(images), beam_width, max_words, end_token)

    @torch.no_grad()
    def search(self, first_input: Tensor, beam_width: int, max_words: int, end_token: int | None) -> Tensor:
        """Beam search from the first input (B, embedding_dim): token ids (B, max_words).

        Finished captions keep their log probability and continue with padding, so that beams of different length
        compete. Log probabilities are divided by the number of words only in the final selection.
        """
        batch, width = first_input.shape[0], min(beam_width, self.vocabulary_size)
        rows = torch.arange(batch, device=first_input.device).unsqueeze(1)
        tokens = torch.full((batch, width, max_words), PAD, dtype=torch.long, device=first_input.device)
        score = torch.full((batch, width), float("-inf"), device=first_input.device)
        score[:, 0] = 0.0
        ended = torch.zeros(batch, width, dtype=torch.bool, device=first_input.device)
        inputs = images = first_input.repeat_interleave(width, dim=0)
        state: tuple[Tensor, Tensor] | None = None
        for t in range(max_words):
            hidden, state = run_lstm(self.lstm, inputs.unsqueeze(1), state)
            log_p = self._predict(hidden[:, 0], images).float().log_softmax(dim=1).unflatten(0, (batch, width))
            if end_token not in (None, PAD):
                # Padding is not a word and may only follow the end token.
                log_p[:, :, PAD] = float("-inf")
            only_padding = log_p.new_full((log_p.shape[2],), float("-inf"))
            only_padding[PAD] = 0.0
            log_p = torch.where(ended.unsqueeze(2), only_padding, log_p)
            score, choice = (score.unsqueeze(2) + log_p).flatten(1).topk(width, dim=1)
            beam, word = choice // self.vocabulary_size, choice % self.vocabulary_size
            tokens, ended = tokens[rows, beam], ended[rows, beam]
            tokens[:, :, t] = word
            ended = ended | (word == end_token) if end_token is not None else ended
            flat = (rows * width + beam).flatten()
            state = (state[0][:, flat], state[1][:, flat])
            if bool(ended.all()):
                break
            inputs = self.embedding(word.flatten())
        lengths = (tokens != PAD).sum(dim=2).clamp(min=1)
        return tokens[rows[:, 0], (score / lengths).argmax(dim=1)]
