"""Fine-tune a policy on demonstrations, with adapters or whole weights, by a named recipe."""

import argparse
import contextlib
import dataclasses
import gc
import sys
from typing import Any

from ..training.arguments import DEFAULT_SETTINGS, FinetuneArguments, TrainingData, TrainingMixture
from .common import (
    add_data_arguments,
    checkpoint,
    file,
    file_or_folder,
    natural,
    positive,
    print_json,
    print_table,
    refuse_options,
    register_robots,
    setting,
    share,
    weight,
)


EXAMPLE = """finetune --model openvla/openvla-7b --data lab/kitchen --recipe lora --output outputs/kitchen
  openvla-hf finetune --model openvla/openvla-7b --data lab/kitchen --output outputs/kitchen --dry-run
  openvla-hf finetune --model openvla/openvla-7b --mixture bridge_rt_1 --data-dir oxe --streaming \\
      --output outputs/bridge_rt_1 --dry-run --world-size 64 --count
  openvla-hf finetune --model openvla/openvla-7b --data lab/kitchen --output outputs/kitchen --resume
  openvla-hf finetune --model openvla/openvla-7b --data lab/kitchen lab/workshop --weights 1 2 \\
      --output outputs/both --eval-share 0.05 --patience 5 --set lora_rank=64 learning_rate=1e-4
  openvla-hf finetune --model openvla/openvla-7b --data lab/two_arms --recipe oft --output outputs/two_arms \\
      --cameras high left_wrist right_wrist --set action_horizon=25
  openvla-hf finetune --model openvla/openvla-7b --mixture bridge_rt_1 --data-dir oxe --streaming \\
      --output outputs/bridge_rt_1"""

# Option -> argument of `TrainingArguments` that it sets.
SETTINGS = {
    "steps": "max_steps",
    "save_steps": "save_steps",
    "logging_steps": "logging_steps",
    "keep": "save_total_limit",
    "workers": "dataloader_num_workers",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _add_data_arguments(parser.add_argument_group("data"))
    _add_run_arguments(parser.add_argument_group("run"))
    _add_evaluation_arguments(parser.add_argument_group("evaluation"))


def _add_data_arguments(group: Any) -> None:
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", nargs="+", metavar="DATA",
                        help="folder or Hub id of each dataset: LeRobot, RLDS, or datasets with images")  # fmt: skip
    source.add_argument("--mixture", metavar="NAME",
                        help="mixture of Open X-Embodiment, such as oxe_magic_soup_plus_minus, or a JSON or TOML file "
                        "with weights by dataset")  # fmt: skip
    group.add_argument("--data-dir", metavar="DIR", help="folder or URL with the folders of the mixture's datasets")
    group.add_argument("--allow-missing", action="store_true",
                       help="leave out datasets of the mixture that are missing or can't be trained on")  # fmt: skip
    group.add_argument("--weights", nargs="+", type=weight, metavar="WEIGHT",
                       help="factor on the number of frames, for each of several datasets (default: 1)")  # fmt: skip
    add_data_arguments(
        group,
        split=None,
        split_help="split of the datasets (default: train; of a mixture the episodes that the original trains on)",
        nargs="+",
    )
    group.add_argument("--cameras", nargs="+", metavar="CAMERA",
                       help="cameras that the policy sees, in order, for a recipe that takes several")  # fmt: skip
    group.add_argument("--name", nargs="+",
                       help="name of the dataset in the checkpoint's statistics (default: its own name)")  # fmt: skip
    group.add_argument("--statistics", type=file_or_folder, metavar="FILE",
                       help="dataset_statistics.json to use (default: computed from the data)")  # fmt: skip
    group.add_argument("--streaming", action="store_true", help="read the data as a stream, without storing a table")
    group.add_argument("--shuffle-buffer", type=positive, default=10_000, metavar="N",
                       help="number of frames that a stream is shuffled over (default: %(default)s)")  # fmt: skip
    group.add_argument("--skip-bad-episodes", type=share, nargs="?", const=True, default=False, metavar="SHARE",
                       help="skip episodes that can't be read, up to this share of all (default: 0.1)")  # fmt: skip


def _add_run_arguments(group: Any) -> None:
    group.add_argument("--model", type=checkpoint, required=True, help="folder or Hub id of the base model")
    group.add_argument("--output", required=True, metavar="FOLDER", help="folder for the checkpoints and the result")
    group.add_argument("--config", type=file, metavar="FILE",
                       help="TOML file with options; those of the command line override them")  # fmt: skip
    group.add_argument("--recipe", default=FinetuneArguments.recipe,
                       help="lora, lora-paper, qlora, full, last-layer, frozen-vision, sandwich, oft, oft-discrete, "
                       "oft-diffusion, openx or openx-small (default: %(default)s)")  # fmt: skip
    group.add_argument("--set", nargs="+", action="extend", type=setting, metavar="NAME=VALUE",
                       help="fields of the recipe or of TrainingArguments, such as lora_rank=64")  # fmt: skip
    helps = {
        "steps": "number of optimizer steps",
        "save_steps": "steps between checkpoints, and between evaluations",
        "logging_steps": "steps between logged figures",
        "keep": "number of checkpoints to keep",
    }
    for name, text in helps.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=positive, default=DEFAULT_SETTINGS[SETTINGS[name]],
                           metavar="N", help=f"{text} (default: %(default)s)")  # fmt: skip
    group.add_argument("--workers", type=natural, default=DEFAULT_SETTINGS["dataloader_num_workers"], metavar="N",
                       help="processes that read data (default: %(default)s)")  # fmt: skip
    group.add_argument("--resume", action="store_true", help="continue from the last complete checkpoint in --output")
    group.add_argument("--report-to", nargs="+", metavar="TRACKER",
                       help="trackers to log to, such as tensorboard, trackio or wandb (default: none)")  # fmt: skip
    group.add_argument("--matrix-rate", type=weight, metavar="N",
                       help="operations a second of a GPU for matrix products, such as 312e12, to log the used share "
                       "(default: from the data sheet, for known GPUs)")  # fmt: skip
    group.add_argument("--dry-run", action="store_true",
                       help="check the options and the first episode of each dataset, print the trained weights and "
                       "the memory, and stop")  # fmt: skip
    group.add_argument("--world-size", type=positive, metavar="N",
                       help="number of processes, one for each GPU. With --dry-run, plan the run on as many GPUs; "
                       "otherwise, stop if the number differs")  # fmt: skip
    group.add_argument("--shard-size", type=positive, metavar="N",
                       help="number of GPUs that shard the model, for --dry-run (default: all, as FSDP2)")  # fmt: skip
    group.add_argument("--throughput", type=weight, metavar="N",
                       help="samples a second on one GPU, for --dry-run to compute the hours")  # fmt: skip
    group.add_argument("--count", action="store_true", default=None,
                       help="read datasets once, for --dry-run to count frames whose number is unknown")  # fmt: skip


def _add_evaluation_arguments(group: Any) -> None:
    group.add_argument("--eval-share", type=share, default=0.0, metavar="SHARE",
                       help="share of the episodes to hold out and evaluate on (default: none)")  # fmt: skip
    group.add_argument("--validation", action="store_true",
                       help="evaluate on the episodes of --mixture that the original holds out")  # fmt: skip
    group.add_argument("--eval-frames", type=positive, metavar="N",
                       help="number of held-out frames in each evaluation (default: all), or of each dataset with "
                       "--validation (default: 256)")  # fmt: skip
    group.add_argument("--keep-best", nargs="?", const="loss", choices=("loss", "action_accuracy", "action_l1"),
                       help="keep the checkpoint that is best on the held-out episodes, by this figure (default: "
                       "loss), and end with its weights")  # fmt: skip
    group.add_argument("--patience", type=positive, metavar="N",
                       help="stop after N evaluations without an improvement; implies --keep-best")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    from accelerate import PartialState
    from transformers import AutoConfig

    import openvla_hf  # noqa: F401 - makes the Auto classes know OpenVLA

    from ..training.finetune import check_run, finetune
    from ..training.recipes import cost_table, estimate_cost
    from ..training.run_frames import read_validation, try_first_episodes

    if not (args.dry_run and args.world_size):
        refuse_options(args, "needs --dry-run and --world-size", "shard_size", "throughput", "count")
    arguments = read_arguments(args)
    register_robots(args)
    recipe, _ = check_run(arguments)
    if args.dry_run:
        read_validation(arguments, recipe.seed, recipe.load_options())
        if not args.world_size:  # a plan reads only metadata
            try_first_episodes(arguments, recipe.load_options())
    cost = estimate_cost(AutoConfig.from_pretrained(args.model), recipe, num_images=len(args.cameras or [None]))
    is_main = PartialState().is_main_process
    if is_main and not (args.dry_run and args.world_size):  # a plan has its own estimate, for a GPU of many
        print_table(cost_table(f"{args.recipe} on {args.model}", cost), stderr=True)
    if args.dry_run:
        plan = _print_plan(args, arguments) if args.world_size else {}
        if args.json and is_main:
            print_json({"recipe": args.recipe, **dataclasses.asdict(cost), **plan})
        return
    _check_world_size(args, PartialState().num_processes)
    # With --json, standard output is only for the result, so the log goes to standard error.
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        result = finetune(arguments)
    if args.json and is_main:
        print_json({"output": args.output, "figures": result.figures})
    elif is_main:
        print(f"Fine-tuned: {args.output}")
    # A gloo thread that frees a tensor while Python exits aborts the process, so end the process group and its threads
    # now, once the trainer is freed. After an error, the other processes may be waiting for this one, so skip this.
    gc.collect()
    PartialState().destroy_process_group()


def _print_plan(args: argparse.Namespace, arguments: FinetuneArguments) -> dict[str, Any]:
    """Print the plan of a run on many GPUs, and return it for JSON."""
    from ..data.feature_names import counted
    from ..training.plan import plan_run, plan_tables

    num_images, count = len(args.cameras or [None]), bool(args.count)
    plan = plan_run(arguments, args.world_size, args.shard_size, args.throughput, num_images, count)
    for table in plan_tables(f"Plan for {counted(args.world_size, 'GPU')}", plan):
        print_table(table, stderr=True)
    return {"plan": dataclasses.asdict(plan)}


def _check_world_size(args: argparse.Namespace, processes: int) -> None:
    """Raise `ValueError` if the run has another number of processes than the options say."""
    if args.world_size not in (None, processes):
        raise ValueError(
            f"The number of processes is {processes}, but --world-size is {args.world_size}. Start the run with "
            f"accelerate launch --num_processes {args.world_size}, or add --dry-run to plan it."
        )


def read_arguments(args: argparse.Namespace) -> FinetuneArguments:
    """Collect the options of the command as the arguments of a run.

    Raises:
        ValueError: The options contradict each other.
    """
    settings = {setting: getattr(args, option) for option, setting in SETTINGS.items()}
    settings |= {"disable_tqdm": args.json, "report_to": args.report_to or "none", **dict(args.set or ())}
    return FinetuneArguments(
        model=args.model,
        output=args.output,
        data=read_datasets(args),
        statistics=args.statistics,
        recipe=args.recipe,
        settings=settings,
        resume=args.resume,
        matrix_rate=args.matrix_rate,
        eval_share=args.eval_share,
        validation=args.validation,
        eval_frames=args.eval_frames,
        keep_best=args.keep_best,
        patience=args.patience,
    )


def read_datasets(args: argparse.Namespace) -> list[TrainingData] | TrainingMixture:
    """Collect the options of each dataset. An option with one value applies to all datasets.

    Raises:
        ValueError: An option has neither one value nor one for each dataset, or contradicts `--mixture`.
    """
    from ..data.feature_names import counted

    if args.mixture is not None:
        refuse_options(args, "does not apply to --mixture", "weights", "robot", "camera", "name")
        if args.data_dir is None:
            raise ValueError("--mixture needs the folder of its datasets. Give it as --data-dir.")
        return TrainingMixture(args.mixture, args.data_dir, _shared_options(args), args.allow_missing)
    refuse_options(args, "needs --mixture", "data_dir")
    if args.allow_missing:
        raise ValueError("--allow-missing needs --mixture.")
    count = len(args.data)
    given = {"weights": args.weights, "robot": args.robot, "camera": args.camera, "name": args.name}
    for option, values in given.items():
        if values is not None and len(values) != count and (len(values) > 1 or option in ("weights", "name")):
            raise ValueError(
                f"--{option} has {counted(len(values), 'value')} for {counted(count, 'dataset')}: give one for each."
            )
    weights, robots, cameras, names = (
        [None] * count if values is None else values * (count // len(values)) for values in given.values()
    )
    shared = _shared_options(args) | {"split": args.split or "train"}
    return [
        TrainingData(source, {"robot": robot, "camera": camera, "name": name, **shared}, weight or 1.0)
        for source, robot, camera, name, weight in zip(args.data, robots, cameras, names, weights, strict=True)
    ]


def _shared_options(args: argparse.Namespace) -> dict[str, Any]:
    """Collect the options of `load` that apply to all datasets."""
    shared = {name: getattr(args, name) for name in ("split", "every", "drop_idle", "skip_bad_episodes", "streaming")}
    shared["shuffle_buffer"] = args.shuffle_buffer if args.streaming else 0
    return shared if args.cameras is None else shared | {"cameras": args.cameras}
