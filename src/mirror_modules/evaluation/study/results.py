"""Results of a human study: win rates with intervals, agreement between raters, consistency of each rater."""

from __future__ import annotations

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from mirror_modules._files import read_json, write_json, write_text
from mirror_modules.evaluation.study.plan import (
    ANSWERS_FORMAT,
    LEFT,
    QUESTIONS,
    RIGHT,
    TIE,
    StudyKey,
    Trial,
    run_pairs,
)

RESULTS_FILE, TABLE_FILE = "results.json", "results.md"
# Two-sided normal quantile of a 95 % interval.
Z = 1.959964


class Answer(NamedTuple):
    """A rater's answers about a pair; None to a question that is not answered."""

    trial: Trial
    realism: str | None
    match: str | None
    seconds: float | None


class Rater(NamedTuple):
    """A file of answers."""

    number: int
    token: str
    """Random text that the page drew in the rater's browser: files of one rater share it."""
    path: Path
    answers: list[Answer]
    """In the order in which the pairs were seen."""


class Judgement(NamedTuple):
    """An answer about a pair that was seen for the first time."""

    rater: int
    runs: tuple[int, int]
    """Numbers of the two runs, in ascending order."""
    caption: int
    score: float
    """1 if the first run won, 0 if the second did, 0.5 for a tie."""


def study_results(folder: str | Path, files: Sequence[str | Path]) -> dict[str, Any]:
    """Summarize the answers to a human study; write results.json and results.md into its folder.

    The win rate of a run against another is its share of the answers; one of "no difference" counts half for either.
    Its 95 % interval is Wilson's, with the effective number of answers of `effective_answers`: answers about the same
    caption are not independent. A pair that a rater saw twice counts once, with the first answer; how often the second
    is the same is the rater's consistency. Files may be incomplete. Of several files of the same rater and browser, the
    one with the most answers counts.

    Args:
        folder: The folder that `make_study` wrote.
        files: Files that raters saved.

    Returns:
        The content of results.json. "comparisons" has an entry for each pair of runs and question: `win_rate` of
        `first` against `second`, its interval from `low` to `high`, and the counts. "agreement" has Krippendorff's
        alpha for each question; "raters" an entry for each rater.

    Raises:
        FileNotFoundError: The folder holds no study, or a file does not exist.
        ValueError: There is no file, a file is not one of answers to this study, or two files of the same rater come
            from different browsers.

    Examples:
        >>> from mirror_modules.evaluation import study_results
        >>> results = study_results("study", ["rater-1.json", "rater-2.json"])  # doctest: +SKIP
        >>> results["comparisons"][0]["win_rate"]  # doctest: +SKIP
        0.625
        >>> results["agreement"]["realism"]["alpha"]  # doctest: +SKIP
        0.41
    """
    folder = Path(folder)
    key = StudyKey.read(folder)
    if isinstance(files, str | Path) or not files:
        raise ValueError("study_results: files must be a list of one or more files that raters saved.")
    found = [read_answers(Path(file), key) for file in files]
    raters, dropped = without_duplicates(found)
    judged = {question: judgements(key, raters, question) for question in QUESTIONS}
    results = {
        "study": key.study,
        "runs": key.runs,
        "captions": len(key.captions),
        "comparisons": [
            {"question": question, "first": key.runs[first], "second": key.runs[second]}
            | compare([each for each in judged[question] if each.runs == (first, second)])
            for question in QUESTIONS
            for first, second in run_pairs(len(key.runs))
        ],
        "agreement": {question: agreement(judged[question]) for question in QUESTIONS},
        "raters": [describe_rater(rater, key.trials) for rater in raters],
        "duplicates": [str(path) for path in dropped],
    }
    write_json(folder / RESULTS_FILE, results)
    write_text(folder / TABLE_FILE, as_markdown(results))
    return results


def read_answers(path: Path, key: StudyKey) -> Rater:
    """Read a file of answers.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is not a file of answers, belongs to another study, or is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a file that a rater saved.")
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != ANSWERS_FORMAT:
        raise ValueError(f"{path} is not a {ANSWERS_FORMAT!r} file; expected one that a rater saved from the page.")
    if content.get("study") != key.study:
        raise ValueError(
            f"{path} has the answers to study {content.get('study')!r}, but the folder holds study {key.study!r}; give "
            "the folder of that study."
        )
    number, token, listed = (content.get(name) for name in ("rater", "token", "answers"))
    if type(number) is not int or not 1 <= number <= key.raters:
        raise ValueError(f"{path} is damaged: rater must be a number from 1 to {key.raters}, but it is {number!r}.")
    if not isinstance(token, str) or not isinstance(listed, list):
        raise ValueError(f"{path} is damaged: it lacks the rater's token or answers.")
    answers = [_answer(path, i, fields, key) for i, fields in enumerate(listed)]
    seen = Counter(frozenset(answer.trial[1:]) for answer in answers)
    if seen and max(seen.values()) > 2:
        raise ValueError(f"{path} is damaged: it has a pair of images more than twice.")
    return Rater(number, token, path, answers)


def _answer(path: Path, index: int, fields: Any, key: StudyKey) -> Answer:
    """Check an entry of a file of answers."""
    where = f"{path} is damaged: answer {index}"
    if not isinstance(fields, dict):
        raise ValueError(f"{where} is not an object.")
    left, right = fields.get("left"), fields.get("right")
    images = [key.images.get(name) if isinstance(name, str) else None for name in (left, right)]
    if images[0] is None or images[1] is None:
        raise ValueError(f"{where} names an image that the study does not have.")
    if images[0].caption != images[1].caption or images[0].run == images[1].run:
        raise ValueError(f"{where} is about two images that are not a pair.")
    for question in QUESTIONS:
        if (choice := fields.get(question)) not in (LEFT, RIGHT, TIE, None):
            raise ValueError(f"{where}: {question} must be {LEFT!r}, {RIGHT!r} or {TIE!r}, but it is {choice!r}.")
    seconds: Any = fields.get("seconds")
    is_time = type(seconds) in (int, float) and 0 <= seconds <= sys.float_info.max
    return Answer(
        trial=Trial(images[0].caption, str(left), str(right)),
        realism=fields.get("realism"),
        match=fields.get("match"),
        seconds=float(seconds) if is_time else None,
    )


def without_duplicates(raters: Sequence[Rater]) -> tuple[list[Rater], list[Path]]:
    """The file of each rater with the most answers, by the rater's number, and the paths of the others.

    Raises:
        ValueError: Two files of the same rater come from different browsers.
    """
    kept: dict[int, Rater] = {}
    dropped = []
    for rater in raters:
        other = kept.setdefault(rater.number, rater)
        if other is rater:
            continue
        if other.token != rater.token:
            raise ValueError(
                f"{other.path} and {rater.path} are both of rater {rater.number}, but from different browsers; leave "
                "one out, or, if two people chose this number, change `rater` in one of the files to an unused number."
            )
        longer, shorter = (rater, other) if _answered(rater) >= _answered(other) else (other, rater)
        kept[rater.number] = longer
        dropped.append(shorter.path)
    return [kept[number] for number in sorted(kept)], dropped


def _answered(rater: Rater) -> int:
    return sum(getattr(answer, question) is not None for answer in rater.answers for question in QUESTIONS)


def judgements(key: StudyKey, raters: Sequence[Rater], question: str) -> list[Judgement]:
    """All answers to a question, without those about pairs that the rater had seen before."""
    found = []
    for rater in raters:
        seen = set()
        for answer in rater.answers:
            choice, pair = getattr(answer, question), frozenset(answer.trial[1:])
            if choice is None or pair in seen:
                continue
            seen.add(pair)
            left, right = (key.images[name].run for name in answer.trial[1:])
            score = {LEFT: 1.0, RIGHT: 0.0, TIE: 0.5}[choice]
            runs = (min(left, right), max(left, right))
            found.append(Judgement(rater.number, runs, answer.trial.caption, score if left < right else 1 - score))
    return found


def compare(judged: Sequence[Judgement]) -> dict[str, Any]:
    """Win rate of the first run against the second, with its interval; None without an answer."""
    counts = Counter(each.score for each in judged)
    result: dict[str, Any] = {
        "win_rate": None,
        "low": None,
        "high": None,
        "wins": counts[1.0],
        "ties": counts[0.5],
        "losses": counts[0.0],
        "answers": len(judged),
        "captions": len({each.caption for each in judged}),
        "raters": len({each.rater for each in judged}),
    }
    if not judged:
        return result
    by_caption = defaultdict(list)
    for each in judged:
        by_caption[each.caption].append(each.score)
    rate = sum(each.score for each in judged) / len(judged)
    effective = effective_answers(list(by_caption.values()))
    low, high = wilson_interval(rate, effective)
    return {**result, "win_rate": rate, "low": low, "high": high, "effective_answers": effective}


def wilson_interval(rate: float, count: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share.

        (p + z^2 / 2n ± z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n),    z = 1.96

    Unlike a bootstrap interval, it has a width where all n answers are the same. With ties as halves it is too wide.

    Args:
        rate: The share p, in [0, 1].
        count: The number of independent answers n, above 0; not necessarily whole.

    Returns:
        The lower and the upper bound.
    """
    center, half = rate + Z**2 / (2 * count), Z * math.sqrt(rate * (1 - rate) / count + Z**2 / (4 * count**2))
    scale = 1 + Z**2 / count
    return max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)


def effective_answers(by_caption: Sequence[Sequence[float]]) -> float:
    """The number of independent answers that would determine the win rate as precisely as these.

        n_effective = p (1 - p) / v,    v = C / (C - 1) sum_c (sum_i (x_ci - p))^2 / n^2

    for the n answers x_ci about C captions, and their mean p. v is the variance of p if captions are drawn at random
    and the raters are the same. n_effective is limited to [C, n]: if raters always agree, it is C.

    Args:
        by_caption: The answers about each caption, in [0, 1]; at least one caption, and one answer about each.

    Returns:
        The number, between that of the captions and that of the answers.
    """
    captions, answers = len(by_caption), sum(map(len, by_caption))
    rate = sum(map(sum, by_caption)) / answers
    if captions < 2:
        return captions
    squares = sum((sum(scores) - rate * len(scores)) ** 2 for scores in by_caption)
    variance = captions / (captions - 1) * squares / answers**2
    if rate in (0, 1):
        return captions
    # Without any variance between captions, the limit is that of independent answers.
    effective = rate * (1 - rate) / variance if variance > 0 else math.inf
    return min(max(effective, captions), answers)


def expected_half_width(count: float) -> float:
    """Half the width of `wilson_interval` at a share of one half."""
    low, high = wilson_interval(0.5, count)
    return (high - low) / 2


def agreement(judged: Iterable[Judgement]) -> dict[str, Any]:
    """Krippendorff's alpha over all pairs of images, and the share of equal answers of two raters about a pair.

    Neither image of a pair is the first one, so each pair enters alpha twice, once with its sides exchanged. Random
    answers then have an alpha near 0 also where one run wins most pairs.
    """
    by_pair = defaultdict(list)
    for each in judged:
        by_pair[each.runs, each.caption].append(each.score)
    shared = [scores for scores in by_pair.values() if len(scores) > 1]
    equal = [first == second for scores in shared for first, second in combinations(scores, 2)]
    exchanged = [[1 - score for score in scores] for scores in shared]
    return {
        "alpha": krippendorff_alpha([*shared, *exchanged]),
        "equal_answers": sum(equal) / len(equal) if equal else None,
        "pairs": len(shared),
    }


def krippendorff_alpha(units: Iterable[Sequence[float]]) -> float | None:
    """Krippendorff's alpha with squared differences (interval data): agreement of raters, corrected for chance.

        alpha = 1 - D_o / D_e
        D_o = 1 / n        sum_u sum_{i != j} (x_ui - x_uj)^2 / (m_u - 1)
        D_e = 1 / n(n - 1) sum_{all values a != b} (x_a - x_b)^2

    for the m_u values of unit u, and n values in total. 1 is perfect agreement, 0 that of random values with the same
    distribution. With three ordered values of which the outer ones are equally frequent, it is also the alpha of
    ordinal data.

    Args:
        units: The values that raters gave to each unit; units with fewer than two do not count.

    Returns:
        Alpha, at most 1; None if no unit has two values, or all values are the same.
    """
    paired = [unit for unit in units if len(unit) > 1]
    values = [value for unit in paired for value in unit]
    if not values:
        return None
    observed = sum(_squared_differences(unit) / (len(unit) - 1) for unit in paired) / len(values)
    expected = _squared_differences(values) / (len(values) * (len(values) - 1))
    return 1 - observed / expected if expected > 0 else None


def _squared_differences(values: Sequence[float]) -> float:
    """Sum of (x_i - x_j)^2 over all ordered pairs."""
    return 2 * (len(values) * sum(value**2 for value in values) - sum(values) ** 2)


def describe_rater(rater: Rater, trials: int) -> dict[str, Any]:
    """Progress, consistency at repeated pairs, and shares of answers of a rater."""
    seconds = [answer.seconds for answer in rater.answers if answer.seconds is not None]
    described: dict[str, Any] = {
        "rater": rater.number,
        "file": str(rater.path),
        "answered": sum(all(getattr(answer, question) for question in QUESTIONS) for answer in rater.answers),
        "trials": trials,
        "seconds": median(seconds) if seconds else None,
    }
    for question in QUESTIONS:
        chosen = [(answer.trial, getattr(answer, question)) for answer in rater.answers if getattr(answer, question)]
        by_pair = defaultdict(list)
        for trial, choice in chosen:
            by_pair[frozenset(trial[1:])].append({LEFT: trial.left, RIGHT: trial.right, TIE: TIE}[choice])
        repeated = [choices for choices in by_pair.values() if len(choices) == 2]
        counts = Counter(choice for _, choice in chosen)
        sides = counts[LEFT] + counts[RIGHT]
        described[question] = {
            "repeated": len(repeated),
            "consistent": sum(first == second for first, second in repeated),
            "ties": counts[TIE] / len(chosen) if chosen else None,
            "left": counts[LEFT] / sides if sides else None,
        }
    return described


def as_markdown(results: Mapping[str, Any]) -> str:
    """Format three Markdown tables: win rates, agreement between raters, and the raters."""
    raters = results["raters"]
    answered, total = sum(rater["answered"] for rater in raters), sum(rater["trials"] for rater in raters)
    incomplete = sum(rater["answered"] < rater["trials"] for rater in raters)
    lines = [
        f"Human study {results['study']}: {_counted(len(raters), 'rater')}, {answered:,} of {total:,} pairs judged"
        + (f", {_counted(incomplete, 'incomplete file')}." if incomplete else "."),
        "",
        "Win rates in %, with 95 % intervals. A tie, the answer “no difference”, counts half for either run.",
        "",
        "| | run | against | win rate | wins / ties / losses | captions | raters |",
        "|---|---|---|---|---|---|---|",
    ]
    measured = [each for each in results["comparisons"] if each["win_rate"] is not None]
    for each in results["comparisons"]:
        rate = _percent(each["win_rate"])
        if each["win_rate"] is not None:
            rate += f" ({_percent(each['low'])} to {_percent(each['high'])})"
        counts = f"{each['wins']} / {each['ties']} / {each['losses']}"
        cells = [QUESTIONS[each["question"]], each["first"], each["second"], rate, counts]
        lines.append(_row([*cells, each["captions"], each["raters"]]))
    excluding = sum(not each["low"] <= 0.5 <= each["high"] for each in measured)
    verb = "excludes" if excluding == 1 else "exclude"
    lines += [
        "",
        f"{excluding} of {_counted(len(measured), 'interval')} {verb} 50 %; if no two runs differed, about "
        f"{0.05 * len(measured):.2g} would. The intervals are for other captions judged by the same raters.",
        "",
        "| | Krippendorff's alpha | equal answers, % | pairs with several raters |",
        "|---|---|---|---|",
    ]
    for question, each in results["agreement"].items():
        alpha = "–" if each["alpha"] is None else f"{each['alpha']:.2f}"
        lines.append(_row([QUESTIONS[question], alpha, _percent(each["equal_answers"]), each["pairs"]]))
    heads = [f"{head}: {text}" for text in QUESTIONS.values() for head in ("consistent", "left, %", "ties, %")]
    lines += ["", _row(["rater", "pairs judged", *heads, "seconds per pair"]), "|---" * (len(heads) + 3) + "|"]
    for rater in raters:
        cells = [rater["rater"], f"{rater['answered']} of {rater['trials']}"]
        for question in QUESTIONS:
            each = rater[question]
            cells.append(f"{each['consistent']} of {each['repeated']}" if each["repeated"] else "–")
            cells += [_percent(each["left"]), _percent(each["ties"])]
        lines.append(_row([*cells, "–" if rater["seconds"] is None else f"{rater['seconds']:.1f}"]))
    lines += [
        "",
        "Consistent: pairs that were shown again with their sides exchanged and got the same answer. Left: share of "
        "the left image among the answers other than ties; near 50 % without a preference for a side.",
    ]
    if results["duplicates"]:
        lines += ["", f"Not counted, because another file of the same rater has more answers: {_listed(results)}."]
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[object]) -> str:
    # A bar in a name would begin another cell.
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _listed(results: Mapping[str, Any]) -> str:
    return ", ".join(results["duplicates"])
