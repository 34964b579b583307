"""`generate --box` and `--points`."""

import json

import pytest
import torch

from mirror_modules import Vocabulary
from mirror_modules.cli import images
from mirror_modules.models import GAWWN, GAWWNConfig
from tests.cli.commands import CAPTION, assert_rejected, run

SIZES = {
    "embedding_dim": 7,
    "word_dim": 6,
    "noise_dim": 5,
    "condition_dim": 6,
    "channels": 2,
    "resolutions": (32,),
    "captioner_backbone": "conv",
    "captioner_embedding_dim": 4,
    "captioner_hidden_dim": 5,
}
# A complete training but for the evaluators, of two steps per phase, on few and small images.
SHORT = [
    *("--steps", 2, "--data.training-images", 23, "--data.validation-images", 19, "--evaluation.candidates", 5),
    *("--model.resolutions", 32, "--model.channels", 2, "--model.discriminator-channels", 3, "--model.word-dim", 6),
    *("--model.keypoint-hidden-dim", 8, "--keypoints.batch-size", 11, "--glam.batch-size", 4),
]


@pytest.fixture(scope="module")
def saved_models(tmp_path_factory):
    torch.manual_seed(0)
    folder, vocabulary = tmp_path_factory.mktemp("gawwn"), Vocabulary(["a", "red", "flower", "with", "petals"])
    names = {"point_names": ("center", "petal 1")}
    for place, options in (("box", {}), ("points", names)):
        model = GAWWN(GAWWNConfig(**SIZES, place=place, **options), vocabulary)
        # Images of more than one shade, so that bytes show the place.
        torch.nn.init.normal_(model.generator.head.weight, std=30)
        if place == "points":
            # Points that are drawn are visible.
            model.keypoint_generator.joint[-2].bias.data.fill_(5)
        model.save_pretrained(folder / place)
    return folder


def written(tmp_path, content):
    path = tmp_path / "points.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_box_places_every_image(capsys, saved_models, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "BATCH", 2)
    words = ("generate", saved_models / "box", CAPTION, "red petals", "--images", 2, "--seed", 3)
    status, _, _ = run(capsys, *words, "--box", 0.5, 0.25, 0.4, 0.3, "--out", tmp_path / "f.png")
    assert status == 0
    model = GAWWN.from_pretrained(saved_models / "box")
    location = torch.tensor([[0.5, 0.25, 0.4, 0.3]])
    for i, caption in enumerate((CAPTION, CAPTION, "red petals", "red petals")):
        expected = model.generate(caption, seed=3 + i, location=location, output="pil")[0]
        assert images_close(tmp_path / f"f-00{i}.png", expected)
    elsewhere = model.generate(CAPTION, seed=3, output="pil")[0]
    assert not images_close(tmp_path / "f-000.png", elsewhere, tolerance=0)


def images_close(path, expected, tolerance=1):
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        return np.abs(np.asarray(image).astype(int) - np.asarray(expected)).max() <= tolerance


def test_points_are_read_by_name_and_null_hides_one(capsys, saved_models, tmp_path):
    path = written(tmp_path, {"petal 1": [0.25, 1], "center": None})
    words = ("generate", saved_models / "points", CAPTION, "--seed", 3, "--best-of", 2, "--points", path)
    assert run(capsys, *words, "--out", tmp_path / "f.png")[0] == 0
    model = GAWWN.from_pretrained(saved_models / "points")
    location = torch.tensor([[[0, 0, -1], [0.25, 1, 1]]])
    expected = model.generate(CAPTION, seed=3, best_of=2, location=location, output="pil")[0]
    assert images_close(tmp_path / "f.png", expected)


@pytest.mark.parametrize(
    ("content", "location"),
    [
        ({"petal 1": [0.25, 1]}, torch.tensor([[[0, 0, 0], [0.25, 1, 1]]])),
        (None, None),
    ],
)
def test_points_that_are_not_given_are_drawn(capsys, saved_models, tmp_path, content, location):
    words = () if content is None else ("--points", written(tmp_path, content))
    status, _, _ = run(capsys, "generate", saved_models / "points", CAPTION, *words, "--out", tmp_path / "f.png")
    assert status == 0
    model = GAWWN.from_pretrained(saved_models / "points")
    assert images_close(tmp_path / "f.png", model.generate(CAPTION, seed=0, location=location, output="pil")[0])
    hidden = torch.tensor([[[0, 0, -1.0], [0.25, 1, -1 if content is None else 1]]])
    other = model.generate(CAPTION, seed=0, location=hidden, output="pil")[0]
    assert not images_close(tmp_path / "f.png", other, tolerance=0)


def test_a_trained_run_draws_the_points_that_are_left_out(capsys, tmp_path):
    folder, phases = tmp_path / "run", ("pretraining", "stem", "stream", "keypoints", "glam")
    words = ("train", "gawwn-points-demo", "--out", folder, *SHORT, "--device", "cpu", "--phases", *phases)
    status, out, _ = run(capsys, *words)
    assert status == 0
    assert "keypoints" in out
    path = written(tmp_path, {"center": [0.5, 0.25], "petal 8": None})
    for options in ((), ("--points", path)):
        assert run(capsys, "generate", folder / "model", CAPTION, *options, "--out", tmp_path / "f.png")[0] == 0
    assert_rejected(run(capsys, "train", "demo", "--phases", "keypoints", "--out", tmp_path / "other"), "keypoints")


@pytest.mark.parametrize(
    ("place", "words", "message"),
    [
        ("box", ("--box", 0.5, 0.5, 0, 0.5), "--box: box 0 is empty; width and height must be positive"),
        ("box", ("--box", 1, 0, 0.5, 0.5), "--box: box 0 is outside of the image, which extends from 0 to 1"),
        ("box", ("--box", 0, 0, 16, 16), "--box: box 0 seems to be in pixels; divide x and w by the width"),
        ("box", ("--box", 0, 0, "nan", 1), "--box: box 0 is not finite: (0, 0, nan, 1)."),
        ("box", ("--box", 0, 0, "inf", 1), "--box: box 0 is not finite: (0, 0, inf, 1)."),
        ("points", ("--box", 0.1, 0.1, 0.5, 0.5), "--box: this model takes --points FILE instead."),
    ],
)
def test_invalid_boxes_are_rejected(capsys, saved_models, tmp_path, place, words, message):
    result = run(capsys, "generate", saved_models / place, CAPTION, *words, "--out", tmp_path / "f.png")
    assert_rejected(result, message)


def test_points_of_an_editor_that_marks_the_byte_order_are_read(capsys, saved_models, tmp_path):
    path = tmp_path / "points.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"center": [0.5, 0.5]}).encode())
    words = ("generate", saved_models / "points", CAPTION, "--points", path, "--out", tmp_path / "f.png")
    assert run(capsys, *words)[0] == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON (maximum recursion depth exceeded"),
        ('{"center": [1' + "0" * 400 + ", 0]}", "'center' must be [x, y], shares of the image from 0 to 1"),
        ('{"center": [0, 0], "center": [1, 1]}', "the key 'center' occurs more than once"),
        ('{"center": [NaN, 0]}', "'center' must be [x, y], shares of the image from 0 to 1"),
        ([], 'must be an object with x and y by name, such as {"center": [0.5, 0.25]}.'),
        ({"leaf": [0.5, 0.5]}, "unknown key point 'leaf'; the model has center, petal 1."),
        (
            {"center": [0.5]},
            "'center' must be [x, y], shares of the image from 0 to 1, or null for a hidden point, but it is [0.5].",
        ),
        (
            {"center": [0.5, 3]},
            "'center' must be [x, y], shares of the image from 0 to 1, or null for a hidden point, but it is [0.5, 3].",
        ),
    ],
)
def test_invalid_points_are_rejected(capsys, saved_models, tmp_path, content, message):
    words = ("--points", written(tmp_path, content), "--out", tmp_path / "f.png")
    assert_rejected(run(capsys, "generate", saved_models / "points", CAPTION, *words), message)


def test_options_that_do_not_fit_are_rejected(capsys, saved_models, model, tmp_path):
    path, out = written(tmp_path, {"center": [0.5, 0.5]}), ("--out", tmp_path / "f.png")
    box = ("--box", 0.1, 0.1, 0.5, 0.5)
    result = run(capsys, "generate", saved_models / "box", CAPTION, "--points", path, *out)
    assert_rejected(result, "--points: this model takes --box X Y W H instead.")
    result = run(capsys, "generate", saved_models / "box", CAPTION, "--points", path, *box, *out)
    assert_rejected(result, "--box and --points cannot be given together")
    result = run(capsys, "generate", model, CAPTION, *box, *out)
    assert_rejected(result, "--box: a model of the system 'mirrorgan' takes no location; leave it out.")
    result = run(capsys, "generate", saved_models / "points", CAPTION, "--points", tmp_path / "none.json", *out)
    assert_rejected(result, "none.json cannot be read")
