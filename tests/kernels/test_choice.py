"""The choice between implementations: named ones run or raise, and `auto` says why."""

import builtins
import importlib.util

import pytest
import torch

from mirror_modules import functional as F
from mirror_modules.kernels import Choice, Facts, Machine, check_impl, choose, machine_of

OPERATION = "global_local_attention"
H100 = Machine("cuda", capability=(9, 0), has_triton=True)


def facts(machine=H100, *dtypes, options=(), **sizes):
    return Facts(machine, dtypes or (torch.bfloat16,) * 3, {"channels": 32, "words": 18} | sizes, options)


def test_auto_takes_the_kernel_where_it_applies():
    choice = choose(OPERATION, "auto", facts())
    assert choice == Choice("triton", "the fused kernel applies, and is the fastest on cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize(("channels", "words"), [(1, 1), (256, 256)])
def test_the_kernel_takes_all_of_these(dtype, impl, channels, words):
    given = facts(H100, dtype, dtype, dtype, channels=channels, words=words)
    assert choose(OPERATION, impl, given).implementation == "triton"


OBSTACLES = {
    "a CPU": (facts(Machine("cpu")), "on 'cpu', and the kernel needs a CUDA device"),
    "another accelerator": (facts(Machine("mps")), "on 'mps'"),
    "no Triton": (facts(Machine("cuda", (9, 0), has_triton=False)), r"Triton is not installed \(pip install triton"),
    "an old GPU": (facts(Machine("cuda", (7, 5), has_triton=True)), r"capability 7\.5, and the kernel needs 8\.0"),
    "a small chip": (
        facts(Machine("cuda", (8, 6), 99 * 1024, has_triton=True), torch.float32, channels=65),
        "65 channels in float32, and the kernel takes 64 on a device with 99 KiB of shared memory",
    ),
    "bfloat16 interpreted": (facts(Machine("cpu", has_triton=True, interprets=True)), "computes bfloat16 wrongly"),
    "float64": (facts(H100, torch.float64), "the inputs are float64, and the kernel takes float32, float16"),
    "mixed": (facts(H100, torch.float32, torch.float16), "the inputs mix float16 and float32; convert them to one"),
    "too many channels": (facts(channels=257), "there are 257 channels, and the kernel takes 1 to 256"),
    "too many words": (facts(words=300), "there are 300 words, and the kernel takes 1 to 256"),
    "no words": (facts(words=0), "there are 0 words"),
    "an option": (facts(options=("score_matrix",)), "only the definition has score_matrix"),
}


@pytest.mark.parametrize("case", OBSTACLES)
def test_where_the_kernel_cannot_run_auto_does_and_triton_raises(case):
    given, reason = OBSTACLES[case]
    choice = choose(OPERATION, "auto", given)
    assert choice.implementation == "torch"
    with pytest.raises(NotImplementedError, match=rf"impl='triton' cannot run: .*{reason}.*; use impl='auto' or"):
        choose(OPERATION, "triton", given)
    assert choose(OPERATION, "torch", given) == Choice("torch", "it was asked for")


def test_the_similarity_has_limits_of_its_own():
    sizes = {"regions": 1024, "words": 256, "features": 1024}
    given = Facts(H100, (torch.float16,) * 2, sizes)
    assert choose("word_region_similarity", "auto", given).implementation == "triton"
    for name in sizes:
        too_large = given._replace(sizes=sizes | {name: sizes[name] + 1})
        assert f"{sizes[name] + 1} {name}" in choose("word_region_similarity", "auto", too_large).reason


def test_the_interpreter_runs_only_where_it_is_named():
    interpreter = facts(Machine("cpu", has_triton=True, interprets=True), torch.float64)
    assert choose(OPERATION, "triton", interpreter).implementation == "triton"
    assert choose(OPERATION, "auto", interpreter) == Choice(
        "torch", "Triton only interprets its kernels here, which is slow"
    )


@pytest.mark.parametrize("impl", ["", "Torch", "cuda", None])
def test_an_unknown_implementation_is_named(impl):
    message = rf"global_local_attention: impl must be one of 'auto', 'torch', 'triton', but it is {impl!r}"
    with pytest.raises(ValueError, match=message):
        choose(OPERATION, impl, facts())
    with pytest.raises(ValueError, match=message):
        check_impl(OPERATION, impl)


def test_a_cpu_is_described_without_looking_for_triton(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: pytest.fail(f"looked for {name}"))
    assert machine_of(torch.device("cpu")) == Machine("cpu")
    assert machine_of(torch.device("meta")) == Machine("meta")


def test_the_interpreter_is_seen(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert machine_of(torch.device("cpu")).interprets


@pytest.fixture
def without_triton(monkeypatch):
    """A machine where Triton is not installed, though its interpreter was asked for."""
    imported = builtins.__import__

    def refuse(name, *rest):
        if name.split(".")[0] == "triton":
            raise ImportError(f"{name} is refused here")
        return imported(name, *rest)

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.usefixtures("without_triton")
def test_without_triton_everything_works_but_the_kernel():
    attention = torch.randn(2, 3, 4, 5), torch.randn(2, 7, 3), torch.randn(2, 3)
    assert F.global_local_attention(*attention).word_context.shape == (2, 3, 4, 5)
    assert F.word_region_similarity(torch.randn(2, 5, 3), torch.randn(4, 7, 3)).shape == (2, 4)
    with pytest.raises(NotImplementedError, match="Triton is not installed"):
        F.global_local_attention(*attention, impl="triton")


def test_explain_says_what_a_call_would_do(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    attention = torch.randn(2, 3, 4, 5), torch.randn(2, 7, 3), torch.randn(2, 3)
    similarity = torch.randn(2, 5, 3), torch.randn(4, 7, 3)
    for operation, inputs in [(F.global_local_attention, attention), (F.word_region_similarity, similarity)]:
        choice = F.explain(operation, *inputs)
        assert choice.implementation == "torch"
        assert "on 'cpu'" in choice.reason
        assert F.explain(operation, *inputs, impl="torch").reason == "it was asked for"
        with pytest.raises(NotImplementedError, match=f"{operation.__name__}: impl='triton' cannot run"):
            F.explain(operation, *inputs, impl="triton")


def test_explain_sees_options_and_autocast(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    inputs = torch.randn(2, 3, 4, 5, dtype=torch.bfloat16), torch.randn(2, 7, 3), torch.randn(2, 3)
    assert "mix bfloat16 and float32" in F.explain(F.global_local_attention, *inputs).reason
    with torch.autocast("cpu", dtype=torch.float16):
        assert "only interprets" in F.explain(F.global_local_attention, *inputs).reason
    same = [tensor.float() for tensor in inputs]
    assert "score_matrix" in F.explain(F.global_local_attention, *same, score_matrix=torch.eye(3)).reason
    assert "positions" in F.explain(F.global_local_attention, *same, sentence_axis="positions").reason


def test_explain_sees_the_transforms_of_torch_func(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    reasons = []

    def total(features):
        reasons.append(F.explain(F.global_local_attention, features, torch.ones(2, 7, 3), torch.ones(2, 3)).reason)
        return features.sum()

    torch.func.grad(total)(torch.randn(2, 3, 4, 5))
    assert "only the definition has transforms of torch.func" in reasons[0]


def test_explain_knows_two_operations():
    with pytest.raises(ValueError, match="must be global_local_attention or word_region_similarity, but it is 'relu'"):
        F.explain(torch.relu, torch.zeros(1))
