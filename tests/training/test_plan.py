import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import openvla_hf
from openvla_hf.cli import main
from openvla_hf.data import TrainingStream, write_lerobot, write_rlds
from openvla_hf.data.readers.lerobot import LeRobotSource
from openvla_hf.data.readers.rlds import RLDSSource
from openvla_hf.testing import fake_episode, tiny_config
from openvla_hf.training.arguments import FinetuneArguments, TrainingData, TrainingMixture
from openvla_hf.training.plan import estimate_memory, plan_run
from openvla_hf.training.recipes import estimate_cost, recipe
from openvla_hf.training.run_frames import read_frames


SARA, SAILOR = "dlr_sara_pour_converted_externally_to_rlds", "austin_sailor_dataset_converted_externally_to_rlds"
CONFIG = Path(openvla_hf.__file__).parent / "configs" / "openx-64.toml"
RANKS, WORKERS, EPISODES_PER_SHARD = 3, 2, 2
# Numbers of episodes, and of frames in each. The second dataset has fewer shards than there are workers.
SIZES = {SARA: (18, 3), SAILOR: (4, 24), "arm": (7, 4)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("oxe")
    for name, (count, steps) in SIZES.items():
        episodes = [fake_episode(seed=seed, steps=steps, size=16) for seed in range(count)]
        if name == "arm":
            write_lerobot(episodes, folder / name)
            continue
        write_rlds(episodes, folder / name, episodes_per_file=EPISODES_PER_SHARD)
        statistics = {"action": {}, "num_transitions": count * steps, "num_trajectories": count}
        (folder / name / "1.0.0" / "dataset_statistics.json").write_text(json.dumps(statistics))
    return folder


@pytest.fixture
def unread(monkeypatch):
    """Let every attempt to read episodes fail."""

    def read(source, shard, *_):
        raise AssertionError(f"{shard} was read")

    for source in (RLDSSource, LeRobotSource):
        monkeypatch.setattr(source, "read", read)


def arguments(base, folder, output, **changes):
    options = {"streaming": True, "shuffle_buffer": 5}
    sources = [TrainingData(folder / name, options, weight) for name, weight in zip(SIZES, (1, 2, 3), strict=True)]
    settings = {"dataloader_num_workers": WORKERS, "batch_size": 2, "max_steps": 10, "lora_rank": 2}
    return FinetuneArguments(**{"model": base, "data": sources, "output": output, "settings": settings} | changes)


def first_pass(stream, rank, worker, monkeypatch):
    """Return the dataset and the episode of each frame that a worker draws before it starts its second passes."""
    info = SimpleNamespace(id=worker, num_workers=WORKERS)
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: info)
    unfinished, drawn = set(SIZES), set()
    for frame in TrainingStream(stream, rank, RANKS):
        if frame["epoch"]:
            unfinished.discard(frame["dataset"])
        else:
            drawn.add((frame["dataset"], frame["episode_index"]))
        if not unfinished:
            return drawn


def test_the_plan_gives_each_rank_the_shards_that_its_workers_read(base, data, cache, tmp_path, monkeypatch):
    run = arguments(base, data, tmp_path / "run")
    planned = plan_run(run, RANKS)
    stream = read_frames(run, recipe("lora").seed, {}).train
    for rank in range(RANKS):
        drawn = set().union(*(first_pass(stream, rank, worker, monkeypatch) for worker in range(WORKERS)))
        read = {(name, episode // (1 if name == "arm" else EPISODES_PER_SHARD)) for name, episode in drawn}
        assert read == {(one.name, number) for one in planned.datasets for number in one.ranks[rank]}
    assert [(one.shards, one.readers_per_shard) for one in planned.datasets] == [(9, 1), (2, 3), (7, 1)]
    assert sorted(number for numbers in planned.datasets[0].ranks for number in numbers) == list(range(9))


def test_the_plan_counts_samples_steps_hours_and_bytes_from_metadata(base, data, cache, tmp_path, unread):
    planned = plan_run(arguments(base, data, tmp_path / "run"), 64, throughput=0.5)
    frames = [count * steps for count, steps in SIZES.values()]
    assert [one.frames for one in planned.datasets] == frames
    weighted = [frames[0], 2 * frames[1], 3 * frames[2]]
    assert planned.samples_per_epoch == sum(weighted)
    assert [one.share for one in planned.datasets] == pytest.approx([one / sum(weighted) for one in weighted])
    assert planned.samples_per_step == 128
    assert planned.epochs == pytest.approx(1280 / sum(weighted))
    assert [one.passes for one in planned.datasets] == pytest.approx([planned.epochs * factor for factor in (1, 2, 3)])
    assert planned.hours == pytest.approx(1280 / (64 * 0.5) / 3600)
    # 128 workers share each of 9 shards among 15, of 2 shards among 64, and of 7 episodes among 19.
    assert [one.readers_per_shard for one in planned.datasets] == [15, 64, 19]
    of_sara = sum(path.stat().st_size for path in (data / SARA).rglob("*") if "statistics" not in path.name and
                  "info" not in path.name and path.is_file())  # fmt: skip
    assert planned.datasets[0].bytes == 15 * of_sara
    assert planned.bytes_read == pytest.approx(sum(one.passes * one.bytes for one in planned.datasets), abs=1)


def test_sharding_divides_the_weights_their_gradients_and_the_optimizer():
    config = tiny_config()
    chosen = recipe("openx", dtype="bfloat16", batch_size=2)
    cost = estimate_cost(config, chosen)
    for gpus in (2, 64):
        memory = estimate_memory(config, chosen, gpus)
        divided = [cost.weights / gpus, cost.gradients / gpus, cost.optimizer / gpus, cost.activations]
        assert [memory.weights, memory.gradients, memory.optimizer, memory.activations] == divided
        assert memory.total == sum(divided) + memory.copies
        assert memory.copies == estimate_memory(config, chosen, 8).copies
    accumulated = recipe("openx", dtype="bfloat16", batch_size=2, gradient_accumulation_steps=2)
    kept = estimate_memory(config, accumulated, 64).gradients - memory.gradients
    assert kept == pytest.approx(4 * cost.trainable / 2**30)
    assert estimate_memory(config, chosen, 1).copies == pytest.approx(2 * cost.trainable / 2**30)


def test_the_command_plans_64_gpus_from_its_config(base, data, cache, tmp_path, capsys, unread):
    statistics = {name: {"action": {}, "num_transitions": 100, "num_trajectories": 18} for name in (SARA, SAILOR)}
    (tmp_path / "statistics.json").write_text(json.dumps(statistics))
    command = [
        *("finetune", "--config", str(CONFIG), "--model", str(base), "--output", str(tmp_path / "run"), "--json"),
        *("--data-dir", str(data), "--mixture", json.dumps({SARA: 1, SAILOR: 0.5}), "--dry-run"),
        *("--statistics", str(tmp_path / "statistics.json"), "--throughput", "7.8", "--shard-size", "8"),
    ]
    assert main(command) == 0
    printed = capsys.readouterr()
    planned = json.loads(printed.out)["plan"]
    assert (planned["samples_per_step"], planned["steps"], planned["samples_per_epoch"]) == (2048, 295000, 150)
    assert planned["hours"] == pytest.approx(295000 * 2048 / 64 / 7.8 / 3600)
    assert [len(one["ranks"]) for one in planned["datasets"]] == [64, 64]
    assert "2,048: 64 GPUs x 32 x 1" in printed.err
    assert printed.err.count("(sharded over 8)") == 2  # the weights and the optimizer
    assert f"{base} " in printed.err
    assert "openx " in printed.err
    assert f"mixture of 2 datasets in {data} " in printed.err
    assert " GiB" not in printed.err  # the tiny model's memory is below 1 GiB


def test_frames_that_the_metadata_does_not_count_are_unknown_until_they_are_counted(base, cache, tmp_path, capsys):
    write_rlds([fake_episode(steps=2, size=16)] * 3, tmp_path / "oxe" / SARA)
    command = ["finetune", "--model", str(base), "--mixture", SARA, "--data-dir", str(tmp_path / "oxe"), "--streaming"]
    command += ["--output", str(tmp_path / "run"), "--dry-run", "--world-size", "2", "--json"]
    planned = []
    for options in ((), ("--count",), ()):  # the last plan reads the numbers from the cache
        assert main([*command, *options]) == 0
        printed = capsys.readouterr()
        planned.append(json.loads(printed.out)["plan"])
        caption = f"The metadata does not contain the number of frames of {SARA}"
        assert (caption in printed.err) == ("Add --count" in printed.err) == (len(planned) == 1)
    assert planned[0]["samples_per_epoch"] is planned[0]["bytes_read"] is planned[0]["datasets"][0]["share"] is None
    assert planned[1] == planned[2]
    assert (planned[1]["data"], planned[1]["recipe"]) == (f"mixture {SARA} in {tmp_path / 'oxe'}", "lora")
    assert (planned[1]["samples_per_epoch"], planned[1]["datasets"][0]["frames"]) == (6, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--dry-run --world-size 2", "A plan needs data that is streamed"),
        ("--streaming --dry-run --world-size 6 --shard-size 4", "6 GPUs can't be divided into groups of 4"),
        ("--streaming --dry-run --world-size 1 --shard-size 4", "1 GPU can't be divided into groups of 4"),
        ("--streaming --dry-run --throughput 2", "--throughput needs --dry-run and --world-size."),
        ("--streaming --dry-run --count", "--count needs --dry-run and --world-size."),
        ("--streaming --world-size 2", "The number of processes is 1, but --world-size is 2."),
    ],
)
def test_a_plan_that_cannot_be_made_is_told_in_one_sentence(options, message, base, data, cache, tmp_path, capsys):
    command = ["finetune", "--model", str(base), "--data", str(data / "arm"), "--output", str(tmp_path / "run")]
    assert main([*command, *options.split()]) == 2
    assert message in capsys.readouterr().err


def test_a_mixture_has_the_shares_of_the_run(base, data, cache, tmp_path):
    mixture = TrainingMixture({SARA: 1.0, SAILOR: 2.0}, data, {"streaming": True})
    run = arguments(base, data, tmp_path / "run", data=mixture)
    planned = plan_run(run, 2)
    record = read_frames(run, recipe("lora").seed, {}).record["mixture"]
    assert planned.datasets[0].frames == 51  # those of train[:95%]
    assert {one.name: one.share for one in planned.datasets} == {name: one["share"] for name, one in record.items()}
