import importlib
import json
import os
import shutil
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import openvla_hf
import openvla_hf.testing


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="gives each call a process of its own by forking")

PUBLISHED = Path(__file__).parent / "parity" / "kept" / "fused-224" / "checkpoint"
HEAVY = {"torch", "accelerate", "datasets", "gymnasium", "matplotlib", "pandas", "peft", "scipy", "sklearn", "timm"}

IMPORT = """
import json, sys
import transformers
from transformers.models.auto import auto_mappings

def tables():
    names = ("CONFIG", "PROCESSOR", "IMAGE_PROCESSOR")
    yield from (dict(getattr(auto_mappings, f"{name}_MAPPING_NAMES")) for name in names)
    yield dict(auto_mappings.SPECIAL_MODEL_TYPE_TO_MODULE_NAME)

before, modules, finders = list(tables()), set(sys.modules), list(sys.meta_path)
import openvla_hf
assert sys.meta_path == finders
print(json.dumps(sorted(set(sys.modules))))
print(json.dumps(sorted(set(sys.modules) - modules)))
print(json.dumps([{k: v for k, v in new.items() if k not in old} for old, new in zip(before, tables())]))
"""


def test_the_package_imports_nothing_heavy_and_only_adds_names(run_fresh_python):
    everything, ours, added = map(json.loads, run_fresh_python(IMPORT).stdout.splitlines())
    assert not HEAVY & {name.split(".")[0] for name in everything}
    assert ours == ["openvla_hf", "transformers.models.openvla_hf"]
    config, processor, image_processor, module = added
    assert config == {"openvla": "OpenVLAConfig"}
    assert processor == {"openvla": "OpenVLAProcessor", "prismatic": "PrismaticProcessor"}
    assert set(image_processor["openvla"].values()) == {"OpenVLAImageProcessor", "PrismaticImageProcessor"}
    assert module == {"openvla": "openvla_hf", "prismatic": "openvla_hf"}


TABLES = {
    "auto_mappings": (
        "CONFIG_MAPPING_NAMES", "PROCESSOR_MAPPING_NAMES", "IMAGE_PROCESSOR_MAPPING_NAMES",
        "SPECIAL_MODEL_TYPE_TO_MODULE_NAME",
    ),
    "configuration_auto": ("CONFIG_MAPPING_NAMES",),
    "tokenization_auto": ("TOKENIZER_MAPPING_NAMES",),
}  # fmt: skip


@pytest.mark.parametrize("module", TABLES)
def test_transformers_has_the_tables_that_the_package_adds_names_to(module):
    found = vars(importlib.import_module(f"transformers.models.auto.{module}"))
    missing = [name for name in TABLES[module] if not isinstance(found.get(name), dict)]
    assert not missing, f"transformers no longer has {missing} in {module}: adapt __init__.py and auto.py."


def test_the_public_names_are_there():
    assert all(hasattr(openvla_hf, name) for name in openvla_hf.__all__)
    assert set(openvla_hf.__all__) < set(dir(openvla_hf))
    assert openvla_hf.AutoModelForVision2Seq is transformers.AutoModelForImageTextToText
    assert openvla_hf.modeling.modeling_openvla.OpenVLAConfig is openvla_hf.OpenVLAConfig
    starred: dict = {}
    exec("from openvla_hf import *", starred)
    assert set(openvla_hf.__all__) == starred.keys() - {"__builtins__"}
    with pytest.raises(AttributeError, match="module 'openvla_hf' has no attribute 'OpenVLA'"):
        openvla_hf.OpenVLA  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'OpenVLA' from 'openvla_hf'"):
        exec("from openvla_hf import OpenVLA")


# The classes that the first call after the imports finds, in many orders


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint that this package saved."""
    folder = tmp_path_factory.mktemp("saved")
    config = openvla_hf.testing.tiny_config()
    openvla_hf.OpenVLAForActionPrediction(config).save_pretrained(folder)
    openvla_hf.testing.tiny_processor(config=config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The files of a published checkpoint without its weights, with a tokenizer of Llama's kind."""
    folder = tmp_path_factory.mktemp("published")
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(PUBLISHED / name, folder)
    tokens = ["<unk>", "<s>", "</s>", "<PAD>", "▁", "o", "p", "e", "n"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "auto_map": {"AutoProcessor": "processing_prismatic.PrismaticProcessor"},
        "processor_class": "PrismaticProcessor",
        "tokenizer_class": "LlamaTokenizer",
        "pad_token": "<PAD>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return folder


# A call -> the class of its result.
FIRST_CALLS = {
    f"transformers.{call}": name
    for call, name in {
        "AutoConfig.from_pretrained(saved)": "OpenVLAConfig",
        "AutoModel.from_pretrained(saved)": "OpenVLAForActionPrediction",
        "AutoModelForImageTextToText.from_pretrained(saved)": "OpenVLAForActionPrediction",
        "AutoProcessor.from_pretrained(saved)": "OpenVLAProcessor",
        "AutoImageProcessor.from_pretrained(saved)": "OpenVLAImageProcessor",
        "AutoTokenizer.from_pretrained(saved)": "TokenizersBackend",
        "AutoProcessor.from_pretrained(published)": "OpenVLAProcessor",
        "AutoImageProcessor.from_pretrained(published)": "OpenVLAImageProcessor",
        "AutoTokenizer.from_pretrained(published)": "TokenizersBackend",
    }.items()
}
# This package takes precedence over the code that a repository names.
TRUSTING_CALLS = {call.replace(")", ", trust_remote_code=True)"): name for call, name in FIRST_CALLS.items()}
# Without the Auto classes, or with objects that were made without them.
DIRECT_CALLS = {
    "openvla_hf.OpenVLAForActionPrediction.from_pretrained(saved)": "OpenVLAForActionPrediction",
    "openvla_hf.AutoModelForVision2Seq.from_pretrained(saved)": "OpenVLAForActionPrediction",
    "model_class().from_pretrained(saved)": "OpenVLAForActionPrediction",
    "find('processing', 'OpenVLAProcessor').from_pretrained(published)": "OpenVLAProcessor",
    "transformers.AutoModel.from_config(config())": "OpenVLAForActionPrediction",
    "transformers.AutoTokenizer.from_pretrained(published, config=config())": "TokenizersBackend",
}

CALLS = """
import importlib, os, sys
{imports}
import transformers

saved, published, *calls = sys.argv[1:]

def find(module, name):
    return getattr(importlib.import_module(f"openvla_hf.{module}"), name)

def model_class():
    return find("modeling.modeling_openvla", "OpenVLAForActionPrediction")

def config():
    return find("modeling.configuration_openvla", "OpenVLAConfig").from_pretrained(saved)

for call in calls:
    # A process of its own makes each the first one; to start Python for each would take minutes.
    if child := os.fork():
        status = os.waitpid(child, 0)[1]
        assert status == 0, call
        continue
    found = type(eval(call))
    print(found.__name__, found.__module__.split(".")[0], flush=True)
    os._exit(0)
"""

ORDERS = {
    "package first": "import openvla_hf",
    "Auto classes first": "from transformers import AutoModel, AutoProcessor\nimport openvla_hf",
    "trainer and pipelines first": "import transformers.trainer\nfrom transformers import pipeline\nimport openvla_hf",
    "trainer and pipelines last": "import openvla_hf\nimport transformers.trainer\nfrom transformers import pipeline",
}
# Modules that most calls import, imported once. They import no module of this package or of the Auto classes.
# `get_checkpoint_conversion_mapping` compiles the patterns of all models.
SHARED = """
import torch, transformers.generation.utils, transformers.image_processing_backends, transformers.modeling_utils
import transformers.processing_utils, transformers.tokenization_utils_tokenizers, transformers.video_processing_utils
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
get_checkpoint_conversion_mapping("llama")
"""
# A version of transformers with its own OpenVLA, which is in use.
RIVAL = """
import types
from transformers import AutoConfig, BertConfig
from transformers.models.auto import auto_mappings, configuration_auto, modeling_auto, tokenization_auto

class OpenVLAConfig(BertConfig):
    model_type = "openvla"

rival = sys.modules["transformers.models.openvla"] = types.ModuleType("transformers.models.openvla")
rival.OpenVLAConfig = OpenVLAConfig
configuration_auto.CONFIG_MAPPING_NAMES["openvla"] = auto_mappings.CONFIG_MAPPING_NAMES["openvla"] = "OpenVLAConfig"
auto_mappings.PROCESSOR_MAPPING_NAMES["openvla"] = "OpenVLAProcessor"
auto_mappings.IMAGE_PROCESSOR_MAPPING_NAMES["openvla"] = {"pil": "OpenVLAImageProcessor"}
modeling_auto.MODEL_MAPPING_NAMES["openvla"] = "OpenVLAModel"
tokenization_auto.TOKENIZER_MAPPING_NAMES["openvla"] = "LlamaTokenizer"
assert type(AutoConfig.for_model("openvla")) is OpenVLAConfig
import openvla_hf
assert sys.modules["transformers.models.openvla"] is rival
"""
# A version of transformers that keeps its names in other tables.
NO_TABLES = """
from transformers import AutoModel, AutoProcessor
sys.modules["transformers.models.auto.auto_mappings"] = None
import openvla_hf
assert "openvla_hf.auto" in sys.modules
"""


def check_calls(run_python, imports, calls, saved, published):
    result = run_python(CALLS.replace("{imports}", imports), saved, published, *calls)
    found = dict(zip(calls, result.stdout.splitlines(), strict=True))
    packages = {"TokenizersBackend": "transformers"}
    assert found == {call: f"{name} {packages.get(name, 'openvla_hf')}" for call, name in calls.items()}


@pytest.mark.parametrize("order", ORDERS)
def test_the_first_call_finds_this_package(run_python, saved, published, order):
    check_calls(run_python, f"{ORDERS[order]}\n{SHARED}", FIRST_CALLS, saved, published)


@pytest.mark.slow
def test_the_first_call_finds_this_package_without_auto_classes_and_with_remote_code(run_python, saved, published):
    check_calls(run_python, f"import openvla_hf\n{SHARED}", DIRECT_CALLS | TRUSTING_CALLS, saved, published)


@pytest.mark.slow
@pytest.mark.parametrize("imports", [RIVAL, NO_TABLES], ids=["a rival", "no tables"])
def test_the_first_call_finds_this_package_in_other_versions_of_transformers(run_python, saved, published, imports):
    check_calls(run_python, f"{imports}\n{SHARED}", FIRST_CALLS, saved, published)
