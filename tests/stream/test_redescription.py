"""The redescription loss: the sum over words, and a captioner that stays frozen whatever is done to its owner."""

import copy
import math
import pickle
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.testing import assert_close

from mirror_modules import Captioner, RedescriptionLoss, RedescriptionScore, Vocabulary
from mirror_modules.functional import append_end, redescription_loss
from mirror_modules.stem import ConvBackbone

B, L, V = 3, 5, 7


def mask_of(*real_words, length=L):
    return torch.arange(length) < torch.tensor(real_words).unsqueeze(1)


def loss_by_loops(logits, tokens, mask, reduction):
    total, count, of_captions = 0.0, 0, []
    for b in range(B):
        losses = []
        for t in range(L):
            if mask[b, t]:
                row = logits[b, t].tolist()
                losses.append(math.log(sum(math.exp(value) for value in row)) - row[tokens[b, t]])
        total, count = total + sum(losses), count + len(losses)
        of_captions.append(sum(losses) / len(losses))
    if reduction == "none":
        return torch.tensor(of_captions)
    return total / (count if reduction == "word" else B)


def make_captioner():
    return Captioner(ConvBackbone(2, blocks=2), V, embedding_dim=4, hidden_dim=3)


class Tinted(nn.Module):
    """A third-party captioner without recurrence: it predicts every word from the colors of the image."""

    def __init__(self):
        super().__init__()
        self.norm, self.dropout, self.linear = nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Linear(3, V)

    def forward(self, images, tokens, word_mask):
        color = self.dropout(self.norm(images).square().mean(dim=(2, 3)))
        return self.linear(color).unsqueeze(1).expand(-1, tokens.shape[1], -1)


def draw(batch=B):
    return torch.rand(batch, 3, 8, 9) * 2 - 1, torch.randint(V, (batch, L))


@pytest.mark.parametrize("reduction", ["word", "sentence", "none"])
@pytest.mark.parametrize("real_words", [(5, 5, 5), (5, 2, 1)])
def test_matches_the_loops(real_words, reduction):
    logits, tokens, mask = torch.randn(B, L, V), torch.randint(V, (B, L)), mask_of(*real_words)
    loss = redescription_loss(logits, tokens, mask, reduction=reduction)
    assert_close(loss, torch.as_tensor(loss_by_loops(logits, tokens, mask, reduction)), rtol=1e-5, atol=1e-5)
    assert loss.shape == ((B,) if reduction == "none" else ())


@pytest.mark.parametrize("reduction", ["word", "sentence", "none"])
def test_without_a_mask_all_words_are_real(reduction):
    logits, tokens = torch.randn(B, L, V), torch.randint(V, (B, L))
    expected = redescription_loss(logits, tokens, mask_of(5, 5, 5), reduction=reduction)
    assert_close(redescription_loss(logits, tokens, reduction=reduction), expected)


@pytest.mark.parametrize("mask", [None, mask_of(5, 2, 1)])
@pytest.mark.parametrize("reduction", ["word", "sentence", "none"])
def test_gradients(reduction, mask):
    logits, tokens = torch.randn(B, L, V, dtype=torch.float64, requires_grad=True), torch.randint(V, (B, L))
    assert gradcheck(lambda x: redescription_loss(x, tokens, mask, reduction=reduction), (logits,))


@pytest.mark.parametrize("garbage", [0.0, 1e4, float("inf"), float("nan")])
@pytest.mark.parametrize("reduction", ["word", "sentence", "none"])
def test_padding_has_no_influence(reduction, garbage):
    logits, tokens = torch.randn(B, L, V, requires_grad=True), torch.randint(V, (B, L))
    padded_logits = torch.cat((logits.detach(), torch.full((B, 2, V), garbage)), dim=1).requires_grad_()
    padded_tokens = torch.cat((tokens, torch.randint(V, (B, 2))), dim=1)
    mask, padded_mask = mask_of(5, 2, 1), mask_of(5, 2, 1, length=L + 2)
    loss = redescription_loss(logits, tokens, mask, reduction=reduction)
    padded = redescription_loss(padded_logits, padded_tokens, padded_mask, reduction=reduction)
    loss.sum().backward()
    padded.sum().backward()
    assert_close(padded, loss)
    assert_close(padded_logits.grad[:, :L], logits.grad)
    assert (padded_logits.grad[~padded_mask] == 0).all()


def test_the_batch_loss_is_the_mean_over_sentences():
    logits, tokens, mask = torch.randn(B, L, V), torch.randint(V, (B, L)), mask_of(5, 2, 1)
    alone = [
        redescription_loss(logits[b : b + 1], tokens[b : b + 1], mask[b : b + 1], reduction="sentence")
        for b in range(B)
    ]
    assert_close(redescription_loss(logits, tokens, mask, reduction="sentence"), torch.stack(alone).mean())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    logits, tokens = torch.randn(B, L, V).to(dtype), torch.randint(V, (B, L))
    loss = redescription_loss(logits, tokens, mask_of(5, 2, 1))
    assert loss.dtype == torch.float32
    assert_close(loss, redescription_loss(logits.float(), tokens, mask_of(5, 2, 1)))


def test_int32_tokens_give_the_same_loss():
    logits, tokens = torch.randn(B, L, V), torch.randint(V, (B, L))
    assert_close(redescription_loss(logits, tokens.int()), redescription_loss(logits, tokens))


@pytest.mark.parametrize("mask", [None, mask_of(5, 2, 1)])
def test_the_function_compiles_into_one_graph(compiled, mask):
    logits, tokens = torch.randn(B, L, V, requires_grad=True), torch.randint(V, (B, L))
    loss = compiled(redescription_loss)(logits, tokens, mask)
    assert_close(loss, redescription_loss(logits, tokens, mask))
    loss.backward()
    assert logits.grad.abs().sum() > 0


def test_the_module_compiles_into_one_graph_with_a_captioner_that_does(compiled):
    loss, (images, tokens) = RedescriptionLoss(Tinted()), draw()
    images.requires_grad_()
    value = compiled(loss)(images, tokens, mask_of(5, 2, 1))
    assert_close(value, loss(images, tokens, mask_of(5, 2, 1)))
    value.backward()
    assert images.grad.abs().sum() > 0


@pytest.mark.parametrize("reduction", ["word", "sentence", "none"])
@pytest.mark.parametrize("mask", [None, mask_of(5, 2, 1)])
def test_module_equals_function(mask, reduction):
    captioner, (images, tokens) = make_captioner(), draw()
    loss = RedescriptionLoss(captioner, reduction=reduction)
    logits = captioner(images, tokens, mask)
    assert_close(loss(images, tokens, mask), redescription_loss(logits, tokens, mask, reduction=reduction))


# Actions on the loss, on a model that contains it, and on a model that also owns the captioner.


class Model(nn.Module):
    """A model with a generator, the loss, and the captioner that the loss has frozen, registered last."""

    def __init__(self, captioner):
        super().__init__()
        self.generator = nn.Conv2d(3, 3, 1)
        self.loss = RedescriptionLoss(captioner)
        self.captioner = captioner


def do_nothing(model):
    pass


def train_the_loss(model):
    model.loss.train()


def evaluate_the_loss(model):
    model.loss.eval()


def require_gradients_of_the_loss(model):
    model.loss.requires_grad_(True)


def train_the_model(model):
    model.train()


def evaluate_the_model(model):
    model.eval()


def require_gradients_of_the_model(model):
    model.requires_grad_(True)


def evaluate_and_train_the_model(model):
    model.eval().train().requires_grad_(True)


def train_the_captioner(model):
    model.captioner.train().requires_grad_(True)


ACTIONS = [
    do_nothing,
    train_the_loss,
    evaluate_the_loss,
    require_gradients_of_the_loss,
    train_the_model,
    evaluate_the_model,
    require_gradients_of_the_model,
    evaluate_and_train_the_model,
    train_the_captioner,
]


@pytest.mark.parametrize("captioner", [make_captioner, Tinted])
@pytest.mark.parametrize("act", ACTIONS)
def test_the_image_gets_a_gradient_and_the_captioner_none(act, captioner):
    model, (images, tokens) = Model(captioner()), draw()
    images.requires_grad_()
    state = copy.deepcopy(model.captioner.state_dict())
    act(model)
    model.loss(images, tokens, mask_of(5, 2, 1)).backward()
    assert (images.grad.abs().sum(dim=(1, 2, 3)) > 0).all()
    assert all(parameter.grad is None for parameter in model.captioner.parameters())
    assert_close(model.captioner.state_dict(), state, atol=0, rtol=0)


@pytest.mark.parametrize("act", ACTIONS)
def test_an_optimizer_over_all_parameters_never_updates_the_captioner(act):
    model, (images, tokens) = Model(make_captioner()), draw()
    state, generator = copy.deepcopy(model.captioner.state_dict()), copy.deepcopy(model.generator.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        act(model)
        loss = model.loss(torch.tanh(model.generator(images)), tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_close(model.captioner.state_dict(), state, atol=0, rtol=0)
    assert not torch.equal(model.generator.weight, generator["weight"])


def test_a_gradient_from_the_captioners_own_training_is_discarded():
    captioner, (images, tokens) = make_captioner(), draw()
    captioner(images, tokens).sum().backward()
    loss = RedescriptionLoss(captioner)
    state = copy.deepcopy(captioner.state_dict())
    torch.optim.SGD(loss.parameters(), lr=1.0).step()
    assert_close(captioner.state_dict(), state, atol=0, rtol=0)


@pytest.mark.parametrize("act", ACTIONS)
def test_the_loss_of_an_image_is_deterministic(act):
    model, (images, tokens) = Model(Tinted()), draw()
    first = model.loss(images, tokens)
    act(model)
    assert_close(model.loss(images, tokens), first, atol=0, rtol=0)


@pytest.mark.parametrize("act", ACTIONS)
def test_recurrent_layers_run_in_training_mode_without_dropout(act):
    captioner = make_captioner()
    captioner.lstm = nn.LSTM(4, 3, num_layers=2, batch_first=True, dropout=0.5)
    model, (images, tokens) = Model(captioner), draw()
    act(model)
    assert_close(model.loss(images, tokens), model.loss(images, tokens), atol=0, rtol=0)
    assert captioner.lstm.training
    assert not captioner.image_norm.training


@pytest.mark.gpu
@pytest.mark.parametrize("act", [do_nothing, evaluate_the_model, train_the_model])
def test_cudnn_can_run_backward(act):
    model, (images, tokens) = Model(make_captioner()).cuda(), draw()
    images = images.cuda().requires_grad_()
    act(model)
    model.loss(images, tokens.cuda(), mask_of(5, 2, 1).cuda()).backward()
    assert images.grad.abs().sum() > 0


def test_the_mode_of_the_loss_does_not_reach_the_captioner():
    loss = RedescriptionLoss(make_captioner())
    assert loss.training
    assert loss.eval() is loss
    assert not loss.training
    assert loss.train() is loss
    assert loss.training
    in_training_mode = [module for module in loss.captioner.modules() if module.training]
    assert in_training_mode == [loss.captioner.lstm]


@pytest.mark.parametrize("mask", [None, mask_of(2)])
def test_a_batch_of_one(mask):
    loss, (images, tokens) = RedescriptionLoss(make_captioner()).train(), draw(batch=1)
    images.requires_grad_()
    loss(images, tokens, mask).backward()
    assert images.grad.isfinite().all()
    assert images.grad.abs().sum() > 0


def test_an_image_that_matches_the_caption_has_a_lower_loss():
    captioner = Tinted()
    nn.init.zeros_(captioner.linear.weight)
    captioner.linear.weight.data[3, 0] = 5.0  # red predicts word 3
    loss, tokens = RedescriptionLoss(captioner), torch.full((1, L), 3)
    red, blue = torch.zeros(2, 1, 3, 8, 9)
    red[:, 0] = blue[:, 2] = 1.0
    assert loss(red, tokens) < loss(blue, tokens)


@pytest.mark.parametrize(
    ("message", "logits", "tokens", "mask"),
    [
        (r"logits must be \(B, L, V\) for tokens .* are \(3, 4, 7\) and \(3, 5\)", (B, 4, V), torch.zeros(B, L), None),
        (r"logits must be \(B, L, V\) .* are \(3, 5\) and \(3, 5\)", (B, L), torch.zeros(B, L), None),
        (r"tokens range from 0 to 7 but vocabulary_size=7", (1, 2, V), torch.tensor([[0, 7]]), None),
        (r"caption 1 has no real word", (B, L, V), torch.zeros(B, L), mask_of(5, 0, 1)),
        (r"word_mask is \(2, 5\) but the captions are \(3, 5\)", (B, L, V), torch.zeros(B, L), mask_of(5, 1)),
        (r"word_mask must be bool", (B, L, V), torch.zeros(B, L), mask_of(5, 1, 1).float()),
        (r"captions of length 0", (B, 0, V), torch.zeros(B, 0), None),
    ],
)
def test_invalid_inputs_of_the_function_raise(message, logits, tokens, mask):
    with pytest.raises(ValueError, match="redescription_loss: " + message):
        redescription_loss(torch.zeros(logits), tokens.long(), mask)


def test_logits_and_tokens_of_other_types_raise():
    logits, tokens = torch.zeros(B, L, V), torch.zeros(B, L).long()
    with pytest.raises(ValueError, match=r"logits must be floating point, but they are torch\.int64"):
        redescription_loss(logits.long(), tokens)
    with pytest.raises(ValueError, match="redescription_loss: tokens must be a tensor, but it is a list"):
        redescription_loss(logits, tokens.tolist())


@pytest.mark.parametrize(
    ("message", "images", "tokens"),
    [
        (
            r"RedescriptionLoss: images must be \(B, 3, H, W\), but they are \(3, 3, 8\)",
            torch.zeros(3, 3, 8),
            torch.zeros(B, L),
        ),
        (r"RedescriptionLoss: images must be floats", torch.zeros(B, 3, 8, 9).byte(), torch.zeros(B, L)),
        (
            r"RedescriptionLoss: batch sizes disagree \(images: \(2,",
            torch.zeros(2, 3, 8, 9),
            torch.zeros(B, L).long(),
        ),
        (
            r"RedescriptionLoss: tokens must be int64 \(B, L\), but they are torch\.float32",
            torch.zeros(B, 3, 8, 9),
            torch.zeros(B, L),
        ),
        (
            r"RedescriptionLoss: tokens must be int64 \(B, L\), but they are torch\.int64 \(3,\)",
            torch.zeros(B, 3, 8, 9),
            torch.zeros(B).long(),
        ),
        (
            r"RedescriptionLoss: captions must be token ids \(B, L\), .* a list that starts with \[\[3, 4\]\]; torch",
            torch.zeros(1, 3, 8, 9),
            [[3, 4]],
        ),
        (
            r"RedescriptionLoss: captions must be token ids \(B, L\), or strings, at least one, .* a NoneType",
            torch.zeros(1, 3, 8, 9),
            None,
        ),
        (
            r"RedescriptionLoss: captions must be token ids \(B, L\), .* starts with \[\]",
            torch.zeros(1, 3, 8, 9),
            [],
        ),
        (
            r"RedescriptionLoss: captions are strings, but the captioner Tinted has no method `encode`; pass token ids",
            torch.zeros(2, 3, 8, 9),
            ["a red flower", "a white flower"],
        ),
        (r"RedescriptionLoss: images must be a tensor, but it is a list", [0.5], ["a red flower"]),
        (
            r"RedescriptionLoss: tokens range from -100 to 3, but no id is negative; replace labels of -100",
            torch.zeros(1, 3, 8, 9),
            torch.tensor([[3, -100]]),
        ),
        (r"RedescriptionLoss: captions of length 0", torch.zeros(B, 3, 8, 9), torch.zeros(B, 0).long()),
    ],
)
def test_invalid_inputs_of_the_module_raise_before_the_captioner_runs(message, images, tokens):
    captioner = Tinted()
    captioner.register_forward_pre_hook(lambda *_: pytest.fail("the captioner ran"))
    with pytest.raises(ValueError, match=message):
        RedescriptionLoss(captioner)(images, tokens)


def test_negative_labels_raise_even_at_padding():
    tokens, mask = torch.tensor([[3, -100]]), torch.tensor([[True, False]])
    with pytest.raises(ValueError, match=r"redescription_loss: tokens range from -100 to 3, but no id is negative"):
        redescription_loss(torch.zeros(1, 2, V), tokens, mask)


# Strings as captions

CAPTIONS = ["a red flower", "blue", "a flower"]
VOCABULARY = Vocabulary.build(CAPTIONS)


def encode(captions):
    return append_end(*VOCABULARY.encode(captions))


@pytest.mark.parametrize("reduction", ["word", "sentence", "none"])
def test_strings_are_encoded(reduction):
    captioner = Captioner(ConvBackbone(2, blocks=2), len(VOCABULARY), embedding_dim=4, hidden_dim=3)
    images, loss = draw()[0], RedescriptionLoss(captioner, reduction=reduction, encode=encode)
    expected = loss(images, *encode(CAPTIONS))
    assert_close(loss(images, CAPTIONS), expected)
    assert_close(loss(images, tuple(CAPTIONS)), expected)
    assert_close(loss(images, tokens=CAPTIONS), expected)
    assert_close(loss(images, "a red flower"), loss(images, *encode(["a red flower"] * B)))
    images.requires_grad_()
    loss(images, CAPTIONS).sum().backward()
    assert (images.grad.abs().sum(dim=(1, 2, 3)) > 0).all()
    captioner.encode = encode
    assert_close(RedescriptionLoss(captioner, reduction=reduction)(images, CAPTIONS), expected)


def test_an_encoder_that_is_passed_replaces_that_of_the_captioner():
    captioner = Captioner(ConvBackbone(2, blocks=2), len(VOCABULARY), embedding_dim=4, hidden_dim=3)
    captioner.encode = lambda captions: pytest.fail("the captioner's own")
    loss, images = RedescriptionLoss(captioner, encode=encode), draw()[0]
    assert_close(loss(images, CAPTIONS), loss(images, *encode(CAPTIONS)))


@pytest.mark.parametrize("make", [RedescriptionLoss, RedescriptionScore])
def test_the_error_without_an_encoder_holds_the_lines_to_copy(make):
    captioner = Captioner(ConvBackbone(2, blocks=2), len(VOCABULARY), embedding_dim=4, hidden_dim=3)
    with pytest.raises(ValueError, match="the captioner Captioner has no method `encode`") as caught:
        make(captioner)(draw()[0], CAPTIONS)
    names = {make.__name__: make, "captioner": captioner, "vocabulary": VOCABULARY}
    _, first, second = str(caught.value).splitlines()
    exec(f"{first.strip()}\nmade = {second.strip()}", names)
    assert_close(names["made"](draw()[0], CAPTIONS).shape, make(captioner)(draw()[0], *encode(CAPTIONS)).shape)


@pytest.mark.parametrize("make", [RedescriptionLoss, RedescriptionScore])
@pytest.mark.parametrize(
    ("returned", "came"),
    [
        (lambda tokens, mask: {"input_ids": tokens, "attention_mask": mask}, "dict"),
        (lambda tokens, mask: tokens, r"\(3, 4\)"),
        (lambda tokens, mask: (tokens, None), r"\(3, 4\) and NoneType"),
        (lambda tokens, mask: (tokens.tolist(), mask.tolist()), "list and list"),
        (lambda tokens, mask: (tokens[:2], mask[:2]), r"\(2, 4\) and \(2, 4\)"),
        (lambda tokens, mask: (), "nothing"),
    ],
)
def test_what_encode_returns_is_checked(make, returned, came):
    captioner = Captioner(ConvBackbone(2, blocks=2), len(VOCABULARY), embedding_dim=4, hidden_dim=3)
    module = make(captioner, encode=lambda captions: returned(*encode(captions)))
    message = rf"{make.__name__}: encode must return two tensors, .* both \(3, L\), a row .* returned {came}; with"
    with pytest.raises(ValueError, match=message):
        module(draw()[0], CAPTIONS)


@pytest.mark.parametrize("make", [RedescriptionLoss, RedescriptionScore])
def test_strings_with_a_mask_or_for_other_images(make):
    module = make(Captioner(ConvBackbone(2, blocks=2), len(VOCABULARY), embedding_dim=4, hidden_dim=3), encode=encode)
    with pytest.raises(ValueError, match="word_mask belongs to token ids; with strings, leave it out"):
        module(draw()[0], CAPTIONS, mask_of(5, 2, 1))
    with pytest.raises(ValueError, match=f"{make.__name__}: batch sizes disagree"):
        module(draw()[0], CAPTIONS[:2])


# The check of the captioner at the first call


class Embedded(nn.Module):
    """A captioner that adds embeddings of the words to the colors of the image, for the position of each word.

    `shift` is the distance from a word to the position that it influences: 1 for a captioner whose `logits[:, t]`
    predicts `tokens[:, t]`, 0 for one that predicts the next token, negative for one that is not causal.
    """

    def __init__(self, shift=1, std=1.0):
        super().__init__()
        self.shift, self.embedding, self.image = shift, nn.Embedding(V, V), nn.Linear(3, V)
        nn.init.normal_(self.embedding.weight, std=std)
        self.calls = []

    def forward(self, images, tokens, word_mask=None):
        self.calls.append(tuple(tokens.shape))
        words = self.embedding(tokens)
        if self.shift > 0:
            words = nn.functional.pad(words[:, : -self.shift], (0, 0, self.shift, 0))
        elif self.shift < 0:
            words = nn.functional.pad(words[:, -self.shift :], (0, 0, 0, -self.shift))
        return self.image(images.mean(dim=(2, 3))).unsqueeze(1) + words


SHIFTED = r"RedescriptionLoss: logits\[:, 0\] of the captioner Embedded depends on the token at the same position"
NOT_CAUSAL = (
    r"RedescriptionLoss: logits\[:, 0\] of the captioner Embedded depends on tokens\[:, 1:\]. It must be causal"
)


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("mask", [None, mask_of(5, 2, 1)])
@pytest.mark.parametrize(("dtype", "std"), [(torch.float32, 1e-3), (torch.float64, 1e-6), (torch.bfloat16, 1.0)])
def test_logits_that_predict_the_next_token_raise(dtype, std, mask, length):
    loss, (images, tokens) = RedescriptionLoss(Embedded(shift=0, std=std).to(dtype)), draw()
    mask = None if mask is None else mask[:, :length]
    for _ in range(2):
        with pytest.raises(ValueError, match=SHIFTED + r".*Hugging Face.*logits\[:, :-1\]\. check=False skips"):
            loss(images.to(dtype), tokens[:, :length], mask)


@pytest.mark.parametrize("shift", [-1, -2, -3])
def test_logits_that_depend_on_later_words_raise(shift):
    loss, (images, tokens) = RedescriptionLoss(Embedded(shift)), draw()
    with pytest.raises(ValueError, match=r"Embedded depends on tokens\[:, \d:\]\. It must be causal"):
        loss(images, tokens)


def test_the_error_names_the_positions():
    loss, (images, tokens) = RedescriptionLoss(Embedded(-1)), draw()
    with pytest.raises(ValueError, match=NOT_CAUSAL):
        loss(images, tokens)


@pytest.mark.parametrize("real_words", [1, 2, 3])
def test_logits_at_padding_may_depend_on_any_token(real_words):
    class Careless(Embedded):
        def forward(self, images, tokens, word_mask=None):
            logits = super().forward(images, tokens)
            return logits.where(word_mask.unsqueeze(2), self.embedding(tokens).sum(dim=1, keepdim=True))

    loss, (images, tokens) = RedescriptionLoss(Careless()), draw()
    assert loss(images, tokens, mask_of(real_words, 5, 5)).isfinite()


@pytest.mark.parametrize("captioner", [Embedded, Tinted, make_captioner])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mask", [None, mask_of(5, 2, 1)])
def test_captioners_that_keep_the_contract_pass(captioner, mask, autocast):
    loss, (images, tokens) = RedescriptionLoss(captioner()), draw()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        checked = loss(images, tokens, mask)
    unchecked = RedescriptionLoss(loss.captioner, check=False)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert_close(checked, unchecked(images, tokens, mask), atol=0, rtol=0)


def test_a_shifted_captioner_passes_once_it_is_shifted_back():
    class Shifted(Embedded):
        def forward(self, images, tokens, word_mask=None):
            start = torch.full_like(tokens[:, :1], 1)
            return super().forward(images, torch.cat((start, tokens), dim=1))[:, :-1]

    assert RedescriptionLoss(Shifted(shift=0))(*draw()).isfinite()


def test_the_check_runs_once_on_copies_of_one_image():
    captioner, (images, tokens) = Embedded(), draw()
    loss = RedescriptionLoss(captioner)
    for _ in range(3):
        loss(images, tokens)
    assert captioner.calls == [(5, L), (B, L), (B, L), (B, L)]


def test_copies_and_pickles_of_a_checked_loss_are_checked():
    loss, inputs = RedescriptionLoss(Embedded()), draw()
    loss(*inputs)
    loss.captioner.calls.clear()
    for copied in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        copied(*inputs)
        assert copied.captioner.calls == [(B, L)]
    fresh = copy.deepcopy(RedescriptionLoss(Embedded(shift=0)))
    with pytest.raises(ValueError, match=SHIFTED):
        fresh(*inputs)


def test_without_the_check_a_shifted_captioner_runs():
    loss, inputs = RedescriptionLoss(Embedded(shift=0), check=False), draw()
    assert loss(*inputs).isfinite()
    assert loss.captioner.calls == [(B, L)]


def test_a_compiled_graph_does_not_check(compiled):
    loss, (images, tokens) = RedescriptionLoss(Embedded(shift=0)), draw()
    assert compiled(loss)(images, tokens).isfinite()
    with pytest.raises(ValueError, match=SHIFTED):
        loss(images, tokens)


class Restless(Embedded):
    """A captioner that counts its calls in buffers, in place and not, and draws random numbers."""

    def __init__(self, noise=0.0):
        super().__init__()
        self.noise = noise
        self.register_buffer("in_place", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))

    def forward(self, images, tokens, word_mask=None):
        self.in_place += 1
        self.replaced = self.replaced + 1
        logits = super().forward(images, tokens)
        return logits + self.noise * torch.randn_like(logits)


@pytest.mark.parametrize("noise", [0.0, 1e-3, 10.0])
def test_the_check_changes_no_random_state_no_buffer_and_no_mode(noise):
    results = []
    for check in (False, True):
        torch.manual_seed(5)
        loss, inputs = RedescriptionLoss(Restless(noise), check=check), draw()
        modes = [module.training for module in loss.modules()]
        in_place = loss.captioner.in_place
        results.append((loss(*inputs).item(), torch.rand(3), loss.captioner.state_dict()))
        assert loss.captioner.in_place is in_place
        assert [module.training for module in loss.modules()] == modes
    assert_close(results[1], results[0], atol=0, rtol=0)


def test_the_check_restores_buffers_after_an_error_of_the_captioner():
    class Failing(Restless):
        def forward(self, images, tokens, word_mask=None):
            super().forward(images, tokens)
            raise RuntimeError("out of order")

    loss = RedescriptionLoss(Failing())
    with pytest.raises(RuntimeError, match="out of order"):
        loss(*draw())
    assert not loss.captioner.in_place
    assert not loss.captioner.replaced


def test_the_check_does_not_disturb_a_graph_that_holds_the_buffers():
    captioner, (images, tokens) = Tinted().eval(), draw()
    images.requires_grad_()
    earlier = captioner(images, tokens, None).sum()
    RedescriptionLoss(captioner)(images, tokens).backward()
    earlier.backward()
    assert images.grad.isfinite().all()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_check_runs_without_gradients(context):
    inputs = draw()
    with context():
        assert RedescriptionLoss(Embedded())(*inputs).isfinite()
        assert RedescriptionLoss(Restless())(*inputs).isfinite()
        with pytest.raises(ValueError, match=SHIFTED):
            RedescriptionLoss(Embedded(shift=0))(*inputs)


def test_infinite_logits_do_not_hide_a_shift():
    class Suppressing(Embedded):
        def forward(self, images, tokens, word_mask=None):
            logits = super().forward(images, tokens)
            logits[:, :, 0] = -math.inf
            return logits

    (images, tokens) = draw()
    assert RedescriptionLoss(Suppressing())(images, tokens.clamp(min=1)).isfinite()
    with pytest.raises(ValueError, match="token at the same position"):
        RedescriptionLoss(Suppressing(shift=0))(images, tokens)


def test_tokens_of_one_id_are_enough():
    images, tokens = draw()[0], torch.full((B, L), 3)
    assert RedescriptionLoss(Embedded())(images, tokens).isfinite()
    with pytest.raises(ValueError, match=SHIFTED):
        RedescriptionLoss(Embedded(shift=0))(images, tokens)


def test_an_empty_batch_is_not_checked():
    loss = RedescriptionLoss(Embedded(shift=0), reduction="sentence")
    loss(torch.zeros(0, 3, 8, 9), torch.zeros(0, L).long())
    assert loss.captioner.calls == [(0, L)]
    with pytest.raises(ValueError, match=SHIFTED):
        loss(*draw())


class Output(NamedTuple):
    logits: torch.Tensor


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"but it returned a Output; return its `logits`\.", Output),
        (r"but it returned a list\.", list),
        (r"but it returned \(\d, 4, 7\)\.", lambda logits: logits[:, 1:]),
        (r"but it returned \(\d, 35\)\.", lambda logits: logits.flatten(1)),
    ],
)
def test_results_that_are_no_logits_raise(message, change, check):
    class Other(Embedded):
        def forward(self, images, tokens, word_mask=None):
            return change(super().forward(images, tokens))

    with pytest.raises(ValueError, match=r"the captioner Other must return logits \(B, L, V\) for tokens .*" + message):
        RedescriptionLoss(Other(), check=check)(*draw())


def test_a_captioner_must_be_a_module():
    with pytest.raises(ValueError, match=r"RedescriptionLoss: captioner must be an nn\.Module, but it is a function"):
        RedescriptionLoss(lambda images, tokens, word_mask: None)


def test_an_unknown_reduction_raises():
    with pytest.raises(
        ValueError, match=r"redescription_loss: reduction must be one of 'word', 'sentence', 'none', but it is 'sum'"
    ):
        redescription_loss(torch.zeros(B, L, V), torch.zeros(B, L).long(), reduction="sum")
    with pytest.raises(ValueError, match=r"RedescriptionLoss: reduction must be one of"):
        RedescriptionLoss(Tinted(), reduction="mean")
