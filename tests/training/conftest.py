"""One tiny run of all four phases, trained once and looked at by every test here."""

import dataclasses
from pathlib import Path

import pytest

from mirror_modules.models import MirrorGANConfig
from mirror_modules.training.folder import RunFolder
from mirror_modules.training.loop import train
from mirror_modules.training.recipes import DataRecipe, EvaluationRecipe, LoggingRecipe, Recipe, demo


def make_tiny_recipe() -> Recipe:
    model = MirrorGANConfig(
        embedding_dim=7,
        word_dim=10,
        text_dropout=0.1,
        noise_dim=5,
        condition_dim=6,
        channels=3,
        resolutions=(8, 16),
        residual_blocks=1,
        discriminator_channels=3,
        image_backbone="conv",
        captioner_backbone="conv",
        captioner_projection=True,
        captioner_embedding_dim=11,
        captioner_hidden_dim=13,
    )
    base = demo()
    phases = {
        phase: dataclasses.replace(getattr(base, phase), steps=3, batch_size=7)
        for phase in ("stem", "stream", "glam", "judge")
    }
    data = DataRecipe(training_images=41, validation_images=31)
    evaluation = EvaluationRecipe(candidates=11, report_images=3)
    return dataclasses.replace(
        base,
        name="tiny",
        model=model,
        data=data,
        evaluation=evaluation,
        logging=LoggingRecipe(every=1, samples_every=2),
        **phases,
    )


@pytest.fixture
def tiny_recipe() -> Recipe:
    return make_tiny_recipe()


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A trained run; tests that change a run copy it first."""
    return train(make_tiny_recipe(), tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture
def run_copy(tiny_run: RunFolder, tmp_path: Path) -> RunFolder:
    import shutil

    return RunFolder(shutil.copytree(tiny_run.path, tmp_path / "copy"))
