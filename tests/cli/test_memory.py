"""The allocator's settings, each in a process of its own, because they hold for the rest of a process."""

import os
import subprocess
import sys

import pytest

from mirror_modules.cli.memory import _is_glibc

pytestmark = pytest.mark.skipif(not _is_glibc(), reason="needs glibc")

# Page faults of large blocks that are allocated and freed again and again, after the first has been touched.
PROGRAM = """
import resource, subprocess, sys
{setup}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        bytearray(2**25)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults(), flush=True)
if sys.argv[1:] == ["parent"]:
    subprocess.run([sys.executable, "-c", {child!r}], check=True)
"""
KEEP = "from mirror_modules.cli.memory import keep_freed_memory; print(keep_freed_memory(), flush=True)"
CHILD = PROGRAM.format(setup="", child="")
PAGES = 5 * 2**25 // os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0


def run(setup: str = KEEP, **environment: str) -> list[str]:
    """The lines that the program prints: what `setup` prints, its page faults, and those of a child process."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_", "MIRROR_"))}
    command = [sys.executable, "-c", PROGRAM.format(setup=setup, child=CHILD), "parent"]
    done = subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_freed_memory_is_used_again_here_and_in_child_processes() -> None:
    kept, *faults = run()
    assert kept == "True"
    assert all(int(each) < PAGES // 100 for each in faults)


def test_without_it_each_block_is_cleared_again() -> None:
    assert all(int(each) >= PAGES for each in run(setup=""))


@pytest.mark.parametrize(
    "environment",
    [{"MIRROR_MODULES_KEEP_MEMORY": "0"}, {"MALLOC_ARENA_MAX": "2"}, {"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}],
)
def test_the_environment_turns_it_off(environment: dict[str, str]) -> None:
    kept, *faults = run(**environment)
    assert kept == "False"
    assert all(int(each) >= PAGES for each in faults)


def test_the_command_keeps_memory_but_a_call_of_main_does_not() -> None:
    program = "import os, sys; from mirror_modules.cli import main; sys.argv[1:] = ['--version']; main({arguments})"
    after = "; print(os.environ.get('MALLOC_MMAP_MAX_'))"
    assert run(setup=program.format(arguments="") + after)[2] == "0"
    assert run(setup=program.format(arguments="['--version']") + after)[2] == "None"


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_without_glibc_nothing_changes(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    from mirror_modules.cli import memory

    def missing(name: str) -> str:
        raise error(name)

    monkeypatch.setattr(os, "confstr", missing)
    monkeypatch.delenv("MALLOC_MMAP_MAX_", raising=False)
    assert memory.keep_freed_memory() is False
    assert "MALLOC_MMAP_MAX_" not in os.environ
