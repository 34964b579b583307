"""Tasks in processes of their own, some at a time: the cells of a grid."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing import connection
from typing import Any, NamedTuple

import torch

from mirror_modules.training.errors import TrainingError
from mirror_modules.training.log import in_minutes, progress_bar


class _Running(NamedTuple):
    """A process, with its name for messages and the time at which it started."""

    process: Any
    name: str
    started: float


def in_processes(
    function: Callable[..., None], tasks: Mapping[str, tuple[Any, ...]], jobs: int, *, title: str, command: str
) -> None:
    """Call `function(*task)` for each task in its own process, with at most `jobs` processes at a time.

    A line is printed when a process starts and when it ends. The first failure terminates the other processes.

    Args:
        function: Function that a process calls.
        tasks: Its arguments for each task, by a name for the lines.
        jobs: Number of processes at a time; they divide the CPU threads among them.
        title: Name on the progress bar.
        command: Command that the tasks belong to, for messages.

    Raises:
        TrainingError: A process failed.
    """
    if not tasks:
        return
    context = multiprocessing.get_context("spawn")
    waiting = [(f"{name} ({i} of {len(tasks)})", task) for i, (name, task) in enumerate(tasks.items(), start=1)][::-1]
    running = list[_Running]()
    # The shared phases of one seed have no second process to leave threads to.
    threads = max(1, torch.get_num_threads() // min(jobs, len(tasks)))
    with progress_bar(total=len(tasks), desc=title, unit=" runs") as bar:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    name, task = waiting.pop()
                    process = context.Process(target=_run_task, args=(function, task, threads, command))
                    process.start()
                    running.append(_Running(process, name, time.monotonic()))
                    bar.write(f"{name}: starts", file=sys.stderr)
                connection.wait([each.process.sentinel for each in running])
                for each in [each for each in running if not each.process.is_alive()]:
                    running.remove(each)
                    process = each.process
                    if process.exitcode != 0:
                        raise TrainingError(
                            f"a process of `{command}` exited with status {process.exitcode}; its output gives the "
                            "reason. Finished cells are kept: repeat the command to continue."
                        )
                    bar.write(
                        f"{each.name}: finished after {in_minutes(time.monotonic() - each.started)}", file=sys.stderr
                    )
                    bar.update()
        finally:
            # On SIGTERM a training process finishes its step and saves a checkpoint.
            for each in running:
                each.process.terminate()
            for each in running:
                each.process.join()


def _terminate_with_parent() -> None:
    """Terminate this process when its parent dies: an orphan would hold the run folder's lock."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


def _run_task(function: Callable[..., None], task: tuple[Any, ...], threads: int, command: str) -> None:
    threading.Thread(target=_terminate_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As in the command line: file names may hold characters that the terminal's encoding lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        function(*task)
    except (ValueError, OSError, TrainingError, KeyboardInterrupt) as error:
        print(f"mirror-modules {command}: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
