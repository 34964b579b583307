"""Caption likelihood as a score of images, in nats per token, differentiable and optionally without language bias."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from mirror_modules._checks import (
    as_checked,
    at_least_float32,
    check_choice,
    check_images,
    check_positive,
    check_tensors,
    is_readable,
    shape_of,
)
from mirror_modules._typing import TypedCall
from mirror_modules.stream.frozen import Encoder, FrozenCaptioner
from mirror_modules.stream.redescription import redescription_loss, word_losses

Debias = Literal["blank", "prior"]
# Pairs of image and caption that are computed at a time.
BATCH_SIZE = 256
# The question and the answer of VQAScore (Lin et al., ECCV 2024).
QUESTION, ANSWER = 'Does this figure show "{}"? Please answer yes or no.', "Yes"


def image_information(log_likelihood: Tensor, prior: Tensor, word_count: Tensor | None = None) -> Tensor:
    """Compute the pointwise mutual information of image and caption under a captioner, in nats per token.

        information = (log p(T | image) - log p(T)) / L,    p(T) = mean_r p(T | image_r)

    Of log p(T | image) alone, most is language: common phrases are likely whatever the image shows. Near zero, the
    captioner ignores the image, and its redescription loss can teach a generator little.

    Args:
        log_likelihood: log p(T | image) / L of each caption, nats per token, (B,): the negative of `redescription_loss`
            with `reduction="none"`.
        prior: The same given other images, or a blank one: (B,), or (R, B) for R images.
        word_count: Number L of tokens of each caption, (B,); needed for several other images.

    Returns:
        Nats per token, (B,).

    Raises:
        ValueError: Sizes disagree, `word_count` is missing, or a log likelihood is positive, as a loss is, which is
            checked on a CPU only.

    Examples:
        >>> import torch
        >>> from mirror_modules.functional import image_information
        >>> image_information(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])).tolist()
        [0.5, -1.0]
    """
    owner = "image_information"
    check_tensors(owner, log_likelihood=log_likelihood, prior=prior)
    if log_likelihood.ndim != 1 or prior.ndim not in (1, 2) or prior.shape[-1:] != log_likelihood.shape:
        raise ValueError(
            f"{owner}: log_likelihood must be (B,) and prior (B,) or (R, B), but they are {shape_of(log_likelihood)} "
            f"and {shape_of(prior)}."
        )
    _check_likelihood(owner, "log_likelihood", log_likelihood)
    _check_likelihood(owner, "prior", prior)
    if prior.ndim == 1 or prior.shape[0] == 1:
        return log_likelihood - prior.view_as(log_likelihood)
    is_counted = isinstance(word_count, Tensor) and word_count.shape == log_likelihood.shape
    if not is_counted or prior.shape[0] == 0:
        raise ValueError(f"{owner}: with prior (R, B), word_count must be (B,) and R at least 1.")
    word_count = cast(Tensor, word_count)
    mean = torch.logsumexp(prior * word_count, dim=0) - torch.tensor(float(prior.shape[0])).log()
    return log_likelihood - mean / word_count


def _check_likelihood(owner: str, name: str, values: Tensor) -> None:
    if not is_readable(values) or values.device.type != "cpu":
        return
    # Rounding may exceed 0.
    if bool((values > 1e-3).any()):
        raise ValueError(
            f"{owner}: {name} must be at most 0, the logarithm of a probability, but it reaches "
            f"{float(values.max()):.4g}; of a loss, pass the negative."
        )


class RedescriptionScore(TypedCall, FrozenCaptioner):
    """Score images by the likelihood of their captions under a frozen captioner, one value per image.

        score = 1/L sum_t log p(T_t | image, T_1 .. T_{t-1})

    In nats per token, at most 0, differentiable with respect to the images. With `debias`, the likelihood of the
    caption without the image is subtracted, and the score is the pointwise mutual information of image and caption
    (`image_information`).

        score = RedescriptionScore(captioner)
        score(images, ["a small red flower", "a bird with a long beak"])  # (2,)

    The captioner is frozen and checked as by `RedescriptionLoss`.

    Args:
        captioner: Any Module `(images, tokens, word_mask) -> logits (B, L, V)` as for `RedescriptionLoss`, such as one
            from `interop.captioner_from`. If it has methods `encode_images(images)` and `decode(encoded, tokens,
            word_mask)`, `score_matrix` encodes each image once. There, `encoded` holds N images and `tokens` a multiple
            of N captions; row k belongs to image k mod N.
        debias: "blank" subtracts the log likelihood given a blank image, in the middle of the value range; "prior" the
            logarithm of the mean likelihood over the images of `reference`. None subtracts nothing.
        reference: Images in [-1, 1], (R, 3, H, W), for `debias="prior"`: a sample of what captions may describe. Each
            call runs the captioner on all R of them with every caption, without a gradient.
        encode: Function that turns a list of strings into (tokens, word_mask), with the end token if the captioner was
            trained with it. By default, the captioner's own method `encode`.
        yes_no: Score the answer to a question about the image instead of a description: a question with `{}` for the
            caption, or True for that of VQAScore. The score is then log P(answer), and the captioner needs a method
            `encode_answer`, as those of `interop.captioner_from` have. If its forward and `decode` have an argument
            `answer`, they receive the mask of the answer's tokens.
        answer: The answer whose probability is the score.
        check: See `RedescriptionLoss`.

    Raises:
        ValueError: `captioner` is not a Module, or options do not fit together.

    Examples:
        >>> import torch
        >>> from mirror_modules import Captioner, RedescriptionScore, Vocabulary
        >>> from mirror_modules.functional import append_end
        >>> from mirror_modules.stem import ConvBackbone
        >>> vocabulary = Vocabulary.build(["a small red flower", "a blue bird"])
        >>> captioner = Captioner(ConvBackbone(), len(vocabulary), embedding_dim=16, hidden_dim=32)
        >>> encode = lambda captions: append_end(*vocabulary.encode(captions))
        >>> score = RedescriptionScore(captioner, debias="blank", encode=encode)
        >>> images = (torch.rand(2, 3, 32, 32) * 2 - 1).requires_grad_(True)
        >>> score(images, ["a red flower", "a blue bird"]).sum().backward()
        >>> images.grad.shape, score.score_matrix(images, ["a red flower", "a bird", "a flower"]).shape
        (torch.Size([2, 3, 32, 32]), torch.Size([2, 3]))
    """

    reference: Tensor | None

    def __init__(
        self,
        captioner: nn.Module,
        *,
        debias: Debias | None = None,
        reference: Tensor | None = None,
        encode: Encoder | None = None,
        yes_no: str | bool = False,
        answer: str = ANSWER,
        check: bool = True,
    ) -> None:
        owner = "RedescriptionScore"
        super().__init__(captioner, encode=encode, check=check)
        if debias is not None:
            check_choice(owner, "debias", debias, ("blank", "prior"))
        if (reference is not None) != (debias == "prior"):
            raise ValueError(
                f"{owner}: reference is needed for debias='prior', and for nothing else; here debias={debias!r} and "
                f"reference is {'missing' if reference is None else 'given'}."
            )
        if reference is not None:
            check_images(f"{owner}: reference", reference)
            if reference.shape[0] == 0:
                raise ValueError(f"{owner}: reference has no images ({shape_of(reference)}); pass at least one.")
            # A graph behind it would be kept alive, and could not be copied.
            reference = reference.detach()
        self.debias: Debias | None = debias
        self.question: str | None = None
        if yes_no is not False:
            if yes_no is not True and (not isinstance(yes_no, str) or yes_no.count("{}") != 1):
                raise ValueError(
                    f"{owner}: yes_no must be True, or a question that contains {{}} once, for the caption, but it is "
                    f"{yes_no!r}."
                )
            self.question = QUESTION if yes_no is True else yes_no
            if not hasattr(captioner, "encode_answer"):
                raise ValueError(
                    f"{owner}: yes_no needs a captioner with a method encode_answer(questions, answer), which "
                    f"{type(captioner).__name__} lacks; those of interop.captioner_from have it."
                )
        self.answer = answer
        self._takes_answer = self.question is not None and "answer" in inspect.signature(captioner.forward).parameters
        self.register_buffer("reference", reference, persistent=False)

    def forward(
        self, images: Tensor, captions: Tensor | str | Sequence[str], word_mask: Tensor | None = None
    ) -> Tensor:
        """Score each image by its caption.

        Args:
            images: In [-1, 1], (B, 3, H, W).
            captions: Token ids (B, L); or strings, one per image, or one for all images.
            word_mask: True for a real word, (B, L); None if all are. Only with token ids.

        Returns:
            Nats per token, (B,), at least float32; with `yes_no` nats per answer.

        Raises:
            ValueError: Sizes disagree, or an argument is unsuitable.
        """
        if isinstance(images, Tensor) and images.shape[:1] == (0,) and (isinstance(captions, str) or not len(captions)):
            return _empty_matrix(images, 1).flatten()
        encoded = self._encoded(captions, word_mask, images)
        encoded = encoded._replace(word_mask=self._checked(images, *encoded[:2], probed=encoded.probed))
        logits = self._logits(images, encoded.tokens, encoded.word_mask, self._options(encoded))
        return self._without_bias(encoded.log_likelihood(logits), images, encoded)

    def score_matrix(
        self,
        images: Tensor,
        captions: Tensor | str | Sequence[str],
        word_mask: Tensor | None = None,
        *,
        batch_size: int = BATCH_SIZE,
    ) -> Tensor:
        """Score every image by every caption; each image is encoded once.

        Args:
            images: In [-1, 1], (N, 3, H, W).
            captions: Token ids (M, L), or M strings.
            word_mask: True for a real word, (M, L); None if all are. Only with token ids.
            batch_size: Pairs of image and caption that are computed at a time, which bounds the memory.

        Returns:
            Nats per token, (N, M), at least float32; with `yes_no` nats per answer.

        Raises:
            ValueError: An argument is unsuitable.
        """
        check_positive("RedescriptionScore.score_matrix", batch_size=batch_size)
        encoded = self._encoded([captions] if isinstance(captions, str) else captions, word_mask, images)
        word_mask = self._checked(images, *encoded[:2], paired=False, probed=encoded.probed)
        encoded = encoded._replace(word_mask=word_mask)
        if images.shape[0] == 0 or encoded.tokens.shape[0] == 0:
            return _empty_matrix(images, encoded.tokens.shape[0])
        log_p_NM = self._matrix(images, encoded, batch_size)
        # With zero as log likelihood, `_without_bias` returns the negative of the prior.
        return log_p_NM + self._without_bias(log_p_NM.new_zeros(len(encoded.tokens)), images, encoded)

    def _encoded(self, captions: Tensor | str | Sequence[str], word_mask: Tensor | None, images: Tensor) -> _Encoded:
        if isinstance(captions, Tensor):
            if self.question is not None:
                raise ValueError("RedescriptionScore: with yes_no, captions must be strings, which fill the question.")
            return _Encoded(captions, word_mask)
        listed = self._strings(images, captions, word_mask)
        plain = None
        if self.question is None or self._unchecked:
            plain = self._tokens(images, listed, None)
            if self.question is None:
                return _Encoded(*plain)
        answering: Any = self.captioner
        parts = answering.encode_answer([self.question.replace("{}", caption) for caption in listed], self.answer)
        tokens, word_mask, counted = (part.to(images.device) for part in parts)
        return _Encoded(tokens, word_mask, counted, plain)

    def _options(self, encoded: _Encoded) -> dict[str, Tensor]:
        return {"answer": encoded.counted} if self._takes_answer and encoded.counted is not None else {}

    def _matrix(self, images: Tensor, encoded: _Encoded, batch_size: int) -> Tensor:
        """Log likelihoods (N, M) of checked inputs, in blocks of some images and some captions."""
        some_captions = max(1, min(len(encoded.tokens), batch_size))
        some_images = max(1, batch_size // some_captions)
        captioner: Any = self.captioner
        has_parts = hasattr(captioner, "encode_images") and hasattr(captioner, "decode")
        rows = []
        for block in images.split(some_images):
            features = captioner.encode_images(block) if has_parts else None
            columns = []
            for start in range(0, len(encoded.tokens), some_captions):
                # Row k is image k mod N with caption k // N.
                some = encoded.repeated(slice(start, start + some_captions), len(block))
                if has_parts:
                    logits = captioner.decode(features, some.tokens, some.word_mask, **self._options(some))
                else:
                    copies = block.repeat(len(some.tokens) // len(block), 1, 1, 1)
                    logits = self._logits(copies, some.tokens, some.word_mask, self._options(some))
                columns.append(some.log_likelihood(logits).unflatten(0, (-1, len(block))).mT)
            rows.append(torch.cat(columns, dim=1))
        return torch.cat(rows)

    def _without_bias(self, log_p: Tensor, images: Tensor, encoded: _Encoded) -> Tensor:
        """Subtract the log likelihood without the image from log likelihoods (B,), if `debias` is set."""
        if self.debias is None:
            return log_p
        reference = images.new_zeros(1, *images.shape[1:]) if self.reference is None else self.reference.to(images)
        # The prior of a caption does not depend on the images.
        with torch.no_grad():
            prior_RB = self._matrix(reference, encoded, BATCH_SIZE)
        return image_information(log_p, prior_RB, encoded.word_count().to(log_p.dtype))


def _empty_matrix(images: Tensor, captions: int) -> Tensor:
    """Scores (N, M) without a pair, in the graph of the images, which DDP requires."""
    check_images("RedescriptionScore", images)
    return at_least_float32(images).flatten(1).sum(dim=1, keepdim=True).expand(-1, captions)


class _Encoded(NamedTuple):
    """Captions as tokens."""

    tokens: Tensor
    word_mask: Tensor | None
    """True for a real token; None if all are."""
    counted: Tensor | None = None
    """True for the tokens of an answer, whose likelihood alone counts; None if there is no question."""
    probed: tuple[Tensor, Tensor | None] | None = None
    """Tokens and mask for the check of the captioner, in which words may be replaced."""

    def log_likelihood(self, logits: Tensor) -> Tensor:
        """Nats per token, or nats per answer, (B,)."""
        if self.counted is None:
            return -redescription_loss(logits, self.tokens, self.word_mask, reduction="none")
        losses_BL, _ = word_losses("RedescriptionScore", logits, self.tokens, self.word_mask)
        return -losses_BL.where(self.counted, 0.0).sum(dim=1)

    def repeated(self, chosen: slice, times: int) -> _Encoded:
        """Some captions, each several times in a row."""
        tokens, word_mask, counted = (
            part if part is None else part[chosen].repeat_interleave(times, dim=0) for part in self[:3]
        )
        return _Encoded(cast(Tensor, tokens), None if word_mask is None else as_checked(word_mask), counted)

    def word_count(self) -> Tensor:
        """By how many tokens `log_likelihood` divides, (B,)."""
        if self.counted is not None or self.word_mask is None:
            count = 1 if self.counted is not None else self.tokens.shape[1]
            return self.tokens.new_full((len(self.tokens),), count)
        return self.word_mask.sum(dim=1)
