"""Every kernel compiles for its target GPUs in all precisions; Triton's compiler needs no GPU.

Each test runs in a subprocess, because the interpreter replaces the compiler in the process of the other tests.
"""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

COMPILER = """
import sys
from contextlib import suppress

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource

from mirror_modules.kernels import attention, attention_triton, similarity, similarity_triton

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
SUMS = ("words_result", "sentence_result", "scores", "similarity", "gradient", "grad_products", "grad_word_norms")
capability, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])


def is_integer(name):
    return len(name) == 1 or name[-2:] in ("_b", "_c", "_n", "_e") or name in ("span", "stride_row")


def compile_kernel(kernel, constants, integers, pointers=16, warps=4):
    '''Compile as Triton does at a launch: an integer of 1 is a constant, a multiple of 16 allows wider memory accesses.

    `integers` returns the integer with a given name; pointers are multiples of `pointers`.
    '''
    constants, signature, multiples = dict(constants), {}, {}
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
        elif name in SUMS or (kernel is similarity_triton.similarity_kernel and name == "result"):
            signature[name] = "*fp32"
        else:
            signature[name] = POINTERS[dtype]
        if value % 16 == 0:
            multiples[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=multiples)
    options = {"num_warps": warps, "num_stages": 2}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def constants_of(channels, length):
    constants = attention._constants(torch.empty(1, channels, 1, 1, dtype=dtype), length)
    tiles = attention_triton.fitting_tiles(constants["BLOCK_C"], dtype.itemsize)
    positions, warps = tiles[len(tiles) // 2]
    return constants | {"BLOCK_N": positions}, warps
"""

VECTORIZED = """
def check(kernel, constants, warps=4, ragged=()):
    # As in practice, sizes and strides are multiples of 16, except for these and those in `ragged`.
    odd = {"B", "J", "L", "R", *ragged}
    compiled = compile_kernel(kernel, constants, lambda name: 17 if name in odd else 16, warps=warps)
    assert len(compiled.asm["cubin"]) > 0
    # Shared memory of one program, by compute capability.
    assert compiled.metadata.shared <= {86: 99, 90: 227}[capability] * 1024, compiled.metadata.shared
    ptx = compiled.asm["ptx"]
    if not ragged:
        assert "ld.global.v4" in ptx or "cp.async.cg" in ptx, kernel.fn.__name__
        assert kernel is similarity_triton.similarity_kernel or "st.global.v4" in ptx, kernel.fn.__name__
    print(kernel.fn.__name__, compiled.metadata.shared)


if capability == 86:
    attention.LARGEST_WORDS //= 2
for channels, length in [(32, 18), (256, 77)]:
    constants, warps = constants_of(channels, length)
    common = constants | {"HAS_MASK": True}
    channels_first = {"feature_n": 1, "context_n": 1, "sentence_context_n": 1}
    forward = common | channels_first
    check(attention_triton.forward_kernel, forward | {"NEED_WEIGHTS": False}, warps)
    channels_last = {"feature_c": 1, "word_gradient_c": 1, "sentence_gradient_c": 1, "result_c": 1}
    maps = {"HAS_WORD_MAPS": False, "HAS_SENTENCE_MAPS": False}
    maps |= {"word_weights_gradient": None, "sentence_weights_gradient": None}
    check(attention_triton.backward_kernel, common | channels_last | maps, warps)
    check(attention_triton.forward_kernel, forward | {"NEED_WEIGHTS": True}, warps, ragged=("N", "C"))

for length, size in [(18, 289), (256, 1024)]:
    for kernel in (similarity_triton.attend_kernel, similarity_triton.attend_backward_kernel):
        check(kernel, similarity._blocks(dtype, length, size, "BLOCK_R"))
    for kernel in (similarity_triton.similarity_kernel, similarity_triton.similarity_backward_kernel):
        check(kernel, similarity._blocks(dtype, length, size, "BLOCK_D"))
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
for channels, length, has_mask in [(32, 18, True), (256, 150, False)]:
    constants, _ = constants_of(channels, length)
    common = constants | {"HAS_MASK": has_mask} | ({} if has_mask else {"word_mask": None})
    for has_maps in (True, False):
        check(attention_triton.forward_kernel, common | {"NEED_WEIGHTS": has_maps})
    pointers = {"HAS_WORD_MAPS": "word_weights_gradient", "HAS_SENTENCE_MAPS": "sentence_weights_gradient"}
    for flags in ({"HAS_WORD_MAPS"}, {"HAS_SENTENCE_MAPS"}, set(pointers), set()):
        absent = {pointer: None for flag, pointer in pointers.items() if flag not in flags}
        maps = {flag: flag in flags for flag in pointers}
        check(attention_triton.backward_kernel, common | maps | absent)

for length, size in [(18, 289), (1, 1)]:
    for kernel in (similarity_triton.attend_kernel, similarity_triton.attend_backward_kernel):
        check(kernel, similarity._blocks(dtype, length, size, "BLOCK_R"))
    for kernel in (similarity_triton.similarity_kernel, similarity_triton.similarity_backward_kernel):
        check(kernel, similarity._blocks(dtype, length, size, "BLOCK_D"))
"""


def run_compiler(script, capability, dtype, folder):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    file = folder / "compile_kernels.py"
    file.write_text(COMPILER + script)
    # An empty cache, so that the kernels are compiled now.
    done = subprocess.run(
        [sys.executable, str(file), str(capability), dtype],
        env=env | {"TRITON_CACHE_DIR": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split("\n")


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [(86, "float16"), (90, "float32"), (90, "bfloat16")],
)
def test_compiles_with_vectorized_memory_accesses(capability, dtype, tmp_path):
    assert len(run_compiler(VECTORIZED, capability, dtype, tmp_path)) == 14 + 1


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [(80, "float32"), (80, "bfloat16"), (90, "float16")],
)
def test_compiles_for_integers_that_triton_specializes(capability, dtype, tmp_path):
    assert len(run_compiler(ANY_INTEGERS, capability, dtype, tmp_path)) == 20 + 1
