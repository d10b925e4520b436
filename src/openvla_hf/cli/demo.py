"""Run unseen tabletop episodes, and save a strip of pictures and a GIF."""

import argparse
from pathlib import Path

from .common import default_model, print_json, print_table
from .episodes import add_episode_arguments, play, tabletop_policy


EXAMPLE = "demo --episodes 12 --output outputs/demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_episode_arguments(parser, episodes=40)
    parser.add_argument("--output", default="outputs/demo", help="folder for the pictures (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    from ..tabletop.pictures import draw_strip, save_gif
    from ..tabletop.rollouts import success_by_task, success_table

    episodes = play(args, tabletop_policy(args, args.model or default_model()), "as told", keep=6)
    results = {"as told": success_by_task(episodes)}
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    shown = sorted((one for one in episodes if one.frames), key=lambda one: one.seed)
    strip, gif = output / "strip.png", output / "episodes.gif"
    draw_strip(shown[:4]).save(strip)
    save_gif(shown, gif)
    if args.json:
        print_json({"results": results, "strip": str(strip), "gif": str(gif)})
        return
    print_table(success_table(f"{len(episodes)} unseen episodes", results))
    print(f"GIF: {gif}; pictures: {strip}")
