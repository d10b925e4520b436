"""The command line: each command is a thin call into the library."""

import argparse
import json
import os
import runpy
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table


if TYPE_CHECKING:
    from .evaluation.rollouts import Episode
    from .training.recipes import Cost

ACTION_NAMES = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")

EXAMPLES = """examples:
  openvla-hf demo
  openvla-hf evaluate --episodes 200
  openvla-hf predict --image frame.png --instruction "put the green cube on the yellow plate"
  openvla-hf bench --random 0.5b --batch-sizes 1 8
  openvla-hf record demos/tabletop_lift --task lift
  openvla-hf info openvla/openvla-7b
  openvla-hf predict --model openvla/openvla-7b --unnorm-key bridge_orig \\
      --image frame.png --instruction "pick up the red block" --json
"""


def load(model_id: str, dtype: str = "auto", device: str | None = None) -> tuple[Any, Any]:
    """The three lines: model and processor of a Hub id or folder."""
    from transformers import AutoModel, AutoProcessor
    from transformers.utils import logging

    import openvla_hf  # noqa: F401 - makes the Auto classes know OpenVLA

    require_device(device)
    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(model_id, dtype=dtype, device_map=device)
    return model, AutoProcessor.from_pretrained(model_id)


def require_device(device: str | None) -> None:
    """Say so before anything is loaded if a GPU is asked for and there is none."""
    import torch

    if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("PyTorch finds no CUDA device: leave --device out to run on the CPU.")


def register_robots(file: str | None) -> None:
    """Run a Python file of the user's, which registers robots."""
    if file is not None:
        runpy.run_path(file)


def default_model() -> str:
    """The small policy that ships with the package."""
    from .evaluation.rollouts import TABLETOP_POLICY

    return str(TABLETOP_POLICY)


def success_table(title: str, results: dict[str, dict[str, dict[str, float]]]) -> Table:
    """`{condition: success_by_task(...)}` as a table."""
    table = Table(title=title)
    for column in ("condition", "task", "episodes", "success", "moved the named object", "mean steps"):
        table.add_column(column, justify="left" if column in ("condition", "task") else "right")
    for condition, by_task in results.items():
        for task, row in by_task.items():
            table.add_row(
                condition,
                task,
                f"{row['episodes']:.0f}",
                f"{row['success']:.1%}",
                f"{row['moved_target']:.1%}",
                f"{row['steps']:.1f}",
                style="bold" if task == "all" else None,
                end_section=task == "all",
            )
    return table


def play(args: argparse.Namespace, condition: str, keep: int = 0) -> "list[Episode]":
    """Run the episodes of one condition, telling of each as it ends."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from .evaluation.rollouts import FIRST_UNSEEN_SEED, load_policy, run_episodes

    console = Console(stderr=True)
    model, processor = load(args.model)
    policy = load_policy(model, processor, args.unnorm_key)
    seeds = range(FIRST_UNSEEN_SEED, FIRST_UNSEEN_SEED + args.episodes)
    episodes: list[Episode] = []
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("success {task.fields[success]}"),
    )  # fmt: skip
    tasks = args.task or ("put", "push")
    with Progress(*columns, console=console, disable=args.json) as progress:
        bar = progress.add_task(condition, total=len(seeds), success="-")
        first = set(seeds[:keep])
        for episode in run_episodes(
            policy, seeds, tasks=tasks, condition=condition, batch_size=args.batch_size,
            keep_frames=first.__contains__,
        ):  # fmt: skip
            episodes.append(episode)
            verdict = "[green]done[/]    " if episode.success else "[red]not done[/]"
            progress.console.print(f"{verdict} {episode.steps:3d} steps  {episode.instruction}", highlight=False)
            done = sum(one.success for one in episodes)
            progress.update(bar, advance=1, success=f"{done}/{len(episodes)} = {done / len(episodes):.0%}")
    return episodes


def demo(args: argparse.Namespace) -> None:
    """Run unseen episodes and write a picture strip and a GIF."""
    from .evaluation.pictures import draw_strip, save_gif
    from .evaluation.rollouts import success_by_task

    episodes = play(args, "as told", keep=6)
    results = {"as told": success_by_task(episodes)}
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    shown = sorted((one for one in episodes if one.frames), key=lambda one: one.seed)
    draw_strip(shown[:4]).save(output / "strip.png")
    save_gif(shown, output / "episodes.gif")
    if args.json:
        print(
            json.dumps({"results": results, "strip": str(output / "strip.png"), "gif": str(output / "episodes.gif")})
        )
        return
    console = Console()
    console.print(success_table(f"{len(episodes)} unseen episodes", results))
    console.print(f"Watch {output / 'episodes.gif'}, look at {output / 'strip.png'}")


def evaluate(args: argparse.Namespace) -> None:
    """Measure success as told, with the target's name exchanged, and with a black image."""
    from .evaluation.rollouts import CONDITIONS, success_by_task

    results = {name: success_by_task(play(args, name)) for name in args.condition or CONDITIONS}
    if args.json:
        print(json.dumps({"model": args.model, "episodes": args.episodes, "results": results}))
    else:
        Console().print(success_table(f"{args.model}: {args.episodes} unseen episodes a condition", results))


def record(args: argparse.Namespace) -> None:
    """Record demonstrations of the tabletop's expert as a data set to fine-tune on."""
    from rich.progress import track

    from .data import write_lerobot, write_rlds
    from .evaluation.tabletop import record_demonstrations

    seeds = track(
        range(args.first_seed, args.first_seed + args.episodes), "recording", console=Console(stderr=True),
        disable=args.json,
    )  # fmt: skip
    episodes = record_demonstrations(args.task, seeds)
    written = (write_rlds if args.format == "rlds" else write_lerobot)(episodes, args.destination)
    if args.json:
        print(json.dumps({"folder": str(written)}))
    else:
        Console().print(f"Written: {written}", highlight=False)


def dimension_names(count: int) -> Sequence[str]:
    """Those of an end effector, or numbers."""
    return ACTION_NAMES if count == len(ACTION_NAMES) else [f"a{i}" for i in range(count)]


def predict(args: argparse.Namespace) -> None:
    """Print the action for one image and one instruction."""
    model, processor = load(args.model, args.dtype, args.device)
    inputs = processor(args.image, instruction=args.instruction)
    details = model.predict_action(**inputs, unnorm_key=args.unnorm_key, return_details=True)
    action, token_ids = details.actions[0], details.token_ids[0]
    chosen = details.probabilities[0].max(-1)
    names = dimension_names(len(action))
    if args.json:
        print(json.dumps({"instruction": args.instruction, "names": list(names), "action": action.tolist(),
                          "normalized_action": details.normalized_actions[0].tolist(),
                          "token_ids": token_ids.tolist(), "probabilities": chosen.tolist()}))  # fmt: skip
        return
    table = Table(title=args.instruction)
    for column in ("", "value", "normalised", "token", "probability"):
        table.add_column(column, justify="right")
    for name, value, normalised, token, probability in zip(
        names, action, details.normalized_actions[0], token_ids, chosen, strict=True
    ):
        table.add_row(name, f"{value:+.4f}", f"{normalised:+.3f}", str(token), f"{probability:.1%}")
    Console().print(table)


def bench(args: argparse.Namespace) -> None:
    """Time an action, beside plain `generate` and what the device could do."""
    import torch

    from .evaluation.latency import latency_tables, measure_latency, random_model

    console = Console(stderr=True, quiet=args.json)
    with console.status("loading") as status:
        if args.random is not None:
            require_device(args.device)
            device = torch.device(args.device or "cpu")
            usual = "bfloat16" if device.type == "cuda" else "float32"
            dtype = getattr(torch, usual if args.dtype == "auto" else args.dtype)
            model, processor = random_model(args.random, dtype, device)
        else:
            model, processor = load(args.checkpoint or default_model(), args.dtype, args.device)
        result = measure_latency(
            model,
            processor,
            unnorm_key=args.unnorm_key,
            batch_sizes=args.batch_sizes,
            repeats=args.repeats,
            compile_passes=args.compile,
            progress=status.update,
        )
    if args.json:
        print(json.dumps(asdict(result)))
        return
    for table in latency_tables(result):
        Console().print(table)


def info(args: argparse.Namespace) -> None:
    """Say what a checkpoint is, without loading its weights."""
    from .checkpoint_info import describe

    found = describe(args.checkpoint, revision=args.revision)
    if args.json:
        print(json.dumps(asdict(found)))
        return
    table = Table(title=args.checkpoint, show_header=False)
    rows = {
        "layout": found.layout,
        "base model": found.base_model,
        "vision towers": "\n".join(found.vision_towers),
        "language model": found.language_model,
        "actions": "\n".join(f"{key}: {dim} dimensions" for key, dim in found.action_dims.items()),
        "dtype": found.dtype,
        "quantisation": found.quantization,
        "parameters": found.parameters and f"{found.parameters:,}",
        "weights": f"{found.size / 1e9:.3f} GB",
        "brings its code": "yes" if found.has_code else "no",
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    Console().print(table)


def push(args: argparse.Namespace) -> None:
    """Push a policy or an adapter to the Hub, with code, statistics and model card."""
    from .hub import push as push_to_hub

    commit = push_to_hub(
        args.checkpoint,
        args.repo_id,
        base_model=args.base_model,
        datasets=args.dataset,
        license=args.license,
        private=args.private or None,
        revision=args.revision,
        create_pr=args.create_pr,
        commit_message=args.message,
    )
    if args.json:
        print(json.dumps({"commit": commit.oid, "url": commit.commit_url, "pull_request": commit.pr_url}))
    else:
        Console().print(f"Pushed: {commit.pr_url or commit.commit_url}", highlight=False)


def export(args: argparse.Namespace) -> None:
    """Write a checkpoint in the published layout, for the original code and other engines."""
    from .export import export as write_published

    console = Console(stderr=True, quiet=args.json)
    with console.status(f"Writing {args.destination}"):
        folder = write_published(
            args.checkpoint, args.destination, max_shard_size=args.max_shard_size, revision=args.revision
        )
    if args.json:
        print(json.dumps({"folder": str(folder), "files": sorted(path.name for path in folder.iterdir())}))
    else:
        Console().print(f"Written: {folder}", highlight=False)


def finetune(args: argparse.Namespace) -> None:
    """Fine-tune a policy on a data set: adapters or whole weights, by a named recipe."""
    import dataclasses

    from accelerate import PartialState
    from transformers import AutoConfig, PrinterCallback

    import openvla_hf  # noqa: F401 - makes the Auto classes know OpenVLA

    from .data import load as load_frames
    from .training.finetune import build_trainer, read_split
    from .training.finetune import finetune as run_training
    from .training.recipes import Recipe, estimate_cost, recipe

    register_robots(args.robots)
    is_main = PartialState().is_main_process
    fields = {field.name for field in dataclasses.fields(Recipe)}
    settings = dict(args.set or ())
    chosen = recipe(args.recipe, **{name: value for name, value in settings.items() if name in fields})
    cost = estimate_cost(AutoConfig.from_pretrained(args.model), chosen)
    if is_main:
        _print_cost(args, cost, Console(stderr=True))
    if args.dry_run:
        if args.json and is_main:
            print(json.dumps({"recipe": args.recipe, **dataclasses.asdict(cost)}))
        return
    frames = load_frames(
        args.data,
        args.robot,
        split=args.split,
        name=args.name,
        camera=args.camera,
        streaming=args.streaming,
        shuffle_buffer=args.shuffle_buffer if args.streaming else 0,
        skip_bad_episodes=args.skip_bad_episodes,
        seed=chosen.seed,
    )
    train_data, eval_data = read_split(frames, args.eval_share, chosen.seed)
    trainer = build_trainer(
        args.model,
        train_data,
        args.output,
        chosen,
        eval_data=eval_data,
        run={"datasets": [args.data], "recipe": args.recipe},
        **{
            "max_steps": args.steps,
            "save_steps": args.save_steps,
            "eval_strategy": "steps" if eval_data is not None else "no",
            "eval_steps": args.save_steps,
            "logging_steps": args.logging_steps,
            "save_total_limit": args.keep,
            "dataloader_num_workers": args.workers,
            "report_to": args.report_to or "none",
            "disable_tqdm": args.json,
        }
        | {name: value for name, value in settings.items() if name not in fields},
    )
    if args.json:
        trainer.remove_callback(PrinterCallback)
    figures = run_training(trainer, resume=args.resume)
    if args.json and is_main:
        print(json.dumps({"output": args.output, "figures": figures}))
    elif is_main:
        Console().print(f"Fine-tuned: {args.output}", highlight=False)


def doctor(args: argparse.Namespace) -> None:
    """Say whether a data set is ready to train on, and how near a model comes to it."""
    from rich.progress import MofNCompleteColumn, Progress

    from .data.doctor import examine, judge_model, plot_actions

    register_robots(args.robots)
    model, processor = load(args.model_id) if args.model_id else (None, None)
    stats = model.get_action_stats(args.unnorm_key) if model is not None else None
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True),
                  disable=args.json, transient=True) as progress:  # fmt: skip
        images, acting = (progress.add_task(what, total=None, visible=False) for what in ("images", "predictions"))
        report, frames = examine(
            args.data, args.robot, split=args.split, camera=args.camera, stats=stats,
            progress=lambda done, total: progress.update(images, completed=done, total=total, visible=True),
        )  # fmt: skip
        if model is not None:
            report.model = judge_model(
                model, processor, frames, args.unnorm_key, max_frames=args.frames,
                progress=lambda done, total: progress.update(acting, completed=done, total=total, visible=True),
            )  # fmt: skip
    names = dimension_names(len(report.q01))
    if args.plot:
        plot_actions(report, args.plot, names)
    if args.json:
        print(json.dumps(report.as_dict()))
        return
    console = Console()
    facts = Table(title=f"{report.name}, read as {report.robot!r}", show_header=False)
    for fact in (
        ("episodes, frames, instructions", f"{report.episodes}, {report.frames}, {report.instructions}"),
        ("frames an episode", f"{report.shortest_episode} / {report.median_episode:g} / {report.longest_episode}"
                              "  (shortest, median, longest)"),
        ("frequency", f"{report.frequency:g} Hz" if report.frequency else "unknown"),
        ("idle actions", f"{report.idle:.1%}"),
        ("images like the one before", f"{report.duplicates:.1%}"),
        ("bad episodes, frames without instruction",
         f"{len(report.bad_episodes)}, {report.frames_without_instruction}"),
        *([("gripper open", f"{report.gripper_open:.1%}")] if report.gripper_open is not None else []),
        *([("the model on these frames", f"token accuracy {report.model['token_accuracy']:.1%}, "
            f"L1 {report.model['l1']:.3f} ({report.model['frames']} frames)")] if report.model else []),
    ):  # fmt: skip
        facts.add_row(*fact)
    console.print(facts)
    actions = Table(title="actions")
    for column in ("", "lowest", "1 %", "99 %", "highest", "clipped", "bins used"):
        actions.add_column(column, justify="right")
    for index, name in enumerate(names):
        values = (report.lowest[index], report.q01[index], report.q99[index], report.highest[index])
        used = sum(count > 0 for count in report.histograms[index])
        actions.add_row(name, *(f"{value:+.4g}" for value in values), f"{report.clipped[index]:.1%}", str(used))
    console.print(actions)
    for warning in report.warnings:
        console.print(f"[yellow]![/] {warning}", highlight=False)
    if not report.warnings:
        console.print("[green]ready[/]: nothing to say against it")


def _print_cost(args: argparse.Namespace, cost: "Cost", console: Console) -> None:
    """What is trained, and what memory that takes."""
    table = Table(title=f"{args.recipe} on {args.model}", show_header=False)
    table.add_row("trainable", f"{cost.trainable:,} of {cost.parameters:,} ({cost.trainable / cost.parameters:.2%})")
    for name in ("weights", "gradients", "optimizer", "activations", "total"):
        table.add_row(name, f"about {getattr(cost, name):.1f} GiB", style="bold" if name == "total" else None)
    console.print(table)


def merge(args: argparse.Namespace) -> None:
    """Merge an adapter into its base, and check that nothing else changes."""
    from .training.merge import merge_adapter

    console = Console(stderr=True, quiet=args.json)
    with console.status(f"Merging {args.adapter}"):
        difference = merge_adapter(
            args.adapter, args.output, base=args.base, dtype=args.dtype, max_shard_size=args.max_shard_size
        )
    if args.json:
        print(json.dumps({"output": args.output, "difference": difference}))
    else:
        Console().print(f"Merged: {args.output} (logits within {difference:.2%})", highlight=False)


def quantize(args: argparse.Namespace) -> None:
    """Write a quantised checkpoint, or report what each format changes."""
    both = args.report and args.bits is None
    formats = args.format or (["4bit", "8bit"] if both else [f"{args.bits or 4}bit"])
    from transformers.utils import logging

    logging.disable_progress_bar()
    if args.report:
        report_fidelity(args, formats)
        return
    if args.source is None or args.destination is None or len(formats) != 1:
        raise ValueError("Name a checkpoint, a new folder and one format, or ask for a --report.")
    from rich.progress import Progress

    from .quantization import quantize

    with Progress(console=Console(stderr=True), disable=args.json) as progress:
        bar = progress.add_task(formats[0], total=None)
        folder = quantize(
            args.source,
            args.destination,
            formats[0],
            towers=args.towers,
            on_progress=lambda done, total: progress.update(bar, completed=done, total=total),
            **({"revision": args.revision} if args.revision else {}),
        )
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if args.json:
        print(json.dumps({"folder": str(folder), "format": formats[0], "weight_bytes": size}))
    else:
        Console().print(f"{folder}: {size / 1e9:.2f} GB of weights in {formats[0]}")


def report_fidelity(args: argparse.Namespace, formats: Sequence[str]) -> None:
    """Compare formats over a data set or the tabletop: a table, a JSON file and a plot."""
    from dataclasses import asdict
    from itertools import islice

    import torch
    from rich.progress import MofNCompleteColumn, Progress

    from .evaluation.fidelity import compare, plot, table, tabletop_observations

    if args.data is None:
        frames = list(tabletop_observations(args.frames))
    else:
        from .data import load as load_data

        frames = list(islice(load_data(args.data, args.robot, streaming=True), args.frames))
    source = args.source or default_model()
    towers = (False, True) if args.towers else (False,)
    with Progress(
        *Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True), disable=args.json
    ) as progress:
        bar = progress.add_task("", total=(len(frames) + args.episodes) * (1 + len(formats) * len(towers)))
        results = compare(
            source, formats, frames, towers=towers, unnorm_key=args.unnorm_key, device=args.device,
            dtype=getattr(torch, args.dtype), episodes=args.episodes,
            on_progress=lambda label: progress.update(bar, advance=1, description=label),
        )  # fmt: skip
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    rows = [asdict(result) for result in results]
    (output / "fidelity.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    names = dimension_names(len(results[0].l1))
    plot(results, output / "fidelity.png", names)
    if args.json:
        print(json.dumps({"model": source, "observations": len(frames), "results": rows}))
        return
    console = Console()
    console.print(table(results, names))
    console.print(f"Look at {output / 'fidelity.png'}; the same in {output / 'fidelity.json'}")


def build_parser() -> argparse.ArgumentParser:
    """Every command with its options."""
    parser = argparse.ArgumentParser(
        prog="openvla-hf",
        description="OpenVLA in today's Hugging Face ecosystem.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(run: Any, example: str, acts: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            run.__name__,
            help=run.__doc__,
            description=run.__doc__,
            epilog=f"example:\n  openvla-hf {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        if acts:
            sub.add_argument(
                "--model", help="folder or Hub id (default: the tabletop policy that ships with the package)"
            )
            sub.add_argument(
                "--unnorm-key", help="whose statistics give the robot's units, if the model knows several"
            )
        sub.add_argument("--json", action="store_true", help="one JSON object on standard output, nothing else")
        return sub

    for run, episodes, example in (
        (demo, 40, "demo --episodes 12 --output outputs/demo"),
        (evaluate, 200, "evaluate --episodes 50 --condition swapped"),
    ):
        sub = command(run, example)
        sub.add_argument("--episodes", type=positive, default=episodes, help="(default: %(default)s)")
        sub.add_argument("--batch-size", type=positive, default=16, help="episodes at a time (default: %(default)s)")
        sub.add_argument("--task", nargs="+", help="put, push, stack or lift (default: put and push)")
        if run is demo:
            sub.add_argument("--output", default="outputs/demo", help="folder for the pictures (default: %(default)s)")
        else:
            sub.add_argument("--condition", nargs="+", choices=("as told", "swapped", "black"), help="(default: all)")

    sub = command(record, "record demos/tabletop_lift --task lift --episodes 500", acts=False)
    sub.add_argument("destination", help="new folder; its name is that of the data set")
    sub.add_argument("--task", nargs="+", required=True, help="put, push, stack or lift")
    sub.add_argument("--episodes", type=positive, default=500, help="(default: %(default)s)")
    sub.add_argument("--first-seed", type=int, default=0, help="of the episodes (default: %(default)s)")
    sub.add_argument("--format", choices=("lerobot", "rlds"), default="lerobot", help="(default: %(default)s)")

    sub = command(predict, 'predict --image frame.png --instruction "push the red ball to the left"')
    sub.add_argument("--image", required=True, help="file or URL of the camera's image")
    sub.add_argument("--instruction", required=True, help="what the robot is to do")
    sub.add_argument("--dtype", default="auto", help="such as bfloat16 (default: the checkpoint's)")
    sub.add_argument("--device", help="such as cuda or auto (default: the CPU)")

    sub = command(bench, "bench --random 0.5b --batch-sizes 1 8", acts=False)
    measured = sub.add_mutually_exclusive_group()
    measured.add_argument("--model", dest="checkpoint", help="folder or Hub id (default: the tabletop policy)")
    measured.add_argument("--random", choices=("7b", "0.5b", "tiny"), help="a model of this size with random weights")
    sub.add_argument("--unnorm-key", help="whose number of action dimensions counts, if the model knows several")
    sub.add_argument("--batch-sizes", nargs="+", type=positive, default=[1], help="observations a call (default: 1)")
    sub.add_argument("--repeats", type=positive, default=20, help="of each way (default: %(default)s)")
    sub.add_argument("--compile", action="store_true", help="time compiled passes too; compiling takes minutes")
    sub.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
                     help="(default: the checkpoint's, or bfloat16 on a GPU)")  # fmt: skip
    sub.add_argument("--device", help="such as cuda (default: the CPU)")

    sub = command(info, "info openvla/openvla-7b", acts=False)
    sub.add_argument("checkpoint", help="folder or Hub id")
    sub.add_argument("--revision", help="branch, tag or commit of a Hub id")

    sub = command(push, "push outputs/kitchen someone/openvla-7b-kitchen --private", acts=False)
    sub.add_argument("checkpoint", help="folder of a saved policy or adapter")
    sub.add_argument("repo_id", help="such as someone/openvla-7b-kitchen; made if it does not exist")
    sub.add_argument("--base-model", help="Hub id of what was fine-tuned (default: what the adapter or run names)")
    sub.add_argument("--dataset", nargs="+", help="Hub ids of what it was trained on (default: what the run names)")
    sub.add_argument("--license", help="(default: that of the base model)")
    sub.add_argument("--private", action="store_true", help="make a new repository private")
    sub.add_argument("--revision", help="branch, made if it does not exist (default: main)")
    sub.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    sub.add_argument("--message", default="Upload OpenVLA policy", help="of the commit (default: %(default)s)")

    sub = command(export, "export outputs/kitchen-merged outputs/kitchen-published", acts=False)
    sub.add_argument("checkpoint", help="folder or Hub id of a 16- or 32-bit checkpoint")
    sub.add_argument("destination", help="empty or new folder")
    sub.add_argument("--max-shard-size", default="7GB", help="of one weights file (default: %(default)s)")
    sub.add_argument("--revision", help="branch, tag or commit of a Hub id")

    sub = command(
        finetune, "finetune --model openvla/openvla-7b --data lab/kitchen --recipe lora --output outputs/kitchen",
        acts=False,
    )  # fmt: skip
    sub.add_argument("--model", required=True, help="folder or Hub id of the base")
    sub.add_argument("--data", required=True, help="folder or Hub id: LeRobot, RLDS, or datasets with images")
    sub.add_argument("--robot", help="name of the adapter that reads it (default: the data set's own, or generic)")
    sub.add_argument("--robots", metavar="FILE", help="Python file of your own that registers robots")
    sub.add_argument("--split", default="train", help="(default: %(default)s)")
    sub.add_argument("--camera", help="the image to read, if there are several")
    sub.add_argument("--name", help="of the statistics in the checkpoint (default: the data set's)")
    names = "lora, lora-paper, qlora, full, last-layer, frozen-vision, sandwich"
    sub.add_argument("--recipe", default="lora", help=f"{names} (default: %(default)s)")
    sub.add_argument("--output", required=True, help="folder of the checkpoints and the result")
    sub.add_argument("--steps", type=positive, default=5000, help="(default: %(default)s)")
    sub.add_argument("--set", nargs="+", type=setting, metavar="NAME=VALUE",
                     help="fields of the recipe or of TrainingArguments, such as lora_rank=64")  # fmt: skip
    sub.add_argument("--eval-share", type=float, default=0.0, help="share of the episodes held out (default: none)")
    sub.add_argument("--save-steps", type=positive, default=500, help="also of evaluation (default: %(default)s)")
    sub.add_argument("--logging-steps", type=positive, default=10, help="(default: %(default)s)")
    sub.add_argument("--keep", type=positive, default=2, help="checkpoints at a time (default: %(default)s)")
    sub.add_argument("--workers", type=int, default=2, help="processes that read data (default: %(default)s)")
    sub.add_argument("--streaming", action="store_true", help="read the data as they come, and keep nothing")
    sub.add_argument("--shuffle-buffer", type=positive, default=10_000, help="of a stream (default: %(default)s)")
    sub.add_argument("--skip-bad-episodes", action="store_true", help="go on without episodes that can't be read")
    sub.add_argument("--resume", action="store_true", help="go on from the last complete checkpoint in the output")
    sub.add_argument("--report-to", nargs="+", help="trackers of Trainer, such as tensorboard, trackio or wandb")
    sub.add_argument("--dry-run", action="store_true", help="say what would be trained and what it takes, and stop")

    sub = command(doctor, "doctor lab/kitchen --robot libero --plot actions.png", acts=False)
    sub.add_argument("data", help="folder, URL or Hub id: LeRobot, RLDS, or datasets with images")
    sub.add_argument("--robot", help="name of the adapter that reads it (default: the data set's own, or generic)")
    sub.add_argument("--robots", metavar="FILE", help="Python file of your own that registers robots")
    sub.add_argument("--split", default="train", help="(default: %(default)s)")
    sub.add_argument("--camera", help="the image to read, if there are several")
    sub.add_argument("--model", dest="model_id", help="folder or Hub id of a policy to try on the frames")
    sub.add_argument("--unnorm-key", help="whose statistics the policy uses, if it knows several")
    sub.add_argument("--frames", type=positive, default=64, help="that the policy acts on (default: %(default)s)")
    sub.add_argument("--plot", metavar="FILE", help="picture of the action histograms with the 256 bins")

    sub = command(merge, "merge outputs/kitchen outputs/kitchen-merged", acts=False)
    sub.add_argument("adapter", help="folder or Hub id of an adapter, ours or one published for the original code")
    sub.add_argument("output", help="empty or new folder")
    sub.add_argument("--base", help="folder or Hub id of the 16-bit base (default: what the adapter names)")
    sub.add_argument("--dtype", default="auto", help="such as bfloat16 (default: the base's)")
    sub.add_argument("--max-shard-size", default="5GB", help="of one weights file (default: %(default)s)")

    sub = command(quantize, "quantize openvla/openvla-7b openvla-7b-4bit --bits 4", acts=False)
    sub.add_argument("source", nargs="?", help="folder or Hub id of a 16- or 32-bit checkpoint")
    sub.add_argument("destination", nargs="?", help="new folder")
    formats = sub.add_mutually_exclusive_group()
    formats.add_argument("--bits", type=int, choices=(4, 8), help="4 or 8, by bitsandbytes (default: 4)")
    formats.add_argument(
        "--format", nargs="+", metavar="FORMAT", help="4bit, 8bit, int4, int8 or float8; a report takes several"
    )
    sub.add_argument("--towers", action="store_true", help="quantise vision towers and projector too; report: also so")
    sub.add_argument("--revision", help="branch, tag or commit of a Hub id")
    sub.add_argument("--report", action="store_true", help="compare the actions with those of 16 bits instead")
    sub.add_argument("--data", help="report: data set of any known format (default: the tabletop's frames)")
    sub.add_argument("--robot", help="report: adapter of the data set (default: the one of its name)")
    sub.add_argument("--frames", type=positive, default=200, help="report: observations (default: %(default)s)")
    sub.add_argument("--episodes", type=int, default=0, help="report: on the tabletop, for success (default: none)")
    sub.add_argument("--unnorm-key", help="report: whose statistics give the robot's units, if there are several")
    sub.add_argument("--device", help="report: such as cuda (default: the first GPU, else the CPU)")
    sub.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16",
                     help="report: of the arithmetic and of what is not quantised (default: %(default)s)")  # fmt: skip
    sub.add_argument("--output", default="outputs/fidelity", help="report: folder (default: %(default)s)")
    return parser


def setting(text: str) -> tuple[str, Any]:
    """`NAME=VALUE`, the value in JSON or else a text."""
    name, found, value = text.partition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def positive(text: str) -> int:
    """A whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; an error of the user's is one sentence on standard error and exit status 2."""
    args = build_parser().parse_args(argv)
    # What libraries say on import is no news to a person at a terminal.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        if "model" in args and args.model is None:
            args.model = default_model()
        args.run(args)
    except (OSError, TypeError, ValueError) as error:
        print(f"openvla-hf: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name != "gymnasium":
            raise
        print("openvla-hf: the tabletop needs Gymnasium: pip install 'openvla-hf[sim]'", file=sys.stderr)
        return 2
    except ImportError as error:  # a package of an extra: the message says which
        print(f"openvla-hf: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
