"""A study's plan, key and page, as far as no browser is needed."""

import base64
import dataclasses
import io
import json
import re
from collections import Counter
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mirror_modules import MirrorGAN, MirrorGANConfig, Vocabulary
from mirror_modules.evaluation import make_study
from mirror_modules.evaluation.study.plan import StudyKey, plan_trials, run_pairs
from mirror_modules.evaluation.study.results import expected_half_width
from mirror_modules.training import RunFolder
from mirror_modules.training.batches import load_splits

WORDS = ["a", "red", "blue", "flower", "with", "petals", "script", "b"]
CAPTIONS = ["a red flower", "a blue flower", "red petals </script><b>", "blue petals", "a flower with red petals"]


def save_model(folder, seed, resolutions=(8, 16)):
    torch.manual_seed(seed)
    sizes = {"embedding_dim": 5, "word_dim": 8, "noise_dim": 5, "condition_dim": 6, "channels": 3, "residual_blocks": 1}
    captioner = {"captioner_backbone": "conv", "captioner_embedding_dim": 4, "captioner_hidden_dim": 5}
    config = MirrorGANConfig(resolutions=resolutions, **sizes, **captioner)
    MirrorGAN(config, Vocabulary(WORDS)).save_pretrained(folder)
    return folder


def save_images(folder, captions, seed, size=(16, 16)):
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(len(captions)):
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"image-{i}.png")
    (folder / "captions.txt").write_text("\n".join(captions) + "\n")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [save_model(root / name, seed) for seed, name in enumerate(("secret-a", "secret-b"))]


def read_page(path):
    """The data in the page."""
    text = path.read_text(encoding="utf-8")
    (block,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(block)


def pixels_of(page, name):
    _, _, content = page["images"][name].partition("base64,")
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        return np.asarray(image)


# The plan of the trials.


def ids(runs, captions):
    return [[f"{'abcdefg'[run]}{i}" for i in range(captions)] for run in range(runs)]


def runs_of(trial):
    return frozenset((trial.left[0], trial.right[0]))


@pytest.mark.parametrize(("runs", "captions", "pairs"), [(2, 11, 11), (3, 7, 21), (3, 7, 13), (5, 3, 29), (2, 1, 1)])
def test_each_pair_is_of_one_caption_and_seen_once(runs, captions, pairs):
    trials = plan_trials(ids(runs, captions), pairs, 0, seed=3, rater=1)
    assert len(trials) == len({frozenset(trial[1:]) for trial in trials}) == pairs
    for trial in trials:
        assert trial.left[1:] == trial.right[1:] == str(trial.caption)
        assert len(runs_of(trial)) == 2


@pytest.mark.parametrize(("runs", "captions"), [(3, 7), (4, 11), (2, 13)])
def test_a_rater_who_stops_early_has_seen_all_pairs_of_runs_equally_often(runs, captions):
    compared = len(run_pairs(runs))
    trials = plan_trials(ids(runs, captions), compared * captions, 0, seed=3, rater=1)
    for stop in range(compared, len(trials) + 1):
        counts = Counter(map(runs_of, trials[:stop]))
        assert len(counts) == compared
        assert max(counts.values()) - min(counts.values()) <= 1
        on_the_left = Counter((runs_of(trial), trial.left[0]) for trial in trials[:stop])
        for pair, count in counts.items():
            first, second = (on_the_left[pair, run] for run in pair)
            assert abs(first - second) <= 1
            assert first + second == count


@pytest.mark.parametrize(("pairs", "repeats"), [(13, 4), (30, 10), (33, 5), (3, 1)])
def test_repeated_pairs_come_late_with_their_sides_exchanged(pairs, repeats):
    for rater in range(1, 30):
        trials = plan_trials(ids(3, 11), pairs, repeats, seed=0, rater=rater)
        assert len(trials) == pairs + repeats
        first_seen = {}
        repeated = 0
        for i, trial in enumerate(trials):
            pair = frozenset(trial[1:])
            if pair in first_seen:
                before = trials[first_seen[pair]]
                assert (before.left, before.right) == (trial.right, trial.left)
                assert i - first_seen[pair] > pairs // 3
                repeated += 1
            first_seen.setdefault(pair, i)
        assert repeated == repeats


def test_the_order_depends_on_seed_and_rater_alone():
    plans = {
        (seed, rater): plan_trials(ids(2, 11), 11, 2, seed=seed, rater=rater) for seed in (0, 1) for rater in (1, 2, 3)
    }
    assert plans[0, 1] == plan_trials(ids(2, 11), 11, 2, seed=0, rater=1)
    for position in ("caption", "left"):
        orders = {
            tuple(getattr(trial, position)[-1:] if position == "left" else trial.caption for trial in plan)
            for plan in plans.values()
        }
        assert len(orders) == 6


def test_the_first_trial_is_random_over_raters():
    firsts = Counter(plan_trials(ids(3, 5), 15, 0, seed=0, rater=rater)[0] for rater in range(1, 1001))
    # Three pairs of runs, five captions and two sides.
    assert len(firsts) == 3 * 5 * 2
    assert min(firsts.values()) > 15


# The study.


def test_the_images_of_a_pair_have_the_same_caption_and_seed(models, tmp_path):
    study = make_study(models, tmp_path / "study", captions=CAPTIONS, seed=5, raters=3, repeats=1)
    assert (study.captions, study.pairs, study.repeats) == (CAPTIONS, 5, 1)
    key, page = StudyKey.read(tmp_path / "study"), read_page(study.page)
    assert (key.study, key.captions, key.raters, key.trials) == (page["study"], CAPTIONS, 3, 6)
    assert key.settings == {"pairs": 5, "repeats": 1, "seed": 5, "resolution": None}
    assert set(page["images"]) == set(key.images)
    for name, (run, caption, seed) in key.images.items():
        model = MirrorGAN.from_pretrained(models[run])
        expected = model.generate(CAPTIONS[caption], seed=seed, output="pil")[0]
        assert np.abs(pixels_of(page, name).astype(int) - np.asarray(expected)).max() <= 1
        assert seed == 5 + caption
    for trials in page["raters"]:
        for caption, left, right in trials:
            assert key.images[left].caption == key.images[right].caption == caption
            assert {key.images[left].run, key.images[right].run} == {0, 1}


def test_the_page_names_no_run_and_shows_nothing_of_their_order(models, tmp_path):
    study = make_study(models, tmp_path / "study", captions=CAPTIONS, raters=2)
    text, key = study.page.read_text(encoding="utf-8"), StudyKey.read(tmp_path / "study")
    assert "secret" not in text
    assert "secret-a" in study.key.read_text()
    page = read_page(study.page)
    assert list(page["images"]) == sorted(page["images"])
    # Exchanging the runs changes neither the ids nor the order of the images.
    other = make_study(models[::-1], tmp_path / "other", captions=CAPTIONS, raters=2)
    exchanged = StudyKey.read(tmp_path / "other")
    assert read_page(other.page)["images"] == page["images"]
    assert {name: 1 - image.run for name, image in exchanged.images.items()} == {
        name: image.run for name, image in key.images.items()
    }


def test_the_page_is_self_contained_and_escapes_captions(models, tmp_path):
    study = make_study(models, tmp_path / "study", captions=CAPTIONS)
    text = study.page.read_text(encoding="utf-8")
    addresses = []

    class Collect(HTMLParser):
        def handle_starttag(self, tag, attrs):
            addresses.extend(value for name, value in attrs if name in ("src", "href"))
            assert tag != "b"

    Collect().feed(text)
    assert addresses == ["data:,"]
    assert "http://" not in text
    assert "https://" not in text
    assert text.count("</script>") == 2
    assert CAPTIONS[2] in read_page(study.page)["captions"]


def test_the_same_arguments_make_the_same_study(models, tmp_path):
    for name in ("a", "b"):
        make_study(models, tmp_path / name, captions=CAPTIONS)
    for file in ("study.html", "key.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    make_study(models, tmp_path / "a", captions=CAPTIONS)
    with pytest.raises(ValueError, match=r"a holds another study \(\w+\); nothing in it was changed"):
        make_study(models, tmp_path / "a", captions=CAPTIONS, seed=1)
    assert (tmp_path / "a" / "study.html").read_bytes() == (tmp_path / "b" / "study.html").read_bytes()


def test_captions_are_drawn_without_repetition_in_their_order(models, tmp_path):
    captions = [*CAPTIONS, *CAPTIONS]
    drawn = {
        tuple(make_study(models, tmp_path / str(seed), captions=captions, max_captions=2, seed=seed).captions)
        for seed in range(9)
    }
    assert len(drawn) > 4
    for first, second in drawn:
        assert CAPTIONS.index(first) < CAPTIONS.index(second)


def test_pairs_and_repeats_are_limited_by_what_there_is(models, tmp_path):
    study = make_study(models, tmp_path / "a", captions=CAPTIONS, pairs=3, repeats=2)
    assert (study.pairs, study.repeats) == (3, 1)
    study = make_study(models, tmp_path / "b", captions=CAPTIONS, raters=10)
    assert study.half_widths == {
        raters: pytest.approx((expected_half_width(5 * raters), expected_half_width(5))) for raters in (1, 3, 10)
    }
    assert list(make_study(models, tmp_path / "c", captions=CAPTIONS, raters=2).half_widths) == [1, 2]


def test_folders_of_images_bring_their_captions(models, tmp_path):
    images = save_images(tmp_path / "images", CAPTIONS[:3], seed=0)
    study = make_study([models[0], images], tmp_path / "study")
    assert study.captions == CAPTIONS[:3]
    key, page = StudyKey.read(tmp_path / "study"), read_page(study.page)
    for name, (run, caption, seed) in key.images.items():
        assert (seed is None) == (run == 1)
        if run == 1:
            with Image.open(images / f"image-{caption}.png") as image:
                assert np.array_equal(pixels_of(page, name), np.asarray(image))
    other = save_images(tmp_path / "other", CAPTIONS[1:], seed=1)
    assert make_study([images, other], tmp_path / "both").captions == CAPTIONS[1:3]


def test_images_are_numbered_in_natural_order_and_cropped_to_squares(tmp_path):
    captions = [f"caption {i}" for i in range(11)]
    folders = [save_images(tmp_path / name, captions, seed, (20, 16)) for seed, name in enumerate("ab")]
    page_path = make_study(folders, tmp_path / "study").page
    key, page = StudyKey.read(tmp_path / "study"), read_page(page_path)
    ((name, _),) = [(name, each) for name, each in key.images.items() if (each.run, each.caption) == (0, 10)]
    with Image.open(folders[0] / "image-10.png") as image:
        assert np.array_equal(pixels_of(page, name), np.asarray(image)[:, 2:18])


def test_images_of_several_sizes_warn_unless_they_are_reduced(models, tmp_path):
    images = save_images(tmp_path / "images", CAPTIONS, seed=0, size=(32, 32))
    with pytest.warns(UserWarning, match=r"differ in size \(.*secret-a: 16, .*images: 32 pixels\).*--resolution"):
        make_study([models[0], images], tmp_path / "a")
    page = read_page(make_study([models[0], images], tmp_path / "b", resolution=8).page)
    assert {pixels_of(page, name).shape for name in page["images"]} == {(8, 8, 3)}
    with pytest.raises(ValueError, match=r"resolution must be at most 16, the size of an image of .*secret-a, but it"):
        make_study([models[0], images], tmp_path / "c", resolution=24)


@pytest.fixture
def runs(tiny_recipe, tmp_path):
    """Two folders with the recipe of a run and a model; nothing is trained."""
    folders = [tmp_path / "run-a", tmp_path / "run-b"]
    for i, folder in enumerate(folders):
        RunFolder(folder).begin(dataclasses.replace(tiny_recipe, seed=i))
        save_model(folder / "model", 10 + i)
    return folders


@pytest.mark.filterwarnings("ignore:unknown words")
def test_runs_are_compared_on_captions_that_none_was_trained_on(tiny_recipe, runs, models, tmp_path, monkeypatch):
    splits = load_splits(tiny_recipe.data, tiny_recipe.model, 0)
    captions = [captions[0] for captions in splits.validation.captions]
    trained = [caption.upper() for caption in captions[::2]]
    loaded = []

    def load(data, model, seed):
        """The second run was trained on every other caption of the first one's validation images."""
        loaded.append(seed)
        return splits if seed == 0 else splits._replace(training=SimpleNamespace(captions=[[each] for each in trained]))

    monkeypatch.setattr("mirror_modules.evaluation.study.making.load_splits", load)
    study = make_study([*runs, models[0]], tmp_path / "study", max_captions=7)
    assert loaded == [0, 1]
    assert len(study.captions) == 7
    assert set(study.captions) <= {*captions} - {*captions[::2]}
    with pytest.raises(ValueError, match=r"run-a and .*model are the same run; give each run once"):
        make_study([runs[0], runs[0] / "model"], tmp_path / "other")


@pytest.mark.filterwarnings("ignore:unknown words")
def test_runs_with_the_same_data_load_it_once(tiny_recipe, runs, tmp_path, monkeypatch):
    RunFolder(runs[1]).begin(tiny_recipe)
    loaded = []

    def load(*arguments):
        loaded.append(load_splits(*arguments))
        return loaded[-1]

    monkeypatch.setattr("mirror_modules.evaluation.study.making.load_splits", load)
    study = make_study(runs, tmp_path / "study", max_captions=7)
    (splits,) = loaded
    assert set(study.captions) <= {caption for captions in splits.validation.captions for caption in captions}


def test_runs_whose_data_is_missing_need_captions(tiny_recipe, runs, tmp_path):
    data = dataclasses.replace(tiny_recipe.data, source="folder", path=str(tmp_path / "moved"))
    RunFolder(runs[0]).begin(dataclasses.replace(tiny_recipe, data=data))
    with pytest.raises(ValueError, match=r"the captions of .*run-a cannot be read.*--captions FILE \(.*moved"):
        make_study(runs, tmp_path / "study")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_captions": 0}, "max_captions must be a whole number of at least 1, but it is 0"),
        ({"pairs": 0}, "pairs must be a whole number of at least 1"),
        ({"raters": 0}, "raters must be a whole number of at least 1"),
        ({"repeats": -1}, "repeats must be a whole number of at least 0, but it is -1"),
        ({"seed": 0.5}, "seed must be a whole number of at least 0, but it is 0.5"),
        ({"resolution": 0}, "resolution must be a whole number of at least 1"),
        ({"captions": "a red flower"}, "captions must be a list of strings, or None"),
        ({"captions": ["a red flower"] * 2}, "at least 2 captions for which all runs have images, but there are 1"),
        ({"captions": None}, "captions must be given for folders of models.*--captions FILE"),
    ],
)
def test_invalid_arguments_are_errors(models, tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"make_study: .*{message}"):
        make_study(models, tmp_path / "study", **{"captions": CAPTIONS, **changes})
    assert not (tmp_path / "study").exists()


def test_runs_that_cannot_be_compared_are_errors(models, tmp_path):
    out = tmp_path / "study"
    for runs in (models[:1], "runs/a", None):
        with pytest.raises(ValueError, match="runs must be two or more folders"):
            make_study(runs, out)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*none; runs must be folders of trained runs"):
        make_study([models[0], tmp_path / "none"], out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty is none of these; runs must be folders of trained runs"):
        make_study([models[0], tmp_path / "empty"], out)
    (tmp_path / "file").write_text("")
    for path in ("file", "file/below"):
        with pytest.raises(ValueError, match=r"make_study: out \(--out\) must be a folder, but .*file is a file"):
            make_study(models, tmp_path / path, captions=CAPTIONS)
    with pytest.raises(ValueError, match="must be the path of a folder, but it is None"):
        make_study(models, None, captions=CAPTIONS)
    same = save_images(tmp_path / "same", CAPTIONS, seed=0)
    again = save_images(tmp_path / "again", CAPTIONS, seed=0)
    with pytest.raises(ValueError, match=r"same and .*again have the same image of 'a red flower'"):
        make_study([same, again], out)
    (same / "captions.txt").write_text("one\ntwo")
    with pytest.raises(ValueError, match=r"same has 5 images, but captions\.txt has 2 captions"):
        make_study([same, models[0]], out)
    (same / "captions.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"captions\.txt is not UTF-8 text"):
        make_study([same, models[0]], out)
    with pytest.raises(ValueError, match="again has no image of the caption 'nothing'"):
        make_study([again, models[0]], out, captions=["nothing", "a red flower"])
    assert not out.exists()


@pytest.mark.filterwarnings("ignore:unknown words")
def test_a_model_that_has_diverged_is_an_error(models, tmp_path):
    model = MirrorGAN.from_pretrained(models[0])
    with torch.no_grad():
        next(model.generator.parameters()).fill_(torch.nan)
    model.save_pretrained(tmp_path / "diverged")
    with pytest.raises(ValueError, match="diverged generates images with NaN or infinite values"):
        make_study([models[0], tmp_path / "diverged"], tmp_path / "study", captions=CAPTIONS)
