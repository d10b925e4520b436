"""Convert a training run of the original's code (Prismatic `.pt` files) to a checkpoint."""

import argparse
import os

from .common import checkpoint, console, file, print_json


EXAMPLE = """convert openvla/openvla-7b-prismatic openvla-7b
  openvla-hf convert runs/kitchen kitchen --checkpoint step-050000-epoch-12-loss=0.1000.pt --tokenizer openvla-7b"""


def source(text: str) -> str:
    """Parse a `.pt` file, or the folder or the Hub id of a run."""
    return text if os.path.isfile(text) else checkpoint(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=source, help="folder or Hub id of the run, or one of its .pt files")
    parser.add_argument("destination", help="new or empty folder")
    parser.add_argument("--checkpoint", help=".pt file in the run's folder `checkpoints` (default: the last step)")
    parser.add_argument(
        "--tokenizer",
        help="folder or Hub id of the tokenizer, which a run lacks (default: that of openvla/openvla-7b, or of "
        "openvla/openvla-v01-7b for Vicuna)",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="data type of the written weights (default: %(default)s)",
    )
    parser.add_argument(
        "--config", type=file, metavar="FILE", help="JSON file with config fields that differ from the base model's"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")


def run(args: argparse.Namespace) -> None:
    from rich.progress import Progress
    from transformers.utils import logging

    from ..checkpoints.convert import convert
    from ..modeling.checkpoint_files import read_json

    logging.disable_progress_bar()
    with Progress(console=console(stderr=True), disable=args.json) as progress:
        bar = progress.add_task("Converting", total=None)
        folder = convert(
            args.source,
            args.destination,
            checkpoint=args.checkpoint,
            tokenizer=args.tokenizer,
            dtype=args.dtype,
            revision=args.revision,
            on_progress=lambda done, total: progress.update(bar, completed=done, total=total),
            **(read_json(args.config) if args.config else {}),
        )
    size = sum(shard.stat().st_size for shard in folder.glob("*.safetensors"))
    if args.json:
        print_json({"folder": str(folder), "dtype": args.dtype, "weight_bytes": size})
    else:
        print(f"{folder}: {size / 1e9:.2f} GB of weights in {args.dtype}")
