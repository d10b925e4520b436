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


EXAMPLE = """check openvla/openvla-7b --unnorm-key bridge_orig --device cuda
  openvla-hf check outputs/kitchen --data lab/kitchen
  openvla-hf check outputs/kitchen --strict --json"""
FAILED = 1
"""Exit status if a check failed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=checkpoint, help="folder or Hub id of a checkpoint or adapter")
    group = parser.add_argument_group("policy")
    group.add_argument("--unnorm-key", help="statistics that the robot uses, if the model has several")
    group.add_argument("--device", type=device_map, help="device such as cuda, or auto to choose one (default: CPU)")
    group.add_argument("--dtype", default="auto", choices=DTYPES, help="data type (default: that of the checkpoint)")
    add_oft_options(group)
    group.add_argument("--reasoning", action="store_true", default=None, help="the policy writes its reasoning first")
    group = parser.add_argument_group("observation")
    group.add_argument(
        "--image", type=image, help="file or URL of an image for every camera (default: a frame of the tabletop)"
    )
    group.add_argument("--instruction", help="task to give to the policy (default: one of --data)")
    group = parser.add_argument_group("recorded episodes")
    group.add_argument("--data", help="folder, URL or Hub id of recorded episodes to compare the policy with")
    add_data_arguments(group, split=None, split_help="split of --data (default: train)")
    group.add_argument("--cameras", nargs="+", help="cameras of a policy that sees several, instead of --camera")
    group = parser.add_argument_group("result")
    group.add_argument(
        "--strict", action="store_true", help="exit with status 1 for warnings too, and not only for failures"
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
