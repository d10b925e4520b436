"""What several commands share: options, loading a policy, and printing."""

import argparse
import json
import runpy
from collections.abc import Sequence
from typing import Any


ACTION_NAMES = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")


def add_policy_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a policy to act with."""
    parser.add_argument("--model", help="folder or Hub id (default: the tabletop policy that ships with the package)")
    parser.add_argument("--unnorm-key", help="whose statistics give the robot's units, if the model knows several")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how a data set is read."""
    parser.add_argument("--robot", help="name of the adapter that reads it (default: the data set's own, or generic)")
    parser.add_argument("--robots", metavar="FILE", help="Python file of your own that registers robots")
    parser.add_argument("--split", default="train", help="(default: %(default)s)")
    parser.add_argument("--camera", help="the image to read, if there are several")
    parser.add_argument("--every", type=positive, metavar="N",
                        help="recorded frames that become one, such as 5 for 10 Hz of 50 Hz (default: 1)")  # fmt: skip
    parser.add_argument("--drop-idle", action="store_true", default=None,
                        help="leave out frames whose action moves nothing")  # fmt: skip


def setting(text: str) -> tuple[str, Any]:
    """Parse `NAME=VALUE`, where the value is JSON or else text."""
    name, found, value = text.partition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def positive(text: str) -> int:
    """Parse a whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def load(model_id: str, dtype: str = "auto", device: str | None = None) -> tuple[Any, Any]:
    """Load the model and processor of a Hub id or folder."""
    from transformers import AutoModel, AutoProcessor
    from transformers.utils import logging

    import openvla_hf  # noqa: F401 - makes the Auto classes know OpenVLA

    require_device(device)
    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(model_id, dtype=dtype, device_map=device)
    return model, AutoProcessor.from_pretrained(model_id)


def default_model() -> str:
    """Return the folder of the small policy that ships with the package."""
    from ..evaluation.rollouts import TABLETOP_POLICY

    return str(TABLETOP_POLICY)


def require_device(device: str | None) -> None:
    """Raise before anything is loaded if a GPU is asked for and there is none."""
    import torch

    if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("PyTorch finds no CUDA device: leave --device out to run on the CPU.")


def register_robots(file: str | None) -> None:
    """Run a Python file of the user's, which registers robots."""
    if file is not None:
        runpy.run_path(file)


def dimension_names(count: int) -> Sequence[str]:
    """Name the dimensions of an action: those of an end effector, or numbers."""
    return ACTION_NAMES if count == len(ACTION_NAMES) else [f"a{i}" for i in range(count)]


def print_json(result: dict[str, Any]) -> None:
    """Print the result of `--json` on standard output."""
    print(json.dumps(result))
