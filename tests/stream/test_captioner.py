"""The captioner against an LSTM cell stepped in a loop, and its beam search against one written as loops."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mirror_modules import Captioner, ImageFeatures
from mirror_modules.stem import ConvBackbone
from mirror_modules.stream import append_end

B, L, V, HIDDEN, EMBEDDING = 3, 7, 11, 5, 4
PAD, END = 0, 1


class Means(nn.Module):
    """A third-party image encoder."""

    image_dim = 3

    def forward(self, images):
        return ImageFeatures(images.mean(dim=3).mT, images.mean(dim=(2, 3)))


class Returns(nn.Module):
    """An image encoder that returns any result of the images."""

    image_dim = 3

    def __init__(self, result):
        super().__init__()
        self.result = result

    def forward(self, images):
        return self.result(images)


def make(image_encoder=None, sharpness=1.0, image_skip=False):
    sizes = {"embedding_dim": EMBEDDING, "hidden_dim": HIDDEN}
    captioner = Captioner(image_encoder or Means(), V, **sizes, image_skip=image_skip)
    # Untrained logits are nearly uniform; scaling them makes the beams differ.
    captioner.output.weight.data.mul_(sharpness)
    nn.init.normal_(captioner.embedding.weight, std=sharpness**0.5)
    return captioner


def draw(batch=B, length=L):
    return torch.rand(batch, 3, 8, 9) * 2 - 1, torch.randint(3, V, (batch, length))


def mask_of(*real_words, length=L):
    return torch.arange(length) < torch.tensor(real_words).unsqueeze(1)


def cell_of(lstm):
    cell = nn.LSTMCell(lstm.input_size, lstm.hidden_size)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        getattr(cell, name).data.copy_(getattr(lstm, f"{name}_l0"))
    return cell


def log_probabilities(captioner, image, words):
    """Log probabilities of the next word, given one image (1, 3, H, W) and the words before it."""
    cell, first = cell_of(captioner.lstm), captioner.encode_images(image)
    h, c = cell(first)
    for word in words:
        h, c = cell(captioner.embedding(torch.tensor([word])), (h, c))
    if captioner.image_skip is not None:
        h = h + first @ captioner.image_skip.weight.T
    return torch.log_softmax(captioner.output(h)[0], dim=0).tolist()


def search_by_loops(captioner, image, beam_width, max_words, end_token):
    """Keep the best of all continuations of all beams; finally choose by mean log probability per word."""
    beams = [((), 0.0)]
    for _ in range(max_words):
        extended = []
        for words, score in beams:
            if words and words[-1] == end_token:
                extended.append((words, score))
                continue
            for word, log_p in enumerate(log_probabilities(captioner, image, words)):
                if word == PAD and end_token is not None:
                    continue
                extended.append(((*words, word), score + log_p))
        beams = sorted(extended, key=lambda beam: -beam[1])[:beam_width]
    words, _ = max(beams, key=lambda beam: beam[1] / max(1, sum(word != PAD for word in beam[0])))
    return list(words) + [PAD] * (max_words - len(words))


@torch.no_grad()
@pytest.mark.parametrize("image_skip", [False, True])
def test_step_t_predicts_word_t_from_the_image_and_the_words_before_it(image_skip):
    captioner, (images, tokens) = make(image_skip=image_skip).eval(), draw()
    logits = captioner(images, tokens)
    assert logits.shape == (B, L, V)
    for b in range(B):
        for t in range(L):
            expected = log_probabilities(captioner, images[b : b + 1], tokens[b, :t].tolist())
            assert_close(torch.log_softmax(logits[b, t], dim=0), torch.tensor(expected))


def test_no_step_depends_on_its_own_word_or_a_later_one():
    captioner, (images, tokens) = make().eval(), draw()
    logits = captioner(images, tokens)
    for t in range(L):
        changed = tokens.clone()
        changed[:, t:] = 2
        assert_close(captioner(images, changed)[:, : t + 1], logits[:, : t + 1], atol=0, rtol=0)
    assert not torch.equal(captioner(images, changed.fill_(2))[:, 1:], logits[:, 1:])


def test_every_step_depends_on_the_image():
    captioner, (images, tokens) = make().eval(), draw()
    images.requires_grad_()
    for t in range(L):
        (gradient,) = torch.autograd.grad(captioner(images, tokens)[:, t].square().sum(), images)
        assert (gradient.abs().sum(dim=(1, 2, 3)) > 0).all()


def test_padding_has_no_influence():
    captioner, (images, tokens) = make().eval(), draw()
    padded = torch.cat((tokens, torch.randint(V, (B, 2))), dim=1)
    images.requires_grad_()
    grad = torch.randn(B, L, V)
    logits, padded_logits = captioner(images, tokens), captioner(images, padded, mask_of(7, 7, 7, length=L + 2))
    assert_close(padded_logits[:, :L], logits)
    expected = torch.autograd.grad(logits, images, grad)
    assert_close(torch.autograd.grad(padded_logits[:, :L], images, grad), expected)


def test_a_sample_alone_equals_the_same_sample_in_a_batch():
    captioner, (images, tokens) = make(ConvBackbone(2, 2)).eval(), draw()
    together = captioner(images, tokens, mask_of(4, 7, 1))
    for b, length in enumerate((4, 7, 1)):
        alone = captioner(images[b : b + 1], tokens[b : b + 1, :length])
        assert_close(alone, together[b : b + 1, :length], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mask", [None, mask_of(4)])
def test_a_batch_of_one_trains(mask):
    captioner = make(ConvBackbone(2, 2)).train()
    images, tokens = draw(batch=1)
    captioner(images, tokens, mask).square().sum().backward()
    for name, parameter in captioner.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def make_early_ending(seed=4, image_skip=False):
    """A captioner that ends some captions early, and images for which it does."""
    torch.manual_seed(seed)
    captioner = make(sharpness=5.0, image_skip=image_skip).eval()
    images = 2 * torch.randn(13, 3, 1, 1).expand(13, 3, 8, 9)
    captioner.output.bias[END] += 1.0
    return captioner, images


@torch.no_grad()
@pytest.mark.parametrize("end_token", [END, None])
@pytest.mark.parametrize("beam_width", [1, 2, 5])
@pytest.mark.parametrize(("seed", "image_skip"), [(1, False), (3, False), (4, False), (4, True)])
def test_describe_matches_a_search_by_loops(seed, image_skip, beam_width, end_token):
    captioner, images = make_early_ending(seed, image_skip)
    images = images[:B]
    described = captioner.describe(images, beam_width=beam_width, max_words=6, end_token=end_token).tolist()
    for b in range(B):
        expected = search_by_loops(captioner, images[b : b + 1], beam_width, 6, end_token)
        assert described[b] == expected


@torch.no_grad()
def test_described_captions_differ_in_length_and_padding_only_follows_the_end():
    captioner, images = make_early_ending()
    captions = captioner.describe(images, beam_width=2, max_words=6).tolist()
    lengths = [caption.index(END) if END in caption else 6 for caption in captions]
    assert len(set(lengths)) > 1
    for caption, length in zip(captions, lengths):
        assert PAD not in caption[:length]
        assert set(caption[length + 1 :]) <= {PAD}


def always(*words):
    """A captioner that outputs these words for every image and then repeats the last one."""
    captioner = Captioner(Means(), V, embedding_dim=EMBEDDING, hidden_dim=len(words))
    with torch.no_grad():
        for parameter in captioner.parameters():
            parameter.zero_()
        size = len(words)
        # With open input and forget gates, unit k switches on one step after unit k - 1 and stays on.
        captioner.lstm.bias_ih_l0[: 2 * size] = 9.0
        captioner.lstm.bias_ih_l0[3 * size :] = 9.0
        captioner.lstm.bias_ih_l0[2 * size] = 9.0
        for k in range(1, size):
            captioner.lstm.weight_hh_l0[2 * size + k, k - 1] = 20.0
        for k, word in enumerate(words):
            captioner.output.weight[word, k] += 20.0 * 2**k
    return captioner.eval()


@pytest.mark.parametrize("beam_width", [1, 3])
def test_nothing_follows_the_end(beam_width):
    captioner, (images, _) = always(3, 4, END), draw()
    assert captioner.describe(images, beam_width=beam_width, max_words=5).tolist() == [[3, 4, END, PAD, PAD]] * B
    assert captioner.describe(images, beam_width=beam_width, max_words=2).tolist() == [[3, 4]] * B
    without_end = captioner.describe(images, beam_width=beam_width, max_words=5, end_token=None)
    assert without_end.tolist() == [[3, 4, END, END, END]] * B


@torch.no_grad()
def test_a_description_alone_equals_the_same_description_in_a_batch():
    captioner, (images, _) = make(ConvBackbone(2, 2), sharpness=3.0).eval(), draw()
    together = captioner.describe(images, beam_width=3)
    alone = torch.cat([captioner.describe(image.unsqueeze(0), beam_width=3) for image in images])
    assert alone.tolist() == together.tolist()


def test_beam_width_may_exceed_the_vocabulary():
    captioner, (images, _) = make(), draw()
    assert captioner.describe(images, beam_width=2 * V, max_words=2).shape == (B, 2)


@pytest.mark.parametrize("beam_width", [1, 3])
@pytest.mark.parametrize("end_token", [END, None])
def test_no_images_have_no_descriptions(beam_width, end_token):
    described = make(ConvBackbone(2, 2)).describe(torch.zeros(0, 3, 8, 9), beam_width=beam_width, end_token=end_token)
    assert described.shape == (0, 20)
    assert described.dtype == torch.long


def test_describe_builds_no_graph():
    assert not make().describe(draw()[0]).requires_grad


@pytest.mark.parametrize("real_words", [(7, 7), (4, 1)])
def test_append_end_appends_to_the_last_real_word(real_words):
    mask = mask_of(*real_words)
    tokens = torch.randint(3, V, (2, L)) * mask
    longer, longer_mask = append_end(tokens, mask)
    assert longer.shape == longer_mask.shape == (2, L + 1)
    for b, length in enumerate(real_words):
        assert longer[b].tolist() == tokens[b, :length].tolist() + [END] + [PAD] * (L - length)
        assert longer_mask[b].tolist() == [True] * (length + 1) + [False] * (L - length)


def test_append_end_without_a_mask_and_with_another_id():
    longer, mask = append_end(torch.tensor([[3, 4]]), end_token=9)
    assert longer.tolist() == [[3, 4, 9]]
    assert mask.all()


@pytest.mark.parametrize(
    ("message", "images", "tokens", "mask"),
    [
        (r"images must be \(B, 3, H, W\), but they are \(3, 8, 9\)", torch.zeros(3, 8, 9), torch.zeros(B, L), None),
        (r"images must be floats", torch.zeros(B, 3, 8, 9).byte(), torch.zeros(B, L), None),
        (r"tokens range from 0 to 11 but vocabulary_size=11", torch.zeros(1, 3, 8, 9), torch.tensor([[0, 11]]), None),
        (
            r"batch sizes disagree \(images: \(3, 3, 8, 9\), tokens: \(2, 7\)\)",
            torch.zeros(3, 3, 8, 9),
            torch.zeros(2, L),
            None,
        ),
        (
            r"batch sizes disagree \(images: \(2, 3, 8, 9\), tokens: \(6, 7\)\)",  # three captions per image
            torch.zeros(2, 3, 8, 9),
            torch.zeros(6, L),
            None,
        ),
        (r"word_mask has padding before a real word", torch.zeros(B, 3, 8, 9), torch.zeros(B, L), ~mask_of(1, 2, 3)),
        (r"caption 2 has no real word", torch.zeros(B, 3, 8, 9), torch.zeros(B, L), mask_of(1, 1, 0)),
        (r"word_mask is \(1, 7\)", torch.zeros(B, 3, 8, 9), torch.zeros(B, L), mask_of(1)),
        (r"captions of length 0", torch.zeros(B, 3, 8, 9), torch.zeros(B, 0), None),
    ],
)
def test_invalid_inputs_raise(message, images, tokens, mask):
    with pytest.raises(ValueError, match="Captioner: " + message):
        make()(images, tokens.long(), mask)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (
            r"Captioner: Identity must declare the size of its features as a positive int `image_dim`, but that is",
            lambda: Captioner(nn.Identity(), V),
        ),
        (
            r"Captioner: Returns must return its features in a field `image`, \(B, 3\) as it declares, .* it returned "
            r"an object of the type tuple",
            lambda: Captioner(Returns(lambda images: (images, images)), V)(*draw()),
        ),
        (
            r"field `image`, \(B, 3\) as it declares, such as `ImageFeatures`, but it returned \(3, 3, 8, 9\)",
            lambda: Captioner(Returns(lambda images: ImageFeatures(images, images)), V)(*draw()),
        ),
        (r"Captioner: vocabulary_size must be a whole number", lambda: Captioner(Means(), 0)),
        (r"Captioner: hidden_dim must be a whole number", lambda: Captioner(Means(), V, hidden_dim=0)),
        (r"describe: beam_width must be a whole number .* it is 0", lambda: make().describe(draw()[0], beam_width=0)),
        (r"describe: max_words must be a whole number .* it is 0", lambda: make().describe(draw()[0], max_words=0)),
        (
            rf"describe: end_token must be a token id, below vocabulary_size={V}, but it is {V}",
            lambda: make().describe(draw()[0], end_token=V),
        ),
        (
            r"append_end: end_token must be a token id, .* it is -1",
            lambda: append_end(torch.ones(1, 2).long(), end_token=-1),
        ),
        (
            r"append_end: end_token must be a token id, .* it is '.'",
            lambda: append_end(torch.ones(1, 2).long(), end_token="."),
        ),
        (
            r"append_end: caption 0 has no real word",
            lambda: append_end(torch.zeros(1, 2).long(), torch.zeros(1, 2).bool()),
        ),
        (r"append_end: tokens must be a tensor of ids \(B, L\), but they are a list", lambda: append_end([[5, 9]])),
        (r"append_end: tokens must be int64 \(B, L\)", lambda: append_end(torch.zeros(1, 2))),
        (
            r"append_end: word_mask has padding before a real word; put the real words first",
            lambda: append_end(torch.tensor([[5, 0, 9]]), torch.tensor([[True, False, True]])),
        ),
    ],
)
def test_invalid_arguments_raise(message, call):
    with pytest.raises(ValueError, match=message):
        call()
