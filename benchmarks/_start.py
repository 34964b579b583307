"""Seconds of each part of `mirror-modules generate`, as JSON: `python _start.py MODEL_DIR OUT DEVICE`."""

import time

BEGAN = time.perf_counter()

import json  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from functools import wraps  # noqa: E402
from typing import Any  # noqa: E402
from unittest.mock import patch  # noqa: E402


def main() -> None:
    """Run the command, and print the seconds of each part."""
    # What the command imports.
    import mirror_modules.training.distributed  # noqa: F401
    from mirror_modules.cli import main
    from mirror_modules.models import TextToImage
    from mirror_modules.pictures import saving  # noqa: F401

    seconds = {"import": time.perf_counter() - BEGAN}

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            result = function(*arguments, **options)
            seconds[part] = time.perf_counter() - started
            return result

        return call

    model_dir, out, device = sys.argv[1:]
    with (
        patch.object(TextToImage, "from_pretrained", timed("load", TextToImage.from_pretrained)),
        patch.object(TextToImage, "generate", timed("first image", TextToImage.generate)),
    ):
        status = main(["generate", model_dir, "a flower", "--out", out, "--device", device])
    if status:
        sys.exit(status)
    seconds["rest"] = time.perf_counter() - BEGAN - sum(seconds.values())
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
