"""Adapters, ours and those published for the original code, on a model that is already loaded."""

import os
from typing import Any

from ..modeling.modeling_openvla import OpenVLAForActionPrediction


def load_adapter(
    model: OpenVLAForActionPrediction, adapter: str | os.PathLike, **hub_kwargs: Any
) -> OpenVLAForActionPrediction:
    """Put an adapter on a model, which then acts as it was fine-tuned to.

    Args:
        model: The base that the adapter was trained on.
        adapter: Folder or Hub id; of this package or of the original code (timm's names, fused qkv).
        hub_kwargs: `revision`, `token`, ... of the repository.

    Returns:
        The same model. Where the adapter comes with statistics, they take the place of the base's.

    Raises:
        ValueError: A weight matches no layer of this model or has another shape, or a layer lacks its weights.
        OSError: There is no adapter.
    """
    model.load_adapter(os.fspath(adapter), **hub_kwargs)
    return model


__all__ = ["load_adapter"]
