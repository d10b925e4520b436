"""The private parts of other libraries that this package uses, each with the file that uses it."""

import logging
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download
from peft import LoraConfig
from transformers import AutoModel

from openvla_hf.modeling.modeling_openvla import OpenVLAForActionPrediction
from openvla_hf.testing import tiny_config


def test_torch_names_the_failures_of_a_compilation():
    """`CompiledActionPass` in action_decoding.py falls back to plain passes on these."""
    from torch._dynamo import config, exc

    for name in ("FailOnRecompileLimitHit", "TorchDynamoException"):
        assert issubclass(getattr(exc, name, int), Exception), f"torch._dynamo.exc has no error {name} any more."
    assert hasattr(config, "recompile_limit"), "torch._dynamo.config has no recompile_limit any more."


def test_a_config_knows_the_attention_implementation():
    """`_takes_additive_masks` in action_decoding.py reads it."""
    model = AutoModel.from_config(tiny_config())
    model.set_attn_implementation("eager")
    found = getattr(model.config.text_config, "_attn_implementation", None)
    assert found == "eager", f"The attention implementation is no longer in `_attn_implementation`, found {found!r}."


def test_the_cache_keeps_the_list_of_a_commits_files(owner):
    """`CheckpointFiles` in checkpoint_files.py reads the list when the Hub is not asked."""
    folder = owner.root / "someone/policy"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    snapshot = Path(snapshot_download("someone/policy"))
    trees = list((snapshot.parent.parent / "trees").glob("*"))
    assert [tree.name for tree in trees] == [f"{snapshot.name}.json"], "The cache keeps a commit's list elsewhere now."


def test_the_auto_classes_pass_an_adapter_by_a_private_key(tiny, tmp_path, monkeypatch):
    """`resolve_adapter` in checkpoint_loading.py reads it."""
    model, _ = tiny()
    model.save_pretrained(tmp_path / "base")
    model = AutoModel.from_pretrained(tmp_path / "base")
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    calls = []
    monkeypatch.setattr(OpenVLAForActionPrediction, "from_pretrained", lambda *args, **kwargs: calls.append(kwargs))
    AutoModel.from_pretrained(tmp_path / "adapter")
    given = calls[0].get("adapter_kwargs") or {}
    assert given.get("_adapter_model_path") == tmp_path / "adapter", f"AutoModel passes an adapter otherwise: {given}."


def test_bitsandbytes_warns_by_a_logger_of_this_name():
    """`prepare_quantized` in quantized_loading.py silences it."""
    functions = pytest.importorskip("bitsandbytes.autograd._functions")
    loggers = [one.name for one in vars(functions).values() if isinstance(one, logging.Logger)]
    assert loggers == ["bitsandbytes.autograd._functions"], f"bitsandbytes warns by the loggers {loggers} now."
