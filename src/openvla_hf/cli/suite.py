"""Evaluate a policy on a suite, for `evaluate --suite` and `--compare`."""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..serving.token import read_token
from .common import default_model, load_model, positive, print_json, print_table, refuse_options
from .episodes import show_progress


if TYPE_CHECKING:
    from ..evaluation.suites import Player
    from ..suites.suite import Suite


PATIENCE = 60.0
"""Seconds that a simulated robot waits for a server, for example while the server restarts."""
PICTURES = 3
SERVED = (
    "server_version", "engine", "device", "dtype", "revision", "default_unnorm_key", "action_horizon",
    "temporal_ensemble", "gripper",
)  # fmt: skip
"""What belongs to the description of a served policy."""
POLICY_PACKAGES = ("torch", "transformers")


def add_suite_arguments(group: Any) -> None:
    """Add the options of suites to a group of options."""
    group.add_argument(
        "--suite",
        metavar="NAME",
        help="play the episodes of this suite: tabletop, metaworld, libero_spatial, libero_object, libero_goal, "
        "libero_10 or libero_90; --task chooses tasks or groups such as easy, --episodes is the number per task",
    )
    group.add_argument(
        "--output",
        metavar="FOLDER",
        help="folder for the episodes and evaluation.json, where an interrupted run continues "
        "(default: outputs/evaluation/NAME)",
    )
    group.add_argument(
        "--envs",
        type=positive,
        metavar="N",
        help="play in N processes, with one environment in each (default: --batch-size environments in this process)",
    )
    group.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="compare the policies of two --output folders, which must have the same episodes",
    )


def run_suite(args: argparse.Namespace) -> None:
    """Evaluate a policy on a suite."""
    from ..evaluation.suites import Evaluation
    from ..suites.results import success_table
    from ..suites.simulator import open_simulators

    suite = _choose_suite(args)
    suite.check_installed()
    folder = Path(args.output or Path("outputs", "evaluation", args.suite))
    count = args.envs or args.batch_size
    with _open_policy(args, suite) as (policy, make_player):
        evaluation = Evaluation(suite, policy, folder, PICTURES)
        count = min(count, len(evaluation.missing))
        with open_simulators(suite, count, processes=args.envs is not None) as simulators:
            episodes = evaluation.play(make_player(simulators))
            show_progress(args, episodes, suite.name, len(suite.episodes()), evaluation.rollouts)
    result = evaluation.result()
    if args.json:
        print_json(result)
        return
    title = f"{policy['model']} on {suite.name}: {len(evaluation.rollouts)} episodes"
    print_table(success_table(title, result["results"]))
    print(f"Written: {folder}")


def run_comparison(args: argparse.Namespace) -> None:
    """Compare the policies of two folders."""
    from ..evaluation.suites import compare_runs
    from ..suites.results import comparison_table

    names, results = compare_runs(*args.compare)
    if args.json:
        print_json({"models": list(names), "results": {task: asdict(one) for task, one in results.items()}})
        return
    print_table(comparison_table(f"{names[0]} (A) and {names[1]} (B) on the same episodes", ("A", "B"), results))


def _choose_suite(args: argparse.Namespace) -> Suite:
    from ..evaluation.suites import find_suite
    from ..tabletop.suite import tabletop_suite

    if args.suite == "tabletop":
        if args.condition and len(args.condition) > 1:
            raise ValueError("--condition takes one value with --suite. Evaluate the others in folders of their own.")
        suite: Suite = tabletop_suite(condition=(args.condition or ["as told"])[0])
    else:
        refuse_options(args, "is for the tabletop", "condition")
        suite = find_suite(args.suite)
    if args.task:
        suite = suite.select(args.task)
    return suite.with_protocol(episodes=args.episodes, execute=args.execute)


@contextmanager
def _open_policy(args: argparse.Namespace, suite: Suite) -> Iterator[tuple[dict[str, Any], Callable[[Any], Player]]]:
    """Yield a description of the policy, and a function that makes it play in simulators."""
    if args.server is None:
        refuse_options(args, "is for a served policy: give --server", "token_file")
        yield _local_policy(args, suite)
        return
    from ..serving.client import Client
    from ..serving.episodes import check_server, play_served

    refuse_options(args, "belongs to the policy: give it to `openvla-hf serve`", "model", "device", "execute")
    with Client(args.server, read_token(args.token_file)) as client:
        check_server(client.info, args.unnorm_key, suite)
        client.timeout = PATIENCE
        described = {
            "model": client.info["model_id"],
            **_version(client.info),
            "unnorm_key": args.unnorm_key,
            "center_crop_area": client.info["cameras"][0]["center_crop_area"],
            "server": {name: client.info.get(name) for name in SERVED},
        }

        def make_player(simulators: Any) -> Player:
            return lambda episodes, keep_frames: play_served(
                client, suite, episodes, simulators, keep_frames=keep_frames, unnorm_key=args.unnorm_key
            )

        yield described, make_player


def _local_policy(args: argparse.Namespace, suite: Suite) -> tuple[dict[str, Any], Callable[[Any], Player]]:
    from ..checkpoints.identity import describe_arithmetic, identify
    from ..checkpoints.model_card import records_training
    from ..suites.play import play
    from ..suites.policies import model_policy

    model_id = args.model or default_model()
    model, processor = load_model(model_id, device=args.device)
    policy = model_policy(suite, model, processor, args.unnorm_key, is_trained_crop=records_training(model_id))

    def make_player(simulators: Any) -> Player:
        return lambda episodes, keep_frames: play(policy, episodes, simulators, keep_frames)

    described = {
        "model": model_id,
        **_version(identify(model, model_id)),
        "unnorm_key": args.unnorm_key,
        "center_crop_area": policy.processor.image_processor.center_crop_area,
        **describe_arithmetic(model),
        "policy_versions": {name: importlib.metadata.version(name) for name in POLICY_PACKAGES},
    }
    return described, make_player


def _version(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Tell a policy from one of the same name that was trained again, whose episodes must not be continued."""
    version = {"checkpoint": identity["digest"] or identity["revision"]}
    return version if identity["base"] is None else version | {"base": identity["base"]}
