"""Argument checks that all parts share: integer masks, values that must not be read, warnings about likely errors."""

import warnings

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

from mirror_modules import (
    Captioner,
    CascadedGenerator,
    GlamBlock,
    GlobalLocalAttention,
    ImageEncoder,
    ImageFeatures,
    MatchingLoss,
    MirrorGAN,
    MirrorGANConfig,
    PairedDiscriminator,
    RedescriptionLoss,
    RedescriptionScore,
    TextEncoder,
    TextFeatures,
    Vocabulary,
    WordAttention,
    functional,
)
from mirror_modules._checks import check_word_mask
from mirror_modules.data.transforms import to_bytes
from mirror_modules.models import EncoderPair
from mirror_modules.stem import ConvBackbone, word_region_attention

B, L, C, D, E, H, W, R, V, Z = 2, 5, 3, 6, 7, 11, 13, 17, 19, 23  # D is even, for both directions of the text encoder
LENGTHS = torch.tensor([[5], [2]])
MASK = torch.arange(L) < LENGTHS
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


def features(batch=()):
    return torch.randn(*batch, B, C, H, W)


def words(dim=C, batch=()):
    return torch.randn(*batch, B, L, dim)


def tokens(batch=()):
    return torch.randint(3, V, (*batch, B, L))


def images(batch=()):
    return 2 * torch.rand(*batch, B, 3, 16, 16) - 1


def image_features():
    return ImageFeatures(torch.randn(B, R, C), torch.randn(B, C))


def text_features():
    return TextFeatures(words(), torch.randn(B, C))


def make_captioner():
    return Captioner(ConvBackbone(C, 2), V, embedding_dim=4, hidden_dim=5).eval()


def config():
    sizes = {"embedding_dim": 5, "word_dim": D, "noise_dim": Z, "condition_dim": E, "channels": C, "residual_blocks": 1}
    captioner = {"captioner_backbone": "conv", "captioner_embedding_dim": 4, "captioner_hidden_dim": 5}
    return MirrorGANConfig(resolutions=(4, 8), image_backbone="conv", **sizes, **captioner)


def vocabulary():
    return Vocabulary([chr(ord("a") + i) for i in range(V - 3)])


TAKES_A_MASK = {
    "word_attention": lambda mask: functional.word_attention(features(), words(), mask),
    "global_local_attention": lambda mask: functional.global_local_attention(
        features(), words(), torch.randn(B, C), mask, need_weights=True
    ),
    "GlobalLocalAttention": lambda mask: GlobalLocalAttention(C, D, E)(features(), words(D), torch.randn(B, E), mask)[
        :2
    ],
    "WordAttention": lambda mask: WordAttention(C, D)(features(), words(D), word_mask=mask)[:1],
    "CascadedGenerator": lambda mask: CascadedGenerator(Z, E, D, channels=C, resolutions=(4, 8)).eval()(
        torch.randn(B, Z), torch.randn(B, E), words(D), mask
    ),
    "word_region_similarity": lambda mask: functional.word_region_similarity(torch.randn(B, R, C), words(), mask),
    "word_region_attention": lambda mask: word_region_attention(torch.randn(B, R, C), words(), mask),
    "matching_loss": lambda mask: functional.matching_loss(image_features(), text_features(), mask),
    "MatchingLoss": lambda mask: MatchingLoss()(image_features(), text_features(), mask),
    "TextEncoder": lambda mask: TextEncoder(V, feature_dim=D).eval()(tokens(), mask),
    "redescription_loss": lambda mask: functional.redescription_loss(torch.randn(B, L, V), tokens(), mask),
    "RedescriptionLoss": lambda mask: RedescriptionLoss(make_captioner())(images(), tokens(), mask),
    "Captioner": lambda mask: make_captioner()(images(), tokens(), mask),
    "append_end": lambda mask: functional.append_end(tokens(), mask),
    "MirrorGAN": lambda mask: MirrorGAN(config(), vocabulary()).eval()(tokens(), mask).images,
    "EncoderPair": lambda mask: EncoderPair(config(), V).eval()(images(), tokens(), mask),
}
TAKES_IMAGES = {
    "ImageEncoder": lambda batch: ImageEncoder(ConvBackbone(C, 2), D)(batch),
    "PairedDiscriminator": lambda batch: PairedDiscriminator(16, E, channels=C)(batch, torch.randn(B, E)),
    "RedescriptionLoss": lambda batch: RedescriptionLoss(make_captioner())(batch, tokens()),
    "to_bytes": lambda batch: to_bytes(batch),
}


def seeded(call, argument):
    torch.manual_seed(0)
    return tree_leaves(call(argument))


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("name", TAKES_A_MASK)
def test_a_mask_may_consist_of_the_integers_0_and_1(name, dtype):
    expected = seeded(TAKES_A_MASK[name], MASK)
    assert_close(seeded(TAKES_A_MASK[name], MASK.to(dtype)), expected, atol=0, rtol=0)


@pytest.mark.parametrize("name", TAKES_A_MASK)
@pytest.mark.parametrize(
    ("message", "mask"),
    [
        (r"word_mask must be bool, .* but it is torch\.float32; convert it, .*attention_mask\.bool\(\)", MASK.float()),
        (r"integers from 0 to 9, .*; pass attention_mask\.bool\(\), not the token ids", 9 * MASK.long()),
        (r"integers from -1 to 0, ", -MASK.long()),
    ],
)
def test_other_masks_are_refused(name, message, mask):
    with pytest.raises(ValueError, match=message):
        TAKES_A_MASK[name](mask)


@pytest.mark.parametrize("shape", [(), (B,)])
def test_captions_have_an_axis_of_words(shape):
    with pytest.raises(ValueError, match=r"owner: captions must be \(B, L\) or \(B, L, D\), but they are "):
        check_word_mask("owner", torch.zeros(shape), None)


def test_the_mask_is_returned_as_bool():
    assert check_word_mask("owner", words(), None) is None
    assert check_word_mask("owner", words(), MASK) is MASK
    for dtype in INTEGERS:
        assert_close(check_word_mask("owner", words(), MASK.to(dtype)), MASK)
    assert check_word_mask("owner", torch.zeros(0, L), torch.zeros(0, L, dtype=torch.int64)).shape == (0, L)


UNREADABLE = torch.stack((torch.zeros(L), torch.arange(L)))  # a caption without a word, and integers above 1


@pytest.mark.parametrize("mask", [UNREADABLE.long(), UNREADABLE.bool(), ~MASK])
def test_no_value_of_a_mask_is_read_where_it_cannot_be(compiled, mask):
    def check(words, mask):
        return words * check_word_mask("owner", words, mask).unsqueeze(2)

    class Module(torch.nn.Module):
        def forward(self, words, mask):
            return check(words, mask)

    inputs = words(), mask
    expected = inputs[0] * (mask != 0).unsqueeze(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(compiled(check)(*inputs), expected)
        assert_close(torch.func.vmap(lambda w, m: check(w[None], m[None])[0])(*inputs), expected)
        nested = torch.func.vmap(torch.func.grad(lambda w, m: check(w[None], m[None]).sum()))
        assert_close(nested(*inputs), torch.ones_like(expected) * (mask != 0).unsqueeze(2))
        assert check(*(tensor.to("meta") for tensor in inputs)).shape == expected.shape
        with FakeTensorMode() as fake:
            assert check(*map(fake.from_tensor, inputs)).shape == expected.shape
    for strict in (True, False):
        assert_close(torch.export.export(Module(), inputs, strict=strict).module()(*inputs), expected)


def test_under_vmap_a_mask_that_is_the_same_for_all_is_read():
    with pytest.raises(ValueError, match="caption 0 has no real word"):
        torch.func.vmap(lambda words: check_word_mask("owner", words, ~MASK))(words(batch=(3,)))


@pytest.mark.parametrize("mask", [MASK, MASK.long()])
def test_a_mask_without_a_first_word_warns_once(mask):
    padded = torch.nn.functional.pad(mask, (0, 1))  # all captions end with padding, as in an inverted mask they begin
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            check_word_mask("owner", torch.zeros(B, L + 1), 1 - padded.long())
            check_word_mask("other", torch.zeros(B, L + 1), ~padded.bool())
    assert [str(warning.message).split(" first")[0] for warning in caught] == [
        "owner: word_mask marks the",
        "other: word_mask marks the",
    ]
    assert "if it is True for padding, pass ~word_mask" in str(caught[0].message)


class PadsLeft(Captioner):
    """A captioner for which padding is the same word everywhere."""

    def decode(self, first_input, tokens, word_mask=None):
        return super().decode(first_input, tokens.where(word_mask.bool(), 0))


def make_padded():
    return PadsLeft(ConvBackbone(C, 2), V, embedding_dim=4, hidden_dim=5)


def score(mask, method="forward", **options):
    return getattr(RedescriptionScore(make_padded(), **options), method)(images(), tokens(), mask)


# Those that read words in their order refuse such a mask.
IN_ORDER = ("TextEncoder", "MirrorGAN", "EncoderPair", "Captioner", "append_end")
WARN_OF_A_MASK = {name: call for name, call in TAKES_A_MASK.items() if name not in IN_ORDER} | {
    "RedescriptionLoss": lambda mask: RedescriptionLoss(make_padded())(images(), tokens(), mask),
    "GlamBlock": lambda mask: GlamBlock(channels=C, word_dim=D)(features(), words(D), word_mask=mask),
    "RedescriptionScore": lambda mask: score(mask, debias="blank"),
    "RedescriptionScore.score_matrix": lambda mask: score(mask, "score_matrix"),
}


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
@pytest.mark.parametrize("name", WARN_OF_A_MASK)
def test_each_call_warns_once_of_a_mask_whatever_it_calls(name, dtype):
    call, mask = WARN_OF_A_MASK[name], MASK.flip(1).to(dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mask[:, 0] = 0
        call(mask)
        call(mask)
    messages = [str(warning.message) for warning in caught if "word_mask" in str(warning.message)]
    assert len(messages) == 2
    owner = {"MatchingLoss": "matching_loss", "GlamBlock": "WordAttention"}.get(name, name.split(".")[0])
    assert all(message.startswith(f"{owner}: word_mask marks") for message in messages)


@pytest.mark.filterwarnings("error")
def test_a_part_of_a_mask_does_not_warn():
    """All captions of a block may be padded on the left where those of the whole matrix are not."""
    mask = torch.ones(B, L, dtype=torch.bool)
    mask[0, 0] = False
    module = RedescriptionScore(make_padded())
    module.score_matrix(images(), tokens(), mask, batch_size=1)


@pytest.mark.parametrize(
    "rows",
    [
        [[1, 1, 0], [1, 0, 0]],
        [[1, 0, 1], [0, 1, 0]],  # neither a prefix nor a suffix
        [[0, 1, 1], [1, 1, 1]],  # padded on the left to the longest caption
    ],
)
def test_other_masks_do_not_warn(rows):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_word_mask("owner", torch.zeros(2, 3), torch.tensor(rows))


@pytest.mark.parametrize("largest", [1.0, 255.0])
@pytest.mark.parametrize("name", TAKES_IMAGES)
def test_images_without_a_negative_value_warn_once(name, largest):
    batch = largest * torch.rand(B, 3, 16, 16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            TAKES_IMAGES[name](batch)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == len(set(messages)) > 0
    assert all("no value of the images is negative, but images are expected in [-1, 1]" in text for text in messages)


@pytest.mark.parametrize("name", TAKES_IMAGES)
def test_other_images_do_not_warn(name):
    one_negative = torch.rand(B, 3, 16, 16)
    one_negative[0, 2, 3, 5] = -0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in (images(), one_negative, torch.zeros(B, 3, 16, 16)):
            TAKES_IMAGES[name](batch)


def test_no_value_of_an_image_is_read_where_it_cannot_be(compiled):
    network, batch = PairedDiscriminator(16, E, channels=C).eval(), torch.rand(3, B, 3, 16, 16)
    sentence = torch.randn(B, E)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = compiled(network.features)(batch[0])
        together = torch.func.vmap(lambda images: network.logits(network.features(images), sentence).realism)(batch)
    assert expected.shape[0] == B
    assert together.shape == (3, B)


UNDER_VMAP = {
    "word_attention": (lambda *args: functional.word_attention(*args)[0], (features, words)),
    "sentence_attention": (
        lambda maps, sentence, mask: functional.sentence_attention(maps, sentence.mean(dim=1))[0],
        (features, words),
    ),
    "global_local_attention": (
        lambda maps, texts, mask: functional.global_local_attention(maps, texts, texts[:, 0], mask).word_context,
        (features, words),
    ),
    "word_region_similarity": (
        lambda maps, texts, mask: functional.word_region_similarity(maps.flatten(2).mT, texts, mask),
        (features, words),
    ),
    "word_region_attention": (
        lambda maps, texts, mask: word_region_attention(maps.flatten(2).mT, texts, mask),
        (features, words),
    ),
    "matching_loss": (
        lambda maps, texts, mask: (
            functional.matching_loss(
                ImageFeatures(maps.flatten(2).mT, maps.mean(dim=(2, 3))), TextFeatures(texts, texts[:, 0]), mask
            ).total
        ),
        (features, words),
    ),
    "redescription_loss": (
        lambda logits, ids, mask: functional.redescription_loss(logits.flatten(1, 2)[:, :L], ids, mask),
        (lambda batch: torch.randn(*batch, B, L, 1, V), tokens),
    ),
}


@pytest.mark.parametrize("name", UNDER_VMAP)
def test_vmap_of_an_operation_and_of_its_gradient_equals_the_loop(name):
    function, (first, second) = UNDER_VMAP[name]
    batches = 3
    lengths = torch.tensor([[[5], [2]], [[1], [4]], [[3], [3]]])
    inputs = first(batch=(batches,)), second(batch=(batches,)), torch.arange(L) < lengths

    def total(*args):
        return function(*args).square().sum()

    for operation in (function, torch.func.grad(total)):
        expected = torch.stack([operation(*rows) for rows in zip(*inputs)])
        assert_close(torch.func.vmap(operation)(*inputs), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: functional.word_attention(features(), words().numpy()), "word_attention: words"),
        (lambda: functional.sentence_attention(features().numpy(), torch.randn(B, C)), "sentence_attention: features"),
        (lambda: functional.word_region_similarity([[1.0]], words()), "word_region_similarity: regions"),
        (lambda: functional.image_sentence_similarity([[1.0]], [[1.0]]), "image_sentence_similarity: images"),
        (lambda: functional.contrastive_terms([[1.0]]), "contrastive_terms: similarity"),
        (lambda: functional.mismatch([1, 2]), "mismatch: class_ids"),
        (lambda: functional.kl_divergence(torch.zeros(B, C), [0.0]), "kl_divergence: log_variance"),
        (lambda: functional.balance_gradients([1.0], 0.5), "balance_gradients: images"),
        (lambda: functional.redescription_loss([[[1.0]]], torch.ones(1, 1).long()), "redescription_loss: logits"),
        (lambda: GlobalLocalAttention(C, D, E)(features(), words().numpy(), None), "GlobalLocalAttention: words"),
        (lambda: PairedDiscriminator(16, E)(torch.zeros(B, 3, 16, 16).numpy(), None), "PairedDiscriminator: images"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arrays_and_lists_are_named(call, named):
    with pytest.raises(ValueError, match=f"{named} must be a tensor, but it is a .*; torch.as_tensor makes one"):
        call()
