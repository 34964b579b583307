"""Randomly damaged files are read or reported by name, without a crash or a hang."""

import io
import time

import numpy as np
import pytest

from mirror_modules.data import InMemoryCaptions, open_captions
from mirror_modules.stem.vocabulary import split_words
from tests.layouts import make_birds, make_coco, make_flowers, make_folder, make_shards

Image = pytest.importorskip("PIL.Image")

SUFFIXES = ("jpg", "png", "gif", "bmp", "webp", "tiff", "ppm")
MODES = ("RGB", "L", "RGBA", "LA", "P", "1", "CMYK", "I;16", "YCbCr")
TEXTS = (
    "a red bird",
    "빨간 새가 앉아 있다",
    "पक्षी लाल है",
    "🌺👩‍👩‍👧 a bird 🇰🇷",
    "🌺🇰🇷",
    "...!?",
    "\x00\x07 a\x1bbird\x85\u2028sings",
    "é" * 5000,
    " ".join(["long"] * 10_000),
    "\u202eright to left",
    "____ - ____",
    "\u0301\u0302",
    "x\r\ny\rz",
    "",
)
MAX_SECONDS = 20


def encoded(suffix, number):
    """A small image file in one of the modes that its format supports."""
    random = np.random.default_rng(number)
    size = tuple(int(side) for side in random.integers(1, 40, 2))
    image = Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    try:
        mode = MODES[number % len(MODES)]
        changed = image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode)
        changed.save(buffer, "JPEG" if suffix == "jpg" else suffix.upper())
    except (OSError, ValueError, KeyError):
        # Not every format supports every mode.
        buffer = io.BytesIO()
        image.save(buffer, "JPEG" if suffix == "jpg" else suffix.upper())
    return buffer.getvalue()


def damaged(content, random):
    """The same bytes with a random kind of damage."""
    data, position = bytearray(content), int(random.integers(max(len(content), 1)))
    kind = random.integers(8)
    if kind == 0:
        return bytes(data[:position])
    if kind == 1:
        for _ in range(int(random.integers(1, 20))):
            data[int(random.integers(len(data)))] ^= 1 << int(random.integers(8))
    elif kind == 2:
        # Sizes in the header become enormous.
        start = int(random.integers(min(len(data), 40)))
        data[start : start + 4] = b"\xff\xff\xff\x7f"
    elif kind == 3:
        data[position : position + 50] = bytes(len(data[position : position + 50]))
    elif kind == 4:
        data[position:position] = random.bytes(30)
    elif kind == 5:
        del data[position : position + int(random.integers(1, 30))]
    elif kind == 6:
        data[:8] = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0\x00\x10JF", b"GIF89a\xff\xff", b"%!PS-Ado")[
            random.integers(4)
        ]
    else:
        return random.bytes(int(random.integers(200)))
    return bytes(data)


def is_readable(path):
    """Whether Pillow itself decodes the file."""
    try:
        with Image.open(path) as image:
            return image.format != "EPS" and image.convert("RGB") is not None
    except Exception:  # noqa: BLE001
        return False


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.filterwarnings("ignore")
def test_damaged_images(tmp_path, suffix):
    """60 of each format, 420 in all."""
    random, count = np.random.default_rng(len(suffix) + ord(suffix[0])), 60
    (tmp_path / "validation").mkdir()
    (tmp_path / "train").mkdir()
    for i in range(count):
        # Every tenth image is intact.
        content = encoded(suffix, i)
        (tmp_path / "train" / f"{i}.{suffix}").write_bytes(content if i % 10 == 0 else damaged(content, random))
        (tmp_path / "train" / f"{i}.txt").write_text(f"image {i}")
    captions = open_captions(tmp_path, "train", 9, on_error="list")
    assert len(captions) == count
    began = time.process_time()
    loaded = InMemoryCaptions(captions, max_words=5, report=captions.report)
    assert time.process_time() - began < MAX_SECONDS
    reported = {skipped.file for skipped in captions.report.skipped}
    assert len(reported) == len(captions.report.skipped)
    loaded_captions = {caption for (caption,) in loaded.captions}
    for entry in captions.entries:
        assert (str(entry.image) in reported) != (entry.captions[0] in loaded_captions)
        if not is_readable(entry.image):
            # Unless metadata alone is damaged.
            assert str(entry.image) in reported | {ignored.file for ignored in captions.report.ignored}
        elif entry.image.stem.endswith("0"):
            assert str(entry.image) not in reported
    assert 0 < len(reported) < count
    assert all(skipped.reason for skipped in captions.report.skipped)


def test_damaged_captions(tmp_path):
    """180 text files, some of them damaged."""
    random, count = np.random.default_rng(1), 180
    root = make_folder(tmp_path, training=count)
    expected = set()
    for i in range(count):
        path = root / "train" / f"image{i}.txt"
        lines = [TEXTS[j] for j in random.integers(len(TEXTS), size=random.integers(1, 4))]
        content = "\n".join(lines).encode(("utf-8", "utf-8", "utf-8-sig", "utf-16", "cp949")[i % 5], "replace")
        path.write_bytes(damaged(content, random) if i % 3 == 0 and content else content)
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            expected.add(str(path))
        else:
            if not split_words(text):
                expected.add(str(path))
    captions = open_captions(root, "train", 4, on_error="list")
    loaded = InMemoryCaptions(captions, max_words=18, long_captions="subsample", report=captions.report)
    assert {skipped.file for skipped in captions.report.skipped} == expected
    assert len(loaded) == count - len(expected)
    assert 20 < len(expected) < 160
    for captions in loaded.captions:
        for caption in captions:
            assert split_words(caption)
            assert caption.encode("utf-8").decode() == caption
            assert not any(ord(character) < 32 for character in caption)


LISTS = {
    "flowers": (make_flowers, ["trainclasses.txt"]),
    "birds": (
        lambda root: make_birds(root, pickled=True),
        [
            "captions.pickle",
            "train/filenames.pickle",
            "train/class_info.pickle",
            "CUB_200_2011/images.txt",
            "CUB_200_2011/bounding_boxes.txt",
        ],
    ),
    "coco": (make_coco, ["annotations/captions_train2017.json"]),
    "jsonl": (lambda root: make_folder(root, style="jsonl"), ["train/captions.jsonl"]),
    "csv": (lambda root: make_folder(root, style="csv"), ["train/captions.csv"]),
    "shards": (make_shards, ["train-000.tar"]),
}


@pytest.mark.parametrize("name", LISTS)
def test_damaged_lists(tmp_path, name):
    """40 of each list, 400 in all: valid entries are read, and damaged ones are named."""
    make, files = LISTS[name]
    root, random = make(tmp_path), np.random.default_rng(2)
    for file in files:
        path = root / file
        content, refused = path.read_bytes(), 0
        for _ in range(40):
            path.write_bytes(damaged(content, random))
            began = time.process_time()
            try:
                captions = open_captions(root, "train", 5, on_error="list")
            except (ValueError, FileNotFoundError) as error:
                assert str(root) in str(error)  # noqa: PT017
                refused += 1
            else:
                assert all(0 <= entry.class_id < 2**63 for entry in captions.entries)
                for i in range(len(captions)):
                    try:
                        assert captions[i].image.shape == (5, 5, 3)
                    except ValueError as error:
                        assert str(captions.entries[i].image) in str(error)  # noqa: PT017
                refused += len(captions.report.skipped)
            assert time.process_time() - began < MAX_SECONDS
        assert refused > 0
        path.write_bytes(content)
