"""OpenVLA in the Hugging Face ecosystem.

Importing this package makes transformers' Auto classes load every published OpenVLA checkpoint:

    import openvla_hf
    from transformers import AutoModel, AutoProcessor

The import is cheap: it only adds names to the tables of transformers, which map a model type to the names of its
classes. The first use of a class imports `openvla_hf.auto`, which imports and registers all classes.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .auto import *  # noqa: F403


__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import a public class, the list of public names or a subpackage when it is first used."""
    if name in ("modeling", "processing"):
        return import_module(f".{name}", __name__)
    # Only published files use the names that begin with Prismatic, so they are not in `__all__`.
    if name == "__all__" or not name.startswith("_"):
        auto = import_module(".auto", __name__)
        if name in ("__all__", "PrismaticImageProcessor", "PrismaticProcessor", *auto.__all__):
            return getattr(auto, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})


def _add_names_to_transformers() -> None:
    """Enter our class names into the tables from which transformers imports a model's classes on first use."""
    try:
        from transformers.models.auto.auto_mappings import (
            CONFIG_MAPPING_NAMES,
            IMAGE_PROCESSOR_MAPPING_NAMES,
            PROCESSOR_MAPPING_NAMES,
            SPECIAL_MODEL_TYPE_TO_MODULE_NAME,
        )
    except ImportError as error:
        if error.name != "transformers":  # not installed where only a served policy is used
            # This version of transformers has no such tables: import and register the classes now.
            import_module(".auto", __name__)
        return
    # transformers imports `transformers.models.<module>`. Our package's name can't clash with one of its models, so a
    # future "openvla" of transformers stays importable, while the tables lead to ours.
    sys.modules[f"transformers.models.{__name__}"] = sys.modules[__name__]
    # The table of processors has one name per model type, so the name in published files has a type of its own.
    for model_type, processor in {"openvla": "OpenVLAProcessor", "prismatic": "PrismaticProcessor"}.items():
        SPECIAL_MODEL_TYPE_TO_MODULE_NAME[model_type] = __name__
        PROCESSOR_MAPPING_NAMES[model_type] = processor
    IMAGE_PROCESSOR_MAPPING_NAMES["openvla"] = {
        "pil": "OpenVLAImageProcessor",
        "torchvision": "OpenVLAImageProcessor",
        "published": "PrismaticImageProcessor",
    }
    CONFIG_MAPPING_NAMES["openvla"] = "OpenVLAConfig"
    # `configuration_auto` reads its own copy of the configs' table, made when it was imported.
    if configuration_auto := sys.modules.get("transformers.models.auto.configuration_auto"):
        configuration_auto.CONFIG_MAPPING_NAMES["openvla"] = "OpenVLAConfig"


_add_names_to_transformers()
