"""Write the weights of a checkpoint shard by shard, with memory for one shard."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


SHARD_BYTES = 2 * 10**9
"""Bytes of 16-bit weights in memory at a time while a checkpoint is rewritten."""

Shard = tuple[dict[str, torch.Tensor], dict[str, str]]
"""The tensors of a file, and the metadata of its header."""


def write_shards(folder: Path, shards: Iterable[Shard], count: int, on_progress: Callable[[int, int], None]) -> None:
    """Write one file for each shard, and the index if there are several.

    Args:
        folder: Folder of the checkpoint.
        shards: Makes the shards one after the other.
        count: Number of shards.
        on_progress: Called with the number of written shards and the number of all shards.
    """
    weight_map: dict[str, str] = {}
    total_size = 0
    metadata: dict[str, str] = {"format": "pt"}
    part = 0
    for tensors, part_metadata in shards:
        part += 1  # noqa: SIM113 - `enumerate` would keep the tensors of the last part
        # torchao lists a file's tensors in this field, but readers use only the last file's list, so that list names
        # the tensors of all files.
        known, new = (json.loads(each.get("tensor_names", "[]")) for each in (metadata, part_metadata))
        metadata |= part_metadata | ({"tensor_names": json.dumps(known + new)} if known + new else {})
        file_name = f"model-{part:05d}-of-{count:05d}.safetensors" if count > 1 else SAFE_WEIGHTS_NAME
        save_file(tensors, folder / file_name, metadata)
        weight_map |= dict.fromkeys(tensors, file_name)
        total_size += sum(tensor.nbytes for tensor in tensors.values())
        on_progress(part, count)
        del tensors  # before the next ones are made
    if count > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


__all__ = ["SHARD_BYTES", "Shard", "write_shards"]
