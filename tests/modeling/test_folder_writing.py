"""An interrupted save leaves either the old checkpoint or one that does not load."""

import json
import os
import shutil
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel

from openvla_hf.modeling.folder_writing import UNFINISHED, written_whole
from openvla_hf.testing import BRIDGE_LIKE_STATS


# Audit events of Python that change a folder.
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod")


def copy_at_every_change(folder, save, copies):
    """Run `save` in a new process, and copy `folder` before each change, as a kill would leave it.

    The folder of unfinished files is not copied, since loading never reads it. Returns the copies in order; the last
    one shows the final state.
    """
    child = os.fork()
    if child == 0:
        changes = 0
        is_copying = False

        def copy():
            nonlocal changes, is_copying
            is_copying = True
            shutil.copytree(folder, copies / str(changes), ignore=shutil.ignore_patterns(f"{UNFINISHED}*"))
            changes += 1
            is_copying = False

        def watch(event, args):
            if not is_copying:
                writes = event == "open" and isinstance(args[1], str) and "r" not in args[1]
                if (writes or event in CHANGES) and str(folder) in str(args[0]):
                    copy()

        sys.addaudithook(watch)
        status = 1
        try:
            save()
            copy()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return sorted(copies.iterdir(), key=lambda path: int(path.name))


def state(folder):
    """Return everything that determines a checkpoint's actions, or `None` if it does not load."""
    try:
        model = AutoModel.from_pretrained(folder)
    except (OSError, ValueError):
        return None
    return model.norm_stats, {name: tensor.sum().item() for name, tensor in model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("before", ["1GB", "60KB"])
@pytest.mark.parametrize("after", ["1GB", "60KB"])
def test_a_killed_save_never_loads_as_a_mixture(tiny, tmp_path, before, after):
    few = {"vision_layers": 2, "text_layers": 1}  # fewer shards, so fewer steps at which a save can be killed
    old, _ = tiny(**few)
    new, _ = tiny(seed=1, **few, norm_stats={"new": {"action": BRIDGE_LIKE_STATS}})
    expected = {}
    for name, model in (("old", old), ("new", new)):
        model.save_pretrained(tmp_path / name)
        expected[name] = state(tmp_path / name)
    old.save_pretrained(tmp_path / "before", max_shard_size=before)
    copies = copy_at_every_change(
        tmp_path / "before",
        lambda: new.save_pretrained(tmp_path / "before", max_shard_size=after),
        tmp_path / "copies",
    )
    assert len(copies) > 50
    outcomes = []
    files = None
    for copied in copies:
        if files == (files := {path.name: path.read_bytes() for path in copied.iterdir()}):
            continue
        found = state(copied)
        outcome = [name for name in expected if found == expected[name]]
        assert outcome or found is None, copied.name
        outcomes.append(outcome[0] if outcome else None)
    # First the old checkpoint loads, then none, and at the end the new one.
    changes = [outcome for index, outcome in enumerate(outcomes) if index == 0 or outcome != outcomes[index - 1]]
    assert changes == ["old", None, "new"]
    # The next save is complete, and removes no files of others.
    new.save_pretrained(copies[0], max_shard_size=after)
    assert state(copies[0]) == expected["new"]


def test_a_full_disk_leaves_the_old_checkpoint(tiny, tmp_path, full_disk):
    old, _ = tiny()
    old.save_pretrained(tmp_path, max_shard_size="60KB")
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    new, _ = tiny(seed=1)
    for size in (10, 20_000, 50_000):
        with full_disk(size), pytest.raises(OSError, match=r"can't be written|File too large"):
            new.save_pretrained(tmp_path, max_shard_size="60KB")
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_a_full_disk_is_reported_in_one_sentence(tiny, tmp_path, full_disk):
    model, _ = tiny()
    with full_disk(50_000), pytest.raises(OSError, match=r"can't be written .*free some space, or"):
        model.save_pretrained(tmp_path / "new")
    assert not any(tmp_path.iterdir())


def test_statistics_of_an_earlier_checkpoint_are_not_revived(tiny, tmp_path):
    tiny()[0].save_pretrained(tmp_path)
    model, _ = tiny(norm_stats={})
    model.save_pretrained(tmp_path)
    assert not AutoModel.from_pretrained(tmp_path).norm_stats


def test_files_that_are_not_replaced_stay(tiny, tmp_path):
    model, processor = tiny()
    processor.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    model.save_pretrained(tmp_path, variant="fp16")
    names = {path.name for path in tmp_path.iterdir()}
    assert {"README.md", "tokenizer.json", "model.safetensors.index.json", "model.fp16.safetensors"} <= names
    model.save_pretrained(tmp_path)
    weights = {path.name for path in tmp_path.glob("*.safetensors*")}
    assert weights == {"model.safetensors", "model.fp16.safetensors"}
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_process_that_is_not_the_main_one_writes_nothing(tiny, tmp_path):
    model, _ = tiny()
    model.save_pretrained(tmp_path, is_main_process=False)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_is_also_saved_as_a_whole(tiny, tmp_path):
    model, _ = tiny()
    model.save_pretrained(tmp_path / "base")
    model = AutoModel.from_pretrained(tmp_path / "base")
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "dataset_statistics.json"} <= names
    assert "config.json" not in names
    assert AutoModel.from_pretrained(tmp_path / "adapter").peft_config


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_permissions_of_new_files(tiny, tmp_path, mask):
    model, processor = tiny()
    usual = os.umask(mask)
    try:
        for size in ("1GB", "60KB"):
            model.save_pretrained(tmp_path / "new", max_shard_size=size)
        processor.save_pretrained(tmp_path / "new")
        peft = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
        with written_whole(tmp_path / "adapter") as folder:
            peft.save_pretrained(folder)
    finally:
        os.umask(usual)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o777 & ~mask
    for path in (*(tmp_path / "new").iterdir(), *(tmp_path / "adapter").iterdir()):
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask, path.name


def test_an_error_leaves_no_folder(tmp_path):
    def interrupted(folder):
        with written_whole(folder) as aside:
            (aside / "config.json").write_text("{}")
            raise KeyboardInterrupt

    for folder in (tmp_path / "new", tmp_path):
        with pytest.raises(KeyboardInterrupt):
            interrupted(folder)
        assert list(tmp_path.iterdir()) == []


def test_a_file_is_not_a_folder(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is a file: give a folder to save in"):
        tiny()[0].save_pretrained(tmp_path / "file")


def test_pushing_names_the_repository_after_the_folder(tiny, owner, tmp_path):
    model, _ = tiny()
    model.save_pretrained(tmp_path / "policy", push_to_hub=True)
    names = set(owner.files("someone/policy"))
    assert {"config.json", "model.safetensors", "dataset_statistics.json"} <= names
    assert not [name for name in names if UNFINISHED in name]
    kept = json.loads((tmp_path / "policy" / "config.json").read_text())
    assert json.loads(owner.files("someone/policy")["config.json"]) == kept
    assert torch.equal(
        load_file(tmp_path / "policy" / "model.safetensors")["lm_head.weight"], model.lm_head.weight.detach()
    )


def adapted(model):
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    return model


def test_a_whole_checkpoint_replaces_an_earlier_adapter(tiny, tmp_path):
    adapted(tiny()[0]).save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    model, _ = tiny(seed=1)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("adapter_[cm]*"))
    loaded = AutoModel.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_an_adapter_is_not_saved_beside_a_whole_checkpoint(tiny, tmp_path):
    tiny()[0].save_pretrained(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match=r"contains a whole checkpoint.*Save the adapter in another folder\."):
        adapted(tiny(seed=1)[0]).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
