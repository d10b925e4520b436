"""Tell which checkpoint a model was loaded from, even if another has the same name, and what it computes in."""

import hashlib
import os
from pathlib import Path
from typing import Any

from .model_card import RUN_FILES


# Files that decide how a policy acts, and the blocks that are read of each, which cover small files.
ACTING = (".safetensors", ".bin", ".pt", ".json")
BLOCKS, BLOCK_SIZE = 64, 1 << 16


def identify(model: Any, source: str) -> dict[str, Any]:
    """Identify the checkpoint or the adapter that a model was loaded from, in JSON types.

    Args:
        model: An `OpenVLAForActionPrediction`.
        source: Folder or Hub id that it was loaded from.

    Returns:
        `model_id` (of a folder only its name), `revision` (the commit of a Hub id), `digest` (of a folder's files, see
        `digest_checkpoint`), and `base` with the same three values for the base of an adapter, or `None`.
    """
    base, adapter = model.loaded_from, model.loaded_adapter
    if adapter is None or base is None:
        loaded = adapter or base
        return {**_identify(source, loaded and loaded.commit), "base": None}
    return {**_identify(source, adapter.commit), "base": _identify(base.source, base.commit)}


def _identify(source: str, commit: str | None) -> dict[str, Any]:
    if not os.path.isdir(source):
        return {"model_id": source, "revision": commit, "digest": None}
    # Give only the name of a folder: clients need not know the server's file system.
    name = os.path.basename(os.path.abspath(source))
    return {"model_id": name, "revision": commit, "digest": digest_checkpoint(source)}


def digest_checkpoint(folder: str | os.PathLike) -> str:
    """Return a digest of a checkpoint in a folder, which differs after another training into the same folder."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.suffix not in ACTING or path.name in RUN_FILES:
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(size // BLOCKS, BLOCK_SIZE)):
                file.seek(start)
                digest.update(file.read(BLOCK_SIZE))
    return digest.hexdigest()[:16]


def describe_arithmetic(model: Any) -> dict[str, str]:
    """Return the kind of `device` that a model computes on, and the `dtype` of its weights, such as "bfloat16"."""
    return {"device": model.device.type, "dtype": str(model.dtype).removeprefix("torch.")}


__all__ = ["describe_arithmetic", "digest_checkpoint", "identify"]
