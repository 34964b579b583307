"""The choice between implementations: a named one runs or raises, and every choice has a reason."""

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


def test_auto_uses_the_kernel_where_it_applies():
    choice = choose(OPERATION, "auto", facts())
    assert choice == Choice("triton", "the fused kernel applies and is the fastest on cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize(("channels", "words"), [(1, 1), (256, 256)])
def test_the_kernel_supports_these_dtypes_and_sizes(dtype, impl, channels, words):
    channels = min(channels, 128) if dtype == torch.float32 else channels
    supported = facts(H100, dtype, dtype, dtype, channels=channels, words=words)
    assert choose(OPERATION, impl, supported).implementation == "triton"


OBSTACLES = {
    "a CPU": (facts(Machine("cpu")), "on 'cpu', and the kernel needs a CUDA device"),
    "another accelerator": (facts(Machine("mps")), "on 'mps'"),
    "no Triton": (facts(Machine("cuda", (9, 0), has_triton=False)), r"Triton is not installed \(pip install triton"),
    "an old GPU": (facts(Machine("cuda", (7, 5), has_triton=True)), r"capability 7\.5, and the kernel needs 8\.0"),
    "bfloat16 interpreted": (facts(Machine("cpu", has_triton=True, interprets=True)), "computes bfloat16 incorrectly"),
    "float64": (facts(H100, torch.float64), "the inputs are float64, and the kernel takes float32, float16"),
    "mixed": (facts(H100, torch.float32, torch.float16), "the inputs mix float16 and float32; convert them to one"),
    "too many channels": (facts(channels=257), "there are 257 channels, and the kernel takes 1 to 256"),
    "too many words": (facts(words=300), "there are 300 words, and the kernel takes 1 to 256"),
    "too many channels in float32": (
        facts(H100, torch.float32, channels=129),
        "there are 129 channels in float32, and the kernel takes 1 to 128",
    ),
    "no words": (facts(words=0), "there are 0 words"),
    "an option": (facts(options=("score_matrix",)), "only impl='torch' supports score_matrix"),
}


@pytest.mark.parametrize("case", OBSTACLES)
def test_where_the_kernel_cannot_run_auto_uses_torch_and_triton_raises(case):
    obstructed, reason = OBSTACLES[case]
    choice = choose(OPERATION, "auto", obstructed)
    assert choice.implementation == "torch"
    with pytest.raises(NotImplementedError, match=rf"impl='triton' cannot run: .*{reason}.*; use impl='auto' or"):
        choose(OPERATION, "triton", obstructed)
    assert choose(OPERATION, "torch", obstructed) == Choice("torch", "it was requested")


def test_size_limits_of_the_similarity():
    sizes = {"regions": 1024, "words": 256, "features": 1024}
    largest = Facts(H100, (torch.float16,) * 2, sizes)
    assert choose("word_region_similarity", "auto", largest).implementation == "triton"
    for name in sizes:
        too_large = largest._replace(sizes=sizes | {name: sizes[name] + 1})
        assert f"{sizes[name] + 1} {name}" in choose("word_region_similarity", "auto", too_large).reason


def test_the_interpreter_runs_only_on_request():
    interpreter = facts(Machine("cpu", has_triton=True, interprets=True), torch.float64)
    assert choose(OPERATION, "triton", interpreter).implementation == "triton"
    choice = choose(OPERATION, "auto", interpreter)
    assert choice == Choice("torch", "Triton would interpret the kernel, which is slow")


@pytest.mark.parametrize("impl", ["", "Torch", "cuda", None])
def test_the_error_names_an_unknown_implementation(impl):
    message = rf"global_local_attention: impl must be one of 'auto', 'torch', 'triton', but it is {impl!r}"
    with pytest.raises(ValueError, match=message):
        choose(OPERATION, impl, facts())
    with pytest.raises(ValueError, match=message):
        check_impl(OPERATION, impl)


def test_a_cpu_needs_no_search_for_triton(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: pytest.fail(f"searched for {name}"))
    assert machine_of(torch.device("cpu")) == Machine("cpu")
    assert machine_of(torch.device("meta")) == Machine("meta")


def test_the_interpreter_is_detected(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert machine_of(torch.device("cpu")).interprets


@pytest.fixture
def without_triton(monkeypatch):
    """Triton is not installed, although its interpreter is requested."""
    import_module = builtins.__import__

    def import_except_triton(name, *rest):
        if name.split(".")[0] == "triton":
            raise ImportError(f"{name} is blocked in this test")
        return import_module(name, *rest)

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(builtins, "__import__", import_except_triton)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.usefixtures("without_triton")
def test_without_triton_only_the_kernel_fails():
    attention = torch.randn(2, 3, 4, 5), torch.randn(2, 7, 3), torch.randn(2, 3)
    assert F.global_local_attention(*attention).word_context.shape == (2, 3, 4, 5)
    assert F.word_region_similarity(torch.randn(2, 5, 3), torch.randn(4, 7, 3)).shape == (2, 4)
    with pytest.raises(NotImplementedError, match="Triton is not installed"):
        F.global_local_attention(*attention, impl="triton")


def test_explain_returns_the_choice_of_a_call(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    attention = torch.randn(2, 3, 4, 5), torch.randn(2, 7, 3), torch.randn(2, 3)
    similarity = torch.randn(2, 5, 3), torch.randn(4, 7, 3)
    for operation, inputs in [(F.global_local_attention, attention), (F.word_region_similarity, similarity)]:
        choice = F.explain(operation, *inputs)
        assert choice.implementation == "torch"
        assert "on 'cpu'" in choice.reason
        assert F.explain(operation, *inputs, impl="torch").reason == "it was requested"
        with pytest.raises(NotImplementedError, match=f"{operation.__name__}: impl='triton' cannot run"):
            F.explain(operation, *inputs, impl="triton")


def test_explain_considers_options_and_autocast(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    inputs = torch.randn(2, 3, 4, 5, dtype=torch.bfloat16), torch.randn(2, 7, 3), torch.randn(2, 3)
    assert "mix bfloat16 and float32" in F.explain(F.global_local_attention, *inputs).reason
    with torch.autocast("cpu", dtype=torch.float16):
        assert "would interpret" in F.explain(F.global_local_attention, *inputs).reason
    same = [tensor.float() for tensor in inputs]
    assert "score_matrix" in F.explain(F.global_local_attention, *same, score_matrix=torch.eye(3)).reason
    assert "positions" in F.explain(F.global_local_attention, *same, sentence_axis="positions").reason


def test_explain_considers_the_transforms_of_torch_func(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    reasons = []

    def total(features):
        reasons.append(F.explain(F.global_local_attention, features, torch.ones(2, 7, 3), torch.ones(2, 3)).reason)
        return features.sum()

    torch.func.grad(total)(torch.randn(2, 3, 4, 5))
    assert "only impl='torch' supports transforms of torch.func" in reasons[0]


def test_explain_supports_two_operations():
    with pytest.raises(ValueError, match="must be global_local_attention or word_region_similarity, but it is 'relu'"):
        F.explain(torch.relu, torch.zeros(1))
