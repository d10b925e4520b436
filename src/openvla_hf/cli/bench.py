"""Measure the time of an action or a chunk, and compare it with plain `generate` and the device's limits."""

import argparse
from dataclasses import asdict

from .common import (
    DTYPES,
    add_oft_options,
    checkpoint,
    console,
    default_model,
    device,
    load_model,
    positive,
    print_json,
    print_table,
    refuse_options,
)


EXAMPLE = "bench --random 0.5b --batch-sizes 1 8"
CHUNK = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    measured = parser.add_mutually_exclusive_group()
    measured.add_argument(
        "--model", type=checkpoint, help="folder or Hub id of a policy (default: the tabletop policy)"
    )
    measured.add_argument(
        "--random", choices=("7b", "0.5b", "tiny"), help="use a model of this size with random weights"
    )
    parser.add_argument(
        "--chunk",
        type=positive,
        help="with --random: also predict chunks of this many actions with the same weights, by an L1 head and as "
        f"tokens (default: {CHUNK})",
    )
    parser.add_argument("--cameras", type=positive, help="with --random: images of each observation (default: 1)")
    parser.add_argument(
        "--state-dim", type=positive, help="with --random: dimensions of the state (default: no state)"
    )
    add_oft_options(parser)
    parser.add_argument(
        "--unnorm-key", help="statistics that give the number of action dimensions, if the model has several"
    )
    parser.add_argument(
        "--batch-sizes", nargs="+", type=positive, default=[1], help="observations per call (default: 1)"
    )
    parser.add_argument("--repeats", type=positive, default=20, help="number of timed calls (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="also time compiled passes. Compiling takes minutes")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=DTYPES,
        help="data type (default: that of the checkpoint, or bfloat16 on a GPU)",
    )
    parser.add_argument("--device", type=device, help="device such as cuda (default: the CPU)")


def run(args: argparse.Namespace) -> None:
    import torch

    from ..evaluation.latency import latency_tables, measure_latency
    from ..evaluation.random_models import chunk_model, random_model

    chunk_models = {}
    if args.random is not None:
        refuse_options(args, "is for a checkpoint: give --model", "platform", "action_decoding")
    else:
        refuse_options(args, "is for random weights: give --random", "chunk", "cameras", "state_dim")
    with console(stderr=True, quiet=args.json).status("loading") as status:
        if args.random is not None:
            place = torch.device(args.device or "cpu")
            usual = "bfloat16" if place.type == "cuda" else "float32"
            dtype = getattr(torch, usual if args.dtype == "auto" else args.dtype)
            fields = {"num_images": args.cameras or 1, "proprio_dim": args.state_dim}
            model, processor = random_model(args.random, dtype, place, **fields)
            chunk = args.chunk or CHUNK
            for head, name in (("l1", "L1 head"), ("none", "tokens")):
                chunk_models[f"chunk of {chunk}, {name}"] = chunk_model(model, chunk, head)
        else:
            model, processor = load_model(
                args.model or default_model(),
                args.dtype,
                args.device,
                platform=args.platform,
                action_decoding=args.action_decoding,
            )
        result = measure_latency(
            model,
            processor,
            unnorm_key=args.unnorm_key,
            batch_sizes=args.batch_sizes,
            repeats=args.repeats,
            compile_passes=args.compile,
            chunk_models=chunk_models,
            progress=status.update,
        )
    if args.json:
        print_json(asdict(result))
        return
    for table in latency_tables(result):
        print_table(table)
