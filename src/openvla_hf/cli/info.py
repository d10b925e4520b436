"""Describe a checkpoint without loading its weights."""

import argparse
from dataclasses import asdict
from typing import Any

from rich.table import Table

from .common import checkpoint, print_json, print_table


EXAMPLE = "info openvla/openvla-7b"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=checkpoint, help="folder or Hub id of a checkpoint or adapter")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")


def oft_rows(oft: dict[str, Any]) -> dict[str, str]:
    """Describe the fields of an OpenVLA-OFT policy, or "unknown" if they follow from neither files nor a platform."""

    def known(name: str, text: str) -> str:
        return text.format(oft[name]) if name in oft else f"unknown: pass `platform=` or `{name}=`"

    head = oft.get("action_head", "none")
    bounds = {"q99": "1st and 99th percentile", "bounds": "minimum and maximum"}
    normalization = oft.get("action_normalization")
    return {
        "decoding": oft.get("action_decoding", "autoregressive"),
        "images": known("num_images", "{}") + (" (FiLM)" if oft.get("use_film") else ""),
        "chunk": known("action_horizon", "{} actions"),
        "action head": "none (tokens)" if head == "none" else head,
        "state": "not seen" if oft.get("proprio_dim") is None else f"{oft['proprio_dim']} dimensions",
        "normalisation": bounds[normalization] if normalization else known("action_normalization", "{}"),
        "platform": f"{oft['platform']} (from the statistics)" if oft["platform"] else "",
    }


def run(args: argparse.Namespace) -> None:
    from ..checkpoints.describe import describe

    found = describe(args.checkpoint, revision=args.revision)
    if args.json:
        print_json(asdict(found))
        return
    table = Table(title=args.checkpoint, show_header=False)
    rows = {
        "layout": found.layout,
        "base model": found.base_model,
        "vision towers": "\n".join(found.vision_towers),
        "language model": found.language_model,
        **(oft_rows(found.oft) if found.oft else {}),
        "actions": "\n".join(f"{key}: {dim} dimensions" for key, dim in found.action_dims.items()),
        "statistics": found.statistics_file,
        "dtype": found.dtype,
        "quantisation": found.quantization,
        "parameters": found.parameters and f"{found.parameters:,}",
        "weights": f"{found.size / 1e9:.3f} GB",
        "includes its code": "yes" if found.has_code else "no",
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    print_table(table)
