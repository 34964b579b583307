import itertools

import numpy as np
import pytest

from mirror_modules.data import ATTRIBUTES, class_id_of, draw_flower
from mirror_modules.data.synthetic_backgrounds import BACKGROUNDS
from mirror_modules.data.synthetic_drawing import COUNTS, pixel_axes

FLOWER = {
    "petal_color": "red",
    "petal_count": "five",
    "petal_shape": "round",
    "center_color": "golden",
    "size": "large",
    "background": "sand",
}


def draw(resolution=64, seed=0, **changes):
    return draw_flower({**FLOWER, **changes}, resolution, np.random.default_rng(seed)).astype(float)


def petal_mask(**flower):
    """Where the image changes when the petals change their color and nothing else."""
    return (draw(**{**flower, "petal_color": "white"}) != draw(**{**flower, "petal_color": "blue"})).any(axis=2)


def middle_and_reach(mask):
    """Where the flower stands, and how far from there it goes."""
    rows, columns = np.nonzero(mask)
    row, column = rows.mean(), columns.mean()
    return row, column, np.hypot(rows - row, columns - column).max()


@pytest.mark.parametrize("shape", ATTRIBUTES["petal_shape"])
@pytest.mark.parametrize("count", ATTRIBUTES["petal_count"])
def test_petals_can_be_counted_around_the_flower(shape, count):
    mask = petal_mask(resolution=256, petal_shape=shape, petal_count=count, seed=3)
    row, column, reach = middle_and_reach(mask)
    angle = np.linspace(0, 2 * np.pi, 720, endpoint=False)
    # Inner rings run through petals that overlap, outer ones through the two tips of a heart.
    counts = []
    for share in np.linspace(0.7, 0.9, 9):
        rows, columns = row + share * reach * np.sin(angle), column + share * reach * np.cos(angle)
        ring = mask[rows.round().astype(int), columns.round().astype(int)]
        counts.append((ring & ~np.roll(ring, 1)).sum())
    assert COUNTS[count] in counts


def test_shapes_differ_in_width_from_base_to_tip():
    """Share of a circle that the petals cover, near the tips and halfway."""
    shares = {}
    for shape in ATTRIBUTES["petal_shape"]:
        mask = petal_mask(resolution=256, petal_shape=shape)
        row, column, reach = middle_and_reach(mask)
        radius = np.hypot(np.arange(256)[:, None] - row, np.arange(256) - column) / reach
        shares[shape] = [mask[abs(radius - r) < 0.03].mean() for r in (0.5, 0.88)]
    assert max(shares, key=lambda shape: shares[shape][0]) == "round"
    assert max(shares, key=lambda shape: shares[shape][1]) == "heart"
    assert min(shares, key=lambda shape: shares[shape][0]) == "narrow"
    assert min(shares, key=lambda shape: shares[shape][1] / shares[shape][0]) == "pointed"


@pytest.mark.parametrize("seed", range(3))
def test_large_flowers_reach_further(seed):
    small, large = (middle_and_reach(petal_mask(size=size, seed=seed))[2] for size in ("small", "large"))
    assert 1.3 * small < large < 32


def test_petals_have_their_color_whatever_the_rest():
    """The mean color over the petals is nearest to that of the same color in other flowers."""
    rng = np.random.default_rng(7)

    def mean_color(color, seed):
        flower = {name: str(rng.choice(values)) for name, values in ATTRIBUTES.items()} | {"petal_color": color}
        return draw(seed=seed, **flower)[petal_mask(seed=seed, **flower)].mean(axis=0)

    colors = ATTRIBUTES["petal_color"]
    centroids = np.array([np.mean([mean_color(color, seed) for seed in range(10)], axis=0) for color in colors])
    for wanted, color in enumerate(colors):
        for seed in range(10, 20):
            distances = np.linalg.norm(centroids - mean_color(color, seed), axis=1)
            assert distances.argmin() == wanted, f"{color} looks {colors[distances.argmin()]}"


def test_center_color_changes_the_center_alone():
    drawn = [draw(center_color=color, resolution=61) for color in ATTRIBUTES["center_color"]]
    for one, other in itertools.combinations(drawn, 2):
        changed = (one != other).any(axis=2)
        assert np.abs(one - other)[changed].mean() > 30
        rows, columns = np.nonzero(changed)
        assert np.hypot(rows - rows.mean(), columns - columns.mean()).max() < 0.32 * 0.95 * 61 / 2


@pytest.mark.parametrize("background", ATTRIBUTES["background"])
def test_one_flower_at_every_resolution(background):
    fine, coarse = draw(256, background=background), draw(64, background=background)
    assert np.abs(fine.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3)) - coarse).mean() < 3
    assert np.abs(coarse - draw(64, background=background, seed=1)).mean() > 10


@pytest.mark.parametrize("background", ATTRIBUTES["background"])
def test_backgrounds_fill_the_image_within_range(background):
    shade = BACKGROUNDS[background](*pixel_axes(37), np.random.default_rng(5))
    assert shade.shape == (37, 37)
    assert shade.dtype == np.float32
    assert shade.min() >= 0
    assert shade.max() <= 1
    assert shade.std() > 0.05


def test_edges_are_smooth():
    """A white petal against the night has pixels of every brightness in between, not two."""
    image = draw(petal_color="white", background="night", petal_shape="narrow").mean(axis=2)
    assert ((image > 70) & (image < 170)).sum() > 50


@pytest.mark.parametrize("resolution", [8, 13, 64])
def test_image_is_bytes_of_the_size_asked_for(resolution):
    image = draw_flower(FLOWER, resolution, np.random.default_rng(0))
    assert image.shape == (resolution, resolution, 3)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous


def test_class_ids_number_all_flowers():
    flowers = (dict(zip(ATTRIBUTES, values)) for values in itertools.product(*ATTRIBUTES.values()))
    assert [class_id_of(flower) for flower in flowers] == list(range(8 * 6 * 4 * 4 * 2 * 6))


def test_errors_name_what_is_wrong():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"petal_color must be one of red, .*, but it is 'beige'"):
        draw_flower({**FLOWER, "petal_color": "beige"}, 64, rng)
    with pytest.raises(ValueError, match=r"attributes are \['size'\], expected exactly"):
        class_id_of({"size": "small"})
    with pytest.raises(ValueError, match=r"resolution must be at least 8 pixels, but it is 7"):
        draw_flower(FLOWER, 7, rng)
