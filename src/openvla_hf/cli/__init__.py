"""The command line: a file a command, each with a docstring, an `EXAMPLE`, `add_arguments(parser)` and `run(args)`."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from . import bench, demo, doctor, evaluate, export, finetune, info, merge, predict, push, quantize, record


COMMANDS = (demo, evaluate, record, predict, bench, info, push, export, finetune, doctor, merge, quantize)

EXAMPLES = """examples:
  openvla-hf demo
  openvla-hf evaluate --episodes 200
  openvla-hf predict --image frame.png --instruction "put the green cube on the yellow plate"
  openvla-hf bench --random 0.5b --batch-sizes 1 8
  openvla-hf record demos/tabletop_lift --task lift
  openvla-hf info openvla/openvla-7b
  openvla-hf predict --model openvla/openvla-7b --unnorm-key bridge_orig \\
      --image frame.png --instruction "pick up the red block" --json
"""


def build_parser() -> argparse.ArgumentParser:
    """Every command with its options."""
    parser = argparse.ArgumentParser(
        prog="openvla-hf",
        description="OpenVLA in today's Hugging Face ecosystem.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        sub = commands.add_parser(
            command.__name__.rpartition(".")[2],
            help=command.__doc__,
            description=command.__doc__,
            epilog=f"example:\n  openvla-hf {command.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=command.run)
        command.add_arguments(sub)
        sub.add_argument("--json", action="store_true", help="one JSON object on standard output, nothing else")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; an error of the user's is one sentence on standard error and exit status 2."""
    args = build_parser().parse_args(argv)
    # What libraries say on import is no news to a person at a terminal.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        args.run(args)
    except KeyboardInterrupt as error:
        print(f"openvla-hf: {str(error) or 'Interrupted.'}", file=sys.stderr)
        return 130
    except (OSError, TypeError, ValueError) as error:
        print(f"openvla-hf: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name != "gymnasium":
            raise
        print("openvla-hf: the tabletop needs Gymnasium: pip install 'openvla-hf[sim]'", file=sys.stderr)
        return 2
    except ImportError as error:  # a package of an extra: the message says which
        print(f"openvla-hf: {error}", file=sys.stderr)
        return 2
    return 0
