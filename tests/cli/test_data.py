"""The commands `data inspect` and `data prepare`."""

import io
import os
import sys

import pytest
from PIL import Image

from mirror_modules.cli import main
from tests.cli.commands import assert_rejected, run
from tests.layouts import make_coco, make_folder


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
        ("data", "is a folder; give the name of a file, such as"),
        ("file/x/sheet.png", "nothing can be written into"),
        ("sheet", "--out: 'sheet' must end in .png, .jpg"),
    ):
        result = run(capsys, "data", "inspect", root, "--out", tmp_path / out)
        assert_rejected(result, message)
        assert "images" not in result[1]

    def raise_disk_full(*_):
        raise OSError(28, "No space left on device", ".sheet.png.x1y2z3")

    monkeypatch.setattr("mirror_modules.pictures.saving.save_images", raise_disk_full)
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


def test_help_of_data_lists_its_commands(capsys):
    status, out, _ = run(capsys, "data", "--help")
    assert status == 0
    assert "inspect PATH" in out
    assert "prepare PATH OUT" in out


def test_the_suffix_selects_the_format_of_the_sheet(capsys, tmp_path):
    root = make_coco(tmp_path / "data")
    assert run(capsys, "data", "inspect", root, "--out", tmp_path / "sheet.jpg")[0] == 0
    with Image.open(tmp_path / "sheet.jpg") as sheet:
        assert sheet.format == "JPEG"
