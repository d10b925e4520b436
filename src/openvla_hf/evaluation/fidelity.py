"""Measure what quantising changes: each format's actions, memory and time, compared with 16 bits.

    results = compare("outputs/kitchen", ["4bit", "8bit"], frames)

A frame is a dict with `image` and `instruction`, as `openvla_hf.data` returns it.
"""

import gc
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.filesize import decimal
from rich.table import Table
from transformers import AutoConfig, AutoProcessor

from ..checkpoints.describe import describe
from ..checkpoints.quantize import quantization, weight_bytes
from ..data.gripper import GRIPPER_OPEN
from ..data.optional_packages import import_extra
from ..modeling.modeling_openvla import OpenVLAForActionPrediction
from ..modeling.quantized_loading import refuse_second
from .latency import peak_memory


# Take one in this many of the tabletop's frames, since consecutive frames differ little.
FRAMES_APART = 5

Observation = Mapping[str, Any]


@dataclass
class Fidelity:
    """One format compared with 16 bits, over the same observations.

    Attributes:
        format: Name of the format. The others are compared with the first: "16-bit", or the baseline if one is given.
        towers: Whether the vision towers and the projector are quantised too.
        observations: Number of observations.
        token_agreement: Share of the action tokens that are equal.
        action_agreement: Share of the observations whose action tokens are all equal.
        l1: Mean absolute difference of each action dimension, in the robot's units.
        gripper_flips: Share of the observations on which a gripper opens instead of closing, or the reverse.
        success: Share of the tabletop episodes solved; `None` without episodes.
        lost: Number of episodes solved in 16 bits but not in this format.
        won: Number of episodes solved in this format but not in 16 bits.
        weight_bytes: Bytes of the weights and scales.
        peak_bytes: Peak memory in bytes: the weights and what a prediction needs in addition; `None` if the latter
            cannot be counted.
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
    lost: int | None
    won: int | None
    weight_bytes: int
    peak_bytes: int | None
    latency: float

    @property
    def label(self) -> str:
        """Name in tables and plots."""
        return _label(self.format, self.towers)


def _label(name: str, towers: bool) -> str:
    return f"{name} + towers" if towers else name


def tabletop_observations(count: int, first_seed: int | None = None) -> Iterator[Observation]:
    """Yield `count` frames of the expert's episodes on the tabletop, with unseen seeds from `first_seed` on."""
    from ..tabletop.env import TabletopEnv
    from ..tabletop.expert import rollout_expert
    from ..tabletop.rollouts import FIRST_UNSEEN_SEED

    seeds = itertools.count(FIRST_UNSEEN_SEED if first_seed is None else first_seed)
    frames = (
        frame
        for seed in seeds
        for frame in itertools.islice(rollout_expert(TabletopEnv(("put", "push")), seed), 0, None, FRAMES_APART)
    )
    for frame in itertools.islice(frames, count):
        yield {"image": frame.image, "instruction": frame.instruction}


def compare(
    checkpoint: str | Path,
    formats: Sequence[str],
    observations: Iterable[Observation],
    *,
    towers: Sequence[bool] = (False,),
    unnorm_key: str | None = None,
    device: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    episodes: int = 0,
    baseline: str | None = None,
    on_progress: Callable[[str], None] = lambda label: None,
) -> list[Fidelity]:
    """Predict the actions of the same observations in 16 bits and in each format.

    Args:
        checkpoint: Folder or Hub id of a 16- or 32-bit policy.
        formats: Names that `openvla_hf.checkpoints.quantize.quantization` knows.
        observations: Frames with `image` and `instruction`.
        towers: Whether to quantise the vision towers and the projector too. Each value gives a row.
        unnorm_key: Name of the action statistics, if the policy has several.
        device: Device, such as "cuda"; by default the first GPU, or the CPU if there is none.
        dtype: Type of the arithmetic and of the weights that are not quantised. With float32, formats are compared
            with 32 bits.
        episodes: Number of tabletop episodes to measure success on.
        baseline: Format to compare the others with instead of 16 bits, for a GPU that is too small for 16-bit weights.
        on_progress: Called with the label of the format after each observation and each episode.

    Returns:
        16 bits (or the baseline) first, then one entry for each format and value of `towers`.

    Raises:
        ValueError: If there are no observations, a format is unknown or cannot run on this machine, or the checkpoint
            is already quantised or predicts chunks.
        ImportError: If the package of a format is not installed.
    """
    frames = list(observations)
    if not frames:
        raise ValueError("There are no observations to compare on: give at least one.")
    refuse_second(checkpoint, getattr(AutoConfig.from_pretrained(checkpoint), "quantization_config", None))
    if (describe(checkpoint).oft or {}).get("action_decoding") == "parallel":
        raise ValueError(
            f"A report compares the tokens of one action for each observation, but {checkpoint} predicts chunks of "
            "actions. Write the quantised checkpoint, and compare its success with that of the original instead."
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    # Make every config before the first model is loaded, so that a format that cannot run fails at once.
    first = baseline or f"{8 * dtype.itemsize}-bit"
    variants = [(first, False, quantization(baseline, dtype=dtype) if baseline else None)]
    for name, with_towers in itertools.product(formats, towers):
        variants.append((name, with_towers, quantization(name, towers=with_towers, dtype=dtype)))

    processor = AutoProcessor.from_pretrained(checkpoint)
    results: list[Fidelity] = []
    expected: _Measurement | None = None
    for name, with_towers, config in variants:
        model = OpenVLAForActionPrediction.from_pretrained(
            checkpoint, dtype=dtype, device_map=device, quantization_config=config
        )
        policy = _Policy(model, processor, unnorm_key, partial(on_progress, _label(name, with_towers)))
        measured = policy.measure(frames, episodes)
        expected = expected or measured
        results.append(_fidelity(name, with_towers, measured, expected))
        del model, policy
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return results


@dataclass
class _Measurement:
    """Results of one format on N observations with A action dimensions, and on the episodes.

    Attributes:
        token_ids: (N, A).
        actions: (N, A), in the robot's units.
        gripper: Which dimensions are grippers, (A,).
        solved: Seed of each episode -> whether it is solved.
        latency: Median seconds of a prediction.
        weight_bytes: Bytes of the weights and scales.
        activation_bytes: Bytes that a prediction needs in addition; `None` if they cannot be counted.
    """

    token_ids: np.ndarray
    actions: np.ndarray
    gripper: np.ndarray
    solved: dict[int, bool]
    latency: float
    weight_bytes: int
    activation_bytes: int | None


@dataclass
class _Policy:
    """A model in one format; `tell` is called after each observation and each episode."""

    model: Any
    processor: Any
    unnorm_key: str | None
    tell: Callable[[], None]

    def measure(self, frames: Sequence[Observation], episodes: int) -> _Measurement:
        """Predict the actions of all frames, and play the episodes."""
        self.predict(frames[0])  # builds caches that later calls share
        activations = peak_memory(partial(self.predict, frames[0]), self.model.device)
        token_ids, actions, seconds = [], [], []
        for frame in frames:
            details, duration = self.predict(frame)
            token_ids.append(details.token_ids[0])
            actions.append(details.actions[0])
            seconds.append(duration)
            self.tell()
        # Dimensions that are not normalised are grippers: open or closed, not a distance.
        normalised = np.asarray(self.model.get_action_stats(self.unnorm_key).get("mask", True), dtype=bool)
        return _Measurement(
            token_ids=np.stack(token_ids),
            actions=np.stack(actions),
            gripper=np.broadcast_to(~normalised, actions[0].shape),
            solved=self.solve(episodes),
            latency=float(np.median(seconds)),
            weight_bytes=weight_bytes(self.model),
            activation_bytes=None if activations is None else max(activations, 0),
        )

    def predict(self, frame: Observation) -> tuple[Any, float]:
        """Return the details of one prediction, and its duration in seconds."""
        inputs = self.processor(frame["image"], instruction=frame["instruction"])
        start = time.perf_counter()
        details = self.model.predict_action(**inputs, unnorm_key=self.unnorm_key, return_details=True)
        return details, time.perf_counter() - start

    def solve(self, episodes: int) -> dict[int, bool]:
        """Play unseen episodes of the tabletop: seed -> whether it is solved."""
        if not episodes:
            return {}
        from ..tabletop.rollouts import FIRST_UNSEEN_SEED, load_policy, run_episodes

        seeds = range(FIRST_UNSEEN_SEED, FIRST_UNSEEN_SEED + episodes)
        solved = {}
        for rollout in run_episodes(load_policy(self.model, self.processor, self.unnorm_key), seeds):
            solved[rollout.seed] = rollout.success
            self.tell()
        return solved


def _fidelity(name: str, towers: bool, measured: _Measurement, expected: _Measurement) -> Fidelity:
    """Compare the measurement of one format with that of 16 bits or the baseline."""
    same = measured.token_ids == expected.token_ids
    opened, should_open = (one.actions[:, expected.gripper] > GRIPPER_OPEN for one in (measured, expected))
    solved, should_solve = measured.solved, expected.solved
    activations = measured.activation_bytes
    return Fidelity(
        format=name,
        towers=towers,
        observations=len(measured.actions),
        token_agreement=float(same.mean()),
        action_agreement=float(same.all(axis=1).mean()),
        l1=np.abs(measured.actions - expected.actions).mean(axis=0).tolist(),
        gripper_flips=float((opened != should_open).any(axis=1).mean()),
        success=float(np.mean(list(solved.values()))) if solved else None,
        lost=sum(should_solve[seed] and not solved[seed] for seed in solved) if solved else None,
        won=sum(solved[seed] and not should_solve[seed] for seed in solved) if solved else None,
        weight_bytes=measured.weight_bytes,
        peak_bytes=None if activations is None else measured.weight_bytes + activations,
        latency=measured.latency,
    )


def table(results: Sequence[Fidelity], names: Sequence[str]) -> Table:
    """Make a table with one column for each format; `names` are those of the action dimensions."""

    def size(count: int | None) -> str:
        return "-" if count is None else decimal(count)

    rows = Table(title=f"{results[0].observations} observations, L1 in the robot's units")
    rows.add_column("")
    for result in results:
        rows.add_column(result.label, justify="right")
    figures: dict[str, Callable[[Fidelity], str]] = {
        "same tokens": lambda one: f"{one.token_agreement:.1%}",
        "same actions": lambda one: f"{one.action_agreement:.1%}",
        "gripper flips": lambda one: f"{one.gripper_flips:.1%}",
        "success": lambda one: "-" if one.success is None else f"{one.success:.1%}",
        "episodes lost, won": lambda one: "-" if one.success is None else f"{one.lost}, {one.won}",
        "weights": lambda one: size(one.weight_bytes),
        "peak memory": lambda one: size(one.peak_bytes),
        "action": lambda one: f"{1e3 * one.latency:.0f} ms",
    }
    for name, text in figures.items():
        rows.add_row(name, *map(text, results))
    rows.add_section()
    for dimension, name in enumerate(names):
        rows.add_row(f"L1 of {name}", *(f"{result.l1[dimension]:.4f}" for result in results))
    return rows


def plot(results: Sequence[Fidelity], path: str | Path, names: Sequence[str]) -> None:
    """Draw agreement and success against memory, and the difference of each action dimension, into an image file.

    Args:
        results: Results of `compare`.
        path: Image file, such as `fidelity.png`.
        names: Names of the action dimensions.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    matplotlib_figure = import_extra("matplotlib.figure", "quantize")
    baseline, *quantized = results
    figure = matplotlib_figure.Figure(figsize=(11, 4), layout="constrained")
    memory, difference = figure.subplots(1, 2, width_ratios=(2, 3))
    _plot_memory(memory, results)
    _plot_differences(difference, quantized, names)
    memory.set_title(
        f"○  tokens as in {baseline.format}" + ("   □  episodes solved" if baseline.success is not None else ""),
        fontsize=10,
    )
    lines = import_extra("matplotlib.lines", "quantize")
    handles = [lines.Line2D([], [], color=f"C{place}", marker="o", linestyle="none") for place in range(len(results))]
    labels = [result.label for result in results]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(results), fontsize=8)
    figure.savefig(path, dpi=120)


def _plot_memory(axes: Any, results: Sequence[Fidelity]) -> None:
    """Draw agreement and success against memory."""
    for place, result in enumerate(results):
        megabytes = result.weight_bytes / 1e6
        # Rings of different sizes, so that equal figures do not hide one another.
        ring = {"s": 45 * (len(results) - place), "facecolors": "none", "edgecolors": f"C{place}", "linewidths": 2}
        axes.scatter(megabytes, 100 * result.token_agreement, **ring)
        if result.success is not None:
            axes.scatter(megabytes, 100 * result.success, marker="s", **ring)
    axes.margins(x=0.12, y=0.12)
    axes.set(xlabel="weights (MB)", ylabel="%")


def _plot_differences(axes: Any, quantized: Sequence[Fidelity], names: Sequence[str]) -> None:
    """Draw the difference of each action dimension."""
    count = len(quantized) + 1
    for place, result in enumerate(quantized, start=1):
        shift = (place - count / 2) / (2 * count)
        axes.scatter(np.arange(len(names)) + shift, result.l1, color=f"C{place}", clip_on=False, zorder=3)
    axes.set_xticks(range(len(names)), names)
    axes.set_title("L1, in the robot's units", fontsize=10)
    # Metres and radians differ in magnitude, so the axis is logarithmic, with a linear part for 0.
    if positive := [value for result in quantized for value in result.l1 if value > 0]:
        axes.set_yscale("symlog", linthresh=min(positive), linscale=0.5)
    axes.margins(y=0.1)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)


__all__ = ["Fidelity", "compare", "plot", "table", "tabletop_observations"]
