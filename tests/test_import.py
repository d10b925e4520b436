import json

import openvla_hf


IMPORT = """
import json, sys
from transformers import AutoConfig, AutoModel, AutoProcessor, BaseImageProcessor, GenerationMixin
from transformers import Dinov2WithRegistersModel, PreTrainedModel, PreTrainedTokenizerFast, SiglipVisionModel

theirs = set(sys.modules)
import openvla_hf
print(json.dumps(sorted(set(sys.modules))))
print(json.dumps(sorted(set(sys.modules) - theirs)))
"""


def test_the_package_imports_nothing_heavy(run_python):
    everything, ours = map(json.loads, run_python(IMPORT).stdout.splitlines())
    assert not {"datasets", "peft", "gymnasium", "matplotlib", "pandas", "timm"} & set(everything)
    # What transformers brings itself (accelerate) comes with it and not with this package.
    beyond = {name.split(".")[0] for name in ours} - {
        "openvla_hf",
        "transformers",
        "tokenizers",
        "torch",
        "PIL",
        "numpy",
    }
    assert not {"accelerate", "scipy", "sklearn", "bitsandbytes"} & beyond
    assert "openvla_hf.modeling.modeling_openvla" in ours
    assert not [name for name in ours if name.startswith(("openvla_hf.training", "openvla_hf.evaluation"))]


def test_the_public_names_are_there():
    assert all(hasattr(openvla_hf, name) for name in openvla_hf.__all__)
    assert openvla_hf.AutoModelForVision2Seq is openvla_hf.AutoModelForImageTextToText
