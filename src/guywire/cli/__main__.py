"""``python -m guywire.cli``."""

from __future__ import annotations

import sys

from guywire.cli import main

if __name__ == "__main__":
    sys.exit(main())
