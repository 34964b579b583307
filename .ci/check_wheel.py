"""Check that a wheel holds the package whole, and nothing else: check_wheel.py WHEEL."""

import sys
from pathlib import Path
from zipfile import ZipFile

SOURCES = Path(__file__).parents[1] / "src"


def main() -> None:
    wheel = ZipFile(sys.argv[1])
    expected = {
        path.relative_to(SOURCES).as_posix()
        for path in SOURCES.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    if packed != expected:
        sys.exit(f"missing: {sorted(expected - packed)}, too many: {sorted(packed - expected)}")
    notes = {name.split(".dist-info/")[1]: name for name in wheel.namelist() if ".dist-info/" in name}
    for file, line in [
        ("METADATA", "License-Expression: Apache-2.0"),
        ("METADATA", "Requires-Python: >=3.10"),
        ("entry_points.txt", "mirror-modules = mirror_modules.cli:main"),
        ("licenses/LICENSE", "Apache License"),
    ]:
        if line not in wheel.read(notes[file]).decode():
            sys.exit(f"{file} does not say {line!r}")
    print(f"{Path(sys.argv[1]).name}: {len(packed)} files, license, typed, entry point")


if __name__ == "__main__":
    main()
