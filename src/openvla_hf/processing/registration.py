"""Makes the Auto classes of transformers find these processors, for our repositories and published ones."""

from typing import Any

from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from .image_processing_openvla import OpenVLAImageProcessor
from .processing_openvla import OpenVLAProcessor


class PrismaticConfig(PreTrainedConfig):
    """The key for the published processor name: one config class holds one processor."""

    model_type = "prismatic"


class PrismaticImageProcessor(OpenVLAImageProcessor):
    """The name in published files; the Auto class finds it and takes OpenVLAImageProcessor beside it."""


class PrismaticProcessor(OpenVLAProcessor):
    """The name in published files; what is loaded under it is an OpenVLAProcessor."""

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Builds an OpenVLAProcessor, so that it is saved under its own name."""
        return OpenVLAProcessor.from_args_and_dict(args, processor_dict, **kwargs)


def register_processing(config_class: type[PreTrainedConfig]) -> None:
    """Registers the processors and the tokenizer for the config of OpenVLA. Safe to call again.

    A local class of the name that a repository gives keeps transformers from asking whether to trust that
    repository's code, and is preferred to that code with `trust_remote_code=True`.
    """
    # Both backends: without "torchvision" a machine that has it would warn of falling back.
    AutoImageProcessor.register(
        config_class,
        image_processor_classes={
            "pil": OpenVLAImageProcessor,
            "torchvision": OpenVLAImageProcessor,
            "published": PrismaticImageProcessor,
        },
        exist_ok=True,
    )
    AutoProcessor.register(config_class, OpenVLAProcessor, exist_ok=True)
    AutoProcessor.register(PrismaticConfig, PrismaticProcessor, exist_ok=True)
    AutoTokenizer.register(config_class, PreTrainedTokenizerFast, exist_ok=True)
    # Published files say LlamaTokenizer, which would win over the line above and is not exact.
    TOKENIZER_MAPPING_NAMES[config_class.model_type] = "TokenizersBackend"
