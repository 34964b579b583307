"""The commands `train`, `recipes`, `evaluate` and `ablate`."""

import pytest

from mirror_modules.training.recipes import RECIPES
from tests.cli.commands import assert_rejected, error_lines, run

# Options of a complete run of two steps, on few and small images.
SHORT = [
    *("--steps", 2, "--logging.every", 1, "--data.training-images", 23, "--data.validation-images", 19),
    *("--evaluation.candidates", 5, "--evaluation.report-images", 2, "--model.resolutions", 8, 16),
    *("--model.channels", 3, "--model.discriminator-channels", 3, "--model.word-dim", 10),
]


def test_an_unknown_recipe_is_rejected_with_a_suggestion(capsys):
    assert_rejected(run(capsys, "train", "dmo"), "unknown recipe 'dmo'", "Did you mean 'demo'?")


def test_recipes_for_photographs_need_a_folder(capsys, tmp_path):
    assert_rejected(run(capsys, "train", "flowers-64", "--out", tmp_path / "run"), "--data PATH")
    assert_rejected(
        run(capsys, "train", "flowers-64", "--out", tmp_path / "run", "--data", tmp_path / "nothing"), "nothing"
    )
    assert not (tmp_path / "run").exists()


def test_evaluate_rejects_folders_that_are_no_run(capsys, model, tmp_path):
    assert_rejected(run(capsys, "evaluate", tmp_path), "is not a run")
    assert_rejected(run(capsys, "evaluate", tmp_path / "nowhere"), "is not a run")
    assert_rejected(run(capsys, "evaluate", model), "holds no recipe")


def read_files(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_train_continues_with_missing_phases_and_evaluates(capsys, tmp_path):
    folder = tmp_path / "run"
    status, out, _ = run(capsys, "train", "demo", "--out", folder, *SHORT, "--phases", "pretraining", "stem", "stream")
    assert status == 0
    assert "the other phases are not trained yet" in out
    assert_rejected(run(capsys, "evaluate", folder), "lacks phase 'glam'")
    status, out, err = run(capsys, "train", "--out", folder, *SHORT)
    assert (status, error_lines(err)) == (0, [])
    assert f"Open {folder / 'report.html'}" in out
    assert "stem: already trained" in out
    assert len(error_lines(run(capsys, "generate", folder / "model", "a zebra", "--out", tmp_path / "z.png")[2])) == 1

    before = read_files(folder)
    result = run(capsys, "train", "--out", folder, *SHORT, "--seed", 1)
    assert_rejected(result, "seed is 0 there and 1 now", "nothing in it was changed")
    assert read_files(folder) == before

    folder.joinpath("phases", "evaluator.safetensors").write_bytes(b"\xff" * 99)
    before = read_files(folder)
    status, _, err = run(capsys, "evaluate", folder)
    assert (status, len(error_lines(err))) == (2, 1)
    assert "evaluator.safetensors is damaged" in error_lines(err)[0]
    assert read_files(folder) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", 0], "steps must be a whole number of at least 1, but it is 0"),
        (["--steps", -1], "steps must be a whole number of at least 1, but it is -1"),
        (["--seed", -1], "seed must be a whole number from 0"),
        (["--data.validation-images", 1], "evaluation needs at least 2 validation images"),
        (["--model.channels", 0], "channels must be a whole number of at least 1"),
    ],
)
def test_an_invalid_recipe_leaves_no_folder(capsys, tmp_path, options, message):
    status, _, err = run(capsys, "train", "--out", tmp_path / "run", *SHORT, *options)
    assert status == 2
    assert len(error_lines(err)) == 1
    assert message in error_lines(err)[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("out", ["file", "file/run"])
def test_a_file_as_the_run_folder_is_rejected(capsys, tmp_path, out):
    (tmp_path / "file").write_text("text")
    status, _, err = run(capsys, "train", "--out", tmp_path / out, *SHORT)
    assert (status, len(error_lines(err))) == (2, 1)
    assert (tmp_path / "file").read_text() == "text"


def test_steps_apply_to_phases_without_their_own_option(monkeypatch, capsys, tmp_path):
    recipes = []

    def train(recipe, *_, **__):
        recipes.append(recipe)
        raise ValueError("not trained")

    monkeypatch.setattr("mirror_modules.training.loop.train", train)
    assert_rejected(run(capsys, "train", "demo", "--out", tmp_path, "--glam.steps", 8, "--steps", 6), "not trained")
    assert [getattr(recipes[0], phase).steps for phase in ("stem", "stream", "glam", "evaluator")] == [6, 6, 8, 6]
    assert_rejected(
        run(capsys, "train", "demo", "--out", tmp_path, "--steps", 0), "steps must be a whole number of at least 1"
    )


@pytest.mark.parametrize(
    ("words", "expected"), [([], None), (["--fit-classifier"], True), (["--no-fit-classifier"], False)]
)
def test_whether_a_classifier_is_trained(capsys, monkeypatch, tmp_path, words, expected):
    given = []

    def evaluate(*_, fit_classifier, **__):
        given.append(fit_classifier)
        raise ValueError("not evaluated")

    monkeypatch.setattr("mirror_modules.evaluation.evaluation.evaluate", evaluate)
    assert_rejected(run(capsys, "evaluate", tmp_path, *words), "not evaluated")
    assert given == [expected]
    both = ["--fit-classifier", "--no-fit-classifier"]
    assert_rejected(run(capsys, "evaluate", tmp_path, *both), "exclude each other; give one of them")


def test_clip_is_handed_on(capsys, monkeypatch, tmp_path):
    given = []

    def evaluate(*_, clip, **__):
        given.append(clip)
        raise ValueError("not evaluated")

    monkeypatch.setattr("mirror_modules.evaluation.evaluation.evaluate", evaluate)
    assert_rejected(run(capsys, "evaluate", tmp_path), "not evaluated")
    assert_rejected(run(capsys, "evaluate", tmp_path, "--clip", "somebody/clip"), "not evaluated")
    assert given == [None, "somebody/clip"]


def test_missing_metrics_and_skipped_samples_are_reported(capsys, monkeypatch, tmp_path):
    metrics = {
        "candidates": 5,
        "chance": 0.2,
        "cannot_rank": False,
        "reasons": [],
        "evaluators": {},
        "r_precision": {},
        "word_accuracy": {},
        "image_information": {"real": 0.104},
        "not_measured": "there are no classes",
        "skipped": {"training": 1234, "validation": 0},
    }
    monkeypatch.setattr("mirror_modules.evaluation.evaluation.evaluate", lambda *_, **__: metrics)
    status, out, _ = run(capsys, "evaluate", tmp_path)
    assert status == 0
    assert "Without the metrics of --fit-classifier: there are no classes" in out
    assert "Damaged samples skipped: 1,234 of the training split, 0 of the validation split" in out
    del metrics["not_measured"]
    metrics["skipped"] = {"training": 0, "validation": 0}
    assert run(capsys, "evaluate", tmp_path)[1].splitlines()[-3:] == [
        "Pointwise mutual information of image and caption under the captioner, nats per token:",
        "  real         0.10",
        f"Open {tmp_path / 'report.html'}",
    ]


def test_a_missing_config_file_is_named(capsys, tmp_path):
    assert_rejected(
        run(capsys, "train", "demo", "--config", tmp_path / "no.json"), "--config", "no.json", "no such file"
    )
    assert_rejected(run(capsys, "train", "demo", "--config="), "--config", "no such file")


def test_an_unknown_cell_is_rejected_with_a_suggestion(capsys, tmp_path):
    result = run(capsys, "ablate", "--out", tmp_path / "out", "--cells", "weigth 0")
    assert_rejected(result, "--cells: unknown cell 'weigth 0'", "did you mean 'weight 0'?")
    message = (
        "varies the attention and the redescription of MirrorGAN, but 'ppgn-demo' is a recipe of the system 'ppgn'"
    )
    assert_rejected(run(capsys, "ablate", "ppgn-demo"), message, "`mirror-modules compare`")
    assert_rejected(run(capsys, "ablate", "--seed", 3), "--seed has no effect on an ablation", "use --seeds")
    assert not (tmp_path / "out").exists()


def test_recipes_are_listed(capsys):
    status, out, _ = run(capsys, "recipes")
    assert status == 0
    listed = [line.split()[0] for line in out.splitlines() if line.startswith("  ") and not line.startswith("   ")]
    assert sorted(listed) == sorted(RECIPES)
    assert run(capsys, "recipes", "demo")[0] == 2


def test_help_of_train_lists_the_recipes(capsys):
    status, out, _ = run(capsys, "train", "--help")
    assert status == 0
    assert all(f"{name} " in out for name in RECIPES)


def test_a_folder_in_place_of_a_recipe_is_pointed_to_data(capsys, tmp_path):
    result = run(capsys, "train", tmp_path)
    assert_rejected(result, "is a folder, not a recipe; to train on it, write photos-64 --data")


def test_photographs_for_a_recipe_of_drawn_flowers_are_rejected(capsys, tmp_path):
    for command in ("train", "ablate"):
        result = run(capsys, command, "--data", tmp_path, "--out", tmp_path / "run")
        assert_rejected(result, "train photos-64 --data")
        assert not (tmp_path / "run").exists()


@pytest.fixture
def recipes(monkeypatch):
    """The recipes with which `train` and `ablate` are called; neither trains."""
    called = []

    def record(recipe, *_, **__):
        called.append(recipe)
        raise ValueError("not trained")

    monkeypatch.setattr("mirror_modules.training.loop.train", record)
    monkeypatch.setattr("mirror_modules.evaluation.ablation.ablate", record)
    return called


@pytest.mark.parametrize("command", ["train", "ablate"])
def test_steps_and_threads_reach_the_recipe(recipes, capsys, tmp_path, command):
    result = run(capsys, command, "--out", tmp_path, "--steps", 7, "--threads", 3)
    assert_rejected(result, "not trained")
    assert recipes[0].engine.threads == 3
    assert {recipes[0].phase(phase).steps for phase in ("stem", "stream", "glam", "evaluator")} == {7}


@pytest.mark.parametrize("command", ["train", "ablate"])
@pytest.mark.parametrize("flag", ["--from-scratch", "--from_scratch"])
def test_from_scratch_reaches_the_recipe_however_it_is_written(recipes, capsys, tmp_path, command, flag):
    result = run(capsys, command, "flowers-64", "--data", tmp_path, "--out", tmp_path, flag)
    assert_rejected(result, "not trained")
    assert recipes[0].model.image_backbone.name == "conv"


def test_each_attribute_is_printed_for_each_kind_of_image(capsys, monkeypatch, tmp_path):
    shares = {"generated": (0.25, 0.5), "real": (1.0, 0.75)}
    metrics = {
        "candidates": 5,
        "chance": 0.2,
        "cannot_rank": False,
        "reasons": [],
        "evaluators": {},
        "r_precision": {},
        "word_accuracy": {},
        "image_information": {},
        "skipped": {},
        "attributes": {
            name: {"classifier": {"petal_color": {"share": color}, "all": {"share": every}}}
            for name, (color, every) in shares.items()
        },
        "extractor": "small network",
        "features": {
            "generated": {
                "distance_images": 1234,
                "frechet_distance": 12.345,
                "kernel_distance": 0.012345,
                "kernel_distance_standard_error": 0.00123,
                "inception_score": 3.4567,
                "inception_score_deviation": 0.0456,
                "diversity": 0.56789,
                "diversity_standard_error": 0.004145,
            }
        },
        "further_extractors": [
            {
                "extractor": "network without classes",
                "features": {"real": {"distance_images": 7, "frechet_distance": 1.5, "kernel_distance": 0.25}},
            }
        ],
    }
    monkeypatch.setattr("mirror_modules.evaluation.evaluation.evaluate", lambda *_, **__: metrics)
    lines = run(capsys, "evaluate", tmp_path)[1].splitlines()
    start = lines.index("Attribute accuracy, by the attribute classifier:")
    assert [line.split() for line in lines[start + 1 : start + 4]] == [
        ["generated", "real"],
        ["petal", "color", "25.0%", "100.0%"],
        ["all", "50.0%", "75.0%"],
    ]
    figures = "FID 12.3, KID 0.0123 ± 0.001, Inception Score 3.46 ± 0.05, diversity 0.568 ± 0.004 (1,234 images)"
    assert lines[start + 4 : start + 8] == [
        "Features of the extractor: small network",
        f"  generated  {figures}",
        "Features of the extractor: network without classes",
        "  real       FID 1.5, KID 0.25 (7 images)",
    ]


def test_evaluators_that_cannot_rank_are_printed(capsys, monkeypatch, tmp_path):
    def figures(real, cannot, **more):
        return {"chance": 0.01, "generated": {"top1": 0.05}, "real": {"top1": real}, "cannot_rank": cannot, **more}

    result = {
        "description": "a pair",
        "validation": {"images": 7, "all_captions": figures(0.09, True, class_oracle=0.098)},
        "held_out": {"images": 5, "other_classes": figures(0.25, False, text_ceiling={"top1": 0.3})},
    }
    metrics = {"candidates": 100, "chance": 0.01, "r_precision": {}, "word_accuracy": {}, "image_information": {}}
    metrics |= {"skipped": {}, "cannot_rank": True, "reasons": ["one reason", "another"]}
    metrics["evaluators"] = {"second_evaluator": result}
    monkeypatch.setattr("mirror_modules.evaluation.evaluation.evaluate", lambda *_, **__: metrics)
    lines = run(capsys, "evaluate", tmp_path)[1].splitlines()
    assert "R-precision cannot rank these images: one reason; another." in lines
    start = next(i for i, line in enumerate(lines) if line.startswith("R-precision, top 1: generated / real / other"))
    rows = [" ".join(line.split()) for line in lines[start + 1 : start + 3]]
    assert rows == [
        "second evaluator, validation, all captions 5.0% 9.0% - 9.8% 1.0% cannot rank",
        "second evaluator, held out, other classes 5.0% 25.0% 30.0% - 1.0%",
    ]
    assert not any("CLIPScore" in line for line in lines)
    scores = {name: {"mean": mean, "standard_error": 0.05} for name, mean in (("generated", 23.456), ("real", 31.0))}
    metrics["evaluators"]["clip"] = {"description": "CLIP", "held_out": {**result["held_out"], "clip_score": scores}}
    lines = run(capsys, "evaluate", tmp_path)[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("CLIPScore, 100 times the cosine of an image"))
    assert " ".join(lines[start - 1].split()) == "clip, held out, other classes 5.0% 25.0% 30.0% - 1.0%"
    assert lines[start + 1] == "  held out    23.46 ± 0.05  31.00 ± 0.05"
    del metrics["evaluators"]["clip"]
    # A single figure is in the table above already.
    del metrics["evaluators"]["second_evaluator"]["held_out"]
    metrics["cannot_rank"] = False
    printed = run(capsys, "evaluate", tmp_path)[1]
    assert "generated / real" not in printed
    assert "cannot rank" not in printed
