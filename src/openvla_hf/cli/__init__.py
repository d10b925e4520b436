"""The command line. Each command is a file with a docstring, an `EXAMPLE`, `add_arguments(parser)` and `run(args)`."""

import argparse
import functools
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from . import (
    assemble,
    bench,
    check,
    convert,
    demo,
    doctor,
    evaluate,
    export,
    finetune,
    info,
    merge,
    predict,
    push,
    quantize,
    record,
    serve,
)
from .config_file import insert_config


COMMANDS = (
    demo,
    evaluate,
    record,
    predict,
    serve,
    bench,
    info,
    push,
    export,
    convert,
    assemble,
    finetune,
    doctor,
    check,
    merge,
    quantize,
)
USER_ERROR, INTERRUPTED = 2, 130
"""Exit statuses. Shells use the second for programs that Ctrl-C ends."""

# What PyTorch makes of the message of an error in a process that reads data.
IN_WORKER = re.compile(r"Caught \w+ in DataLoader worker.*\n[\w.]+(?:Error|Exception): (?P<message>.+)", re.DOTALL)

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


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without a list of all options."""

    def error(self, message: str) -> NoReturn:
        """Exit with the message."""
        self.exit(USER_ERROR, f"{self.prog}: {message}\n")

    def in_flags(self, message: str) -> str:
        """Replace the Python arguments in a message, such as `eval_share=0.1`, with their flags."""
        # argparse has no public list of a parser's options. A test of the messages fails if `_actions` goes.
        for action in self._actions:
            name = action.dest
            value = r"""\[[^\]]*\]|'[^']*'|"[^"]*"|[\w-]*(?:\.\w+)*"""
            forms = [rf"`{name}(?:=(?P<quoted>[^`]*))?`", rf"(?<![\w/.-]){name}=(?P<bare>{value})"]
            if "_" in name:  # not an English word
                forms.append(rf"(?<![\w/.-]){name}(?![\w/-]|\.\w)")
            if action.option_strings:
                message = re.sub("|".join(forms), functools.partial(_as_flag, action.option_strings[-1]), message)
        return message


def _as_flag(flag: str, found: re.Match[str]) -> str:
    groups = found.groupdict()
    value = (groups["quoted"] or groups["bare"] or "").strip("'\"")
    if value.startswith("["):  # an option with several values
        value = " ".join(one.strip(" '\"") for one in value[1:-1].split(","))
    return flag if value in ("", "True") else f"{flag} {value}"


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of every command with its options."""
    parser = Parser(
        prog="openvla-hf",
        description="Run, fine-tune, evaluate and share OpenVLA policies.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        sub = commands.add_parser(
            command.__name__.rpartition(".")[2],
            help=command.__doc__,
            description=command.__doc__,
            epilog=_list_examples(f"  openvla-hf {command.EXAMPLE}"),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=command.run, in_flags=sub.in_flags)
        command.add_arguments(sub)
        sub.add_argument(
            "--json", action="store_true", help="print one JSON object on standard output, and nothing else"
        )
    return parser


def _list_examples(lines: str) -> str:
    count = sum(line.startswith("  openvla-hf ") for line in lines.splitlines())
    return f"{'examples' if count > 1 else 'example'}:\n{lines}"


def silence_others() -> None:
    """Hide messages of other libraries that the user can do nothing about."""
    # peft reads an attribute of models by its old name.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    # bitsandbytes suggests another package for faster kernels on some CPUs.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_not_about_kernels)


def _is_not_about_kernels(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")


def without_traceback(message: str) -> str:
    """Return the message of an error without the traceback that a process that reads data has added, if any."""
    found = IN_WORKER.fullmatch(message)
    return found["message"].strip() if found else message


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 1 if `check` found a mistake, 2 after a user error, with a message on standard error, and 130
        after Ctrl-C.
    """
    try:
        argv = insert_config(sys.argv[1:] if argv is None else argv)
    except (OSError, ValueError) as error:
        print(f"openvla-hf: {error}", file=sys.stderr)
        return USER_ERROR
    args = build_parser().parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    silence_others()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Characters that the terminal can't show are escaped, as on standard error.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = args.run(args)
    except KeyboardInterrupt as error:
        print(f"openvla-hf: {str(error) or 'Interrupted.'}", file=sys.stderr)
        return INTERRUPTED
    except (OSError, TypeError, ValueError) as error:
        message = args.in_flags(without_traceback(str(error)))
    except ModuleNotFoundError:
        raise
    except ImportError as error:  # the message names the missing package of an extra
        message = str(error)
    else:
        return status or 0
    print(f"openvla-hf: {message}", file=sys.stderr)
    return USER_ERROR
