"""What quantising changes: the actions of each format beside those of 16 bits, its memory, its time.

    results = compare("outputs/kitchen", ["4bit", "8bit"], frames)

A frame is a dict with `image` and `instruction`, as `openvla_hf.data` gives them.
"""

import functools
import gc
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.filesize import decimal
from rich.table import Table
from transformers import AutoConfig, AutoModel, AutoProcessor

from ..checkpoints.quantize import quantization, weight_bytes
from ..data.gripper import GRIPPER_OPEN
from ..modeling.quantized_loading import refuse_second
from .latency import peak_memory


FRAMES_APART = 5
"""Of the tabletop's frames, which change little from one to the next, one in so many is taken."""

Observation = Mapping[str, Any]


@dataclass
class Fidelity:
    """One format beside 16 bits, over the same observations.

    format: Name of the format; the first, "16-bit" unless a baseline is named, is what the others are compared with.
    towers: Whether the vision towers and the projector are quantised too.
    observations: How many.
    token_agreement: Share of the action tokens that are the same.
    action_agreement: Share of the observations whose tokens all are.
    l1: Mean absolute difference of each action dimension, in the robot's units.
    gripper_flips: Share of the observations that open what 16 bits close, or the reverse.
    success: Share of the tabletop episodes solved; `None` without episodes.
    lost: Episodes solved in 16 bits and not in this format.
    won: Episodes solved in this format and not in 16 bits.
    weight_bytes: Of the weights and scales.
    peak_bytes: The weights, and the most that predicting holds beside them; `None` where nobody counts.
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
        return f"{self.format} + towers" if self.towers else self.format


@dataclass
class _Answers:
    token_ids: np.ndarray
    actions: np.ndarray
    latency: float


def tabletop_observations(count: int, first_seed: int | None = None) -> Iterator[Observation]:
    """Frames of the expert's episodes on the tabletop, from unseen seeds on."""
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


def _answer(
    model: Any,
    processor: Any,
    observations: Sequence[Observation],
    unnorm_key: str | None,
    tell: Callable[[], None] = lambda: None,
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


def _solve(
    model: Any, processor: Any, episodes: int, unnorm_key: str | None, tell: Callable[[], None]
) -> dict[int, bool]:
    """Seed of the episode -> whether it is solved."""
    if not episodes:
        return {}
    from ..tabletop.rollouts import FIRST_UNSEEN_SEED, load_policy, run_episodes

    seeds = range(FIRST_UNSEEN_SEED, FIRST_UNSEEN_SEED + episodes)
    solved = {}
    for episode in run_episodes(load_policy(model, processor, unnorm_key), seeds):
        solved[episode.seed] = episode.success
        tell()
    return solved


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
    """Predict the same observations in 16 bits and in each format.

    Args:
        checkpoint: Folder or Hub id of a 16- or 32-bit policy.
        formats: Names that `openvla_hf.checkpoints.quantize.quantization` knows.
        observations: Frames with `image` and `instruction`.
        towers: Whether to quantise the vision towers and the projector too; both values give a row each.
        unnorm_key: Whose statistics give the robot's units, if the policy knows several.
        device: Such as "cuda"; by default the first GPU, or the CPU where there is none.
        dtype: Of the arithmetic and of what is not quantised; with float32, formats are compared with 32 bits.
        episodes: Of the tabletop, to measure success.
        baseline: Format to compare the others with instead of 16 bits, for a GPU that can't hold those.
        on_progress: Called with the label of the format after each observation and each episode.

    Returns:
        16 bits (or the baseline) first, then one entry for each format and value of `towers`.

    Raises:
        ValueError: No observations, an unknown format, one that this machine can't run, or a quantised checkpoint.
        ImportError: A format's package is not installed.
    """
    frames = list(observations)
    if not frames:
        raise ValueError("There is nothing to compare on: give at least one observation.")
    refuse_second(checkpoint, getattr(AutoConfig.from_pretrained(checkpoint), "quantization_config", None))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    first = baseline or f"{8 * dtype.itemsize}-bit"
    variants = [(first, False), *itertools.product(formats, towers)]
    # All of them before the first is loaded: what can't run is said at once.
    configs = [
        quantization(baseline, dtype=dtype) if baseline else None,
        *(quantization(name, towers=each, dtype=dtype) for name, each in variants[1:]),
    ]
    processor = AutoProcessor.from_pretrained(checkpoint)
    results: list[Fidelity] = []
    expected: _Answers | None = None
    should_solve: dict[int, bool] = {}
    for (name, with_towers), config in zip(variants, configs, strict=True):
        model = AutoModel.from_pretrained(checkpoint, dtype=dtype, device_map=device, quantization_config=config)
        tell = functools.partial(on_progress, f"{name} + towers" if with_towers else name)
        answer = functools.partial(_answer, model, processor, unnorm_key=unnorm_key)
        answer(frames[:1])  # what the first call makes, and later ones use, is no part of a format
        beside = peak_memory(functools.partial(answer, frames[:1]), model.device)
        answers = answer(frames, tell=tell)
        solved = _solve(model, processor, episodes, unnorm_key, tell)
        if not results:
            expected, should_solve = answers, solved
        assert expected is not None  # the first answers are
        # Dimensions that the statistics leave as they are: open or closed, no distance.
        gripper = ~np.asarray(model.get_action_stats(unnorm_key).get("mask", True), dtype=bool)
        gripper = np.broadcast_to(gripper, answers.actions.shape[1:])
        same = answers.token_ids == expected.token_ids
        opened, should_open = (one.actions[:, gripper] > GRIPPER_OPEN for one in (answers, expected))
        weights = weight_bytes(model)
        results.append(
            Fidelity(
                format=name,
                towers=with_towers,
                observations=len(frames),
                token_agreement=float(same.mean()),
                action_agreement=float(same.all(axis=1).mean()),
                l1=np.abs(answers.actions - expected.actions).mean(axis=0).tolist(),
                gripper_flips=float((opened != should_open).any(axis=1).mean()),
                success=float(np.mean(list(solved.values()))) if solved else None,
                lost=sum(should_solve[seed] and not solved[seed] for seed in solved) if solved else None,
                won=sum(solved[seed] and not should_solve[seed] for seed in solved) if solved else None,
                weight_bytes=weights,
                peak_bytes=None if beside is None else weights + max(beside, 0),
                latency=answers.latency,
            )
        )
        del model, answer
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return results


def table(results: Sequence[Fidelity], names: Sequence[str]) -> Table:
    """The figures for a person, a format a column; `names` are those of the action dimensions."""

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
        results: Of `compare`.
        path: Such as `fidelity.png`.
        names: Of the action dimensions.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ModuleNotFoundError as error:
        raise ImportError("The plot needs matplotlib: run `pip install matplotlib`.") from error
    baseline, *quantized = results
    figure = Figure(figsize=(11, 4), layout="constrained")
    memory, difference = figure.subplots(1, 2, width_ratios=(2, 3))
    for place, result in enumerate(results):
        megabytes = result.weight_bytes / 1e6
        # Rings of different sizes: none covers another, even where the figures are equal.
        ring = {"s": 45 * (len(results) - place), "facecolors": "none", "edgecolors": f"C{place}", "linewidths": 2}
        memory.scatter(megabytes, 100 * result.token_agreement, **ring)
        if result.success is not None:
            memory.scatter(megabytes, 100 * result.success, marker="s", **ring)
    memory.margins(x=0.12, y=0.12)
    memory.set(xlabel="weights (MB)", ylabel="%")
    memory.set_title(
        f"○  tokens as in {baseline.format}" + ("   □  episodes solved" if baseline.success is not None else ""),
        fontsize=10,
    )
    for place, result in enumerate(quantized, start=1):
        shift = (place - len(results) / 2) / (2 * len(results))
        difference.scatter(np.arange(len(names)) + shift, result.l1, color=f"C{place}", clip_on=False, zorder=3)
    difference.set_xticks(range(len(names)), names)
    difference.set_title("L1, in the robot's units", fontsize=10)
    # Metres and radians are far apart: a logarithm, that ends in a linear part so that 0 has a place.
    if positive := [value for result in quantized for value in result.l1 if value > 0]:
        difference.set_yscale("symlog", linthresh=min(positive), linscale=0.5)
    difference.margins(y=0.1)
    difference.set_ylim(bottom=0)
    difference.grid(axis="y", alpha=0.3)
    handles = [Line2D([], [], color=f"C{place}", marker="o", linestyle="none") for place in range(len(results))]
    labels = [result.label for result in results]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(results), fontsize=8)
    figure.savefig(path, dpi=120)


__all__ = ["Fidelity", "compare", "plot", "table", "tabletop_observations"]
