"""Success rates with their intervals, and the comparison of two policies on the same episodes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from .suite import Episode, Rollout


__all__ = [
    "Comparison",
    "compare_results",
    "comparison_table",
    "mcnemar",
    "newcombe",
    "success_by_task",
    "success_table",
    "wilson",
]

# Quantile of the normal distribution for an interval of 95%.
Z = 1.959964
ALL = "all"


def wilson(successes: int, episodes: int) -> tuple[float, float]:
    """Return Wilson's 95% interval of a success rate, (0, 1) without episodes."""
    if not episodes:
        return 0.0, 1.0
    rate, weight = successes / episodes, Z**2 / episodes
    centre = rate + weight / 2
    half = Z * math.sqrt(rate * (1 - rate) / episodes + weight / (4 * episodes))
    low, high = (centre - half) / (1 + weight), (centre + half) / (1 + weight)
    return max(0.0, low), min(1.0, high)


def success_by_task(rollouts: Iterable[Rollout]) -> dict[str, dict[str, float]]:
    """Return a row for each task, and one for all of them at the end.

    Returns:
        `{task: {"episodes", "success", "low", "high", "moved_target", "steps"}}`. Rates are in [0, 1], `low` and
        `high` are Wilson's 95% interval, and `steps` is a mean. Only the tabletop has `moved_target`.
    """
    groups: dict[str, list[Rollout]] = {}
    everything = list(rollouts)
    for rollout in everything:
        groups.setdefault(rollout.task, []).append(rollout)
    return {task: _summarize(group) for task, group in [*sorted(groups.items()), (ALL, everything)] if group}


def _summarize(rollouts: Sequence[Rollout]) -> dict[str, float]:
    successes = sum(one.success for one in rollouts)
    low, high = wilson(successes, len(rollouts))
    moved: list[Any] = [one.moved_target for one in rollouts]
    return {
        "episodes": len(rollouts),
        "success": successes / len(rollouts),
        "low": low,
        "high": high,
        **({} if None in moved else {"moved_target": float(np.mean(moved))}),
        "steps": float(np.mean([one.steps for one in rollouts])),
    }


def success_table(title: str, results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """Make a table of `{condition: success_by_task(...)}`."""
    moved_target = all("moved_target" in row for by_task in results.values() for row in by_task.values())
    table = Table(title=title)
    for column in ("condition", "task"):
        table.add_column(column)
    for column in ("episodes", "success", "95% interval", *["moved the named object"] * moved_target, "mean steps"):
        table.add_column(column, justify="right")
    for condition, by_task in results.items():
        for task, row in by_task.items():
            table.add_row(
                condition,
                task,
                f"{row['episodes']:.0f}",
                f"{row['success']:.1%}",
                f"{row['low']:.1%} to {row['high']:.1%}",
                *[f"{row['moved_target']:.1%}" for _ in range(moved_target)],
                f"{row['steps']:.1f}",
                style="bold" if task == ALL else None,
                end_section=task == ALL,
            )
    return table


@dataclass(frozen=True)
class Comparison:
    """Two policies on the same episodes.

    Attributes:
        episodes: Number of episodes.
        both: Episodes that both policies solved.
        only_first: Episodes that only the first policy solved.
        only_second: Episodes that only the second policy solved.
        neither: Episodes that neither policy solved.
        difference: Success rate of the second policy less that of the first, in [-1, 1].
        low: Lower end of the 95% interval of `difference` from `newcombe`.
        high: Upper end of this interval.
        p_value: Probability of a difference at least as large if both policies were equally good: McNemar's exact
            test, two-sided.
    """

    episodes: int
    both: int
    only_first: int
    only_second: int
    neither: int
    difference: float
    low: float
    high: float
    p_value: float


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the two-sided p-value of McNemar's exact test for two counts of episodes that one policy alone solved."""
    count, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(count, solved) for solved in range(fewer + 1)) / 2**count
    return min(1.0, 2 * tail)


def newcombe(both: int, only_first: int, only_second: int, neither: int) -> tuple[float, float]:
    """Return the 95% interval of the difference between two success rates on the same episodes, second less first.

    This is the hybrid of two Wilson intervals for paired data, without a correction for continuity, of Newcombe,
    "Improved confidence intervals for the difference between binomial proportions based on paired data", 1998. Unlike
    the usual normal approximation, it stays valid if few episodes differ, or none.
    """
    episodes = both + only_first + only_second + neither
    first, second = both + only_first, both + only_second
    first_low, first_high = (abs(end - first / episodes) for end in wilson(first, episodes))
    second_low, second_high = (abs(end - second / episodes) for end in wilson(second, episodes))
    scale = math.sqrt(first * second * (episodes - first) * (episodes - second))
    correlation = (both * neither - only_first * only_second) / scale if scale else 0.0

    def spread(one: float, other: float) -> float:
        return math.sqrt(one**2 - 2 * correlation * one * other + other**2)

    difference = (second - first) / episodes
    low, high = difference - spread(second_low, first_high), difference + spread(second_high, first_low)
    return max(-1.0, low), min(1.0, high)


def compare_results(first: Mapping[Episode, Rollout], second: Mapping[Episode, Rollout]) -> dict[str, Comparison]:
    """Compare two policies on each task, and on all tasks under "all".

    Raises:
        ValueError: The results are not of the same episodes.
    """
    if unpaired := first.keys() ^ second.keys():
        counted = "1 episode is" if len(unpaired) == 1 else f"{len(unpaired)} episodes are"
        raise ValueError(f"{counted} in only one of the results. Finish both evaluations with the same episodes.")
    groups: dict[str, list[tuple[bool, bool]]] = {}
    for episode in sorted(first):
        groups.setdefault(first[episode].task, []).append((first[episode].success, second[episode].success))
    groups[ALL] = [pair for pairs in groups.values() for pair in pairs]
    return {task: _compare(pairs) for task, pairs in groups.items()}


def _compare(pairs: Sequence[tuple[bool, bool]]) -> Comparison:
    both, only_first, only_second, neither = (
        pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))
    )
    low, high = newcombe(both, only_first, only_second, neither)
    return Comparison(
        episodes=len(pairs),
        both=both,
        only_first=only_first,
        only_second=only_second,
        neither=neither,
        difference=(only_second - only_first) / len(pairs),
        low=low,
        high=high,
        p_value=mcnemar(only_first, only_second),
    )


def comparison_table(title: str, names: tuple[str, str], results: Mapping[str, Comparison]) -> Table:
    """Make a table of `compare_results`, where `names` are those of the two policies. Differences are in points."""
    table = Table(title=title)
    table.add_column("task")
    first, second = names
    headings = ("episodes", *names, *[f"only {name}" for name in names], f"{second} - {first}", "95% interval", "p")
    for heading in headings:
        table.add_column(heading, justify="right")
    for task, one in results.items():
        rates = [(one.both + alone) / one.episodes for alone in (one.only_first, one.only_second)]
        table.add_row(
            task,
            str(one.episodes),
            *[f"{rate:.1%}" for rate in rates],
            str(one.only_first),
            str(one.only_second),
            f"{100 * one.difference:+.1f}",
            f"{100 * one.low:+.1f} to {100 * one.high:+.1f}",
            f"{one.p_value:.2g}",
            style="bold" if task == ALL else None,
        )
    return table
