"""Plan of a human study: the pairs of images that each rater sees, and the key that names the run of each image."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mirror_modules._files import read_json, write_json

KEY_FORMAT, ANSWERS_FORMAT = "mirror-modules study 1", "mirror-modules study answers 1"
PAGE_FILE, KEY_FILE = "study.html", "key.json"
# The questions of the page, in their order, with the names of their fields in a file of answers.
QUESTIONS = {"realism": "looks more real", "match": "matches the caption better"}
# The answers to a question.
LEFT, RIGHT, TIE = "left", "right", "tie"


class Trial(NamedTuple):
    """A pair of images as a rater sees it."""

    caption: int
    """Number of the caption."""
    left: str
    """Id of the image on the left."""
    right: str
    """Id of the image on the right."""


class StudyImage(NamedTuple):
    """What the key says of an image."""

    run: int
    """Number of the run."""
    caption: int
    """Number of the caption."""
    seed: int | None
    """Seed of the image; None for one that was read from a folder of images."""


class StudyKey(NamedTuple):
    """Content of key.json, which stays with the person who makes the study."""

    study: str
    """Id of the study, which its page and the files of answers repeat."""
    runs: list[str]
    captions: list[str]
    raters: int
    """Number of raters among which a rater chooses."""
    trials: int
    """Pairs that each rater sees, repeated ones included."""
    images: dict[str, StudyImage]
    """The image of each id."""
    settings: dict[str, Any]
    """The arguments of `make_study` that are not above, for the record."""

    def write(self, folder: Path) -> Path:
        """Write key.json, and return its path."""
        images = {name: image._asdict() for name, image in self.images.items()}
        write_json(folder / KEY_FILE, {"format": KEY_FORMAT, **self._asdict(), "images": images})
        return folder / KEY_FILE

    @classmethod
    def read(cls, folder: Path) -> StudyKey:
        """Read key.json.

        Raises:
            FileNotFoundError: The folder holds no study.
            ValueError: The file is damaged, or of another format.
        """
        path = folder / KEY_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} holds no study: {KEY_FILE} is missing; expected a folder that `mirror-modules study` wrote."
            )
        content = read_json(path)
        if not isinstance(content, dict) or content.pop("format", None) != KEY_FORMAT:
            raise ValueError(f"{path} is not a {KEY_FORMAT!r} file; expected the key of a study.")
        try:
            images = {name: StudyImage(**image) for name, image in content.pop("images").items()}
            key = cls(**content, images=images)
        except (AttributeError, LookupError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}).") from error
        if problem := key._problem():
            raise ValueError(f"{path} is damaged: {problem}.")
        return key

    def _problem(self) -> str | None:
        """What no key can hold; None for a key that `write` may have written."""
        if not isinstance(self.study, str):
            return f"study must be a text, but it is {self.study!r}"
        for name, smallest in {"runs": 2, "captions": 1}.items():
            texts = getattr(self, name)
            if not isinstance(texts, list) or len(texts) < smallest or not all(isinstance(text, str) for text in texts):
                return f"{name} must be a list of {smallest} or more texts, but it is {texts!r}"
        for name in ("raters", "trials"):
            if type(count := getattr(self, name)) is not int or count < 1:
                return f"{name} must be a whole number of at least 1, but it is {count!r}"
        for name, image in self.images.items():
            for field, listed in {"run": self.runs, "caption": self.captions}.items():
                if type(number := getattr(image, field)) is not int or not 0 <= number < len(listed):
                    return f"{field} of image {name} must be a number from 0 to {len(listed) - 1}, but it is {number!r}"
        return None


def run_pairs(runs: int) -> list[tuple[int, int]]:
    """All pairs of runs, as their numbers in ascending order."""
    return list(combinations(range(runs), 2))


def plan_trials(images: Sequence[Sequence[str]], pairs: int, repeats: int, seed: int, rater: int) -> list[Trial]:
    """The pairs that a rater sees, in their order.

    Each block of as many trials as there are pairs of runs has one of each, in random order and with random captions,
    so that a rater who stops early has judged all pairs of runs equally often. Trials of the same two runs come in
    twos, with either run on the left in one of them. A pair that is repeated is from the first third of the trials, and
    is seen again in the last third with its sides exchanged.

    Args:
        images: Id of the image of each run and caption: images[run][caption].
        pairs: Number of different pairs; at most all pairs of runs at all captions.
        repeats: Number of pairs that are repeated; at most a third of `pairs`, rounded down.
        seed: Seed of the study.
        rater: Number of the rater, from 1.

    Returns:
        `pairs` trials, and the repeated ones.
    """
    rng = np.random.default_rng([seed, rater])
    compared, captions = run_pairs(len(images)), len(images[0])
    orders = [rng.permutation(captions) for _ in compared]
    # Each row is a random order of both sides.
    swaps = [rng.permuted(np.tile([False, True], (captions // 2 + 1, 1)), axis=1).ravel() for _ in compared]
    trials: list[Trial] = []
    for row in range(captions):
        for number in rng.permutation(len(compared)):
            caption = int(orders[number][row])
            shown = [images[run][caption] for run in compared[number]]
            left, right = reversed(shown) if swaps[number][row] else shown
            trials.append(Trial(caption, left, right))
    del trials[pairs:]
    third = len(trials) // 3
    again = [trials[i] for i in rng.choice(third, repeats, replace=False)] if repeats else []
    # Inserted from the end, so that the places before stay where they are.
    places = sorted(rng.integers(len(trials) - third, len(trials) + 1, size=len(again)).tolist(), reverse=True)
    for place, trial in zip(places, again):
        trials.insert(place, Trial(trial.caption, trial.right, trial.left))
    return trials
