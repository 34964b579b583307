"""The best of several images, and pairs for preference training: against plain loops, by seed, with bad input."""

import json
import weakref

import pytest
import torch

from mirror_modules.stream import best_of, preference_pairs

CAPTIONS = ["a red flower", "a blue bird", "a red flower"]
N, H, W = 5, 3, 7


def make(captions, seeds):
    """An image whose mean depends on its caption and its seed alone."""
    values = [torch.rand(1, generator=torch.Generator().manual_seed(97 * s + len(c))) for c, s in zip(captions, seeds)]
    return torch.stack([value.expand(3, H, W) for value in values])


def mean(images, captions):
    return images.mean(dim=(1, 2, 3))


@pytest.mark.parametrize("batch_size", [1, 2, 4, 5, 64])
def test_the_best_image_matches_the_loop(batch_size):
    found = best_of(mean, make, CAPTIONS, N, seed=11, batch_size=batch_size)
    for c, caption in enumerate(CAPTIONS):
        seeds = [11 + c * N + k for k in range(N)]
        values = [float(make([caption], [seed]).mean()) for seed in seeds]
        torch.testing.assert_close(found.scores[c], torch.tensor(values))
        assert found.seeds[c] == seeds[values.index(max(values))]
        assert torch.equal(found.images[c], make([caption], [found.seeds[c]])[0])


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_all_candidates_are_returned_on_request(batch_size):
    found = best_of(mean, make, CAPTIONS, N, seed=11, batch_size=batch_size, keep_all=True)
    assert found.candidates.shape == (len(CAPTIONS), N, 3, H, W)
    for c, caption in enumerate(CAPTIONS):
        assert found.candidate_seeds[c] == [11 + c * N + k for k in range(N)]
        for k, seed in enumerate(found.candidate_seeds[c]):
            assert torch.equal(found.candidates[c, k], make([caption], [seed])[0])
        torch.testing.assert_close(mean(found.candidates[c], CAPTIONS), found.scores[c])
        best = found.scores[c].argmax()
        assert torch.equal(found.candidates[c, best], found.images[c])
        assert found.candidate_seeds[c][best] == found.seeds[c]


@pytest.mark.parametrize("keep_all", [False, True])
def test_candidates_are_kept_only_on_request(keep_all):
    made, alive = [], []

    def tracked(captions, seeds):
        alive.append(sum(images() is not None for images in made))
        images = make(captions, seeds)
        made.append(weakref.ref(images))
        return images

    found = best_of(mean, tracked, CAPTIONS, N, batch_size=1, keep_all=keep_all)
    assert (found.candidates is not None) == (found.candidate_seeds is not None) == keep_all
    # The batch before lives until the next one replaces it.
    assert max(alive) == (len(CAPTIONS) * N - 1 if keep_all else 1)


def test_the_first_of_equal_images_is_kept():
    found = best_of(lambda images, captions: torch.zeros(len(images)), make, CAPTIONS, N, seed=3, batch_size=2)
    assert found.seeds == [3, 3 + N, 3 + 2 * N]


def test_the_score_gets_the_caption_of_each_image():
    seen = []

    def score(images, captions):
        seen.extend(captions)
        return mean(images, captions)

    best_of(score, make, CAPTIONS, 2, batch_size=4)
    assert seen == [caption for caption in CAPTIONS for _ in range(2)]


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (r"captions must be a list of one or more strings", {"captions": []}),
        (r"captions must be a list of one or more strings; wrap a single one", {"captions": "a red flower"}),
        (r"n must be a whole number of at least 1, but it is 0", {"n": 0}),
        (r"make must return 3 images .* but it returned \(2, 3,", {"make": lambda *_: torch.zeros(2, 3, 1, 1)}),
        (r"make must return 3 images .* returned a list", {"make": lambda *_: [1]}),
        (r"score must return one number per image, \(3,\), but it returned \(\)", {"score": lambda i, _: i.mean()}),
        (r"a score is not finite", {"score": lambda i, _: mean(i, _) / 0 * 0}),
        (r"seed must be a whole number, but it is None", {"seed": None}),
    ],
)
def test_invalid_arguments_of_best_of(message, options):
    arguments = {"score": mean, "make": make, "captions": CAPTIONS, "n": 1} | options
    with pytest.raises(ValueError, match="best_of: " + message):
        best_of(**arguments)


def images_of(*values):
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, H, W)


def test_extremes_and_all_pairs():
    images = {"first": images_of(0.25, 1.0, 0.5), "second": images_of(0.5, 0.5), "third": images_of(1.0)}
    images["last"] = images_of()
    assert preference_pairs(mean, images, batch_size=2) == [("first", 1, 0, 1.0, 0.25)]
    assert preference_pairs(mean, images, pairs="all") == [
        ("first", 1, 0, 1.0, 0.25),
        ("first", 1, 2, 1.0, 0.5),
        ("first", 2, 0, 0.5, 0.25),
    ]
    assert preference_pairs(mean, images, pairs="all", margin=0.5) == [
        ("first", 1, 0, 1.0, 0.25),
        ("first", 1, 2, 1.0, 0.5),
    ]


def test_paths_become_lines_of_json(tmp_path):
    paths = [str(tmp_path / f"{i}.pt") for i in range(3)]
    for path, value in zip(paths, (0.5, 0.0, 1.0)):
        torch.save(images_of(value)[0], path)
    (pair,) = preference_pairs(mean, {"a red flower": paths}, load=torch.load)
    assert json.loads(json.dumps(pair._asdict())) == {
        "prompt": "a red flower",
        "chosen": paths[2],
        "rejected": paths[1],
        "chosen_score": 1.0,
        "rejected_score": 0.0,
    }


@pytest.mark.parametrize(
    ("message", "images", "options"),
    [
        (r"the images of 'a' are a list; pass a tensor \(N, 3, H, W\), or a function load=", {"a": ["x.png"]}, {}),
        (r"margin must be a finite number", {}, {"margin": float("nan")}),
        (r"pairs must be one of 'extremes', 'all', but it is 'best'", {}, {"pairs": "best"}),
        (r"a score is not finite; images with NaN cannot be ranked", {"a": images_of(float("nan"))}, {}),
        (r"images_by_caption must be a dictionary .* but it is a list", [("a", images_of(1.0))], {}),
        (r"the images of 'a' are one string, 'x.png'; pass a list of paths", {"a": "x.png"}, {"load": len}),
        (r"load must return images \(3, H, W\) of one size, but it returned a int of 'x'", {"a": ["x"]}, {"load": len}),
        (
            r"load must return .* returned \(3, 2, 1\) of 2, and \(3, 1, 1\) of 1; resize .* or use batch_size=1",
            {"a": [1, 2]},
            {"load": lambda side: torch.zeros(3, side, 1)},
        ),
    ],
)
def test_invalid_arguments_of_preference_pairs(message, images, options):
    with pytest.raises(ValueError, match="preference_pairs: " + message):
        preference_pairs(mean, images, **options)
