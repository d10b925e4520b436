"""From frames to a policy, through the command line and the functions behind it."""

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value, concatenate_datasets
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor
from transformers.integrations import get_available_reporting_integrations

from openvla_hf.checkpoints.preparation import describe_preparation
from openvla_hf.cli import main
from openvla_hf.data import compute_statistics, from_episodes, load, save_statistics, write_lerobot, write_rlds
from openvla_hf.data.splits import read_split, split_parts
from openvla_hf.testing import fake_episode
from openvla_hf.training.checkpoint_saving import last_checkpoint
from openvla_hf.training.finetune import FinetuneArguments, TrainingData, build_trainer, finetune
from openvla_hf.training.runs import check_output


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four episodes as a dataset on disk."""
    folder = tmp_path_factory.mktemp("data") / "kitchen"
    rows = [
        frame | {"episode_index": episode, "frame_index": index}
        for episode in range(4)
        for index, frame in enumerate(fake_episode(seed=episode, steps=6))
    ]
    numbers = {"episode_index": Value("int64"), "frame_index": Value("int64")}
    features = Features(
        {"image": Image(), "instruction": Value("string"), "action": List(Value("float64")), **numbers}
    )
    Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features).save_to_disk(folder)
    return folder


SETTINGS = ("dtype=float32", "batch_size=4", "lora_rank=4", "use_cpu=true")


def run(base, data, output, *more, settings=SETTINGS):
    common = ["--model", str(base), "--data", str(data), "--output", str(output), "--workers", "0", "--json"]
    quick = ["--save-steps", "2", "--logging-steps", "1"]
    return main(["finetune", *common, *quick, *more, "--set", *settings])


def test_finetune_ends_the_process_group_and_its_threads(base, data, tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert run(base, data, tmp_path / "tuned", "--steps", "1") == 0
        assert not torch.distributed.is_initialized()
        threads = {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}
        assert not [name for name in threads if "gloo" in name]
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_finetune_resume_and_merge_end_in_a_policy_ready_to_act(base, data, tmp_path, capsys):
    output = tmp_path / "tuned"
    assert run(base, data, output, "--steps", "2", "--eval-share", "0.25") == 0
    result = json.loads(capsys.readouterr().out)
    assert {"loss", "action_accuracy", "eval_action_l1"} <= result["figures"].keys()
    assert run(base, data, output, "--steps", "4") == 2
    assert "Resume it, or give another folder" in capsys.readouterr().err
    assert run(base, data, output, "--steps", "4", "--resume") == 2  # without the held-out episodes they differ
    assert "was trained with different held-out episodes" in capsys.readouterr().err
    assert run(base, data, output, "--steps", "4", "--eval-share", "0.25", "--resume") == 0
    assert json.loads((output / "training.json").read_text())["recipe"] == "lora"

    held_out = json.loads((output / "training.json").read_text())["held_out"]
    assert held_out["kitchen"]["frames"] == 24
    assert len(held_out["kitchen"]["episodes"]) == 1
    capsys.readouterr()
    assert main(["evaluate", "--model", str(output), "--data", str(data), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["split"], told["episodes"], told["frames"]) == ("held out", 1, 6)
    assert len(told["mean_absolute_error"]) == 7
    assert main(["evaluate", "--model", str(output), "--data", str(data), "--split", "train", "--frames", "8"]) == 0
    assert "mean absolute error, dx" in capsys.readouterr().out
    assert main(["evaluate", "--model", str(base), "--data", str(data)]) == 2
    assert "has no record of held-out episodes. Give --split" in capsys.readouterr().err

    model, processor = AutoModel.from_pretrained(output), AutoProcessor.from_pretrained(output)
    assert processor.image_processor.center_crop_area == 0.9
    preparation = json.loads((output / "training.json").read_text())["preparation"]
    assert preparation == describe_preparation(processor, model.config)
    assert (preparation["center_crop_area"], preparation["strip_full_stop"]) == (0.9, True)
    assert list(model.norm_stats) == ["kitchen"]
    frame = fake_episode(steps=1)[0]
    inputs = processor(frame["image"], instruction=frame["instruction"])
    action = model.predict_action(**inputs)

    capsys.readouterr()
    assert main(["merge", str(output), str(tmp_path / "merged"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["difference"] < 1e-3
    merged = AutoModel.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(merged.predict_action(**inputs), action)
    assert main(["evaluate", "--model", str(tmp_path / "merged"), "--data", str(data), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["mean_absolute_error"] == pytest.approx(told["mean_absolute_error"])
    assert main(["merge", str(output), str(tmp_path / "merged")]) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.slow
def test_training_stops_without_an_improvement_and_ends_with_the_best_checkpoint(base, data, tmp_path, capsys):
    output = tmp_path / "tuned"
    bound = ["--eval-share", "0.5", "--steps", "60", "--keep", "9", "--keep-best", "action_l1", "--patience", "2"]
    settings = [*SETTINGS, "learning_rate=0.02"]
    assert run(base, data, output, *bound, settings=settings) == 0
    figures = json.loads(capsys.readouterr().out)["figures"]
    state = json.loads((Path(last_checkpoint(output)) / "trainer_state.json").read_text())
    evaluated = {entry["step"]: entry["eval_action_l1"] for entry in state["log_history"] if "eval_loss" in entry}
    step = min(evaluated, key=evaluated.get)
    best = output / f"checkpoint-{step}"
    assert figures["eval_action_l1"] == evaluated[step]
    told = json.loads((output / "training.json").read_text())
    assert told["settings"]["steps"] == f"{step} (of up to 60)"
    kept, final = (load_file(folder / "adapter_model.safetensors") for folder in (best, output))
    assert all(torch.equal(kept[name], tensor) for name, tensor in final.items())
    with_other = [*bound[:-1], "3"]
    assert run(base, data, output, *with_other, "--resume", settings=settings) == 2
    assert "was trained with --patience 2" in capsys.readouterr().err
    # Two evaluations brought no improvement. After one more, the resumed run stops again.
    further = [*SETTINGS, "learning_rate=0.02", "save_steps=2"]
    assert run(base, data, output, *bound, "--resume", settings=further) == 0


@pytest.mark.slow
def test_an_evaluation_while_training_reads_no_more_frames_than_requested(base, data, tmp_path, monkeypatch):
    read = []

    def spy(arguments):
        trainer = build_trainer(arguments)
        read.append(len(trainer.eval_dataset))
        return trainer

    monkeypatch.setattr("openvla_hf.training.finetune.build_trainer", spy)
    more = ["--steps", "1", "--eval-share", "0.5", "--eval-frames", "5"]
    assert run(base, data, tmp_path / "out", *more) == 0
    assert read == [5]
    assert len(json.loads((tmp_path / "out" / "training.json").read_text())["held_out"]["kitchen"]["episodes"]) == 2


def test_stopping_early_needs_held_out_episodes(base, tmp_path, capsys):
    for option in (["--patience", "2"], ["--keep-best"], ["--eval-frames", "9"]):
        assert run(base, tmp_path / "no such data", tmp_path / "out", *option) == 2
        assert "need held-out episodes: give --eval-share" in capsys.readouterr().err


@pytest.mark.slow
def test_an_adapter_trained_on_four_bits_acts_and_merges_on_the_whole_base(base, data, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    output = tmp_path / "tuned"
    assert run(base, data, output, "--recipe", "qlora", "--steps", "3") == 0
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert np.isfinite(figures["loss"])
    adapter = load_file(output / "adapter_model.safetensors")
    assert all("lora_" in name and torch.isfinite(tensor).all() for name, tensor in adapter.items())
    assert any(tensor.abs().max() > 0 for name, tensor in adapter.items() if "lora_B" in name), "nothing was learnt"
    assert main(["merge", str(output), str(tmp_path / "merged"), "--json"]) == 0
    merged = AutoModel.from_pretrained(tmp_path / "merged")
    frame = fake_episode(steps=1)[0]
    inputs = AutoProcessor.from_pretrained(output)(frame["image"], instruction=frame["instruction"])
    assert merged.predict_action(**inputs).shape == (7,)


def tree(folder):
    """Return every file of a folder with its content."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_resumed_run_keeps_its_settings_or_is_refused(base, data, tmp_path, capsys):
    output = tmp_path / "out"
    assert run(base, data, output, "--steps", "2", settings=[*SETTINGS, "learning_rate=1e-3"]) == 0
    before = tree(output)
    for setting, old, new in (
        ("learning_rate", "0.001", "1e-05"),
        ("lora_alpha", "16", "32"),
        ("adam_beta1", "0.9", "0.5"),
        ("batch_size", "4", "2"),
        ("seed", "7", "8"),
    ):
        capsys.readouterr()
        settings = [*SETTINGS, "learning_rate=1e-3", f"{setting}={new}"]
        assert run(base, data, output, "--steps", "4", "--resume", settings=settings) == 2
        printed = capsys.readouterr().err
        name = "samples_per_step" if setting == "batch_size" else setting
        assert f"was trained with {name}={old}, and a resumed run can't change it to {new}" in printed
        assert "start a new run in another folder" in printed
    assert tree(output) == before
    # Half the batch size with twice the batches gives the same step.
    settings = [*SETTINGS, "learning_rate=1e-3", "batch_size=2", "gradient_accumulation_steps=2"]
    assert run(base, data, output, "--steps", "3", "--resume", settings=settings) == 0
    told = json.loads((output / "training.json").read_text())
    assert told["arguments"]["learning_rate"] == 1e-3
    assert told["settings"]["learning rate"] == "0.001, constant"
    assert "| learning rate | 0.001, constant |" in (output / "README.md").read_text()


@pytest.mark.slow
def test_an_output_folder_that_holds_another_checkpoint_is_refused(base, data, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(base, other)
    before = tree(other)
    assert run(base, data, other, "--steps", "1") == 2
    assert "contains another checkpoint (config.json)" in capsys.readouterr().err
    for more in ([], ["--resume"]):
        assert run(other, data, other, "--steps", "1", *more) == 2
        assert "is the base model itself" in capsys.readouterr().err
    assert tree(other) == before

    output = tmp_path / "out"
    assert run(base, data, output, "--steps", "1") == 0
    assert run(other, data, output, "--steps", "2", "--resume") == 2
    assert f"was trained with base_model='{base}'" in capsys.readouterr().err
    shutil.copytree(base, output, dirs_exist_ok=True)
    (output / "training.json").unlink()
    before = tree(output)
    assert run(base, data, output, "--steps", "2", "--resume") == 2
    assert "of another run. Move it to another folder." in capsys.readouterr().err
    assert tree(output) == before


@pytest.mark.parametrize("way", ["table", "stream"])
def test_resuming_a_run_that_is_complete_trains_no_step(base, data, tmp_path, capsys, caplog, way):
    output, streaming = tmp_path / "out", []
    if way == "stream":
        write_rlds([fake_episode(steps=6)] * 2, tmp_path / "lab")
        data, streaming = tmp_path / "lab", ["--streaming"]
    assert run(base, data, output, *streaming, "--steps", "2") == 0
    complete = tree(output)
    assert run(base, data, output, *streaming, "--steps", "2", "--resume") == 0
    assert f"{output} already has 2 steps. Give more with --steps (`max_steps`) to continue." in caplog.text
    assert run(base, data, output, *streaming, "--steps", "1", "--resume") == 2
    told = f"{output / 'checkpoint-2'} has more steps than the 1 of this run. Resume with at least 2 as --steps"
    assert told in capsys.readouterr().err
    assert tree(output) == complete

    # As if the run had been killed before it saved its result.
    record = json.loads((output / "training.json").read_text())
    for path in output.iterdir():
        if path.is_file():
            path.unlink()
    assert run(base, data, output, *streaming, "--steps", "2", "--resume") == 0
    again = tree(output)
    assert {name for name in again if again[name] != complete.get(name)} <= {Path("training.json")}
    assert again.keys() == complete.keys()
    figures = json.loads((output / "training.json").read_text())["figures"]
    assert figures == {name: record["figures"][name] for name in figures}
    assert {"loss", "action_accuracy", "action_l1"} <= figures.keys()


def test_a_run_is_never_written_into_a_dataset(base, data, capsys):
    before = tree(data)
    assert run(base, data, data, "--steps", "1") == 2
    assert "is a dataset. Give a new folder." in capsys.readouterr().err
    assert tree(data) == before


def test_a_diverging_run_is_exit_status_2_and_saves_nothing(base, data, tmp_path, capsys):
    output = tmp_path / "out"
    diverging = [*SETTINGS, "learning_rate=1e25"]
    assert run(base, data, output, "--steps", "8", settings=diverging) == 2
    printed = capsys.readouterr()
    assert "The loss is nan at step 2" in printed.err
    assert printed.out == ""
    assert not list(output.glob("**/*.safetensors"))
    assert not (output / "README.md").exists()


def test_the_cost_of_a_recipe_is_shown_before_anything_is_loaded(base, tmp_path, capsys):
    assert run(base, tmp_path / "no such data", tmp_path / "out", "--dry-run") == 0
    printed = capsys.readouterr()
    cost = json.loads(printed.out)
    assert 0 < cost["trainable"] < cost["parameters"]
    assert "trainable" in printed.err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_a_policy_is_finetuned_in_float32(base, data, tmp_path, capsys):
    assert run(base, data, tmp_path / "out", "--steps", "1", settings=["batch_size=4", "lora_rank=4"]) == 0
    told = json.loads((tmp_path / "out" / "training.json").read_text())
    assert told["arguments"]["dtype"] == "float32"


@pytest.mark.parametrize("more", [["--dry-run"], []])
@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("lerning_rate=1e-3", "Unknown setting 'lerning_rate'. Did you mean 'learning_rate'?"),
        ("lora_ranks=8", "Unknown setting 'lora_ranks'. Did you mean 'lora_rank'?"),
        ("output_dir=there", "output_dir is not a setting of a run: give the folder as --output."),
        ("learning_rate=fast", "learning_rate must be a number, got 'fast'."),
        ("num_train_epochs=-", "num_train_epochs must be a number, got '-'."),
        ("lora_rank=-1", "lora_rank must be at least 0, got -1."),
        ("max_steps=0", "max_steps must be at least 1, or -1 to train for num_train_epochs, got 0."),
        ("num_train_epochs=-2", "num_train_epochs must be above 0, got -2."),
        ("label_smoothing_factor=0.1", "label_smoothing_factor has no effect"),
        ("accelerator_config=/no/file.json", "accelerator_config='/no/file.json': [Errno 2] No such file"),
        ('accelerator_config={"x":1}', "accelerator_config={'x': 1}: "),
        ("ddp_backend=glo", "Unknown ddp_backend 'glo'. Did you mean 'gloo'?"),
    ],
)
def test_a_wrong_setting_is_reported_before_any_data_is_read(base, tmp_path, capsys, setting, expected, more):
    settings = [*SETTINGS, setting]
    assert run(base, tmp_path / "no such data", tmp_path / "out", *more, settings=settings) == 2
    printed = capsys.readouterr()
    assert expected in printed.err
    assert "no such data" not in printed.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [["--dry-run"], []])
@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (["--robot", "tabeltop"], "Unknown robot 'tabeltop'. Did you mean 'tabletop'?"),
        (["--statistics", "nope.json"], "argument --statistics: There is no file or folder 'nope.json'."),
    ],
)
def test_missing_robots_or_statistics_are_reported_before_any_data_is_read(
    base, tmp_path, capsys, option, expected, more
):
    try:
        status = run(base, tmp_path / "no such data", tmp_path / "out", *more, *option)
    except SystemExit as error:
        status = error.code
    printed = capsys.readouterr().err
    assert status == 2
    assert expected in printed
    assert "no such data" not in printed


def test_given_statistics_without_those_of_the_data_are_refused_by_file_and_name(base, data, tmp_path, capsys):
    ready = save_statistics({"lab": compute_statistics(load(data))["kitchen"]}, tmp_path)
    assert run(base, data, tmp_path / "out", "--statistics", str(ready), "--steps", "1") == 2
    assert f"{ready} has no statistics for 'kitchen', only for 'lab': give the dataset" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ([1.0, 2.0], None, "was trained with --weights 1.0 2.0, and a resumed run can't leave it out."),
        (None, ["1", "2"], "was trained without --weights, and a resumed run can't change it to [1.0, 2.0]."),
        ([1.0, 1.0], ["1", "2"], "was trained without --weights, and a resumed run can't change it to [1.0, 2.0]."),
    ],
)
def test_other_weights_are_refused_on_resume_before_any_data_is_read(base, tmp_path, capsys, before, now, told):
    checkpoint = tmp_path / "out" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").touch()
    (checkpoint / "training.json").write_text(json.dumps({"weights": before}))
    weights = [] if now is None else ["--weights", *now]
    assert run(base, "a/b", tmp_path / "out", "--resume", "--data", "a/b", "c/d", *weights) == 2
    assert told in capsys.readouterr().err


def test_a_resumed_stream_keeps_its_shuffle_buffer(base, tmp_path, capsys):
    checkpoint = tmp_path / "out" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").touch()
    (checkpoint / "training.json").write_text(json.dumps({"arguments": {"streaming": True, "shuffle_buffer": 500}}))
    resumed = ["--resume", "--data", "a/b", "--streaming", "--shuffle-buffer"]
    assert run(base, "a/b", tmp_path / "out", *resumed, "5") == 2
    told = "was trained with --shuffle-buffer 500, and a resumed run can't change it to 5."
    assert told in capsys.readouterr().err


def test_another_recipe_is_refused_on_resume_by_its_name(base, tmp_path, capsys):
    checkpoint = tmp_path / "out" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").touch()
    saved = {"recipe": "lora", "arguments": {"lora_rank": 32, "trained": ["linear"]}}
    (checkpoint / "training.json").write_text(json.dumps(saved))
    assert run(base, "a/b", tmp_path / "out", "--resume", "--recipe", "full") == 2
    told = "was trained with --recipe lora, and a resumed run can't change it to 'full'."
    assert told in capsys.readouterr().err


def test_a_resumed_run_reads_its_data_in_the_same_way(tmp_path):
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").touch()
    saved = {"split": "train[:95%]", "every": None, "cameras": {"high": ["a", "b"]}, "skip_bad_episodes": False}
    (checkpoint / "training.json").write_text(json.dumps({"reading": {"old/arm": saved}}))
    again = {"split": "train[:95%]", "cameras": {"high": ("a", "b")}, "skip_bad_episodes": 0.1}
    record = {"base_model": "base", "arguments": {}, "reading": {"new/arm": again}}
    assert check_output(tmp_path, record, resume=True) == str(checkpoint)
    again["split"] = "train"
    with pytest.raises(ValueError, match=r"with split='train\[:95%\]', and a resumed run can't change it to 'train'"):
        check_output(tmp_path, record, resume=True)


def test_a_folder_in_use_is_reported_before_any_data_is_read(base, tmp_path, capsys):
    for more in (["--dry-run"], []):
        assert run(base, tmp_path / "no such data", base, *more) == 2
        assert "is the base model itself" in capsys.readouterr().err


def test_a_missing_tracker_is_reported_before_any_data_is_read(base, tmp_path, capsys):
    missing = sorted({"tensorboard", "wandb", "trackio", "swanlab"} - set(get_available_reporting_integrations()))
    if not missing:
        pytest.skip("every tracker is installed")
    assert run(base, tmp_path / "no such data", tmp_path / "out", "--report-to", missing[0]) == 2
    assert f"The tracker '{missing[0]}' can't be used" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_ctrl_c_saves_a_checkpoint_and_says_how_to_continue(base, data, tmp_path, interpreters, workers):
    output = tmp_path / "out"
    common = ["--model", str(base), "--data", str(data), "--output", str(output), "--json", "--workers", workers]
    quick = ["--save-steps", "3", "--logging-steps", "1", "--keep", "100", "--set", *SETTINGS]
    command = ["-m", "openvla_hf.cli", "finetune", *common, "--steps", "100000", *quick]
    process = interpreters.start(*command, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    while process.poll() is None and last_checkpoint(output) is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the processes that read data, too
    assert process.wait() == 130, process.errors()
    printed = process.errors()
    assert "Traceback" not in printed
    assert process.output() == ""
    checkpoint = last_checkpoint(output)
    step = int(checkpoint.rsplit("-", 1)[1])
    assert f"Stopped after step {step}, saved as {checkpoint}." in printed
    assert "--resume" in printed
    assert not (output / "adapter_model.safetensors").exists()
    assert main(["finetune", *common, "--steps", str(step + 1), "--resume", *quick]) == 0
    assert last_checkpoint(output) == str(output / f"checkpoint-{step + 1}")


def test_a_wrong_recipe_is_reported_in_one_sentence(base, data, tmp_path, capsys):
    assert run(base, data, tmp_path / "out", "--recipe", "lor") == 2
    assert "Did you mean 'lora'?" in capsys.readouterr().err


def test_a_run_trains_and_predicts_without_a_final_full_stop(base, tmp_path):
    frames = fake_episode(steps=2)
    data = from_episodes([[frame | {"instruction": "Open the drawer."} for frame in frames]])
    settings = {"dtype": "float32", "lora_rank": 4, "use_cpu": True}
    trainer = build_trainer(FinetuneArguments(model=base, data=data, output=tmp_path, settings=settings))
    row = trainer.data_collator([frames[0] | {"instruction": "Open the drawer."}])["input_ids"][0]
    processor = trainer.eval_collator.processor
    processor.save_pretrained(tmp_path / "processor")
    for text in ("open the drawer", "Open the drawer."):
        inputs = AutoProcessor.from_pretrained(tmp_path / "processor")(frames[0]["image"], instruction=text)
        assert torch.equal(row[: inputs["input_ids"].shape[1]], inputs["input_ids"][0])
    assert "." not in processor.tokenizer.decode(row)


def test_one_call_does_what_the_command_does(base, data, tmp_path, capsys):
    """Data, split, statistics, weights, record and card are equal. Only the folder differs."""
    assert run(base, data, tmp_path / "command", "--steps", "2", "--eval-share", "0.25") == 0
    figures = json.loads(capsys.readouterr().out)["figures"]
    settings = {"dtype": "float32", "batch_size": 4, "lora_rank": 4, "use_cpu": True}
    quick = {"max_steps": 2, "save_steps": 2, "logging_steps": 1, "dataloader_num_workers": 0, "disable_tqdm": True}
    arguments = FinetuneArguments(
        model=str(base),
        data=TrainingData(data, {"split": "train"}),
        output=tmp_path / "call",
        settings=settings | quick,
        eval_share=0.25,
    )
    result = finetune(arguments)
    assert [entry["step"] for entry in result.history if "loss" in entry] == [1, 2]
    assert result.figures["loss"] == figures["loss"]
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("command", "call")]
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())
    command, call = (json.loads((tmp_path / name / "training.json").read_text()) for name in ("command", "call"))
    for name in ("base_model", "datasets", "recipe", "settings", "arguments", "weights", "held_out"):
        assert call[name] == command[name], name
    again = finetune(replace(arguments, settings=settings | quick | {"max_steps": 3}, resume=True))
    assert again.history[-1]["step"] == 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"data": []}, "`data` is empty"),
        ({"data": [TrainingData("a/b"), TrainingData("a/b")]}, "given twice in `data`"),
        ({"eval_share": 1.0}, "`eval_share` must be at least 0 and below 1, got 1.0"),
        ({"patience": 2}, "need held-out episodes: give `eval_share`"),
        ({"eval_share": 0.1, "eval_data": {}}, "Give only one of them"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        FinetuneArguments(**{"model": "a/b", "data": "c/d", "output": "out"} | wrong)


def test_whole_episodes_are_held_out():
    episodes = [fake_episode(seed=seed, steps=3) for seed in range(10)]
    train, held_out = read_split(from_episodes(episodes), 0.2, seed=0)
    numbers = [{frame["episode_index"] for frame in part} for part in (train, held_out)]
    assert len(numbers[1]) == 2
    assert not numbers[0] & numbers[1]
    assert len(train) + len(held_out) == 30
    with pytest.raises(ValueError, match="has 1 episode, so none can be held out"):
        read_split(from_episodes(episodes[:1]), 0.2, seed=0)


@pytest.mark.slow
def test_a_users_own_robot_reads_the_data(base, data, tmp_path, capsys):
    robots = tmp_path / "robots.py"
    robots.write_text(
        "from openvla_hf.data.robots import Gripper, Robot, register_robot\n"
        "register_robot(Robot('mine', action_dim=7, gripper=Gripper(open=1.0, closed=0.0)))\n"
    )
    assert run(base, data, tmp_path / "out", "--robot", "mine", "--steps", "1") == 2
    assert "mine" in capsys.readouterr().err
    mine = ["--robots", str(robots), "--robot", "mine", "--name", "my_kitchen", "--camera", "image"]
    assert run(base, data, tmp_path / "out", *mine, "--steps", "1") == 0
    statistics = json.loads((tmp_path / "out" / "dataset_statistics.json").read_text())
    assert list(statistics) == ["my_kitchen"]
    assert statistics["my_kitchen"]["action"]["mask"][-1] is False


@pytest.mark.slow
def test_several_datasets_train_one_policy_by_their_weights(base, data, tmp_path, capsys):
    write_lerobot([fake_episode(seed=seed, steps=6) for seed in range(4)], tmp_path / "lab")
    output, both = tmp_path / "out", ["--data", str(data), str(tmp_path / "lab")]
    robots = ["--robot", "tabletop", "generic", "--name", "kitchen", "lab"]
    weighted = [*both, "--weights", "1", "2", *robots, "--eval-share", "0.25"]
    assert run(base, data, output, *weighted, "--steps", "1") == 0
    statistics = json.loads((output / "dataset_statistics.json").read_text())
    assert {name: one["action"]["mask"][-1] for name, one in statistics.items()} == {"kitchen": False, "lab": True}
    training = json.loads((output / "training.json").read_text())
    assert training["datasets"] == both[1:]
    assert training["weights"] == [1.0, 2.0]
    assert {name: len(one["episodes"]) for name, one in training["held_out"].items()} == {"kitchen": 1, "lab": 1}
    capsys.readouterr()
    assert run(base, data, output, *weighted, "--steps", "2", "--resume", "--weights", "2", "1") == 2
    assert "a resumed run can't change it to [2.0, 1.0]" in capsys.readouterr().err
    # Each dataset is read for evaluation as it was for training.
    for folder, name in ((data, "kitchen"), (tmp_path / "lab", "lab")):
        command = ["evaluate", "--model", str(output), "--data", str(folder), "--unnorm-key", name, "--json"]
        assert main(command) == 0
        assert json.loads(capsys.readouterr().out)["dataset"] == name


def test_streams_of_several_datasets_train_on_given_statistics(base, data, tmp_path):
    folders = [str(tmp_path / name) for name in ("lab", "shop")]
    for folder, seeds in zip(folders, (range(3), range(3, 5)), strict=True):
        write_lerobot([fake_episode(seed=seed, steps=6) for seed in seeds], folder)
    ready = compute_statistics(concatenate_datasets([load(folder) for folder in folders]))
    for one in ready.values():
        one["action"]["q99"] = [value + 1 for value in one["action"]["q99"]]
    ready_file = save_statistics(ready, tmp_path)
    options = ["--streaming", "--shuffle-buffer", "4", "--weights", "1", "2", "--skip-bad-episodes", "0.5"]
    options += ["--statistics", str(ready_file), "--data", *folders]
    assert run(base, data, tmp_path / "out", *options, "--steps", "2") == 0
    assert run(base, data, tmp_path / "out", *options, "--steps", "3", "--resume") == 0
    assert json.loads((tmp_path / "out" / "dataset_statistics.json").read_text()) == ready
    assert json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())["global_step"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "1", "2", "3"], "--weights has 3 values for 2 datasets"),
        (["--robot", "a", "b", "c"], "--robot has 3 values for 2 datasets"),
        (["--name", "both"], "--name has 1 value for 2 datasets"),
    ],
)
def test_options_of_several_datasets_need_a_value_for_each(base, tmp_path, capsys, options, message):
    assert run(base, "a/b", tmp_path / "out", "--data", "a/b", "c/d", *options) == 2
    assert message in capsys.readouterr().err


def test_a_dataset_must_not_be_given_twice(base, tmp_path, capsys):
    assert run(base, "a/b", tmp_path / "out", "--data", "a/b", "a/b") == 2
    assert "given twice in --data" in capsys.readouterr().err


def test_datasets_with_the_same_name_are_refused():
    parts = [from_episodes([fake_episode(seed=seed)], name="kitchen") for seed in range(2)]
    with pytest.raises(ValueError, match="Two datasets are called 'kitchen'"):
        split_parts(parts, None, 0.0, seed=0)


def test_each_of_several_datasets_holds_out_its_own_episodes():
    parts = [
        from_episodes([fake_episode(seed=seed, steps=4) for seed in range(count)], name=name)
        for name, count in (("kitchen", 8), ("lab", 4))
    ]
    train, held_out, record = split_parts(parts, [1.0, 1.0], 0.25, seed=0)
    assert {name: (len(one["episodes"]), one["frames"]) for name, one in record.items()} == {
        "kitchen": (2, 32),
        "lab": (1, 16),
    }
    assert len(held_out) == 3 * 4

    def episodes(frames):
        plain = frames.with_format(None).select_columns(["dataset", "episode_index"])
        return {(row["dataset"], row["episode_index"]) for row in plain}

    assert not episodes(train) & episodes(held_out)
    assert len(episodes(train)) == 9
