"""Measure the cost of each format: the size of a 7B policy, the time of an action, and the operations in 8 bits.

python benchmarks/quantization.py weights            # sizes computed for 7B, and checked by loading a shallow model
python benchmarks/quantization.py layers             # one layer in each format, and the slowest operations in 8 bits
python benchmarks/quantization.py actions --size 7b --compile --format 4bit 8bit  # whole actions, on a GPU
"""

import argparse
import functools
import gc
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModel

import openvla_hf  # noqa: F401 - registers the Auto classes
from openvla_hf.checkpoints.quantize import FORMATS, expected_weight_bytes, quantization, weight_bytes
from openvla_hf.evaluation.latency import peak_memory, seconds
from openvla_hf.evaluation.random_models import INSTRUCTION, RANDOM_SIZES, random_config, random_model


# (inputs, outputs) of the language model's layers, and rows: a token, and a prompt with its image.
LAYERS = {"attention": (4096, 4096), "mlp": (4096, 11008)}
ROWS = (1, 276)
VARIANTS = [(None, False)] + [(name, towers) for name in FORMATS for towers in (False, True)]


def runs_here(name: str | None, towers: bool = False) -> bool:
    """Return whether the package and the GPU that a format needs are available."""
    try:
        return name is None or quantization(name, towers=towers) is not None
    except (ImportError, ValueError):
        return False


def label(name: str | None, towers: bool, dtype: torch.dtype = torch.bfloat16) -> str:
    return f"{8 * dtype.itemsize}-bit" if name is None else f"{name} + towers" if towers else name


def weights(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compute the size of the weights of 7B, and compare computed and loaded sizes for a shallow model."""
    full, shallow = random_config("7b"), random_config("7b", {"num_hidden_layers": 1})
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        AutoModel.from_config(shallow, dtype=torch.bfloat16).save_pretrained(folder)
        for name, towers in VARIANTS:
            computed = expected_weight_bytes(shallow, name, towers=towers)
            loaded = None
            if runs_here(name, towers):
                config = None if name is None else quantization(name, towers=towers)
                loaded = weight_bytes(AutoModel.from_pretrained(folder, quantization_config=config))
            rows.append(
                {
                    "format": label(name, towers),
                    "7B computed (GB)": round(expected_weight_bytes(full, name, towers=towers) / 1e9, 3),
                    "one layer computed (GB)": round(computed / 1e9, 4),
                    "one layer loaded (GB)": loaded and round(loaded / 1e9, 4),
                }
            )
            gc.collect()
    return rows


def median_ms(run: Callable[[], object], device: str, repeats: int) -> float:
    """Return the median time of a call in milliseconds, after two calls that are not counted."""
    times = [seconds(run, torch.device(device)) for _ in range(repeats + 2)]
    return 1e3 * statistics.median(times[2:])


def quantized_layers(plain: nn.Linear, device: str) -> dict[str, nn.Module]:
    """Convert a linear layer on the CPU to the formats of bitsandbytes, with the settings of `quantization`."""
    import bitsandbytes as bnb

    sizes = plain.in_features, plain.out_features
    four = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    four.weight = bnb.nn.Params4bit(
        plain.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=False
    )
    eight = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False, threshold=6.0)
    eight.weight = bnb.nn.Int8Params(plain.weight.data, requires_grad=False, has_fp16_weights=False)
    return {"4bit": four.to(device).eval(), "8bit": eight.to(device).eval()}


@torch.no_grad()
def layers(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time one layer in each format, and list the slowest operations in 8 bits."""
    # bitsandbytes logs its cast to float16 at every call.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    rows = []
    for part, (inputs, outputs) in LAYERS.items():
        plain = nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16)
        built = quantized_layers(plain, args.device)
        built = {"16-bit": plain.to(args.device), **built}
        for count in ROWS:
            hidden = torch.randn(1, count, inputs, dtype=torch.bfloat16, device=args.device)
            row: dict[str, Any] = {"layer": part, "rows": count}
            for name, layer in built.items():
                row[f"{name} (ms)"] = round(median_ms(lambda: layer(hidden), args.device, args.repeats), 3)  # noqa: B023
            activities = [torch.profiler.ProfilerActivity.CPU]
            if args.device == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            with torch.profiler.profile(activities=activities) as profile:
                built["8bit"](hidden)
            events = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
            row["8bit calls"] = sum(event.count for event in events)
            row["8bit spends on"] = ", ".join(event.key for event in events[:4])
            rows.append(row)
    return rows


def time_actions(
    folder: str, name: str | None, towers: bool, inputs: dict[str, torch.Tensor], args: argparse.Namespace
) -> dict[str, Any]:
    """Load a format, and time its actions."""
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    start = time.perf_counter()
    config = None if name is None else quantization(name, towers=towers, dtype=dtype)
    model = AutoModel.from_pretrained(folder, device_map=args.device, dtype=dtype, quantization_config=config)
    row: dict[str, Any] = {"format": label(name, towers, dtype), "load (s)": round(time.perf_counter() - start, 1)}
    row["weights (GB)"] = round(weight_bytes(model) / 1e9, 2)
    act = functools.partial(model.predict_action, **inputs)
    act()
    beside = peak_memory(act, device)
    row["other memory (GB)"] = None if beside is None else round(beside / 1e9, 2)
    row["action (ms)"] = round(median_ms(act, args.device, args.repeats), 1)
    if args.compile:
        model.compile_for_actions()
        row["compiled (ms)"] = round(median_ms(act, args.device, args.repeats), 1)
    return row


def actions(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure time, weights and memory of `predict_action` with random weights."""
    model, processor = random_model(args.size, torch.bfloat16, args.device)
    inputs = processor(np.zeros((256, 256, 3), np.uint8), instruction=INSTRUCTION)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        for name, towers in VARIANTS:
            chosen = name is None or ((not args.format or name in args.format) and (args.towers or not towers))
            if not chosen or not runs_here(name, towers):
                continue
            rows.append(time_actions(folder, name, towers, inputs, args))
            for kind in ("action", "compiled"):
                if (mine := rows[-1].get(f"{kind} (ms)")) is not None:
                    rows[-1][f"{kind}, of the first"] = round(mine / rows[0][f"{kind} (ms)"], 2)
            Console(stderr=True).print(rows[-1])
            gc.collect()
            torch.compiler.reset()
            if args.device == "cuda":
                torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("weights", "layers", "actions"))
    parser.add_argument(
        "--size", choices=tuple(RANDOM_SIZES), default="0.5b", help="size for `actions` (default: %(default)s)"
    )
    parser.add_argument(
        "--format",
        nargs="+",
        choices=tuple(FORMATS),
        help="formats for `actions` (default: all that run on this machine)",
    )
    parser.add_argument("--towers", action="store_true", help="also time `actions` with quantised towers")
    parser.add_argument("--compile", action="store_true", help="also time `actions` with compiled passes")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16",
                        help="data type of the arithmetic in `actions` (default: %(default)s)")  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=10, help="number of timed calls (default: %(default)s)")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON array on standard output, and nothing else"
    )
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    rows = {"weights": weights, "layers": layers, "actions": actions}[args.what](args)
    if args.json:
        print(json.dumps(rows))
        return
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = Table(title=f"{args.what} on {args.device}")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(row.get(column, "-")) for column in columns))
    Console().print(table)


if __name__ == "__main__":
    main()
