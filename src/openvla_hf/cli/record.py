"""Record demonstrations of the tabletop's expert as a dataset for fine-tuning."""

import argparse

from .common import ACTION_NAMES, console, natural, positive, print_json


EXAMPLE = "record demos/tabletop_lift --task lift --episodes 500"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("destination", help="new folder, whose name becomes the name of the dataset")
    parser.add_argument("--task", nargs="+", required=True, help="tasks: put, push, stack or lift")
    parser.add_argument("--episodes", type=positive, default=500, help="number of episodes (default: %(default)s)")
    parser.add_argument(
        "--first-seed", type=natural, default=0, help="seed of the first episode (default: %(default)s)"
    )
    parser.add_argument(
        "--cameras", nargs="+", help="cameras: image (fixed) and wrist (default: image, as the only camera)"
    )
    parser.add_argument("--state", action="store_true", help="record the robot's state too")
    parser.add_argument(
        "--format", choices=("lerobot", "rlds"), default="lerobot", help="format of the dataset (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    from rich.progress import track

    from ..data import write_lerobot, write_rlds
    from ..tabletop.expert import record_demonstrations
    from ..tabletop.scene import STATE_NAMES

    seeds = track(
        range(args.first_seed, args.first_seed + args.episodes),
        "recording",
        console=console(stderr=True),
        disable=args.json,
    )
    episodes = record_demonstrations(args.task, seeds, cameras=args.cameras, state=args.state)
    if args.format == "rlds":
        written = write_rlds(episodes, args.destination)
    else:
        written = write_lerobot(
            episodes, args.destination, action_names=ACTION_NAMES, state_names=STATE_NAMES if args.state else None
        )
    if args.json:
        print_json({"folder": str(written)})
    else:
        print(f"Written: {written}")
