"""Phases run alone, reuse what is there, repeat by their seed, and never destroy what a folder holds."""

import copy
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from mirror_modules import MirrorGAN
from mirror_modules.training import loop
from mirror_modules.training.loop import train


def losses(folder):
    lines = [json.loads(line) for line in folder.log.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("seconds", "waited")} for line in lines]


def contents(path):
    return {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_leaves_what_a_run_leaves(tiny_run):
    assert tiny_run.config.exists()
    assert (tiny_run.model / "model.safetensors").exists()
    assert [line["step"] for line in losses(tiny_run) if line["phase"] == "glam"] == [1, 2, 3]
    assert {line["phase"] for line in losses(tiny_run)} == {"stem", "stream", "glam", "judge"}


def test_the_same_seed_gives_the_same_losses_and_weights(tiny_run, tiny_recipe, tmp_path):
    again = train(tiny_recipe, tmp_path / "again")
    assert losses(again) == losses(tiny_run)
    for phase in ("stem", "stream", "glam", "judge"):
        assert again.weights(phase).read_bytes() == tiny_run.weights(phase).read_bytes()


def test_another_seed_gives_other_losses_and_weights(tiny_run, tiny_recipe, tmp_path):
    other = train(dataclasses.replace(tiny_recipe, seed=1), tmp_path / "other", phases=["stem"])
    assert losses(other)[0] != losses(tiny_run)[0]
    assert other.weights("stem").read_bytes() != tiny_run.weights("stem").read_bytes()


def test_the_judge_changes_no_other_phase(tiny_run, tiny_recipe, tmp_path):
    """Trained one by one and without the judge, the phases come out the same."""
    folder = train(tiny_recipe, tmp_path / "run", phases=["stem"])
    train(tiny_recipe, tmp_path / "run", phases=["stream"])
    train(tiny_recipe, tmp_path / "run", phases=["glam"])
    assert folder.weights("glam").read_bytes() == tiny_run.weights("glam").read_bytes()
    assert tiny_run.weights("judge").read_bytes() != tiny_run.weights("stem").read_bytes()


def test_finished_phases_are_reused(run_copy, tiny_recipe, capsys):
    before = contents(run_copy.path)
    train(tiny_recipe, run_copy.path)
    assert contents(run_copy.path) == before
    assert "stem: already trained" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("phases", "needed"),
    [
        (["stream"], "'stream' needs phase 'stem'"),
        (["glam"], "'glam' needs phase 'stem'"),
        (["stem", "glam"], "'glam' needs phase 'stream'"),
    ],
)
def test_a_missing_predecessor_is_named(tiny_recipe, tmp_path, phases, needed):
    with pytest.raises(ValueError, match=f"phase {needed}, which .*run lacks"):
        train(tiny_recipe, tmp_path / "run", phases=phases)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("phase", ["stem", "judge"])
def test_a_phase_that_needs_no_other_runs_alone(tiny_run, tiny_recipe, tmp_path, phase):
    folder = train(tiny_recipe, tmp_path / "run", phases=[phase])
    assert {line["phase"] for line in losses(folder)} == {phase}
    assert folder.weights(phase).read_bytes() == tiny_run.weights(phase).read_bytes()
    assert [file.name for file in (folder.path / "phases").iterdir()] == [f"{phase}.safetensors"]


def test_a_phase_lost_is_trained_again_and_the_others_are_not(run_copy, tiny_run, tiny_recipe):
    run_copy.weights("stream").unlink()

    def kept():
        return {phase: run_copy.weights(phase).stat().st_mtime_ns for phase in ("stem", "glam", "judge")}

    before = kept()
    train(tiny_recipe, run_copy.path)
    assert run_copy.weights("stream").read_bytes() == tiny_run.weights("stream").read_bytes()
    assert kept() == before


def test_an_unknown_phase_is_named(tiny_recipe, tmp_path):
    with pytest.raises(ValueError, match="unknown phase 'dream'"):
        train(tiny_recipe, tmp_path / "run", phases=["dream"])


def test_a_run_with_other_settings_is_left_alone(run_copy, tiny_recipe):
    before = contents(run_copy.path)
    other = dataclasses.replace(tiny_recipe, glam=dataclasses.replace(tiny_recipe.glam, kl_weight=3.0))
    with pytest.raises(ValueError, match=r"glam\.kl_weight is 0\.1 there and 3\.0 now"):
        train(other, run_copy.path)
    assert contents(run_copy.path) == before


def test_a_foreign_folder_is_left_alone(tiny_recipe, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not empty and holds no run"):
        train(tiny_recipe, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_phase_that_broke_off_before_its_first_checkpoint_starts_anew(run_copy, tiny_run, tiny_recipe, monkeypatch):
    run_copy.weights("glam").unlink()
    for checkpoint in run_copy.checkpoints.glob("glam-*"):
        checkpoint.unlink()
    step, calls = loop.adversarial_step, []

    def stop_at_the_second(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(loop, "adversarial_step", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_recipe, run_copy.path)
    assert not run_copy.weights("glam").exists()
    assert [line["step"] for line in losses(run_copy) if line["phase"] == "glam"] == [1]
    for phase in ("stem", "stream", "judge"):
        assert run_copy.weights(phase).read_bytes() == tiny_run.weights(phase).read_bytes()
    with run_copy.log.open("a") as file:
        file.write('{"phase": "glam", "st')
    monkeypatch.undo()

    train(tiny_recipe, run_copy.path)
    in_order = sorted(losses(run_copy), key=lambda line: (line["phase"], line["step"]))
    assert in_order == sorted(losses(tiny_run), key=lambda line: (line["phase"], line["step"]))
    assert run_copy.weights("glam").read_bytes() == tiny_run.weights("glam").read_bytes()


def test_the_saved_model_holds_the_averaged_generator_and_the_trained_parts(tiny_run):
    model = MirrorGAN.from_pretrained(tiny_run.model)
    painter, stem, captioner = (load_file(tiny_run.weights(phase)) for phase in ("glam", "stem", "stream"))
    state = model.state_dict()
    for saved, prefix in ((painter, ""), (captioner, "captioner."), (stem, "")):
        shared = {f"{prefix}{name}": tensor for name, tensor in saved.items() if f"{prefix}{name}" in state}
        assert shared
        assert all(torch.equal(state[name], tensor) for name, tensor in shared.items())


def test_captions_that_changed_since_are_noticed(run_copy, tiny_recipe):
    """The vocabulary keeps its size, so that the weights alone would fit."""
    words = json.loads(run_copy.vocabulary.read_text())
    words["words"][0] += "x"
    run_copy.vocabulary.write_text(json.dumps(words))
    run_copy.weights("glam").unlink()
    before = contents(run_copy.path)
    with pytest.raises(ValueError, match="is not the vocabulary of the training captions"):
        train(tiny_recipe, run_copy.path)
    assert contents(run_copy.path) == before


@pytest.mark.parametrize("content", ["[]", "{}", '{"recipe": 3}'])
def test_the_config_of_something_else_is_left_alone(tiny_recipe, tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="holds no recipe"):
        train(tiny_recipe, tmp_path)
    assert contents(tmp_path) == {(tmp_path / "config.json").relative_to(tmp_path): content.encode()}


def test_what_cannot_be_evaluated_is_not_trained(tiny_recipe, tmp_path):
    evaluation = dataclasses.replace(tiny_recipe.evaluation, candidates=32)
    with pytest.raises(ValueError, match=r"evaluation\.candidates=32 needs as many .* but there are 31"):
        train(dataclasses.replace(tiny_recipe, evaluation=evaluation), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("field", "value"), [("channels", 0), ("resolutions", (8, 12)), ("image_backbone", "eye"), ("word_dim", 0)]
)
def test_sizes_that_no_network_has_leave_no_folder(tiny_recipe, tmp_path, field, value):
    model = dataclasses.replace(tiny_recipe.model, **{field: value})
    with pytest.raises(ValueError, match=str(value[-1] if field == "resolutions" else value)):
        train(dataclasses.replace(tiny_recipe, model=model), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_captioner_sees_through_the_image_encoder_of_stem(tiny_run):
    stem, stream = (load_file(tiny_run.weights(phase)) for phase in ("stem", "stream"))
    eye = {name: tensor for name, tensor in stem.items() if name.startswith("image_encoder.")}
    assert eye
    assert all(torch.equal(stream[name], tensor) for name, tensor in eye.items())


def test_the_judge_begins_elsewhere_and_sees_other_batches_than_stem(tiny_recipe, tmp_path, monkeypatch):
    batches_seen = []

    def look(state, batch, recipe):
        batches_seen.append((batch.captions, copy.deepcopy(state.trainee.module.state_dict())))
        return step(state, batch, recipe)

    step = loop.matching_step
    monkeypatch.setattr(loop, "matching_step", look)
    train(tiny_recipe, tmp_path / "run", phases=["stem", "judge"])
    (stem_captions, stem), (judge_captions, judge) = batches_seen[0], batches_seen[tiny_recipe.stem.steps]
    assert stem_captions != judge_captions
    drawn = [name for name, tensor in stem.items() if tensor.ndim > 1]
    assert drawn
    assert not any(torch.equal(stem[name], judge[name]) for name in drawn)
