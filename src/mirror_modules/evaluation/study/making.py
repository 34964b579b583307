"""Human study: a page that shows raters pairs of images of two runs without naming the runs, and its key."""

from __future__ import annotations

import hashlib
import io
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mirror_modules._checks import check_positive
from mirror_modules._files import as_folder, write_text
from mirror_modules.data.readers.caption_folder import IMAGE_SUFFIXES
from mirror_modules.data.readers.images import image_size, read_square, shrink
from mirror_modules.data.readers.names import is_hidden
from mirror_modules.data.transforms import to_bytes
from mirror_modules.evaluation.study.plan import (
    ANSWERS_FORMAT,
    KEY_FILE,
    PAGE_FILE,
    QUESTIONS,
    StudyImage,
    StudyKey,
    Trial,
    plan_trials,
    run_pairs,
)
from mirror_modules.evaluation.study.results import expected_half_width
from mirror_modules.models import TextToImage
from mirror_modules.pictures.grids import as_data_url
from mirror_modules.stem.vocabulary import split_words
from mirror_modules.training.batches import load_splits, unseen_captions
from mirror_modules.training.distributed import resolve_device
from mirror_modules.training.folder import RunFolder

try:
    import jinja2
    from PIL import Image
except ImportError as error:
    raise ImportError("A human study needs more packages: pip install 'mirror-modules[train]'") from error

# Images are shown at most this much larger than they are.
ENLARGEMENT = 4
TEMPLATE = Path(__file__).with_name("page.html.jinja")
CAPTIONS_FILE = "captions.txt"
# Images generated at a time.
BATCH = 32
# Numbers of raters for which the widths of the intervals are given.
RATERS = (1, 3, 10)

Pixels = NDArray[np.uint8]


class Study(NamedTuple):
    """A human study that was written."""

    page: Path
    """The page for the raters."""
    key: Path
    """The file that names the run of each image."""
    captions: list[str]
    pairs: int
    """Different pairs of images that each rater sees."""
    repeats: int
    """Of these, the pairs that each rater sees a second time."""
    half_widths: dict[int, tuple[float, float]]
    """For numbers of raters who answer everything, half the width to expect of the 95 % interval of a win rate near
    one half: if the raters' answers about the same caption are independent, and if they are always the same."""


def make_study(
    runs: Sequence[str | Path],
    out: str | Path,
    *,
    captions: Sequence[str] | None = None,
    max_captions: int = 50,
    pairs: int = 100,
    repeats: int = 10,
    raters: int = 20,
    seed: int = 0,
    resolution: int | None = None,
    device: str = "cpu",
) -> Study:
    r"""Write a page that shows pairs of images of two runs, and asks which looks more real and which fits the caption.

    The page is one file with all images, works without a network, and names no run. It stores the answers in the
    rater's browser and saves them as a file for `study_results`. Each rater chooses a number, on which the order of the
    pairs and the sides of the images depend. The images of a pair have the same caption and the same seed: `seed + n`
    for caption n. Some pairs are shown a second time with their sides exchanged, which measures how consistent a rater
    is. The key, which names the run of each image, is a separate file.

    Args:
        runs: Two or more folders, each of a trained run, of a saved model, or of images of other origin with a file
            captions.txt that has the caption of each image on a line, in the order of the images' names.
        out: Folder for the page and the key; created if missing.
        captions: Captions to generate images from. None takes those of the folders of images, or, without one, captions
            of validation images of the runs that none of the runs has in its training data.
        max_captions: Captions at most; if there are more, they are drawn at random.
        pairs: Different pairs of images that each rater sees at most. All pairs of runs are seen equally often.
        repeats: Pairs that each rater sees a second time; at most a third of the others.
        raters: Number of raters among which a rater chooses.
        seed: Seed of the choice of captions, of the noise, and of the order of the pairs.
        resolution: Reduce larger images to this height and width; None shows all images as they are.
        device: "cpu", "cuda" or "auto", which uses a GPU if there is one.

    Returns:
        The paths, and the size of the study.

    Raises:
        FileNotFoundError: A folder is none of the above, or lacks a file.
        ValueError: There are fewer than two runs or captions, two runs are the same or have an identical image, an
            argument is out of range, a file is damaged, or `out` holds another study.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from mirror_modules.evaluation import make_study
        >>> root = Path(tempfile.mkdtemp())
        >>> for name, colors in (("first", ["red", "blue"]), ("second", ["pink", "navy"])):
        ...     (root / name).mkdir()
        ...     _ = (root / name / "captions.txt").write_text("a red sheet\na blue sheet\n")
        ...     for i, color in enumerate(colors):
        ...         Image.new("RGB", (16, 16), color).save(root / name / f"{i}.png")
        >>> study = make_study([root / "first", root / "second"], root / "study")
        >>> study.page.name, study.key.name, study.pairs
        ('study.html', 'key.json', 2)
        >>> "first" in study.key.read_text()
        True
    """
    check_positive("make_study", max_captions=max_captions, pairs=pairs, raters=raters)
    for name, value in {"repeats": repeats, "seed": seed}.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"make_study: {name} must be a whole number of at least 0, but it is {value!r}.")
    if resolution is not None:
        check_positive("make_study", resolution=resolution)
    folders = _check_runs(runs)
    device = resolve_device(device)
    out = as_folder("make_study: out (--out)", out)
    chosen = _choose_captions(folders, captions, max_captions, seed)
    seeds = [seed + i for i in range(len(chosen))]
    images = [_images_of(folder, chosen, seeds, device) for folder in folders]
    images = _same_resolution(folders, images, resolution)
    encoded = [[_png(pixels) for pixels in each] for each in images]
    names = [[_image_id(chosen[i], content) for i, content in enumerate(each)] for each in encoded]
    _check_distinct(folders, names, chosen)

    pairs = min(pairs, len(run_pairs(len(folders))) * len(chosen))
    repeats = min(repeats, pairs // 3)
    trials = [plan_trials(names, pairs, repeats, seed, rater) for rater in range(1, raters + 1)]
    key = StudyKey(
        study=_study_id(chosen, trials),
        runs=[folder.as_posix() for folder in folders],
        captions=chosen,
        raters=raters,
        trials=pairs + repeats,
        images={
            name: StudyImage(run, i, None if _is_images(folder) else seeds[i])
            for run, folder in enumerate(folders)
            for i, name in enumerate(names[run])
        },
        settings={"pairs": pairs, "repeats": repeats, "seed": seed, "resolution": resolution},
    )
    _check_free(out, key)
    out.mkdir(parents=True, exist_ok=True)
    contents = {name: content for row, each in zip(names, encoded) for name, content in zip(row, each)}
    # The key first: a page without its key would be worthless.
    key_path = key.write(out)
    largest = max(len(pixels) for each in images for pixels in each)
    write_text(out / PAGE_FILE, _page(key, contents, trials, largest))
    return Study(out / PAGE_FILE, key_path, chosen, pairs, repeats, _half_widths(key, pairs))


def _check_runs(runs: Sequence[str | Path]) -> list[Path]:
    """The folders of the runs, all of a known kind and different."""
    if not isinstance(runs, Sequence) or isinstance(runs, str) or len(runs) < 2:
        raise ValueError("make_study: runs must be two or more folders, whose images are compared.")
    folders = [Path(run) for run in runs]
    found: dict[Path, Path] = {}
    for folder in folders:
        if not (_is_images(folder) or (folder / "config.json").is_file()):
            found_what = f"{folder} is none of these" if folder.is_dir() else f"there is no folder {folder}"
            raise FileNotFoundError(
                f"make_study: {found_what}; runs must be folders of trained runs, of models, or of images with a file "
                f"{CAPTIONS_FILE}."
            )
        source = (_model_folder(folder) or folder).resolve()
        if source in found:
            raise ValueError(f"make_study: {found[source]} and {folder} are the same run; give each run once.")
        found[source] = folder
    return folders


def _is_images(folder: Path) -> bool:
    return (folder / CAPTIONS_FILE).is_file()


def _is_run(folder: Path) -> bool:
    return (folder / "model").is_dir()


def _model_folder(folder: Path) -> Path | None:
    """The folder of the model of a run, or of a model itself; None for a folder of images."""
    if _is_images(folder):
        return None
    return RunFolder(folder).model if _is_run(folder) else folder


def _choose_captions(
    folders: Sequence[Path], captions: Sequence[str] | None, max_captions: int, seed: int
) -> list[str]:
    """Captions for which all runs have images, without repetitions."""
    if captions is not None:
        if isinstance(captions, str) or not all(isinstance(caption, str) for caption in captions):
            raise ValueError("make_study: captions must be a list of strings, or None.")
        available = list(captions)
    elif listed := [_listed_captions(folder) for folder in folders if _is_images(folder)]:
        available = [caption for caption in listed[0] if all(caption in each for each in listed)]
    else:
        available = _unseen_captions(folders)
    available = list(dict.fromkeys(available))
    if len(available) < 2:
        raise ValueError(
            f"make_study: a study needs at least 2 captions for which all runs have images, but there are "
            f"{len(available)}."
        )
    rows = np.random.default_rng(seed).permutation(len(available))[:max_captions]
    return [available[row] for row in sorted(rows.tolist())]


def _unseen_captions(folders: Sequence[Path]) -> list[str]:
    """Captions of validation images of the first run that occur in no run's training data."""
    if not any(map(_is_run, folders)):
        raise ValueError(
            "make_study: captions must be given for folders of models, which have no data of their own; on the command "
            "line, with --captions FILE."
        )
    found: dict[Any, set[tuple[str, ...]]] = {}
    available: list[str] | None = None
    longest = 0
    for folder in filter(_is_run, folders):
        recipe = RunFolder(folder).read_recipe()
        same = (recipe.data, recipe.model.max_words, recipe.seed)
        if same in found:
            continue
        try:
            splits = load_splits(recipe.data, recipe.model, recipe.seed)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"make_study: the captions of {folder} cannot be read, so captions must be given; on the command line, "
                f"with --captions FILE ({error})"
            ) from error
        longest = max(longest, recipe.model.max_words)
        if available is None:
            available = [entry.caption for entry in unseen_captions(splits)]
        found[same] = {_words(caption, longest) for captions in splits.training.captions for caption in captions}
    seen = set().union(*found.values())
    return [caption for caption in available or [] if _words(caption, longest) not in seen]


def _words(caption: str, longest: int) -> tuple[str, ...]:
    """What a model reads of a caption."""
    return tuple(split_words(caption)[:longest])


def _listed_captions(folder: Path) -> list[str]:
    """The captions in captions.txt."""
    path = folder / CAPTIONS_FILE
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"make_study: {path} is not UTF-8 text ({error}).") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _images_of(folder: Path, captions: Sequence[str], seeds: Sequence[int], device: str) -> list[Pixels]:
    """The image of each caption, as bytes (H, H, 3)."""
    source = _model_folder(folder)
    return _read_images(folder, captions) if source is None else _generate(source, captions, seeds, device)


def _generate(folder: Path, captions: Sequence[str], seeds: Sequence[int], device: str) -> list[Pixels]:
    model = TextToImage.from_pretrained(folder, device=device, only="images")
    # Encoding all captions first warns once of unknown words.
    model.vocabulary.encode(captions, max_words=model.config.max_words)
    images: list[Pixels] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="unknown words")
        for start in range(0, len(captions), BATCH):
            rows = slice(start, start + BATCH)
            batch = model.generate(captions[rows], seed=seeds[rows])
            if not bool(batch.isfinite().all()):
                raise ValueError(
                    f"make_study: the model in {folder} generates images with NaN or infinite values; its training has "
                    "diverged. Leave it out, or train it again."
                )
            images += list(to_bytes(batch).cpu().numpy())
    return images


def _read_images(folder: Path, captions: Sequence[str]) -> list[Pixels]:
    """The center squares of images in a folder, one for each caption."""
    files = sorted(
        (file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and not is_hidden(file.name)),
        key=_natural_order,
    )
    listed = _listed_captions(folder)
    if len(files) != len(listed):
        raise ValueError(
            f"make_study: {folder} has {len(files)} images, but {CAPTIONS_FILE} has {len(listed)} captions; write one "
            "line for each image."
        )
    # Of several images of the same caption, the first.
    of_caption = dict(zip(reversed(listed), reversed(files)))
    if missing := [caption for caption in captions if caption not in of_caption]:
        raise ValueError(
            f"make_study: {folder} has no image of the caption {missing[0]!r}; add it, or leave the caption out."
        )
    return [read_square(of_caption[caption], min(image_size(of_caption[caption]))) for caption in captions]


def _natural_order(file: Path) -> list[tuple[int, str]]:
    """A key that sorts image-10 after image-9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", file.name.lower())]


def _same_resolution(folders: Sequence[Path], images: list[list[Pixels]], resolution: int | None) -> list[list[Pixels]]:
    """The images reduced to a resolution; without one, a warning if the runs' images differ in size."""
    if resolution is None:
        sizes = [{len(pixels) for pixels in each} for each in images]
        if len(set().union(*sizes)) > 1:
            listed = ", ".join(f"{folder}: {_range(each)}" for folder, each in zip(folders, sizes))
            warnings.warn(
                f"make_study: the images differ in size ({listed} pixels), by which a rater may recognize their run; "
                "resolution (--resolution) reduces all to the same size.",
                stacklevel=3,
            )
        return images
    for folder, each in zip(folders, images):
        if (smallest := min(map(len, each))) < resolution:
            raise ValueError(
                f"make_study: resolution must be at most {smallest}, the size of an image of {folder}, but it is "
                f"{resolution}."
            )
    return [[pixels if len(pixels) == resolution else shrink(pixels, resolution) for pixels in each] for each in images]


def _range(sizes: set[int]) -> str:
    return str(min(sizes)) if len(sizes) == 1 else f"{min(sizes)} to {max(sizes)}"


def _png(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _image_id(caption: str, content: bytes) -> str:
    """A name of an image that depends on nothing but the image and its caption, and so does not give away its run."""
    return hashlib.sha256(caption.encode() + b"\0" + content).hexdigest()[:12]


def _check_distinct(folders: Sequence[Path], names: Sequence[Sequence[str]], captions: Sequence[str]) -> None:
    for first, second in run_pairs(len(folders)):
        for i, caption in enumerate(captions):
            if names[first][i] == names[second][i]:
                raise ValueError(
                    f"make_study: {folders[first]} and {folders[second]} have the same image of {caption!r}, which "
                    "nobody can compare; leave out the caption, or one of the runs."
                )


def _study_id(captions: Sequence[str], trials: Sequence[Sequence[Trial]]) -> str:
    """The same for the same images, captions and orders, and for no other study."""
    content = json.dumps([captions, trials], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def _check_free(out: Path, key: StudyKey) -> None:
    """Require that the folder holds no other study, whose answers would lose their key."""
    if not (out / KEY_FILE).exists():
        return
    found = StudyKey.read(out).study
    if found != key.study:
        raise ValueError(
            f"make_study: {out} holds another study ({found}); nothing in it was changed. Choose another folder as out "
            "(--out), or remove this one."
        )


def _page(key: StudyKey, contents: dict[str, bytes], trials: Sequence[Sequence[Trial]], largest: int) -> str:
    """The page. Images are in the order of their ids: that of the runs would give them away."""
    data = {
        "study": key.study,
        "format": ANSWERS_FORMAT,
        "captions": key.captions,
        "questions": list(QUESTIONS),
        "images": {name: as_data_url("image/png", contents[name]) for name in sorted(contents)},
        "raters": trials,
    }
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # A caption must not end the script that contains it.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        data=text, raters=key.raters, largest_side=ENLARGEMENT * largest
    )


def _half_widths(key: StudyKey, pairs: int) -> dict[int, tuple[float, float]]:
    """Half the width of an interval, for independent answers and for raters who always agree; see `Study`."""
    captions = len(key.captions)
    # Answers of a rater about two runs, rounded down.
    own = max(1, pairs // len(run_pairs(len(key.runs))))
    widths = {}
    for raters in sorted({*(count for count in RATERS if count < key.raters), key.raters}):
        distinct = captions * (1 - (1 - min(own, captions) / captions) ** raters)
        widths[raters] = (expected_half_width(raters * own), expected_half_width(distinct))
    return widths
