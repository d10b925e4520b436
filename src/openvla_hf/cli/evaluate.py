"""Measure success as told, with the target's name exchanged, and with a black image."""

import argparse

from .common import default_model, print_json, print_table
from .episodes import add_episode_arguments, play


EXAMPLE = "evaluate --episodes 50 --condition swapped"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_episode_arguments(parser, episodes=200)
    parser.add_argument("--condition", nargs="+", choices=("as told", "swapped", "black"), help="(default: all)")


def run(args: argparse.Namespace) -> None:
    from ..evaluation.rollouts import CONDITIONS, success_by_task, success_table

    model_id = args.model or default_model()
    results = {name: success_by_task(play(args, model_id, name)) for name in args.condition or CONDITIONS}
    if args.json:
        print_json({"model": model_id, "episodes": args.episodes, "results": results})
    else:
        print_table(success_table(f"{model_id}: {args.episodes} unseen episodes a condition", results))
