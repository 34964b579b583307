"""Small data sets for the tests: images of noise, and captions that identify their image."""

import io
import json
import pickle
import tarfile

import numpy as np

from mirror_modules.data import CaptionedImage

COLORS = ("red", "green", "blue", "white", "black", "pink", "grey", "brown", "orange", "purple")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SHARD_SUFFIXES = ("jpg", "png", "webp")


class NumberedImages:
    """Image i is filled with i and has 1 to 3 captions, whose every word identifies the image."""

    def __init__(self, size, height, width):
        self.size, self.height, self.width = size, height, width

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index >= self.size:
            raise IndexError(index)
        image = np.full((self.height, self.width, 3), index, dtype=np.uint8)
        captions = tuple(" ".join([f"w{index}"] * (2 + choice)) for choice in range(1 + index % 3))
        return CaptionedImage(image, captions, 100 + index, {"number": str(index)})


def captions_of(number, count=3):
    """Captions of at least five words; no two images share one."""
    digits = " ".join(NUMBERS[int(digit)] for digit in f"{number:03}")
    return [f"a {COLORS[(number + i) % 10]} thing, number {digits}, seen {NUMBERS[i % 10]} times" for i in range(count)]


def write_image(path, number, size=(23, 19)):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def make_flowers(root, training=6, validation=3):
    """Two training classes and one validation class; image i has the captions `captions_of(i)`."""
    for i in range(training + validation):
        class_name = "class_00007" if i >= training else f"class_0000{1 + i % 2}"
        write_image(root / "jpg" / f"image_{i:05}.jpg", i)
        text = root / "text_c10" / class_name / f"image_{i:05}.txt"
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text("\n".join(captions_of(i)) + "\n", encoding="utf-8")
    (root / "trainclasses.txt").write_text("class_00001\nclass_00002\n")
    (root / "valclasses.txt").write_text("class_00007\n")
    return root


def make_birds(root, training=6, validation=3, captions=10, pickled=False, parts=False):
    """Images of 60 x 40 pixels with a box at (10, 5), 20 wide and 12 high, and three parts, one of them not visible."""
    images = root / "CUB_200_2011"
    listed, boxes, encoded = [], [], {"train": [], "test": []}
    words, numbers = {0: "<end>"}, {}
    for folder, first, count in (("train", 0, training), ("test", training, validation)):
        names = [f"{1 + i % 2 + 2 * (folder == 'test'):03}.Wren/Wren_{i:04}" for i in range(first, first + count)]
        for i, name in enumerate(names, start=first):
            write_image(images / "images" / f"{name}.jpg", i, (60, 40))
            listed.append(f"{i + 1} {name}.jpg\n")
            boxes.append(f"{i + 1} 10.0 5.0 20.0 12.0\n")
            lines = captions_of(i, captions)
            text = root / "text" / f"{name}.txt"
            text.parent.mkdir(parents=True, exist_ok=True)
            text.write_text("\n".join(lines) + "\n", encoding="utf-8")
            for line in lines:
                for word in line.replace(",", "").split():
                    words[numbers.setdefault(word, len(numbers) + 1)] = word
                encoded[folder].append([numbers[word] for word in line.replace(",", "").split()])
        (root / folder).mkdir(parents=True, exist_ok=True)
        write_pickle(root / folder / "filenames.pickle", names)
        write_pickle(root / folder / "class_info.pickle", [int(name[:3]) for name in names])
    (images / "images.txt").write_text("".join(listed))
    (images / "bounding_boxes.txt").write_text("".join(boxes))
    if parts:
        (images / "parts").mkdir()
        (images / "parts" / "parts.txt").write_text("1 left eye\n2 tail\n3 right eye\n")
        places = ("14.0 8.0 1", "0.0 0.0 0", "18.0 8.0 1")
        lines = [f"{i + 1} {part + 1} {place}\n" for i in range(len(listed)) for part, place in enumerate(places)]
        (images / "parts" / "part_locs.txt").write_text("".join(lines))
    if pickled:
        write_pickle(root / "captions.pickle", [encoded["train"], encoded["test"], words, numbers])
    return root


def make_coco(root, training=6, validation=3, year="2017"):
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for name, first, count in (("train", 0, training), ("val", training, validation)):
        images, annotations = [], []
        for i in range(first, first + count):
            file = f"{i:012}.jpg"
            write_image(root / f"{name}{year}" / file, i)
            images.append({"id": 7 * i, "file_name": file})
            annotations += [{"id": 100 * i + j, "image_id": 7 * i, "caption": c} for j, c in enumerate(captions_of(i))]
        content = {"info": {}, "licenses": [], "images": images, "annotations": annotations[::-1]}
        (root / "annotations" / f"captions_{name}{year}.json").write_text(json.dumps(content))
    return root


def make_folder(root, training=6, validation=3, style="txt"):
    """A caption folder with train/ and validation/; `style` is txt, jsonl or csv."""
    for name, first, count in (("train", 0, training), ("validation", training, validation)):
        lines = []
        for i in range(first, first + count):
            write_image(root / name / f"image{i}.png", i)
            if style == "txt":
                (root / name / f"image{i}.txt").write_text("\n".join(captions_of(i)), encoding="utf-8")
            for caption in captions_of(i):
                row = {"file": f"image{i}.png", "caption": caption, "class": COLORS[i % 3]}
                lines.append(json.dumps(row) if style == "jsonl" else f'image{i}.png,"{caption}",{COLORS[i % 3]}')
        if style == "jsonl":
            (root / name / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        if style == "csv":
            (root / name / "captions.csv").write_text("file,caption,class\n" + "\n".join(lines) + "\n")
    return root


def make_shards(root, training=6, validation=3):
    """Two shards for each split; copies of their images are in images/."""
    root.mkdir(parents=True, exist_ok=True)
    for split, numbers in (("train", range(training)), ("validation", range(training, training + validation))):
        half = len(numbers) // 2
        write_shard(root / f"{split}-000.tar", numbers[:half])
        write_shard(root / f"{split}-001.tar", numbers[half:])
    return root


def write_shard(path, numbers, change=lambda number, files: files):
    """A shard: even samples have a txt and no class, odd ones a json with their number as class."""
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            suffix = SHARD_SUFFIXES[number % 3]
            image = write_image(path.parent / "images" / f"{number}.{suffix}", number).read_bytes()
            text = {"txt": "\n".join(captions_of(number)).encode()}
            if number % 2:
                text = {"json": json.dumps({"captions": captions_of(number), "class": number}).encode()}
            for end, content in change(number, {suffix: image} | text).items():
                add_file(tar, f"{number:04}.{end}", content)
    return path


def add_file(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def damaged_sample(number, files):
    """As `change` of `write_shard`: samples 50 to 59 are damaged, each in another way."""
    image, text = list(files.items())
    damaged = {
        50: {"jpg": b"", "txt": b"a red thing"},
        51: {"jpg": image[1][:40], "txt": b"a red thing"},
        52: dict([image]),
        53: dict([text]),
        54: dict([image, ("txt", b"\xff\xfe")]),
        55: dict([image, ("txt", b" \n ?\n")]),
        56: dict([image, ("json", b"{")]),
        57: dict([image, ("json", b'{"captions": 3}')]),
        58: dict([image, ("json", b'{"captions": ["red"], "class": -1}')]),
        59: dict([image, ("json", b'{"captions": []}')]),
    }
    return damaged.get(number, files)


def same_samples(one, other):
    """Whether two data sets hold the same samples in the same order."""
    return len(one) == len(other) and all(
        np.array_equal(a.image, b.image) and a[1:] == b[1:] for a, b in ((one[i], other[i]) for i in range(len(one)))
    )


def files_of(folder):
    """Contents of the files in a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_pickle(path, content):
    path.write_bytes(pickle.dumps(content, protocol=2))


MAKERS = {
    "oxford-flowers": make_flowers,
    "birds": make_birds,
    "coco": make_coco,
    "folder": make_folder,
    "webdataset": make_shards,
}
