"""The choice between implementations: named ones run or raise, and `auto` says why."""

import pytest

from mirror_modules.kernels import Choice, choose_implementation


def test_auto_takes_what_applies_and_says_why():
    assert choose_implementation("some_attention") == Choice("torch", "the only implementation of this operation")
    assert choose_implementation("some_attention", "auto") == choose_implementation("some_attention")


def test_a_named_implementation_is_taken():
    assert choose_implementation("some_attention", "torch") == Choice("torch", "asked for")


def test_a_named_implementation_that_cannot_run_raises_and_says_why():
    with pytest.raises(
        NotImplementedError, match=r"some_attention: impl='triton' cannot run: .* use 'auto' or 'torch'"
    ):
        choose_implementation("some_attention", "triton")


@pytest.mark.parametrize("impl", ["", "Torch", "cuda", None])
def test_an_unknown_implementation_is_named(impl):
    message = rf"some_attention: impl must be one of 'auto', 'torch', 'triton', but it is {impl!r}"
    with pytest.raises(ValueError, match=message):
        choose_implementation("some_attention", impl)
