"""Measure a policy's success on the tabletop or a suite, or compare its actions with recorded ones (--data)."""

import argparse
import time

from ..serving.token import TOKEN_VARIABLE, read_token
from .common import (
    READING,
    add_data_arguments,
    checkpoint,
    counting_bars,
    default_model,
    dimension_names,
    file,
    load_model,
    positive,
    print_json,
    print_table,
    refuse_options,
    register_robots,
)
from .episodes import TASKS, add_episode_arguments, play, tabletop_policy, unseen_seeds, watch
from .suite import PATIENCE, add_suite_arguments, run_comparison, run_suite


EXAMPLE = """evaluate outputs/lift --task lift
  openvla-hf evaluate outputs/kitchen --data lab/kitchen
  openvla-hf evaluate outputs/drawer --suite metaworld --task drawer-open-v3
  openvla-hf evaluate --server http://127.0.0.1:8000 --suite metaworld --task easy --envs 4"""
TABLETOP_EPISODES = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("policy", nargs="?", type=checkpoint, metavar="MODEL", help="the same as --model")
    group = parser.add_argument_group("policy and episodes")
    add_episode_arguments(
        group, None, f"number of episodes (default: {TABLETOP_EPISODES} on the tabletop, all of --data)"
    )
    group.add_argument(
        "--condition",
        nargs="+",
        choices=("as told", "swapped", "black"),
        help="what to change in each tabletop episode: nothing (as told), the instruction, which then names the other "
        "object (swapped), or the image (black) (default: run all three)",
    )
    group.add_argument(
        "--execute",
        type=positive,
        help="actions of a chunk to execute before the policy predicts again (default: all on the tabletop, those of "
        "its protocol in a suite)",
    )
    add_suite_arguments(parser.add_argument_group("suites"))
    group = parser.add_argument_group("server")
    group.add_argument(
        "--server", metavar="URL", help="evaluate the policy of this server; --batch-size robots act at the same time"
    )
    group.add_argument(
        "--token-file",
        type=file,
        metavar="FILE",
        help=f"file with the server's token (default: the variable {TOKEN_VARIABLE})",
    )
    group = parser.add_argument_group("recorded episodes")
    group.add_argument("--data", help="folder, URL or Hub id of recorded episodes (default: evaluate on the tabletop)")
    group.add_argument(
        "--frames", type=positive, help="number of frames of --data, spread over the episodes (default: 1000)"
    )
    recorded = "(default: the episodes that training held out)"
    add_data_arguments(group, split=None, split_help=f"evaluate on all episodes of this split {recorded}")
    group.add_argument(
        "--cameras",
        nargs="+",
        help="cameras of a policy that sees several, instead of --camera (default: as in training, or the policy's)",
    )


def run(args: argparse.Namespace) -> None:
    if args.policy is not None:
        refuse_options(args, "names the policy a second time: leave out one of the two", "model")
        args.model = args.policy
    if args.compare is not None:
        run_comparison(args)
        return
    if args.data is not None:
        _run_on_data(args)
        return
    refuse_options(args, "is for recorded data: give --data", "frames", "robots", "cameras", *READING)
    if args.suite is not None:
        run_suite(args)
        return
    refuse_options(args, "is for a suite: give --suite", "output", "envs")
    args.episodes = args.episodes or TABLETOP_EPISODES
    if args.server is not None:
        _run_on_server(args)
        return
    refuse_options(args, "is for a served policy: give --server", "token_file")
    _run_on_tabletop(args)


def _run_on_tabletop(args: argparse.Namespace) -> None:
    from ..tabletop.rollouts import CONDITIONS, success_by_task, success_table

    model_id = args.model or default_model()
    policy = tabletop_policy(args, model_id, args.execute)
    results, actions = {}, 0
    for name in args.condition or CONDITIONS:
        episodes = play(args, policy, name)
        results[name] = success_by_task(episodes)
        actions += sum(one.steps for one in episodes)
    cost = {
        "forward_passes_per_action": policy.forward_passes / actions,
        "actions_per_second": actions / policy.seconds,
    }
    if args.json:
        print_json({"model": model_id, "episodes": args.episodes, "results": results, **cost})
        return
    print_table(success_table(f"{model_id}: {args.episodes} unseen episodes per condition", results))
    passes, rate = cost.values()
    print(f"{passes:.2f} forward passes per action; {rate:.0f} actions per second with --batch-size {args.batch_size}")


def _run_on_server(args: argparse.Namespace) -> None:
    from ..serving.client import Client
    from ..serving.episodes import check_server, run_served_episodes
    from ..tabletop.rollouts import CONDITIONS, success_by_task, success_table

    refuse_options(args, "belongs to the policy: give it to `openvla-hf serve`", "model", "device", "execute")
    results, actions, seconds = {}, 0, 0.0
    with Client(args.server, read_token(args.token_file)) as client:
        check_server(client.info, args.unnorm_key)
        client.timeout = PATIENCE
        for name in args.condition or CONDITIONS:
            running = run_served_episodes(
                client,
                unseen_seeds(args),
                tasks=args.task or TASKS,
                condition=name,
                robots=args.batch_size,
                unnorm_key=args.unnorm_key,
            )
            started = time.perf_counter()
            episodes = watch(args, running, name)
            seconds += time.perf_counter() - started
            results[name] = success_by_task(episodes)
            actions += sum(one.steps for one in episodes)
        model_id, round_trip = client.info["model_id"], client.round_trip
    cost = {
        "actions_per_second": actions / seconds,
        "round_trip": {"median": round_trip.median, "p95": round_trip.p95, "longest": round_trip.longest},
    }
    if args.json:
        told = {"server": args.server, "model": model_id, "episodes": args.episodes}
        print_json(told | {"results": results, **cost})
        return
    print_table(success_table(f"{model_id} at {args.server}: {args.episodes} unseen episodes per condition", results))
    print(
        f"{cost['actions_per_second']:.0f} actions per second with --batch-size {args.batch_size}; round trip "
        f"{1000 * round_trip.median:.0f} ms at the median, {1000 * round_trip.p95:.0f} ms at the 95th percentile"
    )


def _run_on_data(args: argparse.Namespace) -> None:
    from ..checkpoints.model_card import read_training
    from ..data.frames import read_action_names
    from ..evaluation.open_loop import evaluate_open_loop, load_options, load_recorded, open_loop_table

    refuse_options(
        args, "is for the tabletop: leave out --data", "task", "condition", "execute", "server", "token_file", "suite"
    )
    register_robots(args)
    model_id = args.model or default_model()
    training = read_training(model_id)
    if args.split is None and not training.get("held_out"):
        raise ValueError(
            f"{model_id} has no record of held-out episodes. Give --split (such as --split train) to evaluate on all "
            "episodes of a split."
        )
    given = {name: getattr(args, name) for name in ("cameras", *READING) if getattr(args, name) is not None}
    model, processor = load_model(model_id, device=args.device)
    reading = training.get("reading") or {args.data: load_options(model, processor)}
    frames = load_recorded(args.data, training | {"reading": reading}, **given)
    with counting_bars(args) as progress:
        bar = progress.add_task("frames", total=None)
        report = evaluate_open_loop(
            model,
            processor,
            frames,
            args.unnorm_key,
            max_episodes=args.episodes,
            max_frames=args.frames or 1000,
            batch_size=args.batch_size,
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    which = args.split or "held out"
    action_dim = len(report.mean_absolute_error)
    names = dimension_names(action_dim, read_action_names(frames, report.dataset, action_dim))
    if args.json:
        told = {"model": model_id, "data": args.data, "split": which, "names": list(names)}
        print_json(told | report.as_dict())
        return
    print_table(open_loop_table(f"{model_id} on {report.dataset} ({which})", report, names))
