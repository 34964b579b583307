"""The page of a study in headless Chromium: answers, keys, reloads, the saved file, and its results."""

import json
import time

import numpy as np
import pytest
from PIL import Image

from mirror_modules.evaluation import make_study, study_results
from mirror_modules.evaluation.study.plan import StudyKey
from tests.evaluation.study.chromium import PATIENCE, Page, find_chromium
from tests.evaluation.study.test_making import read_page

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="Chromium is not installed (apt-get install chromium)")

CAPTIONS = ["a red <b>flower</b>", "“blue” & white", "five petals"]
CHOICES = {"left": "ArrowLeft", "right": "ArrowRight", "tie": "ArrowDown"}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Light images against dark ones."""
    root = tmp_path_factory.mktemp("study")
    for name, low in (("light", 156), ("dark", 0)):
        (root / name).mkdir()
        rng = np.random.default_rng(0)
        for i in range(len(CAPTIONS)):
            pixels = rng.integers(low, low + 100, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
        (root / name / "captions.txt").write_text("\n".join(CAPTIONS), encoding="utf-8")
    return make_study([root / "light", root / "dark"], root / "study", repeats=1, raters=4)


@pytest.fixture
def tab(study, tmp_path):
    with Page(tmp_path / "profile", tmp_path / "downloads") as page:
        page.open(study.page.as_uri())
        yield page
        assert page.errors == []


def act(page, action, argument):
    """Answer after the pause that tells an answer from a double click."""
    time.sleep(0.25)
    action(argument)


def start(page, rater):
    page.run(f"element('rater').value = '{rater}'; element('rater').dispatchEvent(new Event('change'))")
    page.click("#begin")


def saved_file(folder, count=1):
    end = time.monotonic() + PATIENCE
    while len(files := list(folder.glob("*.json"))) < count:
        assert time.monotonic() < end, "no file was saved"
        time.sleep(0.05)
    return max(files, key=lambda file: file.stat().st_mtime)


def is_light(page, side):
    return page.run(
        f"((image) => {{ const canvas = document.createElement('canvas'); canvas.width = canvas.height = 8;"
        f"const context = canvas.getContext('2d'); context.drawImage(image, 0, 0);"
        f"return context.getImageData(4, 4, 1, 1).data[0] > 128 }})(element('{side}'))"
    )


def test_answers_with_keys_and_clicks_reach_the_file_and_the_results(study, tab, tmp_path):
    trials = read_page(study.page)["raters"][1]
    start(tab, 2)
    expected = []
    for i, (caption, left, right) in enumerate(trials):
        assert tab.text("#count") == f"Pair {i + 1} of 4"
        assert tab.text("#who") == "Rater 2"
        # The caption is hidden until the images have been judged without it.
        assert tab.text("#question") == "Which image looks more real?"
        assert tab.text("#caption") == ""
        tab.wait("element('left').complete && element('left').naturalWidth === 8")
        # Light images look more real to this rater, and dark ones match better, except where there is no difference.
        light = "left" if is_light(tab, "left") else "right"
        act(tab, tab.press, CHOICES[light])
        assert tab.text("#question") == "Which image matches this caption better?"
        assert tab.text("#caption") == f"“{CAPTIONS[caption]}”"
        dark = "tie" if i == 0 else {"left": "right", "right": "left"}[light]
        act(tab, tab.click, f"[data-choice={dark}]")
        expected.append({"left": left, "right": right, "realism": light, "match": dark})
    assert tab.text("#summary") == "Rater 2 has judged 4 of 4 pairs."
    tab.click(".save")
    file = saved_file(tmp_path / "downloads")
    content = json.loads(file.read_text())
    assert file.name == f"study-{content['study']}-rater-2.json"
    assert (content["rater"], content["trials"]) == (2, 4)
    assert all(0.4 < answer.pop("seconds") < PATIENCE for answer in content["answers"])
    assert content["answers"] == expected
    assert json.loads(tab.run("element('text').textContent"))["answers"][0]["left"] == trials[0][1]

    results = study_results(study.page.parent, [file])
    realism, match = results["comparisons"]
    assert realism["first"].endswith("light")
    assert (realism["wins"], realism["ties"], realism["losses"]) == (3, 0, 0)
    # The first pair may be the one that is repeated; its first answer, the tie, counts.
    assert (match["wins"], match["ties"], match["losses"]) == (0, 1, 2)
    assert results["raters"][0]["realism"]["consistent"] == results["raters"][0]["realism"]["repeated"] == 1


def test_answers_survive_a_reload_and_raters_are_apart(study, tab, tmp_path):
    start(tab, 1)
    act(tab, tab.press, "ArrowLeft")
    act(tab, tab.press, "ArrowDown")
    act(tab, tab.press, "ArrowRight")
    tab.reload()
    assert tab.text("#found") == "This browser has the answers of rater 1 to 1 of 4 pairs."
    assert tab.text("#begin") == "Continue"
    tab.run("element('rater').value = '3'; element('rater').dispatchEvent(new Event('change'))")
    assert (tab.text("#begin"), tab.text("#found")) == ("Start", "4 pairs.")
    start(tab, 1)
    assert tab.text("#count") == "Pair 2 of 4"
    # The answer to the first question is still there, and is asked for again.
    assert tab.text("#question") == "Which image looks more real?"
    assert tab.run("document.querySelector('[aria-pressed=true]').dataset.choice") == "right"
    tab.click(".save")
    content = json.loads(saved_file(tmp_path / "downloads").read_text())
    answers = [(answer["realism"], answer["match"]) for answer in content["answers"]]
    assert answers == [("left", "tie"), ("right", None)]
    (rater,) = study_results(study.page.parent, [tmp_path / "downloads" / f"study-{content['study']}-rater-1.json"])[
        "raters"
    ]
    assert (rater["answered"], rater["trials"]) == (1, 4)


def test_a_saved_file_has_the_same_token_until_the_rater_changes(tab, tmp_path):
    start(tab, 1)
    tokens = []
    for reload in (False, True):
        if reload:
            tab.reload()
            start(tab, 1)
        tokens.append(json.loads(tab.run("asText()"))["token"])
    start_over = "element('rater').value = '2'; showStart(); begin()"
    tab.run(start_over)
    tokens.append(json.loads(tab.run("asText()"))["token"])
    assert tokens[0] == tokens[1] != tokens[2]
    assert len(tokens[0]) == 32


def test_going_back_changes_an_answer(tab):
    start(tab, 1)
    assert tab.run("element('back').disabled")
    # Longer than the second look.
    time.sleep(1)
    act(tab, tab.press, "ArrowLeft")
    act(tab, tab.press, "ArrowLeft")
    assert tab.text("#count") == "Pair 2 of 4"
    tab.press("Backspace")
    tab.click("#back")
    assert tab.text("#count") == "Pair 1 of 4"
    assert tab.text("#question") == "Which image looks more real?"
    seconds = json.loads(tab.run("asText()"))["answers"][0]["seconds"]
    act(tab, tab.press, "ArrowDown")
    act(tab, tab.press, "ArrowRight")
    (answer,) = json.loads(tab.run("asText()"))["answers"]
    assert (answer["realism"], answer["match"], answer["seconds"]) == ("tie", "right", seconds)


def test_double_presses_and_keys_of_the_browser_are_no_answers(tab):
    start(tab, 1)
    time.sleep(0.25)
    tab.press("ArrowLeft")
    tab.press("ArrowLeft")
    assert tab.text("#question") == "Which image matches this caption better?"
    time.sleep(0.25)
    # Alt and an arrow is the browser's way back.
    tab.run("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', altKey: true}))")
    tab.run("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', repeat: true}))")
    assert tab.text("#question") == "Which image matches this caption better?"


def test_the_address_chooses_the_rater(study, tab):
    tab.open(f"{study.page.as_uri()}#rater=3")
    assert tab.run("element('rater').value") == "3"
    for number in ("0", "5", "x"):
        tab.open(f"{study.page.as_uri()}#rater={number}")
        assert tab.run("element('rater').value") == "1"


def test_a_browser_that_cannot_store_answers_is_reported(tab):
    assert not tab.text("#unsaved")
    tab.run("Storage.prototype.setItem = () => { throw new Error('full') }")
    start(tab, 1)
    assert tab.text("#unsaved").startswith("This browser does not let the page store answers")
    act(tab, tab.press, "ArrowLeft")
    assert json.loads(tab.run("asText()"))["answers"][0]["realism"] == "left"
    # Otherwise the browser would ask before it closes the page.
    tab.run("canStore = true")


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1366, 680), (1300, 1000)])
def test_a_pair_with_its_buttons_fits_into_the_window(tab, width, height):
    tab.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
    start(tab, 1)
    act(tab, tab.press, "ArrowLeft")
    assert tab.run("document.documentElement.scrollWidth") <= width
    assert tab.run("element('back').getBoundingClientRect().bottom") <= height
    boxes = [tab.run(f"element('{side}').getBoundingClientRect().width") for side in ("left", "right")]
    # At most four times the size of the images.
    assert boxes == [32, 32]


def test_the_key_is_not_needed_by_the_page(study):
    key = StudyKey.read(study.page.parent)
    assert all(name not in study.page.read_text(encoding="utf-8") for name in key.runs)
