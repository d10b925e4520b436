"""The command line: each command is a thin call into the library."""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table


if TYPE_CHECKING:
    from .evaluation.rollouts import Episode

ACTION_NAMES = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")

EXAMPLES = """examples:
  openvla-hf demo
  openvla-hf evaluate --episodes 200
  openvla-hf predict --image frame.png --instruction "put the green cube on the yellow plate"
  openvla-hf predict --model openvla/openvla-7b --unnorm-key bridge_orig \\
      --image frame.png --instruction "pick up the red block" --json
"""


def load(model_id: str, dtype: str = "auto", device: str | None = None) -> tuple[Any, Any]:
    """The three lines: model and processor of a Hub id or folder."""
    from transformers import AutoModel, AutoProcessor
    from transformers.utils import logging

    import openvla_hf  # noqa: F401 - makes the Auto classes know OpenVLA

    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(model_id, dtype=dtype, device_map=device)
    return model, AutoProcessor.from_pretrained(model_id)


def default_model() -> str:
    """The small policy that ships with the package."""
    from .evaluation.rollouts import TABLETOP_POLICY

    if not TABLETOP_POLICY.is_dir():
        raise FileNotFoundError(
            "this version ships no trained tabletop policy: give a checkpoint (folder or Hub id) with --model"
        )
    return str(TABLETOP_POLICY)


def success_table(title: str, results: dict[str, dict[str, dict[str, float]]]) -> Table:
    """`{condition: success_by_task(...)}` as a table."""
    table = Table(title=title)
    for column in ("condition", "task", "episodes", "success", "moved the named object", "mean steps"):
        table.add_column(column, justify="left" if column in ("condition", "task") else "right")
    for condition, by_task in results.items():
        for task, row in by_task.items():
            table.add_row(
                condition,
                task,
                f"{row['episodes']:.0f}",
                f"{row['success']:.1%}",
                f"{row['moved_target']:.1%}",
                f"{row['steps']:.1f}",
                style="bold" if task == "all" else None,
                end_section=task == "all",
            )
    return table


def play(args: argparse.Namespace, condition: str, keep: int = 0) -> "list[Episode]":
    """Run the episodes of one condition, telling of each as it ends."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from .evaluation.rollouts import FIRST_UNSEEN_SEED, load_policy, run_episodes

    console = Console(stderr=True)
    model, processor = load(args.model)
    policy = load_policy(model, processor, args.unnorm_key)
    seeds = range(FIRST_UNSEEN_SEED, FIRST_UNSEEN_SEED + args.episodes)
    episodes: list[Episode] = []
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("success {task.fields[success]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=args.json) as progress:
        bar = progress.add_task(condition, total=len(seeds), success="-")
        first = set(seeds[:keep])
        for episode in run_episodes(
            policy, seeds, condition=condition, batch_size=args.batch_size, keep_frames=first.__contains__
        ):
            episodes.append(episode)
            verdict = "[green]done[/]    " if episode.success else "[red]not done[/]"
            progress.console.print(f"{verdict} {episode.steps:3d} steps  {episode.instruction}", highlight=False)
            done = sum(one.success for one in episodes)
            progress.update(bar, advance=1, success=f"{done}/{len(episodes)} = {done / len(episodes):.0%}")
    return episodes


def demo(args: argparse.Namespace) -> None:
    """Run unseen episodes and write a picture strip and a GIF."""
    from .evaluation.pictures import draw_strip, save_gif
    from .evaluation.rollouts import success_by_task

    episodes = play(args, "as told", keep=6)
    results = {"as told": success_by_task(episodes)}
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    shown = sorted((one for one in episodes if one.frames), key=lambda one: one.seed)
    draw_strip(shown[:4]).save(output / "strip.png")
    save_gif(shown, output / "episodes.gif")
    if args.json:
        print(
            json.dumps({"results": results, "strip": str(output / "strip.png"), "gif": str(output / "episodes.gif")})
        )
        return
    console = Console()
    console.print(success_table(f"{len(episodes)} unseen episodes", results))
    console.print(f"Watch {output / 'episodes.gif'}, look at {output / 'strip.png'}")


def evaluate(args: argparse.Namespace) -> None:
    """Measure success as told, with the target's name exchanged, and with a black image."""
    from .evaluation.rollouts import CONDITIONS, success_by_task

    results = {name: success_by_task(play(args, name)) for name in args.condition or CONDITIONS}
    if args.json:
        print(json.dumps({"model": args.model, "episodes": args.episodes, "results": results}))
    else:
        Console().print(success_table(f"{args.model}: {args.episodes} unseen episodes a condition", results))


def predict(args: argparse.Namespace) -> None:
    """Print the action for one image and one instruction."""
    model, processor = load(args.model, args.dtype, args.device)
    inputs = processor(args.image, instruction=args.instruction)
    details = model.predict_action(**inputs, unnorm_key=args.unnorm_key, return_details=True)
    action, token_ids = details.actions[0], details.token_ids[0]
    chosen = details.probabilities[0].max(-1)
    names = ACTION_NAMES if len(action) == len(ACTION_NAMES) else [f"a{i}" for i in range(len(action))]
    if args.json:
        print(json.dumps({"action": action.tolist(), "names": list(names), "token_ids": token_ids.tolist(),
                          "probability": chosen.tolist()}))  # fmt: skip
        return
    table = Table(title=args.instruction)
    for column in ("", "value", "normalised", "token", "probability"):
        table.add_column(column, justify="right")
    for name, value, normalised, token, probability in zip(
        names, action, details.normalized_actions[0], token_ids, chosen, strict=True
    ):
        table.add_row(name, f"{value:+.4f}", f"{normalised:+.3f}", str(token), f"{probability:.1%}")
    Console().print(table)


def build_parser() -> argparse.ArgumentParser:
    """Every command with its options."""
    parser = argparse.ArgumentParser(
        prog="openvla-hf",
        description="OpenVLA in today's Hugging Face ecosystem.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(run: Any, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            run.__name__,
            help=run.__doc__,
            description=run.__doc__,
            epilog=f"example:\n  openvla-hf {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        sub.add_argument("--model", help="folder or Hub id (default: the tabletop policy that ships with the package)")
        sub.add_argument("--unnorm-key", help="whose statistics give the robot's units, if the model knows several")
        sub.add_argument("--json", action="store_true", help="one JSON object on standard output, nothing else")
        return sub

    for run, episodes, example in (
        (demo, 40, "demo --episodes 12 --output outputs/demo"),
        (evaluate, 200, "evaluate --episodes 50 --condition swapped"),
    ):
        sub = command(run, example)
        sub.add_argument("--episodes", type=positive, default=episodes, help="(default: %(default)s)")
        sub.add_argument("--batch-size", type=positive, default=16, help="episodes at a time (default: %(default)s)")
        if run is demo:
            sub.add_argument("--output", default="outputs/demo", help="folder for the pictures (default: %(default)s)")
        else:
            sub.add_argument("--condition", nargs="+", choices=("as told", "swapped", "black"), help="(default: all)")

    sub = command(predict, 'predict --image frame.png --instruction "push the red ball to the left"')
    sub.add_argument("--image", required=True, help="file or URL of the camera's image")
    sub.add_argument("--instruction", required=True, help="what the robot is to do")
    sub.add_argument("--dtype", default="auto", help="such as bfloat16 (default: the checkpoint's)")
    sub.add_argument("--device", help="such as cuda or auto (default: the CPU)")
    return parser


def positive(text: str) -> int:
    """A whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; an error of the user's is one sentence on standard error and exit status 2."""
    args = build_parser().parse_args(argv)
    # What libraries say on import is no news to a person at a terminal.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        args.model = args.model or default_model()
        args.run(args)
    except (OSError, TypeError, ValueError) as error:
        print(f"openvla-hf: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name != "gymnasium":
            raise
        print("openvla-hf: the tabletop needs Gymnasium: pip install 'openvla-hf[sim]'", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
