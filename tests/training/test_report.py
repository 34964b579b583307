"""The page stands alone, shows what it was given, and escapes what people wrote."""

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
from mirror_modules.training.folder import RunFolder
from mirror_modules.training.recipes import demo
from mirror_modules.training.report import (
    Showcase,
    attention_maps,
    draw_losses,
    feature_rows,
    flatten,
    mark_words,
    phase_rows,
    read_losses,
    score_rows,
    show,
    write_report,
)

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
    "images": 1000,
    "candidates": 100,
    "judge": "another <pair>",
    "seconds": {"stem": 61.24, "glam": 1402.4},
    "images_per_second": {"stem": 418.13, "glam": 55.7},
    "parameters": {"generator": 1234567},
}
LOG = [
    {"phase": "stem", "step": 1, "seconds": 0.1, "images": 8, "caption_by_words": 4.0},
    {"phase": "stem", "step": 10, "seconds": 1.1, "images": 80, "caption_by_words": 2.0},
    {"phase": "glam", "step": 1, "seconds": 0.3, "images": 8, "kl": 1.5, "generator_16": 1.0, "generator_64": 3.0},
    {"phase": "glam", "step": 10, "seconds": 3, "images": 80, "kl": 2.5, "generator_16": 2.0, "generator_64": 4.0},
]


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
    folder.log.write_text("".join(json.dumps(line) + "\n" for line in LOG), encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "run")


class Page(HTMLParser):
    """What a reader sees, and what a browser would load."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.images, self.tags, self.marked, self.urls = [], [], [], [], [], []
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

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)
        if "mark" in self.open:
            self.marked.append(data)


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
    """A run whose report shows everything; for tests that only look."""
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


def test_the_page_fetches_nothing(full_page, full_run):
    assert all(url.startswith("data:") for url in full_page.urls)
    assert "script" not in full_page.tags
    content = full_run.report.read_text(encoding="utf-8")
    style = content[content.index("<style>") : content.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in content
    assert content.startswith("<!doctype html>")


def test_what_people_wrote_is_escaped(full_page):
    assert "script" not in full_page.tags
    for text in (*CAPTIONS, "<unknown>", "<b>white</b> thing", "another <pair>"):
        assert text in full_page.text


def test_each_image_is_shown_at_each_stage_and_beside_the_real_one(full_page):
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


def test_words_of_the_caption_are_marked_in_what_was_read():
    assert mark_words("one red petal", "a RED, flower.") == [("one", False), ("red", True), ("petal", False)]
    assert mark_words("", "a flower") == []


def test_the_page_marks_them_too(full_page):
    assert full_page.marked[1:] == ["a", "red", "flower", "red", "white", "petals", "five", "a", "leaf", "green"]
    assert "(no word)" in full_page.text


def test_each_word_has_a_map_and_so_has_the_sentence():
    showcase = make_showcase()
    maps = attention_maps(showcase)
    assert [entry.caption for entry in maps] == CAPTIONS[:4]
    for entry, words in zip(maps, WORDS):
        assert [each.name for each in entry.maps] == [*words, "sentence"]
        assert all(each.picture.shape == (16, 16, 3) for each in entry.maps)
    peak = float(showcase.generated.word_weights[-1][1, 0].max())
    assert maps[1].maps[0].note == f"{peak:.0%}"


def test_a_map_is_bright_where_the_finest_weights_are():
    finest = torch.full((N, L, 8, 8), 0.1)
    finest[:, 1, 2, 5] = 0.8
    coarse = torch.full((N, L, 4, 4), 1 / 3)
    showcase = make_showcase()
    showcase = showcase._replace(generated=showcase.generated._replace(word_weights=[coarse, finest]))
    red = attention_maps(showcase)[0].maps[1]
    assert red.note == "80%"
    brightest = np.unravel_index(red.picture.astype(int).sum(axis=2).argmax(), (16, 16))
    assert brightest[0] in (4, 5)
    assert brightest[1] in (10, 11)


def test_the_sentence_map_shows_the_strongest_channel():
    weights = torch.full((N, C, 8, 8), 1 / C)
    weights[:, :, 6, 1] = 0.04
    weights[:, 3, 6, 1] = 0.76
    showcase = make_showcase()
    showcase = showcase._replace(generated=showcase.generated._replace(sentence_weights=[weights]))
    sentence = attention_maps(showcase)[0].maps[-1]
    assert sentence.note == "14% to 76%"
    brightest = np.unravel_index(sentence.picture.astype(int).sum(axis=2).argmax(), (16, 16))
    assert brightest[0] in (12, 13)
    assert brightest[1] in (2, 3)


def test_large_images_have_maps_of_moderate_size():
    large = torch.zeros(N, 3, 256, 256)
    showcase = make_showcase(generated=make_showcase().generated._replace(images=[large]))
    assert attention_maps(showcase)[0].maps[0].picture.shape == (128, 128, 3)


@pytest.mark.parametrize("kept", ["words", "nothing"])
def test_a_model_with_less_attention_has_a_report(folder, kept):
    showcase = make_showcase()
    words = showcase.generated.word_weights if kept == "words" else []
    page = write(folder, generated=showcase.generated._replace(word_weights=words, sentence_weights=[]))
    assert ("Where the words go" in page.text) == (kept == "words")
    assert not any("sentence" in image["alt"] for image in page.images)
    assert (folder.pictures / "attention.png").exists() == (kept == "words")


def test_images_alone_have_a_report_too(folder):
    write(folder, generated=GeneratedImages([make_showcase().real[:, :, :8, :8]], [], []))


def test_pictures_lie_beside_the_page(full_run):
    names = [f"image-{i:03}.png" for i in range(N)]
    overviews = ["attention.png", "generated.png", "losses.png", "mirror.png", "stages.png"]
    assert sorted(path.name for path in full_run.pictures.iterdir()) == sorted(names + overviews)
    finest = to_bytes(make_showcase().generated.images[-1])
    for i, name in enumerate(names):
        with Image.open(full_run.pictures / name) as image:
            np.testing.assert_array_equal(np.asarray(image), finest[i])
    with Image.open(full_run.pictures / "stages.png") as image:
        assert image.size == (N * (192 + 4) - 4, 3 * (192 + 4) - 4)


def test_numbers_are_percentages_with_chance_beside(full_page):
    assert "R-precision, top 1 61.7% ± 1.5 91.8% ± 1.5 0.0% ± 1.5 1.0%" in full_page.text
    assert "R-precision, top 3 81.2% ± 1.1 81.2% ± 1.1 81.2% ± 1.1 3.0%" in full_page.text
    assert "Word accuracy 71.1% 74.4% 52.2% –" in full_page.text
    assert "in nats per word: generated 0.87, real images 1.30, shuffled 0.00." in full_page.text
    assert "tells the caption of 61.7% of the generated images from 99 others" in full_page.text
    assert "glam Generator and discriminators" in full_page.text
    assert "1,402.4 55.7" in full_page.text
    assert "parameters.generator 1,234,567" in full_page.text


def test_one_number_is_enough(folder):
    page = write(folder, METRICS)
    assert "R-precision, top 1 61.7% ± 1.5 –" in page.text
    assert "Word accuracy" not in page.text
    assert "ceiling" not in page.text
    assert "Images per second" not in page.text


def test_an_unmeasured_generator_has_a_report(folder):
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


def test_a_figure_stands_with_its_error_where_there_is_one():
    figures = {"frechet_distance": 2.5, "diversity": 0.25, "diversity_standard_error": 0.0125}
    rows = feature_rows({"features": {"generated": figures, "real": {"frechet_distance": 1.5}}})
    assert rows == [
        ["Fréchet distance (FID)", "2.5", "1.5"],
        ["Diversity of one caption's images", "0.25 ± 0.0125", "–"],
    ]


def test_phase_rows_name_the_steps_of_the_recipe():
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


def test_configuration_and_versions_are_there(full_page):
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
        ([16, 32], "16, 32"),
        ("a b", "a b"),
    ],
)
def test_values_as_people_write_them(value, text):
    assert show(value) == text


def test_flatten_leaves_out_what_is_named_at_the_top_alone():
    fields = {"a": 1, "b": {"a": 2, "c": {"d": 3}}}
    assert flatten(fields, without=("a",)) == [("b.a", "2"), ("b.c.d", "3")]


def test_losses_of_the_stages_share_a_panel(folder):
    stem, kl, stages = read_losses(folder.log)
    assert stem.title == "Text and image encoder"
    assert stem.curves == {"caption by words": [(1, 4.0), (10, 2.0)]}
    assert kl.curves == {"kl": [(1, 1.5), (10, 2.5)]}
    assert stages.title == "Generator and discriminators: generator"
    assert stages.ylabel == "generator"
    assert stages.curves == {"16 px": [(1, 1.0), (10, 2.0)], "64 px": [(1, 3.0), (10, 4.0)]}


def test_the_page_has_a_drawing_for_each_panel(full_page):
    drawings = [decode(image["src"]) for image in full_page.images if image["alt"].startswith("Loss curves")]
    assert [kind for kind, _ in drawings] == ["image/svg+xml"] * 3
    for _, content in drawings:
        assert b"</svg>" in content
        assert not re.search(rb'(href|src)="(?!#)', content)


def test_a_log_axis_is_used_only_for_curves_that_lie_far_apart(folder):
    def scale(**losses):
        lines = [
            {"phase": "x", "step": step, **{name: values[step] for name, values in losses.items()}} for step in (0, 1)
        ]
        folder.log.write_text("\n".join(map(json.dumps, lines)))
        return draw_losses(read_losses(folder.log)).axes[0].get_yscale()

    assert scale(a=[1, 2], b=[100, 200]) == "log"
    assert scale(a=[1, 2], b=[10, 20]) == "linear"
    assert scale(a=[0, 2], b=[100, 200]) == "linear"
    assert scale(a=[0.001, 1], b=[1, 2]) == "linear"


def test_a_loss_that_is_not_a_number_is_drawn_as_a_gap(folder):
    folder.log.write_text('{"phase": "stem", "step": 1, "a": NaN}\n{"phase": "stem", "step": 2, "a": 1, "note": "x"}\n')
    panels = read_losses(folder.log)
    assert list(panels[0].curves) == ["a"]
    draw_losses(panels).canvas.draw()


@pytest.mark.parametrize("content", [None, ""])
def test_no_log_gives_no_curves(folder, content):
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
def test_a_showcase_with_a_gap_is_refused(folder, name):
    showcase = make_showcase()
    with pytest.raises(ValueError, match=rf"write_report: {name} has 4 entries for 5 captions; give one for each"):
        write_report(folder, demo(), showcase._replace(**{name: getattr(showcase, name)[:4]}), METRICS)
    with pytest.raises(ValueError, match=r"write_report: generated\.images\[2\] has 4 entries for 5 captions"):
        write(folder, generated=showcase.generated._replace(images=[*showcase.generated.images[:2], showcase.real[:4]]))


def test_images_of_another_precision_are_shown(folder):
    showcase = make_showcase()
    half = GeneratedImages(*([tensor.bfloat16() for tensor in part] for part in showcase.generated))
    write(folder, real=showcase.real.double(), generated=half)


def test_two_reports_of_one_run_show_the_same(folder):
    first = write(folder)
    again = write(folder)
    assert again.text == first.text
    pictures = [[url for url in page.urls if url.startswith("data:image/png")] for page in (first, again)]
    assert pictures[0] == pictures[1]
