"""Convert a training run or a vision-language model of the original's code (`.pt` files) to a checkpoint."""

import argparse
import os

from .common import add_written_dtype, checkpoint, file, print_written, writing_progress


EXAMPLE = """convert openvla/openvla-7b-prismatic openvla-7b
  openvla-hf convert runs/kitchen kitchen --checkpoint step-050000-epoch-12-loss=0.1000.pt --tokenizer openvla-7b
  openvla-hf convert prism-dinosiglip-224px+7b vlm"""


def source(text: str) -> str:
    """Parse a `.pt` file, the folder or the Hub id of a run, or the name of a vision-language model."""
    is_name = "+" in text and os.path.basename(text) == text  # a Hub id has no "+"
    return text if os.path.isfile(text) or (is_name and not os.path.isdir(text)) else checkpoint(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=source,
        help="folder or Hub id of a training run or a vision-language model, one of its .pt files, or the name of a "
        "vision-language model such as prism-dinosiglip-224px+7b",
    )
    parser.add_argument("destination", help="new or empty folder")
    parser.add_argument("--checkpoint", help=".pt file in the source's folder `checkpoints` (default: the last step)")
    parser.add_argument(
        "--tokenizer",
        help="folder or Hub id of the tokenizer, which the source lacks (default: that of openvla/openvla-7b, or of "
        "openvla/openvla-v01-7b for Vicuna)",
    )
    add_written_dtype(parser)
    parser.add_argument(
        "--config", type=file, metavar="FILE", help="JSON file with config fields that differ from the base model's"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")


def run(args: argparse.Namespace) -> None:
    from ..checkpoints.convert import convert
    from ..modeling.checkpoint_files import read_json

    with writing_progress("Converting", args) as on_progress:
        folder = convert(
            args.source,
            args.destination,
            checkpoint=args.checkpoint,
            tokenizer=args.tokenizer,
            dtype=args.dtype,
            revision=args.revision,
            on_progress=on_progress,
            **(read_json(args.config) if args.config else {}),
        )
    print_written(folder, args)
