"""`python -m openvla_hf.cli`, as `accelerate launch` starts it."""

import sys

from . import main


if __name__ == "__main__":
    sys.exit(main())
