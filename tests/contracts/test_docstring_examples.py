"""The examples in docstrings: every public class and function has some, and they print what they show."""

import dataclasses
import doctest
import inspect
import io
import sys
import tempfile
from typing import Any

import pytest
import torch

from tests.contracts.public import public_names, public_packages, resolve

# Their examples may have lines marked `# doctest: +SKIP`; all other examples must run as a whole.
NOT_RUN = {
    "mirror_modules.data.CocoCaptions": "reads the files of MS COCO",
    "mirror_modules.data.CubBirds": "reads the files of CUB-200-2011",
    "mirror_modules.data.OxfordFlowers": "reads the files of Oxford-102 flowers",
    "mirror_modules.data.WebDatasetCaptions": "reads shards, which need the extra `data`",
    "mirror_modules.evaluation.ablate": "trains several models",
    "mirror_modules.evaluation.compare": "trains several models",
    "mirror_modules.evaluation.evaluate": "needs a trained run",
    "mirror_modules.evaluation.study_results": "needs the answers of raters",
    "mirror_modules.evaluation.write_report": "needs a trained run",
    "mirror_modules.interop.HuggingFaceCaptioner": "needs a model of Hugging Face",
    "mirror_modules.interop.captioner_from": "needs a model of Hugging Face",
    "mirror_modules.training.train": "trains a model",
}


def needs_examples(value: Any) -> bool:
    """Check for a function or a class that computes something, unlike records, protocols, settings and exceptions."""
    if not inspect.isclass(value):
        # Registered operators are instances, without a docstring of their own.
        return inspect.isfunction(value)
    is_record = issubclass(value, tuple) and hasattr(value, "_fields")
    is_protocol = getattr(value, "_is_protocol", False)
    methods = [name for name, member in vars(value).items() if inspect.isroutine(member) and not name.startswith("_")]
    is_setting = dataclasses.is_dataclass(value) and value.__dataclass_params__.frozen and not methods
    return not (is_record or is_protocol or is_setting or issubclass(value, BaseException))


def paths_with_examples() -> list[str]:
    """One public path of each object: in the package that defines it, where that package exports it."""
    paths = {}
    for package in public_packages():
        for path in public_names(package):
            value = resolve(path)
            is_new = id(value) not in paths
            if needs_examples(value) and (is_new or value.__module__.startswith(f"{package}.")):
                paths[id(value)] = path
    return sorted(paths.values())


def examples_of(value: Any) -> doctest.DocTest:
    """The examples of an object's own docstring, to be run among the names of its module."""
    names = dict(vars(sys.modules[value.__module__]))
    return doctest.DocTestParser().get_doctest(value.__doc__ or "", names, value.__qualname__, value.__module__, 0)


def failures_of(value: Any) -> str:
    """The report of the examples that fail; empty if none does."""
    torch.manual_seed(0)
    report = io.StringIO()
    doctest.DocTestRunner(verbose=False).run(examples_of(value), out=report.write)
    return report.getvalue()


PATHS = paths_with_examples()


@pytest.mark.parametrize("path", PATHS)
def test_the_docstring_has_examples(path):
    _, heading, section = (inspect.getdoc(resolve(path)) or "").partition("\nExamples:\n")
    assert heading, f"{path}: the docstring has no section 'Examples:'"
    assert ">>> " in section, f"{path}: the section 'Examples:' has no line that starts with >>>"


@pytest.mark.parametrize("path", PATHS)
def test_the_examples_run(path, tmp_path, monkeypatch):
    # Folders that an example creates are removed with the test's.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    report = failures_of(resolve(path))
    assert not report, report


@pytest.mark.parametrize("path", sorted({*PATHS, *NOT_RUN}))
def test_exactly_the_listed_examples_have_skipped_lines(path):
    skipped = [example.source for example in examples_of(resolve(path)).examples if doctest.SKIP in example.options]
    if path in NOT_RUN:
        assert skipped, f"{path}: all lines run; remove it from NOT_RUN"
    else:
        assert not skipped, f"{path}: these lines do not run: {skipped}"


def double(x: int) -> int:
    """Double a number.

    Examples:
        >>> double(2)
        5
    """
    return 2 * x


def test_a_wrong_example_is_reported():
    report = failures_of(double)
    assert "double(2)" in report
    assert "Expected:\n    5\nGot:\n    4" in report


def crash() -> None:
    """Raise.

    Examples:
        >>> crash()
    """
    raise ValueError("out of order")


def test_an_example_that_raises_is_reported():
    assert "ValueError: out of order" in failures_of(crash)
