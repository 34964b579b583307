"""What type checkers see: a call has the type of `forward`, names are found, and README's snippets are correct."""

import inspect
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from torch import nn

import mirror_modules
from tests.contracts.public import public_names, public_packages, resolve

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")

USE = """
from collections.abc import Callable
import torch
from torch import Tensor
from typing_extensions import assert_type
import mirror_modules
from mirror_modules import GlobalLocalAttention, GlobalLocalContext

features, words, sentence = torch.zeros(2, 3, 5, 7), torch.zeros(2, 11, 13), torch.zeros(2, 17)
attention = GlobalLocalAttention(feature_dim=3, word_dim=13, condition_dim=17)
context = attention(features, words, sentence, need_weights=True)
assert_type(context, GlobalLocalContext)
assert_type(context.word_context, Tensor)
attention(features, words, sentense=sentence)  # wrong
attention(features, words)  # wrong
attention(features, words, "a red flower")  # wrong
context.word_contexts  # wrong
mirror_modules.GlobalLocalAtention  # wrong
mirror_modules.functional.word_attention(features, words)
function: Callable[[Tensor, Tensor, Tensor], GlobalLocalContext] = attention
layers = torch.nn.ModuleList([attention])
score = mirror_modules.RedescriptionScore(torch.nn.Linear(2, 3))
assert_type(score(features, ["a red flower"]), Tensor)
score(features, [7])  # wrong

class Scaled(GlobalLocalAttention):
    def forward(self, features: Tensor, *, scale: float) -> Tensor:  # type: ignore[override]
        return scale * features

assert_type(Scaled(3, 13, 17)(features, scale=0.5), Tensor)
Scaled(3, 13, 17)(features, words, sentence)  # wrong
"""
WRONG = {i for i, line in enumerate(USE.splitlines(), start=1) if line.endswith("# wrong")}


class Message(NamedTuple):
    file: str
    line: int
    is_error: bool
    text: str


def run_checker(*arguments: str | Path, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


def mypy(folder: Path, cache: Path) -> list[Message]:
    options = ["--config-file=", "--check-untyped-defs", "--output=json", "--cache-dir", cache]
    found = [json.loads(line) for line in run_checker("mypy", *options, ".", folder=folder).splitlines()]
    return [Message(entry["file"], entry["line"], entry["severity"] == "error", entry["message"]) for entry in found]


def pyright(folder: Path, cache: Path) -> list[Message]:
    (folder / "pyrightconfig.json").write_text('{"typeCheckingMode": "basic"}', encoding="utf-8")
    options = ["--outputjson", "--pythonpath", sys.executable]
    found = json.loads(run_checker("basedpyright", *options, folder=folder))["generalDiagnostics"]
    lines = [entry["range"]["start"]["line"] + 1 for entry in found]
    return [
        Message(Path(entry["file"]).name, line, entry["severity"] == "error", entry["message"])
        for entry, line in zip(found, lines)
    ]


def public_modules() -> list[str]:
    """One public path of each public `nn.Module`."""
    paths = {}
    for path in [path for package in public_packages() for path in public_names(package)]:
        value = resolve(path)
        if inspect.isclass(value) and issubclass(value, nn.Module):
            paths.setdefault(value, path)
    return sorted(paths.values())


def calls(paths: list[str]) -> str:
    """A line of imports, then for each class: a call, the same call of `forward`, a call with an unknown argument."""
    packages = sorted({path.rpartition(".")[0] for path in paths})
    lines = [f"import {', '.join(packages)}; from typing import Any"]
    for path in paths:
        parameters = list(inspect.signature(resolve(path).forward).parameters)[1:]
        given = ", ".join(f"{name}=value" for name in parameters)
        for call in (f"module({given})", f"module.forward({given})", f"module({given}, no_such=value)"):
            lines.append(f"def _{len(lines)}(module: {path}, value: Any) -> None: reveal_type({call})")
    return "\n".join(lines)


def untyped(paths: list[str], messages: list[Message]) -> list[str]:
    """The classes whose calls differ from their `forward` in type, or accept an unknown argument."""
    found = []
    for line, path in zip(itertools.count(2, 3), paths):
        call, forward, unknown = ([entry for entry in messages if entry.line == line + i] for i in range(3))
        types = [re.findall(r' is "(.*)"$', entry.text, re.DOTALL) for entry in (*call, *forward)]
        is_typed = len(types) == 2 and types[0] == types[1] and types[0][0] not in ("Any", "Unknown")
        if not is_typed or not any(entry.is_error for entry in unknown):
            found.append(path)
    return found


def snippets(page: str) -> list[str]:
    """The Python code blocks of a page, each with those that it continues."""
    joined: list[str] = []
    for kind, code in re.findall(r"^```([^\n]+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        if "continuation" in kind:
            joined[-1] += code
        elif "python" in kind:
            joined.append(code)
    return joined


# One test for each checker, because a start takes seconds.
@pytest.mark.parametrize("checker", [mypy, pyright], ids=["mypy", "pyright"])
def test_types(checker, tmp_path, pytestconfig):
    paths = [*public_modules(), "torch.nn.Linear"]
    files = {"calls.py": calls(paths), "use.py": USE}
    files["names.py"] = f"from mirror_modules import {', '.join(mirror_modules.__all__)}\n"
    # Reading the sources of transformers takes minutes.
    own = [snippet for snippet in snippets(README) if "transformers" not in snippet]
    files |= {f"readme_{i}.py": snippet for i, snippet in enumerate(own)}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    found = checker(tmp_path, pytestconfig.cache.mkdir("mypy"))

    # torch's own modules are not typed: the check of ours can fail.
    assert untyped(paths, [message for message in found if message.file == "calls.py"]) == ["torch.nn.Linear"]
    assert {message.line for message in found if message.file == "use.py" and message.is_error} == WRONG
    assert [message for message in found if message.file not in ("calls.py", "use.py") and message.is_error] == []


def test_a_page_has_its_snippets():
    page = "```sh\nls\n```\n```python\na = 1\n```\n```{.python notest}\nb\n```\n```python continuation\nc\n```\n"
    assert snippets(page) == ["a = 1\n", "b\nc\n"]
    assert len(snippets(README)) >= 2


@pytest.mark.parametrize("path", public_modules())
def test_a_typed_call_is_the_call_of_torch(path):
    assert resolve(path).__call__ is nn.Module.__call__
