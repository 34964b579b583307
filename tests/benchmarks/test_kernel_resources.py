"""The table of what the kernels occupy on a GPU; tests/kernels/test_compilation.py compiles all configurations."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("benchmarks", reason="run pytest as `python -m pytest` from the root")
pytest.importorskip("triton", reason="Triton is not installed")
from benchmarks import kernel_resources
from benchmarks.kernel_resources import Case, Resources, access_widths, measure
from mirror_modules.kernels import attention
from mirror_modules.kernels.attention import Tile

ROOT = Path(__file__).parents[2]
PTX = """
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    @%p2 ld.global.L1::evict_last.v2.b32 { %r5, %r6 }, [ %rd2 + 0 ];
    ld.global.v2.b64 {%rd3, %rd4}, [%rd5];
    ld.shared.v4.b32 {%r7, %r8, %r9, %r10}, [%r11];
    st.global.b8 [%rd6], %rs1;
"""


def test_widths_of_memory_accesses():
    assert access_widths(PTX, "ld") == Counter({16: 2, 8: 1})
    assert access_widths(PTX, "st") == Counter({1: 1})


def run_tool(*options, **environment):
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.kernel_resources", "--channels", "16", "--words", "3", *options],
        cwd=ROOT,
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_tool_prints_a_line_for_each_configuration():
    done = run_tool("--dtypes", "float16", "--capabilities", "90")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    assert all(" registers, 0 B spilled, " in line and "sm_90 channels " in line for line in lines)


def test_the_tool_prints_a_line_for_the_similarity():
    done = run_tool("--dtypes", "float16", "float32", "--capabilities", "90", "--similarity")
    assert done.returncode == 0, done.stderr[-2000:]
    half, single = done.stdout.splitlines()
    assert "similarity D=16   L=3   float16  sm_90 " in half
    assert " registers, 0 B spilled, " in half
    assert single == "similarity D=16   L=3   float32  sm_90 products of torch"


def test_the_tool_refuses_the_interpreter():
    done = run_tool(TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert "TRITON_INTERPRET=1 replaces the compiler; unset it." in done.stderr


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_measures_each_tile_that_does_not_spill(direction, monkeypatch):
    candidates = [Tile(16, 16, 4), Tile(64, 16, 4), Tile(32, 16, 8)]
    used = []

    def fake_resources(case):
        positions = kernel_resources.configuration_of(case)["BLOCK_N"]
        return Resources(255, 8 * (positions == 64), 0, 8, Counter(), Counter())

    def fake_bench(call):
        assert len(call()) >= 3
        used.append(attention.TILES[direction, 4][16])
        return 0.25

    monkeypatch.setattr(kernel_resources, "DEVICE", "cpu")
    monkeypatch.setattr(kernel_resources, "CANDIDATES", candidates)
    monkeypatch.setattr(kernel_resources, "resources", fake_resources)
    monkeypatch.setattr("triton.testing.do_bench", fake_bench)
    before = dict(attention.TILES[direction, 4])
    measured = list(measure(Case(direction, 5, 7, "float32", 90), batch=2, side=3))
    assert measured == [(Tile(16, 16, 4), 0.25), (Tile(32, 16, 8), 0.25)]
    assert used == [Tile(16, 16, 4), Tile(32, 16, 8)]
    assert attention.TILES[direction, 4] == before
