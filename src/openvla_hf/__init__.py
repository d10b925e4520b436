"""OpenVLA, native to today's Hugging Face ecosystem.

Importing this package makes transformers' Auto classes load every published OpenVLA checkpoint:

    import openvla_hf
    from transformers import AutoModel, AutoProcessor
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from .modeling.action_tokenizer import ActionTokenizer
from .modeling.configuration_openvla import OpenVLAConfig
from .modeling.modeling_openvla import ActionPrediction, OpenVLAForActionPrediction
from .processing.image_processing_openvla import OpenVLAImageProcessor
from .processing.processing_openvla import OpenVLAProcessor
from .processing.registration import register_processing


__version__ = "0.1.0"

AutoConfig.register(OpenVLAConfig.model_type, OpenVLAConfig, exist_ok=True)
for _auto_class in (AutoModel, AutoModelForImageTextToText):
    _auto_class.register(OpenVLAConfig, OpenVLAForActionPrediction, exist_ok=True)
register_processing(OpenVLAConfig)

# The name under which the original was loaded; transformers 5 has no class of that name any more.
AutoModelForVision2Seq = AutoModelForImageTextToText

__all__ = [
    "ActionPrediction",
    "ActionTokenizer",
    "AutoModelForVision2Seq",
    "OpenVLAConfig",
    "OpenVLAForActionPrediction",
    "OpenVLAImageProcessor",
    "OpenVLAProcessor",
]
