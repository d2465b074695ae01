"""``python -m effvit.cli``."""

import sys

from effvit.cli import main

if __name__ == "__main__":
    sys.exit(main())
