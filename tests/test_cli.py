"""The command line: its output and files, and that errors are one line with exit status 2."""

import dataclasses
import io
import os
import shutil
import sys

import pytest
import torch
from PIL import Image

from mirror_modules import MirrorGAN, MirrorGANConfig, Vocabulary, cli
from mirror_modules.cli import main
from mirror_modules.training.recipes import demo
from tests.layouts import make_coco, make_folder

CAPTION = "a red flower"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    config = MirrorGANConfig(
        embedding_dim=7,
        word_dim=10,
        noise_dim=5,
        condition_dim=6,
        channels=3,
        resolutions=(8, 16),
        captioner_backbone="conv",
        captioner_embedding_dim=11,
        captioner_hidden_dim=13,
    )
    folder = tmp_path_factory.mktemp("saved") / "model"
    MirrorGAN(config, Vocabulary(["a", "red", "flower", "with", "petals"])).save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def run(capsys, *words):
    """Exit status, stdout and stderr of a command."""
    try:
        status = main([str(word) for word in words])
    except SystemExit as error:
        status = error.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def assert_rejected(result, *fragments):
    """Require exit status 2 and a single line on stderr with these fragments."""
    status, _, err = result
    assert status == 2
    assert len(err.strip().splitlines()) == 1
    for fragment in fragments:
        assert fragment in err


def flags(record, prefix=""):
    """Names of a command's options: the fields of its dataclass, nested ones too."""
    for field in dataclasses.fields(record):
        name = prefix + field.name.replace("_", "-")
        value = getattr(record, field.name, None)
        if dataclasses.is_dataclass(value):
            yield from flags(value, "" if name == "recipe" else f"{name}.")
        elif field.name not in ("model_dir", "captions", "images", "run_dir"):
            yield name


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("train", cli.TrainOptions(demo())),
        ("generate", cli.GenerateOptions),
        ("describe", cli.DescribeOptions),
        ("evaluate", cli.EvaluateOptions),
        ("ablate", cli.AblateOptions(demo())),
    ],
)
def test_help_shows_every_option_with_its_default(capsys, command, options):
    status, out, _ = run(capsys, command, "--help")
    assert status == 0
    names = list(flags(options))
    assert names
    for name in names:
        # A boolean option is listed as --x, --no-x.
        parent, _, last = name.rpartition(".")
        assert f"--{name} " in out or f"--{name}," in out or f"--{parent}.no-{last}" in out
    assert out.count("default:") >= len(names)


def test_without_a_command_the_usage_is_printed(capsys):
    assert run(capsys)[0] == 2
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert all(command in out for command in ("train", "generate", "describe", "evaluate", "data inspect"))


def test_help_of_data_inspect_shows_every_option_with_its_default(capsys):
    status, out, _ = run(capsys, "data", "inspect", "--help")
    assert status == 0
    for name in ("source", "out", "resolution", "max-words", "min-count"):
        assert f"--{name} " in out
    assert out.count("default:") == 5


def test_data_inspect_summarizes_a_folder(capsys, tmp_path):
    root = make_coco(tmp_path / "data")
    (root / "train2017" / "000000000002.jpg").write_bytes(b"")
    status, out, _ = run(capsys, "data", "inspect", root, "--out", tmp_path / "new" / "sheet.png", "--resolution", 16)
    assert status == 0
    assert f"{root} is read as 'coco'" in out
    assert "damaged: 1 of 9" in out
    assert "000000000002.jpg cannot be read as an image (it is empty)" in out
    assert f"Open {tmp_path / 'new' / 'sheet.png'}" in out
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        assert sheet.width == 4 * 128 + 3 * 12


def test_data_inspect_without_readable_images_writes_no_sheet(capsys, tmp_path):
    root = make_coco(tmp_path / "data", 1, 1)
    for path in root.glob("*/*.jpg"):
        path.write_bytes(b"")
    status, out, _ = run(capsys, "data", "inspect", root, "--out", tmp_path / "sheet.png")
    assert status == 0
    assert "damaged: 2 of 2" in out
    assert "Open" not in out
    assert not (tmp_path / "sheet.png").exists()


def test_an_unwritable_sheet_is_rejected_before_files_are_read(capsys, tmp_path, monkeypatch):
    root = make_coco(tmp_path / "data")
    (tmp_path / "file").write_text("text")
    for out, message in (
        ("data", "is a folder; give the name of a PNG file"),
        ("file/x/sheet.png", "nothing can be written into"),
    ):
        result = run(capsys, "data", "inspect", root, "--out", tmp_path / out)
        assert_rejected(result, message)
        assert "images" not in result[1]

    def raise_disk_full(*_):
        raise OSError(28, "No space left on device", ".sheet.png.x1y2z3")

    monkeypatch.setattr("mirror_modules.pictures.grids.write_png", raise_disk_full)
    result = run(capsys, "data", "inspect", root, "--out", tmp_path / "sheet.png")
    assert_rejected(result, f"--out {tmp_path / 'sheet.png'} cannot be written (No space left on device).")
    assert "images" in result[1]


def test_data_inspect_reads_a_prepared_folder_of_small_images(capsys, tmp_path):
    root = make_coco(tmp_path / "data")
    assert run(capsys, "data", "prepare", root, tmp_path / "cache", "--resolution", 13)[0] == 0
    status, out, _ = run(capsys, "data", "inspect", tmp_path / "cache", "--out", tmp_path / "sheet.png")
    assert status == 0
    assert f"Open {tmp_path / 'sheet.png'}" in out


@pytest.mark.skipif(sys.platform != "linux", reason="file names of other systems are always Unicode")
def test_unprintable_file_names_are_escaped(tmp_path, monkeypatch):
    root = make_folder(tmp_path / os.fsdecode("한".encode() + b"\xff"))
    (root / "train" / "image0.png").rename(root / "train" / os.fsdecode(b"\xff.png"))
    for encoding in ("ascii", "utf-8"):
        printed = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding))
        assert main(["data", "inspect", str(root), "--out", str(tmp_path / "sheet.png")]) == 0
        sys.stdout.flush()
        text = printed.getvalue().decode(encoding)
        assert ("한" in text) == (encoding == "utf-8")
        assert r"\udcff.png has no captions beside it" in text


def test_help_of_data_prepare_shows_every_option_with_its_default(capsys):
    status, out, _ = run(capsys, "data", "prepare", "--help")
    assert status == 0
    for name in ("resolution", "source", "on-error", "shard-size"):
        assert f"--{name} " in out
    assert out.count("default:") == 3


def test_data_prepare_writes_a_folder(capsys, tmp_path):
    root = make_coco(tmp_path / "data", training=23)
    (root / "train2017" / "000000000002.jpg").write_bytes(b"")
    words = ("data", "prepare", root, tmp_path / "cache", "--resolution", 13)
    assert_rejected(run(capsys, *words), "000000000002.jpg cannot be read as an image (it is empty); fix it, or skip")
    status, out, _ = run(capsys, *words, "--on-error", "skip", "--shard-size", 7)
    assert status == 0
    assert f"{tmp_path / 'cache'}: 22 train, 3 validation images of 13 x 13 pixels, from 'coco'" in out
    assert f"skipped: 1, listed in {tmp_path / 'cache' / 'prepared.json'}" in out
    assert len(list((tmp_path / "cache").glob("train-*.npy"))) == 4
    assert_rejected(run(capsys, *words), "was prepared with other settings or from other originals; remove it")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected inspect or prepare, but got nothing; write `mirror-modules data inspect PATH`"),
        (["clean"], "expected inspect or prepare, but got 'clean'"),
        (["inspect", "nowhere"], "there is no folder nowhere"),
        (["inspect", "."], "has no known format"),
        (["inspect", ".", "--resolution", "0"], "resolution must be a whole number of at least 1, but it is 0"),
        (["inspect", ".", "--source", "coco"], "has no annotations/captions_train2017.json"),
    ],
)
def test_invalid_arguments_of_data_are_rejected(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert_rejected(run(capsys, "data", *words), message)
    assert not any(tmp_path.iterdir())


def test_the_same_seed_and_captions_give_the_same_bytes(capsys, model, tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        status, out, _ = run(capsys, "generate", model, CAPTION, "--seed", seed, "--out", tmp_path / f"{name}.png")
        assert (status, out.strip()) == (0, str(tmp_path / f"{name}.png"))
    pictures = [(tmp_path / f"{name}.png").read_bytes() for name in "abc"]
    assert pictures[0] == pictures[1] != pictures[2]


def test_separate_writes_one_file_per_caption(capsys, model, tmp_path):
    status, out, _ = run(
        capsys, "generate", model, CAPTION, "red petals", "--out", tmp_path / "new" / "f.png", "--separate"
    )
    files = [tmp_path / "new" / "f-000.png", tmp_path / "new" / "f-001.png"]
    assert (status, out.split()) == (0, [str(file) for file in files])
    assert [Image.open(file).size for file in files] == [(16, 16)] * 2


def test_unknown_words_are_named_in_a_single_warning(capsys, model, tmp_path):
    status, _, err = run(capsys, "generate", model, "a zebra with red wings", "--out", tmp_path / "z.png")
    assert status == 0
    assert len(err.strip().splitlines()) == 1
    assert "zebra, wings" in err


def test_describe_captions_a_generated_image(capsys, model, tmp_path):
    run(capsys, "generate", model, CAPTION, "--out", tmp_path / "f.png")
    status, out, _ = run(capsys, "describe", model, tmp_path / "f.png")
    assert status == 0
    assert out.startswith(f"{tmp_path / 'f.png'}: ")


def test_an_unknown_command_is_rejected(capsys):
    assert_rejected(run(capsys, "draw"), "'draw'", "train, generate, describe, evaluate")


def test_an_unknown_recipe_is_rejected_with_a_suggestion(capsys):
    assert_rejected(run(capsys, "train", "dmo"), "unknown recipe 'dmo'", "Did you mean 'demo'?")


def test_an_invalid_option_is_rejected(capsys):
    assert run(capsys, "train", "--steps", "many")[0] == 2
    assert run(capsys, "generate", "--nonsense")[0] == 2


@pytest.mark.parametrize("caption", ["", "?!", "  "])
def test_a_caption_without_a_word_is_rejected(capsys, model, tmp_path, caption):
    assert_rejected(run(capsys, "generate", model, caption, "--out", tmp_path / "x.png"), "has no word")
    assert not (tmp_path / "x.png").exists()


def test_a_single_caption_without_a_word_is_named_and_nothing_is_written(capsys, model, tmp_path):
    assert_rejected(run(capsys, "generate", model, CAPTION, "...", "--out", tmp_path / "x.png"), "caption 1 ('...')")
    assert not list(tmp_path.glob("*.png"))


def test_generate_without_captions_is_rejected(capsys, model):
    assert_rejected(run(capsys, "generate", model), "there is no caption")


def test_a_folder_that_is_no_model_is_rejected(capsys, tmp_path):
    assert_rejected(run(capsys, "generate", tmp_path / "nowhere", CAPTION), "is not a model folder")


def damage(model, how):
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    if how == "truncated":
        weights.write_bytes(content[: len(content) // 2])
    elif how == "header":
        weights.write_bytes(b"\xff" * 16 + content[16:])
    elif how == "text":
        weights.write_text("not weights")
    elif how == "foreign":
        from safetensors.torch import save_file

        save_file({"other.weight": torch.zeros(3)}, str(weights))
    elif how == "vocabulary":
        Vocabulary(["a", "red"]).save(model / "vocabulary.json")
    elif how == "config":
        (model / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "damaged"),
        ("header", "damaged"),
        ("text", "damaged"),
        ("foreign", "weights of another module"),
        ("vocabulary", "entries"),
        ("config", "not JSON"),
    ],
)
def test_a_damaged_model_is_rejected_and_existing_files_are_kept(capsys, model, tmp_path, how, message):
    picture = tmp_path / "kept.png"
    picture.write_bytes(b"an older picture")
    damage(model, how)
    assert_rejected(run(capsys, "generate", model, CAPTION, "--out", picture), message)
    assert picture.read_bytes() == b"an older picture"


def test_unreadable_images_are_named(capsys, model, tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    assert_rejected(run(capsys, "describe", model, tmp_path / "text.png"), "text.png", "cannot be read as an image")
    assert_rejected(run(capsys, "describe", model, tmp_path / "none.png"), "none.png")
    assert_rejected(run(capsys, "describe", model), "there is no image")


def test_an_unwritable_output_is_rejected(capsys, model, tmp_path):
    (tmp_path / "file").write_text("text")
    assert_rejected(run(capsys, "generate", model, CAPTION, "--out", tmp_path / "file" / "f.png"))
    assert_rejected(run(capsys, "generate", model, CAPTION, "--out", model), "directory")
    assert (tmp_path / "file").read_text() == "text"
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


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


def test_a_picture_too_large_for_memory_is_rejected(capsys, model, tmp_path):
    assert_rejected(
        run(capsys, "generate", model, CAPTION, "--scale", 10**13, "--out", tmp_path / "x.png"), "Unable to allocate"
    )


def test_error_messages_of_several_lines_are_joined(capsys, model, monkeypatch):
    def fail(*_, **__):
        raise ValueError("first\nsecond")

    monkeypatch.setattr(MirrorGAN, "from_pretrained", fail)
    assert_rejected(run(capsys, "generate", model, CAPTION), "mirror-modules generate: first second")


def test_an_interruption_is_reported_in_one_line(capsys, model, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(MirrorGAN, "from_pretrained", interrupt)
    status, _, err = run(capsys, "generate", model, CAPTION)
    assert (status, len(err.strip().splitlines())) == (130, 1)
    assert "interrupted." in err
    monkeypatch.setattr("mirror_modules.data.prepare_captions", interrupt)
    status, _, err = run(capsys, "data", "prepare", "data", "cache", "--resolution", 8)
    assert status == 130
    assert "interrupted; finished files are kept, and the same command continues with them." in err


# Options of a complete run of two steps, on few and small images.
SHORT = [
    *("--steps", 2, "--logging.every", 1, "--data.training-images", 23, "--data.validation-images", 19),
    *("--evaluation.candidates", 5, "--evaluation.report-images", 2, "--model.resolutions", 8, 16),
    *("--model.channels", 3, "--model.discriminator-channels", 3, "--model.word-dim", 10),
]


def read_files(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def error_lines(err):
    """The lines of stderr that are not progress bars."""
    return [line for line in err.replace("\r", "\n").splitlines() if line.startswith("mirror-modules")]


def test_train_continues_with_missing_phases_and_evaluates(capsys, tmp_path):
    folder = tmp_path / "run"
    status, out, _ = run(capsys, "train", "demo", "--out", folder, *SHORT, "--phases", "stem", "stream")
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
        (["--evaluation.candidates", 20], "evaluation.candidates=20 needs"),
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_is_rejected(capsys, model):
    assert_rejected(run(capsys, "generate", model, CAPTION, "--device", "cuda"), "torch sees no GPU")


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


def test_missing_metrics_and_skipped_samples_are_reported(capsys, monkeypatch, tmp_path):
    metrics = {
        "candidates": 5,
        "chance": 0.2,
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
    assert not (tmp_path / "out").exists()
