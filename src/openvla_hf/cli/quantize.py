"""Write a quantised checkpoint, or report what each format changes."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from .common import (
    READING,
    add_data_arguments,
    checkpoint,
    console,
    counting_bars,
    default_model,
    device,
    dimension_names,
    natural,
    positive,
    print_json,
    print_table,
    refuse_options,
    register_robots,
)


EXAMPLE = "quantize openvla/openvla-7b openvla-7b-4bit --bits 4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", nargs="?", type=checkpoint, help="folder or Hub id of a 16- or 32-bit checkpoint")
    parser.add_argument("destination", nargs="?", help="new folder for the quantised checkpoint")
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument("--bits", type=int, choices=(4, 8), help="bits of a bitsandbytes format (default: 4)")
    formats.add_argument(
        "--format",
        nargs="+",
        metavar="FORMAT",
        help="4bit, 8bit, int4, int8 or float8. A report takes several formats",
    )
    parser.add_argument(
        "--towers",
        action="store_true",
        help="also quantise the vision towers and the projector; with --report, compare both",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    report = parser.add_argument_group("report")
    report.add_argument(
        "--report",
        action="store_true",
        help="compare the actions with those of the 16-bit checkpoint, and write no checkpoint",
    )
    report.add_argument(
        "--data", help="folder, URL or Hub id of a dataset to compare on (default: frames of the tabletop)"
    )
    add_data_arguments(report, split=None, split_help="split of the dataset (default: train)")
    report.add_argument("--frames", type=positive, default=200, help="number of observations (default: %(default)s)")
    report.add_argument(
        "--episodes", type=natural, default=0, help="also run this many episodes on the tabletop (default: none)"
    )
    report.add_argument(
        "--baseline",
        metavar="FORMAT",
        help="format to compare with, such as 8bit if the GPU can't hold 16 bits (default: 16 bits)",
    )
    report.add_argument("--unnorm-key", help="statistics to use, if the model has several")
    report.add_argument("--device", type=device, help="device such as cuda (default: the first GPU, or the CPU)")
    report.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="data type of the arithmetic and of the weights that are not quantised (default: %(default)s)",
    )
    report.add_argument("--output", default="outputs/fidelity", help="folder for the report (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    from transformers.utils import logging

    from ..checkpoints.describe import refuse_adapter

    logging.disable_progress_bar()
    if args.source is not None:
        refuse_adapter(args.source, revision=args.revision)
    if args.report:
        if args.destination is not None:
            raise ValueError(
                f"A report writes no checkpoint. Leave out {args.destination!r}, or leave out --report to write the "
                "checkpoint."
            )
        if args.data is None:
            refuse_options(args, "is for recorded data: give --data", "robots", *READING)
        report_fidelity(args, args.format or ([f"{args.bits}bit"] if args.bits else ["4bit", "8bit"]))
        return
    refuse_options(args, "is for a report: give --report", "data", "robots", *READING)
    write_quantized(args, args.format or [f"{args.bits or 4}bit"])


def write_quantized(args: argparse.Namespace, formats: Sequence[str]) -> None:
    """Write the checkpoint in one format."""
    if args.source is None or args.destination is None or len(formats) != 1:
        raise ValueError("Give a checkpoint, a new folder and one format, or --report.")
    from rich.progress import Progress

    from ..checkpoints.quantize import quantize

    with Progress(console=console(stderr=True), disable=args.json) as progress:
        bar = progress.add_task(formats[0], total=None)
        folder = quantize(
            args.source,
            args.destination,
            formats[0],
            towers=args.towers,
            on_progress=lambda done, total: progress.update(bar, completed=done, total=total),
            **({"revision": args.revision} if args.revision else {}),
        )
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if args.json:
        print_json({"folder": str(folder), "format": formats[0], "weight_bytes": size})
    else:
        print(f"{folder}: {size / 1e9:.2f} GB of weights in {formats[0]}")


def read_observations(args: argparse.Namespace) -> tuple[list[Any], Sequence[str] | None]:
    """Read the frames to compare on, and the names of the action's dimensions if the dataset gives them."""
    if args.data is None:
        from ..evaluation.fidelity import tabletop_observations

        return list(tabletop_observations(args.frames)), None
    from ..data import load as load_data
    from ..data.frames import read_action_names

    register_robots(args)
    data = load_data(
        args.data,
        args.robot,
        split=args.split or "train",
        camera=args.camera,
        every=args.every,
        drop_idle=args.drop_idle,
        streaming=True,
    )
    frames = list(islice(data, args.frames))
    if not frames:
        return frames, None
    return frames, read_action_names(data, str(frames[0]["dataset"]), len(frames[0]["action"]))


def report_fidelity(args: argparse.Namespace, formats: Sequence[str]) -> None:
    """Compare formats on a dataset or the tabletop, and write a table, a JSON file and a plot."""
    import torch

    from ..checkpoints.describe import describe
    from ..evaluation.fidelity import compare, plot, table
    from ..modeling.action_tokenizer import resolve_action_stats

    frames, known = read_observations(args)
    source = args.source or default_model()
    towers = (False, True) if args.towers else (False,)
    with counting_bars(args) as progress:
        bar = progress.add_task("", total=(len(frames) + args.episodes) * (1 + len(formats) * len(towers)))
        results = compare(
            source,
            formats,
            frames,
            towers=towers,
            unnorm_key=args.unnorm_key,
            device=args.device,
            dtype=getattr(torch, args.dtype),
            episodes=args.episodes,
            baseline=args.baseline,
            on_progress=lambda label: progress.update(bar, advance=1, description=label),
        )
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    rows = [asdict(result) for result in results]
    (output / "fidelity.json").write_text(json.dumps(rows, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    of_policy = resolve_action_stats(describe(source).statistics, args.unnorm_key).get("names")
    names = dimension_names(len(results[0].l1), of_policy or known)
    plot(results, output / "fidelity.png", names)
    if args.json:
        print_json({"model": source, "observations": len(frames), "results": rows})
        return
    print_table(table(results, names))
    print(f"Plot: {output / 'fidelity.png'}; data: {output / 'fidelity.json'}")
