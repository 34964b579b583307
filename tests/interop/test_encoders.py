"""Adapters of text and image encoders: the features of the wrapped models, gradients to the image, frozen weights."""

import copy
import math
import pickle
from itertools import product
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision import models
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from mirror_modules import (
    Captioner,
    CascadedGenerator,
    ConditioningAugmentation,
    ImageEncoder,
    ImageFeatures,
    MatchingLoss,
    RedescriptionLoss,
)
from mirror_modules.interop import (
    ImageEncoderAdapter,
    Preprocess,
    TextEncoderAdapter,
    image_encoder_from,
    text_encoder_from,
)
from mirror_modules.stem import ConvBackbone

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

# Words, regions and images have features of different primes.
HEADS, WORD, VISION, SHARED, POSITIONS, SIDE, PATCH = 2, 14, 22, 7, 13, 32, 8
WORDS = ["a", "red", "blue", "small", "flower", "with", "round", "petals"]
SPECIAL = ["<pad>", "<s>", "<unk>", "</s>"]
VOCABULARY = {word: i for i, word in enumerate(SPECIAL + WORDS)}
PAD, START, UNKNOWN, END = range(4)
CAPTIONS = ["a small red flower with round petals", "blue", "a red flower"]
HALF = Preprocess((SIDE, SIDE), (0.5, 0.5, 0.5), (0.25, 0.5, 1.0), interpolation="bilinear")
HALF_AT_OWN_SIZE = Preprocess(None, (0.5, 0.5, 0.5), (0.25, 0.5, 1.0))
TOLERANCE = {"atol": 1e-5, "rtol": 0}


def make_tokenizer(template="<s> $A </s>", pad="<pad>", **options):
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(VOCABULARY, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if template is not None:
        special = [(token, VOCABULARY[token]) for token in ("<s>", "</s>")]
        core.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=special)
    names = {} if pad is None else {"pad_token": pad}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **names, **options
    )


# As published: CLIP and SigLIP pad with the end token, and SigLIP's tokenizer returns no attention mask by itself.
clip_tokenizer = lambda: make_tokenizer(pad="</s>")  # noqa: E731
siglip_tokenizer = lambda: make_tokenizer("$A </s>", "</s>", model_input_names=["input_ids"])  # noqa: E731
t5_tokenizer = lambda: make_tokenizer("$A </s>")  # noqa: E731

LAYERS = {"num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 10}
CLIP_TEXT = {"vocab_size": 12, "hidden_size": WORD, "max_position_embeddings": POSITIONS, "projection_dim": SHARED}
CLIP_TEXT |= {"bos_token_id": START, "eos_token_id": END, "pad_token_id": END, **LAYERS}
CLIP_VISION = {"hidden_size": VISION, "image_size": SIDE, "patch_size": PATCH, "projection_dim": SHARED, **LAYERS}
SIGLIP_TEXT = {"vocab_size": 12, "hidden_size": WORD, "max_position_embeddings": POSITIONS, "projection_size": WORD}
SIGLIP_TEXT |= {"bos_token_id": START, "eos_token_id": END, "pad_token_id": END, **LAYERS}
SIGLIP_VISION = {"hidden_size": VISION, "image_size": SIDE, "patch_size": PATCH, **LAYERS}
DINO = {"hidden_size": VISION, "image_size": SIDE, "patch_size": PATCH, "num_hidden_layers": 2, "mlp_ratio": 1}
DINO |= {"num_attention_heads": HEADS}


def clip():
    config = transformers.CLIPConfig(text_config=CLIP_TEXT, vision_config=CLIP_VISION, projection_dim=SHARED)
    return transformers.CLIPModel(config)


def siglip():
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=SIGLIP_TEXT, vision_config=SIGLIP_VISION))


def clip_text(name="CLIPTextModel"):
    return getattr(transformers, name)(transformers.CLIPTextConfig(**CLIP_TEXT))


def t5():
    sizes = {"d_model": WORD, "d_kv": 7, "d_ff": 10, "num_layers": 2, "num_heads": HEADS}
    return transformers.T5EncoderModel(transformers.T5Config(vocab_size=12, **sizes))


def bert():
    config = transformers.BertConfig(vocab_size=12, hidden_size=WORD, max_position_embeddings=POSITIONS, **LAYERS)
    return transformers.BertModel(config)


class TextCase(NamedTuple):
    make: object
    tokenizer: object
    kinds: tuple
    full_length: bool = False


TEXT = {
    "CLIPTextModel": TextCase(clip_text, clip_tokenizer, ("pooled", "mean")),
    "CLIPTextModelWithProjection": TextCase(
        lambda: clip_text("CLIPTextModelWithProjection"), clip_tokenizer, ("pooled", "projection", "mean")
    ),
    "CLIPModel": TextCase(clip, clip_tokenizer, ("pooled", "projection", "mean")),
    "T5EncoderModel": TextCase(t5, t5_tokenizer, ("mean",)),
    "BertModel": TextCase(bert, make_tokenizer, ("pooled", "mean")),
    "SiglipTextModel": TextCase(
        lambda: transformers.SiglipTextModel(transformers.SiglipTextConfig(**SIGLIP_TEXT)),
        siglip_tokenizer,
        ("pooled", "mean"),
        full_length=True,
    ),
    "SiglipModel": TextCase(siglip, siglip_tokenizer, ("pooled", "mean"), full_length=True),
}
SENTENCES = [(name, kind) for name, case in TEXT.items() for kind in case.kinds]


def randomize(model):
    """Weights of unit scale: those of some untrained models are so small that all features look alike."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def make_text(name, **options):
    case = TEXT[name]
    model = randomize(case.make())
    return model, text_encoder_from(model, case.tokenizer(), **options)


def tensor_of(output):
    """Features of `get_text_features` and `get_image_features`, which are tensors in transformers 4."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def expected_text(name, model, kind):
    """Words, sentence and word_mask by the model alone, as its documentation calls it."""
    case, tokenizer = TEXT[name], TEXT[name].tokenizer()
    length = {"padding": "max_length", "max_length": POSITIONS} if case.full_length else {"padding": True}
    inputs = dict(tokenizer(CAPTIONS, return_tensors="pt", return_attention_mask=True, **length))
    mask = inputs["attention_mask"].bool()
    if case.full_length:
        del inputs["attention_mask"]
    inputs.pop("token_type_ids", None)
    output = getattr(model, "text_model", model)(**inputs)
    words = output.last_hidden_state
    if kind == "pooled":
        return words, output.pooler_output, mask
    if kind == "mean":
        sums = [sum(row[i] for i in range(len(row)) if real[i]) / real.sum() for row, real in zip(words, mask)]
        return words, torch.stack(sums), mask
    return words, model.text_projection(output.pooler_output), mask


@torch.no_grad()
@pytest.mark.parametrize(("name", "kind"), SENTENCES)
def test_text_features_are_those_of_the_model(name, kind):
    model, encoder = make_text(name, sentence=kind)
    words, sentence, mask = expected_text(name, model, kind)
    features = encoder(*encoder.encode(CAPTIONS))
    length = features.words.shape[1]
    assert length == 2 + 7 - (TEXT[name].tokenizer is not clip_tokenizer and name != "BertModel")
    assert_close(features.words, words[:, :length] * mask[:, :length].unsqueeze(2), **TOLERANCE)
    assert_close(features.sentence, sentence, **TOLERANCE)
    assert (encoder.word_dim, encoder.sentence_dim) == (features.words.shape[2], features.sentence.shape[1])
    assert (features.sentence - features.sentence[0]).abs().amax(dim=1).tolist()[1:] > [0.01, 0.01]


@torch.no_grad()
@pytest.mark.parametrize(("name", "method"), [("CLIPModel", "projection"), ("SiglipModel", "pooled")])
def test_the_sentence_in_the_space_of_images_is_that_of_the_whole_model(name, method):
    model, encoder = make_text(name, sentence=method)
    tokens, word_mask = encoder.encode(CAPTIONS)
    inputs = {"input_ids": tokens, "attention_mask": word_mask.long()}
    if TEXT[name].full_length:
        inputs = {"input_ids": nn.functional.pad(tokens, (0, POSITIONS - tokens.shape[1]), value=END)}
    assert_close(encoder(tokens, word_mask).sentence, tensor_of(model.get_text_features(**inputs)), **TOLERANCE)


@pytest.mark.parametrize("name", TEXT)
def test_by_default_the_sentence_is_the_first_output_that_the_model_has(name):
    _, encoder = make_text(name)
    assert encoder.sentence_kind == TEXT[name].kinds[0]


def test_a_projection_has_its_own_size():
    _, encoder = make_text("CLIPModel", sentence="projection")
    assert (encoder.word_dim, encoder.sentence_dim) == (WORD, SHARED)


@torch.no_grad()
@pytest.mark.parametrize(("name", "kind"), SENTENCES)
def test_padding_and_other_captions_have_no_influence(name, kind):
    _, encoder = make_text(name, sentence=kind)
    tokens, word_mask = encoder.encode(CAPTIONS)
    together = encoder(tokens, word_mask)
    for i, caption in enumerate(CAPTIONS):
        alone = encoder(*encoder.encode(caption))
        length = alone.words.shape[1]
        assert_close(alone.words[0], together.words[i, :length], **TOLERANCE)
        assert_close(alone.sentence[0], together.sentence[i], **TOLERANCE)
        assert together.words[i, length:].abs().sum() == 0
    # Other ids at padding, and more of it.
    for other in (0, START, len(VOCABULARY) - 1):
        longer = nn.functional.pad(tokens.where(word_mask, other), (0, 2), value=other)
        padded = encoder(longer, nn.functional.pad(word_mask, (0, 2)))
        assert_close(padded.words[:, :-2], together.words, **TOLERANCE)
        assert_close(padded.sentence, together.sentence, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("name", TEXT)
def test_without_a_mask_all_words_are_real(name):
    _, encoder = make_text(name)
    tokens, word_mask = encoder.encode(CAPTIONS[:1])
    assert word_mask.all()
    for mask in (word_mask, word_mask.long()):
        assert_close(tuple(encoder(tokens)), tuple(encoder(tokens, mask)), **TOLERANCE)


def test_encode_marks_real_tokens_although_padding_has_the_same_id():
    _, encoder = make_text("CLIPTextModel")
    tokens, word_mask = encoder.encode(["a red flower", "blue"])
    a, red, blue, flower = (VOCABULARY[word] for word in ("a", "red", "blue", "flower"))
    assert tokens.tolist() == [[START, a, red, flower, END], [START, blue, END, END, END]]
    assert word_mask.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert (tokens.dtype, word_mask.dtype) == (torch.long, torch.bool)


def test_encode_takes_one_string_and_leaves_the_tokenizer_as_it_is():
    tokenizer = make_tokenizer(padding_side="left")
    encoder = text_encoder_from(bert(), tokenizer)
    one, several = encoder.encode("blue"), encoder.encode(("blue", "a red flower"))
    assert one[0].tolist() == [[START, VOCABULARY["blue"], END]]
    assert several[0][0, :3].tolist() == one[0][0].tolist()
    assert tokenizer.padding_side == "left"


def test_strings_in_place_of_tokens():
    with pytest.raises(ValueError, match=r"TextEncoderAdapter: tokens must be a tensor .* a list; its method `encode`"):
        text_encoder_from(bert(), make_tokenizer())(CAPTIONS)


@pytest.mark.parametrize("name", TEXT)
def test_encode_truncates_to_the_positions_of_the_model(name):
    tokenizer = TEXT[name].tokenizer()
    tokenizer.model_max_length = 10**30 if name != "T5EncoderModel" else POSITIONS
    encoder = text_encoder_from(TEXT[name].make(), tokenizer)
    tokens, word_mask = encoder.encode(" ".join(3 * WORDS))
    assert tokens.shape == (1, POSITIONS)
    assert tokens[0, -1] == END
    encoder(tokens, word_mask)


def test_a_processor_stands_for_its_tokenizer():
    processor = type("Processor", (), {"tokenizer": clip_tokenizer(), "image_processor": None})()
    assert text_encoder_from(clip_text(), processor).encode("blue")[0].shape == (1, 3)


def test_the_adapter_holds_the_side_that_it_runs():
    model = clip()
    text = text_encoder_from(model, clip_tokenizer())
    image = image_encoder_from(model, HALF)
    shared = {id(parameter) for parameter in text.parameters()} & {id(parameter) for parameter in image.parameters()}
    assert not shared
    assert not any("vision" in name for name, _ in text.named_parameters())
    assert not any("text" in name for name, _ in image.named_parameters())
    # Distributed training refuses parameters without a gradient.
    assert not any("projection" in name for name, _ in [*text.named_children(), *image.named_children()])


def small_map():
    """A classifier with batch norm and dropout, whose trunk is found by tracing."""
    return nn.Sequential(
        nn.Conv2d(3, VISION, 3, stride=2),
        nn.BatchNorm2d(VISION),
        nn.Dropout(0.5),
        nn.Conv2d(VISION, 5, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 3),
    )


FROZEN = {
    "text": lambda **options: text_encoder_from(bert(), make_tokenizer(), **options),
    "Hugging Face": lambda **options: image_encoder_from(clip(), HALF, image="projection", **options),
    "classifier": lambda **options: image_encoder_from(small_map(), **options),
}


def run(encoder):
    if isinstance(encoder, TextEncoderAdapter):
        return encoder(*encoder.encode(CAPTIONS))
    return encoder(draw())


@pytest.mark.parametrize("name", FROZEN)
def test_nothing_wakes_a_frozen_encoder(name):
    encoder = FROZEN[name]()
    host = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(2, 2)})
    before = copy.deepcopy(encoder.state_dict())
    host.train()
    assert host["head"].training
    assert not any(module.training for child in encoder.children() for module in child.modules())
    # A host may enable gradients and modes of all its parameters; the next call freezes them again.
    host.requires_grad_(True)
    for module in encoder.model.modules():
        module.training = True
    for parameter in encoder.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.SGD(host.parameters(), lr=1.0)
    first, second = run(encoder), run(encoder)
    if name == "text":
        assert_close(tuple(first), tuple(second), atol=0, rtol=0)
        assert not any(part.requires_grad for part in first)
    optimizer.step()
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in encoder.parameters())
    assert encoder.state_dict().keys() == before.keys()
    for key, value in encoder.state_dict().items():
        assert_close(value, before[key], atol=0, rtol=0)


@pytest.mark.parametrize("name", FROZEN)
def test_a_trainable_encoder_trains(name):
    encoder = FROZEN[name](trainable=True)
    encoder.train()
    assert all(module.training for module in encoder.modules())
    sum(part.square().sum() for part in run(encoder)).backward()
    unused = [key for key, parameter in encoder.named_parameters() if parameter.grad is None]
    assert not unused
    assert not encoder.eval().model.training


def test_building_a_trainable_encoder_leaves_modes_and_statistics_as_they_are():
    model = small_map().train()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    encoder = image_encoder_from(model, trainable=True)
    assert [module.training for module in model] == [True, False] + 5 * [True]
    assert encoder.model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    for key, value in model.state_dict().items():
        assert_close(value, before[key], atol=0, rtol=0)
    asleep = image_encoder_from(small_map().eval(), trainable=True)
    assert not asleep.model.training
    assert_close(asleep(draw(seed=1)).image, asleep(draw(seed=1)).image, atol=0, rtol=0)


@pytest.mark.parametrize("name", FROZEN)
def test_copies_pickles_and_state(name):
    encoder = FROZEN[name]().eval()
    for copied in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        copied.train()
        images = draw(seed=3)
        inputs = encoder.encode(CAPTIONS) if name == "text" else (images,)
        assert_close(tuple(copied(*inputs)), tuple(encoder(*inputs)), atol=0, rtol=0)
    other = FROZEN[name]()
    other.load_state_dict(encoder.state_dict())
    assert_close(tuple(other(*inputs)), tuple(encoder(*inputs)), atol=0, rtol=0)


# --- images


def draw(height=SIDE, width=SIDE, batch=2, seed=0):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def dino(registers=None):
    if registers is None:
        return transformers.Dinov2Model(transformers.Dinov2Config(**DINO))
    config = transformers.Dinov2WithRegistersConfig(num_register_tokens=registers, **DINO)
    return transformers.Dinov2WithRegistersModel(config)


def resnet_of_huggingface():
    config = transformers.ResNetConfig(embedding_size=5, hidden_sizes=[11, VISION], depths=[1, 1], layer_type="basic")
    return transformers.ResNetModel(config)


def swin_of_huggingface():
    sizes = {"embed_dim": 6, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}
    return transformers.SwinModel(transformers.SwinConfig(image_size=SIDE, patch_size=4, **sizes))


class ImageCase(NamedTuple):
    make: object
    prefix: int
    kinds: tuple = ("pooled", "mean")


VISION_CONFIG = lambda: transformers.CLIPVisionConfig(**CLIP_VISION)  # noqa: E731
IMAGES = {
    "CLIPVisionModel": ImageCase(lambda: transformers.CLIPVisionModel(VISION_CONFIG()), 1),
    "CLIPVisionModelWithProjection": ImageCase(
        lambda: transformers.CLIPVisionModelWithProjection(VISION_CONFIG()), 1, ("pooled", "projection", "mean")
    ),
    "CLIPModel": ImageCase(clip, 1, ("pooled", "projection", "mean")),
    "SiglipVisionModel": ImageCase(
        lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIGLIP_VISION)), 0
    ),
    "SiglipModel": ImageCase(siglip, 0),
    "Dinov2Model": ImageCase(dino, 1),
    "Dinov2WithRegistersModel": ImageCase(lambda: dino(3), 4),
    "ResNetModel": ImageCase(resnet_of_huggingface, 0),
    "SwinModel": ImageCase(swin_of_huggingface, 0),
}
POOLED = [(name, kind) for name, case in IMAGES.items() for kind in case.kinds]


def make_image(name, **options):
    model = randomize(IMAGES[name].make())
    return model, image_encoder_from(model, HALF, **options)


def tokens_of(features):
    return features.flatten(2).mT if features.ndim == 4 else features


@torch.no_grad()
@pytest.mark.parametrize(("name", "kind"), POOLED)
@pytest.mark.parametrize("size", [(SIDE, SIDE), (45, 71), (17, 19)])
def test_image_features_are_those_of_the_model(name, kind, size):
    model, encoder = make_image(name, image=kind)
    images = draw(*size)
    vision = getattr(model, "vision_model", model)
    output = vision(pixel_values=HALF(images))
    regions = tokens_of(output.last_hidden_state)[:, IMAGES[name].prefix :]
    image = {"pooled": lambda: output.pooler_output.flatten(1), "mean": lambda: regions.mean(dim=1)}
    image["projection"] = lambda: model.visual_projection(output.pooler_output)
    features = encoder(images)
    assert_close(features.regions, regions, **TOLERANCE)
    assert_close(features.image, image[kind](), **TOLERANCE)
    assert (encoder.region_dim, encoder.image_dim) == (features.regions.shape[2], features.image.shape[1])
    side = {"ResNetModel": SIDE // 8, "SwinModel": SIDE // 8}.get(name, SIDE // PATCH)
    assert features.regions.shape[1] == side**2


@torch.no_grad()
@pytest.mark.parametrize(("name", "kind"), [("CLIPModel", "projection"), ("SiglipModel", "pooled")])
def test_the_image_in_the_space_of_text_is_that_of_the_whole_model(name, kind):
    model, encoder = make_image(name, image=kind)
    expected = tensor_of(model.get_image_features(pixel_values=HALF(draw())))
    assert_close(encoder(draw()).image, expected, **TOLERANCE)


@pytest.mark.parametrize("name", IMAGES)
def test_by_default_the_image_is_the_first_output_that_the_model_has(name):
    assert make_image(name)[1].image_kind == IMAGES[name].kinds[0]


def test_without_a_pooled_output_the_image_is_the_mean():
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIGLIP_VISION, vision_use_head=False))
    encoder = image_encoder_from(model, HALF)
    features = encoder(draw())
    assert encoder.image_kind == "mean"
    assert_close(features.image, features.regions.mean(dim=1))


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("part", ["regions", "image"])
def test_the_image_receives_a_gradient_and_the_model_none(name, part):
    model, encoder = make_image(name)
    images = draw(45, 71).requires_grad_(True)
    weights = torch.randn(getattr(encoder(images), part).shape, generator=torch.Generator().manual_seed(1))
    (getattr(encoder(images), part) * weights).sum().backward()
    assert images.grad.isfinite().all()
    # Every pixel counts: resizing is antialiased.
    assert (images.grad.abs().amax(dim=1) > 0).float().mean() > 0.95
    assert all(parameter.grad is None for parameter in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("name", ["CLIPModel", "Dinov2Model"])
def test_a_compiled_model_is_still_one_of_huggingface(name):
    model, encoder = make_image(name)
    compiled = image_encoder_from(torch.compile(model, backend="eager"), HALF)
    assert_close(tuple(compiled(draw())), tuple(encoder(draw())), **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("name", IMAGES)
def test_an_image_alone_equals_the_same_image_in_a_batch(name):
    _, encoder = make_image(name)
    together, alone = encoder(draw(45, 71, batch=3)), encoder(draw(45, 71, batch=3)[1:2])
    assert_close(tuple(alone), tuple(part[1:2] for part in together), **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("wrap", [lambda processor: processor, lambda processor: Processor(processor)])
def test_images_are_prepared_as_the_image_processor_does(wrap):
    pytest.importorskip("PIL")
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    processor = transformers.CLIPImageProcessor(**sizes)
    model = randomize(transformers.CLIPVisionModel(VISION_CONFIG()))
    encoder = image_encoder_from(model, wrap(processor))
    content = torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8)
    pixels = processor(images=[image.permute(1, 2, 0).numpy() for image in content], return_tensors="pt")
    expected = model(pixel_values=pixels["pixel_values"])
    features = encoder(content / 127.5 - 1)
    assert_close(features.image, expected.pooler_output, atol=1e-4, rtol=0)
    assert encoder(draw(45, 71)).regions.shape == features.regions.shape


class Processor:
    """A processor of text and images."""

    def __init__(self, image_processor):
        self.image_processor = image_processor


# --- timm


def timm_vit(**options):
    timm = pytest.importorskip("timm")
    sizes = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": 12, "depth": 2, "num_heads": HEADS}
    return timm.create_model("vit_tiny_patch16_224", **{**sizes, **options})


def timm_model(name, **options):
    return pytest.importorskip("timm").create_model(name, **options)


TIMM = {
    "class token": (timm_vit, 1),
    "registers": (lambda: timm_vit(reg_tokens=3), 4),
    "mean of the tokens": (lambda: timm_vit(class_token=False, global_pool="avg"), 0),
    "attention pooling": (lambda: timm_vit(class_token=False, global_pool="map"), 0),
    "no classifier": (lambda: timm_vit(num_classes=0), 1),
    "map": (lambda: timm_model("resnet10t"), 0),
    "head with a convolution": (lambda: timm_model("mobilenetv3_small_050"), 0),
    "map with channels last": (
        lambda: timm_model(
            "swin_tiny_patch4_window7_224", img_size=64, window_size=2, embed_dim=12, depths=(1, 1), num_heads=(2, 2)
        ),
        0,
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", TIMM)
def test_timm_features_are_those_of_the_model(name):
    make, prefix = TIMM[name]
    model = make().eval()
    encoder = image_encoder_from(model)
    images = draw(45, 71)
    height, width = encoder.preprocess.size
    assert (height, width) == {"map": (176, 176), "head with a convolution": (224, 224)}.get(
        name, (64, 64) if name == "map with channels last" else (SIDE, SIDE)
    )
    resized = nn.functional.interpolate(
        (images + 1) / 2, (height, width), mode=model.pretrained_cfg["interpolation"], antialias=True
    )
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    features = model.forward_features((resized.clamp(0, 1) - mean) / std)
    pooled = model.forward_head(features, pre_logits=True)
    if name == "map with channels last":
        features = features.permute(0, 3, 1, 2)
    result = encoder(images)
    assert_close(result.regions, tokens_of(features)[:, prefix:], **TOLERANCE)
    assert_close(result.image, pooled, **TOLERANCE)
    assert (encoder.region_dim, encoder.image_dim) == (result.regions.shape[2], pooled.shape[1])
    assert encoder.image_kind == "pooled"


@torch.no_grad()
def test_a_timm_model_that_does_not_pool_has_the_mean():
    encoder = image_encoder_from(timm_vit(global_pool="", class_token=True))
    features = encoder(draw())
    assert encoder.image_kind == "mean"
    assert_close(features.image, features.regions.mean(dim=1))


@torch.no_grad()
def test_a_timm_model_takes_another_configuration():
    model = timm_vit(img_size=64).eval()
    config = {"input_size": (3, 64, 64), "mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bicubic"}
    images = draw(64, 64)
    expected = model.forward_head(model.forward_features((images + 1) / 2 / 0.25 - 2), pre_logits=True)
    assert_close(image_encoder_from(model, config)(images).image, expected, **TOLERANCE)


def test_a_timm_model_with_undeclared_class_tokens_needs_their_number():
    sizes = {"embed_dims": [8, 8, 8, 8], "serial_depths": [1, 1, 1, 1]}
    model = timm_model("coat_lite_tiny", **sizes)
    with pytest.raises(ValueError, match=r"CoaT returns tokens \(2, 50, 8\), of which not all are patches; pass"):
        image_encoder_from(model)
    assert image_encoder_from(model, prefix_tokens=1)(draw()).regions.shape == (2, 49, 8)


# --- torchvision


def output_of(layer):
    """A list to which each forward pass of the layer appends its output."""
    outputs = []
    layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    return outputs


def imagenet_by_loops(images):
    normalized = torch.empty_like(images)
    for c, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))):
        normalized[:, c] = ((images[:, c] + 1) / 2 - mean) / std
    return normalized


def small_convnext():
    return ConvNeXt([CNBlockConfig(8, 12, 1), CNBlockConfig(12, None, 1)])


TORCHVISION = {
    "ResNet": (lambda: models.resnet18(), lambda model: model.layer4, lambda model: model.avgpool),
    "EfficientNet": (lambda: models.efficientnet_b0(), lambda model: model.features, lambda model: model.avgpool),
    "ConvNeXt": (small_convnext, lambda model: model.features, lambda model: model.classifier[0]),
    "SqueezeNet": (
        lambda: models.squeezenet1_1(num_classes=7),
        lambda model: model.classifier[2],
        lambda model: model.classifier[3],
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", TORCHVISION)
@pytest.mark.parametrize("size", [(64, 96), (97, 65)])
def test_torchvision_features_are_those_of_the_model(name, size):
    make, last, pooling = TORCHVISION[name]
    model = make().eval()
    maps, pooled = output_of(last(model)), output_of(pooling(model))
    model(imagenet_by_loops(draw(*size)))
    encoder = image_encoder_from(model)
    regions, image = encoder(draw(*size))
    assert_close(regions, tokens_of(maps[0]), **TOLERANCE)
    assert_close(image, pooled[0].flatten(1), **TOLERANCE)
    assert (encoder.region_dim, encoder.image_dim) == (regions.shape[2], image.shape[1])
    assert regions.shape[1] > 1


@torch.no_grad()
def test_a_vision_transformer_of_torchvision_has_the_patches_as_regions():
    sizes = {"image_size": SIDE, "patch_size": PATCH, "num_layers": 1, "num_heads": 2, "hidden_dim": 6, "mlp_dim": 5}
    model = models.VisionTransformer(**sizes).eval()
    outputs = output_of(model.encoder)
    encoder = image_encoder_from(model)
    assert (encoder.preprocess.size, encoder.prefix_tokens) == ((SIDE, SIDE), 1)
    features = encoder(draw(45, 71))
    model(encoder.preprocess(draw(45, 71)))
    assert_close(features.regions, outputs[-1][:, 1:], **TOLERANCE)
    assert_close(features.image, outputs[-1][:, 0], **TOLERANCE)


@torch.no_grad()
def test_a_map_that_is_flattened_without_pooling_has_the_mean():
    encoder = image_encoder_from(models.alexnet(num_classes=2))
    features = encoder(draw(96, 64))
    assert encoder.image_kind == "mean"
    assert features.image.shape == (2, 256)
    assert_close(features.image, features.regions.mean(dim=1))


class SqueezeAndExcite(nn.Module):
    """A classifier with vectors between its maps."""

    def __init__(self):
        super().__init__()
        self.first, self.scale = nn.Conv2d(3, 7, 3, stride=2), nn.Linear(7, 7)
        self.last, self.head = nn.Conv2d(7, 7, 3, stride=2), nn.Linear(7, 7)

    def forward(self, images):
        maps = self.first(images)
        maps = self.last(maps * self.scale(maps.mean(dim=(2, 3))).sigmoid()[:, :, None, None])
        return self.head(maps.mean(dim=(2, 3)))


@torch.no_grad()
def test_vectors_between_maps_are_not_taken_for_the_pooled_output():
    model = SqueezeAndExcite().eval()
    maps = output_of(model.last)
    model(draw(33, 21))
    regions, image = image_encoder_from(model)(draw(33, 21))
    assert_close(regions, tokens_of(maps[0]), **TOLERANCE)
    assert_close(image, maps[0].mean(dim=(2, 3)), **TOLERANCE)


def test_the_trunk_has_no_classifier():
    encoder = image_encoder_from(models.resnet18(), trainable=True).train()
    assert not any(name.startswith("model.fc") for name, _ in encoder.named_parameters())
    sum(part.square().sum() for part in encoder(draw(64, 64))).backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


# --- custom Modules


class Tokens(nn.Module):
    def forward(self, images):
        return images.mean(dim=3).mT


class Both(nn.Module):
    def forward(self, images):
        return ImageFeatures(images.mean(dim=3).mT, images.amax(dim=(2, 3)))


def test_a_custom_map_is_in_row_major_order_and_has_the_mean():
    features = image_encoder_from(nn.AvgPool2d(4))(draw(8, 12, batch=1))
    for y, x, c in product(range(2), range(3), range(3)):
        expected = draw(8, 12, batch=1)[0, c, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].mean()
        assert features.regions[0, y * 3 + x, c].item() == pytest.approx(expected.item(), abs=1e-6)
    assert_close(features.image, draw(8, 12, batch=1).mean(dim=(2, 3)))


@pytest.mark.parametrize("prefix", [None, 0, 2])
def test_custom_tokens_have_none_before_the_patches_unless_told(prefix):
    features = image_encoder_from(Tokens(), prefix_tokens=prefix)(draw(5, 4))
    assert_close(features.regions, draw(5, 4).mean(dim=3).mT[:, prefix or 0 :])
    assert_close(features.image, features.regions.mean(dim=1))


def test_custom_features_stay_as_they_are():
    encoder, expected = image_encoder_from(Both()), Both()(draw(5, 4))
    assert_close(tuple(encoder(draw(5, 4))), tuple(expected), atol=0, rtol=0)
    assert encoder.image_kind == "pooled"
    again = image_encoder_from(image_encoder_from(ConvBackbone(3)))
    assert (again.region_dim, again.image_dim) == (12, 48)


def test_a_function_prepares_the_images():
    features = image_encoder_from(Tokens(), lambda images: images[:, :, :3] * 2)(draw(5, 4))
    assert_close(features.regions, draw(5, 4)[:, :, :3].mean(dim=3).mT * 2)


@torch.no_grad()
def test_images_of_any_size_without_resizing():
    model = randomize(dino())
    encoder = image_encoder_from(model, HALF_AT_OWN_SIZE)
    images = draw(5 * PATCH, 3 * PATCH)
    expected = model(pixel_values=HALF_AT_OWN_SIZE(images)).last_hidden_state
    assert_close(encoder(images).regions, expected[:, 1:], **TOLERANCE)
    assert encoder(images).regions.shape == (2, 15, VISION)


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipVisionModel", "Dinov2WithRegistersModel"])
def test_models_on_another_device_are_measured_there(name):
    encoder = image_encoder_from(IMAGES[name].make().to("meta"), Preprocess.imagenet((SIDE, SIDE)))
    assert (encoder.region_dim, encoder.prefix_tokens) == (VISION, IMAGES[name].prefix)
    assert encoder(torch.empty(2, 3, 45, 71, device="meta")).regions.shape == (2, (SIDE // PATCH) ** 2, VISION)


@pytest.mark.parametrize("name", TEXT)
def test_text_models_on_another_device_are_measured_there(name):
    if name == "BertModel" and transformers.__version__.startswith("4."):
        pytest.skip("BERT of transformers 4 reads the values of its mask")
    encoder = text_encoder_from(TEXT[name].make().to("meta"), TEXT[name].tokenizer())
    assert encoder(torch.empty(2, 5, dtype=torch.long, device="meta")).words.shape == (2, 5, WORD)


@torch.no_grad()
@pytest.mark.parametrize("name", FROZEN)
def test_frozen_encoders_compile_in_one_graph(name):
    encoder = FROZEN[name]().train()
    inputs = encoder.encode(CAPTIONS) if name == "text" else (draw(45, 71),)
    compiled = torch.compile(encoder, backend="eager", fullgraph=True)
    assert_close(tuple(compiled(*inputs)), tuple(encoder(*inputs)), **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("name", IMAGES)
def test_half_precision(name):
    _, encoder = make_image(name)
    expected = encoder(draw())
    features = encoder.bfloat16()(draw().bfloat16())
    for actual, exact in zip(features, expected):
        assert actual.dtype == torch.bfloat16
        assert (actual.float() - exact).norm() < 0.05 * exact.norm()


def test_double_precision():
    model = nn.Conv2d(3, 5, 4, stride=4).double()
    features = image_encoder_from(model, HALF)(draw().double())
    assert features.regions.dtype == features.image.dtype == torch.float64
    assert_close(features.regions, tokens_of(model(HALF(draw()).double())), atol=1e-6, rtol=0)


# --- in the hosts of this package


def test_text_features_condition_the_generator():
    _, encoder = make_text("CLIPModel", sentence="projection")
    augmentation = ConditioningAugmentation(encoder.sentence_dim, 5)
    sizes = {"channels": 2, "resolutions": (4, 8), "residual_blocks": 1}
    generator = CascadedGenerator(3, 5, encoder.word_dim, **sizes)
    tokens, word_mask = encoder.encode(CAPTIONS)
    words, sentence = encoder(tokens, word_mask)
    noise = torch.randn(3, 3)
    condition = augmentation(sentence, noise=torch.zeros(3, 5)).sample
    images = generator(noise, condition, words, word_mask).images
    assert images[-1].shape == (3, 3, 8, 8)
    images[-1].sum().backward()
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_matching_loss_of_two_foreign_encoders():
    _, text = make_text("SiglipModel")
    _, vision = make_image("SiglipModel")
    image = ImageEncoder(vision, text.word_dim)
    tokens, word_mask = text.encode(CAPTIONS)
    images = draw(batch=3).requires_grad_(True)
    MatchingLoss()(image(images), text(tokens, word_mask), word_mask).total.backward()
    assert images.grad.abs().sum() > 0
    assert image.region_projection.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in [*text.parameters(), *vision.parameters()])


def test_captioner_and_redescription_loss_on_a_foreign_encoder():
    captioner = Captioner(make_image("Dinov2Model")[1], 9, embedding_dim=4, hidden_dim=5).train()
    tokens = torch.tensor([[5, 8, 1], [6, 1, 0]])
    captioner(draw(), tokens, tokens != 0).sum().backward()
    assert captioner.image_projection.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in captioner.image_encoder.parameters())
    images = draw(45, 71).requires_grad_(True)
    RedescriptionLoss(captioner)(images, tokens, tokens != 0).backward()
    assert images.grad.abs().sum() > 0


# --- errors


def no_pad_token():
    return make_tokenizer(pad=None)


def encode(captions, template="<s> $A </s>"):
    return text_encoder_from(bert(), make_tokenizer(template)).encode(captions)


class ReturnsText(nn.Module):
    """A text encoder with an output of any kind."""

    def __init__(self, words, pooled=None):
        super().__init__()
        self.words, self.pooled = words, pooled

    def forward(self, input_ids, attention_mask=None):
        return SimpleNamespace(last_hidden_state=self.words, pooler_output=self.pooled)


def text_that_returns(*output):
    return text_encoder_from(ReturnsText(*output), make_tokenizer())


class Untraceable(nn.Module):
    def forward(self, images):
        return images.mean(dim=(2, 3)) if images.sum() < 1e9 else images


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (
            r"text_encoder_from: sentence must be one of 'pooled', .* 'max'",
            lambda: make_text("T5EncoderModel", sentence="max"),
        ),
        (
            r"sentence='projection', but SiglipModel has no such output; it has 'pooled', 'mean'",
            lambda: make_text("SiglipModel", sentence="projection"),
        ),
        (
            r"sentence='pooled', but T5EncoderModel has no such output; it has 'mean'",
            lambda: make_text("T5EncoderModel", sentence="pooled"),
        ),
        (
            r"text_encoder_from: model must be an nn.Module, but it is a str",
            lambda: text_encoder_from("bert", make_tokenizer()),
        ),
        (
            r"model must be a text encoder, but Dinov2Model takes `pixel_values`.* use image_encoder_from",
            lambda: text_encoder_from(dino(), make_tokenizer()),
        ),
        (
            r"model must be a text encoder, but T5Model also has a decoder; pass its encoder",
            lambda: text_encoder_from(transformers.T5Model(t5().config), make_tokenizer()),
        ),
        (
            r"returns `last_hidden_state`.* BertForMaskedLM failed on two tokens: .*last_hidden_state",
            lambda: text_encoder_from(transformers.BertForMaskedLM(bert().config), make_tokenizer()),
        ),
        (
            r"last_hidden_state of ReturnsText must be floats \(B, L, D\), but .* it is torch\.float32 \(1, 2\)",
            lambda: text_that_returns(torch.zeros(1, 5)),
        ),
        (r"but of two tokens .* \(1, 2, 3, 5\)", lambda: text_that_returns(torch.zeros(1, 2, 3, 5))),
        (r"but of two tokens .* \(1, 1, 5\)", lambda: text_that_returns(torch.zeros(1, 1, 5))),
        (r"must be floats .* it is torch\.int64", lambda: text_that_returns(torch.zeros(1, 2, 5).long())),
        (r"two tokens are not all finite", lambda: text_that_returns(torch.full((1, 2, 5), math.nan))),
        (
            r"pooler_output of ReturnsText must be \(B, D\), but of one caption it is \(1, 2, 5\)",
            lambda: text_that_returns(torch.zeros(1, 2, 5), torch.zeros(1, 2, 5)),
        ),
        (r"one caption it is of the type list", lambda: text_that_returns(torch.zeros(1, 2, 5), [1])),
        (
            r"image_processor must turn images \(2, 3, 224, 224\) into pixel values .* it returned a NoneType",
            lambda: image_encoder_from(nn.Conv2d(3, 4, 3), lambda images: None),
        ),
        (r"but it returned \(1, 3, 224", lambda: image_encoder_from(nn.Conv2d(3, 4, 3), lambda images: images[:1])),
        (r"Linear failed on two tokens", lambda: text_encoder_from(nn.Linear(2, 2), make_tokenizer())),
        (
            r"the tokenizer \w+ has no pad token.* set one",
            lambda: text_encoder_from(bert(), no_pad_token()),
        ),
        (r"the tokenizer NoneType has no pad token", lambda: text_encoder_from(bert(), None)),
        (r"encode: captions must be a string or a list of at least one, but it is 5", lambda: encode(5)),
        (r"encode: captions must be .* but it is \[\]", lambda: encode([])),
        (r"encode: captions must be .* but it is \['red', 3\]", lambda: encode(["red", 3])),
        (r"encode: caption 1 \(''\) has no token", lambda: encode(["red", ""], template=None)),
        (r"encode: caption 0 \(''\) has no token", lambda: encode("", template=None)),
        (
            r"TextEncoderAdapter: tokens range from 0 to 12 but vocabulary_size=12",
            lambda: make_text("BertModel")[1](torch.tensor([[0, 12]])),
        ),
        (
            r"tokens are \(1, 14\), but the model has 13 positions; truncate",
            lambda: make_text("SiglipTextModel")[1](torch.ones(1, 14, dtype=torch.long)),
        ),
        (
            r"word_mask has padding before a real word; put the real words first",
            lambda: make_text("BertModel")[1](
                torch.ones(2, 2, dtype=torch.long), torch.tensor([[1, 0], [0, 1]]).bool()
            ),
        ),
        (
            r"TextEncoderAdapter: caption 1 has no real word",
            lambda: make_text("BertModel")[1](
                torch.ones(2, 2, dtype=torch.long), torch.tensor([[1, 0], [0, 0]]).bool()
            ),
        ),
        (r"image_encoder_from: model must be an nn.Module, but it is a str", lambda: image_encoder_from("resnet18")),
        (
            r"model must be an image encoder, but T5EncoderModel takes `input_ids`.* use text_encoder_from",
            lambda: image_encoder_from(t5(), HALF),
        ),
        (r"image_processor is needed for Dinov2Model.* AutoImageProcessor", lambda: image_encoder_from(dino())),
        (r"image_processor must be .* but it is a int", lambda: image_encoder_from(dino(), 224)),
        (r"image must be one of 'pooled', .* but it is 'cls'", lambda: image_encoder_from(dino(), HALF, image="cls")),
        (
            r"image='projection', but Dinov2Model has no such output; it has 'pooled', 'mean'",
            lambda: image_encoder_from(dino(), HALF, image="projection"),
        ),
        (
            r"Dinov2ForImageClassification failed on \(2, 3, 32, 32\); .*last_hidden_state",
            lambda: image_encoder_from(transformers.Dinov2ForImageClassification(dino().config), HALF),
        ),
        (
            r"CLIPVisionModel failed on \(2, 3, 40, 40\); .* pass an image_processor with that size",
            lambda: image_encoder_from(transformers.CLIPVisionModel(VISION_CONFIG()), Preprocess.imagenet((40, 40))),
        ),
        (
            r"VisionTransformer failed on \(2, 3, 40, 40\); .* doesn't match model \(32\)",
            lambda: image_encoder_from(timm_vit(), Preprocess.imagenet((40, 40))),
        ),
        (r"Linear failed on \(2, 3, 224, 224\)", lambda: image_encoder_from(nn.Linear(2, 2))),
        (
            r"Sequential failed on \(2, 3, 224, 224\); .* The error: Sequential has no layer that returns a map",
            lambda: image_encoder_from(nn.Sequential(nn.Flatten(), nn.Linear(3 * 224 * 224, 2))),
        ),
        (r"Untraceable failed on", lambda: image_encoder_from(Untraceable())),
        (
            r"Flatten must return a map .* but it returned \(301056,\)",
            lambda: image_encoder_from(nn.Flatten(0)),
        ),
        (
            r"prefix_tokens must be a whole number from 0 to 15, because SiglipVisionModel returns tokens",
            lambda: make_image("SiglipVisionModel", prefix_tokens=16),
        ),
        (r"prefix_tokens .* from 0 to 0, because .* a map", lambda: make_image("ResNetModel", prefix_tokens=1)),
        (r"ImageEncoderAdapter: images must be \(B, 3, H, W\)", lambda: make_image("Dinov2Model")[1](draw()[0])),
        (
            r"ImageEncoderAdapter: images must be floats in \[-1, 1\]",
            lambda: make_image("Dinov2Model")[1](draw().byte()),
        ),
        (
            r"the dtype of images is torch.float64 but that of the weights is torch.float32",
            lambda: make_image("Dinov2Model")[1](draw().double()),
        ),
    ],
)
def test_errors(message, call):
    with pytest.raises(ValueError, match=message):
        call()


def test_images_out_of_range_cause_a_warning():
    _, encoder = make_image("Dinov2Model")
    with pytest.warns(UserWarning, match=r"ImageEncoderAdapter: no value of the images is negative"):
        encoder((draw() + 1) / 2)


def test_adapters_are_what_the_functions_return():
    assert isinstance(text_encoder_from(t5(), t5_tokenizer()), TextEncoderAdapter)
    assert isinstance(image_encoder_from(Tokens()), ImageEncoderAdapter)
