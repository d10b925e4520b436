"""Check whether a dataset is ready for training, and compare a model's actions with it."""

import argparse

from rich.text import Text

from .common import (
    add_data_arguments,
    checkpoint,
    console,
    counting_bars,
    dimension_names,
    load_model,
    positive,
    print_json,
    print_table,
    register_robots,
)


EXAMPLE = """doctor lab/kitchen
  openvla-hf doctor lab/kitchen --robot libero --plot actions.png
  openvla-hf doctor lab/kitchen --every 5 --drop-idle --model outputs/kitchen"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help="folder, URL or Hub id of a dataset: LeRobot, RLDS, or `datasets` with images")
    group = parser.add_argument_group("dataset")
    add_data_arguments(group)
    group.add_argument(
        "--cameras", nargs="+", help="cameras of a policy that sees several, instead of --camera (default: --model's)"
    )
    group.add_argument("--state", action="store_true", help="require a state in every frame, and examine the states")
    group = parser.add_argument_group("comparison with a policy")
    group.add_argument(
        "--model", type=checkpoint, help="folder or Hub id of a policy to compare with the recorded actions"
    )
    group.add_argument("--unnorm-key", help="statistics to use, if the model has several")
    group.add_argument(
        "--frames", type=positive, default=64, help="number of frames that the policy acts on (default: %(default)s)"
    )
    group = parser.add_argument_group("result")
    group.add_argument("--plot", metavar="FILE", help="save a plot of the action histograms with the 256 bins")


def run(args: argparse.Namespace) -> None:
    from ..evaluation.doctor import examine, plot_actions, report_tables
    from ..evaluation.open_loop import evaluate_open_loop

    register_robots(args)
    model, processor, stats, cameras, state = None, None, None, args.cameras, args.state
    if args.model:
        model, processor = load_model(args.model)
        stats = model.get_action_stats(args.unnorm_key)
        cameras = processor.cameras if cameras is None and args.camera is None else cameras
        state = state or processor.state_dim is not None
    with counting_bars(args) as progress:
        images, acting = (progress.add_task(what, total=None, visible=False) for what in ("images", "predictions"))
        report, frames = examine(
            args.data,
            args.robot,
            split=args.split,
            camera=args.camera,
            every=args.every,
            drop_idle=args.drop_idle,
            stats=stats,
            cameras=cameras,
            state=state,
            progress=lambda done, total: progress.update(images, completed=done, total=total, visible=True),
        )
        if model is not None:
            found = evaluate_open_loop(
                model,
                processor,
                frames,
                args.unnorm_key,
                max_frames=args.frames,
                progress=lambda done, total: progress.update(acting, completed=done, total=total, visible=True),
            )
            report.model = {"frames": found.frames, "token_accuracy": found.token_accuracy, "l1": found.l1}
    names = dimension_names(len(report.q01), report.names)
    if args.plot:
        plot_actions(report, args.plot, names)
    if args.json:
        print_json(report.as_dict())
        return
    for table in report_tables(report, names):
        print_table(table)
    out = console()
    for warning in report.warnings:
        out.print(Text.assemble(("!", "yellow"), " ", warning))
    if not report.warnings:
        out.print(Text.assemble(("Ready", "green"), ": no problems found."))
