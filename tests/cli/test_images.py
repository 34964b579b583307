"""The commands `generate` and `describe`."""

import numpy as np
import pytest
import torch
from PIL import Image

from mirror_modules import MirrorGAN, Vocabulary
from mirror_modules.cli import images
from tests.cli.commands import CAPTION, assert_rejected, run


def test_the_same_seed_and_captions_give_the_same_bytes(capsys, model, tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        status, out, _ = run(capsys, "generate", model, CAPTION, "--seed", seed, "--out", tmp_path / f"{name}.png")
        assert (status, out.strip()) == (0, f"{tmp_path / name}.png: seed {seed}, {CAPTION}")
    pictures = [(tmp_path / f"{name}.png").read_bytes() for name in "abc"]
    assert pictures[0] == pictures[1] != pictures[2]


def read(file):
    with Image.open(file) as image:
        return np.asarray(image)


def test_one_image_is_written_as_it_is_and_equals_that_of_python(capsys, model, tmp_path):
    run(capsys, "generate", model, CAPTION, "--seed", 3, "--out", tmp_path / "f.png")
    expected = MirrorGAN.from_pretrained(model).generate(CAPTION, seed=3, output="pil")[0]
    assert np.array_equal(read(tmp_path / "f.png"), np.asarray(expected))


def test_several_images_are_numbered_and_each_can_be_generated_alone(capsys, model, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "BATCH", 3)
    out = tmp_path / "new" / "f.png"
    words = ("generate", model, CAPTION, "red petals", "--images", 2, "--seed", 5, "--out", out)
    status, printed, _ = run(capsys, *words)
    files = [out.with_name(f"f-00{i}.png") for i in range(4)]
    captions = [CAPTION, CAPTION, "red petals", "red petals"]
    assert status == 0
    assert printed.splitlines() == [
        f"{file}: seed {seed}, {caption}" for file, seed, caption in zip(files, (5, 6, 7, 8), captions)
    ]
    assert sorted(out.parent.iterdir()) == files
    for seed, file, caption in zip((5, 6, 7, 8), files, captions):
        run(capsys, "generate", model, caption, "--seed", seed, "--out", tmp_path / "alone.png")
        assert np.abs(read(file).astype(int) - read(tmp_path / "alone.png")).max() <= 1


def test_the_suffix_selects_the_format(capsys, model, tmp_path):
    for suffix, name in (("jpg", "JPEG"), ("webp", "WEBP"), ("PNG", "PNG")):
        assert run(capsys, "generate", model, CAPTION, "--out", tmp_path / f"f.{suffix}")[0] == 0
        with Image.open(tmp_path / f"f.{suffix}") as image:
            assert (image.format, image.size) == (name, (16, 16))
    result = run(capsys, "generate", model, CAPTION, "--out", tmp_path / "f.gif")
    assert_rejected(result, "--out: 'f.gif' must end in .png, .jpg, .jpeg, .webp, .bmp, .tif or .tiff.")


def test_a_grid_holds_all_images_with_or_without_captions(capsys, model, tmp_path):
    words = ("generate", model, CAPTION, "red petals", "--grid", "--images", 3, "--out", tmp_path / "grid.png")
    assert run(capsys, *words)[1].split() == [str(tmp_path / "grid.png")]
    captioned = read(tmp_path / "grid.png")
    run(capsys, *words, "--no-captions", "--scale", 2)
    bare = read(tmp_path / "grid.png")
    assert bare.shape == (2 * (16 * 2 + 2) - 2, 4 * (16 * 2 + 2) - 2, 3)
    assert captioned.shape[0] > 2 * 16 * 4 + 20
    assert list(tmp_path.glob("*.png")) == [tmp_path / "grid.png"]


@pytest.mark.parametrize("words", [["--scale", 2], ["--no-captions"]])
def test_options_of_the_grid_need_a_grid(capsys, model, tmp_path, words):
    result = run(capsys, "generate", model, CAPTION, "--out", tmp_path / "f.png", *words)
    assert_rejected(result, f"{words[0]} needs --grid")


def test_captions_are_read_from_a_file(capsys, model, tmp_path):
    file = tmp_path / "captions.txt"
    file.write_bytes("\ufeffa red flower\r\n\r\n  red petals \n".encode())
    words = ("generate", model, "--captions", file, "--out", tmp_path / "f.png")
    status, out, _ = run(capsys, *words)
    assert status == 0
    assert [line.split(", ")[1] for line in out.splitlines()] == ["a red flower", "red petals"]
    file.write_text("\n \n")
    assert_rejected(run(capsys, *words), "captions.txt has no caption; write one per line")
    file.write_bytes(b"\xff\xfe")
    assert_rejected(run(capsys, *words), "captions.txt is not UTF-8 text")


def test_captions_that_cannot_be_read_and_long_ones(capsys, model, tmp_path):
    words = ("generate", model, "--out", tmp_path / "f.png")
    missing = run(capsys, *words, "--captions", tmp_path / "none.txt")
    assert_rejected(missing, "none.txt cannot be read", "must be a text file with one caption per line")
    assert_rejected(run(capsys, *words, "--captions", tmp_path), "cannot be read")
    status, _, err = run(capsys, *words, "very " * 90 + CAPTION)
    assert status == 0
    assert "words of a caption, not all of 'very very" in err


def test_a_file_in_place_of_a_caption_is_pointed_to_captions(capsys, model, tmp_path):
    (tmp_path / "captions.txt").write_text(CAPTION)
    result = run(capsys, "generate", model, tmp_path / "captions.txt", "--out", tmp_path / "f.png")
    assert_rejected(result, "is a file, not a caption; to read captions from it, use --captions")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", 0], "--images must be at least 1"),
        (["--best-of", 0], "--best-of must be at least 1"),
        (["--grid", "--scale", 0], "--scale must be at least 1, but it is 0"),
        (["--resolution", 32], "resolution must be one of 8, 16"),
        (["--truncation", 0], "truncation must be above 0"),
        (["--seed", -1], "seed must be a whole number from 0"),
    ],
)
def test_values_out_of_range_are_rejected(capsys, model, tmp_path, words, message):
    assert_rejected(run(capsys, "generate", model, CAPTION, "--out", tmp_path / "f.png", *words), message)


def test_truncation_and_resolution_reach_the_model(capsys, model, tmp_path):
    run(capsys, "generate", model, CAPTION, "--truncation", 0.5, "--resolution", 8, "--out", tmp_path / "f.png")
    expected = MirrorGAN.from_pretrained(model).generate(CAPTION, seed=0, truncation=0.5, resolution=8, output="pil")[0]
    assert np.array_equal(read(tmp_path / "f.png"), np.asarray(expected))


def test_the_best_of_several_is_written_with_its_seed(capsys, model, tmp_path, monkeypatch):
    monkeypatch.setattr("mirror_modules.cli.images.BATCH", 2)
    words = ["generate", model, CAPTION, "--images", 3, "--best-of", 4, "--seed", 7, "--out", tmp_path / "f.png"]
    _, out, _ = run(capsys, *words)
    seeds = [int(line.split("seed ")[1].split(",")[0]) for line in out.splitlines()]
    assert all(7 + 4 * i <= seed < 11 + 4 * i for i, seed in enumerate(seeds))
    loaded = MirrorGAN.from_pretrained(model)
    assert seeds == loaded.best_seeds(CAPTION, 4, images_per_caption=3, seed=7)
    (expected,) = loaded.generate(CAPTION, seed=seeds[1], output="pil")
    assert np.array_equal(read(tmp_path / "f-001.png"), np.asarray(expected))


def test_a_run_in_place_of_its_model_is_pointed_to_the_model(capsys, model):
    assert_rejected(run(capsys, "generate", model.parent, CAPTION), f"did you mean {model}?")


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


def test_describe_reads_the_images_of_a_folder(capsys, model, tmp_path):
    folder = tmp_path / "images"
    run(capsys, "generate", model, CAPTION, "--images", 2, "--out", folder / "f.jpg")
    (folder / "notes.txt").write_text("text")
    (folder / "._f.jpg").write_bytes(b"")
    status, out, _ = run(capsys, "describe", model, folder)
    assert status == 0
    assert [line.split(": ")[0] for line in out.splitlines()] == [str(folder / f"f-00{i}.jpg") for i in range(2)]
    (folder / "f-000.jpg").write_bytes(b"")
    result = run(capsys, "describe", model, folder)
    assert_rejected(result, "f-000.jpg cannot be read as an image (it is empty)")
    assert result[1].startswith(f"{folder / 'f-001.jpg'}: ")
    (tmp_path / "empty").mkdir()
    assert_rejected(run(capsys, "describe", model, tmp_path / "empty"), "empty has no image")


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
    assert_rejected(run(capsys, "generate", model, CAPTION, "--out", model), "is a folder; give the name of a file")
    assert (tmp_path / "file").read_text() == "text"
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_a_picture_too_large_for_memory_is_rejected(capsys, model, tmp_path):
    assert_rejected(
        run(capsys, "generate", model, CAPTION, "--grid", "--scale", 10**13, "--out", tmp_path / "x.png"),
        "Unable to allocate",
    )
