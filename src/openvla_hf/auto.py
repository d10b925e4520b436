"""The public classes, registered with transformers' Auto classes. Importing this file imports torch."""

import os
from typing import Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from .modeling.action_prediction import ActionPrediction
from .modeling.action_stream import ActionStream, ChunkStream
from .modeling.action_tokenizer import ActionTokenizer
from .modeling.configuration_openvla import OpenVLAConfig
from .modeling.modeling_openvla import OpenVLAForActionPrediction, OpenVLAModel
from .modeling.reasoning import ReasoningStream
from .processing.image_processing_openvla import OpenVLAImageProcessor
from .processing.processing_openvla import OpenVLAProcessor


# Defined above the registrations, during which transformers looks names up in the package.
__all__ = [
    "ActionPrediction",
    "ActionStream",
    "ActionTokenizer",
    "AutoModelForVision2Seq",
    "ChunkStream",
    "OpenVLAConfig",
    "OpenVLAForActionPrediction",
    "OpenVLAImageProcessor",
    "OpenVLAModel",
    "OpenVLAProcessor",
    "ReasoningStream",
    "load_adapter",
]

# Code written for the original uses this class, which transformers 5 no longer has.
AutoModelForVision2Seq = AutoModelForImageTextToText


def load_adapter(
    model: OpenVLAForActionPrediction, adapter: str | os.PathLike, **hub_kwargs: Any
) -> OpenVLAForActionPrediction:
    """Load an adapter onto a model.

    Args:
        model: The base that the adapter was trained on.
        adapter: Folder or Hub id of an adapter of this package or of the original code (timm's names, fused qkv).
        hub_kwargs: `revision`, `token` and so on.

    Returns:
        The same model. If the adapter has statistics, they replace those of the base.

    Raises:
        ValueError: A weight matches no layer of this model or has another shape, or a layer lacks its weights.
        OSError: The source is not an adapter.
    """
    model.load_adapter(os.fspath(adapter), **hub_kwargs)
    return model


class PrismaticConfig(PreTrainedConfig):
    """Key for `PrismaticProcessor` in `AutoProcessor`, which has one processor for each config class."""

    model_type = "prismatic"


class PrismaticImageProcessor(OpenVLAImageProcessor):
    """The image processor's name in published files."""


class PrismaticProcessor(OpenVLAProcessor):
    """The processor's name in published files."""

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build an `OpenVLAProcessor`, which is saved under its own name."""
        return OpenVLAProcessor.from_args_and_dict(args, processor_dict, **kwargs)


# With `exist_ok`, the classes of a checkpoint's own code may be registered in the same process. If a class with the
# name that a repository gives is registered, transformers does not ask whether to trust the repository's code.
AutoConfig.register(OpenVLAConfig.model_type, OpenVLAConfig, exist_ok=True)
for _auto_class in (AutoModel, AutoModelForImageTextToText):
    _auto_class.register(OpenVLAConfig, OpenVLAForActionPrediction, exist_ok=True)
AutoImageProcessor.register(
    OpenVLAConfig,
    # Both backends have the same class. Without the key "torchvision", a machine that has it would warn about a
    # fallback.
    image_processor_classes={
        "pil": OpenVLAImageProcessor,
        "torchvision": OpenVLAImageProcessor,
        "published": PrismaticImageProcessor,
    },
    exist_ok=True,
)
AutoProcessor.register(OpenVLAConfig, OpenVLAProcessor, exist_ok=True)
AutoProcessor.register(PrismaticConfig, PrismaticProcessor, exist_ok=True)
AutoTokenizer.register(OpenVLAConfig, PreTrainedTokenizerFast, exist_ok=True)
# Published files name LlamaTokenizer, which would override the line above and does not give the original's ids.
TOKENIZER_MAPPING_NAMES[OpenVLAConfig.model_type] = "TokenizersBackend"
