"""Ten wrong captioners, each with the error that names its mistake; right ones pass with a single extra call."""

import pytest
import torch
from torch import nn

from mirror_modules import RedescriptionLoss, RedescriptionScore

B, L, V, H, W = 3, 5, 11, 7, 13


class Right(nn.Module):
    """A small causal captioner: the image and all words before, by a running sum."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.image, self.output = nn.Embedding(V, 17), nn.Linear(3, 17), nn.Linear(17, V)
        self.calls = []

    def see(self, images):
        return self.image(images.mean(dim=(2, 3))).unsqueeze(1)

    def words(self, tokens, word_mask):
        words = self.embedding(tokens)
        if word_mask is not None:
            words = words * word_mask.unsqueeze(2)
        return nn.functional.pad(words[:, :-1], (0, 0, 1, 0)).cumsum(dim=1)

    def forward(self, images, tokens, word_mask=None):
        self.calls.append(len(tokens))
        return self.output(torch.tanh(self.see(images) + self.words(tokens, word_mask)))


class Unshifted(Right):
    def words(self, tokens, word_mask):
        return self.embedding(tokens).cumsum(dim=1)


class ShiftedTwice(Right):
    def words(self, tokens, word_mask):
        return nn.functional.pad(self.embedding(tokens)[:, :-2], (0, 0, 2, 0)).cumsum(dim=1)


class Bidirectional(Right):
    def words(self, tokens, word_mask):
        words = self.embedding(tokens)
        return words.sum(dim=1, keepdim=True) - words


class Detached(Right):
    def see(self, images):
        return super().see(images.detach())


class Rounded(Right):
    def see(self, images):
        return super().see(((images + 1) * 127.5).round() / 127.5 - 1)


class Probabilities(Right):
    def forward(self, images, tokens, word_mask=None):
        return super().forward(images, tokens, word_mask).softmax(dim=2)


class OtherVocabulary(Right):
    def forward(self, images, tokens, word_mask=None):
        return super().forward(images, tokens, word_mask)[:, :, :4]


class PaddedOnTheLeft(Right):
    """It ignores the mask, which is harmless for padding on the right only."""

    def words(self, tokens, word_mask):
        return super().words(tokens, None)


class StartTokenLeft(Right):
    def forward(self, images, tokens, word_mask=None):
        logits = super().forward(images, tokens, word_mask)
        return torch.cat((logits[:, :1], logits), dim=1)


class NotFinite(Right):
    def forward(self, images, tokens, word_mask=None):
        return super().forward(images, tokens, word_mask) * torch.nan


LEFT = torch.tensor([[False, False, True, True, True], [False, True, True, True, True], [True] * 5])
RIGHT = LEFT.flip(1)
WRONG = {
    Unshifted: r"logits\[:, 0\] of .* depends on the token at the same position.*shift them by one",
    ShiftedTwice: r"logits\[:, 1\] of .* does not depend on tokens\[:, 0\].*shifted by one position too many",
    Bidirectional: r"depends on tokens\[:, \d:\]. It must be causal",
    Detached: r"none passes through the captioner Detached: it runs under torch.no_grad, or uses images.detach\(\)",
    Rounded: r"that of the captioner Rounded is zero at every pixel: rounding or a conversion to uint8",
    Probabilities: r"the captioner Probabilities returns probabilities; return logits",
    OtherVocabulary: r"tokens range from \d+ to \d+ but vocabulary_size=4 in the logits .* another vocabulary",
    PaddedOnTheLeft: r"padded on the left, and the padding changes the logits .* tokenizer.padding_side = 'right'",
    StartTokenLeft: r"returned \(\d+, 6, 11\), one position too many; .* return logits\[:, :-1\]",
    NotFinite: r"logits of the captioner NotFinite are NaN or infinite",
}


def draw():
    random = torch.Generator().manual_seed(3)
    images = torch.rand(B, 3, H, W, generator=random) * 2 - 1
    return images.requires_grad_(), torch.randint(5, V, (B, L), generator=random)


@pytest.mark.parametrize("kind", [RedescriptionLoss, RedescriptionScore])
@pytest.mark.parametrize("captioner", WRONG, ids=lambda captioner: captioner.__name__)
def test_a_wrong_captioner_is_named_with_its_mistake(kind, captioner):
    images, tokens = draw()
    scorer = kind(captioner())
    for _ in range(2):
        with pytest.raises(ValueError, match=WRONG[captioner]):
            scorer(images, tokens, LEFT if captioner is PaddedOnTheLeft else None)


@pytest.mark.parametrize("mask", [None, LEFT, RIGHT], ids=["none", "left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_right_captioner_passes_with_one_extra_call(mask, dtype, length):
    captioner, (images, tokens) = Right().to(dtype), draw()
    loss = RedescriptionLoss(captioner)
    images = images.detach().to(dtype).requires_grad_()
    mask = None if mask is None else mask[:, -length:] | (torch.arange(length) == length - 1)
    for _ in range(2):
        loss(images, tokens[:, :length], mask)
    assert captioner.calls[1:] == [B, B]
    assert captioner.calls[0] <= 7


@pytest.mark.parametrize("captioner", [Detached, Rounded])
def test_without_a_gradient_none_is_required(captioner):
    images, tokens = draw()
    assert RedescriptionLoss(captioner())(images.detach(), tokens).isfinite()
    with torch.no_grad():
        assert RedescriptionLoss(captioner())(images, tokens).isfinite()


@pytest.mark.parametrize("captioner", [Detached, Rounded])
def test_the_gradient_is_checked_when_one_is_first_required(captioner):
    images, tokens = draw()
    loss = RedescriptionLoss(captioner())
    with torch.no_grad():
        loss(images, tokens)
    with pytest.raises(ValueError, match=WRONG[captioner]):
        loss(images, tokens)
    right = Right()
    loss = RedescriptionLoss(right)
    for each in (images.detach(), images.detach(), images, images):
        loss(each, tokens)
    assert right.calls[1:3] + right.calls[4:] == [B, B, B, B]


def test_the_padding_of_captioners_that_ignore_the_mask_is_harmless_on_the_right():
    assert RedescriptionLoss(PaddedOnTheLeft())(*draw(), RIGHT).isfinite()


def test_the_probe_leaves_no_gradient():
    captioner, (images, tokens) = Right(), draw()
    RedescriptionLoss(captioner)(images, tokens)
    assert images.grad is None
    assert all(parameter.grad is None for parameter in captioner.parameters())


def test_logits_of_log_probabilities_pass():
    class LogProbabilities(Right):
        def forward(self, images, tokens, word_mask=None):
            return super().forward(images, tokens, word_mask).log_softmax(dim=2)

    assert RedescriptionLoss(LogProbabilities())(*draw()).isfinite()


def test_integer_logits_are_named():
    class Integers(Right):
        def forward(self, images, tokens, word_mask=None):
            return super().forward(images, tokens, word_mask).long()

    with pytest.raises(ValueError, match=r"returned torch\.int64; return unnormalized log-probabilities as floats"):
        RedescriptionLoss(Integers())(*draw())
