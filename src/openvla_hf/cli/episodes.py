"""Run tabletop episodes, for `demo` and `evaluate`."""

import argparse
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .common import add_policy_arguments, console, load_model, positive


if TYPE_CHECKING:
    from ..tabletop.rollouts import ModelPolicy, Rollout


TASKS = ("put", "push")


def add_episode_arguments(
    parser: Any,
    episodes: int | None,
    episodes_help: str = "number of episodes (default: %(default)s)",
) -> None:
    """Add the options that choose the policy and its episodes to a parser or a group.

    `episodes` is the default of --episodes.
    """
    add_policy_arguments(parser)
    parser.add_argument("--episodes", type=positive, default=episodes, help=episodes_help)
    parser.add_argument(
        "--batch-size", type=positive, default=16, help="episodes that run at the same time (default: %(default)s)"
    )
    parser.add_argument("--task", nargs="+", help="tasks: put, push, stack or lift (default: put and push)")


def tabletop_policy(args: argparse.Namespace, model_id: str, execute: int | None = None) -> "ModelPolicy":
    """Load the policy of `model_id`, which executes `execute` actions of each chunk."""
    from ..tabletop.rollouts import load_policy

    model, processor = load_model(model_id, device=args.device)
    return load_policy(model, processor, args.unnorm_key, execute)


def play(args: argparse.Namespace, policy: "ModelPolicy", condition: str, keep: int = 0) -> "list[Rollout]":
    """Run the episodes of one condition and print each outcome. Frames are kept for the first `keep` episodes."""
    from ..tabletop.rollouts import run_episodes

    first = set(unseen_seeds(args)[:keep])
    running = run_episodes(
        policy,
        unseen_seeds(args),
        tasks=args.task or TASKS,
        condition=condition,
        batch_size=args.batch_size,
        keep_frames=first.__contains__,
        cameras=policy.cameras,
        state=policy.state,
    )
    return watch(args, running, condition)


def unseen_seeds(args: argparse.Namespace) -> range:
    """Return the seeds of --episodes episodes that no training has seen."""
    from ..tabletop.rollouts import FIRST_UNSEEN_SEED

    return range(FIRST_UNSEEN_SEED, FIRST_UNSEEN_SEED + args.episodes)


def watch(args: argparse.Namespace, running: Iterable["Rollout"], condition: str) -> "list[Rollout]":
    """Wait for the episodes of one condition and print each outcome."""
    return show_progress(args, running, condition, args.episodes)


def show_progress(
    args: argparse.Namespace, running: Iterable["Rollout"], label: str, total: int, earlier: "Sequence[Rollout]" = ()
) -> "list[Rollout]":
    """Wait for episodes, print each outcome, and show the success rate so far with its interval.

    Returns:
        The episodes, after those that ended `earlier`.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ..suites.results import wilson

    episodes = list(earlier)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("success {task.fields[success]}"),
    )
    with Progress(*columns, console=console(stderr=True), disable=args.json) as progress:
        bar = progress.add_task(label, total=total, completed=len(episodes), success="-")
        for episode in running:
            episodes.append(episode)
            verdict = "[green]done[/]    " if episode.success else "[red]not done[/]"
            progress.console.print(f"{verdict} {episode.steps:3d} steps  {episode.instruction}", markup=True)
            done = sum(one.success for one in episodes)
            low, high = wilson(done, len(episodes))
            rate = f"{done}/{len(episodes)} = {done / len(episodes):.0%} ({low:.0%} to {high:.0%})"
            progress.update(bar, advance=1, success=rate)
    return episodes
