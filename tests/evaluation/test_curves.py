"""Loss curves: panels read from metrics.jsonl, and their plots."""

import base64

import pytest

from mirror_modules.evaluation.curves import LossPanel, as_svg, draw_losses, read_losses
from tests.runs import LOG, write_log


@pytest.fixture
def log(tmp_path):
    write_log(tmp_path / "metrics.jsonl")
    return tmp_path / "metrics.jsonl"


def test_losses_of_all_stages_share_a_panel(log):
    stem, kl, stages = read_losses(log)
    assert stem.title == "Text and image encoder"
    assert stem.curves == {"caption by words": [(1, 4.0), (10, 2.0)]}
    assert kl.curves == {"kl": [(1, 1.5), (10, 2.5)]}
    assert stages.title == "Generator and discriminators: generator"
    assert stages.ylabel == "generator"
    assert stages.curves == {"16 px": [(1, 1.0), (10, 2.0)], "64 px": [(1, 3.0), (10, 4.0)]}


def test_only_losses_are_curves(log):
    other = {"waited": 0.1, "skipped": 0, "generator_norm": 3.0, "learning_rate": 1e-3, "note": "text", "flag": None}
    write_log(log, [{**LOG[0], **other}])
    (panel,) = read_losses(log)
    assert list(panel.curves) == ["caption by words"]


def test_an_incomplete_last_line_is_ignored(log):
    with log.open("a") as file:
        file.write('{"phase": "stem", "st')
    assert len(read_losses(log)) == 3


def test_a_damaged_line_is_refused(log):
    log.write_text("[1]\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged: line 1 is not a logged step"):
        read_losses(log)


def test_no_log_has_no_panels(tmp_path):
    assert read_losses(tmp_path / "metrics.jsonl") == []


def test_a_log_axis_needs_curves_of_different_magnitude():
    def scale(**losses):
        curves = {name: list(enumerate(values)) for name, values in losses.items()}
        return draw_losses([LossPanel("title", "loss", curves)]).axes[0].get_yscale()

    assert scale(a=[1, 2], b=[100, 200]) == "log"
    assert scale(a=[1, 2], b=[10, 20]) == "linear"
    assert scale(a=[0, 2], b=[100, 200]) == "linear"
    assert scale(a=[0.001, 1], b=[1, 2]) == "linear"


def test_a_nan_loss_is_drawn_as_a_gap(log):
    step = {"phase": "stem", "seconds": 0.1, "images": 8}
    write_log(log, [{**step, "step": 1, "a": float("nan")}, {**step, "step": 2, "a": 1}])
    panels = read_losses(log)
    assert list(panels[0].curves) == ["a"]
    draw_losses(panels).canvas.draw()


def test_a_panel_is_drawn_as_svg(log):
    kind, _, content = as_svg(read_losses(log)[0]).partition(";base64,")
    assert kind == "data:image/svg+xml"
    assert b"</svg>" in base64.b64decode(content, validate=True)
