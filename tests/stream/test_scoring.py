"""Caption likelihood per image: against plain loops, its prior, matrices, strings, gradients and errors."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mirror_modules import Captioner, RedescriptionLoss, RedescriptionScore, Vocabulary
from mirror_modules.functional import append_end, image_information
from mirror_modules.stem import ConvBackbone

B, L, M, R, V, H, W = 3, 5, 7, 4, 11, 8, 13
CAPTIONS = [
    "a small red flower",
    "a blue bird",
    "a large blue flower with petals",
    "a bird",
    "red",
    "a flower",
    "petals",
]
VOCABULARY = Vocabulary.build([*CAPTIONS])


def encode(captions):
    return append_end(*VOCABULARY.encode(captions))


class Plain(nn.Module):
    """A causal captioner without the methods that divide the work."""

    def __init__(self, size=V):
        super().__init__()
        self.calls = []
        torch.manual_seed(2)
        self.embedding, self.image, self.output = nn.Embedding(size, 17), nn.Linear(3, 17), nn.Linear(17, size)

    def forward(self, images, tokens, word_mask=None):
        self.calls.append(len(images))
        words = nn.functional.pad(self.embedding(tokens)[:, :-1], (0, 0, 1, 0)).cumsum(dim=1)
        return self.output(torch.tanh(self.image(images.mean(dim=(2, 3))).unsqueeze(1) + words))


class Parts(Plain):
    """The same with these methods, which count their calls."""

    def __init__(self, size=V):
        super().__init__(size)
        self.encoded = self.decoded = 0

    def encode_images(self, images):
        self.encoded += len(images)
        return images

    def decode(self, encoded, tokens, word_mask=None):
        self.decoded += len(tokens)
        return Plain.forward(self, encoded.repeat(len(tokens) // len(encoded), 1, 1, 1), tokens, word_mask)


def make_captioner():
    torch.manual_seed(2)
    return Captioner(ConvBackbone(2, blocks=2), V, embedding_dim=4, hidden_dim=3)


CAPTIONERS = pytest.mark.parametrize("make", [Plain, Parts, make_captioner])


def draw(captions=B, images=B):
    random = torch.Generator().manual_seed(1)
    mask = torch.arange(L) < torch.tensor([[5], [2], [1], [4], [3], [5], [2]])[:captions]
    tokens = torch.randint(V, (captions, L), generator=random)
    return (torch.rand(images, 3, H, W, generator=random) * 2 - 1).requires_grad_(), tokens, mask


def log_likelihood_by_loops(captioner, image, tokens, mask):
    """The sum over the words of one caption, computed from a single row without padding."""
    words = [int(token) for token, is_real in zip(tokens, mask) if is_real]
    logits = captioner(image.unsqueeze(0), torch.tensor([words]))[0].tolist()
    total = sum(row[word] - math.log(sum(map(math.exp, row))) for row, word in zip(logits, words))
    return total, len(words)


def by_loops(captioner, images, tokens, mask, reference=()):
    """Scores (N, M); with reference images, minus the logarithm of the mean likelihood given these."""
    scores = []
    for image in images:
        scores.append([])
        for row, real in zip(tokens, mask):
            total, words = log_likelihood_by_loops(captioner, image, row, real)
            if len(reference):
                others = [log_likelihood_by_loops(captioner, other, row, real)[0] for other in reference]
                total -= math.log(sum(map(math.exp, others)) / len(others))
            scores[-1].append(total / words)
    return torch.tensor(scores)


@CAPTIONERS
@pytest.mark.parametrize("debias", [None, "blank", "prior"])
def test_scores_match_the_loops(make, debias):
    captioner, (images, tokens, mask) = make(), draw(M)
    reference = torch.rand(R, 3, H, W) * 2 - 1 if debias == "prior" else None
    score = RedescriptionScore(captioner, debias=debias, reference=reference)
    with torch.no_grad():
        others = {None: [], "blank": torch.zeros(1, 3, H, W), "prior": reference}[debias]
        expected = by_loops(captioner, images, tokens, mask, others)
        assert_close(score(images, tokens[:B], mask[:B]), expected[:, :B].diagonal(), rtol=1e-4, atol=1e-5)
        for batch_size in (1, 4, 5, 256):
            matrix = score.score_matrix(images, tokens, mask, batch_size=batch_size)
            assert_close(matrix, expected, rtol=1e-4, atol=1e-5)


@CAPTIONERS
def test_the_score_is_the_negative_loss_of_each_caption(make):
    captioner, inputs = make(), draw()
    loss = RedescriptionLoss(captioner, reduction="none")(*inputs)
    assert_close(RedescriptionScore(captioner)(*inputs), -loss)


@CAPTIONERS
@pytest.mark.parametrize("debias", [None, "blank"])
def test_the_gradient_of_scores_and_of_matrices(make, debias):
    images, tokens, mask = draw()
    score = RedescriptionScore(make(), debias=debias).double()
    images = images.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: score(x, tokens, mask), (images,), atol=1e-6)
    (of_scores,) = torch.autograd.grad(score(images, tokens, mask).sum(), images)
    (of_matrix,) = torch.autograd.grad(score.score_matrix(images, tokens, mask).diagonal().sum(), images)
    assert_close(of_matrix, of_scores)
    # The prior is a constant: it does not change the gradient.
    (plain,) = torch.autograd.grad(RedescriptionScore(score.captioner)(images, tokens, mask).sum(), images)
    assert_close(of_scores, plain)


def test_a_matrix_encodes_each_image_once():
    captioner, (images, tokens, mask) = Parts(), draw(M)
    score = RedescriptionScore(captioner, check=False)
    score.score_matrix(images, tokens, mask)
    assert (captioner.encoded, captioner.decoded) == (B, B * M)
    captioner.encoded = captioner.decoded = 0
    score.score_matrix(images, tokens, mask, batch_size=2)
    assert (captioner.encoded, captioner.decoded) == (B, B * M)
    assert max(captioner.calls) <= B * M


def test_the_captioner_is_frozen_and_stays_so():
    captioner, (images, tokens, mask) = make_captioner(), draw()
    score = RedescriptionScore(captioner)
    score.train()
    score.requires_grad_(True)
    score(images, tokens, mask).sum().backward()
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in captioner.parameters())
    assert not captioner.image_norm.training


def test_strings_are_encoded():
    captioner, images = make_captioner(), draw()[0]
    captioner = Captioner(ConvBackbone(2, blocks=2), len(VOCABULARY), embedding_dim=4, hidden_dim=3)
    score = RedescriptionScore(captioner, encode=encode)
    expected = score(images, *encode(CAPTIONS[:B]))
    assert_close(score(images, CAPTIONS[:B]), expected)
    assert_close(score(images, tuple(CAPTIONS[:B])), expected)
    assert_close(score(images, CAPTIONS[0]), score(images, [CAPTIONS[0]] * B))
    assert_close(score.score_matrix(images, CAPTIONS), score.score_matrix(images, *encode(CAPTIONS)))
    assert score.score_matrix(images, CAPTIONS[0]).shape == (B, 1)
    captioner.encode = encode
    assert_close(RedescriptionScore(captioner)(images, CAPTIONS[:B]), expected)


class Answering(Plain):
    """The question is the caption between two words, the answer one more."""

    def encode_answer(self, questions, answer):
        assert all(question.startswith("is it ") for question in questions)
        tokens, mask = VOCABULARY.encode([f"{question[6:]} {answer}" for question in questions])
        last = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
        return tokens, mask, last

    def encode(self, captions):
        return encode(captions)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("debias", [None, "blank"])
def test_a_question_is_scored_by_the_probability_of_its_answer(debias):
    captioner, images = Answering(len(VOCABULARY)), draw()[0]
    score = RedescriptionScore(captioner, yes_no="is it {}", answer="red", debias=debias)
    values, matrix = score(images, CAPTIONS[:B]), score.score_matrix(images, CAPTIONS[:B])
    red = VOCABULARY.encode(["red"])[0].item()
    for i, image in enumerate(images):
        for j, caption in enumerate(CAPTIONS[:B]):
            tokens = VOCABULARY.encode([f"{caption} red"])[0]
            expected = captioner(image.unsqueeze(0), tokens)[0, -1].log_softmax(dim=0)[red]
            if debias:
                expected = expected - captioner(torch.zeros(1, 3, H, W), tokens)[0, -1].log_softmax(dim=0)[red]
            assert_close(matrix[i, j], expected)
            if i == j:
                assert_close(values[i], expected)


def test_image_information_matches_the_loops():
    own, prior, count = -torch.rand(B), -torch.rand(R, B), torch.tensor([5, 2, 1])
    expected = [
        (n * o - math.log(sum(math.exp(n * p) for p in column) / R)) / n
        for o, column, n in zip(own.tolist(), prior.T.tolist(), count.tolist())
    ]
    assert_close(image_information(own, prior, count), torch.tensor(expected))
    assert_close(image_information(own, prior[0]), own - prior[0])
    assert_close(image_information(own, prior[:1]), own - prior[0])


def test_likelihoods_of_long_captions_do_not_underflow():
    own, prior = torch.tensor([-9.0]), torch.tensor([[-10.0], [-12.0]])
    assert_close(image_information(own, prior, torch.tensor([500])), torch.tensor([1 + math.log(2) / 500]))


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"log_likelihood must be a tensor, but it is a list", ([-1.0], torch.zeros(1))),
        (r"log_likelihood must be \(B,\) and prior .* are \(3,\) and \(2,\)", (torch.zeros(3), torch.zeros(2))),
        (r"log_likelihood must be at most 0, .* reaches 1\.5; of a loss", (torch.tensor([1.5]), torch.zeros(1))),
        (r"prior must be at most 0, .* reaches 2; of a loss", (torch.zeros(1), torch.tensor([2.0]))),
        (r"are \(3, 1\) and \(3,\)", (torch.zeros(3, 1), torch.zeros(3))),
        (r"word_count must be \(B,\) and R at least 1", (torch.zeros(3), torch.zeros(2, 3))),
        (r"word_count must be \(B,\)", (torch.zeros(3), torch.zeros(2, 3), torch.zeros(2))),
        (r"word_count must be \(B,\)", (torch.zeros(3), torch.zeros(2, 3), [1, 1, 1])),
        (r"R at least 1", (torch.zeros(3), torch.zeros(0, 3), torch.ones(3))),
    ],
)
def test_invalid_log_likelihoods(message, arguments):
    with pytest.raises(ValueError, match="image_information: .*" + message):
        image_information(*arguments)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (r"debias must be one of 'blank', 'prior', but it is 'none'", {"debias": "none"}),
        (r"reference is needed for debias='prior', .* reference is missing", {"debias": "prior"}),
        (r"reference is needed for debias='prior', .* is given", {"reference": torch.zeros(2, 3, 4, 4)}),
        (r"reference: images must be \(B, 3, H, W\)", {"debias": "prior", "reference": torch.zeros(3, 4, 4)}),
        (r"yes_no must be True, or a question that contains \{\} once, .* 'is it so'", {"yes_no": "is it so"}),
        (r"yes_no must be True, or a question that contains \{\} once, .* but it is ''", {"yes_no": ""}),
        (r"yes_no must be True, or a question that contains \{\} once, .* but it is 7", {"yes_no": 7}),
        (r"reference has no images \(\(0, 3, 4, 4\)\)", {"debias": "prior", "reference": torch.zeros(0, 3, 4, 4)}),
        (r"yes_no needs a captioner with a method encode_answer", {"yes_no": True}),
    ],
)
def test_invalid_options(message, options):
    with pytest.raises(ValueError, match="RedescriptionScore: ?" + message):
        RedescriptionScore(Plain(), **options)


@pytest.mark.parametrize(
    ("message", "images", "captions", "mask"),
    [
        (r"images must be a tensor, but it is a list", [1.0], CAPTIONS[:1], None),
        (r"batch sizes disagree \(images: \(3, .* tokens: \(2,", None, torch.ones(2, L).long(), None),
        (r"batch sizes disagree", None, CAPTIONS[:2], None),
        (r"captions must be token ids \(B, L\), or strings, at least one", None, [], None),
        (r"captions must be token ids \(B, L\), or strings", None, [7, 8, 9], None),
        (r"captions must be token ids .* torch\.as_tensor", None, [[7, 8, 9]] * B, torch.ones(B, 3).bool()),
        (r"word_mask belongs to token ids; with strings, leave it out", None, CAPTIONS[:B], torch.ones(B, L).bool()),
        (r"tokens must be int64 \(B, L\), but they are torch.float32", None, torch.ones(B, L), None),
    ],
)
def test_invalid_inputs(message, images, captions, mask):
    score = RedescriptionScore(Plain(len(VOCABULARY)), encode=encode)
    with pytest.raises(ValueError, match="RedescriptionScore: " + message):
        score(draw()[0] if images is None else images, captions, mask)


def test_strings_without_an_encoder():
    with pytest.raises(ValueError, match=r"captions are strings, but the captioner Plain has no method `encode`; pass"):
        RedescriptionScore(Plain())(draw()[0], CAPTIONS[:B])


def test_token_ids_with_a_question():
    score = RedescriptionScore(Answering(), yes_no="is it {}")
    with pytest.raises(ValueError, match="with yes_no, captions must be strings, which fill the question"):
        score(*draw())


def test_the_reference_moves_with_the_score_but_is_not_saved():
    score = RedescriptionScore(Plain(), debias="prior", reference=torch.zeros(R, 3, H, W)).double()
    assert score.reference.dtype == torch.float64
    assert "reference" not in score.state_dict()


@CAPTIONERS
@pytest.mark.parametrize("debias", [None, "blank", "prior"])
@pytest.mark.parametrize(("images", "captions"), [(0, M), (2, 0), (0, 0)])
def test_a_matrix_without_a_pair(make, debias, images, captions):
    reference = torch.zeros(R, 3, H, W) if debias == "prior" else None
    score = RedescriptionScore(make(), debias=debias, reference=reference)
    x = torch.zeros(images, 3, H, W, requires_grad=True)
    matrix = score.score_matrix(x, torch.ones(captions, L, dtype=torch.long))
    assert matrix.shape == (images, captions)
    matrix.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("captions", ["a bird", [], torch.ones(0, L, dtype=torch.long)])
def test_a_batch_without_an_image(captions):
    x = torch.zeros(0, 3, H, W, requires_grad=True)
    scores = RedescriptionScore(Plain(len(VOCABULARY)), encode=encode)(x, captions)
    assert scores.shape == (0,)
    scores.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("is_checked", [False, True])
def test_transforms_of_functions(is_checked):
    score, (images, tokens, mask) = RedescriptionScore(Plain()), draw()
    if is_checked:
        score(images, tokens, mask)
    gradient = torch.func.grad(lambda x: score(x, tokens, mask).sum())(images.detach())
    (expected,) = torch.autograd.grad(score(images, tokens, mask).sum(), images)
    assert_close(gradient, expected)


def test_a_reference_with_a_graph_can_be_copied():
    reference = torch.zeros(R, 3, H, W, requires_grad=True) * 2
    score = RedescriptionScore(Plain(), debias="prior", reference=reference)
    images, tokens, mask = draw()
    assert torch.equal(copy.deepcopy(score)(images, tokens, mask), score(images, tokens, mask))
