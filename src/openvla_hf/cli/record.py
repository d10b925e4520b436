"""Record demonstrations of the tabletop's expert, or of MetaWorld's, as a dataset for fine-tuning."""

import argparse
import logging
import sys
from collections.abc import Iterable
from typing import Any

from .common import ACTION_NAMES, console, natural, positive, print_json, refuse_options


EXAMPLE = "record demos/tabletop_lift --task lift --episodes 500"
logger = logging.getLogger(__name__)

TABLETOP_HERTZ, METAWORLD_HERTZ = 5.0, 80.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("destination", help="new folder, whose name becomes the name of the dataset")
    parser.add_argument(
        "--suite",
        choices=("tabletop", "metaworld"),
        default="tabletop",
        help="suite whose expert acts (default: %(default)s)",
    )
    parser.add_argument(
        "--task",
        nargs="+",
        required=True,
        help="tasks: put, push, stack or lift; or tasks or groups of MetaWorld, such as drawer-open-v3 or easy",
    )
    parser.add_argument(
        "--episodes", type=positive, default=500, help="number of episodes, on MetaWorld of each task (default: 500)"
    )
    parser.add_argument(
        "--first-seed",
        type=natural,
        help="seed of the first episode (default: 0, on MetaWorld 50, since evaluation uses the seeds below)",
    )
    parser.add_argument(
        "--cameras",
        nargs="+",
        help="cameras of the tabletop: image (fixed) and wrist (default: image, as the only one)",
    )
    parser.add_argument("--state", action="store_true", help="record the robot's state too")
    parser.add_argument(
        "--format", choices=("lerobot", "rlds"), default="lerobot", help="format of the dataset (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    from ..data import write_lerobot, write_rlds

    record = _record_metaworld if args.suite == "metaworld" else _record_tabletop
    episodes, settings = record(args)
    if args.format == "rlds":
        written = write_rlds(episodes, args.destination)
    else:
        written = write_lerobot(episodes, args.destination, **settings)
    if args.json:
        print_json({"folder": str(written)})
    else:
        print(f"Written: {written}")


def _record_tabletop(args: argparse.Namespace) -> tuple[Iterable[Any], dict[str, Any]]:
    """Return the episodes, and the settings with which LeRobot's format writes them."""
    from ..tabletop.expert import record_demonstrations
    from ..tabletop.scene import STATE_NAMES
    from ..tabletop.suite import FIRST_UNSEEN_SEED

    first = args.first_seed or 0
    seeds = range(first, first + args.episodes)
    _warn_of_evaluation(seeds, range(FIRST_UNSEEN_SEED, sys.maxsize))
    tracked = _track(args, seeds, args.episodes)
    episodes = record_demonstrations(args.task, tracked, cameras=args.cameras, state=args.state)
    return episodes, _names(ACTION_NAMES, STATE_NAMES, args.state) | {"frequency": TABLETOP_HERTZ}


def _record_metaworld(args: argparse.Namespace) -> tuple[Iterable[Any], dict[str, Any]]:
    from ..suites.demonstrations import record_experts
    from ..suites.metaworld import ACTION_NAMES, PROTOCOL, STATE_NAMES, metaworld_suite

    refuse_options(args, "is for the tabletop: MetaWorld has one camera", "cameras")
    evaluated = range(PROTOCOL.first_seed, PROTOCOL.first_seed + PROTOCOL.episodes)
    first = evaluated.stop if args.first_seed is None else args.first_seed
    seeds = range(first, first + args.episodes)
    suite = metaworld_suite().select(args.task)
    _warn_of_evaluation(seeds, evaluated)
    episodes = record_experts(suite, seeds, state=args.state)
    recorded = _track(args, episodes, args.episodes * len(suite.environments))
    return recorded, _names(ACTION_NAMES, STATE_NAMES, args.state) | {"frequency": METAWORLD_HERTZ}


def _warn_of_evaluation(seeds: range, evaluated: range) -> None:
    """Warn if episodes are recorded on which policies are evaluated."""
    first, end = max(seeds.start, evaluated.start), min(seeds.stop, evaluated.stop)
    if first < end:
        logger.warning(
            "Seeds %d to %d belong to the suite's evaluation. Do not evaluate a policy on this suite if it was "
            "trained on these episodes.",
            first,
            end - 1,
        )


def _names(actions: Any, states: Any, state: bool) -> dict[str, Any]:
    return {"action_names": actions, "state_names": states if state else None}


def _track(args: argparse.Namespace, items: Iterable[Any], total: int) -> Iterable[Any]:
    from rich.progress import track

    return track(items, "recording", total=total, console=console(stderr=True), disable=args.json)
