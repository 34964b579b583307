"""The cascade: any number of stages, any resolutions, any attention module, and samples independent of their batch."""

import copy
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from mirror_modules import CascadedGenerator, GlobalLocalAttention, WordAttention
from mirror_modules.glam import attention as attention_file
from mirror_modules.glam import global_local_attention
from mirror_modules.glam.stages import DoublingConv2d

B, L, C, Z, D, E = 2, 11, 3, 5, 13, 7
CASCADES = [(4,), (4, 8), (8, 32), (4, 64), (16, 32, 64)]


def make(resolutions=(4, 8, 16), **options):
    return CascadedGenerator(Z, E, D, channels=C, resolutions=resolutions, residual_blocks=1, **options)


def make_inputs(batch=B):
    return torch.randn(batch, Z), torch.randn(batch, E), torch.randn(batch, L, D)


def mask_of(*real_words, length=L):
    return torch.arange(length) < torch.tensor(real_words).unsqueeze(1)


@pytest.mark.parametrize("resolutions", CASCADES)
@pytest.mark.parametrize("attention", ["global-local", "word", "condition", "none"])
def test_any_number_of_stages_and_any_resolutions(resolutions, attention):
    generator = make(resolutions, attention=attention)
    generated = generator(*make_inputs(), mask_of(4, 11), need_weights=True)
    assert [tuple(images.shape) for images in generated.images] == [(B, 3, size, size) for size in resolutions]
    assert all(images.abs().max() <= 1 for images in generated.images)
    coarse = resolutions[:-1]
    expected_words = [] if attention in ("condition", "none") else [(B, L, size, size) for size in coarse]
    expected_sentence = [(B, C, size, size) for size in coarse] if attention == "global-local" else []
    assert [tuple(weights.shape) for weights in generated.word_weights] == expected_words
    assert [tuple(weights.shape) for weights in generated.sentence_weights] == expected_sentence


@pytest.mark.parametrize("resolutions", CASCADES)
@pytest.mark.parametrize("mask", [None, mask_of(4)])
@pytest.mark.parametrize("options", [{}, {"attention": "condition"}, {"activation": "relu"}])
def test_a_batch_of_one_trains(resolutions, mask, options):
    generator = make(resolutions, **options).train()
    generated = generator(*make_inputs(1), mask)
    sum(images.square().mean() for images in generated.images).backward()
    for name, parameter in generator.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("attention", ["global-local", "word", "condition"])
def test_an_image_alone_equals_the_same_image_in_a_batch(attention):
    generator = make(attention=attention).eval()
    noise, condition, words = make_inputs()
    together = generator(noise, condition, words, mask_of(4, 11), need_weights=True)
    alone = generator(noise[:1], condition[:1], words[:1, :4], need_weights=True)
    for image, images in zip(alone.images, together.images):
        assert_close(image, images[:1], atol=1e-5, rtol=0)
    for weight, weights in zip(alone.word_weights, together.word_weights):
        assert_close(weight, weights[:1, :4], atol=1e-5, rtol=0)


def test_padding_has_no_influence():
    generator = make()
    noise, condition, words = make_inputs()
    words.requires_grad_()
    padded_words = torch.cat((words.detach(), 100 * torch.randn(B, 2, D)), dim=1).requires_grad_()
    images = generator(noise, condition, words, mask_of(11, 4)).images[-1]
    padded = generator(noise, condition, padded_words, mask_of(11, 4, length=L + 2), need_weights=True)
    grad = torch.randn_like(images)
    images.backward(grad)
    padded.images[-1].backward(grad)
    assert_close(padded.images[-1], images)
    assert_close(padded_words.grad[:, :L], words.grad)
    for weights in padded.word_weights:
        assert (weights[0, 11:] == 0).all()
        assert (weights[1, 4:] == 0).all()
    assert (padded_words.grad[0, 11:] == 0).all()
    assert (padded_words.grad[1, 4:] == 0).all()


@pytest.mark.parametrize("attention", ["global-local", "word"])
def test_attention_maps_are_returned_only_on_request_and_do_not_change_the_images(attention):
    generator, inputs = make(attention=attention).eval(), make_inputs()
    without, with_maps = generator(*inputs), generator(*inputs, need_weights=True)
    assert without.word_weights == without.sentence_weights == []
    assert len(with_maps.word_weights) == 2
    assert_close(without.images, with_maps.images, atol=0, rtol=0)


@pytest.mark.parametrize("need_weights", [False, True])
def test_attention_maps_are_computed_only_on_request(monkeypatch, need_weights):
    requested, maps = [], []

    def spy(*inputs, **options):
        requested.append(options["need_weights"])
        result = global_local_attention(*inputs, **options)
        maps.extend([result.word_weights, result.sentence_weights])
        return result

    monkeypatch.setattr(attention_file, "global_local_attention", spy)
    generated = make().train()(*make_inputs(), mask_of(4, 11), need_weights=need_weights)
    sum(images.square().mean() for images in generated.images).backward()
    assert requested == [need_weights] * 2
    assert [attention_map is not None for attention_map in maps] == [need_weights] * 4


@pytest.mark.parametrize(("attention", "changed"), [("global-local", [False, True, True]), ("none", [False] * 3)])
def test_words_influence_the_images_from_the_second_stage_on(attention, changed):
    generator = make(attention=attention).eval()
    noise, condition, words = make_inputs()
    before, after = generator(noise, condition, words).images, generator(noise, condition, words + 1).images
    assert [not torch.equal(*pair) for pair in zip(before, after)] == changed


@pytest.mark.parametrize("changed", [0, 1])
def test_noise_and_condition_influence_the_images_of_each_stage(changed):
    generator, inputs = make().eval(), list(make_inputs())
    before = generator(*inputs).images
    inputs[changed] = inputs[changed] + 1
    assert not any(torch.equal(*pair) for pair in zip(before, generator(*inputs).images))


@pytest.mark.parametrize("active", [1, 2])
def test_the_first_stages_alone_generate_the_same_images_and_train_alone(active):
    generator, inputs = make().eval(), make_inputs()
    whole = generator(*inputs).images
    generator.active_stages = active
    images = generator(*inputs).images
    assert len(images) == active
    for image, expected in zip(images, whole):
        assert torch.equal(image, expected)
    sum(image.square().mean() for image in images).backward()
    trained = [generator.initial, *generator.refinements[: active - 1], *generator.heads[:active]]
    has_gradient = {id(weight) for module in trained for weight in module.parameters()}
    for name, weight in generator.named_parameters():
        assert (weight.grad is not None) == (id(weight) in has_gradient), name


def test_without_intermediate_images_the_finest_image_is_the_same():
    generator, finest_only, inputs = make().eval(), make(intermediate_images=False).eval(), make_inputs()
    state = {
        name.replace("heads.2.", "heads.0."): value
        for name, value in generator.state_dict().items()
        if not name.startswith(("heads.0.", "heads.1."))
    }
    finest_only.load_state_dict(state)
    (image,) = finest_only(*inputs).images
    assert_close(image, generator(*inputs).images[-1], atol=0, rtol=0)


def test_options_of_a_partial_reach_the_operation_in_every_stage(monkeypatch):
    options = {"sentence_bias": True, "score_projection": True, "sentence_axis": "positions", "impl": "torch"}
    generator = make(attention=partial(GlobalLocalAttention, **options))
    calls = []

    def spy(features, words, sentence, word_mask, **received):
        calls.append((sentence, received))
        return global_local_attention(features, words, sentence, word_mask, **received)

    monkeypatch.setattr(attention_file, "global_local_attention", spy)
    noise, condition, words = make_inputs()
    generator(noise, condition, words)
    assert len(calls) == 2
    for stage, (sentence, received) in zip(generator.refinements, calls):
        projection = stage.attention.sentence_projection
        assert_close(sentence, condition @ projection.weight.T + projection.bias)
        assert_close(received["score_matrix"], stage.attention.score_projection.weight, atol=0, rtol=0)
        assert (received["sentence_axis"], received["impl"]) == ("positions", "torch")


@pytest.mark.parametrize(
    ("name", "factory"),
    [("global-local", GlobalLocalAttention), ("word", WordAttention), ("word", partial(WordAttention))],
)
def test_a_name_and_its_class_build_the_same_generator(name, factory):
    torch.manual_seed(1)
    named = make(attention=name).state_dict()
    torch.manual_seed(1)
    built = make(attention=factory).state_dict()
    assert list(built) == list(named)
    assert_close(built, named, atol=0, rtol=0)


def test_names_in_the_state():
    stage = ["attention.word_projection.weight", "attention.sentence_projection.weight", "fusion.weight"]
    names = [name for name in make().state_dict() if name.startswith("refinements.1.")]
    assert names[:3] == [f"refinements.1.{name}" for name in stage]
    assert names[3].startswith("refinements.1.residual.0.")


# A user's own attention


class MeanWord(NamedTuple):
    contexts: tuple[Tensor, ...]
    word_weights: Tensor | None
    sentence_weights: Tensor | None = None


class MeanWordAttention(nn.Module):
    """The mean of the real words at every position, and the condition beside it."""

    def __init__(self, feature_dim, word_dim, condition_dim, *, context_dim=4):
        super().__init__()
        self.context_dim = context_dim + condition_dim
        self.projection = nn.Linear(word_dim, context_dim)
        self.sizes = feature_dim, word_dim, condition_dim

    def forward(self, features, words, condition, word_mask=None, *, need_weights=False):
        mask = words.new_ones(words.shape[:2]) if word_mask is None else word_mask.to(words.dtype)
        weights = mask / mask.sum(dim=1, keepdim=True)
        mean = torch.einsum("bl,bld->bd", weights, self.projection(words))
        size = features.shape[2:]
        contexts = tuple(part[:, :, None, None].expand(-1, -1, *size) for part in (mean, condition))
        return MeanWord(contexts, weights[:, :, None, None].expand(-1, -1, *size) if need_weights else None)


class UnconditionalMaps(MeanWordAttention):
    def forward(self, *inputs, need_weights=False):
        return super().forward(*inputs, need_weights=True)


def test_a_custom_attention_is_built_once_per_stage_and_trains():
    generator = make(attention=MeanWordAttention).train()
    assert [stage.attention.sizes for stage in generator.refinements] == [(C, D, E)] * 2
    assert generator.refinements[0].attention is not generator.refinements[1].attention
    assert generator.refinements[0].fusion.in_channels == C + 4 + E
    inputs = [tensor.requires_grad_() for tensor in make_inputs()]
    generated = generator(*inputs, mask_of(4, 11))
    assert generated.word_weights == generated.sentence_weights == []
    sum(images.square().mean() for images in generated.images).backward()
    for name, parameter in generator.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    for stage in generator.refinements:
        assert stage.attention.projection.weight.grad.abs().sum() > 0
    assert all(tensor.grad.abs().sum() > 0 for tensor in inputs)
    assert (inputs[2].grad[0, 4:] == 0).all()


@pytest.mark.parametrize("attention", [MeanWordAttention, UnconditionalMaps])
def test_a_custom_attention_returns_its_maps_on_request(attention):
    generator, inputs = make(attention=attention).eval(), make_inputs()
    generated = generator(*inputs, mask_of(4, 11), need_weights=True)
    assert [tuple(weights.shape) for weights in generated.word_weights] == [(B, L, 4, 4), (B, L, 8, 8)]
    assert generated.sentence_weights == []
    assert generator(*inputs, mask_of(4, 11)).word_weights == []


def test_a_custom_attention_is_part_of_copies_and_states():
    generator, inputs = make(attention=partial(MeanWordAttention, context_dim=2)).eval(), make_inputs()
    assert "refinements.1.attention.projection.bias" in generator.state_dict()
    copied, other = copy.deepcopy(generator), make(attention=partial(MeanWordAttention, context_dim=2)).eval()
    other.load_state_dict(generator.state_dict())
    expected = generator(*inputs).images
    with torch.no_grad():
        generator.refinements[0].attention.projection.weight.add_(1)
    for same in (copied, other):
        assert_close(same(*inputs).images, expected, atol=0, rtol=0)
    assert not torch.equal(generator(*inputs).images[-1], expected[-1])


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_custom_attention_compiles_into_one_graph(compiled, need_weights):
    generator, inputs = make((4, 8), attention=MeanWordAttention).eval(), make_inputs()
    generated = compiled(generator)(*inputs, mask_of(4, 11), need_weights=need_weights)
    expected = generator(*inputs, mask_of(4, 11), need_weights=need_weights)
    assert_close(generated.images, expected.images)
    assert_close(generated.word_weights, expected.word_weights)
    generated.images[-1].sum().backward()
    assert generator.refinements[0].attention.projection.weight.grad.abs().sum() > 0


def test_a_factory_may_give_each_stage_another_attention():
    classes = [GlobalLocalAttention, WordAttention]
    remaining = iter(classes)
    generator = make(attention=lambda *sizes: next(remaining)(*sizes))
    assert [type(stage.attention) for stage in generator.refinements] == classes
    generated = generator(*make_inputs(), need_weights=True)
    assert [len(generated.word_weights), len(generated.sentence_weights)] == [2, 1]


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (
            GlobalLocalAttention(C, D, E),
            r"attention is one GlobalLocalAttention module, which all stages would share; give a factory .*"
            r"functools\.partial\(GlobalLocalAttention, \.\.\.\)",
        ),
        (3, r"attention must be 'global-local', 'word', 'condition', 'none' or a factory .*, but it is 3"),
        (None, r"attention must be .* or a factory .*, but it is None"),
        (["word"], r"attention must be .* or a factory .*, but it is \['word'\]"),
    ],
)
def test_an_attention_that_is_no_factory_is_refused(attention, message):
    with pytest.raises(ValueError, match="CascadedGenerator: " + message):
        make(attention=attention)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (
            nn.Linear(2, 3),
            r"attention must be an nn\.Module with .* `context_dim`.* it is a Linear with context_dim=None",
        ),
        (WordAttention, r"attention must be an nn\.Module with .* `context_dim`.* it is a type"),
        (None, r"the attention factory returned None, expected an nn\.Module .*; attention='none' builds a generator"),
    ],
)
def test_a_factory_that_returns_no_attention_is_refused(returned, message):
    with pytest.raises(ValueError, match=message):
        make(attention=lambda *sizes: returned)


class AlteredContexts(MeanWordAttention):
    """An attention whose contexts are wrong in one respect."""

    def __init__(self, *sizes, alter):
        super().__init__(*sizes)
        self.alter = alter

    def forward(self, *inputs, need_weights=False):
        result = super().forward(*inputs, need_weights=need_weights)
        return result._replace(contexts=tuple(map(self.alter, result.contexts)))


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (
            lambda context: context[:, :, :1, :1],
            r"at the size of the features \(\(2, 3, 4, 4\)\), but one is \(2, 4, 1, 1\)",
        ),
        (lambda context: context[:1], r"but one is \(1, 4, 4, 4\)"),
        (lambda context: context[:, :, 0, 0], r"but one is \(2, 4\)"),
        (lambda context: None, r"but one is a NoneType"),
        (
            lambda context: context.double(),
            r"the dtype and device .*torch\.float32, cpu\), but one has torch\.float64",
        ),
        (lambda context: context.to("meta"), r"must have the dtype and device .* but one has torch\.float32, meta"),
    ],
)
def test_contexts_that_cannot_be_concatenated_are_refused(alter, message):
    generator = make(attention=partial(AlteredContexts, alter=alter))
    with pytest.raises(ValueError, match=f"RefinementStage: .*AlteredContexts .*{message}"):
        generator(*make_inputs())


def test_one_module_for_several_stages_is_refused():
    shared = WordAttention(C, D, E)
    with pytest.raises(ValueError, match=r"returned one module for several stages, .*; make a new module in each call"):
        make(attention=lambda *sizes: shared)
    assert make((4, 8), attention=lambda *sizes: shared).refinements[0].attention is shared


@pytest.mark.parametrize(
    "factory", [lambda feature_dim: None, lambda a, b, c, d: None, partial(WordAttention, feature_dim=3)]
)
def test_a_factory_of_another_signature_is_refused(factory):
    with pytest.raises(ValueError, match=r"is called as attention\(feature_dim, .*\), which .* does not"):
        make(attention=factory)


# Generators without words, channels of each stage, and other activations


@pytest.mark.parametrize("attention", ["global-local", "word", "condition", "none"])
@pytest.mark.parametrize("resolutions", [(4, 8, 16), (8, 64)])
def test_each_stage_has_its_own_channels(attention, resolutions):
    widths = (7, 5, 3)[: len(resolutions)]
    generator = CascadedGenerator(Z, E, D, channels=widths, resolutions=resolutions, attention=attention)
    features = []
    for head in generator.heads:
        head.register_forward_hook(lambda _, inputs, __: features.append(inputs[0].shape))
    generator(*make_inputs(), need_weights=True)
    assert features == [(B, width, size, size) for width, size in zip(widths, resolutions)]


@pytest.mark.parametrize("attention", ["global-local", "word", "condition", "none"])
def test_one_number_of_channels_is_the_same_for_each_stage(attention):
    def state(channels):
        torch.manual_seed(1)
        return CascadedGenerator(Z, E, D, channels=channels, resolutions=(4, 8, 16), attention=attention).state_dict()

    assert_close(state((C, C, C)), state(C), atol=0, rtol=0)


def joined_by_hand(stage, features, condition):
    """StackGAN++'s stage, with the condition repeated at every position and upsampling before the convolution."""
    repeated = condition[:, :, None, None].expand(-1, -1, *features.shape[2:])
    joined = F.conv2d(torch.cat((features, repeated), dim=1), stage.joint.weight, padding=1)
    features = F.glu(stage.norm(joined), dim=1)
    for block in stage.residual:
        inner = F.glu(block.norm1(F.conv2d(features, block.conv1.weight, padding=1)), dim=1)
        features = features + block.norm2(F.conv2d(inner, block.conv2.weight, padding=1))
    for block in stage.upsample:
        doubled = F.interpolate(features, scale_factor=2.0, mode="nearest")
        features = F.glu(block.norm(F.conv2d(doubled, block.conv.weight, padding=1)), dim=1)
    return features


@pytest.mark.parametrize(("condition_dim", "doublings"), [(E, 1), (None, 1), (E, 2)])
def test_the_condition_joins_the_features_at_every_position(condition_dim, doublings):
    resolutions = (4, 4 * 2**doublings)
    options = {"channels": (5, 3), "resolutions": resolutions, "attention": "condition"}
    generator = CascadedGenerator(Z, condition_dim, **options).double().eval()
    for part in generator.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(part.running_var, 0.5, 2.0)
            nn.init.normal_(part.running_mean)
    noise = torch.randn(B, Z).double().requires_grad_()
    condition = None if condition_dim is None else torch.randn(B, E).double().requires_grad_()
    text = noise if condition is None else condition
    coarse = generator.initial(noise, condition)
    expected = torch.tanh(generator.heads[1].conv(joined_by_hand(generator.refinements[0], coarse, text)))
    image = generator(noise, condition).images[1]
    assert_close(image, expected, atol=1e-10, rtol=1e-10)
    leaves = [noise, *generator.initial.parameters(), *generator.refinements.parameters()]
    leaves += [] if condition is None else [condition]
    grads = [torch.autograd.grad(result.square().sum(), leaves) for result in (image, expected)]
    assert_close(*grads, atol=1e-10, rtol=1e-10)
    assert all(grad.abs().sum() > 0 for grad in grads[0])


@pytest.mark.parametrize("options", [{"attention": "condition"}, {"attention": "none"}, {"resolutions": (8,)}])
def test_words_are_optional_where_no_stage_attends(options):
    generator = make(**options).eval()
    noise, condition, words = make_inputs()
    without, given = generator(noise, condition), generator(noise, condition, words, mask_of(4, 11), need_weights=True)
    assert_close(without, given, atol=0, rtol=0)
    assert without.word_weights == given.word_weights == []


@pytest.mark.parametrize("attention", ["global-local", "word", MeanWordAttention])
def test_missing_words_are_refused_where_a_stage_attends(attention):
    noise, condition, _ = make_inputs()
    message = r"words are missing, but the stages attend to them; pass words \(B, L, 13\), or .* attention='condition'"
    with pytest.raises(ValueError, match="CascadedGenerator: " + message):
        make(attention=attention)(noise, condition)


def test_a_mask_without_words_is_refused():
    noise, condition, _ = make_inputs()
    with pytest.raises(ValueError, match=r"word_mask needs the words that it marks; pass both or neither"):
        make(attention="condition")(noise, condition, None, mask_of(4, 11))


@pytest.mark.parametrize(
    ("condition_dim", "condition", "message"),
    [(E, None, r"the condition is missing, .* condition_dim=7"), (None, True, r"was given, .* condition_dim=None")],
)
def test_a_condition_is_given_where_there_is_one(condition_dim, condition, message):
    generator = CascadedGenerator(Z, condition_dim, channels=C, resolutions=(4,))
    noise, given, _ = make_inputs()
    with pytest.raises(ValueError, match="CascadedGenerator: .*" + message):
        generator(noise, condition and given)


@pytest.mark.parametrize("attention", ["global-local", "word", "none"])
def test_without_a_condition_the_noise_takes_its_place(attention):
    generator = CascadedGenerator(Z, None, D, channels=C, resolutions=(4, 8), attention=attention).train()
    noise, _, words = make_inputs()
    sum(images.square().mean() for images in generator(noise, None, words).images).backward()
    assert generator.initial.linear.in_features == Z
    assert all(parameter.grad.abs().sum() > 0 for parameter in generator.parameters())


@pytest.mark.parametrize("channels", [(3, 5), (), (3, 5, 7, 11), "345", 3.0, None])
def test_channels_that_do_not_fit_the_stages_are_refused(channels):
    with pytest.raises(ValueError, match=r"channels must be a number or one per stage, 3 in all, but they are "):
        CascadedGenerator(channels=channels)


def test_channels_of_each_stage_are_positive():
    with pytest.raises(ValueError, match=r"channels\[1\] must be a whole number of at least 1, but it is 0"):
        CascadedGenerator(channels=(3, 0, 5))


@pytest.mark.parametrize("attention", ["global-local", "word", "condition", "none"])
@pytest.mark.parametrize(("resolutions", "coarser"), [((8, 16, 64), 2), ((16,), 0)])
def test_only_the_finest_stage_upsamples_bilinearly_and_with_the_same_weights(attention, resolutions, coarser):
    options = {"channels": C, "resolutions": resolutions, "attention": attention}
    nearest = CascadedGenerator(Z, E, D, **options)
    bilinear = CascadedGenerator(Z, E, D, **options, finest_upsampling="bilinear")
    doublings = [part.upsampling for part in bilinear.modules() if isinstance(part, DoublingConv2d)]
    assert doublings == ["nearest"] * coarser + ["bilinear"] * 2
    bilinear.load_state_dict(nearest.state_dict())
    inputs = make_inputs()
    *same, finest = zip(nearest(*inputs).images, bilinear(*inputs).images)
    for ours, expected in same:
        assert torch.equal(ours, expected)
    assert not torch.allclose(*finest, atol=1e-3)


@pytest.mark.parametrize("attention", ["global-local", "condition"])
def test_stages_after_the_first_read_the_attended_condition(attention):
    generator = CascadedGenerator(Z, E, D, channels=C, resolutions=(4, 8, 16), attention=attention)
    (noise, condition, words), other = make_inputs(), torch.randn(B, E)
    expected, features = [], generator.initial(noise, condition)
    for head, refinement in zip(generator.heads, [None, *generator.refinements]):
        features = features if refinement is None else refinement(features, other, words).features
        expected.append(head(features))
    assert_close(generator(noise, condition, words, attended_condition=other).images, expected)
    plain, same = generator(noise, condition, words), generator(noise, condition, words, attended_condition=condition)
    assert_close(same.images, plain.images)


def test_an_attended_condition_that_does_not_fit_is_refused():
    generator = CascadedGenerator(Z, E, D, channels=C, resolutions=(4, 8))
    with pytest.raises(ValueError, match=rf"attended_condition has {E + 1} features but .* condition_dim={E} "):
        generator(*make_inputs(), attended_condition=torch.randn(B, E + 1))
    with pytest.raises(ValueError, match=rf"attended_condition: \({B + 1}, {E}\)"):
        generator(*make_inputs(), attended_condition=torch.randn(B + 1, E))
    unconditional = CascadedGenerator(Z, None, D, channels=C, resolutions=(4, 8), attention="none")
    with pytest.raises(ValueError, match=r"attended_condition was given, but .* condition_dim=None.*leave it out"):
        unconditional(torch.randn(B, Z), attended_condition=torch.randn(B, E))


def test_unknown_upsampling_is_refused():
    with pytest.raises(
        ValueError, match=r"finest_upsampling must be one of 'nearest', 'bilinear', but it is 'bicubic'"
    ):
        CascadedGenerator(finest_upsampling="bicubic")


def test_an_unknown_activation_is_refused():
    with pytest.raises(
        ValueError, match=r"CascadedGenerator: activation must be one of 'glu', 'relu', but it is 'gelu'"
    ):
        CascadedGenerator(activation="gelu")


@pytest.mark.parametrize("attention", ["condition", "none"])
def test_generators_without_words_compile_into_one_graph(compiled, attention):
    generator, (noise, condition, _) = make((4, 8), attention=attention).eval(), make_inputs()
    assert_close(compiled(generator)(noise, condition).images, generator(noise, condition).images)


# Compilation and errors


@pytest.mark.parametrize("mask", [None, mask_of(4, 11)])
@pytest.mark.parametrize(
    ("attention", "need_weights"), [("global-local", False), ("global-local", True), ("word", True)]
)
def test_compiles_into_one_graph(compiled, attention, need_weights, mask):
    generator, inputs = make((4, 8), attention=attention).eval(), make_inputs()
    generated = compiled(generator)(*inputs, mask, need_weights=need_weights)
    assert_close(tuple(generated), tuple(generator(*inputs, mask, need_weights=need_weights)))
    generated.images[-1].sum().backward()
    assert generator.initial.linear.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("resolutions", [(), (2, 4), (8, 8), (8, 4), (4, 12), (0,), (-4,), (4.0, 8.0), 64])
def test_resolutions_must_be_increasing_powers_of_two(resolutions):
    with pytest.raises(
        ValueError, match=r"resolutions must be increasing powers of two from 4 up, .* but they are [(6]"
    ):
        make(resolutions)


@pytest.mark.parametrize("active", [0, -1, 4, 1.5])
def test_active_stages_that_do_not_exist_are_refused(active):
    generator = make((4, 8, 16))
    generator.active_stages = active
    with pytest.raises(ValueError, match=rf"active_stages must be None or from 1 to 3, .* but it is {active}"):
        generator(*make_inputs())


def test_active_stages_need_images_of_all_stages():
    generator = make((4, 8), intermediate_images=False)
    generator.active_stages = 1
    with pytest.raises(ValueError, match=r"with intermediate_images=True unless all stages run, but it is 1"):
        generator(*make_inputs())


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (r"noise_dim must be a whole number of at least 1, but it is 0", {"noise_dim": 0}),
        (r"channels must be a whole number of at least 1, but it is -1", {"channels": -1}),
        (r"residual_blocks must be 0 or more, but it is -1", {"residual_blocks": -1}),
        (
            r"attention must be 'global-local', 'word', 'condition', 'none' or a factory .*, but it is 'all'",
            {"attention": "all"},
        ),
    ],
)
def test_invalid_options_are_refused(message, options):
    with pytest.raises(ValueError, match="CascadedGenerator: " + message):
        CascadedGenerator(**options)


@pytest.mark.parametrize(
    ("message", "noise", "condition", "words", "mask"),
    [
        (r"noise has 4 features but .* noise_dim=5", (B, 4), (B, E), (B, L, D), None),
        (r"condition has 5 features but .* condition_dim=7", (B, Z), (B, Z), (B, L, D), None),
        (r"words has 7 features but .* word_dim=13", (B, Z), (B, E), (B, L, E), None),
        (r"words must be \(B, L, D\), but it is \(2, 13\)", (B, Z), (B, E), (B, D), None),
        (r"batch sizes disagree \(noise: \(3, 5\)", (3, Z), (B, E), (B, L, D), None),
        (r"caption 0 has no real word", (B, Z), (B, E), (B, L, D), mask_of(0, 4)),
        (r"word_mask is \(1, 11\)", (B, Z), (B, E), (B, L, D), mask_of(4)),
    ],
)
@pytest.mark.parametrize("attention", ["global-local", "none"])
def test_invalid_inputs_are_refused(attention, message, noise, condition, words, mask):
    with pytest.raises(ValueError, match="CascadedGenerator: " + message):
        make(attention=attention)(torch.zeros(noise), torch.zeros(condition), torch.zeros(words), mask)
