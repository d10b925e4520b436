"""Repeat claims of the OpenVLA paper with small policies on the tabletop.

    python benchmarks/claims.py distractor                      # one claim
    python benchmarks/claims.py distractor quantisation lora    # several, one after the other
    python benchmarks/claims.py lora --steps 4 --episodes 2 --output outputs/trial    # a quick trial

- distractor: the shipped policy moves the object that the instruction names, and not the other one.
- quantisation: the shipped policy in 16 and 32 bits, and with 8-bit and 4-bit weights.
- lora: the shipped policy learns `lift` in full and with adapters.
- data: the shipped policy and an untrained one learn `lift` from 10 to 500 demonstrations.
- towers: policies with two towers and with a single, wider tower are trained from scratch, with three seeds each.

All policies of a claim play the same unseen episodes. Each row is printed and written to claims.json as soon as it is
measured. Running a command again skips what is finished and continues a training or an evaluation that was killed.
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoProcessor, set_seed

from openvla_hf.checkpoints.quantize import quantization, weight_bytes
from openvla_hf.data import load, write_lerobot
from openvla_hf.data.optional_packages import import_extra
from openvla_hf.evaluation.open_loop import evaluate_open_loop
from openvla_hf.evaluation.suites import Evaluation
from openvla_hf.new_folder import new_folder
from openvla_hf.suites.journal import read_journal
from openvla_hf.suites.play import play
from openvla_hf.suites.policies import model_policy
from openvla_hf.suites.results import compare_results, wilson
from openvla_hf.suites.simulator import open_simulators
from openvla_hf.suites.suite import Policy as PolicyFunction
from openvla_hf.tabletop.expert import record_demonstrations
from openvla_hf.tabletop.rollouts import CONDITIONS, FIRST_UNSEEN_SEED, TABLETOP_POLICY
from openvla_hf.tabletop.suite import tabletop_suite
from openvla_hf.tabletop.train_policy import UNNORM_KEY, TrainPolicyArguments, build
from openvla_hf.tabletop.train_policy import train as train_policy
from openvla_hf.training.checkpoint_saving import last_checkpoint
from openvla_hf.training.finetune import FinetuneArguments, TrainingData, build_trainer
from openvla_hf.training.finetune import train as run_trainer


READING = {"robot": "tabletop", "name": UNNORM_KEY}
# Beyond the seeds of the evaluation's episodes.
FIRST_HELD_OUT_SEED = FIRST_UNSEEN_SEED + 500_000
BATCH_SIZE = 32
SETTINGS: dict[str, Any] = {
    "batch_size": BATCH_SIZE,
    "dtype": "float32",
    "lr_scheduler_type": "cosine",
    "warmup_steps": 30,
    "augment": False,
    "logging_steps": 25,
    "save_steps": 50,
    "save_total_limit": 1,
    "dataloader_num_workers": 0,
}
# With a higher rate, training in full forgets what the shipped policy knows. Adapters and random weights need it.
FULL_RATE, NEW_RATE = 3e-4, 1e-3
# Rank 2 trains about the share of the parameters that rank 32 trains in openvla-7b. OpenVLA's alpha is the rank, up to
# 16.
RANKS = (32, 2)
LARGEST_ALPHA = 16
SIZES = (10, 25, 50, 100, 500)
SEEDS = (0, 1, 2)
PUT_AND_PUSH, LIFT = ("put", "push"), ("lift",)


@dataclass
class Row:
    """One policy, or one condition, of a claim.

    Attributes:
        name: Name in the table.
        episodes: Number of unseen episodes.
        solved: Number of episodes solved.
        success: Share of the episodes solved.
        low: Lower end of Wilson's 95% interval of `success`.
        high: Upper end of this interval.
        cpu_seconds: CPU time of the training and the evaluation.
        figures: Further figures of the claim: counts, and shares in [0, 1].
    """

    name: str
    episodes: int
    solved: int
    success: float = field(init=False)
    low: float = field(init=False)
    high: float = field(init=False)
    cpu_seconds: float
    figures: dict[str, Any]

    def __post_init__(self) -> None:
        self.success = self.solved / self.episodes
        self.low, self.high = wilson(self.solved, self.episodes)


@dataclass(frozen=True)
class Policy:
    """A policy to evaluate.

    Attributes:
        name: Name of its files.
        source: Its folder.
        dtype: Type of the weights that are not quantised.
        bits: Format of `quantization`, or `None`.
        training: Figures of its training.
    """

    name: str
    source: Path
    dtype: torch.dtype = torch.float32
    bits: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> tuple[Any, Any]:
        config = None if self.bits is None else quantization(self.bits, dtype=self.dtype)
        model = AutoModel.from_pretrained(self.source, dtype=self.dtype, quantization_config=config)
        return model, AutoProcessor.from_pretrained(self.source)


SHIPPED = Policy("shipped", TABLETOP_POLICY)


class Workbench:
    """The folder of all claims, in which nothing is measured twice.

    Args:
        output: The folder.
        episodes: Unseen episodes for each evaluation.
        steps: Optimizer steps of each training, instead of the claim's own number.
        held_out: Demonstrations on which the tokens of trained policies are compared.
    """

    def __init__(self, output: Path, episodes: int, steps: int | None, held_out: int) -> None:
        self.output, self.episodes, self.steps, self.held_out = output, episodes, steps, held_out
        (output / "policies").mkdir(parents=True, exist_ok=True)

    # Trained policies

    def finetune(self, model: Path, recipe: str, demonstrations: int, steps: int, **settings: Any) -> Policy:
        """Fine-tune a policy on demonstrations of `lift`."""
        steps = self.steps or steps
        changed = "-".join(f"{name.removeprefix('lora_')}{value}" for name, value in sorted(settings.items()))
        start = "shipped" if model == TABLETOP_POLICY else model.name
        name = f"{start}-{demonstrations}-{recipe}-{steps}-{changed}"

        def train(folder: Path) -> dict[str, Any]:
            resume = last_checkpoint(str(folder)) is not None
            arguments = FinetuneArguments(
                model=model,
                data=TrainingData(self.record(LIFT, demonstrations), READING),
                output=folder,
                recipe=recipe,
                settings=SETTINGS | {"max_steps": steps, "warmup_steps": min(30, steps // 10)} | settings,
                resume=resume,
            )
            trainer = build_trainer(arguments)
            run_trainer(trainer, resume=resume)
            return {"trained": sum(one.numel() for one in trainer.model.parameters() if one.requires_grad)}

        return self._learn(name, train, LIFT)

    def train_from_scratch(self, towers: int, seed: int, steps: int) -> Policy:
        """Train a policy to put and push as the shipped one was trained, a fifth of the steps in the first phase."""
        steps = self.steps or steps
        seeing = max(1, steps // 5)

        def train(folder: Path) -> dict[str, Any]:
            arguments = TrainPolicyArguments(
                output=str(folder), seeing_steps=seeing, steps=steps - seeing, towers=towers, seed=seed, workers=0,
                save_steps=50,
            )  # fmt: skip
            train_policy(arguments)
            model = AutoModel.from_pretrained(folder)
            return {"parameters": sum(one.numel() for one in model.parameters())}

        return self._learn(f"towers{towers}-{steps}-seed{seed}", train, PUT_AND_PUSH)

    def untrained(self) -> Path:
        """Write the shipped policy's network with random weights."""
        folder = self.output / "policies" / "untrained"
        if not folder.exists():
            arguments = TrainPolicyArguments()
            set_seed(arguments.seed)
            with new_folder(folder) as aside:
                for part in build(arguments):
                    part.save_pretrained(aside)
        return folder

    def record(self, tasks: Sequence[str], count: int, first_seed: int = 0) -> Path:
        """Record the expert's demonstrations; those of a smaller number are the first of a larger one."""
        folder = self.output / "demonstrations" / f"{'-'.join(tasks)}-{first_seed}-{count}"
        if not folder.exists():
            folder.parent.mkdir(exist_ok=True)
            write_lerobot(record_demonstrations(tasks, range(first_seed, first_seed + count)), folder)
        return folder

    def _learn(self, name: str, train: Callable[[Path], dict[str, Any]], tasks: Sequence[str]) -> Policy:
        """Train a policy unless it is trained, and compare its tokens with held-out demonstrations."""
        folder, result = self.output / "policies" / name, self.output / "policies" / f"{name}.json"
        if not result.exists():
            with self._count_time(name) as spent:
                print(f"training {name}", file=sys.stderr, flush=True)
                with redirect_stdout(sys.stderr):  # the trainer prints its figures
                    figures = train(folder)
                frames = load(self.record(tasks, self.held_out, FIRST_HELD_OUT_SEED), **READING)
                report = evaluate_open_loop(*Policy(name, folder).load(), frames, batch_size=BATCH_SIZE)
                figures["held-out tokens"] = report.token_accuracy
            write_json(result, figures | {"cpu_seconds": spent()})
        return Policy(name, folder, training=json.loads(result.read_text(encoding="utf-8")))

    # Evaluation

    def evaluate(
        self,
        policy: Policy,
        label: str,
        tasks: Sequence[str] = PUT_AND_PUSH,
        condition: str = "as told",
        **figures: Any,
    ) -> tuple[Row, Path]:
        """Play the episodes that are missing. Return the row, and the folder of the episodes."""
        suite = tabletop_suite(families=tuple(tasks), condition=condition, observed=None, state=False)
        suite = suite.with_protocol(episodes=self.episodes)
        folder = self.output / "evaluations" / "-".join([policy.name, *tasks, condition.replace(" ", "-")])
        evaluation = Evaluation(suite, {"model": policy.name, "unnorm_key": None}, folder, pictures=0)
        with self._count_time(folder.name) as spent:
            if evaluation.missing:
                print(f"evaluating {folder.name}", file=sys.stderr, flush=True)
                acting: PolicyFunction = model_policy(suite, *policy.load())
                if condition == "black":
                    acting = remember(acting)
                with open_simulators(suite, 16, processes=False) as simulators:
                    for _ in evaluation.play(lambda episodes, keep: play(acting, episodes, simulators, keep)):
                        pass
                evaluation.result()
        rollouts = evaluation.rollouts
        seconds = spent() + policy.training.get("cpu_seconds", 0.0)
        learned = {name: one for name, one in policy.training.items() if name != "cpu_seconds"}
        solved = sum(one.success for one in rollouts)
        return Row(label, len(rollouts), solved, round(seconds, 1), learned | figures), folder

    @contextmanager
    def _count_time(self, name: str) -> Iterator[Callable[[], float]]:
        """Add the CPU time of the block to that of earlier runs, and yield a function that returns the sum."""
        file = self.output / "cpu_seconds" / name
        before = float(file.read_text(encoding="utf-8")) if file.exists() else 0.0
        start = time.process_time()

        def spent() -> float:
            return before + time.process_time() - start

        try:
            yield spent
        finally:
            file.parent.mkdir(exist_ok=True)
            file.write_text(f"{spent():.1f}", encoding="utf-8")


def remember(acting: PolicyFunction) -> PolicyFunction:
    """Predict once for each instruction, for observations that are all equal, such as black images."""
    known: dict[str, np.ndarray] = {}

    def act(observations: Sequence[Any], instructions: Sequence[str]) -> np.ndarray:
        if new := {told: seen for told, seen in zip(instructions, observations, strict=True) if told not in known}:
            known.update(zip(new, acting(list(new.values()), list(new)), strict=True))
        return np.stack([known[told] for told in instructions])

    return act


def pair(row: Row, first: Path, folder: Path) -> Row:
    """Add to a row the comparison with the first policy: episodes lost and won, and the difference in success."""
    one = compare_results(read_journal(first)[1], read_journal(folder)[1])["all"]
    row.figures |= {"lost": one.only_first, "won": one.only_second, "p (McNemar)": f"{one.p_value:.2g}"}
    row.figures |= {"difference": one.difference, "difference, low": one.low, "difference, high": one.high}
    return row


# Claims: each yields its rows as they are measured


def distractor(bench: Workbench) -> Iterator[Row]:
    first: Path | None = None
    for condition in CONDITIONS:
        row, folder = bench.evaluate(SHIPPED, condition, condition=condition)
        rollouts = read_journal(folder)[1]
        others = sum(one.moved_object is not None and not one.moved_target for one in rollouts.values())
        low, high = wilson(others, row.episodes)
        row.figures |= {
            "named object moved": sum(bool(one.moved_target) for one in rollouts.values()) / row.episodes,
            "another object moved": others / row.episodes,
            "another, low": low,
            "another, high": high,
        }
        if first is not None:
            both = compare_results(read_journal(first)[1], rollouts)["all"].both
            row.figures["solved as told too"] = both / row.episodes
        first = first or folder
        yield row


def quantisation(bench: Workbench) -> Iterator[Row]:
    policies = {
        "bfloat16": Policy("bfloat16", TABLETOP_POLICY, torch.bfloat16),
        "32 bits": SHIPPED,
        "8bit": Policy("8bit", TABLETOP_POLICY, bits="8bit"),
        "4bit": Policy("4bit", TABLETOP_POLICY, bits="4bit"),
    }
    first: Path | None = None
    for label, policy in policies.items():
        row, folder = bench.evaluate(policy, label, **{"weights, bytes": weight_bytes(policy.load()[0])})
        yield row if first is None else pair(row, first, folder)
        first = first or folder


def lora(bench: Workbench) -> Iterator[Row]:
    policy = bench.finetune(TABLETOP_POLICY, "full", 500, 600, learning_rate=FULL_RATE)
    everything = policy.training["trained"]
    row, first = bench.evaluate(policy, "full", LIFT, share=1.0)
    yield row
    for rank in RANKS:
        settings = {"lora_rank": rank, "lora_alpha": min(rank, LARGEST_ALPHA), "learning_rate": NEW_RATE}
        policy = bench.finetune(TABLETOP_POLICY, "lora", 500, 600, **settings)
        share = policy.training["trained"] / everything
        row, folder = bench.evaluate(policy, f"lora, rank {rank}", LIFT, share=share)
        yield pair(row, first, folder)


def data(bench: Workbench) -> Iterator[Row]:
    for size in SIZES:
        policy = bench.finetune(TABLETOP_POLICY, "full", size, 300, learning_rate=FULL_RATE)
        row, first = bench.evaluate(policy, f"fine-tuned, {size}", LIFT, demonstrations=size)
        yield row
        policy = bench.finetune(bench.untrained(), "full", size, 300, learning_rate=NEW_RATE)
        row, folder = bench.evaluate(policy, f"from scratch, {size}", LIFT, demonstrations=size)
        yield pair(row, first, folder)


def towers(bench: Workbench) -> Iterator[Row]:
    for seed in SEEDS:
        first: Path | None = None
        for count in (2, 1):
            policy = bench.train_from_scratch(count, seed, 900)
            row, folder = bench.evaluate(policy, f"{count} tower{'s' * (count > 1)}, seed {seed}")
            yield row if first is None else pair(row, first, folder)
            first = first or folder


CLAIMS = {one.__name__: one for one in (distractor, quantisation, lora, data, towers)}


# Results


def write_rows(output: Path, claim: str, rows: Sequence[Row]) -> None:
    """Write the rows of a claim to claims.json, and keep those of other claims."""
    file = output / "claims.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    write_json(file, known | {claim: [asdict(row) for row in rows]})


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a file as a whole, so that a run which is killed leaves none or the earlier one."""
    written = file.with_name(f"{file.name}.new")
    written.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    written.replace(file)


def claim_table(claim: str, rows: Sequence[Row]) -> Table:
    table = Table(title=claim)
    figures = list(dict.fromkeys(name for row in rows for name in row.figures))
    for column in ("", "success", "95% interval", *figures, "CPU s"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        cells = [_cell(row.figures.get(name, "")) for name in figures]
        interval = f"{row.low:.1%} to {row.high:.1%}"
        table.add_row(row.name, f"{row.success:.1%} of {row.episodes}", interval, *cells, f"{row.cpu_seconds:.0f}")
    return table


def _cell(value: Any) -> str:
    return f"{value:.1%}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value


def plot_data(rows: Sequence[Row], path: Path) -> None:
    """Draw success over the number of demonstrations, with intervals."""
    import_extra("matplotlib", "data").rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "claims"})
    figure = import_extra("matplotlib.figure", "data").Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for start in ("fine-tuned", "from scratch"):
        chosen = [row for row in rows if row.name.startswith(start)]
        shares = [100 * row.success for row in chosen]
        errors = [
            [100 * (row.success - row.low) for row in chosen],
            [100 * (row.high - row.success) for row in chosen],
        ]
        sizes = [row.figures["demonstrations"] for row in chosen]
        axes.errorbar(sizes, shares, yerr=errors, marker="o", capsize=3, label=start)
    axes.set(xscale="log", xticks=SIZES, xticklabels=SIZES, ylim=(-3, 103))
    axes.set(xlabel="demonstrations of lift", ylabel="success, %")
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="+", choices=CLAIMS, metavar="CLAIM", help=f"one of {', '.join(CLAIMS)}")
    parser.add_argument("--output", type=Path, default=Path("outputs/claims"), help="folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="optimizer steps of each training (default: the claim's own)")
    parser.add_argument(
        "--episodes", type=int, default=200, help="unseen episodes for each policy (default: %(default)s)"
    )
    parser.add_argument(
        "--held-out", type=int, default=50, help="demonstrations to compare tokens on (default: %(default)s)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object on standard output, and nothing else"
    )
    args = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    # A run that is ended by `kill` still writes its CPU time.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    bench = Workbench(args.output, args.episodes, args.steps, args.held_out)
    results: dict[str, list[Row]] = {}
    for claim in args.claims:
        rows = results[claim] = []
        for row in CLAIMS[claim](bench):
            rows.append(row)
            write_rows(args.output, claim, rows)
            print(f"{claim}, {row.name}: {row.solved} of {row.episodes}", file=sys.stderr, flush=True)
        if claim == "data":
            plot_data(rows, args.output / "data.svg")
        if not args.json:
            Console(width=180).print(claim_table(claim, rows))
    if args.json:
        print(json.dumps({claim: [asdict(row) for row in rows] for claim, rows in results.items()}))


if __name__ == "__main__":
    main()
