"""The commands and Python blocks of README and the documentation, the package page, and the notebook."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from mirror_modules import MirrorGAN, MirrorGANConfig, Vocabulary
from mirror_modules.cli import COMMANDS, main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text, *languages):
    return [
        content for info, content in FENCE.findall(text) if re.split(r"[\s.{}]+", info.strip("{. "))[0] in languages
    ]


def commands(path):
    """The words of each `mirror-modules` command in the shell blocks of a page."""
    for block in blocks(path.read_text(encoding="utf-8"), "sh", "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            names = [i for i, word in enumerate(words) if Path(word).name == "mirror-modules"]
            if names and "install" not in words:
                yield words[names[0] + 1 :]


def round_trip():
    """The commands of the block with `describe runs/demo/model`, and the Python block that follows."""
    start = README.index("mirror-modules train demo --out runs/demo\n")
    end = README.index("```\n", start)
    shell = [shlex.split(line) for line in README[start:end].splitlines()]
    return [words[1:] for words in shell], blocks(README[end + 4 :], "python")[0]


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """A small untrained model at runs/demo/model, in the current folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = MirrorGANConfig(embedding_dim=7, word_dim=10, channels=3, resolutions=(32, 64), captioner_backbone="conv")
    # The vocabulary of README's caption, so that a warning of unknown words fails the test.
    words = next(words for words in commands(ROOT / "README.md") if words[0] == "generate")[2]
    MirrorGAN(config, Vocabulary.build([words])).save_pretrained("runs/demo/model")
    return tmp_path


def test_the_round_trip_of_the_readme_runs_word_for_word(demo, capsys):
    (train, generate, describe), _ = round_trip()
    assert train[0] == "train"
    for words in (generate, describe):
        assert main(words) == 0
    with Image.open("flower.png") as image:
        assert image.size == (64, 64)  # the bare image
    assert capsys.readouterr().out.startswith("flower.png: seed 0, ")


@pytest.mark.filterwarnings("error")
def test_the_python_of_the_readmes_round_trip_runs(demo, capsys):
    namespace = {}
    exec(round_trip()[1], namespace)
    assert namespace["images"].shape == (4, 3, 64, 64)
    assert [path.name for path in sorted(Path().glob("flower*"))] == [f"flower-00{i}.png" for i in range(4)]
    assert len(json.loads(capsys.readouterr().out.replace("'", '"'))) == 4


def test_the_first_python_block_scores_images_with_a_captioner(monkeypatch):
    """With a tiny model of the same class in place of the downloaded one."""
    transformers = pytest.importorskip("transformers")
    from tests.interop.tiny import make

    model, processor = make("blip")
    loaded = []

    def load(name):
        loaded.append(name)
        return model

    monkeypatch.setattr(transformers.BlipForConditionalGeneration, "from_pretrained", load)
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda name: processor)
    namespace = {}
    exec(blocks(README, "python")[0], namespace)
    assert loaded == ["Salesforce/blip-image-captioning-base"]
    assert namespace["images"].grad.abs().sum() > 0
    assert namespace["best"].scores.shape == (2, 8)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_command_and_option_exists(path, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in commands(path):
        assert words[0] in COMMANDS, words
        name = words[:2] if words[0] in ("data", "train", "ablate") and not words[1].startswith("-") else words[:1]
        with pytest.raises(SystemExit, match=r"^0$"):
            main([*name, "--help"])
        known = set(re.findall(r"--[a-z][\w.-]*", capsys.readouterr().out))
        options = {word.split("=")[0] for word in words if word.startswith("--")}
        assert options <= known, f"mirror-modules {' '.join(words)}: unknown {options - known}"


def test_the_options_in_the_table_of_the_command_line_exist(capsys):
    rows = re.findall(
        r"^\| `([a-z ]+)[^`]*` \| (.*?) \|", (ROOT / "docs/command-line.md").read_text("utf-8"), re.MULTILINE
    )
    assert {command.split()[0] for command, _ in rows} == set(COMMANDS)
    for command, options in rows:
        with pytest.raises(SystemExit, match=r"^0$"):
            main([*command.split(), "--help"])
        known = set(re.findall(r"--[a-z][\w.-]*", capsys.readouterr().out))
        listed = set(re.findall(r"`(--[\w.-]+)`", options))
        assert listed <= known, f"{command}: unknown {listed - known}"
        # The fields of a recipe, all with a dot except these two, have a page of their own.
        missing = {option for option in known - listed if "." not in option and not option.startswith("--no-")}
        unlisted = {"--help", "--name", *(["--seed"] if command == "ablate " else [])}
        assert missing <= unlisted, f"{command}: not in the table: {missing}"


def test_each_python_block_of_the_readme_stands_alone():
    infos = [info for info, content in FENCE.findall(README) if "import" in content and "python" in info]
    assert infos.count("python") >= 5
    assert not [info for info in infos if "continuation" in info]


def package_page(folder, address):
    """README as the package page shows it, with the address of the documentation, which is one line of pyproject."""
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    unset = "replacement = ']('"
    assert settings.count(unset) == 1
    (folder / "pyproject.toml").write_text(settings.replace(unset, f"replacement = ']({address}'"), encoding="utf-8")
    command = [sys.executable, "-m", "hatch_fancy_pypi_readme", folder / "pyproject.toml", "-o", folder / "page.md"]
    subprocess.run(command, cwd=ROOT, check=True)
    return (folder / "page.md").read_text(encoding="utf-8")


def links(text):
    return re.findall(r"\]\(([^)]*)\)", FENCE.sub("", text))


def test_the_package_page_has_no_broken_link_without_an_address(tmp_path):
    page = package_page(tmp_path, "")
    assert "https://arxiv.org/abs/1903.05854" in links(page)
    assert not [link for link in links(page) if not link.startswith("https://")]
    assert "![" not in page
    assert "*From `make train`" not in page  # the caption of the picture
    assert "(all figures)" in page
    assert FENCE.findall(page) == FENCE.findall(README)


def test_the_package_page_has_absolute_links_with_an_address(tmp_path):
    address = "https://mirror-modules.example/docs/"
    page = package_page(tmp_path, address)
    assert (
        f"![Held-out captions, and the images that the demo model generates from them]({address}assets/demo.png)"
        in page
    )
    assert f"[all figures]({address}results.html#does-redescription-help)" in page
    assert not [link for link in links(page) if not link.startswith("https://")]
    expected = [link for link in links(README) if link.startswith("docs/")]
    published = [link.removeprefix(address) for link in links(page) if link.startswith(address)]
    assert [link.replace(".md", ".html") for link in expected] == [f"docs/{link}" for link in published]
    assert FENCE.findall(page) == FENCE.findall(README)


def test_the_links_of_the_readme_lead_to_files():
    for link in links(README):
        assert link.startswith("https://") or (ROOT / link.split("#")[0]).is_file(), link


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_hold_no_output(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert cells
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]
