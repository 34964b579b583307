"""Comparison of systems: what they share, resuming, cost, samples, and recipes that cannot be compared."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mirror_modules.data import attributes_named, measured_box, to_float
from mirror_modules.evaluation import comparison, grid
from mirror_modules.evaluation.attributes import predict_attributes
from mirror_modules.evaluation.comparison import compare
from mirror_modules.evaluation.retrieval import ranked_splits
from mirror_modules.evaluation.samples import SHEET_ROWS
from mirror_modules.functional import box_overlap
from mirror_modules.models import ModelConfig, TextToImage
from mirror_modules.training.batches import load_splits
from mirror_modules.training.folder import FORMAT, RunFolder
from mirror_modules.training.recipes import RECIPES, MatchingRecipe, PretrainingRecipe, get_recipe
from tests.evaluation.test_ablation import run_here
from tests.layouts import make_birds, make_folder
from tests.runs import make_tiny_recipe

SYSTEMS = ("demo", "gan-int-cls-demo", "stackgan-demo", "stackgan-v2-demo", "ppgn-demo", "attngan-demo")


def make_recipe(name="demo", steps=4):
    """As many images seen for all systems, with a checkpoint after every step."""
    recipe = make_tiny_recipe(name)
    changes = {"glam": dataclasses.replace(recipe.glam, steps=steps)}
    if recipe.first_stage is not None:
        changes["first_stage"] = dataclasses.replace(recipe.first_stage, steps=1)
        changes["glam"] = dataclasses.replace(recipe.glam, steps=steps - 1)
    engine = dataclasses.replace(recipe.engine, checkpoint_every=1)
    return dataclasses.replace(recipe, name=name, engine=engine, **changes)


@pytest.fixture
def recipes():
    return [make_recipe(name) for name in ("demo", "stackgan-demo")]


@pytest.fixture
def without_processes(monkeypatch):
    return run_here(monkeypatch)


@pytest.fixture(scope="module")
def finished_comparison(tmp_path_factory):
    """The folder of a comparison of two systems, trained once; tests that modify it use `out`."""
    folder = tmp_path_factory.mktemp("comparisons") / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_here(monkeypatch)
        compare([make_recipe(name) for name in ("demo", "stackgan-demo")], folder, seeds=(0,))
    return folder


@pytest.fixture
def out(finished_comparison, tmp_path):
    return shutil.copytree(finished_comparison, tmp_path / "out")


def names_of(tasks):
    return [task[0].name for task in tasks if isinstance(task[0], grid.GridCell)]


def test_all_systems_share_the_earlier_phases(tmp_path, without_processes):
    out, recipes = tmp_path / "out", [make_recipe(name) for name in SYSTEMS]
    content = compare(recipes, out, seeds=(0, 3), baseline="attngan-demo")
    assert len(without_processes) == 2 + 2 * len(SYSTEMS)
    for seed in (0, 3):
        shared = out / "shared" / f"seed-{seed}"
        assert not RunFolder(shared).weights("first_stage").exists()
        for recipe in recipes:
            run = RunFolder(out / "cells" / recipe.name / f"seed-{seed}")
            for phase in ("stem", "stream", "evaluator"):
                assert run.weights(phase).read_bytes() == RunFolder(shared).weights(phase).read_bytes()
            assert run.read_recipe() == dataclasses.replace(recipe, seed=seed)
            # It is a run like any other.
            assert TextToImage.from_pretrained(run.model).config.system == recipe.model.system
    assert json.loads((out / "comparison.json").read_text()) == content
    assert set(content["figures"]) == {*SYSTEMS, "real images"}
    pairs = {(each["cell"], each["against"]) for each in content["differences"]}
    assert pairs == {(name, "attngan-demo") for name in SYSTEMS if name != "attngan-demo"}
    assert (content["baseline"], content["images_seen"]) == ("attngan-demo", 28)
    assert content["systems"]["demo"] == "mirrorgan"
    assert set(content["cost"]) == set(SYSTEMS)
    table = (out / "comparison.md").read_text()
    assert "| ppgn-demo | attngan-demo | " in table
    assert "Each generator was trained with 28 images." in table
    with Image.open(out / "comparison.png") as picture:
        assert picture.size[0] > 100
    # Rows of captions; the real image, and a column per system.
    with Image.open(out / "samples.png") as picture:
        assert picture.size[0] == 7 * 128 + 6 * 12
        assert picture.size[1] > SHEET_ROWS * 128


def test_scattered_flowers_are_found_before_their_colors_are_measured(tmp_path, without_processes):
    recipes = [make_recipe(name) for name in ("demo", "attngan-demo")]
    recipes = [dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, scatter=True)) for recipe in recipes]
    content = compare(recipes, tmp_path / "out", seeds=(0,))
    figures = {name: {metric: each["mean"] for metric, each in of.items()} for name, of in content["figures"].items()}
    assert all(set(of) == {"r_precision", "words", "colors", "box_overlap"} for of in figures.values())
    splits = load_splits(recipes[0].data, recipes[0].model, 0)
    unseen = ranked_splits(splits, recipes[0].model.max_words)[0].unseen
    boxes = measured_box(unseen.images)
    expected = {"box_overlap": box_overlap(boxes, unseen.boxes), "colors": []}
    for i, caption in enumerate(unseen.captions):
        image = to_float(unseen.images[i : i + 1])
        found = predict_attributes(image, None, boxes[i : i + 1])["measured_colors"]
        named = attributes_named(caption)
        correct = [found[name][0] == named[name] for name in found if name in named]
        expected["colors"].append(sum(correct) / len(correct))
    for metric, values in expected.items():
        assert figures["real images"][metric] == pytest.approx(float(torch.as_tensor(values).mean()), abs=1e-6)
    assert "overlap with the box" in (tmp_path / "out" / "comparison.md").read_text()


def test_finished_systems_are_reused_in_any_order(out, recipes, without_processes):
    before = json.loads((out / "comparison.json").read_text())
    content = compare([recipes[1], make_recipe("attngan-demo"), recipes[0]], out, seeds=(0,))
    assert names_of(without_processes) == ["attngan-demo"]
    assert list(content["figures"]) == ["stackgan-demo", "attngan-demo", "demo", "real images"]
    assert content["figures"]["demo"] == before["figures"]["demo"]
    assert content["cost"]["demo"] == before["cost"]["demo"]
    assert content["recipe"] == before["recipe"]
    assert content["baseline"] == "stackgan-demo"


def test_finished_systems_are_trained_further(out, tmp_path, without_processes):
    recipes = [make_recipe(name, steps=6) for name in ("demo", "stackgan-demo")]
    content = compare(recipes, out, seeds=(0,))
    assert names_of(without_processes) == ["demo", "stackgan-demo"]
    at_once = compare(recipes, tmp_path / "at-once", seeds=(0,))
    assert content["figures"] == at_once["figures"]
    first_stage = dataclasses.replace(recipes[1].first_stage, steps=2)
    glam = dataclasses.replace(recipes[1].glam, steps=4)
    changed = dataclasses.replace(recipes[1], first_stage=first_stage, glam=glam)
    with pytest.raises(
        ValueError,
        match=r"compare: recipe 'stackgan-demo': .* holds phase 'first_stage' after 1 steps; first_stage\.steps=2 "
        "would make it longer, but phase 'glam' has started from its weights",
    ):
        compare([recipes[0], changed], out, seeds=(0,))


def test_samples_are_those_of_the_saved_model(out):
    model = TextToImage.from_pretrained(out / "cells/demo/seed-0/model")
    with np.load(out / "cells/demo/seed-0/samples.npz") as samples, np.load(out / "shared/seed-0/samples.npz") as real:
        captions = samples["captions"].tolist()
        assert captions == real["captions"].tolist()
        assert len(captions) == SHEET_ROWS
        generated = model.generate(captions, seed=list(range(len(captions))))
        difference = (generated.numpy() + 1) * 127.5 - np.moveaxis(samples["images"], 3, 1)
        assert abs(difference).max() <= 1
        assert not np.array_equal(samples["images"], real["images"])


def test_the_cost_is_that_of_the_log_and_of_the_model(out):
    cost = json.loads((out / "cells/stackgan-demo/seed-0/cost.json").read_text())
    lines = [json.loads(line) for line in (out / "cells/stackgan-demo/seed-0/metrics.jsonl").read_text().splitlines()]
    last = {line["phase"]: line for line in lines if "images" in line}
    assert (last["first_stage"]["images"], last["glam"]["images"]) == (7, 21)
    seconds = last["first_stage"]["seconds"] + last["glam"]["seconds"]
    assert cost["images_per_second"] == pytest.approx(28 / seconds)
    model = TextToImage.from_pretrained(out / "cells/stackgan-demo/seed-0/model")
    total = sum(parameter.numel() for parameter in model.parameters())
    frozen = sum(parameter.numel() for part in (model.text_encoder, model.captioner) for parameter in part.parameters())
    assert cost["generator_parameters"] == total - frozen
    # A discriminator for each of the two stages.
    each = [model.discriminators(phase) for phase in ("first_stage", "glam")]
    assert [len(found) for found in each] == [1, 1]
    assert cost["discriminator_parameters"] == sum(
        parameter.numel() for found in each for part in found for parameter in part.parameters()
    )
    assert 50e6 < cost["peak_memory"] < 1e12


def test_the_peak_memory_is_that_of_the_process_alone():
    """`getrusage` includes that of the process which started it."""
    code = "from mirror_modules.evaluation.comparison import _peak_memory; print(_peak_memory())"
    large = f"import subprocess, sys; _ = b'x' * 1_500_000_000; subprocess.run([sys.executable, '-c', {code!r}])"
    peaks = [
        int(subprocess.run([sys.executable, "-c", each], check=True, capture_output=True, text=True).stdout)
        for each in (code, large)
    ]
    if sys.platform == "linux":
        assert peaks[1] < 1.5 * peaks[0]
    assert peaks[0] > 50e6


def test_what_is_lost_is_measured_again(out, recipes, without_processes):
    """Without training, during which the memory would have been measured."""
    before = json.loads((out / "comparison.json").read_text())
    samples = (out / "cells/demo/seed-0/samples.npz").read_bytes()
    (out / "cells/demo/seed-0/samples.npz").unlink()
    assert compare(recipes, out, seeds=(0,)) == before
    assert names_of(without_processes) == ["demo"]
    assert len((out / "cells/demo/seed-0/samples.npz").read_bytes()) == len(samples)
    (out / "cells/demo/seed-0/cost.json").unlink()
    content = compare(recipes, out, seeds=(0,))
    assert content["figures"] == before["figures"]
    assert content["cost"]["demo"]["peak_memory"] == {"mean": None, "deviation": None, "seeds": [None]}
    assert content["cost"]["demo"]["images_per_second"] == before["cost"]["demo"]["images_per_second"]
    (row,) = [line for line in (out / "comparison.md").read_text().splitlines() if line.startswith("| demo | mirr")]
    assert row.endswith("| – |")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cells/demo/seed-0/cost.json", "{}", r"cost\.json is damaged: it must hold what the training has cost"),
        (
            "cells/demo/seed-0/cost.json",
            '{"images_per_second": NaN, "peak_memory": null, "generator_parameters": 1, "discriminator_parameters": 1}',
            r"cost\.json is damaged",
        ),
        (
            "cells/demo/seed-0/cost.json",
            '{"images_per_second": 9, "peak_memory": -1, "generator_parameters": 1, "discriminator_parameters": 1}',
            r"cost\.json is damaged",
        ),
        ("cells/demo/seed-0/samples.npz", "text", r"samples\.npz is damaged \(.*\); remove it and repeat"),
        ("shared/seed-0/samples.npz", "", r"samples\.npz is damaged \(.*\); remove it and repeat"),
        ("cells/demo/seed-0/result.json", "{}", r"result\.json is damaged: it must hold the metrics of a run"),
    ],
)
def test_damaged_files_are_named(out, recipes, without_processes, name, content, message):
    (out / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        compare(recipes, out, seeds=(0,))


def test_a_system_whose_log_is_lost_is_named(out, recipes, without_processes):
    for name in ("cost.json", "metrics.jsonl"):
        (out / "cells/demo/seed-0" / name).unlink()
    with pytest.raises(ValueError, match=r"metrics\.jsonl holds no line of phase glam, so that its cost is unknown"):
        compare(recipes, out, seeds=(0,))


@pytest.mark.parametrize("name", ["out", "out/cells", "out/cells/stackgan-demo", "out/shared"])
def test_a_file_in_place_of_a_folder_is_named_before_anything_is_trained(recipes, tmp_path, without_processes, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    if name != "out":
        config = {"format": FORMAT, "kind": "comparison", "recipe": comparison._shared_recipe(recipes[0]).to_dict()}
        (tmp_path / "out/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"must be a folder, but .*{path.name} is a file; choose another path"):
        compare(recipes, tmp_path / "out", seeds=(0,))
    assert not without_processes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipes": None}, "compare: recipes must be a list of Recipe, but it is None"),
        ({"out": None}, "must be the path of a folder, but it is None"),
        ({"seeds": 3}, "seeds must be a list of one or more distinct numbers, but they are 3"),
        ({"seeds": "01"}, "seeds must be a list"),
    ],
)
def test_unsuitable_arguments_are_errors(recipes, tmp_path, changes, message):
    arguments = {"recipes": recipes, "out": tmp_path / "out", "seeds": (0,), **changes}
    with pytest.raises(ValueError, match=message):
        compare(arguments["recipes"], arguments["out"], seeds=arguments["seeds"])


def changed(phase, **fields):
    recipe = make_recipe("attngan-demo")
    return dataclasses.replace(recipe, **{phase: dataclasses.replace(getattr(recipe, phase), **fields)})


@pytest.mark.parametrize(
    ("other", "fields"),
    [
        (changed("data", scatter=True), r"data\.scatter \(False and True\), .* \(--scatter sets data\.scatter\)"),
        (changed("data", training_images=40), r"data\.training_images \(41 and 40\)"),
        (changed("model", word_dim=9), r"model\.word_dim \(10 and 9\)"),
        (changed("model", captioner_projection=False), r"model\.captioner_projection \(True and False\)"),
        (changed("model", resolutions=(8, 32)), r"the size of the finest images \(16 and 32\)"),
        (changed("stem", steps=5), r"stem\.steps \(3 and 5\)"),
        (
            changed("evaluator", steps=5, batch_size=6),
            r"evaluator\.steps \(3 and 5\), evaluator\.batch_size \(7 and 6\)",
        ),
        (changed("evaluation", candidates=5), r"evaluation\.candidates \(11 and 5\)"),
        (changed("engine", precision="bfloat16"), r"engine\.precision \('float32' and 'bfloat16'\)"),
        (changed("glam", steps=5), r"the number of images seen, steps times batch_size \(28 and 35\)"),
        (changed("glam", batch_size=8), r"the number of images seen, steps times batch_size \(28 and 32\)"),
        (
            dataclasses.replace(make_recipe("attngan-demo"), pretraining=PretrainingRecipe()),
            r"pretraining \(None and given\), which all recipes must share",
        ),
    ],
)
def test_recipes_that_cannot_be_compared_are_refused(tmp_path, other, fields):
    with pytest.raises(ValueError, match=rf"compare: 'demo' and 'attngan-demo' differ in .*{fields}"):
        compare([make_recipe(), other], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fields_of_a_single_system_may_differ():
    recipe = make_recipe("attngan-demo")
    model = dataclasses.replace(recipe.model, noise_dim=3, condition_dim=4, channels=5, resolutions=(4, 8, 16))
    glam = dataclasses.replace(recipe.glam, steps=2, batch_size=14, kl_weight=0.5)
    comparison._check_comparable([make_recipe(), dataclasses.replace(recipe, model=model, glam=glam)])
    shared = [comparison._shared_recipe(each) for each in (make_recipe(), recipe)]
    assert shared[0] == shared[1]
    # Key points are completed in one of them.
    placed = [make_recipe(f"{name}-demo") for name in ("gawwn", "gawwn-points")]
    comparison._check_comparable(placed)
    shared = [comparison._shared_recipe(each) for each in placed]
    assert shared[0] == shared[1]


def test_each_size_of_all_systems_is_shared_or_a_system_s_own():
    """A size that the shared phases read must be in SHARED_SIZES."""
    own = {"noise_dim", "condition_dim", "channels", "resolutions"}
    own |= {"discriminator_channels", "discriminator_normalization"}
    assert {each.name for each in dataclasses.fields(ModelConfig)} == own | {*comparison.SHARED_SIZES}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipes": ["demo"]}, "compare: recipes must be a list of Recipe, but one of them is 'demo'"),
        ({"recipes": [make_recipe()]}, r"compare: recipes must be two or more, but they are \['demo'\]"),
        ({"recipes": [make_recipe(), make_recipe()]}, "compare: the recipes 'demo' and 'demo' would have the same"),
        ({"recipes": [dataclasses.replace(make_recipe(), name="a|b")]}, "compare: the name of a recipe must be one"),
        ({"baseline": "stackgan"}, "compare: baseline must be one of 'demo', 'stackgan-demo', but it is 'stackgan'"),
        ({"seeds": ()}, "compare: seeds must be"),
        ({"seeds": (0, -1)}, "seed must be a whole number from 0"),
        ({"jobs": 0}, "compare: jobs must be a whole number of at least 1, but it is 0"),
        ({"device": "gpu"}, "the device must be one of .* but it is 'gpu'"),
    ],
)
def test_errors(recipes, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        compare(**{"recipes": recipes, "out": tmp_path / "out", **options})
    assert not (tmp_path / "out").exists()


def test_other_folders_are_refused(out, recipes, tmp_path, without_processes):
    longer = [dataclasses.replace(each, stem=MatchingRecipe(steps=9)) for each in recipes]
    with pytest.raises(ValueError, match=r"holds a comparison with other settings \(stem\.steps is 3 there and 9 now"):
        compare(longer, out, seeds=(0,))
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "kind": "ablation"}))
    with pytest.raises(ValueError, match=r"config\.json does not belong to a comparison; choose another --out"):
        compare(recipes, out, seeds=(0,))
    assert without_processes == []


def test_the_documented_system_is_compared(tmp_path, monkeypatch, without_processes):
    """A registered recipe of a registered system, as docs/evaluation.md shows it; here with tiny sizes."""
    page = (Path(__file__).parents[2] / "docs/evaluation.md").read_text(encoding="utf-8")
    (block,) = [text for text in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "register_system" in text]
    # Restored at the end.
    monkeypatch.setitem(RECIPES, "large-noise-demo", None)
    received = []
    monkeypatch.setattr("mirror_modules.evaluation.compare", lambda recipes, *_, **__: received.extend(recipes))
    names = {"__name__": "__main__"}
    exec(block, names)
    assert [recipe.name for recipe in received] == ["attngan-demo", "large-noise-demo"]
    comparison._check_comparable(received)

    attngan = make_recipe("attngan-demo")
    model = names["LargeNoiseConfig"](**dataclasses.asdict(attngan.model))
    own = dataclasses.replace(attngan, name="large-noise-demo", model=model)
    content = compare([attngan, own], tmp_path / "out", seeds=(0,))
    assert content["systems"] == {"attngan-demo": "attngan", "large-noise-demo": "large-noise"}
    saved = TextToImage.from_pretrained(tmp_path / "out/cells/large-noise-demo/seed-0/model")
    assert type(saved) is names["LargeNoise"]
    samples = [tmp_path / f"out/cells/{name}/seed-0/samples.npz" for name in content["systems"]]
    assert samples[0].read_bytes() != samples[1].read_bytes()


def test_a_system_that_lacks_places_is_refused_before_the_others_are_trained(tmp_path, without_processes):
    root = make_folder(tmp_path / "data", training=13, validation=11)
    recipes = [get_recipe(name) for name in ("photos-64", "gawwn-photos-64", "attngan-photos-64")]
    data = dataclasses.replace(recipes[0].data, path=str(root))
    recipes = [dataclasses.replace(recipe, data=data) for recipe in recipes]
    with pytest.raises(ValueError, match="'gawwn' places its subject, but the training images have neither boxes"):
        compare(recipes, tmp_path / "out", seeds=(0,))
    assert without_processes == []
    assert not (tmp_path / "out").exists()


SCRIPT = """
import dataclasses, sys
from mirror_modules.evaluation import compare
from mirror_modules.models import AttnGAN, AttnGANConfig, register_system
from mirror_modules.training.recipes import DataRecipe
sys.path.insert(0, {root!r})
from tests.evaluation.test_comparison import make_recipe

@dataclasses.dataclass(frozen=True)
class MineConfig(AttnGANConfig):
    system = "mine"

@register_system
class Mine(AttnGAN):
    config_type = MineConfig

if __name__ == "__main__":
    recipe = make_recipe("attngan-demo")
    recipe = dataclasses.replace(recipe, data=DataRecipe("birds", "data", None, None))
    fields = {{each.name: getattr(recipe.model, each.name) for each in dataclasses.fields(AttnGANConfig)}}
    mine = dataclasses.replace(recipe, name="mine", model=MineConfig(**fields))
    print(compare([recipe, mine], "out", seeds=(0,))["systems"])
"""


def test_systems_of_a_script_are_known_in_its_processes(tmp_path):
    """They import the script again."""
    make_birds(tmp_path / "data", training=29, validation=23)
    root = str(Path(__file__).parents[2])
    (tmp_path / "start.py").write_text(SCRIPT.format(root=root), encoding="utf-8")
    done = subprocess.run([sys.executable, "start.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "{'attngan-demo': 'attngan', 'mine': 'mine'}" in done.stdout
    cost = json.loads((tmp_path / "out/comparison.json").read_text())["cost"]["mine"]
    assert 50e6 < cost["peak_memory"]["mean"] < 1e12
