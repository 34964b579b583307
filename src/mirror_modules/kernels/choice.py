"""The choice between implementations: a pure function of facts, so that it can be tested without a GPU."""

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
"""Sizes up to which each kernel is written and tested."""

LARGEST_GAMMA = 8
"""Of `gamma_attention` in either direction: shares of the regions, exp(gamma * (share - 1)), must fit into float16."""
AMPLE_SHARED_MEMORY = 160 * 1024
"""Bytes that a program can share on the GPUs of data centers; those for games have less."""
LARGEST_ON_SMALL_CHIPS = 64
"""Channels in float32 of `global_local_attention` where shared memory is not ample."""


class Machine(NamedTuple):
    """What the device of the tensors can do."""

    device: str
    """Its type: "cpu", "cuda", ..."""
    capability: tuple[int, int] | None = None
    """CUDA compute capability, such as (9, 0); None elsewhere."""
    shared_memory: int | None = None
    """Bytes that a program can share on chip; None where that is not known."""
    has_triton: bool = False
    """Is Triton installed? Looked up only where it could run."""
    interprets: bool = False
    """Does Triton's interpreter run kernels on the CPU (TRITON_INTERPRET=1)? For tests: it is slow."""


class Facts(NamedTuple):
    """All that the choice depends on."""

    machine: Machine
    dtypes: tuple[torch.dtype, ...]
    """Of the floating point inputs, as autocast makes them."""
    sizes: dict[str, int]
    """The sizes that `LARGEST` limits."""
    options: tuple[str, ...] = ()
    """Options in use that only the definition has."""


class Choice(NamedTuple):
    """What runs and why."""

    implementation: str
    """ "torch" or "triton"."""
    reason: str
    """One sentence for people."""


def choose(operation: str, impl: str, facts: Facts) -> Choice:
    """Choose the implementation of `operation`.

    Args:
        operation: A key of `LARGEST`.
        impl: "auto", "torch" or "triton". A named implementation runs or raises; "auto" takes the fastest that applies.
        facts: What the choice depends on.

    Raises:
        ValueError: `impl` is none of the three.
        NotImplementedError: `impl` names an implementation that cannot run.
    """
    check_impl(operation, impl)
    if impl == "torch":
        return Choice("torch", "it was asked for")
    obstacle = _obstacle(operation, facts)
    if impl == "triton":
        if obstacle:
            raise NotImplementedError(
                f"{operation}: impl='triton' cannot run: {obstacle}; use impl='auto' or impl='torch'."
            )
        return Choice("triton", "it was asked for")
    if obstacle:
        return Choice("torch", f"the Triton kernel cannot run: {obstacle}")
    if facts.machine.interprets:
        return Choice("torch", "Triton only interprets its kernels here, which is slow")
    return Choice("triton", f"the fused kernel applies, and is the fastest on {facts.machine.device}")


def check_impl(owner: str, impl: str) -> None:
    """Require a known name; whether that implementation can run is known only once there are tensors."""
    check_choice(owner, "impl", impl, IMPLEMENTATIONS)


def _obstacle(operation: str, facts: Facts) -> str | None:
    """Why the kernel cannot run; None if it can."""
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
        return "Triton's interpreter, which TRITON_INTERPRET=1 asks for, computes bfloat16 wrongly"
    if facts.dtypes[0] not in DTYPES and not (machine.interprets and facts.dtypes[0] == torch.float64):
        return f"the inputs are {names[0]}, and the kernel takes float32, float16 and bfloat16"
    for name, size in facts.sizes.items():
        if not 1 <= size <= LARGEST[operation][name]:
            return f"there are {size} {name}, and the kernel takes 1 to {LARGEST[operation][name]}"
    wide = facts.dtypes[0] == torch.float32 and facts.sizes.get("channels", 0) > LARGEST_ON_SMALL_CHIPS
    if wide and machine.shared_memory is not None and machine.shared_memory < AMPLE_SHARED_MEMORY:
        return (
            f"there are {facts.sizes['channels']} channels in float32, and the kernel takes {LARGEST_ON_SMALL_CHIPS} "
            f"on a device with {machine.shared_memory // 1024} KiB of shared memory"
        )
    if facts.options:
        return f"only the definition has {' and '.join(facts.options)}"
    return None


def machine_of(device: torch.device) -> Machine:
    """Look up what there is to know of a device."""
    interprets = device.type in ("cpu", "cuda") and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interprets:
        return Machine(device.type)
    has_triton = importlib.util.find_spec("triton") is not None
    if device.type != "cuda":
        return Machine(device.type, has_triton=has_triton, interprets=interprets)
    properties = torch.cuda.get_device_properties(device)
    return Machine(
        device.type,
        (properties.major, properties.minor),
        getattr(properties, "shared_memory_per_block_optin", None),
        has_triton,
        interprets,
    )
