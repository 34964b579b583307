"""`python -m mirror_modules` is the command `mirror-modules`."""

import sys

from mirror_modules.cli import main

if __name__ == "__main__":
    sys.exit(main())
