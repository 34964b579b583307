"""A small saved model."""

import shutil

import pytest
import torch

from mirror_modules import MirrorGAN, MirrorGANConfig, Vocabulary


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    config = MirrorGANConfig(
        embedding_dim=7,
        word_dim=10,
        noise_dim=5,
        condition_dim=6,
        channels=3,
        resolutions=(8, 16),
        captioner_backbone="conv",
        captioner_embedding_dim=11,
        captioner_hidden_dim=13,
    )
    folder = tmp_path_factory.mktemp("saved") / "model"
    MirrorGAN(config, Vocabulary(["a", "red", "flower", "with", "petals"])).save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")
