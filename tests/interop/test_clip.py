"""Checkpoints of CLIP and SigLIP: the features that transformers compares, from folders and by name."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

from mirror_modules.interop.clip import load_clip  # noqa: E402
from tests.interop import tiny  # noqa: E402

CAPTIONS = ["a small red flower", "Blue!", "petals"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.save_clip(tmp_path_factory.mktemp("checkpoints") / "clip")


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_cosines_are_those_of_transformers(tmp_path, kind):
    encoders = load_clip(str(tiny.save_clip(tmp_path, kind)))
    images = torch.rand(5, 3, 16, 16) * 2 - 1
    model, tokenizer, _ = tiny.clip(kind)
    # The class itself rounds resized images to bytes in older versions.
    image_processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    # SigLIP was trained on captions padded to the full length, without an attention mask.
    padding = {"padding": "max_length", "max_length": 67} if kind == "siglip" else {"padding": True}
    inputs = tokenizer(CAPTIONS, return_tensors="pt", return_attention_mask=kind == "clip", **padding)
    inputs |= image_processor(images=list((images + 1) / 2), do_rescale=False, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs)
    features = encoders.image_encoder(images).image
    sentences = encoders.text_encoder(*encoders.text_encoder.encode(CAPTIONS)).sentence
    cosines = torch.cosine_similarity(features.unsqueeze(1), sentences.unsqueeze(0), dim=2)
    theirs = expected.image_embeds @ expected.text_embeds.T
    torch.testing.assert_close(cosines, theirs, atol=1e-5, rtol=0)
    assert cosines.std() > 0.01
    assert not any(each.requires_grad for encoder in encoders for each in encoder.parameters())


@pytest.mark.parametrize("is_folder", [True, False])
def test_a_folder_is_never_looked_up_on_the_hub(checkpoint, monkeypatch, is_folder):
    asked = []

    def look_up(name, **options):
        asked.append((name, options["local_files_only"]))
        raise OSError("stopped here")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", look_up)
    name = str(checkpoint) if is_folder else "somebody/clip"
    with pytest.raises(OSError, match=rf"^clip={name} cannot be loaded \(stopped here\); give a folder with"):
        load_clip(name)
    assert asked == [(name, is_folder)]


def test_a_missing_package_is_named(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"clip=.*clip needs transformers: pip install 'mirror-modules\[hf\]'"):
        load_clip(str(checkpoint))


def test_models_of_other_types_are_refused(tmp_path):
    """BLIP has the same parts as CLIP, but these have not learned to be compared in every checkpoint."""
    model, _ = tiny.make("blip")
    model.save_pretrained(tmp_path / "blip")
    with pytest.raises(ValueError, match=r"clip=.*blip is a model of type 'blip', but only 'clip' and 'siglip' comp"):
        load_clip(str(tmp_path / "blip"))


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        (["*"], ValueError, r"clip=.*copy cannot be loaded \(.*; give a folder with a model of CLIP or SigLIP, its"),
        (["model.safetensors"], OSError, r"clip=.*copy cannot be loaded \(.*model\.safetensors"),
        (["tokenizer*"], ValueError, r"clip=.*copy has a tokenizer of 2 tokens for a model of 30; add the files"),
        (["*processor*"], OSError, r"clip=.*copy cannot be loaded \(.*image processor"),
    ],
)
def test_missing_files_are_reported(checkpoint, tmp_path, files, error, message):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    for file in (file for pattern in files for file in folder.glob(pattern)):
        file.unlink()
    with pytest.raises(error, match=message):
        load_clip(str(folder))


def test_damaged_and_missing_weights_are_reported(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    weights = folder / "model.safetensors"
    only_images = {name: each for name, each in load_file(weights).items() if not name.startswith("text_model")}
    save_file(only_images, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"clip=.*copy lacks \d+ weights of a CLIPModel, such as 'text_model\."):
        load_clip(str(folder))
    weights.write_bytes(b"\xff" * 99)
    with pytest.raises(ValueError, match=r"clip=.*copy cannot be loaded"):
        load_clip(str(folder))


def test_an_image_processor_of_another_model_is_reported(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    (file,) = folder.glob("*processor*")
    settings = {"image_processor_type": "CLIPImageProcessor", "size": {"height": 40, "width": 40}}
    file.write_text(json.dumps(settings | {"crop_size": {"height": 40, "width": 40}}))
    with pytest.raises(ValueError, match=r"clip=.*copy cannot be loaded \(.* CLIPModel failed on \(2, 3, 40, 40\)"):
        load_clip(str(folder))
