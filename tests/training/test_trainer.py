import json
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from safetensors.torch import load_file

from openvla_hf.data import Augmentation, from_episodes, load, write_rlds
from openvla_hf.data.images import ImageReader
from openvla_hf.modeling.folder_writing import UNFINISHED
from openvla_hf.modeling.modeling_openvla import OpenVLAForActionPrediction
from openvla_hf.testing import BRIDGE_LIKE_STATS, fake_episode, tiny_config, tiny_processor, tiny_tokenizer
from openvla_hf.training.checkpoint_saving import last_checkpoint
from openvla_hf.training.collator import IGNORED, ActionCollator
from openvla_hf.training.recipes import recipe
from openvla_hf.training.throughput import training_operations
from openvla_hf.training.trainer import ActionTrainer, supervised_positions


NORM_STATS = {"tiny": {"action": BRIDGE_LIKE_STATS}}
RECORD = {"datasets": ["tiny"], "recipe": "lora"}
INSTRUCTIONS = ("pick up the red block", "open the drawer and look inside", "push")
FEATURES = Features({"image": Image(), "instruction": Value("string"), "action": List(Value("float64"))})


def frames(episodes=3, steps=8):
    rows = [
        frame
        for seed in range(episodes)
        for frame in fake_episode(seed=seed, steps=steps, instruction=INSTRUCTIONS[seed % len(INSTRUCTIONS)])
    ]
    columns = {name: [row[name] for row in rows] for name in FEATURES}
    return Dataset.from_dict(columns, features=FEATURES)


def build(output, name="lora", dataset=None, norm_stats=NORM_STATS, seed=0, augment=None, fields=None, **arguments):
    """Build a trainer of a tiny policy; `fields` are those of the recipe."""
    tokenizer = tiny_tokenizer(INSTRUCTIONS)
    config = tiny_config(tokenizer, norm_stats=norm_stats)
    torch.manual_seed(seed)
    model = OpenVLAForActionPrediction(config)
    rank = {"lora_rank": 4} if name == "lora" else {}
    chosen = recipe(name, **{"dtype": "float32", "batch_size": 4} | rank | (fields or {}))
    quick = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "use_cpu": True, "disable_tqdm": True}
    processor = tiny_processor(tokenizer, config)
    return ActionTrainer(
        model=chosen.prepare(model),
        args=chosen.training_arguments(str(output), **quick | arguments),
        data_collator=ActionCollator(processor, model.action_tokenizer, norm_stats=norm_stats, augment=augment),
        train_dataset=frames() if dataset is None else dataset,
        record=RECORD,
    )


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def saved(folder):
    return sorted(path.name for path in folder.glob("*checkpoint*"))


def test_each_rows_supervised_positions_are_found():
    labels = torch.full((2, 9), IGNORED)
    labels[0, 3:6] = torch.tensor([1, 2, 3])
    labels[1, 7:9] = torch.tensor([4, 5])
    positions, targets = supervised_positions(labels)
    assert positions.shape == (2, 3)
    assert positions[0].tolist() == [2, 3, 4]
    assert targets[0].tolist() == [1, 2, 3]
    assert positions[1, :2].tolist() == [6, 7]
    assert targets[1].tolist() == [4, 5, IGNORED]


def test_the_loss_is_that_of_all_logits_and_only_action_tokens_reach_the_head(tmp_path):
    trainer = build(tmp_path, "full")
    batch = trainer.data_collator([*fake_episode(steps=2), *fake_episode(seed=1, steps=1, instruction="push")])
    del batch["dataset_index"]
    seen = []
    handle = trainer.model.lm_head.register_forward_hook(lambda module, given, output: seen.append(output.shape[:-1]))
    loss = trainer.compute_loss(trainer.model, batch)
    handle.remove()
    assert seen == [(3, 8)]
    torch.testing.assert_close(loss, trainer.model(**batch).loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("name", "iterable", "workers"), [("lora", False, 2), ("full", True, 2), ("full", True, 0)])
def test_two_steps_and_resumed_to_four_equals_four_straight(tmp_path, name, iterable, workers):
    def data():
        if not iterable:
            return frames()
        # The epoch ends after two and a half steps.
        return frames(episodes=1, steps=10).to_iterable_dataset(num_shards=3).shuffle(seed=3, buffer_size=4)

    more = {"augment": Augmentation(size=56), "dataloader_num_workers": workers}
    straight = build(tmp_path / "straight", name, data(), **more)
    straight.train()
    first = build(tmp_path / "resumed", name, data(), **more)
    first.args.max_steps = 2
    first.train()
    second = build(tmp_path / "resumed", name, data(), seed=1 if name == "full" else 0, **more)
    second.train(resume_from_checkpoint=last_checkpoint(tmp_path / "resumed"))
    assert losses(second) == losses(straight)
    for key, expected in weights(straight).items():
        assert torch.equal(weights(second)[key], expected), key


def test_a_run_learns_the_same_with_any_number_of_workers(tmp_path):
    data = from_episodes([fake_episode(seed=seed, steps=4) for seed in range(2)], name="tiny")
    runs = []
    for workers in (0, 1, 2):  # for two epochs
        more = {"augment": Augmentation(size=56), "dataloader_num_workers": workers, "save_strategy": "no"}
        trainer = build(tmp_path / str(workers), dataset=data, **more)
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.slow
def test_a_compiled_run_learns_the_same_and_saves_plain_weights(tmp_path):
    plain, compiled = (
        build(tmp_path / "plain", "full"),
        build(tmp_path / "compiled", "full", torch_compile=True, torch_compile_backend="aot_eager"),
    )
    for trainer in (plain, compiled):
        trainer.train()
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    names = [
        load_file(tmp_path / name / "checkpoint-4" / "model.safetensors").keys() for name in ("plain", "compiled")
    ]
    assert names[0] == names[1]


def test_a_resumed_run_saves_as_often_as_requested(tmp_path):
    build(tmp_path, max_steps=2, save_steps=2).train()
    resumed = build(tmp_path, max_steps=4, save_steps=1)
    resumed.train(resume_from_checkpoint=last_checkpoint(tmp_path))
    assert saved(tmp_path) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


def test_a_run_of_a_version_that_did_not_save_the_order_of_streams_goes_on(tmp_path):
    build(tmp_path, max_steps=1, save_steps=1).train()
    file = tmp_path / "checkpoint-1" / "trainer_state.json"
    state = json.loads(file.read_text())
    del state["stateful_callbacks"]["StreamPosition"]
    file.write_text(json.dumps(state))
    resumed = build(tmp_path, max_steps=2, save_steps=1)
    resumed.train(resume_from_checkpoint=last_checkpoint(tmp_path))
    assert saved(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_a_resumed_run_neither_decodes_nor_augments_the_used_frames_of_a_stream(tmp_path, monkeypatch):
    write_rlds([fake_episode(seed=seed, steps=9) for seed in range(2)], tmp_path / "tiny")
    decoded, augmented = [], []
    read = ImageReader.read
    monkeypatch.setattr(ImageReader, "read", lambda reader, image: decoded.append(image) or read(reader, image))

    def augment(image):
        augmented.append(image)
        return image

    stream = load(tmp_path / "tiny", streaming=True, shuffle_buffer=4)
    straight = build(tmp_path / "straight", dataset=stream, augment=augment, max_steps=6, save_steps=4)
    straight.train()
    shutil.copytree(tmp_path / "straight" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    resumed = build(tmp_path / "resumed", dataset=stream, augment=augment, max_steps=6)
    decoded.clear(), augmented.clear()
    resumed.train(resume_from_checkpoint=last_checkpoint(tmp_path / "resumed"))
    assert losses(resumed) == losses(straight)
    # Two steps of four frames; the loader prefetches one batch.
    assert len(decoded) == len(augmented) == 12


def test_an_adapter_learns_and_its_base_stays(tmp_path):
    trainer = build(tmp_path, max_steps=12, learning_rate=5e-3, lr_scheduler_type="constant")
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_accumulated_batches_weigh_each_token_alike(tmp_path):
    """One step on 8 frames, in one batch or in 8, also if rows differ in their number of supervised tokens."""
    three = {name: values[:3] for name, values in BRIDGE_LIKE_STATS.items()}
    norm_stats = {"seven": {"action": BRIDGE_LIKE_STATS}, "three": {"action": three}}
    rows = fake_episode(steps=8)
    for index, row in enumerate(rows):
        row["dataset"] = "three" if index % 3 else "seven"
        row["action"] = row["action"][: 3 if index % 3 else 7]
    dataset = Dataset.from_dict(
        {name: [row[name] for row in rows] for name in rows[0]},
        features=Features({**FEATURES, "dataset": Value("string")}),
    )
    results = []
    for batch, accumulate in ((8, 1), (1, 8)):
        trainer = build(
            tmp_path / str(batch),
            "full",
            dataset,
            norm_stats,
            fields={"batch_size": batch, "gradient_accumulation_steps": accumulate, "max_grad_norm": 0.0},
            max_steps=1,
            save_strategy="no",
            optim="sgd",
            learning_rate=0.1,
        )
        trainer.throughput.matrix_rate = 1e12
        trainer.train()
        results.append((losses(trainer)[0], weights(trainer)))
    (loss_whole, whole), (loss_parts, parts) = results
    assert loss_parts == pytest.approx(loss_whole, rel=1e-5)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-4, atol=1e-6)
    names = {key for entry in trainer.state.log_history for key in entry}
    assert {"action_accuracy", "action_accuracy/three", "action_l1/seven", "loss/three", "loss/seven"} <= names
    log = trainer.state.log_history[0]
    assert log["samples_per_second"] > 0
    of_sample, of_token = training_operations(trainer.model)
    operations = of_sample * log["samples_per_second"] + of_token * log["tokens_per_second"]
    assert log["mfu"] == pytest.approx(operations / 1e12)


def test_metrics_are_those_of_decoded_predictions(tmp_path):
    trainer = build(tmp_path, "full")
    dataset = frames(episodes=2, steps=4)
    metrics = trainer.evaluate(dataset)
    collate, model = trainer.data_collator, trainer.model
    right, distance = [], []
    for frame in dataset:
        labels = collate([frame])["labels"]
        inputs = {name: value for name, value in collate([frame]).items() if name not in ("labels", "dataset_index")}
        with torch.no_grad():
            predicted = model(**inputs).logits[:, :-1].argmax(-1)[labels[:, 1:] != IGNORED][:-1]
        expected = labels[labels != IGNORED][:-1]
        right.append((predicted == expected).float().mean().item())
        decode = model.action_tokenizer.decode
        distance.append(np.abs(decode(predicted) - decode(expected)).mean())
    assert metrics["eval_action_accuracy"] == pytest.approx(np.mean(right), abs=1e-6)
    assert metrics["eval_action_l1"] == pytest.approx(np.mean(distance), abs=1e-6)


def test_metrics_of_a_stream_are_those_of_its_table(tmp_path):
    trainer = build(tmp_path, "full")
    dataset = frames(episodes=2, steps=4)
    expected, found = trainer.evaluate(dataset), trainer.evaluate(dataset.to_iterable_dataset(num_shards=2))
    for name in ("eval_loss", "eval_action_accuracy", "eval_action_l1"):
        assert found[name] == pytest.approx(expected[name], abs=1e-5)


def test_a_checkpoint_is_complete_and_contains_only_the_adapter(tmp_path):
    trainer = build(tmp_path, max_steps=2)
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    assert not (tmp_path / UNFINISHED).exists()
    assert not list(folder.glob("*.bin"))
    assert json.loads((folder / "dataset_statistics.json").read_text()) == NORM_STATS
    assert json.loads((folder / "training.json").read_text()) == RECORD
    assert (folder / "processor_config.json").is_file()
    assert all("lora_" in name for name in load_file(folder / "adapter_model.safetensors"))


def test_a_second_run_over_the_same_steps_replaces_their_checkpoint(tmp_path):
    build(tmp_path, max_steps=4).train()
    (tmp_path / "checkpoint-4" / "old").touch()
    again = build(tmp_path, max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not (tmp_path / "checkpoint-4" / "old").exists()
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-best")  # somebody's own
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_a_checkpoint_that_does_not_fit_on_the_disk_does_not_count(tmp_path, full_disk):
    trainer = build(tmp_path, max_steps=2)
    trainer.train()
    trainer.args.max_steps = 4
    with full_disk(), pytest.raises(OSError, match=r"checkpoint-4 can't be written .*too large"):
        trainer.train(resume_from_checkpoint=last_checkpoint(tmp_path))
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert not (tmp_path / "checkpoint-4").exists()
    resumed = build(tmp_path)
    resumed.train(resume_from_checkpoint=last_checkpoint(tmp_path))
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert not (tmp_path / UNFINISHED).exists()


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("name", ["lora", "full"])
def test_training_stops_at_the_first_loss_that_is_not_finite(tmp_path, name, accumulated):
    fields = {"batch_size": 2, "gradient_accumulation_steps": accumulated, "max_grad_norm": 0.0}
    trainer = build(tmp_path, name, fields=fields, learning_rate=1e25, max_steps=8, save_steps=4)
    with pytest.raises(ValueError, match=r"The loss is (nan|inf) at step 2.*No checkpoint had been saved.*lower"):
        trainer.train()
    assert losses(trainer) == [pytest.approx(losses(trainer)[0])]
    assert not saved(tmp_path)


def test_training_stops_at_the_first_gradient_that_is_not_finite(tmp_path):
    trainer = build(tmp_path, "full", max_steps=8, save_steps=1)
    backward_passes = []

    def overflow(gradient):
        backward_passes.append(1)
        return gradient * (np.inf if len(backward_passes) == 3 else 1)

    trainer.model.lm_head.weight.register_hook(overflow)
    good = re.escape(str(tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match=f"gradient norm is (nan|inf) at step 3.*last good checkpoint is {good}"):
        trainer.train()
    assert saved(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert all(tensor.isfinite().all() for tensor in weights(trainer).values())


def test_weights_that_make_the_loss_non_finite_are_never_saved(tmp_path):
    trainer = build(tmp_path, "full", learning_rate=1e25, max_steps=8, save_steps=1)
    with pytest.raises(ValueError, match="after step 1"):
        trainer.train()
    assert not saved(tmp_path)
    with pytest.raises(ValueError, match="after step 1"):
        trainer.save_model(str(tmp_path / "result"))
    assert not (tmp_path / "result").exists()


def test_an_evaluation_whose_loss_is_not_finite_ends_the_run(tmp_path):
    trainer = build(tmp_path, "full")
    trainer.model.lm_head.weight.data[3] = np.nan
    with pytest.raises(ValueError, match="The evaluation loss is nan"):
        trainer.evaluate(frames(episodes=1, steps=2))


# Runs of one policy, each in its own fork of a process that has imported everything. A run may be killed the
# `count`-th time that `name` is written, renamed or removed: at once, or when a file exceeds `limit`.
TRAIN = """
import gc, json, os, resource, signal, sys
import torch
from openvla_hf.modeling.modeling_openvla import OpenVLAForActionPrediction
from openvla_hf.testing import fake_episode, tiny_config, tiny_processor, tiny_tokenizer
from openvla_hf.training.checkpoint_saving import last_checkpoint
from openvla_hf.training.collator import ActionCollator
from openvla_hf.training.recipes import recipe
from openvla_hf.training.trainer import ActionTrainer

def train(output, steps):
    tokenizer = tiny_tokenizer()
    config = tiny_config(tokenizer)
    torch.manual_seed(0)
    model = OpenVLAForActionPrediction(config)
    chosen = recipe("full", dtype="float32", batch_size=2)
    processor = tiny_processor(tokenizer, config)
    trainer = ActionTrainer(
        model=chosen.prepare(model),
        args=chosen.training_arguments(
            output, max_steps=steps, save_steps=1, save_total_limit=3, logging_steps=1, use_cpu=True, disable_tqdm=True
        ),
        data_collator=ActionCollator(processor, model.action_tokenizer, model.get_action_stats()),
        train_dataset=fake_episode(steps=40),
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(output))

def kill(event, name, count, limit=None):
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)

    def watch(happened, args):
        nonlocal count
        if happened != event or not str(args[0]).endswith(name) or (event == "open" and args[1] != "w"):
            return
        count -= 1
        if count == 0:
            if limit is None:
                os.kill(os.getpid(), signal.SIGKILL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    sys.addaudithook(watch)

gc.freeze()  # as the tests do
for run in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        if "kill" in run:
            kill(**run["kill"])
        train(run["output"], run["steps"])
        sys.exit()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print("ended", json.dumps([status, last_checkpoint(run["output"])]), flush=True)
"""
# Stage of a save -> where a run is killed, and the last step with a complete checkpoint, where the next run resumes.
KILLS = {
    "before the weights": ({"event": "open", "name": "/generation_config.json", "count": 2}, 1),
    "in the weights": ({"event": "open", "name": "/generation_config.json", "count": 2, "limit": 100_000}, 2),
    "in the optimizer": ({"event": "open", "name": "/processing_openvla.py", "count": 2, "limit": 100_000}, 3),
    "before the state": ({"event": "open", "name": "/trainer_state.json", "count": 3}, 4),
    "before it has its name": ({"event": "os.rename", "name": "_unfinished/checkpoint-6", "count": 1}, 5),
    "after it has its name": ({"event": "shutil.rmtree", "name": "/killed/_unfinished", "count": 2}, 6),
    "while an old one goes": ({"event": "os.rmdir", "name": "/killed/checkpoint-5", "count": 1}, 8),
}


@pytest.mark.slow
def test_a_run_killed_while_it_saves_resumes_from_a_complete_checkpoint(tmp_path, run_python):
    steps = 9
    killed, straight = ({"output": str(tmp_path / name), "steps": steps} for name in ("killed", "straight"))
    runs = [*(killed | {"kill": kill} for kill, _ in KILLS.values()), killed, straight]
    told = run_python(TRAIN, json.dumps(runs)).stdout.splitlines()
    ended = [json.loads(line.removeprefix("ended ")) for line in told if line.startswith("ended ")]
    checkpoints = {
        stage: (-signal.SIGXFSZ if "limit" in kill else -signal.SIGKILL, f"{tmp_path}/killed/checkpoint-{step}")
        for stage, (kill, step) in KILLS.items()
    }
    assert dict(zip(KILLS, map(tuple, ended[:-2]), strict=True)) == checkpoints
    assert [status for status, _ in ended[-2:]] == [0, 0]
    expected = load_file(tmp_path / "straight" / f"checkpoint-{steps}" / "model.safetensors")
    actual = load_file(tmp_path / "killed" / f"checkpoint-{steps}" / "model.safetensors")
    assert len(expected) > 10
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
