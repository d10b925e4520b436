"""Compare one action at a time with chunks of 8 (OpenVLA-OFT) on the tabletop, with two cameras and the state.

    python benchmarks/chunks.py --output outputs/chunks                          # every method, one after the other
    python benchmarks/chunks.py --output outputs/chunks --methods oft            # one method, to run one on each core
    python benchmarks/chunks.py --output outputs/chunks --methods oft --steps 20 --episodes 4    # a quick trial

Each method starts from the weights of the shipped policy, learns from the same demonstrations in the same number of
steps, and is evaluated on the same unseen episodes:

- autoregressive: one action of 7 tokens, one after the other, as in OpenVLA.
- oft: 8 actions in one pass, read by an L1 head.
- oft-discrete: 8 actions in one pass, as tokens.

All methods are trained in full, and see the fixed camera, the wrist camera and the state; the shipped policy sees only
the fixed camera. The demonstrations are recorded if they do not exist yet. Running the command again resumes the
training from the last checkpoint, and finished methods are not trained again.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoProcessor, set_seed

from openvla_hf.data import compute_statistics, load, write_lerobot
from openvla_hf.data.frames import Frames
from openvla_hf.modeling.configuration_openvla import OpenVLAConfig
from openvla_hf.modeling.modeling_openvla import OpenVLAForActionPrediction
from openvla_hf.processing.processing_openvla import OpenVLAProcessor
from openvla_hf.tabletop.env import CAMERAS, STATE_NAMES
from openvla_hf.tabletop.expert import record_demonstrations
from openvla_hf.tabletop.rollouts import FIRST_UNSEEN_SEED, TABLETOP_POLICY, load_policy, run_episodes
from openvla_hf.training.collator import ActionCollator, ChunkCollator


HORIZON = 8
ACTION_DIM = 7
PARALLEL = {"action_decoding": "parallel", "action_horizon": HORIZON, "action_dim": ACTION_DIM}
METHODS: dict[str, dict[str, Any]] = {
    "autoregressive": {},
    "oft": PARALLEL | {"action_head": "l1"},
    "oft-discrete": PARALLEL,
}
NAME = "demonstrations"
WARM_UP_STEPS = 30
LOG_STEPS = 25
# Episodes in which the time of an action is measured, one at a time.
TIMED_EPISODES = 10


@dataclass
class Result:
    method: str
    execute: int
    episodes: int
    success: float
    low: float
    high: float
    mean_steps: float
    passes_per_action: float
    actions_per_second: float
    training_samples: int
    training_cpu_seconds: float


def record(folder: Path, tasks: Sequence[str], episodes: int) -> Frames:
    """Record demonstrations unless they exist, and load them with both cameras, the state and chunks."""
    if not folder.exists():
        demonstrations = record_demonstrations(tasks, range(episodes), cameras=CAMERAS, state=True)
        write_lerobot(demonstrations, folder, state_names=STATE_NAMES)
    # An episode of the tabletop has 10 to 30 frames: without padding, the last 7 of them would never begin a chunk.
    return load(folder, "tabletop", cameras=list(CAMERAS), state=True, chunk=HORIZON, chunk_end="pad")


def build(method: str, statistics: dict[str, Any]) -> tuple[OpenVLAForActionPrediction, OpenVLAProcessor]:
    """Build a method's model from the weights of the shipped policy. Only the new modules are random."""
    extended = {"num_images": len(CAMERAS), "proprio_dim": len(STATE_NAMES), "norm_stats": statistics}
    config = OpenVLAConfig.from_pretrained(TABLETOP_POLICY, **extended, **METHODS[method])
    model = OpenVLAForActionPrediction(config)
    missing, unexpected = model.load_state_dict(AutoModel.from_pretrained(TABLETOP_POLICY).state_dict(), strict=False)
    new = ("model.proprio_projector.", "action_head.")
    if unexpected or any(not name.startswith(new) for name in missing):
        raise ValueError(f"The weights of the shipped policy do not fit: missing {missing}, unexpected {unexpected}.")
    processor = AutoProcessor.from_pretrained(TABLETOP_POLICY, cameras=list(CAMERAS), state_dim=len(STATE_NAMES))
    return model, processor


def make_collator(model: OpenVLAForActionPrediction, processor: OpenVLAProcessor) -> ActionCollator:
    """Make the collator that a method's recipe uses."""
    parts = {"processor": processor, "action_tokenizer": model.action_tokenizer, "norm_stats": model.norm_stats}
    if model.config.is_parallel:
        return ChunkCollator(model.config, **parts)
    return ActionCollator(**parts, prompt_suffix_token_id=model.config.prompt_suffix_token_id)


def batches(count: int, size: int, first: int, steps: int) -> Iterator[list[int]]:
    """Yield the indices of each batch from step `first` on. Each epoch has its own order."""
    orders: dict[int, np.ndarray] = {}
    for step in range(first, steps):
        chosen = []
        for sample in range(step * size, (step + 1) * size):
            epoch, place = divmod(sample, count)
            if epoch not in orders:
                orders = {epoch: np.random.default_rng(epoch).permutation(count)}
            chosen.append(int(orders[epoch][place]))
        yield chosen


def schedule(step: int, steps: int) -> float:
    """Return the share of the peak learning rate: linear warm-up, then half a cosine."""
    if step < WARM_UP_STEPS:
        return (step + 1) / WARM_UP_STEPS
    return 0.5 * (1 + math.cos(math.pi * (step - WARM_UP_STEPS) / max(1, steps - WARM_UP_STEPS)))


def train(method: str, frames: Frames, folder: Path, options: argparse.Namespace) -> None:
    """Train a method to the end, from its last checkpoint if there is one, and save the policy to `folder`."""
    set_seed(0)
    model, processor = build(method, compute_statistics(frames))
    model.train()
    collate = make_collator(model, processor)
    for_metrics = {"dataset_index", "labels"} if model.config.is_parallel else {"dataset_index"}
    new = [value for name, value in model.named_parameters() if "proprio_projector" in name or "action_head" in name]
    is_new = {id(parameter) for parameter in new}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in is_new]
    peaks = [options.learning_rate, options.new_learning_rate]
    optimizer = torch.optim.AdamW(
        [{"params": rest}, {"params": new}], betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    checkpoint = folder / "checkpoint.pt"
    done, seconds = 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done, seconds = saved["step"], saved["seconds"]
    start, losses = time.process_time(), []
    for step, chosen in enumerate(batches(len(frames), options.batch_size, done, options.steps), start=done + 1):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * schedule(step - 1, options.steps)
        batch = collate([frames[index] for index in chosen])
        loss = model(**{name: value for name, value in batch.items() if name not in for_metrics}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % LOG_STEPS == 0:
            spent = seconds + time.process_time() - start
            print(f"{method}: step {step}, loss {np.mean(losses):.4f}, {spent:.0f} s of CPU time", flush=True)
            losses.clear()
        if step % options.save_steps == 0 or step == options.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"step": step, "seconds": seconds + time.process_time() - start}, f"{checkpoint}.new")
            Path(f"{checkpoint}.new").replace(checkpoint)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def wilson(successes: int, episodes: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95% interval of a success rate."""
    rate, spread = successes / episodes, z * z / episodes
    middle = (rate + spread / 2) / (1 + spread)
    half = z * math.sqrt(rate * (1 - rate) / episodes + spread / (4 * episodes)) / (1 + spread)
    return middle - half, middle + half


def evaluate(method: str, folder: Path, options: argparse.Namespace, execute: int) -> Result:
    """Run unseen episodes in batches, and a few one at a time to measure the time of an action."""
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    policy, timed = (load_policy(model, processor, execute=execute) for _ in range(2))

    def play(one: Any, episodes: int, batch_size: int) -> list[Any]:
        seeds = range(FIRST_UNSEEN_SEED, FIRST_UNSEEN_SEED + episodes)
        observed = {"cameras": one.cameras, "state": one.state}
        return list(run_episodes(one, seeds, tasks=options.task, batch_size=batch_size, **observed))

    played = play(policy, options.episodes, 16)
    one_at_a_time = play(timed, min(TIMED_EPISODES, options.episodes), 1)
    solved, actions = sum(one.success for one in played), sum(one.steps for one in played)
    low, high = wilson(solved, len(played))
    spent = torch.load(folder / "checkpoint.pt", weights_only=True)
    return Result(
        method=method,
        execute=execute,
        episodes=len(played),
        success=solved / len(played),
        low=low,
        high=high,
        mean_steps=actions / len(played),
        passes_per_action=policy.forward_passes / actions,
        actions_per_second=sum(one.steps for one in one_at_a_time) / timed.seconds,
        training_samples=spent["step"] * options.batch_size,
        training_cpu_seconds=spent["seconds"],
    )


def results_table(results: Sequence[Result]) -> Table:
    """Make a table of the results."""
    table = Table(title="Unseen episodes")
    columns = ("method", "executed", "success", "95% interval", "passes per action", "actions/s", "steps", "CPU s")
    for column in columns:
        table.add_column(column, justify="left" if column == "method" else "right")
    for one in results:
        table.add_row(
            one.method,
            str(one.execute),
            f"{one.success:.1%} of {one.episodes}",
            f"{one.low:.1%} to {one.high:.1%}",
            f"{one.passes_per_action:.2f}",
            f"{one.actions_per_second:.0f}",
            f"{one.mean_steps:.1f}",
            f"{one.training_cpu_seconds:.0f}",
        )
    return table


def main() -> None:
    """Record, train, evaluate and print the table of all methods that are done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/chunks"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--task", nargs="+", default=["lift"], help="tasks of the demonstrations and of the evaluation"
    )
    parser.add_argument("--demonstrations", type=int, default=500)
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="peak for the weights of the policy")
    parser.add_argument("--new-learning-rate", type=float, default=1e-3, help="peak for the new modules")
    parser.add_argument("--save-steps", type=int, default=25)
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--execute", type=int, nargs="+", default=[HORIZON], help="actions of a chunk to execute")
    options = parser.parse_args()
    frames = record(options.output / NAME, options.task, options.demonstrations)
    for method in options.methods:
        folder = options.output / method
        folder.mkdir(parents=True, exist_ok=True)
        train(method, frames, folder, options)
        executed = [1] if method == "autoregressive" else options.execute
        results = [asdict(evaluate(method, folder, options, execute)) for execute in executed]
        (folder / "results.json").write_text(json.dumps(results, indent=2))
    found = [options.output / method / "results.json" for method in METHODS]
    rows = [Result(**row) for file in found if file.exists() for row in json.loads(file.read_text())]
    Console(width=140).print(results_table(rows))


if __name__ == "__main__":
    main()
