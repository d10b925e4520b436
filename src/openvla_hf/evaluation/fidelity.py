"""What quantising changes: the actions of each format beside those of 16 bits, its memory, its time.

    results = compare("outputs/kitchen", ["4bit", "8bit"], frames)

A frame is a dict with `image` and `instruction`, as `openvla_hf.data` gives them.
"""

import gc
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModel, AutoProcessor

from ..modeling.quantized_loading import refuse_second
from ..quantization import quantization, weight_bytes


BASELINE = "16-bit"
GRIPPER_OPEN = 0.5
"""Above it a gripper is open."""
FRAMES_APART = 5
"""Of the tabletop's frames, which change little from one to the next, one in so many is taken."""

Observation = Mapping[str, Any]


@dataclass
class Fidelity:
    """One format beside 16 bits, over the same observations.

    format: Name of the format; "16-bit" is what the others are compared with.
    towers: Whether the vision towers and the projector are quantised too.
    observations: How many.
    token_agreement: Share of the action tokens that are the same.
    action_agreement: Share of the observations whose tokens all are.
    l1: Mean absolute difference of each action dimension, in the robot's units.
    gripper_flips: Share of the observations that open what 16 bits close, or the reverse.
    success: Share of the tabletop episodes solved; `None` without episodes.
    weight_bytes: Of the weights and scales.
    peak_bytes: Of the GPU's memory while it predicts; `None` on a CPU.
    latency: Median seconds of `predict_action` for one observation.
    """

    format: str
    towers: bool
    observations: int
    token_agreement: float
    action_agreement: float
    l1: list[float]
    gripper_flips: float
    success: float | None
    weight_bytes: int
    peak_bytes: int | None
    latency: float

    @property
    def label(self) -> str:
        """Name in tables and plots."""
        return f"{self.format} + towers" if self.towers else self.format


@dataclass
class _Answers:
    token_ids: np.ndarray
    actions: np.ndarray
    latency: float


def tabletop_observations(count: int, first_seed: int | None = None) -> Iterator[Observation]:
    """Frames of the expert's episodes on the tabletop, from unseen seeds on."""
    from .rollouts import FIRST_UNSEEN_SEED
    from .tabletop import TabletopEnv, rollout_expert

    seeds = itertools.count(FIRST_UNSEEN_SEED if first_seed is None else first_seed)
    frames = (
        frame
        for seed in seeds
        for frame in itertools.islice(rollout_expert(TabletopEnv(("put", "push")), seed), 0, None, FRAMES_APART)
    )
    for frame in itertools.islice(frames, count):
        yield {"image": frame.image, "instruction": frame.instruction}


def _answer(
    model: Any, processor: Any, observations: Sequence[Observation], unnorm_key: str | None, tell: Callable[[], None]
) -> _Answers:
    token_ids, actions, seconds = [], [], []
    for observation in observations:
        inputs = processor(observation["image"], instruction=observation["instruction"])
        start = time.perf_counter()
        details = model.predict_action(**inputs, unnorm_key=unnorm_key, return_details=True)
        seconds.append(time.perf_counter() - start)
        token_ids.append(details.token_ids[0])
        actions.append(details.actions[0])
        tell()
    return _Answers(np.stack(token_ids), np.stack(actions), float(np.median(seconds)))


def _success(model: Any, processor: Any, episodes: int, unnorm_key: str | None) -> float | None:
    if not episodes:
        return None
    from .rollouts import FIRST_UNSEEN_SEED, load_policy, run_episodes

    seeds = range(FIRST_UNSEEN_SEED, FIRST_UNSEEN_SEED + episodes)
    return float(np.mean([one.success for one in run_episodes(load_policy(model, processor, unnorm_key), seeds)]))


def compare(
    checkpoint: str | Path,
    formats: Sequence[str],
    observations: Iterable[Observation],
    *,
    towers: Sequence[bool] = (False,),
    unnorm_key: str | None = None,
    device: str | None = None,
    episodes: int = 0,
    on_progress: Callable[[str], None] = lambda label: None,
) -> list[Fidelity]:
    """Predict the same observations in 16 bits and in each format.

    Args:
        checkpoint: Folder or Hub id of a 16- or 32-bit policy.
        formats: Names that `openvla_hf.quantization.quantization` knows.
        observations: Frames with `image` and `instruction`.
        towers: Whether to quantise the vision towers and the projector too; both values give a row each.
        unnorm_key: Whose statistics give the robot's units, if the policy knows several.
        device: Such as "cuda"; by default the first GPU, or the CPU where there is none.
        episodes: Of the tabletop, to measure success.
        on_progress: Called with the label of the format after each observation.

    Returns:
        16 bits first, then one entry for each format and value of `towers`.

    Raises:
        ValueError: No observations, an unknown format, one that this machine can't run, or a quantised checkpoint.
        ImportError: A format's package is not installed.
    """
    frames = list(observations)
    if not frames:
        raise ValueError("There is nothing to compare on: give at least one observation.")
    refuse_second(checkpoint, getattr(AutoConfig.from_pretrained(checkpoint), "quantization_config", None))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    variants = [(BASELINE, False), *itertools.product(formats, towers)]
    # All of them before the first is loaded: what can't run is said at once.
    configs = [None if name == BASELINE else quantization(name, towers=each) for name, each in variants]
    processor = AutoProcessor.from_pretrained(checkpoint)
    results: list[Fidelity] = []
    expected: _Answers | None = None
    for (name, with_towers), config in zip(variants, configs, strict=True):
        model = AutoModel.from_pretrained(
            checkpoint, dtype=torch.bfloat16, device_map=device, quantization_config=config
        )
        on_gpu = model.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        result = Fidelity(name, with_towers, len(frames), 1.0, 1.0, [], 0.0, None, weight_bytes(model), None, 0.0)
        answers = _answer(model, processor, frames, unnorm_key, lambda: on_progress(result.label))  # noqa: B023
        expected = expected or answers
        # Dimensions that the statistics leave as they are: open or closed, no distance.
        gripper = ~np.asarray(model.get_action_stats(unnorm_key).get("mask", True), dtype=bool)
        gripper = np.broadcast_to(gripper, answers.actions.shape[1:])
        same = answers.token_ids == expected.token_ids
        opened, should_open = (one.actions[:, gripper] > GRIPPER_OPEN for one in (answers, expected))
        result.token_agreement = float(same.mean())
        result.action_agreement = float(same.all(axis=1).mean())
        result.l1 = np.abs(answers.actions - expected.actions).mean(axis=0).tolist()
        result.gripper_flips = float((opened != should_open).any(axis=1).mean())
        result.latency = answers.latency
        result.peak_bytes = torch.cuda.max_memory_allocated() if on_gpu else None
        result.success = _success(model, processor, episodes, unnorm_key)
        results.append(result)
        del model
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    return results


def plot(results: Sequence[Fidelity], path: str | Path, names: Sequence[str] | None = None) -> None:
    """Draw agreement against memory, and the difference of each action dimension, into an image file.

    Args:
        results: Of `compare`.
        path: Such as `fidelity.png`.
        names: Of the action dimensions.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError("The plot needs matplotlib: run `pip install matplotlib`.") from error
    figure = Figure(figsize=(11, 4), layout="constrained")
    memory, difference = figure.subplots(1, 2, width_ratios=(1, 2))
    for result in results:
        memory.scatter(result.weight_bytes / 1e9, 100 * result.token_agreement)
        memory.annotate(result.label, (result.weight_bytes / 1e9, 100 * result.token_agreement), fontsize=8)
    memory.set(xlabel="weights (GB)", ylabel="tokens as in 16 bits (%)")
    quantized = [result for result in results if result.format != BASELINE]
    width = 0.8 / max(1, len(quantized))
    for place, result in enumerate(quantized):
        difference.bar(np.arange(len(result.l1)) + place * width, result.l1, width, label=result.label)
    dimensions = len(results[0].l1)
    names = names if names is not None and len(names) == dimensions else [f"a{i}" for i in range(dimensions)]
    difference.set_xticks(np.arange(dimensions) + 0.4 - width / 2, names)
    # Where nothing differs there is nothing to take a logarithm of.
    scale = "log" if any(any(result.l1) for result in quantized) else "linear"
    difference.set(ylabel="mean difference (robot's units)", yscale=scale)
    if quantized:
        difference.legend(fontsize=8)
    figure.savefig(path, dpi=120)


__all__ = ["BASELINE", "Fidelity", "compare", "plot", "tabletop_observations"]
