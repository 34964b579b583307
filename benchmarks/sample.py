"""Sampling: the generator at batch 1 and 16 against the published formulation, and the start of `generate`.

The generator gets noise, condition and words, in evaluation mode and without a graph for a backward pass; the text
encoder, a fraction of the time, is the same on both sides.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import _measure, _record
from benchmarks._measure import Work
from benchmarks.published import use_published_attention, use_published_convolutions
from mirror_modules import MirrorGAN, MirrorGANConfig, Vocabulary

PUBLISHED, PUBLISHED_HALF = "published", "published, with our convolutions"
EAGER, CHANNELS_LAST, COMPILED = "eager", "eager, channels last", "compiled"
ONNX, GRAPH = "onnxruntime", "cuda graph"
IMPLEMENTATIONS = {
    "cpu": (PUBLISHED, PUBLISHED_HALF, EAGER, CHANNELS_LAST, COMPILED, ONNX),
    "cuda": (PUBLISHED, PUBLISHED_HALF, EAGER, CHANNELS_LAST, COMPILED, GRAPH),
}
PACKAGES_FOR_ONNX = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = {"cpu": 1e-3, "cuda": 3e-2}
"""Largest difference of images in [-1, 1] from the published ones; on a GPU, convolutions round to TF32."""
SECONDS_ON_GPU = 3.0
STARTS = 5
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Sizes:
    """Sizes of the generator; the defaults are the published ones."""

    words: int = 18
    word_dim: int = 256
    channels: int = 32
    resolutions: tuple[int, ...] = (64, 128, 256)
    batches: tuple[int, ...] = (1, 16)


QUICK = Sizes(words=3, word_dim=8, channels=4, resolutions=(8, 16), batches=(1, 2))


class Inputs(NamedTuple):
    """Arguments of the generator."""

    noise: Tensor
    condition: Tensor
    words: Tensor
    word_mask: Tensor


Sampler = Callable[[], Tensor]
"""Returns the finest images."""


def build_model(sizes: Sizes) -> MirrorGAN:
    """A MirrorGAN with the statistics of a batch in its norms, as after training."""
    torch.manual_seed(0)
    config = MirrorGANConfig(
        word_dim=sizes.word_dim,
        max_words=sizes.words,
        channels=sizes.channels,
        resolutions=sizes.resolutions,
        # Not measured, and as small as possible.
        captioner_backbone="conv",
        captioner_embedding_dim=1,
        captioner_hidden_dim=1,
    )
    model = MirrorGAN(config, Vocabulary(["a", "flower"]))
    norms = [part for part in model.generator.modules() if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.generator(*make_inputs(sizes, 4, "cpu"))
    return model.eval()


def make_inputs(sizes: Sizes, batch: int, device: str) -> Inputs:
    """Random noise, conditions and words of captions of equal length, as the published masks need them."""
    random = torch.Generator().manual_seed(1)
    config = MirrorGANConfig()
    shapes = [(batch, config.noise_dim), (batch, config.condition_dim), (batch, sizes.words, sizes.word_dim)]
    tensors = [torch.randn(shape, generator=random).to(device) for shape in shapes]
    word_mask = torch.arange(sizes.words, device=device).repeat(batch, 1) < max(1, 2 * sizes.words // 3)
    return Inputs(tensors[0], tensors[1], tensors[2], word_mask)


def build_sampler(impl: str, sizes: Sizes, batch: int, device: str) -> Sampler:
    """One implementation, ready to run."""
    model, inputs = build_model(sizes).to(device), make_inputs(sizes, batch, device)
    if impl in (PUBLISHED, PUBLISHED_HALF):
        use_published_attention(model).to(device).eval()
    if impl == PUBLISHED:
        use_published_convolutions(model).to(device).eval()
    if impl == ONNX:
        return onnx_sampler(model.generator, inputs)
    if impl == GRAPH:
        return graph_sampler(model.generator, inputs)
    if impl == CHANNELS_LAST:
        model.to(memory_format=torch.channels_last)
    generator = torch.compile(model.generator) if impl == COMPILED else model.generator

    @torch.no_grad()
    def sample() -> Tensor:
        return generator(*inputs).images[-1]

    return sample


def graph_sampler(generator: torch.nn.Module, inputs: Inputs) -> Sampler:
    """Replay a CUDA graph of the generator, with the inputs copied into it as for a new caption."""
    own = Inputs(*(each.clone() for each in inputs))
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Compilation of kernels and the choice of algorithms cannot be captured.
            for _ in range(3):
                generator(*own)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            images = generator(*own).images[-1]

    def sample() -> Tensor:
        for each, given in zip(own, inputs):
            each.copy_(given)
        graph.replay()
        return images

    return sample


def onnx_sampler(generator: torch.nn.Module, inputs: Inputs) -> Sampler:
    """Export the generator for this batch size, and run it with as many threads as torch."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "generator.onnx"
        torch.onnx.export(generator, tuple(inputs), path, dynamo=True, input_names=list(Inputs._fields), verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    arrays = {name: each.numpy() for name, each in inputs._asdict().items()}
    # The images of all stages come first, coarse to fine.
    finest = [output.name for output in session.get_outputs()][len(generator.heads) - 1]
    return lambda: torch.from_numpy(session.run([finest], arrays)[0])


def measure(
    sizes: Sizes, rounds: int, threads: int, quiet: float, device: str = "cpu", starts: int = STARTS
) -> Iterator[_record.Record]:
    """Time all implementations interleaved in one process at each batch size, then the start of the command.

    Records come as soon as their batch size is measured.

    Raises:
        ValueError: An implementation generates other images than the published one.
    """
    torch.set_num_threads(threads)
    for batch in sizes.batches:
        torch.compiler.reset()
        works = samplers(sizes, batch, device)
        if device == "cuda":
            yield from _measure_on_gpu(works, sizes, batch)
        else:
            yield from _measure_on_cpu(works, sizes, batch, rounds, quiet)
    yield from measure_start(sizes, starts, device)


def samplers(sizes: Sizes, batch: int, device: str) -> dict[str, Work]:
    """The implementations that can run here, whose images equal the published ones."""
    works: dict[str, Work] = {}
    expected = build_sampler(PUBLISHED, sizes, batch, device)().clone()
    for impl in IMPLEMENTATIONS[device]:
        missing = [name for name in PACKAGES_FOR_ONNX if importlib.util.find_spec(name) is None]
        if impl == ONNX and missing:
            print(f"sampling, {ONNX}: not measured, because {', '.join(missing)} are not installed", flush=True)
            continue
        sampler = build_sampler(impl, sizes, batch, device)
        error = float((sampler() - expected).abs().max())
        if not error <= TOLERANCE[device]:
            raise ValueError(f"sampling, {impl}: images differ from the published ones by up to {error:.2g}.")
        works[impl] = Work(sampler)
    return works


def _measure_on_cpu(
    works: dict[str, Work], sizes: Sizes, batch: int, rounds: int, quiet: float
) -> list[_record.Record]:
    seconds, others = _measure.time_interleaved(works, rounds, quiet)
    environment = _record.environment()
    records = []
    for baseline in (PUBLISHED, PUBLISHED_HALF):
        for impl in works:
            if impl not in (PUBLISHED, baseline):
                # Ratios within each round: a temporary slowdown of the machine affects both.
                ratios = [own / base for own, base in zip(seconds[impl], seconds[baseline])]
                records.append(
                    _record_of(sizes, batch, impl, f"time / time of {baseline}", ratios, others, environment)
                )
    return records


def _measure_on_gpu(works: dict[str, Work], sizes: Sizes, batch: int) -> list[_record.Record]:
    times = _measure.time_interleaved_on_gpu(works, SECONDS_ON_GPU)
    environment = _record.environment("cuda")
    return [_record_of(sizes, batch, impl, "ms", times[impl], None, environment) for impl in works]


def _record_of(
    sizes: Sizes,
    batch: int,
    impl: str,
    quantity: str,
    values: list[float],
    others: float | None,
    environment: dict[str, Any],
) -> _record.Record:
    shape = {name: value for name, value in dataclasses.asdict(sizes).items() if name != "batches"}
    return _record.Record(
        op="sampling",
        impl=impl,
        direction="forward",
        shape={"batch": batch, **shape},
        dtype="float32",
        quantity=quantity,
        median=round(statistics.median(values), 4),
        spread=(round(min(values), 4), round(max(values), 4)),
        rounds=len(values),
        peak_memory_mib=None,
        process_memory_mib=None,
        shares={},
        others=others,
        **environment,
    )


def measure_start(sizes: Sizes, starts: int, device: str) -> list[_record.Record]:
    """The start of `mirror-modules generate`, each time in a fresh process: shares of import, loading, first image.

    The folder holds the captioner of the published model, too, which the command does not load.
    """
    missing = [name for name in ("tyro", "safetensors", "PIL", "torchvision") if importlib.util.find_spec(name) is None]
    if missing or starts < 1:
        print(f"start of generate: not measured ({', '.join(missing) or 'no starts'})", flush=True)
        return []
    config = dataclasses.replace(
        build_model(sizes).config,
        captioner_backbone="conv" if sizes == QUICK else "resnet152",
        captioner_embedding_dim=256,
        captioner_hidden_dim=512,
    )
    with tempfile.TemporaryDirectory() as folder:
        MirrorGAN(config, Vocabulary(["a", "flower"]), pretrained=False).save_pretrained(folder)
        command = [sys.executable, str(Path(__file__).with_name("_start.py")), folder, f"{folder}/out.png", device]
        paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        parts: dict[str, list[float]] = {}
        # The first start fills the file cache.
        for start in range(starts + 1):
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"start of generate: {done.stderr.strip()}")
            if start > 0:
                for part, seconds in json.loads(done.stdout.splitlines()[-1]).items():
                    parts.setdefault(part, []).append(seconds)
    medians = {part: statistics.median(seconds) for part, seconds in parts.items()}
    rates = [1 / sum(seconds) for seconds in zip(*parts.values())]
    record = _record_of(sizes, 1, "eager", "starts/s", rates, None, _record.environment(device))
    shares = {part: round(seconds / sum(medians.values()), 4) for part, seconds in medians.items()}
    return [dataclasses.replace(record, op="generate_start", direction="start", shares=shares)]
