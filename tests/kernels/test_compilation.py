"""Every kernel compiles for its target GPUs in all precisions; Triton's compiler needs no GPU.

Each test runs in a subprocess, because the interpreter replaces the compiler in the process of the other tests.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).parents[2]
COMPILER = """
import itertools
import sys
from contextlib import suppress

import torch
import triton.language as tl
from triton.backends.nvidia.compiler import CUDABackend

from benchmarks import kernel_resources
from benchmarks.kernel_resources import Case, access_widths, is_integer, resources, similarity_resources
from mirror_modules.kernels import attention, attention_triton, similarity, similarity_triton

capability, precision = int(sys.argv[1]), "tf32" if sys.argv[2] == "tf32" else "ieee"
dtype_name = "float32" if precision == "tf32" else sys.argv[2]
dtype = getattr(torch, dtype_name)
torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
WIDEST = 128 if dtype == torch.float32 else 256


def compile_kernel(kernel, constants, integers, **options):
    return kernel_resources.compile_kernel(kernel, constants, integers, dtype_name, capability, **options)


def constants_of(direction, channels, length):
    meta = torch.empty(1, channels, 1, 1, dtype=dtype, device="meta")
    return attention._constants(direction, meta, length)


def fused_constants():
    # Every entry of the table, for captions of one, 18 and 64 words.
    for length, features in itertools.product((1, 18, 64), (16, 32, 48, 64, 128, 240, 256)):
        configured = similarity.fused_configuration(length, features, dtype, divmod(capability, 10))
        if configured is not None:
            yield length, features, configured | {"ACCUMULATE": tl.float32, "PRECISION": "ieee"}
"""

VECTORIZED = """
def check(kernel, constants, ragged=()):
    # As in practice, sizes and strides are multiples of 16, except for these and those in `ragged`.
    odd = {"B", "J", "L", "R", *ragged}
    compiled = compile_kernel(kernel, constants, lambda name: 17 if name in odd else 16)
    assert len(compiled.asm["cubin"]) > 0
    # Shared memory of one program, by compute capability.
    assert compiled.metadata.shared <= {86: 99, 90: 227}[capability] * 1024, compiled.metadata.shared
    if not ragged:
        # The tiles of a backward pass in half precision are too small for the widest accesses.
        widest = 16 if kernel is not attention_triton.backward_kernel or dtype.itemsize == 4 else 8
        assert max(access_widths(compiled.asm["ptx"], "ld")) >= widest, kernel.fn.__name__
        stores = access_widths(compiled.asm["ptx"], "st")
        # They write a number for each word or pair.
        narrow = ("similarity_kernel", "similarity_backward_kernel", "fused_kernel")
        assert kernel.fn.__name__ in narrow or max(stores) >= widest, kernel.fn.__name__
    print(kernel.fn.__name__, compiled.metadata.shared)


for channels, length in [(32, 18), (WIDEST, 77)]:
    channels_first = {"feature_n": 1, "context_n": 1}
    forward = constants_of("forward", channels, length) | channels_first | {"HAS_MASK": True}
    check(attention_triton.forward_kernel, forward | {"NEED_WEIGHTS": False, "COPY_FEATURES": True})
    backward = constants_of("backward", channels, length) | {"HAS_MASK": True, "HAS_COPY": True}
    names = ("feature", "copy_gradient", "word_gradient", "sentence_gradient", "result")
    channels_last = {f"{name}_c": 1 for name in names}
    maps = {"HAS_WORD_MAPS": False, "HAS_SENTENCE_MAPS": False}
    maps |= {"word_weights_gradient": None, "sentence_weights_gradient": None}
    check(attention_triton.backward_kernel, backward | channels_last | maps)
    options = {"NEED_WEIGHTS": True, "COPY_FEATURES": False, "features_copy": None}
    check(attention_triton.forward_kernel, forward | options, ragged=("N", "C"))

for length, size in [(18, 289), (256, 1024)]:
    for kernel in (similarity_triton.attend_kernel, similarity_triton.attend_backward_kernel):
        check(kernel, similarity._blocks(dtype, length, size, "BLOCK_R"))
    for kernel in (similarity_triton.similarity_kernel, similarity_triton.similarity_backward_kernel):
        check(kernel, similarity._blocks(dtype, length, size, "BLOCK_D"))
    check(similarity_triton.context_backward_kernel, similarity._blocks_of_sum(dtype, size))
for length, features, constants in fused_constants():
    if length == 18 and features in (64, 256):
        check(similarity_triton.fused_kernel, constants)
"""

ANY_INTEGERS = """
class Stopped(Exception):
    pass


def stop(*_, **__):
    raise Stopped


# What fails for some integers fails before this stage; the stages that follow take most of the time.
CUDABackend.make_ttgir = stop
VALUES = (1, 16, 17, 2**31 + 1)


def check(kernel, constants):
    names = [name for name in kernel.arg_names if is_integer(name)]
    everywhere_1 = dict.fromkeys(names, 1)
    # In each round another value for each argument, and different values for neighbors.
    rounds = [{name: VALUES[(i + shift) % len(VALUES)] for i, name in enumerate(names)} for shift in range(len(VALUES))]
    for values in (everywhere_1, *rounds):
        with suppress(Stopped):
            compile_kernel(kernel, constants, values.__getitem__, pointers=2)
            raise AssertionError("the compiler was not stopped")
    print(kernel.fn.__name__)


# The second caption is processed in several chunks.
for channels, length, has_mask in [(32, 18, True), (WIDEST, 150, False)]:
    mask = {"HAS_MASK": has_mask} | ({} if has_mask else {"word_mask": None})
    common = constants_of("forward", channels, length) | mask
    for has_maps in (True, False):
        options = {"NEED_WEIGHTS": has_maps, "COPY_FEATURES": not has_maps}
        check(attention_triton.forward_kernel, common | options | ({"features_copy": None} if has_maps else {}))
    common = constants_of("backward", channels, length) | mask
    pointers = {"HAS_WORD_MAPS": "word_weights_gradient", "HAS_SENTENCE_MAPS": "sentence_weights_gradient"}
    pointers["HAS_COPY"] = "copy_gradient"
    for flags in ({"HAS_WORD_MAPS"}, {"HAS_SENTENCE_MAPS", "HAS_COPY"}, set(pointers), set()):
        absent = {pointer: None for flag, pointer in pointers.items() if flag not in flags}
        maps = {flag: flag in flags for flag in pointers}
        check(attention_triton.backward_kernel, common | maps | absent)

for length, size in [(18, 289), (1, 1)]:
    for kernel in (similarity_triton.attend_kernel, similarity_triton.attend_backward_kernel):
        check(kernel, similarity._blocks(dtype, length, size, "BLOCK_R"))
    for kernel in (similarity_triton.similarity_kernel, similarity_triton.similarity_backward_kernel):
        check(kernel, similarity._blocks(dtype, length, size, "BLOCK_D"))
    check(similarity_triton.context_backward_kernel, similarity._blocks_of_sum(dtype, size))
for length, features, constants in fused_constants():
    if length != 64 and features in (64, 256):
        check(similarity_triton.fused_kernel, constants)
"""


RESOURCES = """
# Wide and narrow features, captions of one chunk and of several; the rest is left to the tool, which prints all.
shapes = [(16, 18), (32, 18), (64, 77), (128, 77), (WIDEST, 256)]
if dtype_name == "float16" or precision == "tf32":
    # Nearly the same code as bfloat16 and float32.
    shapes = shapes[1::2] + shapes[-1:]
spilled = []
# For 8.6, one backward pass in float16 spills 8 bytes of 96 registers; with more registers, all of them lose warps.
for direction in () if capability == 86 else ("forward", "backward"):
    for channels, length in shapes:
        for options in [(False, False, False), (True, True, True)]:
            case = Case(direction, channels, length, dtype_name, capability, *options)
            used = resources(case, precision)
            if used.spilled:
                spilled.append((case, used))
            is_headline = dtype == torch.bfloat16 and (channels, length, case.maps) == (32, 18, False)
            assert not is_headline or used.warps >= {"forward": 28, "backward": 16}[direction], (case, used)
            print(direction)
for length, features, _ in fused_constants():
    if length != 18 and dtype_name == "float16" and capability != 86:
        continue
    used = similarity_resources(features, length, dtype_name, capability)
    if used.spilled:
        spilled.append((features, length, used))
    assert max(used.loads) == 16, (features, length, used)
    print("similarity")
for features in (48, 256):
    blocks = similarity._blocks_of_sum(dtype, features)
    compiled = compile_kernel(similarity_triton.context_backward_kernel, blocks, lambda name: 16)
    used = kernel_resources.resources_of(compiled, 4, capability)
    if used.spilled:
        spilled.append((features, used))
    print("similarity, backward")
assert not spilled, spilled
"""


def run_compiler(script, capability, dtype, folder):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    file = folder / "compile_kernels.py"
    file.write_text(COMPILER + script)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # An empty cache, so that the kernels are compiled now.
    done = subprocess.run(
        [sys.executable, str(file), str(capability), dtype],
        env=env | {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split("\n")


@pytest.mark.parametrize(
    ("capability", "dtype", "fused"),
    [(86, "float16", 1), (90, "float32", 0), (90, "bfloat16", 2)],
)
def test_compiles_with_vectorized_memory_accesses(capability, dtype, fused, tmp_path):
    assert len(run_compiler(VECTORIZED, capability, dtype, tmp_path)) == 16 + fused + 1


@pytest.mark.parametrize(
    ("capability", "dtype", "fused"),
    [(80, "float32", 0), (80, "bfloat16", 2), (90, "float16", 4), (90, "tf32", 0)],
)
def test_compiles_for_integers_that_triton_specializes(capability, dtype, fused, tmp_path):
    assert len(run_compiler(ANY_INTEGERS, capability, dtype, tmp_path)) == 22 + fused + 1


@pytest.mark.parametrize(
    ("capability", "dtype", "attention", "fused"),
    [
        (80, "bfloat16", 20, 15),
        (80, "float16", 12, 5),
        (86, "float16", 0, 15),
        (90, "bfloat16", 20, 21),
        (90, "float16", 12, 7),
        (80, "float32", 20, 0),
        (90, "float32", 20, 0),
        (80, "tf32", 12, 0),
        (90, "tf32", 12, 0),
    ],
)
def test_no_configuration_spills_registers(capability, dtype, attention, fused, tmp_path):
    """And the backward pass of the headline shape keeps 16 warps on a multiprocessor, enough to hide memory latency."""
    assert len(run_compiler(RESOURCES, capability, dtype, tmp_path)) == attention + fused + 2 + 1
