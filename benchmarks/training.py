"""Measure the time and the peak memory of a training step, compared with plain `Trainer`, which computes all logits.

    python benchmarks/training.py                              # a small model, for any machine
    python benchmarks/training.py --random 7b --recipe lora    # openvla-7b's size with random weights, on a GPU

Each variant runs in its own process, so that its peak memory is measured separately. The variants take turns.
`--random 7b` also prints the share of the matrix rate: the model's operations per second (without those that
checkpointing repeats) divided by those of a large bfloat16 matrix product on the same device.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from openvla_hf.modeling.configuration_openvla import OpenVLAConfig
from openvla_hf.modeling.modeling_openvla import OpenVLAForActionPrediction
from openvla_hf.processing.image_processing_openvla import OpenVLAImageProcessor
from openvla_hf.processing.processing_openvla import OpenVLAProcessor
from openvla_hf.testing import BRIDGE_LIKE_STATS, fake_episode, tiny_config, tiny_processor, tiny_tokenizer
from openvla_hf.training.collator import ActionCollator
from openvla_hf.training.recipes import recipe
from openvla_hf.training.throughput import training_operations
from openvla_hf.training.trainer import ActionTrainer


WARM_UP_STEPS = 3
# Number of text tokens of a sample, with its action.
PROMPT_TOKENS = 40
# The small model has Llama's vocabulary size, so that computing all logits costs as much as for Llama at this width.
VOCABULARY = 32064
MATRIX_SIDE = 8192


@dataclass
class Measured:
    variant: str
    device: str
    samples_per_second: float
    step_seconds: float
    peak_gib: float
    matrix_share: float | None = None


class StepTimes(TrainerCallback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def build(size: str, device: str) -> tuple[OpenVLAForActionPrediction, OpenVLAProcessor]:
    tokenizer = tiny_tokenizer()
    if size == "small":
        config = tiny_config(tokenizer, image_size=224, vision_width=96, text_width=192, text_layers=4, heads=3)
        config.text_config.vocab_size = VOCABULARY
        processor = tiny_processor(tokenizer, config)
    else:
        config = OpenVLAConfig(
            vision_backbone_id="dinosiglip-vit-so-224px",
            text_config={},
            norm_stats={"tiny": {"action": BRIDGE_LIKE_STATS}},
        )
        processor = OpenVLAProcessor(OpenVLAImageProcessor(size=224), tokenizer, image_token_id=32001)
    with torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32 if size == "small" else torch.bfloat16)
        try:
            model = OpenVLAForActionPrediction(config)
        finally:
            torch.set_default_dtype(default)
    return model, processor


def measure(args: argparse.Namespace) -> Measured:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, processor = build(args.random, device)
    small = args.random == "small"
    chosen = recipe(
        args.recipe,
        batch_size=args.batch_size,
        augment=False,
        gradient_checkpointing=args.gradient_checkpointing,
        **({"dtype": "float32"} if small else {}),
    )
    prepared = chosen.prepare(model)
    of_sample, of_token = training_operations(prepared)
    tokens = model.config.num_image_tokens + PROMPT_TOKENS
    flops = args.batch_size * (of_sample + of_token * tokens)
    collator = ActionCollator(
        processor, model.action_tokenizer, model.get_action_stats(), model.config.prompt_suffix_token_id
    )
    trainer_class = ActionTrainer if args.variant == "ours" else Trainer
    with tempfile.TemporaryDirectory() as output:
        steps = StepTimes()
        trainer = trainer_class(
            model=prepared,
            args=chosen.training_arguments(
                output, max_steps=WARM_UP_STEPS + args.steps, save_strategy="no", logging_strategy="no",
                disable_tqdm=True, dataloader_num_workers=args.workers,
            ),
            data_collator=collator,
            train_dataset=fake_episode(steps=(WARM_UP_STEPS + args.steps) * args.batch_size, size=224),
            callbacks=[steps],
        )  # fmt: skip
        trainer.train()
    durations = [after - before for before, after in zip(steps.times, steps.times[1:], strict=False)]
    seconds = statistics.median(durations[WARM_UP_STEPS - 1 :])
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
        share = None if small else flops / seconds / matrix_rate()
    else:
        peak, share = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, None
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return Measured(args.variant, name, args.batch_size / seconds, seconds, peak, share)


def matrix_rate() -> float:
    """Measure the operations per second of a large bfloat16 matrix product."""
    one, other = (torch.randn(MATRIX_SIDE, MATRIX_SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        one @ other
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(20):
        one @ other
    torch.cuda.synchronize()
    return 20 * 2 * MATRIX_SIDE**3 / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--random", choices=("small", "7b"), default="small", help="size of the model with random weights"
    )
    parser.add_argument("--recipe", default="lora")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=1, help="processes for each variant")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--variant", choices=("ours", "plain"), help="run only this variant, in this process")
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(asdict(measure(args))))
        return
    rows = []
    for _ in range(args.repeats):
        for variant in ("ours", "plain"):
            command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
            result = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
            if result.returncode:
                print(f"{variant}: {result.stderr.strip().splitlines()[-1]}")
                continue
            rows.append(json.loads(result.stdout.splitlines()[-1]))
            print(json.dumps(rows[-1]), flush=True)
    for variant in ("ours", "plain"):
        mine = [row for row in rows if row["variant"] == variant]
        if mine:
            seconds, peak = (statistics.median(row[key] for row in mine) for key in ("step_seconds", "peak_gib"))
            print(f"{variant:6} {seconds:7.3f} s/step  {args.batch_size / seconds:7.2f} samples/s  {peak:6.2f} GiB")


if __name__ == "__main__":
    main()
