"""Makes the Auto classes of transformers find OpenVLA by name, before any of it is imported.

transformers keeps tables of names for its own models (model type -> class name) and imports
`transformers.models.<model type>` when it wants the class. Our names go into the same tables, with this package in
the place of that module. An Auto class looks a config, a processor or an image processor up by these names, and a
model or a tokenizer by the config: so the first look-up imports `registered`, which does the rest.
"""

import sys
from importlib import import_module


# Classes that only published files name.
PUBLISHED_NAMES = ("PrismaticImageProcessor", "PrismaticProcessor")

MODEL_TYPE = "openvla"
# A row more of the processors' table, for the name in published files: a row holds one.
PUBLISHED_TYPE = "prismatic"
CONFIG_NAME = "OpenVLAConfig"
PROCESSOR_NAMES = {MODEL_TYPE: "OpenVLAProcessor", PUBLISHED_TYPE: "PrismaticProcessor"}
IMAGE_PROCESSOR_NAMES = {
    "pil": "OpenVLAImageProcessor",
    "torchvision": "OpenVLAImageProcessor",
    "published": "PrismaticImageProcessor",
}


def announce() -> None:
    """Enters our names into the tables of transformers. Safe to call again."""
    try:
        from transformers.models.auto.auto_mappings import (
            CONFIG_MAPPING_NAMES,
            IMAGE_PROCESSOR_MAPPING_NAMES,
            PROCESSOR_MAPPING_NAMES,
            SPECIAL_MODEL_TYPE_TO_MODULE_NAME,
        )
    except ImportError:
        # A transformers without these tables: everything at once, which also says when it is too old.
        import_module(".registered", __package__)
        return
    # A name that transformers will not give a model of its own: should it have an "openvla" one day, that keeps its
    # module, and the tables lead to ours.
    sys.modules[f"transformers.models.{__package__}"] = sys.modules[__package__]
    for model_type in (MODEL_TYPE, PUBLISHED_TYPE):
        SPECIAL_MODEL_TYPE_TO_MODULE_NAME[model_type] = __package__
    CONFIG_MAPPING_NAMES[MODEL_TYPE] = CONFIG_NAME
    PROCESSOR_MAPPING_NAMES.update(PROCESSOR_NAMES)
    IMAGE_PROCESSOR_MAPPING_NAMES[MODEL_TYPE] = dict(IMAGE_PROCESSOR_NAMES)
    # It copies the table of configs when it is imported (with torch, so not by us), and reads the copy from then on.
    if auto_config := sys.modules.get("transformers.models.auto.configuration_auto"):
        auto_config.CONFIG_MAPPING_NAMES[MODEL_TYPE] = CONFIG_NAME
