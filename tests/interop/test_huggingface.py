"""Captioners of Hugging Face, tiny and random, of the real classes: their own loss, gradients, padding, errors."""

import inspect

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mirror_modules import RedescriptionLoss, RedescriptionScore

transformers = pytest.importorskip("transformers")

from mirror_modules.interop import captioner_from  # noqa: E402
from mirror_modules.interop.huggingface.captioner import _FAMILIES  # noqa: E402
from tests.interop.tiny import (  # noqa: E402
    MODELS,
    SIZE,
    SPECIAL,
    TEXT,
    VISION,
    PairProcessor,
    image_processor,
    make,
    make_tokenizer,
)

CAPTIONS = ["a small red flower with five petals", "a blue bird", "a large flower"]
N = len(CAPTIONS)


@pytest.fixture(scope="module", params=MODELS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def made(name):
    """A model, its processor and the captioner, frozen by a loss."""
    model, processor = make(name)
    captioner = captioner_from(model, processor)
    RedescriptionLoss(captioner)
    return model, processor, captioner


def draw(count=N, height=20, width=24):
    return (torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1).requires_grad_()


def own_loss(model, captioner, name, image, ids):
    """The model's own mean loss of one caption, computed as its documentation says, from labels."""
    pixels = captioner.preprocess(image)
    start = captioner._family.start
    text = torch.tensor([[*start, *ids]])
    labels = torch.tensor([[*[-100] * len(start), *ids]])
    if name == "vision-encoder-decoder":
        # The model itself shifts the labels and adds the start token.
        return model(pixel_values=pixels, labels=torch.tensor([ids])).loss
    options = {"token_type_ids": (labels != -100).long()} if name == "paligemma" else {}
    output = model(pixel_values=pixels, input_ids=text, attention_mask=torch.ones_like(text), labels=labels, **options)
    if name == "git" and "shift_labels" not in inspect.getsource(type(model).forward):
        # The loss of older versions shifts the labels twice.
        return nn.functional.cross_entropy(output.logits[0, -len(ids) - 1 : -1], torch.tensor(ids))
    return output.loss


def test_the_score_is_the_models_own_loss_of_each_caption(name, made):
    model, _, captioner = made
    images = draw()
    score = RedescriptionScore(captioner)(images, CAPTIONS)
    tokens, word_mask = captioner.encode(CAPTIONS)
    for i in range(N):
        ids = tokens[i][word_mask[i]].tolist()
        assert ids[-1] == 2  # the end token
        expected = own_loss(model, captioner, name, images[i : i + 1], ids)
        assert_close(-score[i], expected, rtol=1e-5, atol=1e-5)


def test_the_loss_takes_strings(made):
    captioner, images = made[2], draw()
    loss = RedescriptionLoss(captioner)
    assert_close(loss(images, CAPTIONS), loss(images, *captioner.encode(CAPTIONS)))


def test_the_gradient_reaches_the_image_and_no_parameter(made):
    model, _, captioner = made
    images, before = draw(), {key: value.clone() for key, value in model.state_dict().items()}
    RedescriptionScore(captioner)(images, CAPTIONS).sum().backward()
    assert images.grad.isfinite().all()
    assert (images.grad.flatten(1).abs().amax(dim=1) > 0).all()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_gradient_is_that_of_finite_differences(name):
    score = RedescriptionScore(captioner_from(*make(name)).double())
    images, direction = draw(1).double().detach(), torch.randn(1, 3, 20, 24, dtype=torch.float64)
    leaf = images.clone().requires_grad_()
    score(leaf, CAPTIONS[:1]).sum().backward()
    step = 1e-3  # Some models compute parts in float32 in any case.
    with torch.no_grad():
        above, below = (score(images + sign * step * direction, CAPTIONS[:1]) for sign in (1, -1))
    assert_close((leaf.grad * direction).sum(), ((above - below) / (2 * step)).sum(), rtol=2e-2, atol=1e-6)


def test_a_caption_alone_has_the_score_that_it_has_in_a_batch(made):
    score, images = RedescriptionScore(made[2]), draw()
    together = score(images, CAPTIONS)
    alone = torch.cat([score(images[i : i + 1], CAPTIONS[i : i + 1]) for i in range(N)])
    assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_the_matrix_equals_the_loop(made):
    score, images = RedescriptionScore(made[2]), draw(2)
    expected = torch.stack([score(images[[i] * N], CAPTIONS) for i in range(2)])
    for batch_size in (1, 2, 4, 256):
        assert_close(score.score_matrix(images, CAPTIONS, batch_size=batch_size), expected, rtol=1e-4, atol=1e-5)


WITH_PLACEHOLDERS = pytest.mark.parametrize("kind", ["blip-2", "llava", "paligemma"])


@WITH_PLACEHOLDERS
def test_features_computed_apart_equal_the_whole_model(kind, monkeypatch):
    model, processor = make(kind)
    captioner = captioner_from(model, processor)
    monkeypatch.delitem(_FAMILIES, kind)
    whole = captioner_from(model, processor)
    images, (tokens, word_mask) = draw(2), captioner.encode(CAPTIONS)
    encoded = captioner.encode_images(images)
    assert encoded.shape == (2, 3 if kind == "blip-2" else 4, 16)
    # Row k belongs to image k mod 2.
    tokens, word_mask = (part.repeat_interleave(2, dim=0) for part in (tokens, word_mask))
    expected = whole(images.repeat(N, 1, 1, 1), tokens, word_mask)
    logits = captioner.decode(encoded, tokens, word_mask)
    assert_close(logits[word_mask], expected[word_mask], rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(logits[word_mask].square().sum(), images)
    (expected,) = torch.autograd.grad(expected[word_mask].square().sum(), images)
    assert_close(gradient, expected, rtol=1e-4, atol=1e-4 * expected.abs().amax().item())
    assert not torch.allclose(logits[0], logits[1])


def vision_tower(name, model):
    if name in ("blip", "blip-2"):
        return model.vision_model
    if name == "vision-encoder-decoder":
        return model.encoder
    return model.git.image_encoder if name == "git" else model.model.vision_tower


@pytest.mark.parametrize("batch_size", [2, 256])
def test_a_matrix_encodes_each_image_once(name, batch_size):
    model, processor = make(name)
    score, encoded = RedescriptionScore(captioner_from(model, processor), check=False), []
    vision_tower(name, model).register_forward_hook(lambda _, inputs, output: encoded.append(len(output[0])))
    score.score_matrix(draw(2), CAPTIONS, batch_size=batch_size)
    # GIT encodes each image once for the captions of a batch: here two, then one.
    blocks = 2 if name == "git" and batch_size == 2 else 1
    assert sum(encoded) == 2 * blocks


def test_the_gradient_of_the_matrix_is_that_of_the_pairs(made):
    score, images = RedescriptionScore(made[2]), draw(2)
    (expected,) = torch.autograd.grad(sum(score(images[[i] * N], CAPTIONS).sum() for i in range(2)), images)
    (gradient,) = torch.autograd.grad(score.score_matrix(images, CAPTIONS, batch_size=4).sum(), images)
    assert_close(gradient, expected, rtol=1e-4, atol=1e-4 * expected.abs().amax().item())


@WITH_PLACEHOLDERS
def test_an_image_token_in_a_caption(kind):
    captioner = captioner_from(*make(kind))
    tokens, word_mask = captioner.encode("a <image> flower")
    with pytest.raises(ValueError, match=r"[34] features per image, but the rows of tokens have \[1\] places"):
        captioner(draw(1), tokens, word_mask)


def test_padding_has_no_influence(made):
    captioner, images = made[2], draw()
    tokens, word_mask = captioner.encode(CAPTIONS)
    garbage = tokens.where(word_mask, 7)
    expected = captioner(images, tokens, word_mask)
    assert_close(captioner(images, garbage, word_mask)[word_mask], expected[word_mask], rtol=1e-5, atol=1e-5)


def test_yes_or_no(made):
    captioner = made[2]
    images, question = draw(), 'does this figure show " {} " ? yes or no .'
    score = RedescriptionScore(captioner, yes_no=question, answer="yes")(images, CAPTIONS)
    assert score.shape == (N,)
    assert (score < 0).all()
    tokens, word_mask, answer = captioner.encode_answer([question.replace("{}", CAPTIONS[1])], "yes")
    assert answer.sum() == 1
    logits = captioner(images[1:2], tokens, word_mask, answer)
    yes = captioner.tokenizer("yes", add_special_tokens=False)["input_ids"]
    assert tokens[answer].tolist() == yes
    assert_close(score[1], logits[answer].log_softmax(dim=1)[0, yes[0]], rtol=1e-4, atol=1e-5)
    assert not torch.equal(score, RedescriptionScore(captioner, yes_no=question, answer="no")(images, CAPTIONS))


def test_images_are_those_of_the_processor(made):
    """Of bytes, the processor's own pixels give the same logits, up to rounding."""
    _, processor, captioner = made
    content = torch.randint(256, (SIZE, SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    images = content.permute(2, 0, 1).unsqueeze(0) / 127.5 - 1
    expected = processor.image_processor(images=[content.numpy()], return_tensors="pt")["pixel_values"]
    assert_close(captioner.preprocess(images), expected, rtol=1e-5, atol=1e-5)


def test_a_prompt_changes_the_logits_but_not_the_tokens(name):
    model, processor = make(name)
    images = draw(1).detach()
    plain, prompted = captioner_from(model, processor), captioner_from(model, processor, prompt="a small")
    tokens, word_mask = plain.encode("a red flower")
    assert torch.equal(tokens, prompted.encode("a red flower")[0])
    assert prompted(images, tokens, word_mask).shape == plain(images, tokens, word_mask).shape
    assert not torch.allclose(prompted(images, tokens, word_mask), plain(images, tokens, word_mask))


def test_half_precision_and_the_models_own_device(name):
    model, processor = make(name)
    captioner = captioner_from(model.bfloat16(), processor)
    images = draw()
    RedescriptionScore(captioner)(images, CAPTIONS).sum().backward()
    assert images.grad.isfinite().all()


def test_a_tokenizer_with_an_image_processor():
    model, processor = make("blip")
    pair = captioner_from(model, processor.tokenizer, image_processor=processor.image_processor)
    whole, images = captioner_from(model, processor), draw()
    tokens = whole.encode(CAPTIONS)
    assert torch.equal(pair(images, *tokens), whole(images, *tokens))
    assert whole.decode_text(tokens[0]) == CAPTIONS


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"model must be a model of transformers, but it is a Linear", lambda m, p: (nn.Linear(2, 3), p, {})),
        (r"processor has no tokenizer; it is a int", lambda m, p: (m, 7, {})),
        (r"has no image_processor; pass the model's processor, or image_processor=", lambda m, p: (m, p.tokenizer, {})),
        (
            r"GPT2LMHeadModel \(model_type 'gpt2'\) is neither BLIP, GIT nor",
            lambda m, p: (transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=4, n_layer=1, n_head=1)), p, {}),
        ),
    ],
)
def test_other_models_and_processors_are_refused(message, change):
    model, processor, options = change(*make("blip"))
    with pytest.raises(ValueError, match="captioner_from: .*" + message):
        captioner_from(model, processor, **options)


def test_a_missing_start_token_is_named():
    model, _ = make("git")
    tokenizer = make_tokenizer()
    tokenizer.cls_token = None
    processor = PairProcessor(image_processor(transformers.CLIPImageProcessor), tokenizer)
    with pytest.raises(ValueError, match=r"GitForCausalLM has no start token; set tokenizer\.cls_token"):
        captioner_from(model, processor)


@pytest.mark.parametrize("captions", [[], [7], None, "", ["a flower", ""]])
def test_captions_that_cannot_be_encoded(captions):
    captioner = captioner_from(*make("blip"))
    with pytest.raises(ValueError, match=r"HuggingFaceCaptioner\.encode: .*(one string or several|has no token)"):
        captioner.encode(captions)


def test_a_number_of_captions_that_does_not_fit():
    captioner = captioner_from(*make("blip"))
    tokens, word_mask = captioner.encode(CAPTIONS)
    with pytest.raises(ValueError, match="3 captions for 2 images; the number must be the same, or a multiple"):
        captioner(draw(2), tokens, word_mask)


def test_padding_on_the_left_is_refused_at_every_call(made):
    captioner, images = made[2], draw(2)
    score = RedescriptionScore(captioner)
    score(images, CAPTIONS[:2])
    tokens, word_mask = captioner.encode(CAPTIONS[:2])
    tokens[1], word_mask[1] = tokens[1].roll(1), word_mask[1].roll(1)
    with pytest.raises(
        ValueError, match="HuggingFaceCaptioner: word_mask has padding before a real word; put the real"
    ):
        score(images, tokens, word_mask)


@pytest.mark.parametrize("kind", ["blip", "git", "vision-encoder-decoder", "blip-2"])
def test_captions_beyond_the_positions_of_the_model(kind):
    model, processor = make(kind)
    captioner = captioner_from(model, processor)
    positions = model.config.get_text_config(decoder=True).max_position_embeddings
    words = positions - len(captioner._family.start)
    longest, image = " ".join(["red"] * words), draw(1).detach()
    assert captioner(image, *captioner.encode(longest)).isfinite().all()
    with pytest.raises(ValueError, match=f"need {positions + 1} positions .* but the model has {positions}; shorten"):
        captioner(image, *captioner.encode(longest + " red"))


class Wrapped(nn.Module):
    """A model of PEFT, whose forward hides the arguments of the model inside."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def get_base_model(self):
        return self.model

    def __getattr__(self, attribute):
        try:
            return super().__getattr__(attribute)
        except AttributeError:
            return getattr(self.model, attribute)

    def forward(self, *arguments, **options):
        return self.model(*arguments, **options)


@pytest.mark.parametrize("wrap", [Wrapped, lambda model: torch.compile(model, backend="eager")])
def test_a_wrapped_model_has_the_same_logits(name, made, wrap):
    model, processor, captioner = made
    images, (tokens, word_mask) = draw(), captioner.encode(CAPTIONS)
    wrapped = captioner_from(wrap(model), processor)
    assert_close(wrapped(images, tokens, word_mask), captioner(images, tokens, word_mask), rtol=1e-5, atol=1e-5)


def test_a_replaced_model_takes_effect(name):
    model, processor = make(name)
    captioner, images = captioner_from(model, processor), draw()
    text = captioner.encode(CAPTIONS)
    before = captioner(images, *text)
    captioner.model = type(model)(model.config).eval()
    assert not torch.allclose(captioner(images, *text), before)


def test_weights_that_are_not_floats(monkeypatch):
    """The first weight of a quantized model may be an integer."""
    model, processor = make("blip")
    captioner = captioner_from(model, processor)
    text = captioner.encode(CAPTIONS)
    expected = captioner(draw(), *text)
    model.vision_model.embeddings.register_parameter("a", nn.Parameter(torch.zeros(2, dtype=torch.uint8), False))
    monkeypatch.setattr(
        model,
        "parameters",
        lambda recurse=True: iter(sorted(nn.Module.parameters(model, recurse), key=torch.is_floating_point)),
    )
    assert torch.equal(captioner(draw(), *text), expected)


def test_strings_in_place_of_tokens():
    with pytest.raises(ValueError, match=r"HuggingFaceCaptioner: tokens must be a tensor .* list; its method `encode`"):
        captioner_from(*make("blip"))(draw(), CAPTIONS)


QUESTIONS = ["a small red flower ? yes or no .", "blue ?"]


@pytest.mark.parametrize("debias", [None, "blank"])
def test_an_answer_of_paligemma_follows_a_bidirectional_question(debias):
    model, processor = make("paligemma")
    captioner, images = captioner_from(model, processor), draw(2).detach()
    score = RedescriptionScore(captioner, yes_no="{}", answer="yes", debias=debias)

    def log_p(image, question):
        text = processor(images=[np.zeros((8, 8, 3), np.uint8)], text=["<image>" + question], suffix=["yes"])
        ids, types = (torch.tensor(text[name])[:, :-1] for name in ("input_ids", "token_type_ids"))  # without the end
        pixels = captioner.preprocess(image.unsqueeze(0))
        logits = model(input_ids=ids, pixel_values=pixels, token_type_ids=types).logits
        return logits[0, -2].log_softmax(dim=0)[ids[0, -1]].detach()

    expected = [[log_p(image, question) for question in QUESTIONS] for image in (*images, torch.zeros_like(images[0]))]
    expected = torch.tensor(expected)
    expected = expected[:2] - (0 if debias is None else expected[2])
    assert_close(score.score_matrix(images, QUESTIONS), expected, rtol=1e-4, atol=1e-5)
    assert_close(score(images, QUESTIONS), expected.diagonal(), rtol=1e-4, atol=1e-5)


def test_paligemma_needs_the_mask_of_the_answer():
    captioner = captioner_from(*make("paligemma"))
    tokens, word_mask, _ = captioner.encode_answer(["a flower ?"], "yes")
    with pytest.raises(ValueError, match=r"is bidirectional in the prompt, .* as answer=\.\.\."):
        captioner(draw(1), tokens, word_mask)


def make_gemma3():
    torch.manual_seed(0)
    config = transformers.Gemma3Config(
        text_config=TEXT | {"num_key_value_heads": 1, "head_dim": 8},
        vision_config=VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_id=SPECIAL.index("<image>"),
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    marks = {"image_token": "<image>", "boi_token": "figure", "eoi_token": "show"}
    processor = transformers.Gemma3Processor(
        image_processor(transformers.Gemma3ImageProcessor),
        make_tokenizer(extra_special_tokens=marks),
        image_seq_length=4,
        chat_template=(
            "{% for m in messages %}USER : {% for c in m['content'] %}{% if c['type'] == 'image' %}figure "
            "{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}ASSISTANT :"
        ),
    )
    return model, processor


def test_the_image_of_gemma3_is_bidirectional_and_its_caption_causal():
    """In its token types, 1 is the image, where PaliGemma has 1 for what follows the prompt."""
    model, processor = make_gemma3()
    captioner, images = captioner_from(model, processor), draw()
    score = RedescriptionScore(captioner)(images, CAPTIONS)
    tokens, word_mask = captioner.encode(CAPTIONS)
    for b in range(N):
        ids = torch.tensor([[*captioner._family.start, *tokens[b, word_mask[b]].tolist()]])
        labels = ids.clone()
        labels[:, : len(captioner._family.start)] = -100
        pixels = captioner.preprocess(images[b : b + 1])
        types = (ids == SPECIAL.index("<image>")).long()
        loss = model(ids, pixels, attention_mask=torch.ones_like(ids), token_type_ids=types, labels=labels).loss
        assert_close(-score[b], loss, rtol=1e-5, atol=1e-5)
