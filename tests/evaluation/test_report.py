"""The report is self-contained, shows its inputs, and escapes user text."""

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from mirror_modules import GeneratedImages
from mirror_modules.data.transforms import to_bytes
from mirror_modules.evaluation.report import (
    Showcase,
    attribute_rows,
    feature_rows,
    flatten,
    mark_words,
    phase_rows,
    score_rows,
    show,
    write_report,
)
from mirror_modules.training.folder import RunFolder
from mirror_modules.training.recipes import demo
from tests.runs import LOG, write_log

CAPTIONS = ["a red flower", 'white & "blue" <script>alert(1)</script> ütterly', "five petals", "a leaf", "more green"]
WORDS = [["a", "red", "flower"], ["white", "<unknown>"], ["five", "petals"], ["a", "leaf"], ["more", "green"]]
N, L, C = len(CAPTIONS), 3, 7
PRECISION = {"top1": 0.617, "top2": 0.75, "top3": 0.8125, "standard_errors": [0.0154, 0.0123, 0.0111]}
METRICS = {"r_precision": {"generated": PRECISION}}
FULL = {
    "r_precision": {"generated": PRECISION, "real": {**PRECISION, "top1": 0.918}, "shuffled": {**PRECISION, "top1": 0}},
    "chance": 0.01,
    "word_accuracy": {"generated": 0.711, "real": 0.744, "shuffled": 0.522},
    "image_information": {"generated": 0.871, "real": 1.304, "shuffled": -0.004},
    "cannot_rank": True,
    "reasons": ["real images are below <one> who knows the class"],
    "evaluators": {
        "evaluator": {
            "description": "another <pair>",
            "validation": {
                "images": 1155,
                "classes": 10,
                "own_class": {"real": {"share": 0.6747, "standard_error": 0.0087}},
                "all_captions": {
                    "candidates": 100,
                    "chance": 0.01,
                    "class_oracle": 0.098,
                    **dict.fromkeys(("generated", "real", "shuffled", "text_ceiling"), PRECISION),
                    "cannot_rank": True,
                    "reasons": ["first reason", "second reason"],
                },
                "other_classes": {
                    "candidates": 99,
                    "chance": 1 / 99,
                    **{name: {**PRECISION, "top1": 0.5} for name in ("generated", "real", "shuffled")},
                    "cannot_rank": False,
                    "reasons": [],
                },
            },
        },
        "second_evaluator": {
            "description": "a third pair",
            "held_out": {
                "images": 513,
                "all_captions": {
                    "candidates": 100,
                    "chance": 0.01,
                    "class_oracle": 0.25,
                    **{name: {**PRECISION, "top1": 0.75} for name in ("generated", "real", "shuffled")},
                    "cannot_rank": False,
                    "reasons": [],
                },
            },
        },
    },
    "images": 1000,
    "candidates": 100,
    "evaluator": "another <pair>",
    "seconds": {"stem": 61.24, "glam": 1402.4},
    "images_per_second": {"stem": 418.13, "glam": 55.7},
    "parameters": {"generator": 1234567},
    "extractor": "network of the test",
    "features": {
        "generated": {
            "distance_images": 1000,
            "frechet_distance": 33.2412,
            "kernel_distance": -0.00438213,
            "kernel_distance_standard_error": 0.00123,
            "inception_score": 7.70312,
            "inception_score_deviation": 0.116345,
            "diversity": 0.104512,
            "diversity_standard_error": 0.004145,
        },
        "real": {"distance_images": 1000, "frechet_distance": 1.0, "kernel_distance": 0.0, "inception_score": 17.0},
    },
}


def make_showcase(**changes):
    random = torch.Generator().manual_seed(0)

    def images(size):
        return torch.rand(N, 3, size, size, generator=random) * 2 - 1

    weights = [torch.rand(N, L, 4, 4, generator=random).softmax(1), torch.rand(N, L, 8, 8, generator=random).softmax(1)]
    sentence = [torch.rand(N, C, size, size, generator=random).softmax(1) for size in (4, 8)]
    showcase = Showcase(
        captions=CAPTIONS,
        words=WORDS,
        real=images(16),
        generated=GeneratedImages([images(4), images(8), images(16)], weights, sentence),
        real_descriptions=["a red flower", "<b>white</b> thing", "seven petals", "a leaf", ""],
        generated_descriptions=["one red petal", "white", "five", "it", "green"],
    )
    return showcase._replace(**changes)


def make_folder(path):
    folder = RunFolder(path)
    folder.begin(demo())
    write_log(folder.log)
    return folder


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "run")


class Page(HTMLParser):
    """The visible text of a page, its images, and the URLs that a browser would load."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.images, self.tags, self.marked, self.urls = [], [], [], [], [], []
        self.headings, self.warnings = [], []
        self.classes = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.urls += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag == "img":
            self.images.append(attributes)
        if tag not in self.VOID:
            self.open.append(tag)
            self.classes.append((attributes.get("class") or "").split())

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.classes.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)
        if any("warning" in classes for classes in self.classes) and data.strip():
            self.warnings.append(" ".join(data.split()))
        if "mark" in self.open:
            self.marked.append(data)
        if {"h1", "h2", "h3"} & {*self.open}:
            self.headings.append(data)


def decode(url):
    kind, _, content = url.partition(";base64,")
    return kind.removeprefix("data:"), base64.b64decode(content, validate=True)


def pixels(url):
    kind, content = decode(url)
    assert kind == "image/png"
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    """A run whose report has every section; shared by tests that do not modify it."""
    folder = make_folder(tmp_path_factory.mktemp("runs") / "full")
    write(folder)
    return folder


@pytest.fixture(scope="module")
def full_page(full_run):
    return Page(full_run.report.read_text(encoding="utf-8"))


def write(folder, metrics=FULL, **changes):
    path = write_report(folder, demo(), make_showcase(**changes), metrics)
    assert path == folder.report
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_loads_no_external_resources(full_page, full_run):
    assert all(url.startswith("data:") for url in full_page.urls)
    assert "script" not in full_page.tags
    content = full_run.report.read_text(encoding="utf-8")
    style = content[content.index("<style>") : content.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in content
    assert content.startswith("<!doctype html>")


def test_each_section_has_a_heading(full_page):
    for heading in ("Results", "Training phases", "Generated images", "Redescription", "Attention maps", "Loss curves"):
        assert heading in full_page.headings


def test_user_text_is_escaped(full_page):
    assert "script" not in full_page.tags
    for text in (*CAPTIONS, "<unknown>", "<b>white</b> thing", "another <pair>"):
        assert text in full_page.text


def test_images_of_each_stage_and_real_images_are_shown(full_page):
    showcase = make_showcase()
    shown = iter(full_page.images)
    for i, caption in enumerate(CAPTIONS):
        for stage in showcase.generated.images:
            image = next(shown)
            assert image["alt"] == caption
            np.testing.assert_array_equal(pixels(image["src"]), to_bytes(stage)[i])
    for i in range(N):
        np.testing.assert_array_equal(pixels(next(shown)["src"]), to_bytes(showcase.real)[i])
        np.testing.assert_array_equal(pixels(next(shown)["src"]), to_bytes(showcase.generated.images[-1])[i])


def test_words_of_the_caption_are_marked_in_descriptions():
    assert mark_words("one red petal", "a RED, flower.") == [("one", False), ("red", True), ("petal", False)]
    assert mark_words("", "a flower") == []


def test_the_page_marks_words_of_the_caption(full_page):
    assert full_page.marked[1:] == ["a", "red", "flower", "red", "white", "petals", "five", "a", "leaf", "green"]
    assert "(empty)" in full_page.text


@pytest.mark.parametrize("kept", ["words", "nothing"])
def test_models_with_less_attention_have_a_report(folder, kept):
    showcase = make_showcase()
    words = showcase.generated.word_weights if kept == "words" else []
    page = write(folder, generated=showcase.generated._replace(word_weights=words, sentence_weights=[]))
    assert ("Attention maps" in page.text) == (kept == "words")
    assert not any("sentence" in image["alt"] for image in page.images)
    assert (folder.pictures / "attention.png").exists() == (kept == "words")


def test_images_without_attention_of_another_size_have_a_report(folder):
    write(folder, generated=GeneratedImages([make_showcase().real[:, :, :8, :8]], [], []))


def test_pictures_are_also_written_as_files(full_run):
    names = [f"image-{i:03}.png" for i in range(N)]
    overviews = ["attention.png", "generated.png", "losses.png", "mirror.png", "stages.png"]
    assert sorted(path.name for path in full_run.pictures.iterdir()) == sorted(names + overviews)
    finest = to_bytes(make_showcase().generated.images[-1])
    for i, name in enumerate(names):
        with Image.open(full_run.pictures / name) as image:
            np.testing.assert_array_equal(np.asarray(image), finest[i])
    with Image.open(full_run.pictures / "stages.png") as image:
        assert image.size == (N * (192 + 4) - 4, 3 * (192 + 4) - 4)


def test_results_are_percentages_with_errors_and_chance(full_page):
    assert "R-precision, top 1 61.7% ± 1.5 91.8% ± 1.5 0.0% ± 1.5 1.0%" in full_page.text
    assert "R-precision, top 3 81.2% ± 1.1 81.2% ± 1.1 81.2% ± 1.1 3.0%" in full_page.text
    assert "Word accuracy 71.1% 74.4% 52.2% –" in full_page.text
    assert "in nats per token: generated 0.87, real images 1.30, shuffled 0.00." in full_page.text
    headings = "Phase Trained networks Steps Seconds Images/s Waiting for data"
    assert f"{headings} stem Text and image encoder" in full_page.text
    assert "retrieves the caption of 61.7% of the generated images among 99 other captions, and of" in full_page.text
    assert "glam Generator and discriminators" in full_page.text
    assert "1,402.4 55.7" in full_page.text
    assert "Parameters: generator 1,234,567" in full_page.text


def test_each_evaluator_has_a_table_of_what_it_can_rank(full_page):
    text, bounds = full_page.text, "61.7% ± 1.5 61.7% ± 1.5 61.7% ± 1.5 61.7% ± 1.5 9.8% 1.0%"
    first = (
        f"Validation, 1,155 images 100 of all captions {bounds} Cannot rank these images: first reason; second reason."
    )
    within = "Validation, 1,155 images 2 of its own class – 67.5% ± 0.9 – – 50.0% 50.0%"
    others = "Validation, 1,155 images 99 of other classes only 50.0% ± 1.5 50.0% ± 1.5 50.0% ± 1.5 – – 1.0%"
    assert "Evaluator: another <pair>. Images Candidates Generated Real images ceiling Shuffled floor" in text
    assert f"{first} {within} {others}" in text
    second = "Held-out images of training classes, 513 images 100 of all captions 75.0% ± 1.5 75.0% ± 1.5 75.0% ± 1.5 –"
    assert f"{second} 25.0% 1.0%" in text
    assert text.index("Second evaluator: a third pair.") < text.index(second)
    # Only what cannot rank is red: the row, its reasons, and a sentence below the title.
    assert [each for each in full_page.warnings if each.startswith("R-precision cannot")]
    assert "real images are below <one> who knows the class. Differences" in " ".join(full_page.warnings)
    assert "99 of other classes only" not in full_page.warnings
    assert "100 of all captions" in full_page.warnings


def test_evaluators_that_can_rank_have_no_warning(folder):
    figures = FULL["evaluators"]["second_evaluator"]
    page = write(folder, {**FULL, "cannot_rank": False, "reasons": [], "evaluators": {"second_evaluator": figures}})
    assert page.warnings == []
    assert "annot rank these images" not in page.text


def test_clip_has_its_score_among_the_ranks_of_its_table(folder):
    score = {"generated": {"mean": 23.456, "standard_error": 0.0512}, "real": {"mean": 30.0, "standard_error": 0.25}}
    figures = FULL["evaluators"]["second_evaluator"]
    clip = {"description": "<CLIP>", "held_out": {**figures["held_out"], "clip_score": score}}
    page = write(folder, {**FULL, "evaluators": {"second_evaluator": figures, "clip": clip}})
    assert "CLIP: <CLIP>. Images Candidates" in page.text
    row = "Held-out images of training classes, 513 images CLIPScore 23.46 ± 0.05 30.00 ± 0.25 – – – –"
    assert page.text.count(row) == page.text.count("CLIPScore, in place of a ranking, is 100 times the cosine") == 1
    assert "CLIPScore" not in write(folder).text


def test_each_extractor_has_a_table(folder):
    further = {"generated": {"distance_images": 7, "frechet_distance": 55.5}, "real": {"frechet_distance": 4.5}}
    page = write(folder, {**FULL, "further_extractors": [{"extractor": "<other> network", "features": further}]})
    assert "FID and KID compare 1000 generated images with" in page.text
    first, second = page.text.split("Extractor: network of the test. Metric Generated Real images ")[1].split(
        " Extractor: <other> network. Metric Generated Real images "
    )
    assert first.startswith("Fréchet distance (FID) 33.2 1 Kernel")
    assert second.startswith("Fréchet distance (FID) 55.5 4.5 Training phases")
    assert "Further extractors" not in page.text


def test_metrics_have_few_digits_and_words_as_names(full_page):
    assert "Fréchet distance (FID) 33.2 1" in full_page.text
    assert "Kernel distance (KID) -0.0044 ± 0.0012 0" in full_page.text
    assert "Inception Score 7.70 ± 0.12 17" in full_page.text
    assert "Diversity of images of the same caption 0.1045 ± 0.0041 –" in full_page.text
    shown = full_page.text[: full_page.text.index("Details")]
    assert not re.search(r"[a-z]_[a-z]", shown)
    further = full_page.text[full_page.text.index("Further metrics") :]
    assert further.startswith("Further metrics Images 1,000 Evaluator another <pair> Parameters: generator")


def test_r_precision_alone_is_enough(folder):
    page = write(folder, METRICS)
    assert "R-precision, top 1 61.7% ± 1.5 –" in page.text
    assert "Word accuracy" not in page.text
    assert "ceiling" not in page.text
    assert "Images/s" not in page.text


def test_metrics_of_real_images_alone_have_a_report(folder):
    page = write(folder, {"r_precision": {"real": {"top1": 0.918}}})
    assert "R-precision, top 1 91.8% –" in page.text
    assert "top 2" not in page.text


def test_score_rows():
    rows = score_rows({"r_precision": {"real": PRECISION, "generated": PRECISION}, "word_accuracy": {"real": 0.5}})
    assert [row.name for row in rows] == [
        "R-precision, top 1",
        "R-precision, top 2",
        "R-precision, top 3",
        "Word accuracy",
    ]
    assert rows[0].errors == [0.0154, 0.0154]
    assert rows[1].errors == [0.0123, 0.0123]
    assert rows[3].values == [None, 0.5]


def test_the_overlap_with_boxes_is_a_score_with_its_error():
    overlap = {"mean": 0.71, "standard_error": 0.01}
    rows = score_rows(
        {"r_precision": {"generated": PRECISION, "real": PRECISION}, "box_overlap": {"generated": overlap}}
    )
    assert rows[-1] == ("Overlap with the box", [0.71, None], [0.01, None], None)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (7.70312, 0.116345, "7.70 ± 0.12"),
        (1234.5, 250.0, "1,234 ± 250"),
        (12.3, 99.9, "12 ± 100"),
        (0.25, 0.0, "0.25 ± 0"),
        (0.25, float("nan"), "0.25 ± nan"),
        (0.123456, None, "0.123"),
    ],
)
def test_a_value_has_as_many_decimals_as_its_error(value, error, text):
    generated = {"inception_score": value, "inception_score_deviation": error}
    assert feature_rows({"features": {"generated": generated}})[0][1].replace("\N{NO-BREAK SPACE}", " ") == text


def test_feature_rows_show_standard_errors_if_known():
    generated = {"frechet_distance": 2.5, "diversity": 0.25, "diversity_standard_error": 0.0126}
    rows = feature_rows({"features": {"generated": generated, "real": {"frechet_distance": 1.5}}})
    assert rows == [
        ["Fréchet distance (FID)", "2.5", "1.5"],
        ["Diversity of images of the same caption", "0.250 ±\N{NO-BREAK SPACE}0.013", "–"],
    ]


def test_attribute_rows_name_the_method():
    accuracy = {"share": 0.5, "named": 4, "standard_error": 0.25}
    generated = {"measured_colors": {"all": accuracy}, "classifier": {"petal_color": accuracy, "all": accuracy}}
    real = {"measured_colors": {"all": {**accuracy, "share": 1.0, "standard_error": 0.0}}}
    assert attribute_rows({"attributes": {"generated": generated, "real": real}}) == [
        ["petal color", "classifier", "50.0% ±\N{NO-BREAK SPACE}25.0", "–"],
        ["all", "classifier", "50.0% ±\N{NO-BREAK SPACE}25.0", "–"],
        ["all", "pixels", "50.0% ±\N{NO-BREAK SPACE}25.0", "100.0% ±\N{NO-BREAK SPACE}0.0"],
    ]
    assert attribute_rows({}) == []


def test_phase_rows_show_the_steps_of_the_recipe():
    recipe = dataclasses.replace(demo(), stem=dataclasses.replace(demo().stem, steps=1234))
    metrics = {
        "seconds": {"stem": 2.0, "polish": 1},
        "images_per_second": {"stem": 31},
        "waited_for_data": {"stem": 0.003},
    }
    assert phase_rows(recipe, metrics) == [
        ["stem", "Text and image encoder", "1,234", "2.0", "31.0", "0.3%"],
        ["polish", "", "–", "1.0", "–", "–"],
    ]


def test_configuration_and_versions_are_shown(full_page):
    for name, value in flatten(demo().to_dict()):
        assert f"{name} {value}" in full_page.text
    assert f"torch {torch.__version__}" in full_page.text
    assert "details" in full_page.tags


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (True, "True"),
        (1234567, "1,234,567"),
        (0.0002, "0.0002"),
        (12345.6, "12,346"),
        (0.123456, "0.1235"),
        (float("nan"), "nan"),
        ([0.5, 1e-6], "0.5, 1e-06"),
        ([16, 32], "16, 32"),
        ("a b", "a b"),
    ],
)
def test_values_are_formatted_for_readers(value, text):
    assert show(value) == text


def test_flatten_omits_names_at_the_top_level_only():
    fields = {"a": 1, "b": {"a": 2, "c": {"d": 3}}}
    assert flatten(fields, without=("a",)) == [("b.a", "2"), ("b.c.d", "3")]


def test_the_page_has_a_plot_per_loss_panel(full_page):
    plots = [decode(image["src"]) for image in full_page.images if image["alt"].startswith("Loss curves")]
    assert [kind for kind, _ in plots] == ["image/svg+xml"] * 3
    for _, content in plots:
        assert b"</svg>" in content
        assert not re.search(rb'(href|src)="(?!#)', content)


@pytest.mark.parametrize("content", [None, ""])
def test_without_a_log_there_are_no_curves(folder, content):
    folder.log.unlink() if content is None else folder.log.write_text(content)
    page = write(folder)
    assert "metrics.jsonl" not in page.text
    assert not (folder.pictures / "losses.png").exists()


@pytest.mark.parametrize("line", ["{", "[1]", '{"phase": "stem"}', "3"])
def test_a_damaged_log_is_named(folder, line):
    folder.log.write_text(json.dumps(LOG[0]) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged: line 2 is not a logged step"):
        write(folder)
    assert not folder.report.exists()


@pytest.mark.parametrize("name", ["words", "real", "real_descriptions", "generated_descriptions"])
def test_an_incomplete_showcase_is_refused(folder, name):
    showcase = make_showcase()
    with pytest.raises(ValueError, match=rf"write_report: {name} has 4 entries for 5 captions; give one for each"):
        write_report(folder, demo(), showcase._replace(**{name: getattr(showcase, name)[:4]}), METRICS)
    with pytest.raises(ValueError, match=r"write_report: generated\.images\[2\] has 4 entries for 5 captions"):
        write(folder, generated=showcase.generated._replace(images=[*showcase.generated.images[:2], showcase.real[:4]]))


@pytest.mark.parametrize("metrics", [{}, None, [], {"r_precision": None}, {"r_precision": 0.5}, {"chance": 0.01}])
def test_metrics_without_an_r_precision_are_refused(folder, metrics):
    with pytest.raises(
        ValueError, match=r"write_report: metrics lack 'r_precision'; pass the content of evaluation\.json"
    ):
        write_report(folder, demo(), make_showcase(), metrics)
    assert not folder.report.exists()


@pytest.mark.parametrize(
    "metrics",
    [
        {"r_precision": {"generated": 0.5}},
        {"r_precision": {"generated": {}}},
        {"r_precision": {"generated": {"top1": "high"}}},
        {"r_precision": {"generated": {"top1": 0.5, "top2": 0.5, "standard_errors": [0.1]}}},
        {**METRICS, "word_accuracy": 0.5},
        {**METRICS, "image_information": {"generated": None}},
        {**METRICS, "redescription": {"generated": 0.5}},
        {**METRICS, "attributes": {"generated": {"classifier": {"all": {"share": 0.5}}}}},
        {**METRICS, "features": {"generated": {"frechet_distance": 1.0}}},
        {**METRICS, "seconds": {"stem": None}},
        {**METRICS, "candidates": "many"},
    ],
)
def test_metrics_of_another_form_are_refused_before_anything_is_written(folder, metrics):
    with pytest.raises(ValueError, match=r"write_report: metrics have another form than evaluation\.json: "):
        write_report(folder, demo(), make_showcase(), metrics)
    assert not folder.report.exists()
    assert not folder.pictures.exists()


def test_an_empty_showcase_is_refused(folder):
    showcase = make_showcase()
    none = GeneratedImages([images[:0] for images in showcase.generated.images], [], [])
    empty = {"captions": [], "words": [], "real": showcase.real[:0], "generated": none}
    empty |= {"real_descriptions": [], "generated_descriptions": []}
    for changes in (empty, {"generated": GeneratedImages([], [], [])}):
        with pytest.raises(ValueError, match="write_report: the showcase has no captions or no generated images"):
            write(folder, **changes)


@pytest.mark.parametrize("content", ["[]", '{"versions": []}', "{"])
def test_a_damaged_config_is_named(folder, content):
    folder.config.write_text(content)
    with pytest.raises(ValueError, match=r"config\.json (holds no recipe|is damaged)"):
        write(folder)
    folder.config.unlink()
    with pytest.raises(FileNotFoundError, match=r"is not a run: config\.json is missing"):
        write(folder)
    assert not folder.pictures.exists()


def test_images_of_other_precisions_are_shown(folder):
    showcase = make_showcase()
    half = GeneratedImages(*([tensor.bfloat16() for tensor in part] for part in showcase.generated))
    write(folder, real=showcase.real.double(), generated=half)


def test_reports_are_reproducible(folder):
    first, second = write(folder), write(folder)
    assert second.text == first.text
    pictures = [[url for url in page.urls if url.startswith("data:image/png")] for page in (first, second)]
    assert pictures[0] == pictures[1]
