import json

import numpy as np
import pytest

from mirror_modules.data import CocoCaptions
from tests.layouts import captions_of, make_coco

pytest.importorskip("PIL.Image")


@pytest.fixture
def root(tmp_path):
    return make_coco(tmp_path)


@pytest.mark.parametrize("year", ["2017", "2014"])
def test_samples_match_their_files(tmp_path, year):
    root = make_coco(tmp_path, year=year)
    for split, numbers in (("train", range(6)), ("validation", (6, 7, 8))):
        coco = CocoCaptions(root, split=split, resolution=13)
        assert [sorted(sample.captions) for sample in coco] == [sorted(captions_of(i)) for i in numbers]
        assert len({sample.class_id for sample in coco}) == len(coco)
        assert all(sample.image.shape == (13, 13, 3) and sample.image.dtype == np.uint8 for sample in coco)


def test_both_splits_are_from_one_year(root):
    """The splits of 2014 share images with those of 2017."""
    make_coco(root, year="2014")
    (root / "annotations" / "captions_val2017.json").unlink()
    for split in ("train", "validation"):
        assert all("2014" in entry.image.parent.name for entry in CocoCaptions(root, split=split).entries)
    (root / "annotations" / "captions_train2014.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no annotations/captions_val2017.json"):
        CocoCaptions(root, split="validation")


@pytest.mark.parametrize("part", ["annotations/captions_train2017.json", "train2017"])
def test_a_missing_part_of_the_layout_is_named(root, part):
    (root / part).rename(root / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"has no {part}; the folder must hold train2017/"):
        CocoCaptions(root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "captions_train2017.json is damaged: it is not JSON"),
        ("[" * 100_000, "captions_train2017.json is damaged: it is not JSON"),
        ("[]", "captions_train2017.json has no list 'images'; expected a file of COCO captions"),
        ('{"images": []}', "captions_train2017.json has no list 'annotations'"),
        ('{"images": [], "annotations": []}', "there is no image in the train split of"),
    ],
)
def test_invalid_annotation_files_are_refused(root, content, message):
    (root / "annotations" / "captions_train2017.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        CocoCaptions(root)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"file_name": None}, ValueError, "image 2 must have an id and a file_name"),
        ({"file_name": "../x.jpg"}, ValueError, r"image 2 is '../x.jpg', which is not in the folder train2017"),
        ({"id": 7}, ValueError, r"image 2 repeats the id or file name of another image \(7, 000000000002.jpg\)"),
        ({"file_name": "000000000001.jpg"}, ValueError, "image 2 repeats the id or file name of another image"),
        ({"file_name": "x.jpg"}, FileNotFoundError, r"train2017.json describes .*x.jpg, which does not exist"),
        ({"id": 8}, ValueError, r"train2017.json holds no caption of 000000000002.jpg"),
    ],
)
def test_invalid_images_are_refused_or_skipped(root, change, error, message):
    path = root / "annotations" / "captions_train2017.json"
    content = json.loads(path.read_text())
    content["images"][2].update(change)
    path.write_text(json.dumps(content))
    with pytest.raises(error, match=message):
        CocoCaptions(root)
    coco = CocoCaptions(root, on_error="list")
    assert (len(coco), len(coco.report.skipped)) == (5, 1)


def test_captions_of_unlisted_images_are_ignored(root):
    path = root / "annotations" / "captions_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"] += [{"image_id": 9999, "caption": "nothing"}, {"image_id": 7}, 3, {"caption": "x"}]
    path.write_text(json.dumps(content))
    assert sum(len(sample.captions) for sample in CocoCaptions(root)) == 18


@pytest.mark.parametrize("listed", ["000000000002.JPG", ".\\000000000002.jpg", " 000000000002.jpg"])
def test_a_listed_file_is_found_in_another_spelling(root, listed):
    path = root / "annotations" / "captions_train2017.json"
    content = json.loads(path.read_text())
    expected = CocoCaptions(root).entries
    content["images"][2]["file_name"] = listed
    path.write_text(json.dumps(content))
    assert CocoCaptions(root).entries == expected
    (root / "train2017" / "000000000002.jpg").rename(root / "train2017" / "2.jpg")
    with pytest.raises(FileNotFoundError, match=r"2.(jpg|JPG), which does not exist \(similar: 2.jpg\); fix it"):
        CocoCaptions(root)
