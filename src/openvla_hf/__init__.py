"""OpenVLA, native to today's Hugging Face ecosystem.

Importing this package makes transformers' Auto classes load every published OpenVLA checkpoint:

    import openvla_hf
    from transformers import AutoModel, AutoProcessor

It costs next to nothing: torch and the classes are imported when the first of them is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registration import PUBLISHED_NAMES, announce


if TYPE_CHECKING:
    from .registered import (
        ActionPrediction,
        ActionStream,
        ActionTokenizer,
        AutoModelForVision2Seq,
        OpenVLAConfig,
        OpenVLAForActionPrediction,
        OpenVLAImageProcessor,
        OpenVLAModel,
        OpenVLAProcessor,
        load_adapter,
    )


__version__ = "0.1.0"

__all__ = [
    "ActionPrediction",
    "ActionStream",
    "ActionTokenizer",
    "AutoModelForVision2Seq",
    "OpenVLAConfig",
    "OpenVLAForActionPrediction",
    "OpenVLAImageProcessor",
    "OpenVLAModel",
    "OpenVLAProcessor",
    "load_adapter",
]


def __getattr__(name: str) -> Any:
    """Imports what a user or an Auto class asks for: one of the classes, or a folder of them."""
    if name in (*__all__, *PUBLISHED_NAMES):
        return getattr(import_module(".registered", __name__), name)
    if name in ("modeling", "processing"):
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


announce()
