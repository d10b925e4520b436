"""The public classes. To import this file is to import them all and to register them with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from .modeling.action_prediction import ActionPrediction, ActionStream
from .modeling.action_tokenizer import ActionTokenizer
from .modeling.configuration_openvla import OpenVLAConfig
from .modeling.modeling_openvla import OpenVLAForActionPrediction, OpenVLAModel
from .processing.image_processing_openvla import OpenVLAImageProcessor
from .processing.processing_openvla import OpenVLAProcessor
from .processing.registration import PrismaticImageProcessor, PrismaticProcessor, register_processing
from .training.adapters import load_adapter


# The name under which the original was loaded; transformers 5 has no class of that name any more.
AutoModelForVision2Seq = AutoModelForImageTextToText

AutoConfig.register(OpenVLAConfig.model_type, OpenVLAConfig, exist_ok=True)
for _auto_class in (AutoModel, AutoModelForImageTextToText):
    _auto_class.register(OpenVLAConfig, OpenVLAForActionPrediction, exist_ok=True)
register_processing(OpenVLAConfig)

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
    "PrismaticImageProcessor",
    "PrismaticProcessor",
    "load_adapter",
]
