"""Write a quantised checkpoint, or report what each format changes."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from rich.console import Console

from .common import default_model, dimension_names, positive, print_json


EXAMPLE = "quantize openvla/openvla-7b openvla-7b-4bit --bits 4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", nargs="?", help="folder or Hub id of a 16- or 32-bit checkpoint")
    parser.add_argument("destination", nargs="?", help="new folder")
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument("--bits", type=int, choices=(4, 8), help="4 or 8, by bitsandbytes (default: 4)")
    formats.add_argument(
        "--format", nargs="+", metavar="FORMAT", help="4bit, 8bit, int4, int8 or float8; a report takes several"
    )
    parser.add_argument(
        "--towers", action="store_true", help="quantise vision towers and projector too; report: also so"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--report", action="store_true", help="compare the actions with those of 16 bits instead")
    parser.add_argument("--data", help="report: data set of any known format (default: the tabletop's frames)")
    parser.add_argument("--robot", help="report: adapter of the data set (default: the one of its name)")
    parser.add_argument("--frames", type=positive, default=200, help="report: observations (default: %(default)s)")
    parser.add_argument("--episodes", type=int, default=0, help="report: on the tabletop, for success (default: none)")
    parser.add_argument("--unnorm-key", help="report: whose statistics give the robot's units, if there are several")
    parser.add_argument("--device", help="report: such as cuda (default: the first GPU, else the CPU)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16",
                     help="report: of the arithmetic and of what is not quantised (default: %(default)s)")  # fmt: skip
    parser.add_argument("--output", default="outputs/fidelity", help="report: folder (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    both = args.report and args.bits is None
    formats = args.format or (["4bit", "8bit"] if both else [f"{args.bits or 4}bit"])
    from transformers.utils import logging

    logging.disable_progress_bar()
    if args.report:
        report_fidelity(args, formats)
        return
    if args.source is None or args.destination is None or len(formats) != 1:
        raise ValueError("Name a checkpoint, a new folder and one format, or ask for a --report.")
    from rich.progress import Progress

    from ..quantization import quantize

    with Progress(console=Console(stderr=True), disable=args.json) as progress:
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
        Console().print(f"{folder}: {size / 1e9:.2f} GB of weights in {formats[0]}")


def report_fidelity(args: argparse.Namespace, formats: Sequence[str]) -> None:
    """Compare formats over a data set or the tabletop: a table, a JSON file and a plot."""
    import torch
    from rich.progress import MofNCompleteColumn, Progress

    from ..evaluation.fidelity import compare, plot, table, tabletop_observations

    if args.data is None:
        frames = list(tabletop_observations(args.frames))
    else:
        from ..data import load as load_data

        frames = list(islice(load_data(args.data, args.robot, streaming=True), args.frames))
    source = args.source or default_model()
    towers = (False, True) if args.towers else (False,)
    with Progress(
        *Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True), disable=args.json
    ) as progress:
        bar = progress.add_task("", total=(len(frames) + args.episodes) * (1 + len(formats) * len(towers)))
        results = compare(
            source, formats, frames, towers=towers, unnorm_key=args.unnorm_key, device=args.device,
            dtype=getattr(torch, args.dtype), episodes=args.episodes,
            on_progress=lambda label: progress.update(bar, advance=1, description=label),
        )  # fmt: skip
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    rows = [asdict(result) for result in results]
    (output / "fidelity.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    names = dimension_names(len(results[0].l1))
    plot(results, output / "fidelity.png", names)
    if args.json:
        print_json({"model": source, "observations": len(frames), "results": rows})
        return
    console = Console()
    console.print(table(results, names))
    console.print(f"Look at {output / 'fidelity.png'}; the same in {output / 'fidelity.json'}")
