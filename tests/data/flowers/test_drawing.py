import itertools

import numpy as np
import pytest

from mirror_modules.data import ATTRIBUTES, SyntheticFlowers, class_id_of, draw_flower
from mirror_modules.data.flowers.backgrounds import BACKGROUNDS
from mirror_modules.data.flowers.drawing import COUNTS, HIDDEN, POINT_NAMES, draw_located_flower, pixel_axes

FLOWER = {
    "petal_color": "red",
    "petal_count": "five",
    "petal_shape": "round",
    "center_color": "golden",
    "size": "large",
    "background": "sand",
}

# Of the first flowers of seed 0: class, first caption, and means of green over 16 x 16 pixels.
GOLDEN_CLASSES = [7596, 8469, 1798]
GOLDEN_CAPTIONS = [
    "the ebony middle of this little flower sits between six snowy petals under a bright sky",
    "look at this large bloom with its burgundy petals around an ebony middle in the sand",
    "the six petals of this large blossom are tangerine around an ebony middle before a striped wall",
]
GOLDEN_PIXELS = [
    [
        [184.1, 187.1, 195.0, 196.7],
        [198.2, 210.9, 209.1, 193.5],
        [208.4, 192.3, 218.9, 231.2],
        [214.3, 222.2, 236.8, 227.9],
    ],
    [[178.2, 127.4, 60.7, 189.7], [103.2, 29.8, 27.8, 87.6], [133.4, 27.4, 23.9, 90.3], [156.8, 122.5, 89.5, 164.0]],
    [
        [149.1, 146.7, 134.3, 146.8],
        [151.3, 111.0, 103.1, 147.2],
        [144.8, 109.9, 96.3, 147.8],
        [145.3, 142.8, 146.8, 147.3],
    ],
]


def draw(resolution=64, seed=0, **changes):
    return draw_flower({**FLOWER, **changes}, resolution, np.random.default_rng(seed)).astype(float)


def petal_mask(**flower):
    """Pixels that change with the petal color alone."""
    return (draw(**{**flower, "petal_color": "white"}) != draw(**{**flower, "petal_color": "blue"})).any(axis=2)


def center_and_radius(mask):
    """Centroid of the flower, and the largest distance from it."""
    rows, columns = np.nonzero(mask)
    row, column = rows.mean(), columns.mean()
    return row, column, np.hypot(rows - row, columns - column).max()


@pytest.mark.parametrize("shape", ATTRIBUTES["petal_shape"])
@pytest.mark.parametrize("count", ATTRIBUTES["petal_count"])
def test_petals_can_be_counted_on_a_circle(shape, count):
    mask = petal_mask(resolution=256, petal_shape=shape, petal_count=count, seed=3)
    row, column, radius = center_and_radius(mask)
    angle = np.linspace(0, 2 * np.pi, 720, endpoint=False)
    # Small circles cross overlapping petals, large ones both lobes of a heart.
    counts = []
    for share in np.linspace(0.7, 0.9, 9):
        rows, columns = row + share * radius * np.sin(angle), column + share * radius * np.cos(angle)
        ring = mask[rows.round().astype(int), columns.round().astype(int)]
        counts.append((ring & ~np.roll(ring, 1)).sum())
    assert COUNTS[count] in counts


def test_shapes_differ_in_their_width_profile():
    """The fraction of a circle covered by petals, halfway and near the tips, identifies each shape."""
    shares = {}
    for shape in ATTRIBUTES["petal_shape"]:
        mask = petal_mask(resolution=256, petal_shape=shape)
        row, column, radius = center_and_radius(mask)
        distance = np.hypot(np.arange(256)[:, None] - row, np.arange(256) - column) / radius
        shares[shape] = [mask[abs(distance - r) < 0.03].mean() for r in (0.5, 0.88)]
    assert max(shares, key=lambda shape: shares[shape][0]) == "round"
    assert max(shares, key=lambda shape: shares[shape][1]) == "heart"
    assert min(shares, key=lambda shape: shares[shape][0]) == "narrow"
    assert min(shares, key=lambda shape: shares[shape][1] / shares[shape][0]) == "pointed"


@pytest.mark.parametrize("seed", range(3))
def test_large_flowers_are_larger(seed):
    small, large = (center_and_radius(petal_mask(size=size, seed=seed))[2] for size in ("small", "large"))
    assert 1.3 * small < large < 32


def test_petal_colors_are_separable_whatever_the_other_attributes():
    """Classify each flower by its mean petal color, with centroids from other flowers."""
    rng = np.random.default_rng(7)

    def mean_color(color, seed):
        flower = {name: str(rng.choice(values)) for name, values in ATTRIBUTES.items()} | {"petal_color": color}
        return draw(seed=seed, **flower)[petal_mask(seed=seed, **flower)].mean(axis=0)

    colors = ATTRIBUTES["petal_color"]
    centroids = np.array([np.mean([mean_color(color, seed) for seed in range(10)], axis=0) for color in colors])
    for label, color in enumerate(colors):
        for seed in range(10, 20):
            distances = np.linalg.norm(centroids - mean_color(color, seed), axis=1)
            assert distances.argmin() == label, f"{color} is classified as {colors[distances.argmin()]}"


def test_the_center_color_changes_only_the_center():
    drawn = [draw(center_color=color, resolution=61) for color in ATTRIBUTES["center_color"]]
    for one, other in itertools.combinations(drawn, 2):
        changed = (one != other).any(axis=2)
        assert np.abs(one - other)[changed].mean() > 30
        rows, columns = np.nonzero(changed)
        assert np.hypot(rows - rows.mean(), columns - columns.mean()).max() < 0.32 * 0.95 * 61 / 2


@pytest.mark.parametrize("background", ATTRIBUTES["background"])
def test_a_flower_is_the_same_at_every_resolution(background):
    fine, coarse = draw(256, background=background), draw(64, background=background)
    assert np.abs(fine.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3)) - coarse).mean() < 3
    assert np.abs(coarse - draw(64, background=background, seed=1)).mean() > 10


@pytest.mark.parametrize("background", ATTRIBUTES["background"])
def test_backgrounds_are_in_range_and_vary(background):
    shade = BACKGROUNDS[background](*pixel_axes(37), np.random.default_rng(5))
    assert shade.shape == (37, 37)
    assert shade.dtype == np.float32
    assert shade.min() >= 0
    assert shade.max() <= 1
    assert shade.std() > 0.05


def test_edges_are_antialiased():
    """A white petal on a night sky has pixels of intermediate brightness."""
    image = draw(petal_color="white", background="night", petal_shape="narrow").mean(axis=2)
    assert ((image > 70) & (image < 170)).sum() > 50


@pytest.mark.parametrize("resolution", [8, 13, 64])
def test_the_image_is_bytes_of_the_given_size(resolution):
    image = draw_flower(FLOWER, resolution, np.random.default_rng(0))
    assert image.shape == (resolution, resolution, 3)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous


def test_class_ids_enumerate_all_combinations():
    flowers = (dict(zip(ATTRIBUTES, values)) for values in itertools.product(*ATTRIBUTES.values()))
    assert [class_id_of(flower) for flower in flowers] == list(range(8 * 6 * 4 * 4 * 2 * 6))


def test_errors():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"petal_color must be one of red, .*, but it is 'beige'"):
        draw_flower({**FLOWER, "petal_color": "beige"}, 64, rng)
    with pytest.raises(ValueError, match=r"attributes are \['size'\]; expected exactly"):
        class_id_of({"size": "small"})
    with pytest.raises(ValueError, match=r"resolution must be at least 8 pixels, but it is 7"):
        draw_flower(FLOWER, 7, rng)
    with pytest.raises(ValueError, match=r"draw_flower: resolution must be a whole number .*, but it is 16.5"):
        draw_flower(FLOWER, 16.5, rng)


# Where the flower is


def locate(resolution=64, seed=0, **changes):
    return draw_located_flower({**FLOWER, **changes}, resolution, np.random.default_rng(seed))


def flower_mask(**flower):
    """Pixels that change with the colors of petals and center."""
    one = {**flower, "petal_color": "white", "center_color": "black"}
    return (draw(**one) != draw(**{**flower, "petal_color": "blue", "center_color": "green"})).any(axis=2)


@pytest.mark.parametrize("size", ATTRIBUTES["size"])
@pytest.mark.parametrize("shape", ATTRIBUTES["petal_shape"])
@pytest.mark.parametrize("count", ATTRIBUTES["petal_count"])
def test_the_box_bounds_the_pixels_of_the_flower(size, shape, count):
    flower = {"resolution": 256, "size": size, "petal_shape": shape, "petal_count": count}
    flower["seed"] = COUNTS[count] + 10 * len(shape)
    rows, columns = np.nonzero(flower_mask(**flower))
    x, y, w, h = locate(**flower).box
    box = np.clip((x, y, x + w, y + h), 0, 1) * 256
    pixels = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert np.abs(box - pixels).max() <= 1.5


@pytest.mark.parametrize("shape", ATTRIBUTES["petal_shape"])
@pytest.mark.parametrize("count", ATTRIBUTES["petal_count"])
def test_key_points_are_the_center_and_the_ends_of_the_petals(shape, count):
    flower = {"size": "small", "petal_shape": shape, "petal_count": count, "seed": 4}
    points = locate(**flower).points
    assert len(points) == len(POINT_NAMES) == 9
    petals = COUNTS[count]
    assert all(point[2] == 1 for point in points[: petals + 1])
    assert points[petals + 1 :] == (HIDDEN,) * (8 - petals)
    mask = flower_mask(resolution=256, **flower)
    row, column, radius = center_and_radius(mask)
    center = 256 * np.array(points[0][:2])
    assert np.abs(center - (column, row)).max() < 0.1 * radius
    center_color = (draw(256, **{**flower, "center_color": "black"}) != draw(256, **flower)).any(axis=2)
    assert center_color[int(center[1]), int(center[0])]
    for x, y, _ in points[1 : petals + 1]:
        # Just inside of its end a petal has its color, also between the lobes of a heart.
        x, y = center + (0.8 if shape == "heart" else 0.93) * (256 * np.array((x, y)) - center)
        assert mask[int(y), int(x)]


def test_places_do_not_depend_on_the_resolution():
    one, other = locate(16, seed=9), locate(131, seed=9)
    assert one[1:] == other[1:]
    assert np.array_equal(one.image, draw_flower(FLOWER, 16, np.random.default_rng(9)))


def test_tips_beyond_the_border_are_not_visible():
    tips = [point for seed in range(80) for point in locate(8, seed=seed).points[1:6]]
    assert all(point == HIDDEN or (min(point[:2]) >= 0 and max(point[:2]) <= 1) for point in tips)


def test_the_first_flowers_are_those_of_every_version():
    """Runs are compared across versions by their seed."""
    flowers = SyntheticFlowers(3, resolution=64)
    assert [sample.class_id for sample in flowers] == GOLDEN_CLASSES
    assert [sample.captions[0] for sample in flowers] == GOLDEN_CAPTIONS
    for sample, rows in zip(flowers, GOLDEN_PIXELS):
        coarse = sample.image.reshape(4, 16, 4, 16, 3).mean(axis=(1, 3))
        # Rounding may differ between processors.
        np.testing.assert_allclose(coarse[:, :, 1], rows, atol=0.1)
