"""Cached features of frozen encoders equal those computed per batch; caches above the limit are not built."""

import dataclasses
import json

import pytest
import torch

from mirror_modules import Captioner, ImageEncoder, TextEncoder
from mirror_modules.data import InMemoryCaptions, RepeatableBatches, SyntheticFlowers
from mirror_modules.training.batches import to_device
from mirror_modules.training.features import Cache, cached_images, cached_text, frozen_text
from mirror_modules.training.loop import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def captions():
    return InMemoryCaptions(SyntheticFlowers(61, resolution=16), max_words=7)


def batches(captions):
    source = RepeatableBatches(captions, 5, seed=3)
    return [to_device(source[number], CPU) for number in range(9)]


def test_cached_text_features_match_those_of_each_batch(captions):
    encoder = TextEncoder(len(captions.vocabulary), embedding_dim=5, feature_dim=6).eval()
    cached, uncached = cached_text(encoder, captions, CPU), frozen_text(encoder)
    for batch in batches(captions):
        expected, text = uncached(batch), cached(batch)
        torch.testing.assert_close(text.words, expected.words, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(text.sentence, expected.sentence, rtol=1e-5, atol=1e-6)
        assert not text.words.requires_grad


def test_cached_image_features_match_those_of_each_batch(captions):
    encoder = ImageEncoder("conv", 6).eval()
    cached = cached_images(encoder, captions, CPU)
    assert cached.shape == (61, 6)
    captioner = Captioner(encoder, len(captions.vocabulary), embedding_dim=5, hidden_dim=7).eval()
    for batch in batches(captions):
        expected = captioner(batch.images, batch.tokens)
        logits = captioner.decode(captioner.project(cached[batch.image_rows]), batch.tokens)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("limit", "fits"), [(0, False), (4, True), (3.99, False)])
def test_a_cache_fits_up_to_its_limit(limit, fits):
    assert Cache.plan(1024, 1024, limit) == (fits, 4.0)


@pytest.mark.parametrize("mib", [0, 1024])
def test_a_run_logs_its_caches_and_does_not_depend_on_them(tiny_recipe, tiny_run, tmp_path, capsys, mib):
    engine = dataclasses.replace(tiny_recipe.engine, cached_features_mib=mib)
    folder = train(dataclasses.replace(tiny_recipe, engine=engine), tmp_path / "run", phases=["stem", "stream", "glam"])
    printed = capsys.readouterr().err
    assert ("cached the features of 41 images, 0.0 MiB" in printed) == (mib > 0)
    assert ("cached the features of 205 captions, 0.1 MiB" in printed) == (mib > 0)
    for line, expected in zip(*(map(json.loads, run.log.read_text().splitlines()) for run in (folder, tiny_run))):
        # Batches of another size are rounded differently, which Adam's first steps amplify.
        tolerance = 1e-3 if line["step"] == 1 else 0.1
        for name, value in line.items():
            if name not in ("phase", "seconds", "waited"):
                where = (line["phase"], line["step"], name)
                assert value == pytest.approx(expected[name], rel=tolerance, abs=tolerance / 10), where


def test_image_features_are_not_cached_with_random_crops(tiny_recipe, tmp_path, capsys):
    data = dataclasses.replace(tiny_recipe.data, augment=True)
    train(dataclasses.replace(tiny_recipe, data=data), tmp_path / "run", phases=["stem", "stream"])
    assert "cached the features of 41 images" not in capsys.readouterr().err
