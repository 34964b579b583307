"""Resources of the fused kernels on a GPU: registers, spills, shared memory, widths of memory accesses.

Triton can compile for a GPU that the machine does not have, so this table needs none:

    python -m benchmarks.kernel_resources --capabilities 90 --dtypes bfloat16 --channels 32 --words 18

The attention kernels are the default; `--similarity` is the fused forward pass of `word_region_similarity`.
On a GPU, `--measure` times each tile that could replace the one in use (`mirror_modules.kernels.attention.TILES`).
tests/kernels/test_compilation.py checks a new entry of that table.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mirror_modules.kernels import attention, similarity
from mirror_modules.kernels.choice import LARGEST_IN_FLOAT32

DTYPES = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}
FLOAT32_POINTERS = ("words_result", "sentence_result", "scores", "similarity", "gradient", "grad_products")
FLOAT32_POINTERS += ("grad_context_norms", "grad_word_norms", "grad_words")
SHARED_MEMORY = {80: 164, 86: 100, 90: 228}
"""KiB of shared memory of a multiprocessor, by compute capability; each program takes 1 KiB more than it asks for."""
CANDIDATES = [
    attention.Tile(positions, words, warps)
    for positions, words, warps in itertools.product((16, 32, 64, 128), (16, 32, 64, 128), (4, 8))
]
DEVICE = "cuda"


class Case(NamedTuple):
    """A configuration of a kernel that the compiler can tell apart."""

    direction: str
    channels: int
    words: int
    dtype: str
    capability: int
    channels_last: bool = False
    maps: bool = False
    """Whether the forward pass writes the attention maps, and the backward pass reads their gradients."""
    fused: bool = False
    """Whether the features are written next to the contexts, as a refinement stage takes them."""


class Resources(NamedTuple):
    """Resources of a compiled kernel."""

    registers: int
    """Of a thread; at most 255."""
    spilled: int
    """Bytes of memory per thread that hold what does not fit in the registers."""
    shared: int
    """Bytes of shared memory of a program."""
    warps: int
    """Warps that run on a multiprocessor at the same time, of at most 64 (48 for compute capability 8.6)."""
    loads: Counter[int]
    """Number of instructions that load from global memory, by bytes per thread; the most efficient take 16."""
    stores: Counter[int]


def is_integer(name: str) -> bool:
    """Whether an argument of a kernel of this name is a size or a stride."""
    return len(name) == 1 or name[-2:] in ("_b", "_c", "_n", "_e") or name in ("span", "stride_row")


def compile_kernel(
    kernel: Any,
    constants: dict[str, Any],
    integers: Callable[[str], int],
    dtype: str,
    capability: int,
    *,
    pointers: int = 16,
) -> Any:
    """Compile as Triton does at a launch: an integer of 1 is a constant, a multiple of 16 allows wider memory accesses.

    Args:
        kernel: A function decorated by `triton.jit`.
        constants: Its constants, and the options of a launch.
        integers: Maps the name of a size or stride to its value.
        dtype: Name of the dtype of the features.
        capability: Compute capability of the GPU, such as 90.
        pointers: A number of bytes that every pointer is a multiple of.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options: dict[str, Any] = {"num_warps": 4, "num_stages": 3, "maxnreg": None}  # Triton's defaults
    options |= {name: value for name, value in constants.items() if name in options}
    constants = {name: value for name, value in constants.items() if name not in options}
    signature, multiples = {}, {}
    for position, name in enumerate(kernel.arg_names):
        value = pointers
        if name in constants:
            signature[name] = "constexpr"
            continue
        if is_integer(name):
            value = integers(name)
            signature[name] = "i32" if value < 2**31 else "i64"
            if value == 1:
                signature[name], constants[name] = "constexpr", 1
        elif name.startswith("gamma"):
            signature[name] = "fp32"
            continue
        elif name == "word_mask":
            signature[name] = "*u8"
            continue
        elif name in FLOAT32_POINTERS or (kernel.fn.__name__ == "similarity_kernel" and name == "result"):
            signature[name] = "*fp32"
        else:
            signature[name] = DTYPES[dtype]
        if value % 16 == 0:
            multiples[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=multiples)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources_of(compiled: Any, warps: int, capability: int) -> Resources:
    """Read the resources of a compiled kernel from its machine code."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    shared = compiled.metadata.shared
    # A warp gets registers in multiples of 256.
    registers_per_program = warps * -(-found["REG"] * 32 // 256) * 256
    programs = min(2**16 // registers_per_program, SHARED_MEMORY[capability] * 1024 // (shared + 1024), 32)
    at_most = 48 if capability == 86 else 64
    widths = {kind: access_widths(compiled.asm["ptx"], kind) for kind in ("ld", "st")}
    return Resources(
        found["REG"],
        found["STACK"] + found["LOCAL"],
        shared,
        min(programs, at_most // warps) * warps,
        widths["ld"],
        widths["st"],
    )


def access_widths(ptx: str, kind: str) -> Counter[int]:
    """Count the accesses to global memory by bytes per thread; `kind` is "ld" or "st".

    Examples:
        >>> from benchmarks.kernel_resources import access_widths
        >>> access_widths("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1]; ld.global.b8 %rs1, [%rd2];", "ld")
        Counter({16: 1, 1: 1})
    """
    accesses = re.findall(rf"\b{kind}\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx)
    return Counter(int(count or 1) * int(bits) // 8 for count, bits in accesses)


def configuration_of(case: Case, precision: str = "ieee") -> dict[str, int | None]:
    """What `attention` chooses for a case; `precision` is that of float32 products."""
    return attention.configuration(case.direction, case.channels, case.words, getattr(torch, case.dtype), precision)


def resources(case: Case, precision: str = "ieee") -> Resources:
    """Compile a case with the configuration that `attention` chooses; `precision` is that of float32 products."""
    import triton.language as tl

    from mirror_modules.kernels import attention_triton

    constants: dict[str, Any] = dict(configuration_of(case, precision))
    constants |= {"ACCUMULATE": tl.float32, "PRECISION": precision, "HAS_MASK": True}
    if case.direction == "forward":
        constants |= {"NEED_WEIGHTS": case.maps, "COPY_FEATURES": case.fused}
        if not case.fused:
            constants["features_copy"] = None
    else:
        constants |= {"HAS_WORD_MAPS": case.maps, "HAS_SENTENCE_MAPS": case.maps, "HAS_COPY": case.fused}
        if not case.maps:
            constants |= {"word_weights_gradient": None, "sentence_weights_gradient": None}
        if not case.fused:
            constants["copy_gradient"] = None

    def integers(name: str) -> int:
        if name.endswith("_c" if case.channels_last else "_n"):
            return 1
        # Batches and captions of any size; channels and positions in multiples of 16.
        return 17 if name in ("B", "L") else 16

    kernel = getattr(attention_triton, f"{case.direction}_kernel")
    compiled = compile_kernel(kernel, constants, integers, case.dtype, case.capability)
    return resources_of(compiled, constants["num_warps"], case.capability)


def similarity_resources(features: int, words: int, dtype: str, capability: int) -> Resources | None:
    """Compile the fused forward pass of the similarity; None where products of torch run instead."""
    import triton.language as tl

    from mirror_modules.kernels import similarity_triton

    configured = similarity.fused_configuration(words, features, getattr(torch, dtype), divmod(capability, 10))
    if configured is None:
        return None
    constants = configured | {"ACCUMULATE": tl.float32, "PRECISION": "ieee"}

    def integers(name: str) -> int:
        return {"D": features, "L": words}.get(name, 17)

    compiled = compile_kernel(similarity_triton.fused_kernel, constants, integers, dtype, capability)
    return resources_of(compiled, configured["num_warps"], capability)


def print_resources(name: str, used: Resources) -> None:
    """Print a line for one configuration."""
    print(
        f"{name} {used.registers:3} registers, {used.spilled} B spilled, {used.shared} B shared, {used.warps} warps; "
        f"loads {dict(used.loads)}, stores {dict(used.stores)}",
        flush=True,
    )


def measure(case: Case, batch: int = 64, side: int = 128) -> Iterator[tuple[attention.Tile, float]]:
    """Milliseconds of the forward or backward pass on this GPU, with each candidate that does not spill."""
    from triton.testing import do_bench

    dtype = getattr(torch, case.dtype)
    shapes = [(batch, case.channels, side, side), (batch, case.words, case.channels), (batch, case.channels)]
    features, words, sentence = (torch.randn(shape, device=DEVICE, dtype=dtype) for shape in shapes)
    gradients = torch.randn_like(features), torch.randn_like(features)
    tiles = attention.TILES[case.direction, dtype.itemsize]
    for tile in CANDIDATES:
        with patch.dict(tiles, {configuration_of(case)["BLOCK_C"]: tile}):
            if resources(case).spilled:
                continue
            if case.direction == "forward":
                call = partial(attention.global_local_attention, features, words, sentence, None, False, False)
            else:
                inputs = features, words, sentence, None, None, *gradients, None, None
                call = partial(attention.global_local_attention_backward, *inputs)
            yield tile, do_bench(call)


def main() -> None:
    """Print a line for each configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--words", type=int, nargs="+", default=[18, 77, 256])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--capabilities", type=int, nargs="+", default=[80, 90], choices=list(SHARED_MEMORY))
    parser.add_argument("--maps", action="store_true", help="with attention maps")
    parser.add_argument("--fused", action="store_true", help="with the features next to the contexts")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--similarity", action="store_true", help="of the similarity, with --channels features")
    either.add_argument("--tf32", action="store_true", help="with products of float32 in tf32")
    either.add_argument("--measure", action="store_true", help="time the candidate tiles on this GPU")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 replaces the compiler; unset it.")
    if arguments.similarity:
        for kind in itertools.product(arguments.channels, arguments.words, arguments.dtypes, arguments.capabilities):
            features, words, dtype, capability = kind
            used = similarity_resources(*kind)
            name = f"similarity D={features:<4} L={words:<3} {dtype:8} sm_{capability}"
            if used is None:
                print(f"{name} products of torch", flush=True)
            else:
                print_resources(name, used)
        return
    kinds = itertools.product(
        ("forward", "backward"), arguments.channels, arguments.words, arguments.dtypes, arguments.capabilities
    )
    for kind in kinds:
        if kind[3] == "float32" and kind[1] > LARGEST_IN_FLOAT32:
            continue
        if arguments.measure:
            for tile, milliseconds in measure(Case(*kind)):
                print(*kind, *tile, f"{milliseconds:.3f} ms", flush=True)
            continue
        precision = "tf32" if arguments.tf32 else "ieee"
        for channels_last in (False, True):
            case = Case(*kind, channels_last, arguments.maps, arguments.fused)
            name = f"{case.direction:8} C={case.channels:<3} L={case.words:<3} {case.dtype:8} sm_{case.capability}"
            layout = "channels last " if channels_last else "channels first"
            print_resources(f"{name} {layout}", resources(case, precision))


if __name__ == "__main__":
    main()
