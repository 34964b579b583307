"""Samples that cannot be read: the first one stops, or they are left out, counted and listed."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mirror_modules._checks import check_choice

ON_ERROR = ("stop", "skip", "list")
# More than this share of a data set is no accident: something is wrong with all of it.
LARGEST_SHARE = 0.05


class Skipped(NamedTuple):
    """A sample that was left out."""

    file: str
    """The file that is to blame, where there is a line in it to blame, that too."""
    reason: str
    """What is wrong with it; with the file before it, a sentence."""


class DamagedSample(ValueError):
    """One sample cannot be read; the others may be.

    Args:
        owner: Who complains.
        file: The file to blame.
        reason: What is wrong with it; with the file before it, a sentence.
    """

    def __init__(self, owner: str, file: str | Path, reason: str) -> None:
        super().__init__(owner, printable(file), printable(reason))

    @property
    def skipped(self) -> Skipped:
        """File and reason."""
        return Skipped(*self.args[1:])

    def __str__(self) -> str:
        owner, file, reason = self.args
        return f"{owner}: {file} {reason}."


class ErrorReport:
    """What was left out of a data set, found when it was opened or when it was read.

    Args:
        on_error: "stop" raises the first error, "skip" leaves damaged samples out as long as they are few (up to 5 %),
            "list" leaves out any number of them.

    Raises:
        ValueError: `on_error` is something else.
    """

    skipped: list[Skipped]
    """What was left out so far."""
    share_at_opening: float
    """The share of the samples that was left out when the data set was opened, before any image was read."""

    def __init__(self, on_error: str = "stop") -> None:
        check_choice("ErrorReport", "on_error", on_error, ON_ERROR)
        self.on_error = on_error
        self.skipped = []
        self.share_at_opening = 0.0

    def add(
        self,
        owner: str,
        file: str | Path,
        reason: str,
        *,
        missing: bool = False,
        remedy: str = "mend it, or leave it out with on_error='skip'",
    ) -> None:
        """Leave a sample out.

        Raises:
            ValueError: With `on_error="stop"`; a FileNotFoundError if something is `missing`.
        """
        if self.on_error == "stop":
            kind = FileNotFoundError if missing else ValueError
            raise kind(printable(f"{owner}: {file} {reason}; {remedy}."))
        self.skipped.append(Skipped(printable(file), printable(reason)))

    def check(self, owner: str, count: int, total: int) -> None:
        """Refuse to go on if `count` of `total` samples, beside those missing from the start, are too many.

        Raises:
            ValueError: They are, and `on_error` is "skip".
        """
        share = self.share_at_opening + (1 - self.share_at_opening) * count / max(total, 1)
        # A hair more, so that rounding does not refuse 3 of 60.
        if self.on_error == "skip" and share > LARGEST_SHARE + 1e-9:
            raise ValueError(
                f"{owner}: {len(self.skipped)} samples cannot be read, more than {LARGEST_SHARE:.0%} of them: "
                f"{self.listing()}. Mend or remove these files; `mirror-modules data inspect` lists them all."
            )

    def listing(self, limit: int = 5) -> str:
        """The first few files and reasons, in one line."""
        lines = [f"{file} {reason}" for file, reason in self.skipped[:limit]]
        more = len(self.skipped) - len(lines)
        return "; ".join(lines) + (f"; and {more} more" if more else "")


def printable(said: str | Path) -> str:
    """Text that UTF-8 can hold, out of what names files: names on disk need not be Unicode."""
    return str(said).encode("utf-8", "backslashreplace").decode("utf-8")
