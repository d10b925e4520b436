"""Merge an adapter into its base model, and check that the model's outputs stay the same."""

import argparse

from .common import DTYPES, adapter, checkpoint, console, print_json


EXAMPLE = "merge outputs/kitchen outputs/kitchen-merged"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "adapter", type=adapter, help="folder or Hub id of an adapter of this package or of the original code"
    )
    parser.add_argument("output", help="new or empty folder")
    parser.add_argument(
        "--base",
        type=checkpoint,
        help="folder or Hub id of the 16-bit base model (default: the one in the adapter's config)",
    )
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="data type (default: that of the base model)")
    parser.add_argument(
        "--max-shard-size", default="5GB", help="largest size of a weights file (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    from ..checkpoints.merge import merge_adapter

    with console(stderr=True, quiet=args.json).status(f"Merging {args.adapter}"):
        difference = merge_adapter(
            args.adapter, args.output, base=args.base, dtype=args.dtype, max_shard_size=args.max_shard_size
        )
    if args.json:
        print_json({"output": args.output, "difference": difference})
    else:
        print(f"Merged: {args.output} (logits within {difference:.2%})")
