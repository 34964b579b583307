"""The captioner: an image becomes a caption again (MirrorGAN, Sec. 3.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirror_modules._checks import check_batch, check_images, check_positive, check_tokens, check_word_mask
from mirror_modules._norms import FeatureBatchNorm

# The ids that `Vocabulary` gives; this part takes them as numbers, so that it works with any vocabulary.
PAD, END = 0, 1
FORGET_BIAS = 2.0


def append_end(tokens: Tensor, word_mask: Tensor | None = None, *, end_token: int = END) -> tuple[Tensor, Tensor]:
    """Put the end token after the last real word of each caption, so that a captioner learns when to stop.

    Args:
        tokens: Token ids, (B, L).
        word_mask: True for a real word, (B, L), real words first; None if all are.
        end_token: The id to append.

    Returns:
        Tokens (B, L + 1) and word_mask (B, L + 1), in which the end token counts as a word.
    """
    check_word_mask("append_end", tokens, word_mask, may_stall=False)
    if word_mask is None:
        word_mask = torch.ones_like(tokens, dtype=torch.bool)
    mask_with_end = F.pad(word_mask, (1, 0), value=True)
    end = word_mask.sum(dim=1, keepdim=True)
    return F.pad(tokens, (0, 1), value=PAD).scatter(1, end, end_token), mask_with_end


class Captioner(nn.Module):
    """An LSTM that reads the image first and then the words (MirrorGAN, Sec. 3.3).

        x_{-1} = CNN(image),    x_t = W_e T_t,    p_{t+1} = softmax(W LSTM(x_t)),    t = -1 .. L - 2

    Step t predicts word t from the image and the words before it.

    Args:
        image_encoder: A Module whose result has a field `image` (B, F), and which states F as `image_dim`: an
            `ImageEncoder`, or a backbone. Its input range is [-1, 1]; what normalization it needs, it does itself.
        vocabulary_size: Number V of token ids.
        embedding_dim: Features of a word embedding, and of the image for the LSTM.
        hidden_dim: Features of the LSTM's state.
    """

    def __init__(
        self, image_encoder: nn.Module, vocabulary_size: int, *, embedding_dim: int = 256, hidden_dim: int = 512
    ) -> None:
        super().__init__()
        check_positive("Captioner", vocabulary_size=vocabulary_size, embedding_dim=embedding_dim, hidden_dim=hidden_dim)
        image_dim = getattr(image_encoder, "image_dim", None)
        if not isinstance(image_dim, int):
            raise ValueError(
                f"Captioner: the image_encoder {type(image_encoder).__name__} must state the size of its image "
                "feature as an int `image_dim`."
            )
        self.vocabulary_size = vocabulary_size
        self.image_encoder = image_encoder
        self.image_projection = nn.Linear(image_dim, embedding_dim)
        self.image_norm = FeatureBatchNorm(embedding_dim)
        self.embedding = nn.Embedding(vocabulary_size, embedding_dim)
        self.lstm = nn.LSTM(embedding_dim, hidden_dim, batch_first=True)
        with torch.no_grad():
            # The image comes first and must be remembered for the whole caption: gates that start half closed forget
            # it, and training then takes several times as long.
            self.lstm.get_parameter("bias_ih_l0")[hidden_dim : 2 * hidden_dim] = FORGET_BIAS
        self.output = nn.Linear(hidden_dim, vocabulary_size)

    def first_input(self, images: Tensor) -> Tensor:
        """What the LSTM reads before the first word: images (B, 3, H, W) -> (B, embedding_dim)."""
        check_images("Captioner", images)
        return self.project(self.image_encoder(images).image)

    def project(self, image_feature: Tensor) -> Tensor:
        """What the image encoder sees, (B, image_dim), as the LSTM reads it: (B, embedding_dim)."""
        return self.image_norm(self.image_projection(image_feature))

    def decode(self, first_input: Tensor, tokens: Tensor) -> Tensor:
        """Predict each word from the first input (B, embedding_dim) and the words before it: logits (B, L, V)."""
        check_tokens("Captioner", tokens, self.vocabulary_size)
        check_batch("Captioner", images=first_input, tokens=tokens)
        inputs = torch.cat((first_input.unsqueeze(1), self.embedding(tokens[:, :-1])), dim=1)
        return self.output(self._recur(inputs, None)[0])

    def _recur(self, inputs: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The LSTM, which autocast leaves alone on a CPU: many processors have none in bfloat16, and torch raises."""
        if inputs.device.type != "cpu":
            return self.lstm(inputs, state)
        with torch.autocast("cpu", enabled=False):
            return self.lstm(inputs.to(self.output.weight.dtype), state)

    def forward(self, images: Tensor, tokens: Tensor, word_mask: Tensor | None = None) -> Tensor:
        """Predict each word of captions.

        Args:
            images: In [-1, 1], (B, 3, H, W).
            tokens: Token ids, (B, L), at best with their end token (`append_end`).
            word_mask: True for a real word, (B, L), real words first. It is checked, and changes nothing: the LSTM
                looks backward only, so that padding at the end has no influence.

        Returns:
            Logits (B, L, V); `logits[:, t]` predicts `tokens[:, t]`.

        Raises:
            ValueError: Sizes disagree, or a token lies outside the vocabulary.
        """
        check_word_mask("Captioner", tokens, word_mask, may_stall=False)
        return self.decode(self.first_input(images), tokens)

    @torch.no_grad()
    def describe(
        self, images: Tensor, *, beam_width: int = 1, max_words: int = 20, end_token: int | None = END
    ) -> Tensor:
        """Write the most probable captions.

        Args:
            images: In [-1, 1], (B, 3, H, W).
            beam_width: How many captions are followed at a time; 1 is greedy.
            max_words: Longest caption, in words.
            end_token: The id that ends a caption; None writes `max_words` words always.

        Returns:
            Token ids (B, max_words), 0 after the end token.
        """
        check_positive("Captioner.describe", beam_width=beam_width, max_words=max_words)
        return self.search(self.first_input(images), beam_width, max_words, end_token)

    @torch.no_grad()
    def search(self, first_input: Tensor, beam_width: int, max_words: int, end_token: int | None) -> Tensor:
        """Beam search from the first input (B, embedding_dim): token ids (B, max_words).

        Captions that have ended keep their log probability and go on with padding, so that beams of different length
        compete. Log probabilities are divided by the number of words only in the final choice.
        """
        batch, width = first_input.shape[0], min(beam_width, self.vocabulary_size)
        rows = torch.arange(batch, device=first_input.device).unsqueeze(1)
        tokens = torch.full((batch, width, max_words), PAD, dtype=torch.long, device=first_input.device)
        score = torch.full((batch, width), float("-inf"), device=first_input.device)
        score[:, 0] = 0.0
        ended = torch.zeros(batch, width, dtype=torch.bool, device=first_input.device)
        inputs = first_input.repeat_interleave(width, dim=0)
        state: tuple[Tensor, Tensor] | None = None
        for t in range(max_words):
            hidden, state = self._recur(inputs.unsqueeze(1), state)
            log_p = self.output(hidden[:, 0]).float().log_softmax(dim=1).view(batch, width, -1)
            if end_token not in (None, PAD):
                # Padding is no word: it follows the end, and nothing else may give it.
                log_p[:, :, PAD] = float("-inf")
            only_padding = torch.full_like(log_p[0, 0], float("-inf"))
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
