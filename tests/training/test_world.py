"""Several processes train as one would: this file runs itself as ranks 0 and 1, and looks at what they leave."""

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
from pathlib import Path

import pytest
import torch
from torch import nn

from mirror_modules import MirrorGAN
from mirror_modules._norms import FeatureBatchNorm
from mirror_modules.data import CaptionBatch
from mirror_modules.stem import Vocabulary
from mirror_modules.training import loop
from mirror_modules.training.checkpoints import Checkpoints, checksum, load_checkpoint
from mirror_modules.training.errors import Interrupted, TrainingError
from mirror_modules.training.loop import train
from mirror_modules.training.pretrain import EncoderPair, Reader, captioning_step, matching_step, start_pretraining
from mirror_modules.training.state import start
from mirror_modules.training.step import adversarial_step
from mirror_modules.training.synchronized_norm import SynchronizedBatchNorm
from mirror_modules.training.world import World, connected

RANKS, B, L, V = 2, 6, 7, 23
LENGTHS = (7, 5, 6, 1, 2, 3)
PATIENCE = 120
SOON = 60
TOLERANCE = 1e-5


# What the ranks do ---------------------------------------------------------------------------------------------------


def make_batch(world, number, class_ids=(0, 1, 2, 3, 4, 5)):
    """A rank's rows of a common batch: the first rank has many more words than the second."""
    random = torch.Generator().manual_seed(number)
    word_mask = torch.arange(L) < torch.tensor(LENGTHS)[:, None]
    tokens = torch.randint(3, V, (B, L), generator=random) * word_mask
    images = torch.rand(B, 3, 16, 16, generator=random, dtype=torch.float64) * 2 - 1
    tensors = (images, tokens, word_mask, torch.tensor(class_ids))
    images, tokens, word_mask, class_ids = map(world.rows, tensors)
    rows = world.rows(torch.arange(B))
    return CaptionBatch(images, tokens, word_mask, class_ids, ("",) * len(rows), rows, rows)


def make_recipe(tiny, **model):
    """No dropout, which ranks draw on their own; gradients as they are."""
    phases = {
        phase: dataclasses.replace(getattr(tiny, phase), batch_size=B, largest_gradient_norm=None)
        for phase in ("stem", "stream", "glam", "judge")
    }
    return dataclasses.replace(
        tiny,
        model=dataclasses.replace(tiny.model, text_dropout=0.0, **model),
        engine=dataclasses.replace(tiny.engine, synchronize_batch_norm=True),
        **phases,
    )


def two_steps(step, state, trainees, batches, recipe):
    """Losses, gradients and weights after each of two steps."""
    result = []
    for batch in batches:
        outcome = step(state, batch, recipe)
        assert outcome.finite
        gradients, weights = {}, {}
        for owner, trainee in trainees.items():
            for name, parameter in trainee.module.named_parameters():
                if parameter.grad is not None:
                    gradients[f"{owner}.{name}"] = parameter.grad.clone()
            for name, value in trainee.module.state_dict().items():
                weights[f"{owner}.{name}"] = value.clone()
        result.append({"losses": outcome.losses, "gradients": gradients, "weights": weights})
    return result


def match(world, tiny, **changes):
    recipe = make_recipe(tiny)
    torch.manual_seed(0)
    pair = EncoderPair(recipe.model, V).train()
    phase = dataclasses.replace(recipe.stem, **{"word_weight": 0.5, "word_pairs": 48, **changes})
    state = start_pretraining(pair, phase, recipe.engine, world)
    batches = [make_batch(world, i, (0, 1, 2, 0, 4, 5)) for i in range(2)]
    return two_steps(matching_step, state, {"pair": state.trainee}, batches, phase)


def read(world, tiny, *, train_backbone, evaluating=False, accumulate=1):
    recipe = make_recipe(tiny)
    torch.manual_seed(0)
    captioner = MirrorGAN(recipe.model, Vocabulary([f"word{i}" for i in range(V - 3)])).captioner.train()
    if not train_backbone:
        captioner.image_encoder.requires_grad_(False).eval()
    if evaluating:
        captioner.eval()
    phase = dataclasses.replace(recipe.stream, train_backbone=train_backbone, accumulate=accumulate)
    state = start_pretraining(Reader(captioner), phase, recipe.engine, world)
    batches = [make_batch(world, i) for i in range(2)]
    return two_steps(captioning_step, state, {"reader": state.trainee}, batches, phase)


def paint(world, tiny, *, normalization, class_ids, evaluating=False, **changes):
    recipe = make_recipe(tiny, discriminator_normalization=normalization)
    recipe = dataclasses.replace(recipe, glam=dataclasses.replace(recipe.glam, **changes))
    torch.manual_seed(0)
    model = MirrorGAN(recipe.model, Vocabulary([f"word{i}" for i in range(V - 3)]))
    state = start(model, recipe, torch.Generator().manual_seed(2), world)
    if evaluating:
        for trainee in state.trainees().values():
            trainee.module.eval()
    batches = [make_batch(world, i, class_ids) for i in range(2)]
    return two_steps(adversarial_step, state, state.trainees(), batches, recipe.glam)


ALL_DIFFER, ONE_DIFFERS = (0, 1, 2, 3, 4, 5), (0, 0, 0, 0, 0, 1)
STEPS = {
    "match": (match, {}),
    "match-by-sentence": (match, {"word_weight": 0.0}),
    "read": (read, {"train_backbone": False}),
    "read-and-see": (read, {"train_backbone": True}),
    "read-in-parts": (read, {"train_backbone": False, "evaluating": True, "accumulate": 3}),
    "paint": (paint, {"normalization": "none", "class_ids": ALL_DIFFER}),
    "paint-few-pairs": (paint, {"normalization": "none", "class_ids": ONE_DIFFERS}),
    "paint-batch-norm": (paint, {"normalization": "batch", "class_ids": ALL_DIFFER}),
    "paint-batch-norm-few-pairs": (paint, {"normalization": "batch", "class_ids": (0, 0, 0, 0, 2, 1)}),
    "paint-r1": (paint, {"normalization": "batch", "class_ids": ALL_DIFFER, "r1_weight": 0.5, "r1_every": 1}),
    "paint-in-balance": (
        paint,
        {"normalization": "batch", "class_ids": ALL_DIFFER, "redescription_weight": None, "redescription_ratio": 0.3},
    ),
    "paint-in-parts": (
        paint,
        {"normalization": "none", "class_ids": ONE_DIFFERS, "evaluating": True, "accumulate": 3},
    ),
}
# A rank without mismatched pairs among ranks that have some.
NO_PAIRS = {"paint-no-pairs-on-a-rank": (paint, {"normalization": "batch", "class_ids": ONE_DIFFERS})}
# Sizes of the parts of a batch that the ranks have.
NORMS = {
    "even": ((4, 3, 2), (4, 3, 2)),
    "uneven": ((5, 3, 2), (2, 3, 2)),
    "none": ((5, 3, 2), (0, 3, 2)),
    "vectors": ((5,), (3,)),
    "one": ((1,), (0,)),
}
CHANNELS = 5


def norm_input(sizes):
    random = torch.Generator().manual_seed(3)
    wholes = []
    for _ in range(2):
        parts = [(size[0], CHANNELS, *size[1:]) for size in sizes]
        wholes.append([torch.randn(shape, generator=random, dtype=torch.float64) * 2 + 1 for shape in parts])
    return wholes


def norms_of_ranks(world):
    result = {}
    for name, sizes in NORMS.items():
        for momentum in (0.1, None):
            plain = nn.BatchNorm1d(CHANNELS, momentum=momentum, dtype=torch.float64)
            with torch.no_grad():
                plain.weight.copy_(torch.arange(CHANNELS) + 0.5)
            norm = SynchronizedBatchNorm.like(plain)
            inputs, factors = (parts[world.rank] for parts in norm_input(sizes))
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


def sayings_of_ranks(world):
    rank = world.rank
    rows = (torch.arange(6.0).view(2, 3) + 10 * rank).requires_grad_(True)
    gathered = world.gather(rows)
    (gather_weights() * gathered**2).sum().backward()
    return {
        "gathered": gathered.detach(),
        "gradient": rows.grad,
        "flags": world.gather(torch.tensor([True, rank == 1])),
        "shares": world.shares(torch.tensor(COUNTS[rank])),
        "no shares": world.shares(torch.tensor([0, 0])),
        "any": [world.any(False), world.any(rank == 1), world.any(True)],
        "all": [bool(world.all(torch.tensor(flag))) for flag in (False, rank == 1, True)],
        "agree": world.agree({"rank": rank}),
        "states": world.gather_states(torch.tensor([rank, 7], dtype=torch.uint8)),
        "rows": world.rows(torch.arange(4)),
    }


def run_operations(out, tiny):
    with connected("cpu") as world:
        torch.save(norms_of_ranks(world), out / f"norms-{world.rank}.pt")
        torch.save(sayings_of_ranks(world), out / f"sayings-{world.rank}.pt")
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    run_steps(out, tiny, STEPS)


def run_no_pairs(out, tiny):
    run_steps(out, tiny, NO_PAIRS)


def run_steps(out, tiny, cases):
    torch.set_default_dtype(torch.float64)
    with connected("cpu") as world:
        for name, (phase, options) in cases.items():
            try:
                torch.save(phase(world, tiny, **options), out / f"{name}-{world.rank}.pt")
            except RuntimeError:
                # Both ranks come here, or the case hangs.
                traceback.print_exc()
            if world.is_main:
                options = {key: value for key, value in options.items() if key != "accumulate"}
                torch.save(phase(World(), tiny, **options), out / f"{name}-alone.pt")


def make_run_recipe(tiny):
    phases = {phase: dataclasses.replace(getattr(tiny, phase), batch_size=B) for phase in ("stem", "stream", "judge")}
    return dataclasses.replace(
        tiny,
        glam=dataclasses.replace(tiny.glam, batch_size=B, keep_best="r_precision"),
        engine=dataclasses.replace(tiny.engine, checkpoint_every=2, synchronize_batch_norm=True),
        logging=dataclasses.replace(tiny.logging, validate_every=1),
        **{**phases, "judge": dataclasses.replace(phases["judge"], word_weight=0.1)},
    )


def run_trainings(out, tiny):
    recipe, rank, port = make_run_recipe(tiny), int(os.environ["RANK"]), int(os.environ["MASTER_PORT"])

    def attempt(number, folder, **options):
        os.environ["MASTER_PORT"] = str(port + number)
        try:
            train(recipe, out / folder, **options)
        except Interrupted as error:
            return str(error)
        return "done"

    said = [attempt(0, "first"), attempt(1, "second")]
    # One of them is told to stop, after a step without a checkpoint.
    for number, name in enumerate(("matching_step", "adversarial_step")):
        step = getattr(loop, name)
        calls = []

        def stopped(*arguments, step=step, calls=calls):
            calls.append(arguments)
            if rank == 1 and len(calls) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*arguments)

        setattr(loop, name, stopped)
        said.append(attempt(2 + number, "stopped", resume=True))
        setattr(loop, name, step)
        if rank == 0:
            shutil.copytree(out / "stopped", out / f"stopped-{number}")
    said.append(attempt(4, "stopped", resume=True))
    (out / f"said-{rank}.json").write_text(json.dumps(said))


TASKS = {"operations": run_operations, "no-pairs": run_no_pairs, "trainings": run_trainings}

# What is looked at ---------------------------------------------------------------------------------------------------


def free_port():
    """A port with some free ones after it, as likely as not."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return min(server.getsockname()[1], 65000)


def launch(task, out, patience=PATIENCE):
    """Both ranks of a task, to the end; what they print is in the error if there is one."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(RANKS)}
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
    end = time.monotonic() + patience
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
    """What a case left, by its name: of each rank, and of one process."""
    out = tmp_path_factory.mktemp("steps")
    errors = {"": launch("operations", out)}

    def load(name, alone=False):
        if name in NO_PAIRS and name not in errors:
            errors[name] = launch("no-pairs", out, patience=40)
        error = errors.get(name, errors[""])
        files = [out / f"{name}-{who}.pt" for who in (*range(RANKS), *(["alone"] if alone else []))]
        if not all(file.exists() for file in files):
            pytest.fail(f"{name} was not done: {error}")
        return [torch.load(file) for file in files]

    return load


def largest_difference(expected, actual):
    """Relative to the largest value of all."""
    assert expected.keys() == actual.keys()
    largest = max(value.abs().max() for value in expected.values())
    return max(float((expected[name].double() - actual[name].double()).abs().max() / largest) for name in expected)


@pytest.mark.parametrize("name", [*STEPS, *NO_PAIRS])
def test_two_ranks_compute_what_one_process_does(steps, name, record_property):
    *ranks, alone = steps(name, alone=True)
    for number, expected in enumerate(alone):
        of_ranks = [rank[number] for rank in ranks]
        differences = [largest_difference(expected["gradients"], each["gradients"]) for each in of_ranks]
        print(f"{name}, step {number}: largest difference of a gradient {max(differences):.1e}")
        record_property(f"difference_{number}", max(differences))
        assert max(differences) < TOLERANCE
        for each in of_ranks:
            for weight, value in expected["weights"].items():
                torch.testing.assert_close(each["weights"][weight], value, rtol=1e-5, atol=3e-5, msg=weight)
        for loss, value in expected["losses"].items():
            if "accuracy" not in loss and all(loss in each["losses"] for each in of_ranks):
                mean = torch.stack([each["losses"][loss] for each in of_ranks]).mean()
                torch.testing.assert_close(mean, value, rtol=1e-5, atol=1e-6, msg=loss, check_dtype=False)


def test_that_case_is_what_it_says(steps):
    first, second = [
        ["accuracy_mismatched_8" in step["losses"] for step in rank] for rank in steps("paint-no-pairs-on-a-rank")
    ]
    assert first != second


def test_ranks_have_different_numbers_of_words():
    assert sum(LENGTHS[:3]) > 2 * sum(LENGTHS[3:])


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name", NORMS)
def test_batch_norm_is_that_of_the_whole_batch(steps, name, momentum):
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


def test_gathers_rows_and_their_gradients(steps):
    ranks, weights = steps("sayings"), gather_weights()
    for number, rank in enumerate(ranks):
        for i in range(4):
            for j in range(3):
                value = 3 * (i % 2) + j + 10 * (i // 2)
                assert rank["gathered"][i, j] == value
                if i // 2 == number:
                    # All ranks compute the same loss, and each has its part.
                    assert rank["gradient"][i % 2, j] == RANKS * weights[i, j] * 2 * value
        assert rank["flags"].tolist() == [True, False, True, True]
        assert rank["flags"].dtype == torch.bool
        assert [state.tolist() for state in rank["states"]] == [[0, 7], [1, 7]]
        assert rank["rows"].tolist() == [[0, 1], [2, 3]][number]


def test_shares_make_a_mean_of_means_the_mean(steps):
    random = torch.Generator().manual_seed(4)
    values, weighted, total, count = iter(torch.rand(99, generator=random)), 0.0, 0.0, 0
    for counts, rank in zip(COUNTS, steps("sayings")):
        for size, share in zip(counts, rank["shares"]):
            part = [float(next(values)) for _ in range(size)]
            total, count = total + sum(part), count + size
            weighted += float(share) * (sum(part) / size if size else 0.0) / 4
        assert rank["no shares"].tolist() == [0, 0]
    assert weighted == pytest.approx(total / count)


def test_ranks_agree(steps):
    for rank in steps("sayings"):
        assert rank["any"] == [False, True, True]
        assert rank["all"] == [False, False, True]
        assert rank["agree"] == {"rank": 0}


def test_one_process_needs_nobody():
    world = World()
    rows = torch.rand(3, 2)
    assert world.gather(rows) is rows
    assert world.shares(torch.tensor([2, 2])).tolist() == [1, 1]
    assert world.shares(torch.tensor([1, 3])).tolist() == [0.5, 1.5]
    assert world.agree(5) == 5
    assert world.any(True)
    assert not world.any(False)
    world.wait()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of two unbroken runs and of one that was stopped twice, and what was said."""
    out = tmp_path_factory.mktemp("trainings")
    error = launch("trainings", out)
    assert not error, error
    return out, [json.loads((out / f"said-{rank}.json").read_text()) for rank in range(RANKS)]


def lines_of(folder):
    """metrics.jsonl without what time it took."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("seconds", "waited")} for line in lines]


def weights_of(folder):
    files = sorted([*folder.glob("phases/*.safetensors"), *folder.glob("model/*.safetensors")])
    assert len(files) >= 5
    return {file.relative_to(folder): file.read_bytes() for file in files}


def test_a_run_of_two_ranks_repeats(runs):
    out, said = runs
    assert [each[:2] for each in said] == [["done", "done"]] * RANKS
    assert weights_of(out / "first") == weights_of(out / "second")
    assert lines_of(out / "first") == lines_of(out / "second")


def test_a_run_of_two_ranks_is_written_once(runs):
    steps = [(line["phase"], line["step"]) for line in lines_of(runs[0] / "first") if "images" in line]
    trained = [(line["phase"], line["step"]) for line in lines_of(runs[0] / "first") if "skipped" in line]
    assert len(trained) == len(set(trained)) == len({*steps}) == 4 * 3
    assert len(steps) == 2 * len(trained)
    for phase in ("stem", "stream", "glam", "judge"):
        files = Checkpoints(runs[0] / "first" / "checkpoints", phase, 2).files()
        assert sorted(files) == [2, 3]
    assert [path.name for path in (runs[0] / "first").rglob(".*")] == [".lock"]


def test_a_run_of_two_ranks_goes_on_bit_for_bit(runs):
    out, said = runs
    for each in said:
        assert "stopped by SIGTERM after step 1 of 3 of phase stem" in each[2]
        assert "stopped by SIGTERM after step 1 of 3 of phase glam" in each[3]
        assert each[4] == "done"
    assert weights_of(out / "stopped") == weights_of(out / "first")
    assert lines_of(out / "stopped") == lines_of(out / "first")


def test_a_run_of_two_ranks_does_not_go_on_with_one(runs, tiny_recipe, tmp_path):
    folder = shutil.copytree(runs[0] / "stopped-1", tmp_path / "run")
    with pytest.raises(TrainingError, match="is of 2 processes, and there are 1 now: a resumed run needs as many"):
        train(make_run_recipe(tiny_recipe), folder, resume=True)


def test_a_batch_is_divided_equally(runs, tiny_recipe, tmp_path):
    run = loop.Run(tiny_recipe, loop.RunFolder(tmp_path), None, World(size=RANKS))
    splits = loop.load_splits(tiny_recipe.data, tiny_recipe.model, tiny_recipe.seed)
    with pytest.raises(ValueError, match=r"stem\.batch_size=7 cannot be divided among 2 processes"):
        loop.make_batches(dataclasses.replace(run, splits=splits), "stem", tiny_recipe.stem)


# torchrun ------------------------------------------------------------------------------------------------------------

SHORT = [
    *("--logging.every", "1", "--data.training-images", "23", "--data.validation-images", "19"),
    *("--evaluation.candidates", "5", "--evaluation.report-images", "2", "--model.resolutions", "8", "16"),
    *("--model.channels", "3", "--model.discriminator-channels", "3", "--model.word-dim", "10"),
    *("--device", "cpu", "--engine.checkpoint-every", "2", "--judge.word-weight", "0.1"),
]


def torchrun(folder, log, *options):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    words += ["-m", "mirror_modules.cli", "train", "demo", "--out", str(folder), *SHORT, *options]
    with log.open("w") as file:
        return subprocess.Popen(
            words, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )


def finish(process, log):
    try:
        return process.wait(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        pytest.fail(f"torchrun hung: {log.read_text()[-3000:]}")
    finally:
        # It ends its workers, and after half a minute kills them.
        process.terminate()
        process.wait()


def worker_of(process, rank):
    """The process id of one of torchrun's workers."""
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if f"LOCAL_RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return int(pid)
    raise AssertionError(f"no worker {rank}")


def test_torchrun_trains_to_the_end(tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    status = finish(torchrun(folder, log, "--steps", "2"), log)
    printed = log.read_text()
    assert status == 0, printed[-3000:]
    assert printed.count(f"Open {folder / 'report.html'}") == 1
    assert printed.count("R-precision among") == 1
    assert (folder / "report.html").exists()
    assert (folder / "evaluation.json").exists()
    steps = [(line["phase"], line["step"]) for line in lines_of(folder)]
    assert len(steps) == len(set(steps)) == 4 * 2


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
def test_a_dead_rank_ends_the_run_and_the_run_goes_on(tmp_path):
    rank, folder, log = 1, tmp_path / "run", tmp_path / "log"
    options = ("--steps", "100", "--phases", "stem")
    process = torchrun(folder, log, *options)
    end = time.monotonic() + PATIENCE
    while not list(folder.glob("checkpoints/stem-*.pt")):
        if process.poll() is not None or time.monotonic() > end:
            process.terminate()
            pytest.fail(f"there is no checkpoint: {log.read_text()[-3000:]}")
        time.sleep(0.01)
    os.kill(worker_of(process, rank), signal.SIGKILL)
    killed = time.monotonic()
    status, seconds = finish(process, log), time.monotonic() - killed
    printed = log.read_text()
    assert status != 0
    assert seconds < SOON
    assert "SIGKILL" in printed or "Signal 9" in printed, printed[-3000:]
    assert f"local_rank: {rank}" in printed or f"rank      : {rank}" in printed, printed[-3000:]

    newest = Checkpoints(folder / "checkpoints", "stem", 2).newest_whole()
    assert newest is not None
    assert checksum(newest) in newest.name
    assert load_checkpoint(newest)["log"]["step"] < 100
    log = tmp_path / "log-of-the-rest"
    status = finish(torchrun(folder, log, *options, "--resume"), log)
    assert status == 0, log.read_text()[-3000:]
    assert "goes on after step" in log.read_text()
    steps = [line["step"] for line in lines_of(folder)]
    assert steps == list(range(1, 101))


if __name__ == "__main__":
    from conftest import make_tiny_recipe

    torch.set_num_threads(1)
    try:
        TASKS[sys.argv[1]](Path(sys.argv[2]), make_tiny_recipe())
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        # Nothing waits for the other rank.
        os._exit(1)
