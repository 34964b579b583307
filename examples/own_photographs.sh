#!/usr/bin/env bash
# From a folder of captioned photographs to a model and its report, in runs/ and named after the folder:
#
#     examples/own_photographs.sh [FOLDER]
#
# Without a folder, twelve drawn flowers with captions are the photographs. STEPS=100 shortens the training. Needs
# mirror-modules[train,pretrained] in an active environment (`source .venv/bin/activate`).
set -euo pipefail

if [[ ${1:-} == -* ]]; then
    sed -n '2,7s/^# \{0,1\}//p' "$0"
    exit 0
fi
photographs=${1:-drawn_flowers}
if [ $# -eq 0 ]; then
    python3 - "$photographs" <<'PYTHON'
import sys
from pathlib import Path
from PIL import Image
from mirror_modules.data import SyntheticFlowers

folder = Path(sys.argv[1])
folder.mkdir(exist_ok=True)
for number, flower in enumerate(SyntheticFlowers(12, resolution=96)):
    Image.fromarray(flower.image).save(folder / f"flower{number}.png")
    (folder / f"flower{number}.txt").write_text("\n".join(flower.captions) + "\n", encoding="utf-8")
PYTHON
fi

run=runs/$(basename "$photographs")
mirror-modules data inspect "$photographs" --out photographs.png
mirror-modules train photos-64 --data "$photographs" --out "$run" ${STEPS:+--steps "$STEPS"}
mirror-modules generate "$run/model" "a large red flower with five petals" --images 4 --grid --out generated.png
mirror-modules describe "$run/model" "$photographs"
# `train` has evaluated the model already. The same command evaluates it again, for example after more training.
mirror-modules evaluate "$run"
