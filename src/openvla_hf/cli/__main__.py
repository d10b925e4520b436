"""Run the command line with `python -m openvla_hf.cli`, as `accelerate launch` does."""

import sys

from . import main


if __name__ == "__main__":
    sys.exit(main())
