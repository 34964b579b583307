"""Every kernel compiles for its target GPUs in all precisions; Triton's compiler needs no GPU.

Each test runs in a subprocess, because the interpreter replaces the compiler in the process of the other tests.
"""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

COMPILE = """
import sys
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mirror_modules.kernels import attention, attention_triton, similarity, similarity_triton

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
SUMS = ("words_result", "sentence_result", "similarity", "gradient", "grad_products", "grad_word_norms")
capability, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])


def is_pointer(name):
    return len(name) > 1 and name[-2:] not in ("_b", "_c", "_n", "_e") and name not in ("span", "stride_row")


def compile_kernel(kernel, constants, warps=4, ragged=()):
    for name in kernel.arg_names:
        if name.endswith("weights_gradient"):
            constants.setdefault(name, None)
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("gamma"):
            signature[name] = "fp32"
        elif name == "word_mask":
            signature[name] = "*u8"
        elif name in SUMS or (kernel is similarity_triton.similarity_kernel and name == "result"):
            signature[name] = "*fp32"
        else:
            signature[name] = POINTERS[dtype] if is_pointer(name) else "i32"
    # As in practice, sizes and strides are multiples of 16, except for those in `ragged`: memory accesses vectorize.
    multiples = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name] not in ("constexpr", "fp32", "*u8") and name not in ("B", "J", "L", "R", *ragged)
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=multiples)
    options = {"num_warps": warps, "num_stages": 2}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
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
    constants = attention._constants(torch.empty(1, channels, 1, 1, dtype=dtype), length)
    tiles = attention_triton.fitting_tiles(constants["BLOCK_C"], dtype.itemsize)
    positions, warps = tiles[len(tiles) // 2]
    common = constants | {"HAS_MASK": True, "BLOCK_N": positions}
    channels_first = {"feature_n": 1, "context_n": 1, "sentence_context_n": 1}
    forward = common | channels_first
    compile_kernel(attention_triton.forward_kernel, forward | {"NEED_WEIGHTS": False}, warps)
    channels_last = {"feature_c": 1, "word_gradient_c": 1, "sentence_gradient_c": 1, "result_c": 1}
    maps = {"HAS_WORD_MAPS": False, "HAS_SENTENCE_MAPS": False}
    compile_kernel(attention_triton.backward_kernel, common | channels_last | maps, warps)
    compile_kernel(attention_triton.forward_kernel, forward | {"NEED_WEIGHTS": True}, warps, ragged=("N", "C"))

for length, size in [(18, 289), (256, 1024)]:
    for kernel in (similarity_triton.attend_kernel, similarity_triton.attend_backward_kernel):
        compile_kernel(kernel, similarity._blocks(dtype, length, size, "BLOCK_R"))
    for kernel in (similarity_triton.similarity_kernel, similarity_triton.similarity_backward_kernel):
        compile_kernel(kernel, similarity._blocks(dtype, length, size, "BLOCK_D"))
"""


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [(86, "float16"), (90, "float32"), (90, "bfloat16")],
)
def test_compiles_with_vectorized_memory_accesses(capability, dtype, tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = tmp_path / "compile_kernels.py"
    script.write_text(COMPILE)
    # An empty cache, so that the kernels are compiled now.
    done = subprocess.run(
        [sys.executable, str(script), str(capability), dtype],
        env=env | {"TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("kernel") == 14
