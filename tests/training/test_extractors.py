"""A judge of classes: trained once, named by what it tells, and refused where there are no classes to learn."""

import pytest
import torch

from mirror_modules.data import CaptionedImage, InMemoryCaptions, to_float
from mirror_modules.training import extractors
from mirror_modules.training.errors import TrainingError
from mirror_modules.training.extractors import fit_class_extractor

COLORS = {3: (230, 20, 20), 8: (20, 230, 20), 11: (20, 20, 230)}


def make(classes=tuple(COLORS), each=20):
    random = torch.Generator().manual_seed(0)
    samples = []
    for i in range(each):
        for class_id in classes:
            noise = torch.randint(-20, 20, (16, 16, 3), generator=random)
            image = (torch.tensor(COLORS.get(class_id, (9 * i, 0, 0))) + noise).clamp(0, 255).to(torch.uint8)
            samples.append(CaptionedImage(image.numpy(), (f"color {class_id}",), class_id, {}))
    return InMemoryCaptions(samples, max_words=5)


def test_classes_are_learned_whatever_their_numbers(tmp_path):
    captions, path = make(), tmp_path / "classes.safetensors"
    extractor = fit_class_extractor(path, captions, seed=0, steps=60)
    assert "the 3 training classes, which tells 100.0% of the held-out training images" in extractor.name
    images = to_float(captions.images)
    told = extractor.logits(images).argmax(1)
    assert torch.equal(told, captions.class_ids.unique(return_inverse=True)[1])
    features = extractor.features(images)
    assert len(features) == 60
    torch.testing.assert_close(extractor.features(images[7:8]), features[7:8])
    assert not features.requires_grad


def test_a_judge_that_is_there_is_taken(tmp_path, monkeypatch):
    captions, path = make(), tmp_path / "classes.safetensors"
    first = fit_class_extractor(path, captions, seed=0, steps=3)
    monkeypatch.setattr(extractors, "_train", None)
    again, images = fit_class_extractor(path, captions, seed=5), to_float(captions.images)
    assert torch.equal(again.logits(images), first.logits(images))


@pytest.mark.parametrize("classes", [(3,), tuple(range(20))])
def test_without_classes_there_is_no_judge(tmp_path, classes):
    captions = make(classes, each=5)
    with pytest.raises(TrainingError, match=rf"training images have {len(classes)}; leave --fit-judge out"):
        fit_class_extractor(tmp_path / "classes.safetensors", captions, seed=0)
    assert not list(tmp_path.iterdir())


def test_a_judge_of_other_classes_is_named(tmp_path):
    path = tmp_path / "classes.safetensors"
    fit_class_extractor(path, make(), seed=0, steps=2)
    with pytest.raises(ValueError, match=r"classes\.safetensors.*ClassJudge|ClassJudge.*classes\.safetensors"):
        fit_class_extractor(path, make((3, 8)), seed=0)
