"""Phases can be trained one by one, are reused when finished, are reproducible, and never overwrite other files."""

import copy
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from mirror_modules import BackboneConfig, MirrorGAN
from mirror_modules.evaluation.evaluation import evaluate
from mirror_modules.training import loop
from mirror_modules.training.distributed import SINGLE_PROCESS
from mirror_modules.training.folder import RunFolder
from mirror_modules.training.loop import train
from mirror_modules.training.plan import Plan
from mirror_modules.training.recipes import PHASES


def read_lines(folder):
    lines = [json.loads(line) for line in folder.log.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("seconds", "waited")} for line in lines]


def read_files(path):
    return {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_run_writes_config_log_and_model(tiny_run):
    assert tiny_run.config.exists()
    assert (tiny_run.model / "model.safetensors").exists()
    assert [line["step"] for line in read_lines(tiny_run) if line["phase"] == "glam"] == [1, 2, 3]
    assert {line["phase"] for line in read_lines(tiny_run)} == {"stem", "stream", "glam", "evaluator"}


def test_the_same_seed_gives_the_same_losses_and_weights(tiny_run, tiny_recipe, tmp_path):
    again = train(tiny_recipe, tmp_path / "again")
    assert read_lines(again) == read_lines(tiny_run)
    for phase in ("stem", "stream", "glam", "evaluator"):
        assert again.weights(phase).read_bytes() == tiny_run.weights(phase).read_bytes()


def test_another_seed_gives_other_losses_and_weights(tiny_run, tiny_recipe, tmp_path):
    other = train(dataclasses.replace(tiny_recipe, seed=1), tmp_path / "other", phases=["stem"])
    assert read_lines(other)[0] != read_lines(tiny_run)[0]
    assert other.weights("stem").read_bytes() != tiny_run.weights("stem").read_bytes()


def test_the_evaluator_does_not_affect_other_phases(tiny_run, tiny_recipe, tmp_path):
    """The other phases, trained one by one and without the evaluator, have the same weights."""
    folder = train(tiny_recipe, tmp_path / "run", phases=["stem"])
    train(tiny_recipe, tmp_path / "run", phases=["stream"])
    train(tiny_recipe, tmp_path / "run", phases=["glam"])
    assert folder.weights("glam").read_bytes() == tiny_run.weights("glam").read_bytes()
    assert tiny_run.weights("evaluator").read_bytes() != tiny_run.weights("stem").read_bytes()


def test_a_captioner_on_a_frozen_random_backbone_is_refused(tiny_recipe, tmp_path):
    other = BackboneConfig("conv", input_size=16)
    recipe = dataclasses.replace(tiny_recipe, model=dataclasses.replace(tiny_recipe.model, captioner_backbone=other))
    with pytest.raises(ValueError, match=r"'stream' freezes the captioner's backbone 'conv', whose weights are random"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    stream = dataclasses.replace(recipe.stream, train_backbone=True)
    train(dataclasses.replace(recipe, stream=stream), tmp_path / "run", phases=["stem", "stream"])


def test_finished_phases_are_reused(run_copy, tiny_recipe, capsys):
    before = read_files(run_copy.path)
    train(tiny_recipe, run_copy.path)
    assert read_files(run_copy.path) == before
    assert "stem: already trained" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("phases", "needed"),
    [
        (["stream"], "'stream' needs phase 'stem'"),
        (["glam"], "'glam' needs phase 'stem'"),
        (["stem", "glam"], "'glam' needs phase 'stream'"),
    ],
)
def test_a_missing_required_phase_is_named(tiny_recipe, tmp_path, phases, needed):
    with pytest.raises(ValueError, match=f"phase {needed}, which .*run lacks"):
        train(tiny_recipe, tmp_path / "run", phases=phases)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("phase", ["stem", "evaluator"])
def test_a_phase_without_requirements_can_be_trained_alone(tiny_run, tiny_recipe, tmp_path, phase):
    folder = train(tiny_recipe, tmp_path / "run", phases=[phase])
    assert {line["phase"] for line in read_lines(folder)} == {phase}
    assert folder.weights(phase).read_bytes() == tiny_run.weights(phase).read_bytes()
    assert [file.name for file in (folder.path / "phases").iterdir()] == [f"{phase}.safetensors"]


def test_only_a_missing_phase_is_trained_again(run_copy, tiny_run, tiny_recipe):
    run_copy.weights("stream").unlink()

    def modification_times():
        return {phase: run_copy.weights(phase).stat().st_mtime_ns for phase in ("stem", "glam", "evaluator")}

    before = modification_times()
    train(tiny_recipe, run_copy.path)
    assert run_copy.weights("stream").read_bytes() == tiny_run.weights("stream").read_bytes()
    assert modification_times() == before


def test_an_unknown_phase_is_rejected(tiny_recipe, tmp_path):
    with pytest.raises(ValueError, match="unknown phase 'dream'"):
        train(tiny_recipe, tmp_path / "run", phases=["dream"])


def test_a_run_with_other_settings_is_not_overwritten(run_copy, tiny_recipe):
    before = read_files(run_copy.path)
    other = dataclasses.replace(tiny_recipe, glam=dataclasses.replace(tiny_recipe.glam, kl_weight=3.0))
    with pytest.raises(ValueError, match=r"glam\.kl_weight is 0\.1 there and 3\.0 now"):
        train(other, run_copy.path)
    assert read_files(run_copy.path) == before


def test_a_folder_of_other_files_is_not_overwritten(tiny_recipe, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not empty and holds no run"):
        train(tiny_recipe, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_phase_interrupted_before_its_first_checkpoint_is_restarted(run_copy, tiny_run, tiny_recipe, monkeypatch):
    run_copy.weights("glam").unlink()
    for checkpoint in run_copy.checkpoints.glob("glam-*"):
        checkpoint.unlink()
    step, calls = loop.adversarial_step, []

    def interrupt_second_step(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(loop, "adversarial_step", interrupt_second_step)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_recipe, run_copy.path)
    assert not run_copy.weights("glam").exists()
    assert [line["step"] for line in read_lines(run_copy) if line["phase"] == "glam"] == [1]
    for phase in ("stem", "stream", "evaluator"):
        assert run_copy.weights(phase).read_bytes() == tiny_run.weights(phase).read_bytes()
    with run_copy.log.open("a") as file:
        file.write('{"phase": "glam", "st')
    monkeypatch.undo()

    train(tiny_recipe, run_copy.path)
    entries = sorted(read_lines(run_copy), key=lambda line: (line["phase"], line["step"]))
    assert entries == sorted(read_lines(tiny_run), key=lambda line: (line["phase"], line["step"]))
    assert run_copy.weights("glam").read_bytes() == tiny_run.weights("glam").read_bytes()


def test_the_saved_model_has_the_weights_of_all_phases(tiny_run):
    model = MirrorGAN.from_pretrained(tiny_run.model)
    generator, stem, captioner = (load_file(tiny_run.weights(phase)) for phase in ("glam", "stem", "stream"))
    state = model.state_dict()
    for saved, prefix in ((generator, ""), (captioner, "captioner."), (stem, "")):
        shared = {f"{prefix}{name}": tensor for name, tensor in saved.items() if f"{prefix}{name}" in state}
        assert shared
        assert all(torch.equal(state[name], tensor) for name, tensor in shared.items())


def test_changed_training_captions_are_detected(run_copy, tiny_recipe):
    """Also if the vocabulary has the same size, where the weights would still fit."""
    words = json.loads(run_copy.vocabulary.read_text())
    words["words"][0] += "x"
    run_copy.vocabulary.write_text(json.dumps(words))
    run_copy.weights("glam").unlink()
    before = read_files(run_copy.path)
    with pytest.raises(ValueError, match="is not the vocabulary of the training captions"):
        train(tiny_recipe, run_copy.path)
    assert read_files(run_copy.path) == before


@pytest.mark.parametrize("content", ["[]", "{}", '{"recipe": 3}'])
def test_a_config_without_a_recipe_is_not_overwritten(tiny_recipe, tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="holds no recipe"):
        train(tiny_recipe, tmp_path)
    assert read_files(tmp_path) == {(tmp_path / "config.json").relative_to(tmp_path): content.encode()}


def test_too_few_images_are_rejected_before_training(tiny_recipe, tmp_path):
    for changes, message in (
        (
            {"validation_images": 1},
            "needs at least 2 validation images .* there are 1 validation images, of which 1 have",
        ),
        ({"training_images": 1}, "training needs at least 2 training images, but there is 1"),
    ):
        data = dataclasses.replace(tiny_recipe.data, **changes)
        with pytest.raises(ValueError, match=message):
            train(dataclasses.replace(tiny_recipe, data=data), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_few_validation_images_lower_the_number_of_candidates(tiny_recipe, tmp_path, capsys):
    """In validation, and in the evaluation afterwards."""
    stem = dataclasses.replace(tiny_recipe.stem, keep_best="r_precision")
    data = dataclasses.replace(tiny_recipe.data, validation_images=5)
    recipe = dataclasses.replace(tiny_recipe, stem=stem, data=data)
    line = (
        "R-precision among 5 captions instead of evaluation.candidates=11, because 5 validation images have a caption "
        "that no training image has"
    )
    train(recipe, tmp_path / "run")
    assert capsys.readouterr().err.count(line) == 1
    metrics = evaluate(tmp_path / "run")
    assert capsys.readouterr().err.count(line) == 1
    assert (metrics["candidates"], metrics["chance"]) == (5, 1 / 5)


@pytest.mark.parametrize("threads", [None, 1, 3])
def test_the_number_of_threads_is_set_printed_and_restored(tiny_recipe, tmp_path, capsys, monkeypatch, threads):
    used, step = [], loop.matching_step
    monkeypatch.setattr(loop, "matching_step", lambda *a: (used.append(torch.get_num_threads()), step(*a))[1])
    engine = dataclasses.replace(tiny_recipe.engine, threads=threads)
    folder = train(dataclasses.replace(tiny_recipe, engine=engine), tmp_path / "run", phases=["stem"])
    assert set(used) == {threads or 1}
    assert torch.get_num_threads() == 1
    number = "3 threads" if threads == 3 else "1 thread"
    assert f"training on cpu with {number}, on a machine with " in capsys.readouterr().err
    versions = json.loads(folder.config.read_text())["versions"]
    assert versions["machine"].endswith(f", {threads or 1} threads")


@pytest.mark.parametrize(
    ("field", "value"), [("channels", 0), ("resolutions", (8, 12)), ("image_backbone", "vgg"), ("word_dim", 0)]
)
def test_an_invalid_model_config_leaves_no_folder(tiny_recipe, tmp_path, field, value):
    model = dataclasses.replace(tiny_recipe.model, **{field: value})
    with pytest.raises(ValueError, match=str(value[-1] if field == "resolutions" else value)):
        train(dataclasses.replace(tiny_recipe, model=model), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_captioner_uses_the_image_encoder_of_stem(tiny_run):
    stem, stream = (load_file(tiny_run.weights(phase)) for phase in ("stem", "stream"))
    encoder = {name: tensor for name, tensor in stem.items() if name.startswith("image_encoder.")}
    assert encoder
    assert all(torch.equal(stream[name], tensor) for name, tensor in encoder.items())


def test_the_evaluator_has_other_initial_weights_and_batches_than_stem(tiny_recipe, tmp_path, monkeypatch):
    calls = []

    def record(state, batch, recipe):
        calls.append((batch.captions, copy.deepcopy(state.network.module.state_dict())))
        return step(state, batch, recipe)

    step = loop.matching_step
    monkeypatch.setattr(loop, "matching_step", record)
    train(tiny_recipe, tmp_path / "run", phases=["stem", "evaluator"])
    (stem_captions, stem), (evaluator_captions, evaluator) = calls[0], calls[tiny_recipe.stem.steps]
    assert stem_captions != evaluator_captions
    random = [name for name, tensor in stem.items() if tensor.ndim > 1]
    assert random
    assert not any(torch.equal(stem[name], evaluator[name]) for name in random)


def test_train_restores_the_global_random_state(tiny_recipe, tmp_path):
    before = torch.get_rng_state()
    train(tiny_recipe, tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), before)


def test_train_restores_the_global_random_state_after_an_error(tiny_recipe, tmp_path, monkeypatch):
    def fail(*_):
        torch.rand(3)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "captioning_step", fail)
    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        train(tiny_recipe, tmp_path / "run", phases=["stem", "stream"])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("phases", ["stem", [], ()])
def test_phases_must_be_a_list_of_some(tiny_recipe, tmp_path, phases):
    with pytest.raises(ValueError, match=r"train: phases must be a list of one or more of stem, stream, glam"):
        train(tiny_recipe, tmp_path / "run", phases=phases)
    assert not (tmp_path / "run").exists()


def test_phases_may_come_from_a_generator_and_gradients_may_be_off(tiny_recipe, tmp_path):
    with torch.inference_mode():
        folder = train(tiny_recipe, tmp_path / "run", phases=(phase for phase in ["stem"]))
    assert folder.weights("stem").exists()


def test_a_recipe_must_be_one(tmp_path):
    with pytest.raises(ValueError, match=r"train: recipe must be a Recipe such as get_recipe\('demo'\), .* 'demo'"):
        train("demo", tmp_path / "run")


@pytest.mark.parametrize(
    ("device", "message"), [("cuda", "torch sees no GPU"), ("mps", "must be one of 'auto', 'cpu'")]
)
def test_a_device_that_cannot_be_used_is_rejected(tiny_recipe, tmp_path, monkeypatch, device, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        train(tiny_recipe, tmp_path / "run", device=device)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_stores_where_its_data_is_now(run_copy, tiny_recipe):
    here = dataclasses.replace(tiny_recipe, data=dataclasses.replace(tiny_recipe.data, source="folder", path="here"))
    run_copy.begin(here)
    elsewhere = dataclasses.replace(here, data=dataclasses.replace(here.data, path="elsewhere"))
    train(elsewhere, run_copy.path)
    assert run_copy.read_recipe() == elsewhere


def test_a_folder_that_changes_before_it_is_locked_is_left_alone(tiny_recipe, tmp_path, monkeypatch):
    """Loading the data takes a while, in which another process may finish another run in the folder."""
    load, other = loop.load_splits, dataclasses.replace(tiny_recipe, seed=5)

    def load_slowly(*arguments):
        RunFolder(tmp_path / "run").begin(other)
        return load(*arguments)

    monkeypatch.setattr(loop, "load_splits", load_slowly)
    with pytest.raises(ValueError, match="other settings"):
        train(tiny_recipe, tmp_path / "run", phases=["stem"])
    assert RunFolder(tmp_path / "run").read_recipe() == other


def test_no_two_phases_or_seeds_share_their_initial_weights(tiny_recipe, tmp_path, monkeypatch):
    seeds = []
    for phase in PHASES:
        monkeypatch.setattr(loop, f"train_{phase}", lambda run: seeds.append(torch.initial_seed() % 2**32))
    monkeypatch.setattr(loop, "save_weights", lambda *_: None)
    for seed in range(0, 401, 100):
        recipe = dataclasses.replace(tiny_recipe, seed=seed)
        loop._train_phases(loop.Run(recipe, RunFolder(tmp_path), None, SINGLE_PROCESS), Plan(PHASES, ()))
    assert len(seeds) == len(set(seeds)) == 20


def test_the_noise_is_not_drawn_from_the_stream_of_the_initial_weights(run_copy, tiny_recipe, monkeypatch):
    seeds = []

    def record(model, recipe, random, *_, **__):
        seeds.extend([random.initial_seed(), torch.initial_seed()])
        raise InterruptedError

    monkeypatch.setattr(loop, "start", record)
    run_copy.weights("glam").unlink()
    with pytest.raises(InterruptedError):
        train(tiny_recipe, run_copy.path)
    assert seeds[0] != seeds[1]
