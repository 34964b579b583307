"""Phases run alone, reuse what is there, repeat by their seed, and never destroy what a folder holds."""

import dataclasses
import json

import pytest
import torch

from mirror_modules import MirrorGAN
from mirror_modules.training import loop
from mirror_modules.training.loop import train


def losses(folder):
    lines = [json.loads(line) for line in folder.log.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


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


def test_another_seed_gives_other_losses(tiny_run, tiny_recipe, tmp_path):
    other = train(dataclasses.replace(tiny_recipe, seed=1), tmp_path / "other", phases=["stem"])
    assert losses(other)[0] != losses(tiny_run)[0]


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


def test_a_missing_predecessor_is_named(tiny_recipe, tmp_path):
    with pytest.raises(ValueError, match="phase 'glam' needs phase 'stream'"):
        train(tiny_recipe, tmp_path / "run", phases=["stem", "glam"])
    assert not (tmp_path / "run").exists()


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


def test_an_interrupted_phase_starts_anew(run_copy, tiny_run, tiny_recipe, monkeypatch):
    run_copy.weights("glam").unlink()
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
    monkeypatch.undo()

    train(tiny_recipe, run_copy.path)
    in_order = sorted(losses(run_copy), key=lambda line: (line["phase"], line["step"]))
    assert in_order == sorted(losses(tiny_run), key=lambda line: (line["phase"], line["step"]))
    assert run_copy.weights("glam").read_bytes() == tiny_run.weights("glam").read_bytes()


def test_the_saved_model_holds_the_averaged_generator_and_the_trained_parts(tiny_run):
    from safetensors.torch import load_file

    model = MirrorGAN.from_pretrained(tiny_run.model)
    painter, stem, captioner = (load_file(tiny_run.weights(phase)) for phase in ("glam", "stem", "stream"))
    state = model.state_dict()
    for saved, prefix in ((painter, ""), (captioner, "captioner."), (stem, "")):
        shared = {f"{prefix}{name}": tensor for name, tensor in saved.items() if f"{prefix}{name}" in state}
        assert shared
        assert all(torch.equal(state[name], tensor) for name, tensor in shared.items())
