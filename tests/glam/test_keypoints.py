"""Key points completed from a text: against the layers written out, and a recording of GAWWN's layer list."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.testing import assert_close

from mirror_modules import KeypointGenerator
from mirror_modules.functional import complete_keypoints
from tests.norms import with_random_norms
from tests.recordings import MODES, PRECISIONS, assert_recorded, entries, load_without_biases, read

B, K, Z, E, HIDDEN = 3, 2, 5, 7, 22


def make(**options):
    return with_random_norms(KeypointGenerator(K, Z, E, **{"hidden_dim": HIDDEN, **options}))


def points_of(batch=B):
    return torch.cat((torch.rand(batch, K, 2), torch.rand(batch, K, 1).round()), dim=2)


def make_inputs(batch=B):
    return torch.randn(batch, Z), torch.randn(batch, E), points_of(batch)


def completed_by_loops(given, proposed):
    result = torch.empty_like(given)
    for i in range(given.shape[0]):
        for k in range(given.shape[1]):
            visibility = given[i, k, 2]
            for j in range(3):
                result[i, k, j] = visibility * given[i, k, j] + (1 - visibility) * proposed[i, k, j]
    return result


@pytest.mark.parametrize("whole", [False, True])
def test_completion_matches_the_loops(whole):
    given, proposed = torch.rand(B, 5, 3), torch.rand(B, 5, 3)
    if whole:
        given[..., 2] = given[..., 2].round()
    assert_close(complete_keypoints(given, proposed), completed_by_loops(given, proposed))


def test_completion_matches_the_recording():
    record = read("gawwn_keypoint_gate")
    mixed = complete_keypoints(record["given_points"], record["proposed_points"])
    assert_close(mixed, record["mixed_points"], atol=1e-6, rtol=0)


def test_completion_is_differentiable():
    assert gradcheck(complete_keypoints, [torch.rand(2, 3, 3).double().requires_grad_() for _ in range(2)])


def generate_by_hand(generator, noise, condition, given):
    def layers(sequence, features):
        for linear, norm, _ in zip(*[iter(sequence)] * 3):
            features = F.relu(norm(features @ linear.weight.T))
        return features

    noise = F.relu(noise @ generator.noise_path[0].weight.T + generator.noise_path[0].bias)
    text = F.relu(condition @ generator.text_path[0].weight.T + generator.text_path[0].bias)
    points = layers(generator.points_path, given.reshape(len(given), 3 * K))
    hidden = layers(generator.joint[:9], torch.cat((noise, text, points), dim=1))
    proposed = torch.sigmoid(hidden @ generator.joint[9].weight.T + generator.joint[9].bias)
    return completed_by_loops(given, proposed.reshape(given.shape))


@pytest.mark.parametrize("training", [False, True])
def test_matches_the_layers_written_out(training):
    generator = make().double().train(training)
    inputs = [tensor.double().requires_grad_() for tensor in make_inputs()]
    inputs[2].data[..., 2] *= 0.5  # points that are half hidden
    points = generator(*inputs)
    expected = generate_by_hand(generator, *inputs)
    assert_close(points, expected, atol=1e-10, rtol=1e-10)
    leaves = [*inputs, *generator.parameters()]
    grads = [torch.autograd.grad(result.square().sum(), leaves) for result in (points, expected)]
    assert_close(*grads, atol=1e-8, rtol=1e-8)
    assert all(grad.abs().sum() > 0 for grad in grads[0])


def test_given_points_are_kept_and_missing_ones_depend_on_the_noise():
    generator, (noise, condition, given) = make().eval(), make_inputs()
    given[:, 0], given[:, 1] = torch.tensor([0.25, 0.5, 1.0]), torch.zeros(3)
    points, others = generator(noise, condition, given), generator(noise + 1, condition, given)
    assert_close(points[:, 0], given[:, 0], atol=0, rtol=0)
    assert (points[:, 1] != others[:, 1]).all()
    assert ((points >= 0) & (points <= 1)).all()


def test_a_sample_alone_equals_the_same_sample_in_a_batch():
    generator, inputs = make().eval(), make_inputs()
    together = generator(*inputs)
    for i in range(B):
        assert_close(generator(*(tensor[i : i + 1] for tensor in inputs)), together[i : i + 1], atol=1e-6, rtol=1e-6)


def test_a_batch_of_one_trains():
    generator = make().train()
    generator(*make_inputs(1)).square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in generator.parameters())


def test_compiles_into_one_graph(compiled):
    generator, inputs = make().eval(), make_inputs()
    assert_close(compiled(generator)(*inputs), generator(*inputs))


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (r"point_count must be a whole number of at least 1, but it is 0", {"point_count": 0}),
        (r"hidden_dim must be even, because some layers have half of it, not 7", {"hidden_dim": 7}),
    ],
)
def test_invalid_options_are_refused(message, options):
    with pytest.raises(ValueError, match="KeypointGenerator: " + message):
        KeypointGenerator(**options)


@pytest.mark.parametrize(
    ("message", "noise", "condition", "given"),
    [
        (r"noise has 7 features but .* noise_dim=5", (B, E), (B, E), (B, K, 3)),
        (r"condition has 5 features but .* condition_dim=7", (B, Z), (B, Z), (B, K, 3)),
        (r"given must be \(B, 2, 3\), .* it is \(3, 5, 3\)", (B, Z), (B, E), (B, 5, 3)),
        (r"batch sizes disagree \(.*given: \(2, 2, 3\)\)", (B, Z), (B, E), (2, K, 3)),
    ],
)
def test_invalid_inputs_are_refused(message, noise, condition, given):
    with pytest.raises(ValueError, match="KeypointGenerator: " + message):
        make()(torch.zeros(noise), torch.zeros(condition), torch.zeros(given))


@pytest.mark.parametrize(
    ("message", "given", "proposed"),
    [
        (r"given must be floats \(B, K, 3\), .* torch.float32 \(3, 2\)", torch.zeros(3, 2), torch.zeros(3, 2, 3)),
        (r"proposed must be floats .* torch.int64 \(1, 2, 3\)", torch.zeros(1, 2, 3), torch.zeros(1, 2, 3).long()),
        (r"given \(3, 2, 3\) and proposed \(3, 5, 3\) must have", torch.zeros(3, 2, 3), torch.zeros(3, 5, 3)),
        (
            r"given range from 0 to 2, but x, y and visibility must",
            torch.tensor([[[0.0, 1.0, 2.0]]]),
            torch.zeros(1, 1, 3),
        ),
        (r"given range from -1 to 0, but", torch.tensor([[[0.0, 0.0, -1.0]]]), torch.zeros(1, 1, 3)),
    ],
)
def test_invalid_points_are_refused(message, given, proposed):
    with pytest.raises(ValueError, match="complete_keypoints: " + message):
        complete_keypoints(given, proposed)


# A recording of the layer list, whose linear layers have biases


def load_recorded(record):
    """The recorded generator, and the biases that ours does not have, by the norm that subtracts them."""
    paths = {"noise": "noise_path", "text": "text_path", "points": "points_path", "joint": "joint"}
    state = {}
    for name, value in entries(record, "state/generator.").items():
        part, rest = name.split(".", 1)
        state[f"{paths[part]}.{rest}"] = value
    generator = KeypointGenerator(5, 6, 12, hidden_dim=12)
    return generator, load_without_biases(generator, state)


@PRECISIONS
@MODES
def test_gawwn(mode, dtype):
    record = read("gawwn_keypoint_generator_derived")
    generator, _ = load_recorded(record)
    generator.to(dtype).train(mode == "train")
    points = generator(*(record[name].to(dtype) for name in ("noise", "sentence", "given_points")))
    assert_recorded(points, record[f"{mode}/points"])


def test_published_size():
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in KeypointGenerator().parameters())
    assert size + (512 + 256) + (1024 + 512 + 256) == 2_715_949
