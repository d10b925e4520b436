"""Find silent mistakes of a policy: ignored inputs, wrong masks, statistics, prompts, images and adapters."""

import argparse

from .common import (
    DTYPES,
    READING,
    add_data_arguments,
    add_oft_options,
    checkpoint,
    console,
    device_map,
    image,
    print_json,
    print_table,
    refuse_options,
    register_robots,
)


EXAMPLE = "check outputs/kitchen --data lab/kitchen"
FAILED = 1
"""Exit status if a check failed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=checkpoint, help="folder or Hub id of a checkpoint or adapter")
    parser.add_argument("--data", help="folder, URL or Hub id of recorded episodes to compare the policy with")
    parser.add_argument(
        "--image", type=image, help="file or URL of an image for every camera (default: a frame of the tabletop)"
    )
    parser.add_argument("--instruction", help="task to give to the policy (default: one of --data)")
    parser.add_argument("--unnorm-key", help="statistics that the robot uses, if the model has several")
    parser.add_argument(
        "--strict", action="store_true", help="exit with status 1 for warnings too, and not only for failures"
    )
    parser.add_argument("--device", type=device_map, help="device such as cuda, or auto to choose one (default: CPU)")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="data type (default: that of the checkpoint)")
    add_oft_options(parser)
    parser.add_argument("--reasoning", action="store_true", default=None, help="the policy writes its reasoning first")
    add_data_arguments(parser, split=None, split_help="split of --data (default: train)")
    parser.add_argument(
        "--cameras",
        nargs="+",
        help="cameras of a policy that sees several, instead of --camera",
    )


def run(args: argparse.Namespace) -> int:
    from transformers.utils import logging

    from ..evaluation.check import check, check_table

    logging.disable_progress_bar()
    reading = {name: getattr(args, name) for name in ("cameras", *READING) if getattr(args, name) is not None}
    if args.data is None:
        refuse_options(args, "is for recorded data: give --data", "robots", "cameras", *READING)
    register_robots(args)
    loading = {name: getattr(args, name) for name in ("dtype", "platform", "action_decoding", "reasoning")}
    report = check(
        args.model,
        data=args.data,
        image=args.image,
        instruction=args.instruction,
        unnorm_key=args.unnorm_key,
        loading={name: value for name, value in (loading | {"device_map": args.device}).items() if value is not None},
        **reading,
    )
    counts = report.as_dict()["counts"]
    if args.json:
        print_json(report.as_dict())
    else:
        print_table(check_table(report))
        console().print(", ".join(f"{count} {status}" for status, count in counts.items() if count) + ".")
    return FAILED if counts["failed"] or (args.strict and counts["warned"]) else 0
