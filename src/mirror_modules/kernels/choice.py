"""The choice between implementations: a pure function of facts, testable without a GPU."""

from __future__ import annotations

import importlib.util
import os
from typing import NamedTuple

import torch

from mirror_modules._checks import check_choice

IMPLEMENTATIONS = ("auto", "torch", "triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST = {
    "global_local_attention": {"channels": 256, "words": 256},
    "word_region_similarity": {"regions": 1024, "words": 256, "features": 1024},
}
"""Largest sizes that each kernel supports and is tested with."""
LARGEST_IN_FLOAT32 = 128
"""Maximum number of channels of `global_local_attention` in more than 16 bits: with more, registers spill to memory."""

LARGEST_GAMMA = 8
"""Largest |gamma_attention| for which the smallest share of a region, exp(-|gamma|), is a normal number of float16."""


class Machine(NamedTuple):
    """Capabilities of the device of the tensors."""

    device: str
    """Device type: "cpu", "cuda", ..."""
    capability: tuple[int, int] | None = None
    """CUDA compute capability, such as (9, 0); None on other devices."""
    has_triton: bool = False
    """Whether Triton is installed; checked only if a kernel could run on the device."""
    interprets: bool = False
    """Whether Triton's interpreter runs kernels on the CPU (TRITON_INTERPRET=1): slow, for tests."""


class Facts(NamedTuple):
    """Everything the choice depends on."""

    machine: Machine
    """Capabilities of the device."""
    dtypes: tuple[torch.dtype, ...]
    """Dtypes of the floating point inputs after autocast."""
    sizes: dict[str, int]
    """The sizes limited by `LARGEST`."""
    options: tuple[str, ...] = ()
    """Options in use that only the PyTorch definition supports."""


class Choice(NamedTuple):
    """The implementation of a call, and the reason for it."""

    implementation: str
    """Either "torch" or "triton"."""
    reason: str
    """A human-readable clause."""


def choose(operation: str, impl: str, facts: Facts) -> Choice:
    """Choose the implementation of `operation`.

    Args:
        operation: A key of `LARGEST`.
        impl: "auto", "torch" or "triton". A named implementation runs or raises; "auto" takes the fastest that applies.
        facts: Everything the choice depends on.

    Raises:
        ValueError: `impl` is unknown.
        NotImplementedError: `impl` names an implementation that cannot run.

    Examples:
        >>> import torch
        >>> from mirror_modules.kernels import Facts, Machine, choose
        >>> gpu = Machine("cuda", capability=(9, 0), has_triton=True)
        >>> facts = Facts(gpu, dtypes=(torch.bfloat16,), sizes={"channels": 32, "words": 18})
        >>> choose("global_local_attention", "auto", facts).implementation
        'triton'
        >>> choose("global_local_attention", "auto", facts._replace(sizes={"channels": 300, "words": 18})).reason
        'the Triton kernel cannot run: there are 300 channels, and the kernel takes 1 to 256'
    """
    check_impl(operation, impl)
    if impl == "torch":
        return Choice("torch", "it was requested")
    obstacle = _obstacle(operation, facts)
    if impl == "triton":
        if obstacle:
            raise NotImplementedError(
                f"{operation}: impl='triton' cannot run: {obstacle}; use impl='auto' or impl='torch'."
            )
        return Choice("triton", "it was requested")
    if obstacle:
        return Choice("torch", f"the Triton kernel cannot run: {obstacle}")
    if facts.machine.interprets:
        return Choice("torch", "Triton would interpret the kernel, which is slow")
    return Choice("triton", f"the fused kernel applies and is the fastest on {facts.machine.device}")


def check_impl(owner: str, impl: str) -> None:
    """Require the name of an implementation; whether it can run depends on the tensors.

    Raises:
        ValueError: `impl` is not "auto", "torch" or "triton".

    Examples:
        >>> from mirror_modules.kernels import check_impl
        >>> check_impl("MyLayer", "triton")
        >>> check_impl("MyLayer", "cuda")
        Traceback (most recent call last):
        ValueError: MyLayer: impl must be one of 'auto', 'torch', 'triton', but it is 'cuda'.
    """
    check_choice(owner, "impl", impl, IMPLEMENTATIONS)


def _obstacle(operation: str, facts: Facts) -> str | None:
    """The reason why the kernel cannot run; None if it can."""
    machine = facts.machine
    if machine.device != "cuda" and not machine.interprets:
        return f"the tensors are on {machine.device!r}, and the kernel needs a CUDA device"
    if not machine.has_triton:
        return "Triton is not installed (pip install triton; on Linux it comes with torch)"
    if machine.capability is not None and machine.capability < (8, 0):
        return f"the device has compute capability {'.'.join(map(str, machine.capability))}, and the kernel needs 8.0"
    names = sorted({str(dtype).removeprefix("torch.") for dtype in facts.dtypes})
    if len(names) > 1:
        return f"the inputs mix {' and '.join(names)}; convert them to one"
    if machine.interprets and facts.dtypes[0] == torch.bfloat16:
        return "Triton's interpreter (TRITON_INTERPRET=1) computes bfloat16 incorrectly"
    if facts.dtypes[0] not in DTYPES and not (machine.interprets and facts.dtypes[0] == torch.float64):
        return f"the inputs are {names[0]}, and the kernel takes float32, float16 and bfloat16"
    for name, size in facts.sizes.items():
        if not 1 <= size <= LARGEST[operation][name]:
            return f"there are {size} {name}, and the kernel takes 1 to {LARGEST[operation][name]}"
    channels = facts.sizes.get("channels", 0)
    if facts.dtypes[0].itemsize > 2 and channels > LARGEST_IN_FLOAT32:
        return f"there are {channels} channels in {names[0]}, and the kernel takes 1 to {LARGEST_IN_FLOAT32}"
    if facts.options:
        return f"only impl='torch' supports {' and '.join(facts.options)}"
    return None


def machine_of(device: torch.device) -> Machine:
    """Look up the capabilities of a device.

    Examples:
        >>> import torch
        >>> from mirror_modules.kernels import machine_of
        >>> machine_of(torch.device("meta"))
        Machine(device='meta', capability=None, has_triton=False, interprets=False)
    """
    interprets = device.type in ("cpu", "cuda") and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interprets:
        return Machine(device.type)
    has_triton = importlib.util.find_spec("triton") is not None
    if device.type != "cuda":
        return Machine(device.type, has_triton=has_triton, interprets=interprets)
    return Machine(device.type, torch.cuda.get_device_capability(device), has_triton, interprets)
