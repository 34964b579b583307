"""Statistics of a human study against loops and hand calculations, and the files of raters."""

import json
import math

import numpy as np
import pytest

from mirror_modules.evaluation import study_results
from mirror_modules.evaluation.study.plan import ANSWERS_FORMAT, StudyImage, StudyKey
from mirror_modules.evaluation.study.results import (
    Judgement,
    agreement,
    effective_answers,
    expected_half_width,
    krippendorff_alpha,
    wilson_interval,
)

RUNS = ["runs/a", "runs/b", "runs|c"]
CAPTIONS = [f"caption {i}" for i in range(5)]


def image_id(run, caption):
    return f"{'abc'[run]}{caption}"


@pytest.fixture
def folder(tmp_path):
    """A study with three runs and five captions, without a page."""
    images = {image_id(run, i): StudyImage(run, i, i) for run in range(3) for i in range(5)}
    StudyKey("study-id", RUNS, CAPTIONS, raters=4, trials=6, images=images, settings={}).write(tmp_path)
    return tmp_path


def answer(left, right, realism="left", match="tie", seconds=2.5):
    return {"left": left, "right": right, "realism": realism, "match": match, "seconds": seconds}


def write_answers(folder, answers, rater=1, token="t", name=None, **changes):
    content = {"format": ANSWERS_FORMAT, "study": "study-id", "rater": rater, "token": token, "answers": answers}
    path = folder / (name or f"rater-{rater}.json")
    path.write_text(json.dumps({**content, **changes}))
    return path


def comparison(results, first="runs/a", second="runs/b", question="realism"):
    (found,) = [
        each
        for each in results["comparisons"]
        if (each["first"], each["second"], each["question"]) == (first, second, question)
    ]
    return found


# Krippendorff's alpha.


def alpha_by_loops(units):
    """The sums of the formula, written out."""
    units = [unit for unit in units if len(unit) > 1]
    values = [value for unit in units for value in unit]
    n = len(values)
    observed = 0.0
    for unit in units:
        for i in range(len(unit)):
            for j in range(len(unit)):
                if i != j:
                    observed += (unit[i] - unit[j]) ** 2 / (len(unit) - 1) / n
    expected = 0.0
    for i in range(n):
        for j in range(n):
            if i != j:
                expected += (values[i] - values[j]) ** 2 / (n * (n - 1))
    return 1 - observed / expected


def test_alpha_of_an_example_calculated_by_hand():
    # Six values, three of 1 and three of 0. D_o = (0 + 2 + 0) / 6 = 1/3; D_e = 2 * 3 * 3 / (6 * 5) = 3/5.
    assert krippendorff_alpha([(1, 1), (0, 1), (0, 0)]) == pytest.approx(1 - (1 / 3) / (3 / 5))
    # Four values 0, 0.5, 0.5, 1: D_o = (2 * 0.25 + 2 * 0.25) / 4 = 1/4; D_e = 2 * (4 * 0.25 + 1) / 12 = 1/3.
    assert krippendorff_alpha([(0, 0.5), (0.5, 1)]) == pytest.approx(1 / 4)


def test_alpha_of_the_published_example():
    """Four observers and twelve units with missing values, in "Computing Krippendorff's alpha-reliability" (2011)."""
    observers = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
        [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
    ]
    units = [[value for value in unit if value is not None] for unit in zip(*observers)]
    assert krippendorff_alpha(units) == pytest.approx(0.849, abs=0.0005)


def test_alpha_matches_the_loops_and_ignores_units_with_one_value():
    units = [(1, 0.5, 0), (0, 0), (1,), (0.5, 1, 1, 0.5, 0), (), (1, 1)]
    assert krippendorff_alpha(units) == pytest.approx(alpha_by_loops(units))
    assert krippendorff_alpha([*units, (0,), (0,)]) == pytest.approx(alpha_by_loops(units))


@pytest.mark.parametrize("units", [[], [(1,), (0,)], [(1, 1), (1, 1)]])
def test_alpha_is_undefined_without_pairs_or_variation(units):
    assert krippendorff_alpha(units) is None


def judged(*scores_of_caption, runs=(0, 1)):
    return [
        Judgement(rater, runs, caption, score)
        for caption, scores in enumerate(scores_of_caption)
        for rater, score in enumerate(scores, start=1)
    ]


def test_agreement_does_not_depend_on_the_order_of_the_runs_nor_on_one_that_always_wins():
    scores = [(1, 1, 1), (1, 1, 0), (1, 0.5), (1,)]
    result = agreement(judged(*scores))
    exchanged = agreement(judged(*[[1 - score for score in each] for each in scores]))
    assert result == exchanged
    assert result["pairs"] == 3
    # Of three pairs of raters about captions 0 and 1 each, and one about caption 2: 3 + 1 + 0 agree.
    assert result["equal_answers"] == 4 / 7
    # All raters always prefer the first run: full agreement, although the answers do not vary.
    assert agreement(judged((1, 1), (1, 1), (1, 1)))["alpha"] == 1
    assert agreement(judged((1,), (0,))) == {"alpha": None, "equal_answers": None, "pairs": 0}


def test_the_same_caption_of_other_runs_is_another_pair():
    result = agreement([*judged((1, 1)), *judged((0, 0), runs=(0, 2))])
    assert (result["pairs"], result["equal_answers"]) == (2, 1)


# Intervals.


@pytest.mark.parametrize(("rate", "count"), [(0.5, 10), (0.2, 35), (1, 8), (0, 8), (0.93, 4.5)])
def test_the_bounds_of_the_interval_solve_the_equation_of_wilson(rate, count):
    """At each bound b, the rate is 1.96 standard errors of b away; at the rates 0 and 1, one bound is the rate."""
    low, high = wilson_interval(rate, count)
    assert 0 <= low <= rate <= high <= 1
    for bound in (low, high):
        assert (rate - bound) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / count, abs=1e-12)


def test_the_interval_of_a_known_example():
    # 81 of 263, the example of Newcombe (1998): 0.2553 to 0.3662.
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_the_expected_half_width():
    low, high = wilson_interval(0.5, 50)
    assert expected_half_width(50) == pytest.approx((high - low) / 2)
    assert 0.13 < expected_half_width(50) < 0.14


def test_the_effective_number_matches_the_formula_in_loops():
    scores = [(1, 1, 0), (0, 0), (1,), (0, 0, 0), (1, 0.5, 1)]
    answers = [score for each in scores for score in each]
    n, rate = len(answers), sum(answers) / len(answers)
    total = 0.0
    for each in scores:
        deviation = 0.0
        for score in each:
            deviation += score - rate
        total += deviation**2
    expected = rate * (1 - rate) / (5 / 4 * total / n**2)
    assert 5 < expected < n
    assert effective_answers(scores) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        # Raters who always agree are as one rater.
        ([(1, 1, 1), (0, 0, 0), (1, 1, 1), (0, 0, 0)], 4),
        # One answer about each caption: all are independent.
        ([(1,), (0,), (1,), (0.5,), (0,)], 5),
        # Answers that vary within the captions only.
        ([(1, 0), (0, 1), (1, 0)], 6),
        # Without variation, captions are what is certain.
        ([(1, 1), (1, 1), (1, 1)], 3),
        ([(1, 0, 1)], 1),
    ],
)
def test_the_effective_number_is_between_captions_and_answers(scores, expected):
    assert effective_answers(scores) == expected


@pytest.mark.parametrize(("captions", "raters", "spread"), [(12, 3, 1), (30, 1, 1), (30, 10, 100), (30, 3, 1)])
def test_the_interval_covers_the_rate_of_all_captions(captions, raters, spread):
    """Captions differ in how often the first run wins: widely for a spread of 1, hardly for 100."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        rates = rng.beta(0.6 * spread, 0.4 * spread, (captions, 1))
        scores = (rng.random((captions, raters)) < rates).astype(float)
        scores[rng.random(scores.shape) < 0.2] = 0.5
        low, high = wilson_interval(scores.mean(), effective_answers(scores.tolist()))
        covered += low <= 0.8 * 0.6 + 0.2 * 0.5 <= high
    assert 0.92 <= covered / 400 <= 0.995


# Results.


def test_wins_ties_and_losses_are_counted_whichever_side_an_image_is_on(folder):
    answers = [
        answer("a0", "b0", "left", "tie"),
        answer("b1", "a1", "left", "tie"),
        answer("b2", "a2", "right", "left"),
        answer("a3", "b3", "tie", "right"),
        answer("c0", "b0", "left", "left"),
    ]
    results = study_results(folder, [write_answers(folder, answers)])
    found = comparison(results)
    assert (found["wins"], found["ties"], found["losses"]) == (2, 1, 1)
    assert found["win_rate"] == 2.5 / 4
    assert (found["low"], found["high"]) == pytest.approx(wilson_interval(2.5 / 4, 4))
    assert (found["answers"], found["captions"], found["raters"]) == (4, 4, 1)
    matched = comparison(results, question="match")
    assert (matched["wins"], matched["ties"], matched["losses"]) == (0, 2, 2)
    assert comparison(results, "runs/b", "runs|c")["win_rate"] == 0
    assert comparison(results, "runs/a", "runs|c")["win_rate"] is None


def test_a_repeated_pair_counts_once_and_measures_consistency(folder):
    answers = [
        answer("a0", "b0", "left", "tie"),
        answer("a1", "b1", "left", "left"),
        answer("b0", "a0", "right", "tie"),
        answer("b1", "a1", "left", "tie"),
    ]
    results = study_results(folder, [write_answers(folder, answers)])
    assert comparison(results)["wins"] == 2
    assert comparison(results)["answers"] == 2
    (rater,) = results["raters"]
    assert rater["realism"] == {"repeated": 2, "consistent": 1, "ties": 0, "left": 0.75}
    assert rater["match"] == {"repeated": 2, "consistent": 1, "ties": 0.75, "left": 1}


def test_incomplete_files_are_accepted_and_counted(folder):
    answers = [answer("a0", "b0"), answer("a1", "b1", "right", None, None)]
    results = study_results(folder, [write_answers(folder, answers), write_answers(folder, [], rater=2)])
    assert [(each["answered"], each["trials"], each["seconds"]) for each in results["raters"]] == [
        (1, 6, 2.5),
        (0, 6, None),
    ]
    assert (comparison(results)["answers"], comparison(results, question="match")["answers"]) == (2, 1)
    text = (folder / "results.md").read_text()
    assert "2 raters, 1 of 12 pairs judged, 2 incomplete files." in text


def test_the_longest_of_several_files_of_a_rater_counts(folder):
    early = write_answers(folder, [answer("a0", "b0", "right")], name="early.json")
    late = write_answers(folder, [answer("a0", "b0", "left"), answer("a1", "b1", "left")], name="late.json")
    for files in ([early, late], [late, early], [late, early, late]):
        results = study_results(folder, files)
        assert comparison(results)["wins"] == 2
        assert comparison(results)["losses"] == 0
        assert len(results["raters"]) == 1
        assert str(early) in results["duplicates"]
        assert len(results["duplicates"]) == len(files) - 1


def test_two_people_with_the_same_number_are_an_error(folder):
    files = [write_answers(folder, [answer("a0", "b0")], token=token, name=f"{token}.json") for token in "xy"]
    with pytest.raises(ValueError, match=r"x\.json and .*y\.json are both of rater 1, but from different browsers"):
        study_results(folder, files)
    write_answers(folder, [answer("a0", "b0")], token="y", name="y.json", rater=2)
    assert len(study_results(folder, files)["raters"]) == 2


def test_raters_agree_and_intervals_are_for_captions(folder):
    answers = [answer(f"a{i}", f"b{i}", "left" if i else "right") for i in range(5)]
    files = [write_answers(folder, answers, rater=rater, token=str(rater)) for rater in (1, 2, 3)]
    results = study_results(folder, files)
    assert results["agreement"]["realism"] == {"alpha": 1, "equal_answers": 1, "pairs": 5}
    found = comparison(results)
    assert (found["answers"], found["effective_answers"]) == (15, 5)
    assert (found["low"], found["high"]) == pytest.approx(wilson_interval(0.8, 5))
    assert json.loads((folder / "results.json").read_text()) == results


def test_the_table_has_all_results(folder):
    answers = [answer("a0", "b0", "left", "left"), answer("b0", "a0", "right", "left")]
    early = write_answers(folder, answers[:1], name="early.json")
    study_results(folder, [write_answers(folder, answers), early])
    lines = (folder / "results.md").read_text().splitlines()
    low, high = wilson_interval(1, 1)
    rate = f"100.0 ({100 * low:.1f} to {100 * high:.1f})"
    assert f"| looks more real | runs/a | runs/b | {rate} | 1 / 0 / 0 | 1 | 1 |" in lines
    assert "| looks more real | runs/a | runs\\|c | – | 0 / 0 / 0 | 0 | 0 |" in lines
    assert "| looks more real | – | – | 0 |" in lines
    assert "| 1 | 2 of 6 | 1 of 1 | 50.0 | 0.0 | 0 of 1 | 100.0 | 0.0 | 2.5 |" in lines
    assert any(line.startswith("0 of 2 intervals exclude 50 %") for line in lines)
    assert f"Not counted, because another file of the same rater has more answers: {early}." in lines


def test_a_file_of_another_study_is_named(folder):
    path = write_answers(folder, [], study="other")
    with pytest.raises(ValueError, match=r"rater-1\.json has the answers to study 'other', but the folder holds study"):
        study_results(folder, [path])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "x"}, "is not a 'mirror-modules study answers 1' file"),
        ({"rater": 5}, "rater must be a number from 1 to 4, but it is 5"),
        ({"rater": "1"}, "rater must be a number"),
        ({"rater": True}, "rater must be a number from 1 to 4, but it is True"),
        ({"token": None}, "lacks the rater's token or answers"),
        ({"answers": {}}, "lacks the rater's token or answers"),
        ({"answers": [3]}, "answer 0 is not an object"),
        ({"answers": [answer("a0", "x")]}, "answer 0 names an image that the study does not have"),
        ({"answers": [answer("a0", ["b0"])]}, "answer 0 names an image that the study does not have"),
        ({"answers": [answer("a0", "b0"), answer("a0", "b1")]}, "answer 1 is about two images that are not a pair"),
        ({"answers": [answer("a0", "a0")]}, "not a pair"),
        ({"answers": [answer("a0", "b0", "both")]}, "realism must be 'left', 'right' or 'tie', but it is 'both'"),
        ({"answers": [answer("a0", "b0", match=1)]}, "match must be 'left', 'right' or 'tie', but it is 1"),
        ({"answers": [answer("a0", "b0")] * 3}, "it has a pair of images more than twice"),
    ],
)
def test_damaged_files_are_errors(folder, changes, message):
    path = write_answers(folder, **{"answers": [], "name": "file.json", **changes})
    with pytest.raises(ValueError, match=message) as caught:
        study_results(folder, [path])
    assert "file.json" in str(caught.value)


def test_missing_and_unreadable_files_are_errors(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist; expected a file that a rater saved"):
        study_results(folder, [folder / "none.json"])
    (folder / "text.json").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.json is damaged: it is not JSON"):
        study_results(folder, [folder / "text.json"])
    for files in ([], "file.json"):
        with pytest.raises(ValueError, match="files must be a list of one or more files"):
            study_results(folder, files)


def test_a_folder_without_a_study_or_with_a_damaged_key_is_an_error(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no study: key\.json is missing"):
        study_results(tmp_path / "none", ["file.json"])
    (folder / "key.json").write_text('{"format": "mirror-modules study 1", "study": "x"}')
    with pytest.raises(ValueError, match=r"key\.json is damaged \('images'\)"):
        study_results(folder, ["file.json"])
    (folder / "key.json").write_text('{"format": "mirror-modules study 9"}')
    with pytest.raises(ValueError, match=r"key\.json is not a 'mirror-modules study 1' file"):
        study_results(folder, ["file.json"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"study": 3}, "study must be a text, but it is 3"),
        ({"runs": "runs/a"}, "runs must be a list of 2 or more texts, but it is 'runs/a'"),
        ({"captions": None}, "captions must be a list of 1 or more texts, but it is None"),
        ({"raters": "4"}, "raters must be a whole number of at least 1, but it is '4'"),
        ({"trials": 0}, "trials must be a whole number of at least 1, but it is 0"),
    ],
)
def test_a_key_with_other_fields_is_an_error(folder, changes, message):
    answers = write_answers(folder, [])
    key = json.loads((folder / "key.json").read_text())
    (folder / "key.json").write_text(json.dumps(key | changes))
    with pytest.raises(ValueError, match=rf"key\.json is damaged: {message}"):
        study_results(folder, [answers])


@pytest.mark.parametrize(("field", "value"), [("run", 7), ("run", "0"), ("run", -1), ("caption", True), ("caption", 5)])
def test_a_key_whose_images_belong_to_nothing_is_an_error(folder, field, value):
    answers = write_answers(folder, [answer("a0", "b0")])
    key = json.loads((folder / "key.json").read_text())
    key["images"]["a0"][field] = value
    (folder / "key.json").write_text(json.dumps(key))
    last = len(key[f"{field}s"]) - 1
    with pytest.raises(ValueError, match=f"{field} of image a0 must be a number from 0 to {last}, but it is {value!r}"):
        study_results(folder, [answers])


@pytest.mark.parametrize("seconds", ["fast", None, -1, True, float("nan"), 10**400])
def test_times_that_are_no_times_are_left_out(folder, seconds):
    answers = [answer("a0", "b0", seconds=seconds), answer("a1", "b1", seconds=4)]
    results = study_results(folder, [write_answers(folder, answers)])
    assert results["raters"][0]["seconds"] == 4
    assert math.isfinite(results["comparisons"][0]["low"])
