"""Several processes compute what one would: this file runs itself as ranks 0 and 1 and compares their files."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from mirror_modules import MirrorGAN
from mirror_modules._norms import FeatureBatchNorm, SynchronizedBatchNorm
from mirror_modules.cli import main
from mirror_modules.data import CaptionBatch
from mirror_modules.models import EncoderPair, build_model
from mirror_modules.stem import Vocabulary
from mirror_modules.training import engine, loop
from mirror_modules.training.checkpoints import Checkpoints, checksum, load_checkpoint
from mirror_modules.training.distributed import ProcessGroup, process_group
from mirror_modules.training.errors import Interrupted
from mirror_modules.training.loop import train
from mirror_modules.training.pretrain import (
    CachedCaptioner,
    CachedPair,
    captioning_step,
    keypoint_step,
    matching_step,
    start_keypoints,
    start_pretraining,
)
from mirror_modules.training.recipes import Recipe
from mirror_modules.training.state import start
from mirror_modules.training.step import adversarial_step

RANKS, B, L, V = 2, 6, 7, 23
ALL_DIFFER, ONE_DIFFERS = (0, 1, 2, 3, 4, 5), (0, 0, 0, 0, 0, 1)
LENGTHS = (7, 5, 6, 1, 2, 3)
# Less than the 20 minutes after which a rank stops waiting for the others.
TIMEOUT = 900
TOLERANCE = 1e-5


# Code that runs on the ranks.


def make_batch(group, number, class_ids=ALL_DIFFER, caption_ids=ALL_DIFFER):
    """The local rows of a common batch, in which rank 0 has many more words than rank 1."""
    random = torch.Generator().manual_seed(number)
    word_mask = torch.arange(L) < torch.tensor(LENGTHS)[:, None]
    tokens = torch.randint(3, V, (B, L), generator=random) * word_mask
    images = torch.rand(B, 3, 16, 16, generator=random, dtype=torch.float64) * 2 - 1
    tensors = (images, tokens, word_mask, torch.tensor(class_ids), torch.tensor(caption_ids))
    images, tokens, word_mask, class_ids, caption_ids = map(group.local_rows, tensors)
    rows = group.local_rows(torch.arange(B))
    return CaptionBatch(images, tokens, word_mask, class_ids, ("",) * len(rows), rows, rows, caption_ids)


def make_recipe(tiny, **model):
    """The tiny recipe without dropout, whose masks differ between ranks, and without gradient clipping."""
    phases = {
        phase: dataclasses.replace(getattr(tiny, phase), batch_size=B, max_grad_norm=None)
        for phase in ("stem", "stream", "glam", "evaluator")
    }
    return dataclasses.replace(
        tiny,
        model=dataclasses.replace(tiny.model, text_dropout=0.0, **model),
        engine=dataclasses.replace(tiny.engine, synchronize_batch_norm=True),
        **phases,
    )


def two_steps(step, state, networks, batches, recipe):
    """Losses, gradients and weights after each of two steps."""
    snapshots = []
    for batch in batches:
        result = step(state, batch, recipe)
        assert result.finite
        gradients, weights = {}, {}
        for owner, network in networks.items():
            for name, parameter in network.module.named_parameters():
                if parameter.grad is not None:
                    gradients[f"{owner}.{name}"] = parameter.grad.clone()
            for name, value in network.module.state_dict().items():
                weights[f"{owner}.{name}"] = value.clone()
        snapshots.append({"losses": result.losses, "gradients": gradients, "weights": weights})
    return snapshots


def train_pair(group, tiny, **changes):
    recipe = make_recipe(tiny)
    torch.manual_seed(0)
    pair = EncoderPair(recipe.model, V).train()
    phase = dataclasses.replace(recipe.stem, **{"word_weight": 0.5, "word_pairs": 48, **changes})
    state = start_pretraining(CachedPair(pair), phase, recipe.engine, group)
    batches = [make_batch(group, i, (0, 1, 2, 0, 4, 5)) for i in range(2)]
    return two_steps(matching_step, state, {"pair": state.network}, batches, phase)


def train_captioner(group, tiny, *, train_backbone, evaluating=False, accumulate=1):
    recipe = make_recipe(tiny)
    torch.manual_seed(0)
    captioner = MirrorGAN(recipe.model, Vocabulary([f"word{i}" for i in range(V - 3)])).captioner.train()
    if not train_backbone:
        captioner.image_encoder.requires_grad_(False).eval()
    if evaluating:
        captioner.eval()
    phase = dataclasses.replace(recipe.stream, train_backbone=train_backbone, accumulate=accumulate)
    state = start_pretraining(CachedCaptioner(captioner), phase, recipe.engine, group)
    batches = [make_batch(group, i) for i in range(2)]
    return two_steps(captioning_step, state, {"captioner": state.network}, batches, phase)


def train_generator(
    group, tiny, *, normalization, class_ids, caption_ids=ALL_DIFFER, evaluating=False, system=None, **changes
):
    if system is not None:
        off = {"redescription_weight": 0.0, "redescription_ratio": None}
        tiny = Recipe.from_dict({**system, "glam": {**off, **system.get("glam", {})}}, tiny)
    recipe = make_recipe(tiny, discriminator_normalization=normalization)
    recipe = dataclasses.replace(recipe, glam=dataclasses.replace(recipe.glam, **changes))
    torch.manual_seed(0)
    model = build_model(recipe.model, Vocabulary([f"word{i}" for i in range(V - 3)]))
    pair = EncoderPair(recipe.model, V) if recipe.glam.has_matching else None
    state = start(model, recipe, torch.Generator().manual_seed(2), group, pair=pair)
    if evaluating:
        for network in state.networks().values():
            network.module.eval()
    batches = [make_batch(group, i, class_ids, caption_ids) for i in range(2)]
    return two_steps(adversarial_step, state, state.networks(), batches, recipe.glam)


def train_keypoints(group, tiny, *, class_ids):
    model = {"system": "gawwn", "place": "points", "point_names": ["a", "b", "c"], "keypoint_hidden_dim": 8}
    recipe = Recipe.from_dict({"model": {**model, "resolutions": [32]}, "keypoints": {}}, make_recipe(tiny))
    torch.manual_seed(0)
    model = build_model(recipe.model, Vocabulary([f"word{i}" for i in range(V - 3)]))
    state = start_keypoints(model, recipe.keypoints, recipe.engine, torch.Generator().manual_seed(2), group)
    batches = [make_batch(group, i, class_ids) for i in range(2)]
    points = torch.rand(2, B, 3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64).round(decimals=1)
    batches = [batch._replace(points=group.local_rows(each)) for batch, each in zip(batches, points)]
    return two_steps(lambda *arguments: keypoint_step(*arguments[:2]), state, state.networks(), batches, recipe)


STEPS = {
    "pair": (train_pair, {}),
    "pair-without-words": (train_pair, {"word_weight": 0.0}),
    "captioner": (train_captioner, {"train_backbone": False}),
    "captioner-and-backbone": (train_captioner, {"train_backbone": True}),
    "captioner-accumulate": (train_captioner, {"train_backbone": False, "evaluating": True, "accumulate": 3}),
    "keypoints": (train_keypoints, {"class_ids": ALL_DIFFER}),
    "keypoints-few-pairs": (train_keypoints, {"class_ids": (0, 0, 0, 0, 2, 1)}),
    "generator": (train_generator, {"normalization": "none", "class_ids": ALL_DIFFER}),
    "generator-few-pairs": (train_generator, {"normalization": "none", "class_ids": ONE_DIFFERS}),
    "generator-batch-norm": (train_generator, {"normalization": "batch", "class_ids": ALL_DIFFER}),
    "generator-batch-norm-few-pairs": (train_generator, {"normalization": "batch", "class_ids": (0, 0, 0, 0, 2, 1)}),
    "generator-equal-captions": (
        train_generator,
        {"normalization": "batch", "class_ids": ALL_DIFFER, "caption_ids": (0, 0, 1, 0, 1, 0)},
    ),
    "generator-r1": (
        train_generator,
        {"normalization": "batch", "class_ids": ALL_DIFFER, "r1_weight": 0.5, "r1_every": 1},
    ),
    "generator-balanced-gradients": (
        train_generator,
        {"normalization": "batch", "class_ids": ALL_DIFFER, "redescription_weight": None, "redescription_ratio": 0.3},
    ),
    "generator-matching": (
        train_generator,
        {
            "normalization": "batch",
            "class_ids": (0, 1, 2, 0, 4, 5),
            "redescription_weight": None,
            "redescription_ratio": 0.3,
            "matching_weight": 2.0,
        },
    ),
    "generator-balanced-matching": (
        train_generator,
        {"normalization": "batch", "class_ids": ALL_DIFFER, "redescription_ratio": 0.3, "matching_ratio": 0.6},
    ),
    # Mixtures of sentences are left out: they are made of the sentences of each rank.
    "gan-int-cls": (
        train_generator,
        {
            "normalization": "batch",
            "class_ids": (0, 0, 0, 0, 2, 1),
            "system": {
                "model": {"system": "gan-int-cls", "channels": 4, "resolutions": [16], "discriminator_channels": 4}
            },
        },
    ),
    "stackgan": (
        train_generator,
        {
            "normalization": "batch",
            "class_ids": ALL_DIFFER,
            "system": {
                "model": {"system": "stackgan", "channels": 4, "resolutions": [8, 16], "halvings": 1},
                "first_stage": {},
            },
        },
    ),
    "stackgan-v2": (
        train_generator,
        {
            "normalization": "batch",
            "class_ids": (0, 0, 0, 0, 2, 1),
            "system": {"model": {"system": "stackgan-v2", "channels": 4}},
            "color_weight": 1.0,
        },
    ),
    "ppgn": (
        train_generator,
        {
            "normalization": "batch",
            "class_ids": ALL_DIFFER,
            "system": {"model": {"system": "ppgn", "channels": 4}, "glam": {"mismatched_pairs": False}},
        },
    ),
    "generator-accumulate": (
        train_generator,
        {"normalization": "none", "class_ids": ONE_DIFFERS, "evaluating": True, "accumulate": 3},
    ),
}
# One rank has mismatched pairs, the other none.
NO_PAIRS = {"generator-no-pairs-on-a-rank": (train_generator, {"normalization": "batch", "class_ids": ONE_DIFFERS})}
# Shapes, without the channels, of the local inputs of ranks 0 and 1.
NORMS = {
    "even": ((4, 3, 2), (4, 3, 2)),
    "uneven": ((5, 3, 2), (2, 3, 2)),
    "empty": ((5, 3, 2), (0, 3, 2)),
    "vectors": ((5,), (3,)),
    "single": ((1,), (0,)),
}
CHANNELS = 5


def norm_input(sizes):
    random = torch.Generator().manual_seed(3)
    shapes = [(size[0], CHANNELS, *size[1:]) for size in sizes]
    inputs, factors = (
        [torch.randn(shape, generator=random, dtype=torch.float64) * 2 + 1 for shape in shapes] for _ in range(2)
    )
    return inputs, factors


def run_norms(group):
    result = {}
    for name, sizes in NORMS.items():
        for momentum in (0.1, None):
            plain = nn.BatchNorm1d(CHANNELS, momentum=momentum, dtype=torch.float64)
            with torch.no_grad():
                plain.weight.copy_(torch.arange(CHANNELS) + 0.5)
            norm = SynchronizedBatchNorm.like(plain)
            inputs, factors = (parts[group.rank] for parts in norm_input(sizes))
            inputs.requires_grad_(True)
            outputs = norm(inputs)
            (outputs.tanh() * factors).sum().backward()
            norm.eval()
            result[name, momentum] = {
                "outputs": outputs.detach(),
                "gradient": inputs.grad,
                "weight": norm.weight.grad,
                "bias": norm.bias.grad,
                "mean": norm.running_mean,
                "variance": norm.running_var,
                "tracked": norm.num_batches_tracked,
                "evaluated": norm(inputs).detach(),
            }
    return result


COUNTS = ([3, 0], [5, 2])


def gather_weights():
    return torch.arange(1.0, 4 * 3 + 1).view(4, 3)


def run_collectives(group):
    rank = group.rank
    rows = (torch.arange(6.0).view(2, 3) + 10 * rank).requires_grad_(True)
    gathered = group.all_gather(rows)
    (gather_weights() * gathered**2).sum().backward()
    return {
        "gathered": gathered.detach(),
        "gradient": rows.grad,
        "flags": group.all_gather(torch.tensor([True, rank == 1])),
        "mean_weights": group.mean_weights(torch.tensor(COUNTS[rank])),
        "mean_weights with a total": group.mean_weights(
            torch.tensor(COUNTS[rank]), torch.tensor(sum(map(sum, COUNTS)))
        ),
        "mean_weights of nothing": group.mean_weights(torch.tensor([0, 0])),
        "any": [group.any(False), group.any(rank == 1), group.any(True)],
        "all": [bool(group.all(torch.tensor(flag))) for flag in (False, rank == 1, True)],
        "broadcast": group.broadcast({"rank": rank}),
        "states": group.all_gather_states(torch.tensor([rank, 7], dtype=torch.uint8)),
        "local_rows": group.local_rows(torch.arange(4)),
    }


def run_operations(out, tiny):
    with process_group("cpu") as group:
        torch.save(run_norms(group), out / f"norms-{group.rank}.pt")
        torch.save(run_collectives(group), out / f"collectives-{group.rank}.pt")
    os.environ["MASTER_PORT"] = os.environ["PORTS"].split()[1]
    run_steps(out, tiny, STEPS)


def run_no_pairs(out, tiny):
    run_steps(out, tiny, NO_PAIRS)


def run_steps(out, tiny, cases):
    torch.set_default_dtype(torch.float64)
    with process_group("cpu") as group:
        for name, (run, options) in cases.items():
            try:
                torch.save(run(group, tiny, **options), out / f"{name}-{group.rank}.pt")
            except RuntimeError:
                # Raised on both ranks: with one rank still in a collective, the case would hang instead.
                traceback.print_exc()
            if group.is_main:
                options = {key: value for key, value in options.items() if key != "accumulate"}
                torch.save(run(ProcessGroup(), tiny, **options), out / f"{name}-single.pt")


def make_run_recipe(tiny):
    phases = {
        phase: dataclasses.replace(getattr(tiny, phase), batch_size=B) for phase in ("stem", "stream", "evaluator")
    }
    return dataclasses.replace(
        tiny,
        glam=dataclasses.replace(tiny.glam, batch_size=B, keep_best="r_precision"),
        engine=dataclasses.replace(tiny.engine, checkpoint_every=2, synchronize_batch_norm=True),
        logging=dataclasses.replace(tiny.logging, validate_every=1),
        **{**phases, "evaluator": dataclasses.replace(phases["evaluator"], word_weight=0.1)},
    )


def run_trainings(out, tiny):
    recipe, rank, ports = make_run_recipe(tiny), int(os.environ["RANK"]), os.environ["PORTS"].split()

    def attempt(number, folder, **options):
        os.environ["MASTER_PORT"] = ports[number]
        try:
            train(recipe, out / folder, **options)
        except Interrupted as error:
            return str(error)
        return "done"

    endings = [attempt(0, "first"), attempt(1, "second")]
    # Rank 1 receives SIGTERM in a step after which no checkpoint is due.
    for number, name in enumerate(("matching_step", "adversarial_step")):
        step = getattr(loop, name)
        calls = []

        def interrupted_step(*arguments, step=step, calls=calls):
            calls.append(arguments)
            if rank == 1 and len(calls) == 1:
                signal.raise_signal(signal.SIGTERM)
            return step(*arguments)

        setattr(loop, name, interrupted_step)
        endings.append(attempt(2 + number, "interrupted", resume=True))
        setattr(loop, name, step)
        if rank == 0:
            shutil.copytree(out / "interrupted", out / f"interrupted-{number}")
    endings.append(attempt(4, "interrupted", resume=True))
    (out / f"endings-{rank}.json").write_text(json.dumps(endings))


def run_killed(*words):
    """The command line, in which rank 1 dies in its seventh step."""
    record = engine.PhaseRun.record

    def die(self, result):
        if self.group.rank == 1 and self.step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        record(self, result)

    engine.PhaseRun.record = die
    sys.exit(main(words))


TASKS = {"operations": run_operations, "no-pairs": run_no_pairs, "trainings": run_trainings}

# Tests of what the ranks wrote.


def free_ports(count):
    """Ports that were free a moment ago; another process may take one before a rank listens on it."""
    with ExitStack() as stack:
        servers = [stack.enter_context(socket.socket()) for _ in range(count)]
        for server in servers:
            server.bind(("127.0.0.1", 0))
        return [str(server.getsockname()[1]) for server in servers]


def launch(task, out, attempts=5):
    """Run a task on both ranks; returns their statuses and output if one failed, an empty text otherwise."""
    error = launch_once(task, out)
    if "EADDRINUSE" not in error or attempts == 1:
        return error
    for folder in filter(Path.is_dir, out.iterdir()):
        shutil.rmtree(folder)
    return launch(task, out, attempts - 1)


def launch_once(task, out):
    ports = free_ports(5)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ports[0], "PORTS": " ".join(ports), "WORLD_SIZE": str(RANKS)}
    logs = [out / f"{task}-{rank}.log" for rank in range(RANKS)]
    processes = []
    for rank, log in enumerate(logs):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        with log.open("w") as file:
            processes.append(
                subprocess.Popen(
                    [sys.executable, __file__, task, str(out)],
                    env={**os.environ, **common, **own},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
    end = time.monotonic() + TIMEOUT
    try:
        statuses = [process.wait(timeout=max(1, end - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        statuses = ["hung"]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return "" if statuses == [0] * RANKS else f"{statuses}\n" + "\n".join(log.read_text()[-3000:] for log in logs)


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Loads the files of a case by name: one per rank, and that of a single process."""
    out = tmp_path_factory.mktemp("steps")
    errors = {"": launch("operations", out)}

    def load(name, single=False):
        if name in NO_PAIRS and name not in errors:
            errors[name] = launch("no-pairs", out)
        error = errors.get(name, errors[""])
        files = [out / f"{name}-{suffix}.pt" for suffix in (*range(RANKS), *(["single"] if single else []))]
        if not all(file.exists() for file in files):
            pytest.fail(f"{name} has no result: {error}")
        return [torch.load(file) for file in files]

    return load


def largest_difference(expected, actual):
    """The largest absolute difference, relative to the largest expected value."""
    assert expected.keys() == actual.keys()
    largest = max(value.abs().max() for value in expected.values())
    return max(float((expected[name].double() - actual[name].double()).abs().max() / largest) for name in expected)


@pytest.mark.parametrize("name", [*STEPS, *NO_PAIRS])
def test_two_ranks_match_a_single_process(steps, name, record_property):
    *ranks, single = steps(name, single=True)
    for number, expected in enumerate(single):
        results = [rank[number] for rank in ranks]
        differences = [largest_difference(expected["gradients"], result["gradients"]) for result in results]
        print(f"{name}, step {number}: largest relative difference of a gradient {max(differences):.1e}")
        record_property(f"difference_{number}", max(differences))
        assert max(differences) < TOLERANCE
        for result in results:
            for weight, value in expected["weights"].items():
                torch.testing.assert_close(result["weights"][weight], value, rtol=1e-5, atol=3e-5, msg=weight)
        for loss, value in expected["losses"].items():
            if "accuracy" not in loss and all(loss in result["losses"] for result in results):
                mean = torch.stack([result["losses"][loss] for result in results]).mean()
                torch.testing.assert_close(mean, value, rtol=1e-5, atol=1e-6, msg=loss, check_dtype=False)


def test_only_one_rank_has_mismatched_pairs_in_the_no_pairs_case(steps):
    first, second = [
        ["accuracy_mismatched_8" in step["losses"] for step in rank] for rank in steps("generator-no-pairs-on-a-rank")
    ]
    assert first != second


def test_ranks_have_different_numbers_of_words():
    assert sum(LENGTHS[:3]) > 2 * sum(LENGTHS[3:])


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name", NORMS)
def test_synchronized_batch_norm_matches_batch_norm_of_the_whole_batch(steps, name, momentum):
    ranks = [rank[name, momentum] for rank in steps("norms")]
    inputs, factors = (torch.cat(parts) for parts in norm_input(NORMS[name]))
    kind = nn.BatchNorm2d if inputs.ndim == 4 else FeatureBatchNorm
    norm = kind(CHANNELS, momentum=momentum, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(CHANNELS) + 0.5)
    inputs.requires_grad_(True)
    outputs = norm(inputs)
    (outputs.tanh() * factors).sum().backward()
    norm.eval()
    for key, expected in (("outputs", outputs), ("gradient", inputs.grad), ("evaluated", norm(inputs))):
        torch.testing.assert_close(torch.cat([rank[key] for rank in ranks]), expected.detach())
    for key, expected in (("weight", norm.weight.grad), ("bias", norm.bias.grad)):
        torch.testing.assert_close(sum(rank[key] for rank in ranks), expected)
    for rank in ranks:
        torch.testing.assert_close(rank["mean"], norm.running_mean)
        torch.testing.assert_close(rank["variance"], norm.running_var)
        assert rank["tracked"] == norm.num_batches_tracked


def test_all_gather_returns_all_rows_with_gradients(steps):
    ranks, weights = steps("collectives"), gather_weights()
    for number, rank in enumerate(ranks):
        for i in range(4):
            for j in range(3):
                value = 3 * (i % 2) + j + 10 * (i // 2)
                assert rank["gathered"][i, j] == value
                if i // 2 == number:
                    # Each of the ranks computes the same loss: the gradient is the sum over ranks.
                    assert rank["gradient"][i % 2, j] == RANKS * weights[i, j] * 2 * value
        assert rank["flags"].tolist() == [True, False, True, True]
        assert rank["flags"].dtype == torch.bool
        assert [state.tolist() for state in rank["states"]] == [[0, 7], [1, 7]]
        assert rank["local_rows"].tolist() == [[0, 1], [2, 3]][number]


def test_mean_weights_turn_the_mean_of_means_into_the_mean(steps):
    random = torch.Generator().manual_seed(4)
    values, weighted, total, count = iter(torch.rand(99, generator=random)), 0.0, 0.0, 0
    for counts, rank in zip(COUNTS, steps("collectives")):
        for size, weight in zip(counts, rank["mean_weights"]):
            part = [float(next(values)) for _ in range(size)]
            total, count = total + sum(part), count + size
            weighted += float(weight) * (sum(part) / size if size else 0.0) / 4
        assert torch.equal(rank["mean_weights with a total"], rank["mean_weights"])
        assert rank["mean_weights of nothing"].tolist() == [0, 0]
    assert weighted == pytest.approx(total / count)


def test_flags_are_reduced_and_objects_broadcast(steps):
    for rank in steps("collectives"):
        assert rank["any"] == [False, True, True]
        assert rank["all"] == [False, False, True]
        assert rank["broadcast"] == {"rank": 0}


@pytest.fixture
def collectives(monkeypatch):
    """A group of two ranks whose other rank returns what it receives, and the calls of its collective operations."""
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    # Both have collectives of their own, those of DistributedDataParallel in C++.
    monkeypatch.setattr(ProcessGroup, "wrap", lambda group, module, unused: module)
    monkeypatch.setattr("mirror_modules.training.network.synchronize_batch_norm", lambda module, device: module)
    default, calls = torch.get_default_dtype(), []
    torch.set_default_dtype(torch.float64)
    for name in ("all_reduce", "all_gather", "broadcast", "broadcast_object_list"):
        operation = getattr(dist, name)
        monkeypatch.setattr(
            dist, name, lambda *arguments, _of=operation, _name=name: (calls.append(_name), _of(*arguments))[1]
        )
    yield ProcessGroup(0, RANKS), calls
    torch.set_default_dtype(default)
    dist.destroy_process_group()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_collectives_of_a_generator_step_do_not_depend_on_stages_or_parts(collectives, tiny_recipe, accumulate):
    group, calls = collectives
    options = {"normalization": "spectral", "class_ids": ALL_DIFFER, "evaluating": True}
    train_generator(group, tiny_recipe, **options, accumulate=accumulate)
    # Classes and sentences are gathered; words, and the flags of discriminators and generator, are reduced. Two steps.
    assert sorted(calls) == ["all_gather"] * 2 * 2 + ["all_reduce"] * 3 * 2


def test_collectives_of_a_pretraining_step(collectives, tiny_recipe):
    group, calls = collectives
    train_captioner(group, tiny_recipe, train_backbone=True)
    # Words and flag.
    assert calls == ["all_reduce"] * 2 * 2
    calls.clear()
    train_pair(group, tiny_recipe, word_weight=0.0)
    # Classes, sentences and similarities are gathered, the latter two with a reduced gradient; and the flag.
    assert sorted(calls) == ["all_gather"] * 3 * 2 + ["all_reduce"] * 3 * 2
    calls.clear()
    train_pair(group, tiny_recipe)
    # Words, masks and similarities besides.
    assert sorted(calls) == ["all_gather"] * 6 * 2 + ["all_reduce"] * 5 * 2


def test_a_single_process_needs_no_communication():
    group = ProcessGroup()
    rows = torch.rand(3, 2)
    assert group.all_gather(rows) is rows
    assert group.mean_weights(torch.tensor([2, 2])).tolist() == [1, 1]
    assert group.mean_weights(torch.tensor([1, 3])).tolist() == [0.5, 1.5]
    assert group.broadcast(5) == 5
    assert group.any(True)
    assert not group.any(False)
    group.barrier()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of two uninterrupted runs and of one that was interrupted twice, and per rank how each attempt ended."""
    out = tmp_path_factory.mktemp("trainings")
    error = launch("trainings", out)
    assert not error, error
    return out, [json.loads((out / f"endings-{rank}.json").read_text()) for rank in range(RANKS)]


def read_lines(folder):
    """The entries of metrics.jsonl without times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("seconds", "waited")} for line in lines]


def read_weights(folder):
    files = sorted([*folder.glob("phases/*.safetensors"), *folder.glob("model/*.safetensors")])
    assert len(files) >= 5
    return {file.relative_to(folder): file.read_bytes() for file in files}


def test_a_run_of_two_ranks_is_reproducible(runs):
    out, endings = runs
    assert [rank[:2] for rank in endings] == [["done", "done"]] * RANKS
    assert read_weights(out / "first") == read_weights(out / "second")
    assert read_lines(out / "first") == read_lines(out / "second")


def test_only_rank_0_writes(runs):
    logged = [(line["phase"], line["step"]) for line in read_lines(runs[0] / "first") if "images" in line]
    trained = [(line["phase"], line["step"]) for line in read_lines(runs[0] / "first") if "skipped" in line]
    assert len(trained) == len(set(trained)) == len({*logged}) == 4 * 3
    assert len(logged) == 2 * len(trained)
    for phase in ("stem", "stream", "glam", "evaluator"):
        files = Checkpoints(runs[0] / "first" / "checkpoints", phase, 2).files()
        assert sorted(files) == [2, 3]
    assert [path.name for path in (runs[0] / "first").rglob(".*")] == [".lock"]


def test_an_interrupted_run_of_two_ranks_resumes_bit_for_bit(runs):
    out, endings = runs
    for rank in endings:
        assert "stopped by SIGTERM after step 1 of 3 of phase stem" in rank[2]
        assert "stopped by SIGTERM after step 1 of 3 of phase glam" in rank[3]
        assert rank[4] == "done"
    assert read_weights(out / "interrupted") == read_weights(out / "first")
    assert read_lines(out / "interrupted") == read_lines(out / "first")


def test_a_run_of_two_ranks_can_be_resumed_with_one(runs, tiny_recipe, tmp_path, capsys):
    folder = shutil.copytree(runs[0] / "interrupted-1", tmp_path / "run")
    train(make_run_recipe(tiny_recipe), folder, resume=True)
    assert "it was written by 2 processes and this run has 1, so dropout is seeded anew" in capsys.readouterr().err
    # Synchronized batch norm, and no dropout in phase `glam`: the same up to rounding.
    expected, weights = (load_file(each / "phases" / "glam.safetensors") for each in (runs[0] / "first", folder))
    assert largest_difference(expected, weights) < 1e-3


def test_a_batch_that_ranks_cannot_share_equally_is_rejected(tiny_recipe, tmp_path):
    run = loop.Run(tiny_recipe, loop.RunFolder(tmp_path), None, ProcessGroup(world_size=RANKS))
    splits = loop.load_splits(tiny_recipe.data, tiny_recipe.model, tiny_recipe.seed)
    with pytest.raises(ValueError, match=r"stem\.batch_size=7 cannot be divided among 2 processes"):
        loop.make_batches(dataclasses.replace(run, splits=splits), "stem", tiny_recipe.stem)


# Runs started by torchrun.

SHORT = [
    *("--logging.every", "1", "--data.training-images", "23", "--data.validation-images", "19"),
    *("--evaluation.candidates", "5", "--evaluation.report-images", "2", "--model.resolutions", "8", "16"),
    *("--model.channels", "3", "--model.discriminator-channels", "3", "--model.word-dim", "10"),
    *("--device", "cpu", "--engine.checkpoint-every", "2", "--evaluator.word-weight", "0.1"),
]


def torchrun(folder, log, *options, program=("-m", "mirror_modules"), recipe="ablation"):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    words += [*program, "train", recipe, "--out", str(folder), *SHORT, *options]
    with log.open("w") as file:
        return subprocess.Popen(
            words, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )


def finish(process, log):
    try:
        return process.wait(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        pytest.fail(f"torchrun hung: {log.read_text()[-3000:]}")
    finally:
        # torchrun ends its workers, and kills them after half a minute.
        process.terminate()
        process.wait()


def test_torchrun_trains_and_evaluates(tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    # With pretraining, and three coarse steps before the finest stage trains.
    status = finish(torchrun(folder, log, "--steps", "4", recipe="demo"), log)
    printed = log.read_text()
    assert status == 0, printed[-3000:]
    assert printed.count(f"Open {folder / 'report.html'}") == 1
    assert printed.count("R-precision among") == 1
    assert (folder / "report.html").exists()
    assert (folder / "evaluation.json").exists()
    steps = [(line["phase"], line["step"]) for line in read_lines(folder)]
    assert len(steps) == len(set(steps)) == 6 * 4


def test_a_run_whose_rank_was_killed_ends_and_can_be_resumed(tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    options = ("--steps", "11", "--phases", "stem")
    status = finish(torchrun(folder, log, *options, program=(__file__, "killed")), log)
    printed = log.read_text()
    assert status != 0
    assert "SIGKILL" in printed or "Signal 9" in printed, printed[-3000:]
    assert "local_rank: 1" in printed or "rank      : 1" in printed, printed[-3000:]

    newest = Checkpoints(folder / "checkpoints", "stem", 2).newest_whole()
    assert newest is not None
    assert checksum(newest) in newest.name
    assert load_checkpoint(newest)["log"]["step"] == 6
    log = tmp_path / "log-after-resume"
    status = finish(torchrun(folder, log, *options, "--resume"), log)
    assert status == 0, log.read_text()[-3000:]
    assert "continues after step 6 of 11" in log.read_text()
    steps = [line["step"] for line in read_lines(folder)]
    assert steps == list(range(1, 12))


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), ("cuda", "nccl")])
def test_a_build_of_torch_without_the_backend_is_refused(monkeypatch, device, backend):
    """NCCL exists on Linux only."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_backend_available", lambda name: name != backend)
    message = f"torchrun started 2 processes, but this build of torch has no backend '{backend}'"
    with pytest.raises(ValueError, match=message), process_group(device):
        pass
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message), process_group(device):
        pass


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))  # A script's sys.path holds only its own folder.
    from tests.runs import make_tiny_recipe

    torch.set_num_threads(1)
    if sys.argv[1] == "killed":
        run_killed(*sys.argv[2:])
    try:
        TASKS[sys.argv[1]](Path(sys.argv[2]), make_tiny_recipe())
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        # Exit without waiting for the other rank in the destructors of the process group.
        os._exit(1)
