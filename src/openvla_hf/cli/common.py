"""Shared parts of the commands: options, loading a policy, and printing."""

import argparse
import json
import math
import os
import runpy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table
from rich.text import Text


ACTION_NAMES = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")
DTYPES = ("auto", "bfloat16", "float16", "float32")
# Platforms of OpenVLA-OFT.
PLATFORMS = ("libero", "aloha", "bridge")
# Values of `device_map` that spread a model over several devices.
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
# Options for reading a dataset.
READING = ("robot", "split", "camera", "every", "drop_idle")
UNLIMITED = 10_000
"""Width of output that does not go to a terminal."""


# Options


def add_policy_arguments(parser: Any) -> None:
    """Add the options that name a policy to act with, to a parser or to a group of its options."""
    parser.add_argument(
        "--model",
        type=checkpoint,
        help="folder or Hub id of the policy (default: the tabletop policy that ships with the package)",
    )
    parser.add_argument("--unnorm-key", help="statistics to use, if the model has several")
    parser.add_argument(
        "--device", type=device_map, help="device such as cuda, or auto to choose one (default: the CPU)"
    )


def add_data_arguments(
    parser: Any,
    split: str | None = "train",
    split_help: str = "split of the dataset (default: %(default)s)",
    nargs: str | None = None,
) -> None:
    """Add the options for reading a dataset, to a parser or to a group of its options.

    With `nargs="+"`, several datasets are read, and the robot and the camera may differ between them.
    """
    parser.add_argument(
        "--robot", nargs=nargs, help="robot adapter for the dataset (default: the dataset's own, or generic)"
    )
    parser.add_argument("--robots", type=file, metavar="FILE", help="Python or TOML file with your own robots")
    parser.add_argument("--split", default=split, help=split_help)
    parser.add_argument("--camera", nargs=nargs, help="camera to read, if there are several")
    parser.add_argument(
        "--every",
        type=positive,
        metavar="N",
        help="merge N recorded frames into one, such as 5 to get 10 Hz from 50 Hz (default: 1)",
    )
    parser.add_argument(
        "--drop-idle", action="store_true", default=None, help="skip frames whose action does not move the robot"
    )


def setting(text: str) -> tuple[str, Any]:
    """Parse `NAME=VALUE`, where the value is JSON or plain text."""
    name, found, value = text.partition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def weight(text: str) -> float:
    """Parse a finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    return _at_least(1, text)


def natural(text: str) -> int:
    """Parse a whole number of at least 0."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
    return value


def share(text: str) -> float:
    """Parse a fraction: at least 0 and below 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, got {text}")
    return value


def checkpoint(text: str) -> str:
    """Parse the folder or the Hub id of a model or an adapter."""
    if os.path.isdir(text):
        if not any(os.path.isfile(os.path.join(text, name)) for name in ("config.json", "adapter_config.json")):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a checkpoint: the folder has neither a config.json nor an adapter_config.json."
            )
        return text
    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a folder nor a Hub id (user/name).") from error
    return text


def device(text: str) -> str:
    """Parse a device that PyTorch can use on this machine."""
    import torch

    try:
        wanted = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a device: give a name such as cpu or cuda:1.") from error
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if wanted.type == "cpu":
        return text
    if found is None or wanted.type != found.type:
        raise argparse.ArgumentTypeError(
            f"PyTorch finds no {wanted.type.upper()} device: leave --device out to run on the CPU."
        )
    if wanted.index is not None and wanted.index >= torch.accelerator.device_count():
        raise argparse.ArgumentTypeError(
            f"Device {text} does not exist: PyTorch finds {torch.accelerator.device_count()} of this type."
        )
    return text


def device_map(text: str) -> str:
    """Parse a device, or a strategy for several devices."""
    return text if text in DEVICE_MAPS else device(text)


def adapter(text: str) -> str:
    """Parse the folder or the Hub id of an adapter."""
    checkpoint(text)
    if os.path.isdir(text) and not os.path.isfile(os.path.join(text, "adapter_config.json")):
        raise argparse.ArgumentTypeError(f"{text!r} is not an adapter: the folder has no adapter_config.json.")
    return text


def file(text: str) -> str:
    """Parse the path of an existing file."""
    if not os.path.isfile(text):
        raise argparse.ArgumentTypeError(f"There is no file {text!r}.")
    return text


def file_or_folder(text: str) -> str:
    """Parse the path of an existing file or folder."""
    if not os.path.exists(text):
        raise argparse.ArgumentTypeError(f"There is no file or folder {text!r}.")
    return text


def image(text: str) -> str:
    """Parse the path or the URL of an image."""
    from PIL import Image, UnidentifiedImageError

    if text.lower().startswith(("http://", "https://")):
        return text
    try:
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            Image.open(file(text)).close()
    except UnidentifiedImageError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not an image that PIL can read.") from error
    except (OSError, Image.DecompressionBombError):
        pass  # the processor reports what is wrong with the image
    return text


# Policies and robots


def add_oft_options(parser: Any) -> None:
    """Add the options for OpenVLA-OFT checkpoints whose files do not identify their platform or decoding."""
    parser.add_argument(
        "--platform",
        choices=PLATFORMS,
        help="platform of an OpenVLA-OFT checkpoint (default: recognised from its files)",
    )
    parser.add_argument(
        "--action-decoding",
        choices=("autoregressive", "parallel"),
        help="how an OpenVLA-OFT checkpoint without component files decodes (default: as stated in its config.json)",
    )


def add_written_dtype(parser: argparse.ArgumentParser) -> None:
    """Add the option for the data type of a checkpoint that is written."""
    parser.add_argument(
        "--dtype",
        choices=DTYPES[1:],
        default="bfloat16",
        help="data type of the written weights (default: %(default)s)",
    )


def load_model(
    model_id: str, dtype: str = "auto", device: str | None = None, **options: str | None
) -> tuple[Any, Any]:
    """Load the model and processor of a Hub id or folder; both get the `options` that are not `None`."""
    from transformers import AutoProcessor
    from transformers.utils import logging

    from ..auto import OpenVLAForActionPrediction

    logging.disable_progress_bar()
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    # Unlike AutoModel, it does not repeat requests to a Hub that does not answer, which would take a minute.
    model = OpenVLAForActionPrediction.from_pretrained(model_id, dtype=dtype, device_map=device, **given)
    return model, AutoProcessor.from_pretrained(model_id, **given)


def default_model() -> str:
    """Return the folder of the small policy that ships with the package."""
    from ..tabletop.rollouts import TABLETOP_POLICY

    return str(TABLETOP_POLICY)


def register_robots(args: argparse.Namespace) -> None:
    """Read the file of --robots, which adds robots, and check the names in --robot.

    Raises:
        ValueError: A name in --robot is unknown, or its dataset can't be trained on.
    """
    from ..data.open_x import add_table
    from ..data.robots import find_robot

    if args.robots is not None and args.robots.endswith(".toml"):
        add_table(args.robots)
    elif args.robots is not None:
        runpy.run_path(args.robots)
    for name in [args.robot] if isinstance(args.robot, str) else args.robot or ():
        find_robot(name)


def refuse_options(args: argparse.Namespace, reason: str, *options: str) -> None:
    """Raise `ValueError` if an option was given that has no effect here."""
    for option in options:
        if getattr(args, option) is not None:
            raise ValueError(f"--{option.replace('_', '-')} {reason}.")


def dimension_names(count: int, known: Sequence[str] | None = None) -> Sequence[str]:
    """Name the dimensions of an action.

    Seven dimensions without known names are those of an end effector, as in published checkpoints. Others are
    numbered.
    """
    if known is not None and len(known) == count:
        return known
    return ACTION_NAMES if count == len(ACTION_NAMES) else [f"a{i}" for i in range(count)]


# Printing


def console(stderr: bool = False, quiet: bool = False) -> Console:
    """Make a console that wraps lines only on a terminal, and prints brackets in texts and paths as they are."""
    made = Console(stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False)
    if not made.is_terminal:
        made.width = UNLIMITED
    return made


def counting_bars(args: argparse.Namespace) -> Progress:
    """Make progress bars that count, on standard error; with --json or without a terminal they stay hidden."""
    columns, out = (*Progress.get_default_columns(), MofNCompleteColumn()), console(stderr=True)
    # Without a terminal, rich would print only an empty line.
    return Progress(*columns, console=out, disable=args.json or not out.is_interactive, transient=True)


@contextmanager
def writing_progress(title: str, args: argparse.Namespace) -> Iterator[Callable[[int, int], None]]:
    """Show how much of a checkpoint is written, by the function that it yields; with --json nothing is shown."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    with Progress(console=console(stderr=True), disable=args.json) as progress:
        bar = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)


def print_written(folder: Path, args: argparse.Namespace) -> None:
    """Print the folder of a new checkpoint and the size of its weights."""
    size = sum(shard.stat().st_size for shard in folder.glob("*.safetensors"))
    if args.json:
        print_json({"folder": str(folder), "dtype": args.dtype, "weight_bytes": size})
    else:
        print(f"{folder}: {size / 1e9:.2f} GB of weights in {args.dtype}")


def print_table(table: Table, stderr: bool = False) -> None:
    """Print a table. Its title may be wider than the table."""
    out = console(stderr)
    if isinstance(table.title, str) and not out.is_terminal:
        table.title = Text(table.title, style="table.title", no_wrap=True, overflow="ignore")
    out.print(table)


def print_json(result: dict[str, Any]) -> None:
    """Print the result of `--json` on standard output."""
    print(json.dumps(result, allow_nan=False))
