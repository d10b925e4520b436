"""Measure how long an action takes: runs `openvla-hf bench` in a checkout.

python benchmarks/latency.py --random tiny
python benchmarks/latency.py --help
"""

import sys

from openvla_hf.cli import main


if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
