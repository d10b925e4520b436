"""Write a checkpoint in the published layout, for the original code and inference engines."""

import argparse

from .common import checkpoint, console, print_json


EXAMPLE = "export outputs/kitchen-merged outputs/kitchen-published"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=checkpoint, help="folder or Hub id of a 16- or 32-bit checkpoint")
    parser.add_argument("destination", help="new or empty folder")
    parser.add_argument(
        "--max-shard-size", default="7GB", help="largest size of a weights file (default: %(default)s)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")


def run(args: argparse.Namespace) -> None:
    from ..checkpoints.export import export as write_published

    with console(stderr=True, quiet=args.json).status(f"Writing {args.destination}"):
        folder = write_published(
            args.checkpoint, args.destination, max_shard_size=args.max_shard_size, revision=args.revision
        )
    if args.json:
        print_json({"folder": str(folder), "files": sorted(path.name for path in folder.iterdir())})
    else:
        print(f"Written: {folder}")
