"""`python -m polyak_model` runs the command `polyak-model`."""

import sys

from polyak_model.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
