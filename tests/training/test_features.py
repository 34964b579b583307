"""Cached features of frozen encoders equal those computed per batch; caches above the limit are not built."""

import dataclasses
import json
import signal

import pytest
import torch
from torch import nn

from mirror_modules import Captioner, ImageEncoder, ImageFeatures, TextEncoder
from mirror_modules.data import InMemoryCaptions, RepeatableBatches, SyntheticFlowers, to_float
from mirror_modules.models import BackboneConfig
from mirror_modules.training import features as module
from mirror_modules.training.batches import to_device
from mirror_modules.training.distributed import SINGLE_PROCESS
from mirror_modules.training.errors import Interrupted, TrainingError
from mirror_modules.training.features import (
    Cache,
    ViewBatches,
    Views,
    cache_images,
    cached_text,
    describe_cache,
    frozen_text,
)
from mirror_modules.training.loop import train

CPU = torch.device("cpu")
N, SIZE, CROP, CROPS = 61, 19, 16, 3


@pytest.fixture(scope="module")
def captions():
    return InMemoryCaptions(SyntheticFlowers(N, resolution=SIZE), max_words=7)


@pytest.fixture
def encoder():
    return ImageEncoder("conv", 6).eval().requires_grad_(False)


def batches(captions):
    source = RepeatableBatches(captions, 5, seed=3)
    return [to_device(source[number], CPU) for number in range(9)]


def cache(encoder, captions, folder, views=None, **changes):
    options = {"name": "backbone", "with_regions": True, "limit_mib": 1024, "group": SINGLE_PROCESS, **changes}
    return cache_images(encoder, captions, views or Views.of(captions, CROP, CROPS), folder, **options)


@pytest.mark.parametrize("part", ["image", "regions"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.unlink(),
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: file.write_bytes(b"x" * file.stat().st_size),
    ],
    ids=["removed", "cut", "overwritten"],
)
def test_files_that_were_damaged_are_computed_again(encoder, captions, tmp_path, part, damage):
    cache(encoder, captions, tmp_path)
    (file,) = tmp_path.rglob(f"{part}.npy")
    before = file.read_bytes()
    damage(file)
    again = cache(encoder, captions, tmp_path)
    assert file.read_bytes() == before
    assert getattr(again, part).isfinite().all()


def test_runs_share_a_folder_of_features_which_stays(tiny_recipe, tmp_path, capsys):
    backbone = BackboneConfig("conv", trainable=False)
    model = dataclasses.replace(tiny_recipe.model, image_backbone=backbone, captioner_backbone=backbone)
    shared = tmp_path / "features"
    engine = dataclasses.replace(tiny_recipe.engine, features_folder=str(shared))
    recipe = dataclasses.replace(tiny_recipe, model=model, engine=engine)
    # The frozen backbone starts from the seed: the same one has the same features.
    one = train(recipe, tmp_path / "one", phases=["stem", "evaluator"])
    files = sorted(shared.rglob("*.npy"))
    assert files
    before = [file.stat().st_mtime_ns for file in files]
    two = train(recipe, tmp_path / "two", phases=["stem", "evaluator"])
    assert [file.stat().st_mtime_ns for file in files] == before
    assert sorted(shared.rglob("*.npy")) == files
    for run in (one, two):
        assert not run.features.exists()
    assert one.weights("stem").read_bytes() == two.weights("stem").read_bytes()
    assert capsys.readouterr().err.count("computing the features") == 2


def test_a_cache_that_another_run_is_creating_is_waited_for(encoder, captions, tmp_path, monkeypatch):
    complete = cache(encoder, captions, tmp_path / "a")
    (folder,) = (tmp_path / "a").iterdir()
    waits = []

    def create(seconds):
        # The other run has finished when this one looks again.
        waits.append(seconds)
        holder.close()

    (tmp_path / "b" / folder.name).mkdir(parents=True)
    holder = open_locked(tmp_path / "b" / folder.name / ".lock")
    monkeypatch.setattr(module.time, "sleep", create)
    again = cache(encoder, captions, tmp_path / "b")
    assert len(waits) == 1
    assert torch.equal(again.image, complete.image)


def open_locked(path):
    fcntl = pytest.importorskip("fcntl")
    file = path.open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def test_cached_text_features_match_those_of_each_batch(captions):
    encoder = TextEncoder(len(captions.vocabulary), embedding_dim=5, feature_dim=6).eval()
    cached, uncached = cached_text(encoder, captions, CPU), frozen_text(encoder)
    for batch in batches(captions):
        expected, text = uncached(batch), cached(batch)
        torch.testing.assert_close(text.words, expected.words, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(text.sentence, expected.sentence, rtol=1e-5, atol=1e-6)
        assert not text.words.requires_grad


def test_cached_image_features_match_those_of_each_batch(captions, encoder, tmp_path):
    cached = cache(encoder, captions, tmp_path, Views.of(captions, SIZE, CROPS), with_regions=False)
    assert cached.image.shape == (N, 6)
    assert cached.regions is None
    captioner = Captioner(encoder, len(captions.vocabulary), embedding_dim=5, hidden_dim=7).eval()
    for batch in batches(captions):
        expected = captioner(batch.images, batch.tokens)
        features = cached.look_up(batch.image_rows, CPU)
        logits = captioner.decode(captioner.project(features.image), batch.tokens)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_the_views_of_an_image_are_its_crops_and_their_mirror_images(captions):
    views = Views.of(captions, CROP, CROPS)
    assert views.per_image == 2 * CROPS
    rows = torch.tensor([7, 0, 60])
    pixels = views.pixels(captions.images, rows)
    assert pixels.shape == (3 * 2 * CROPS, CROP, CROP, 3)
    for i, row in enumerate(rows.tolist()):
        for c in range(CROPS):
            top, left = views.crops.top[row * CROPS + c, 0], views.crops.left[row * CROPS + c, 0]
            crop = captions.images[row, top : top + CROP, left : left + CROP]
            view = (i * CROPS + c) * 2
            assert torch.equal(pixels[view], crop)
            assert torch.equal(pixels[view + 1], crop.flip(1))
    assert len({tuple(pair) for pair in torch.cat((views.crops.top, views.crops.left), dim=1).tolist()}) > 9
    again = Views.of(captions, CROP, CROPS)
    assert torch.equal(again.crops.top, views.crops.top)


def test_whole_images_are_their_only_view(captions):
    views = Views.of(captions, SIZE, CROPS)
    assert views.per_image == 1
    assert torch.equal(views.pixels(captions.images, torch.tensor([5, 2])), captions.images[[5, 2]])


def test_cached_views_are_those_of_the_encoder(captions, encoder, tmp_path):
    cached = cache(encoder, captions, tmp_path)
    views = cached.views
    expected = encoder(to_float(views.pixels(captions.images, torch.arange(N))))
    torch.testing.assert_close(cached.image, expected.image, rtol=1e-5, atol=1e-5)
    assert cached.regions.dtype == torch.float16
    torch.testing.assert_close(cached.regions.float(), expected.regions, rtol=2e-3, atol=2e-3)
    looked_up = cached.look_up(torch.tensor([4, 100, 3]), CPU, regions=2)
    assert looked_up.image.shape == (3, 6)
    assert torch.equal(looked_up.regions, cached.regions[[4, 100]].float())
    assert describe_cache(cached, captions) == (
        f"cached the features of {N} images in 3 crops and their mirror images, {cached.mebibytes:.1f} MiB"
    )


def test_batches_of_views_are_repeatable_and_mirror_no_image_whose_caption_mentions_a_side(captions, monkeypatch):
    sides = torch.zeros_like(captions.mentions_side)
    sides[::2] = True
    monkeypatch.setattr(captions, "mentions_side", sides)
    views = Views.of(captions, CROP, CROPS)
    source, seen = ViewBatches(views, captions, 6, 3), set()
    plain = RepeatableBatches(captions, 6, 3, crop=CROP)
    halves = [ViewBatches(views, captions, 6, 3, rank=rank, ranks=2) for rank in range(2)]
    for number in range(60):
        batch = source[number]
        assert torch.equal(batch.image_rows, ViewBatches(views, captions, 6, 3)[number].image_rows)
        assert torch.equal(torch.cat([half[number].image_rows for half in halves]), batch.image_rows)
        images, view = batch.image_rows // views.per_image, batch.image_rows % views.per_image
        assert torch.equal(images, plain[number].image_rows)
        assert torch.equal(batch.caption_rows, plain[number].caption_rows)
        assert not bool((view % 2)[sides[batch.caption_rows]].any())
        seen |= set(view.tolist())
    assert seen == set(range(2 * CROPS))


class Stopped(Exception):
    """Simulates a kill between two chunks."""


def test_a_killed_cache_is_continued(captions, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_IMAGES", 7)
    expected = cache(encoder, captions, tmp_path / "whole")
    encoded, encode = [], module._encode

    def count(encoder, pixels, device):
        encoded.append(len(pixels))
        return encode(encoder, pixels, device)

    def stop():
        raise Stopped

    monkeypatch.setattr(module, "_encode", count)
    for _ in range(4):
        with pytest.raises(Stopped):
            cache(encoder, captions, tmp_path / "killed", stop=stop)
    continued = cache(encoder, captions, tmp_path / "killed")
    assert torch.equal(continued.image, expected.image)
    assert torch.equal(continued.regions, expected.regions)
    # A single view measures the sizes; each kill is followed by the first chunk that is missing.
    chunks = [number for number in encoded if number > 1]
    assert sum(chunks) == N * 2 * CROPS
    encoded.clear()
    cache(encoder, captions, tmp_path / "killed")
    assert [number for number in encoded if number > 1] == []


@pytest.mark.parametrize("change", ["weights", "images", "name", "crops"])
def test_a_cache_of_other_weights_images_or_views_is_not_used(captions, encoder, tmp_path, change):
    cache(encoder, captions, tmp_path)
    (before,) = tmp_path.iterdir()
    name, views = "backbone", None
    if change == "weights":
        with torch.no_grad():
            next(encoder.parameters())[0, 0, 0, 0] += 1e-3
    elif change == "images":
        captions = InMemoryCaptions(SyntheticFlowers(N, resolution=SIZE, seed=1), max_words=7)
    elif change == "name":
        name = "another backbone"
    else:
        views = Views.of(captions, CROP, CROPS + 1)
    cache(encoder, captions, tmp_path, views, name=name)
    assert len(list(tmp_path.iterdir())) == 2
    assert before in tmp_path.iterdir()


def test_a_phase_without_regions_uses_the_cache_of_one_with_them(captions, encoder, tmp_path):
    first = cache(encoder, captions, tmp_path)
    second = cache(encoder, captions, tmp_path, with_regions=False)
    assert len(list(tmp_path.iterdir())) == 1
    assert second.regions is None
    assert torch.equal(first.image, second.image)


def test_a_cache_above_the_limit_is_not_built(captions, encoder, tmp_path):
    message = cache(encoder, captions, tmp_path / "cache", limit_mib=0.02)
    assert "the features of 61 images in 3 crops and their mirror images are computed in each step" in message
    assert "MiB, more than engine.cached_features_mib=0.02" in message
    assert not (tmp_path / "cache").exists()


class Constant(nn.Module):
    def __init__(self, image, regions):
        super().__init__()
        self.features = image, regions

    def forward(self, images):
        image, regions = self.features
        return ImageFeatures(torch.full((len(images), 2, 3), regions), torch.full((len(images), 4), image))


@pytest.mark.parametrize(
    ("values", "part"), [((float("nan"), 1.0), "image"), ((1.0, float("inf")), "regions"), ((1.0, 1e6), "regions")]
)
def test_features_that_are_not_finite_are_named(captions, tmp_path, values, part):
    with pytest.raises(TrainingError, match=rf"computes {part} features that are not finite, .* rows 0 to 191"):
        cache(Constant(*values), captions, tmp_path)


def test_a_full_disk_is_explained(captions, encoder, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write_rows", fail)
    with pytest.raises(TrainingError, match=r"No space left on device.*MiB are needed there.*cached_features_mib=0"):
        cache(encoder, captions, tmp_path)


@pytest.mark.parametrize(("limit", "fits"), [(0, False), (4, True), (3.99, False)])
def test_a_cache_fits_up_to_its_limit(limit, fits):
    assert Cache.plan(1024, 1024, limit) == (fits, 4.0)


@pytest.mark.parametrize("mib", [0, 1024])
def test_a_run_logs_its_caches_and_does_not_depend_on_them(tiny_recipe, tiny_run, tmp_path, capsys, mib):
    engine = dataclasses.replace(tiny_recipe.engine, cached_features_mib=mib)
    folder = train(dataclasses.replace(tiny_recipe, engine=engine), tmp_path / "run", phases=["stem", "stream", "glam"])
    printed = capsys.readouterr().err
    assert ("cached the features of 41 images, 0.0 MiB" in printed) == (mib > 0)
    assert ("the features of 41 images are computed in each step" in printed) == (mib == 0)
    assert ("cached the features of 205 captions, 0.1 MiB" in printed) == (mib > 0)
    for line, expected in zip(*(map(json.loads, run.log.read_text().splitlines()) for run in (folder, tiny_run))):
        # Batches of another size are rounded differently, which Adam's first steps amplify.
        tolerance = 1e-3 if line["step"] == 1 else 0.1
        for name, value in line.items():
            if name not in ("phase", "seconds", "waited"):
                where = (line["phase"], line["step"], name)
                assert value == pytest.approx(expected[name], rel=tolerance, abs=tolerance / 10), where


@pytest.mark.parametrize(
    ("crops", "words"), [(1, "1 crop and its mirror image"), (5, "5 crops and their mirror images")]
)
def test_image_features_are_cached_with_random_crops(tiny_recipe, tmp_path, capsys, crops, words):
    data = dataclasses.replace(tiny_recipe.data, augment=True)
    engine = dataclasses.replace(tiny_recipe.engine, cached_crops=crops)
    recipe = dataclasses.replace(tiny_recipe, data=data, engine=engine)
    folder = train(recipe, tmp_path / "run", phases=["stem", "stream"])
    assert f"cached the features of 41 images in {words}, 0.0 MiB" in capsys.readouterr().err
    # The evaluator may need them; without it, they would be removed.
    assert len(list(folder.features.iterdir())) == 1


def test_an_interruption_between_two_chunks_ends_the_run(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_IMAGES", 7)
    mark = module._mark_done

    def mark_and_interrupt(folder, chunk):
        mark(folder, chunk)
        if chunk == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(module, "_mark_done", mark_and_interrupt)
    with pytest.raises(Interrupted, match="Continue with --resume"):
        train(tiny_recipe, tmp_path / "run", phases=["stem", "stream"])
    monkeypatch.setattr(module, "_mark_done", mark)
    (folder,) = (tmp_path / "run" / "features").iterdir()
    assert list((folder / "done").read_bytes()) == [1, 1, 1, 0, 0, 0]
    resumed = train(tiny_recipe, tmp_path / "run", phases=["stem", "stream"], resume=True)
    assert resumed.weights("stream").exists()


def test_caches_are_removed_when_no_phase_needs_them(tiny_run):
    assert not tiny_run.features.exists()
