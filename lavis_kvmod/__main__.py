"""``python -m lavis_kvmod``, the same as ``lavis-kvmod``."""

import sys

from lavis_kvmod.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
