"""The text encoder against LSTM cells stepped by hand, one direction and one caption at a time."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mirror_modules import TextEncoder
from mirror_modules.stem import text_encoder

B, L, V, D = 3, 7, 13, 10
LENGTHS = (4, 7, 1)


def make(dropout=0.5):
    return TextEncoder(V, embedding_dim=5, feature_dim=D, dropout=dropout)


def draw(lengths=LENGTHS):
    word_mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    return torch.randint(3, V, word_mask.shape) * word_mask, word_mask


def cell_of(lstm, suffix):
    cell = nn.LSTMCell(lstm.input_size, lstm.hidden_size)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        getattr(cell, name).data.copy_(getattr(lstm, f"{name}_l0{suffix}"))
    return cell


def encode_by_loops(encoder, tokens, length):
    forward, backward = cell_of(encoder.lstm, ""), cell_of(encoder.lstm, "_reverse")
    words = torch.zeros(len(tokens), D)
    half = D // 2
    state = torch.zeros(1, half), torch.zeros(1, half)
    for l in range(length):
        state = forward(encoder.embedding(tokens[l : l + 1]), state)
        words[l, :half] = state[0][0]
    reverse_state = torch.zeros(1, half), torch.zeros(1, half)
    for l in reversed(range(length)):
        reverse_state = backward(encoder.embedding(tokens[l : l + 1]), reverse_state)
        words[l, half:] = reverse_state[0][0]
    return words, torch.cat((state[0][0], reverse_state[0][0]))


@torch.no_grad()
def test_matches_the_loops():
    encoder, (tokens, word_mask) = make().eval(), draw()
    words, sentence = encoder(tokens, word_mask)
    for b in range(B):
        assert_close((words[b], sentence[b]), encode_by_loops(encoder, tokens[b], LENGTHS[b]))


def test_without_a_mask_all_words_are_real():
    encoder, (tokens, _) = make().eval(), draw((7, 7))
    assert_close(tuple(encoder(tokens)), tuple(encoder(tokens, torch.ones(2, L, dtype=torch.bool))))


def test_a_caption_alone_equals_the_same_caption_in_a_batch():
    encoder, (tokens, word_mask) = make().eval(), draw()
    words, sentence = encoder(tokens, word_mask)
    for b, length in enumerate(LENGTHS):
        alone = encoder(tokens[b : b + 1, :length])
        assert_close(alone.words, words[b : b + 1, :length], atol=1e-5, rtol=1e-5)
        assert_close(alone.sentence, sentence[b : b + 1], atol=1e-5, rtol=1e-5)


def test_padding_has_no_influence():
    encoder, (tokens, word_mask) = make().eval(), draw()
    padded_tokens = torch.cat((tokens, torch.randint(V, (B, 2))), dim=1)
    padded_tokens[0, 4:] = 5
    padded_mask = torch.cat((word_mask, torch.zeros(B, 2, dtype=torch.bool)), dim=1)
    grads = []
    for inputs in ((tokens, word_mask), (padded_tokens, padded_mask)):
        words, sentence = encoder(*inputs)
        encoder.zero_grad()
        (words[:, :L].square().sum() + sentence.sum()).backward()
        grads.append({name: parameter.grad.clone() for name, parameter in encoder.named_parameters()})
        assert (words[~inputs[1]] == 0).all()
        assert words.shape == (*inputs[0].shape, D)
    assert_close(grads[1], grads[0])
    assert_close(tuple(encoder(padded_tokens, padded_mask))[1], encoder(tokens, word_mask).sentence)


def test_padding_embeddings_have_no_gradient():
    encoder = make(dropout=0.0)
    encoder(
        torch.tensor([[3, 4, 0, 0], [5, 6, 7, 8]]), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    ).words.sum().backward()
    assert (encoder.embedding.weight.grad[0] == 0).all()
    assert (encoder.embedding.weight.grad[3:9] != 0).any(dim=1).all()


def test_dropout_applies_in_training_only():
    encoder, (tokens, word_mask) = make(), draw()
    assert not torch.equal(encoder(tokens, word_mask).sentence, encoder(tokens, word_mask).sentence)
    encoder.eval()
    assert torch.equal(encoder(tokens, word_mask).sentence, encoder(tokens, word_mask).sentence)


# Without reading the lengths, as in compiled and exported graphs


def encode_without_reading(encoder, tokens, word_mask):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_encoder, "is_readable", lambda _: False)
        return encoder(tokens, word_mask)


@pytest.mark.parametrize("lengths", [LENGTHS, (7, 7, 7), (1, 1), (5,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_aligned_captions_equal_packed_ones_with_their_gradients(lengths, dtype):
    encoder, (tokens, word_mask) = make().to(dtype), draw(lengths)
    results, gradients = [], []
    for encode in (type(encoder).__call__, encode_without_reading):
        torch.manual_seed(3)  # of the dropout
        words, sentence = encode(encoder, tokens, word_mask)
        encoder.zero_grad()
        (words.square().sum() + sentence.sin().sum()).backward()
        results.append((words, sentence))
        gradients.append({name: parameter.grad.clone() for name, parameter in encoder.named_parameters()})
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    assert_close(results[1], results[0], atol=tolerance, rtol=tolerance)
    assert_close(gradients[1], gradients[0], atol=10 * tolerance, rtol=10 * tolerance)
    assert (results[1][0][~word_mask] == 0).all()


@torch.no_grad()
def test_aligned_captions_match_the_loops():
    encoder, (tokens, word_mask) = make().eval(), draw()
    words, sentence = encode_without_reading(encoder, tokens, word_mask)
    for b in range(B):
        assert_close((words[b], sentence[b]), encode_by_loops(encoder, tokens[b], LENGTHS[b]))


def test_padding_has_no_influence_on_aligned_captions():
    encoder, (tokens, word_mask) = make().eval(), draw()
    garbage = torch.where(word_mask, tokens, torch.randint(V, tokens.shape))
    expected = encode_without_reading(encoder, tokens, word_mask)
    assert_close(encode_without_reading(encoder, garbage, word_mask), expected, atol=0, rtol=0)


def test_a_caption_without_words_is_finite_where_it_cannot_be_refused():
    encoder, (tokens, word_mask) = make().eval(), draw()
    words, sentence = encoder._aligned(encoder.embedding(tokens), word_mask & (torch.arange(B) != 1).unsqueeze(1))
    assert (words[1] == 0).all()
    assert sentence.isfinite().all()


def test_compiled_encoders_equal_eager_ones():
    torch.compiler.reset()
    encoder, (tokens, word_mask) = make().eval(), draw()
    compiled = torch.compile(encoder, backend="aot_eager")
    assert_close(tuple(compiled(tokens, word_mask)), tuple(encoder(tokens, word_mask)), atol=1e-6, rtol=1e-6)


def test_meta_tensors_have_the_shapes_of_the_features():
    tokens, word_mask = draw()
    words, sentence = make().to("meta")(tokens.to("meta"), word_mask.to("meta"))
    assert (words.shape, sentence.shape) == ((B, L, D), (B, D))


def test_no_captions_have_no_features():
    words, sentence = make()(torch.zeros(0, L).long())
    assert (words.shape, sentence.shape) == ((0, L, D), (0, D))


@pytest.mark.parametrize("mask", [None, torch.tensor([[True, True, False]])])
def test_a_batch_of_one_trains(mask):
    encoder = make().train()
    words, sentence = encoder(torch.tensor([[3, 4, 0]]), mask)
    (words.square().sum() + sentence.sum()).backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_int32_tokens_are_accepted():
    encoder, (tokens, word_mask) = make().eval(), draw()
    assert_close(encoder(tokens.int(), word_mask).words, encoder(tokens, word_mask).words)


@pytest.mark.parametrize(
    ("message", "tokens", "mask"),
    [
        (r"tokens range from 3 to 13 but vocabulary_size=13; were they encoded with another", [[3, 13]], None),
        (r"tokens range from -1 to 3", [[3, -1]], None),
        (r"tokens must be int64 \(B, L\), but they are torch\.int64 \(2,\)", [3, 4], None),
        (r"tokens must be int64 \(B, L\), but they are torch\.float32 \(1, 2\)", [[3.0, 4.0]], None),
        (r"captions of length 0 \(\(1, 0\)\)", torch.zeros(1, 0).long(), None),
        (r"word_mask must be bool, .* it is torch\.float32", [[3, 4]], [[1.0, 0.0]]),
        (r"word_mask is \(1, 3\) but the captions are \(1, 2\) \(B, L\)", [[3, 4]], [[True, True, False]]),
        (r"caption 1 has no real word", [[3, 4], [3, 4]], [[True, True], [False, False]]),
        (r"word_mask has padding before a real word; put the real words first", [[3, 4]], [[False, True]]),
    ],
)
def test_errors_of_forward(message, tokens, mask):
    with pytest.raises(ValueError, match="TextEncoder: " + message):
        make()(torch.as_tensor(tokens), None if mask is None else torch.tensor(mask))


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (r"vocabulary_size must be a whole number of at least 1, but it is 0", {"vocabulary_size": 0}),
        (r"embedding_dim must be a whole number", {"vocabulary_size": V, "embedding_dim": -1}),
        (r"feature_dim must be even, half for each direction, but it is 7", {"vocabulary_size": V, "feature_dim": 7}),
        (r"dropout must be a probability from 0 to 1, but it is 2", {"vocabulary_size": V, "dropout": 2}),
        (r"dropout must be a finite number, but it is nan", {"vocabulary_size": V, "dropout": float("nan")}),
    ],
)
def test_errors_of_the_constructor(message, options):
    with pytest.raises(ValueError, match="TextEncoder: " + message):
        TextEncoder(**options)
