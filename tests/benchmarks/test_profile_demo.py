"""The profile of a training step: every part of the recipe's step is measured."""

import pytest

from benchmarks import profile_demo


@pytest.mark.parametrize("name", ["demo", "ablation"])
def test_shares_of_all_parts_are_measured(monkeypatch, name):
    monkeypatch.setattr(profile_demo, "IMAGES", 1)
    phase = profile_demo.build_phase(name)
    seconds, shares = profile_demo.shares_of_a_step(phase, steps=2)
    assert len(seconds) == 2
    assert all(second > 0 for second in seconds)
    assert sum(shares.values()) == pytest.approx(1)
    measured = {part for part, share in shares.items() if share > 0}
    parts = {"data", "text features", "conditioning", "generator, forward", "discriminators, forward", "backward"}
    parts |= {"captioner, forward", "optimizers", "average", "everything else"}
    assert measured == parts | ({"matching, forward"} if phase.recipe.glam.has_matching else set())
