"""Fine-tune a policy on a data set: adapters or whole weights, by a named recipe."""

import argparse
import dataclasses
from typing import Any

from .common import (
    add_data_arguments,
    checkpoint,
    file_or_folder,
    natural,
    positive,
    print_json,
    print_table,
    register_robots,
    setting,
    share,
    weight,
)


EXAMPLE = "finetune --model openvla/openvla-7b --data lab/kitchen --recipe lora --output outputs/kitchen"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=checkpoint, required=True, help="folder or Hub id of the base")
    parser.add_argument("--data", nargs="+", required=True,
                        help="folder or Hub id, or several: LeRobot, RLDS, or datasets with images")  # fmt: skip
    parser.add_argument("--weights", nargs="+", type=weight,
                        help="of several --data: each multiplies the number of frames (default: 1 each)")  # fmt: skip
    add_data_arguments(parser, nargs="+")
    parser.add_argument("--name", nargs="+", help="of the statistics in the checkpoint (default: the data set's)")
    names = "lora, lora-paper, qlora, full, last-layer, frozen-vision, sandwich"
    parser.add_argument("--recipe", default="lora", help=f"{names} (default: %(default)s)")
    parser.add_argument("--output", required=True, help="folder of the checkpoints and the result")
    parser.add_argument("--steps", type=positive, default=5000, help="(default: %(default)s)")
    parser.add_argument("--set", nargs="+", type=setting, metavar="NAME=VALUE",
                     help="fields of the recipe or of TrainingArguments, such as lora_rank=64")  # fmt: skip
    parser.add_argument("--eval-share", type=share, default=0.0, help="share of the episodes held out (default: none)")
    parser.add_argument("--eval-frames", type=positive, help="held-out frames of each evaluation (default: all)")
    parser.add_argument("--keep-best", nargs="?", const="loss", choices=("loss", "action_accuracy", "action_l1"),
                        help="end with the checkpoint that is best on the held-out episodes, and keep it "
                        "(by the loss, unless another figure is named)")  # fmt: skip
    parser.add_argument("--patience", type=positive, metavar="N",
                        help="stop after N evaluations without an improvement; implies --keep-best")  # fmt: skip
    parser.add_argument("--save-steps", type=positive, default=500, help="also of evaluation (default: %(default)s)")
    parser.add_argument("--logging-steps", type=positive, default=10, help="(default: %(default)s)")
    parser.add_argument("--keep", type=positive, default=2, help="checkpoints at a time (default: %(default)s)")
    parser.add_argument("--workers", type=natural, default=2, help="processes that read data (default: %(default)s)")
    parser.add_argument("--streaming", action="store_true", help="read the data as they come, and keep nothing")
    parser.add_argument("--shuffle-buffer", type=positive, default=10_000, help="of a stream (default: %(default)s)")
    parser.add_argument("--skip-bad-episodes", type=share, nargs="?", const=True, default=False, metavar="SHARE",
                     help="go on without episodes that can't be read, up to this share (default: 0.1)")  # fmt: skip
    parser.add_argument(
        "--statistics", type=file_or_folder, metavar="FILE", help="a ready dataset_statistics.json (default: computed)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last complete checkpoint in the output")
    parser.add_argument("--report-to", nargs="+", help="trackers of Trainer, such as tensorboard, trackio or wandb")
    parser.add_argument("--dry-run", action="store_true", help="say what would be trained and what it takes, and stop")


def run(args: argparse.Namespace) -> None:
    from accelerate import PartialState
    from transformers import AutoConfig, PrinterCallback

    import openvla_hf  # noqa: F401 - makes the Auto classes know OpenVLA

    from ..checkpoints.describe import refuse_adapter
    from ..data import load as load_frames
    from ..data import load_statistics
    from ..data.splits import dataset_name, sample_frames, split_parts
    from ..training.finetune import build_trainer, check_run
    from ..training.finetune import finetune as run_training
    from ..training.recipes import Recipe, cost_table, estimate_cost, recipe

    reading = read_options(args)
    refuse_adapter(args.model)
    register_robots(args)
    statistics = None if args.statistics is None else load_statistics(args.statistics)
    is_main = PartialState().is_main_process
    fields = {field.name for field in dataclasses.fields(Recipe)}
    settings = dict(args.set or ())
    chosen = recipe(args.recipe, **{name: value for name, value in settings.items() if name in fields})
    if (args.patience or args.keep_best or args.eval_frames) and not args.eval_share:
        raise ValueError("--patience, --keep-best and --eval-frames need held-out episodes: give --eval-share.")
    best = {"load_best_model_at_end": True, "metric_for_best_model": args.keep_best or "loss"}
    arguments = {
        "max_steps": args.steps,
        "save_steps": args.save_steps,
        "eval_strategy": "steps" if args.eval_share else "no",
        "eval_steps": args.save_steps,
        "logging_steps": args.logging_steps,
        "save_total_limit": args.keep,
        "dataloader_num_workers": args.workers,
        "report_to": args.report_to or "none",
        "disable_tqdm": args.json,
        # The count of evaluations without an improvement goes on where a resumed run left it.
        "restore_callback_states_from_checkpoint": args.patience is not None,
        **(best if args.patience or args.keep_best else {}),
    } | {name: value for name, value in settings.items() if name not in fields}
    check_run(
        args.model,
        args.output,
        chosen,
        resume=args.resume,
        patience=args.patience,
        run={"weights": args.weights},
        **arguments,
    )
    cost = estimate_cost(AutoConfig.from_pretrained(args.model), chosen)
    if is_main:
        print_table(cost_table(f"{args.recipe} on {args.model}", cost), stderr=True)
    if args.dry_run:
        if args.json and is_main:
            print_json({"recipe": args.recipe, **dataclasses.asdict(cost)})
        return
    parts = [
        load_frames(
            data,
            **options,
            streaming=args.streaming,
            shuffle_buffer=args.shuffle_buffer if args.streaming else 0,
            seed=chosen.seed,
        )
        for data, options in reading.items()
    ]
    names = [dataset_name(part) for part in parts]
    missing = [name for name in names if statistics is not None and name not in statistics]
    if missing:
        raise ValueError(
            f"{args.statistics} has no statistics of {missing[0]!r}. It has {', '.join(map(repr, statistics or ()))}: "
            "name the data set like one of them with --name, or give the file of this data set."
        )
    train_data, eval_data, held_out = split_parts(parts, args.weights, args.eval_share, chosen.seed)
    trainer = build_trainer(
        args.model,
        train_data,
        args.output,
        chosen,
        eval_data=sample_frames(eval_data, args.eval_frames, chosen.seed) if args.eval_frames else eval_data,
        run={
            "datasets": args.data,
            "weights": args.weights,
            "recipe": args.recipe,
            "reading": {
                data: record_robot(options, name) for (data, options), name in zip(reading.items(), names, strict=True)
            },
            "held_out": held_out,
        },
        patience=args.patience,
        norm_stats=statistics,
        **arguments,
    )
    if args.json:
        trainer.remove_callback(PrinterCallback)
    figures = run_training(trainer, resume=args.resume)
    if args.json and is_main:
        print_json({"output": args.output, "figures": figures})
    elif is_main:
        print(f"Fine-tuned: {args.output}")


def read_options(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Data set, as it was given -> the options of `load` that read it, each one for all data sets or one for each.

    Raises:
        ValueError: A data set is given twice, or the numbers of data sets and of options differ.
    """
    count = len(args.data)
    if len(set(args.data)) < count:
        raise ValueError("A data set is given twice in --data: give it once, with a higher weight in --weights.")
    given = {"weights": args.weights, "robot": args.robot, "camera": args.camera, "name": args.name}
    for option, values in given.items():
        if values is not None and len(values) != count and (len(values) > 1 or option in ("weights", "name")):
            raise ValueError(f"--{option} has {len(values)} values for {count} data sets: give one for each.")
    shared = {name: getattr(args, name) for name in ("split", "every", "drop_idle", "skip_bad_episodes")}
    robots, cameras, names = (
        [None] * count if values is None else values * (count // len(values))
        for values in (args.robot, args.camera, args.name)
    )
    return {
        data: {"robot": robot, "camera": camera, "name": name, **shared}
        for data, robot, camera, name in zip(args.data, robots, cameras, names, strict=True)
    }


def record_robot(options: dict[str, Any], dataset: str) -> dict[str, Any]:
    """Name the adapter that read a data set, where the options leave the choice to its name, and describe it."""
    from ..data.robots import describe_robot, resolve_robot

    robot = resolve_robot(options["robot"], dataset)
    return options | {"robot": robot.name, "adapter": describe_robot(robot)}
