"""Run commands as a new user would, and check the exit status and the words of each.

    python .ci/first_ten_minutes.py .venv/bin/mirror-modules

Everything is written into a temporary folder. The trainings take two steps: this checks what commands print and write,
not what the models learn.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from mirror_modules.data import SyntheticFlowers

CAPTION = "a large red flower with five round petals"
# A short training of small networks.
SHORT = (
    "--steps 2 --model.channels 4 --model.discriminator-channels 4 --model.resolutions 8 16 --model.word-dim 16 "
    "--evaluation.report-images 2"
)
DRAWN = f"{SHORT} --data.training-images 64 --data.validation-images 40 --evaluation.candidates 10"

# Command, exit status, and words in its output, standard output and standard error together.
COMMANDS = [
    ("--version", 0, ["mirror-modules 0."]),
    ("--help", 0, ["train [RECIPE]", "recipes", "generate MODEL_DIR", "describe MODEL_DIR"]),
    ("descibe", 2, ["did you mean 'describe'?"]),
    ("recipes", 0, ["demo", "photos-64", "flowers-64", "ablation"]),
    ("train --help", 0, ["photos-64", "--threads", "--resume"]),
    ("data --help", 0, ["inspect PATH", "prepare PATH OUT"]),
    ("data inspect mine --out sheet.png", 0, ["read as 'folder'", "mirror-modules train photos-64 --data mine"]),
    ("data inspect mine --out sheet", 2, ["must end in .png"]),
    ("train demo --data mine", 2, ["draws its images", "train photos-64 --data mine"]),
    ("train mine", 2, ["is a folder, not a recipe", "photos-64 --data mine"]),
    (f"train photos-64 --data mine --out runs/mine --threads 1 {SHORT}", 0, ["1 thread", "Open runs/mine/report.html"]),
    (f"train flowers-64 --data mine --out runs/other --threads 1 {SHORT}", 0, ["Open runs/other/report.html"]),
    ("evaluate runs/mine --threads 1", 0, ["R-precision among"]),
    (
        f"train demo --out runs/demo --threads 1 {DRAWN} --phases pretraining stem",
        0,
        ["the other phases are not trained yet"],
    ),
    (
        f"train demo --out runs/demo --threads 1 {DRAWN} --resume --phases pretraining stem stream glam",
        0,
        ["already trained"],
    ),
    (f"generate runs/demo/model '{CAPTION}' --out flower.png", 0, [f"flower.png: seed 0, {CAPTION}"]),
    ("describe runs/demo/model flower.png", 0, ["flower.png: "]),
    (f"generate runs/demo '{CAPTION}'", 2, ["did you mean runs/demo/model?"]),
    ("generate runs/demo/model captions.txt", 2, ["is a file, not a caption", "--captions captions.txt"]),
    ("generate runs/demo/model --captions captions.txt --images 2 --out many.jpg", 0, ["many-003.jpg: seed 3"]),
    ("generate runs/demo/model --captions captions.txt --grid --out grid.png", 0, ["grid.png"]),
    (f"generate runs/demo/model '{CAPTION}' --out flower", 2, ["must end in .png"]),
    (f"generate runs/demo/model '{CAPTION}' --scale 2", 2, ["--scale needs --grid"]),
    ("describe runs/demo/model mine", 0, ["0.png: ", "11.png: "]),
    ("ablate --steps 0", 2, ["steps must be a whole number of at least 1"]),
    ("compare --systems demo gawwn-demo", 2, ["differ in data.scatter (False and True)"]),
    ("compare --data nowhere", 2, ["Without gawwn-photos-64", "there is no folder nowhere"]),
]


def main() -> int:
    """Run all commands; returns the number of those that differ from what is expected."""
    program, failures = Path(sys.argv[1]).absolute(), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "mine").mkdir()
        for i in range(12):
            flower = SyntheticFlowers(12, resolution=40)[i]
            Image.fromarray(flower.image).save(folder / "mine" / f"{i}.png")
            (folder / "mine" / f"{i}.txt").write_text(flower.captions[0], encoding="utf-8")
        (folder / "captions.txt").write_text("a small white flower\na large yellow flower\n", encoding="utf-8")
        for words, status, expected in COMMANDS:
            done = subprocess.run(
                f"{program} {words}", shell=True, cwd=folder, capture_output=True, text=True, check=False
            )
            output = done.stdout + done.stderr
            missing = [text for text in expected if text not in output]
            passed = done.returncode == status and not missing
            failures += not passed
            print(f"{'ok' if passed else 'FAILED':<7} mirror-modules {words}", flush=True)
            if not passed:
                print(f"exit status {done.returncode}, expected {status}; missing: {missing}\n{output}")
        image = Image.open(folder / "flower.png")
        if image.size != (16, 16) or Image.open(folder / "many-000.jpg").format != "JPEG":
            failures += 1
            print(f"FAILED  flower.png is {image.size}, expected the bare image of 16 x 16 pixels, many-000.jpg a JPEG")
    return failures


if __name__ == "__main__":
    sys.exit(main())
