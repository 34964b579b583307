"""The command `study`."""

import json

import pytest
import torch

from mirror_modules import MirrorGAN
from mirror_modules.cli.study import StudyOptions
from mirror_modules.evaluation.study.plan import ANSWERS_FORMAT, StudyKey
from tests.cli.commands import assert_rejected, flags, run

CAPTIONS = ["a red flower", "red petals", "a flower with petals"]


@pytest.fixture
def other(model, tmp_path):
    """The model with other weights."""
    changed = MirrorGAN.from_pretrained(model)
    with torch.no_grad():
        for parameter in changed.generator.parameters():
            parameter.mul_(1.5)
    changed.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


@pytest.fixture
def captions(tmp_path):
    file = tmp_path / "captions.txt"
    file.write_text("\n".join(CAPTIONS))
    return file


def test_help_shows_every_option_with_its_default(capsys):
    status, out, _ = run(capsys, "study", "--help")
    assert status == 0
    names = [name for name in flags(StudyOptions) if name != "runs"]
    assert len(names) == 10
    for name in names:
        assert f"--{name} " in out
    assert out.count("default:") >= len(names)


def test_a_study_is_written_and_its_answers_are_summarized(capsys, model, other, captions, tmp_path):
    folder = tmp_path / "new" / "study"
    words = ("study", model, other, "--captions", captions, "--out", folder, "--repeats", 1, "--raters", 3)
    status, out, _ = run(capsys, *words)
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == "3 captions; each rater sees 3 pairs, and 1 of them a second time."
    assert lines[2:4] == ["    1  ±37.5 percentage points", "    3  ±27.3 to ±37.5 percentage points"]
    page = folder / "study.html"
    assert (
        lines[-2]
        == f"Send {page} (0.0 MB) to the raters; keep {folder / 'key.json'}, which names the run of each image."
    )
    assert lines[-1] == f"Open {page}"

    key = StudyKey.read(folder)
    left, right = (next(name for name, each in key.images.items() if each[:2] == (run, 0)) for run in (0, 1))
    answers = [{"left": left, "right": right, "realism": "left", "match": "right"}]
    content = {"format": ANSWERS_FORMAT, "study": key.study, "rater": 2, "token": "t", "answers": answers}
    (tmp_path / "answers.json").write_text(json.dumps(content))
    status, out, _ = run(capsys, "study", "--results", tmp_path / "answers.json", "--out", folder)
    assert (status, out) == (0, (folder / "results.md").read_text())
    assert f"| looks more real | {model.as_posix()} | {other.as_posix()} | 100.0 (" in out
    assert f"| matches the caption better | {model.as_posix()} | {other.as_posix()} | 0.0 (" in out
    content["study"] = "another"
    (tmp_path / "answers.json").write_text(json.dumps(content))
    result = run(capsys, "study", "--results", tmp_path / "answers.json", "--out", folder)
    assert_rejected(result, "has the answers to study 'another', but the folder holds study")


def test_options_reach_the_function(capsys, monkeypatch, model, other, captions, tmp_path):
    received = {}

    def record(runs, out, **options):
        received.update(options, runs=runs, out=out)
        raise ValueError("not made")

    monkeypatch.setattr("mirror_modules.evaluation.make_study", record)
    options = {"max-captions": 2, "pairs": 4, "repeats": 5, "raters": 6, "seed": 7, "resolution": 8}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    result = run(
        capsys, "study", model, other, "--out", tmp_path / "s", "--captions", captions, "--device", "cpu", *words
    )
    assert_rejected(result, "mirror-modules study: not made")
    expected = {name.replace("-", "_"): value for name, value in options.items()}
    assert received == {
        **expected,
        "captions": CAPTIONS,
        "device": "cpu",
        "runs": (model, other),
        "out": tmp_path / "s",
    }


def test_invalid_words_are_rejected(capsys, model, other, captions, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_rejected(run(capsys, "study"), "runs must be two or more folders")
    assert_rejected(run(capsys, "study", model, other), "captions must be given", "with --captions FILE")
    assert_rejected(run(capsys, "study", model, "none"), "there is no folder none")
    missing = run(capsys, "study", model, other, "--captions", "none.txt")
    assert_rejected(missing, "--captions none.txt cannot be read")
    result = run(capsys, "study", model, "--results", "answers.json")
    assert_rejected(result, "--results summarizes answers to a study that exists", f"{model} was given")
    none = run(capsys, "study", "--results", "--out", tmp_path)
    assert_rejected(none, "--results needs one or more files of answers, which raters saved from the page")
    assert_rejected(run(capsys, "study", "--results", "answers.json"), "study holds no study: key.json is missing")
    assert not (tmp_path / "study").exists()
