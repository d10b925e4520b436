"""Print the action, or the chunk of actions, for one observation and one instruction."""

import argparse
import os
import warnings
from typing import Any

from PIL import Image
from rich.table import Table

from .common import (
    DTYPES,
    add_oft_options,
    add_policy_arguments,
    default_model,
    dimension_names,
    image,
    load_model,
    print_json,
    print_table,
)


EXAMPLE = 'predict --image frame.png --instruction "push the red ball to the left"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_policy_arguments(parser)
    parser.add_argument(
        "--image",
        type=camera_image,
        action="append",
        required=True,
        metavar="[CAMERA=]IMAGE",
        help="file or URL of an image; give one for each camera, in the policy's order or with the camera's name",
    )
    parser.add_argument("--instruction", required=True, help="what the robot should do")
    parser.add_argument(
        "--state",
        type=numbers,
        metavar="NUMBERS",
        help='state of the robot in its own units, such as "0.31 -0.02 0.5", if the policy takes one',
    )
    add_oft_options(parser)
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="data type (default: that of the checkpoint)")


def camera_image(text: str) -> tuple[str | None, str]:
    """Parse `IMAGE` or `CAMERA=IMAGE` as the camera's name, if there is one, and the path or URL."""
    camera, found, path = text.partition("=")
    if not found or "/" in camera or os.path.isfile(text):
        return None, image(text)
    return camera, image(path)


def numbers(text: str) -> list[float]:
    """Parse numbers that are separated by spaces or commas."""
    try:
        return [float(number) for number in text.replace(",", " ").split()]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be numbers separated by spaces, got {text!r}") from error


def run(args: argparse.Namespace) -> None:
    # The processor refuses such an image, so no warning is needed.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    model, processor = load_model(
        args.model or default_model(),
        args.dtype,
        args.device,
        platform=args.platform,
        action_decoding=args.action_decoding,
    )
    observation = make_observation(args.image, processor.cameras)
    inputs = processor(observation, instruction=args.instruction, state=args.state)
    details = model.predict_action(**inputs, unnorm_key=args.unnorm_key, return_details=True)
    action = details.actions[0]
    chosen = None if details.probabilities is None else details.probabilities[0].max(-1)
    names = dimension_names(action.shape[-1], model.get_action_stats(args.unnorm_key).get("names"))
    if args.json:
        print_json(
            {
                "instruction": args.instruction,
                "names": list(names),
                "action": action.tolist(),
                "normalized_action": details.normalized_actions[0].tolist(),
                "token_ids": None if details.token_ids is None else details.token_ids[0].tolist(),
                "probabilities": None if chosen is None else chosen.tolist(),
            }
        )
        return
    table = Table(title=args.instruction)
    if action.ndim == 2:
        fill_with_chunk(table, names, action, chosen)
    else:
        fill_with_action(table, names, details, chosen)
    print_table(table)


def make_observation(images: list[tuple[str | None, str]], cameras: list[str] | None) -> Any:
    """Arrange the images as the processor takes them: one image, a list, or a dict by camera.

    Raises:
        ValueError: Only some images name their camera, a camera has two images, or there are too many images.
    """
    names = [name for name, _ in images if name is not None]
    if names:
        if len(names) < len(images) or len({*names}) < len(names):
            raise ValueError(
                "Some --image options repeat a camera or name none: give one CAMERA=IMAGE for each camera."
            )
        return dict(images)
    paths = [path for _, path in images]
    if cameras is None and len(paths) > 1:
        raise ValueError(f"Got {len(paths)} images, but this policy takes one: give --image once.")
    return paths[0] if cameras is None else paths


def fill_with_action(table: Table, names: Any, details: Any, chosen: Any) -> None:
    """Add a row for each dimension of an action."""
    for column in ("", "value", "normalised", "token", "probability"):
        table.add_column(column, justify="right")
    for name, value, normalised, token, probability in zip(
        names, details.actions[0], details.normalized_actions[0], details.token_ids[0], chosen, strict=True
    ):
        table.add_row(name, f"{value:+.4f}", f"{normalised:+.3f}", str(token), f"{probability:.1%}")


def fill_with_chunk(table: Table, names: Any, actions: Any, chosen: Any) -> None:
    """Add a row for each action (K, A) of a chunk, with its least probability if the actions are tokens."""
    for column in ("step", *names, *(() if chosen is None else ("probability",))):
        table.add_column(column, justify="right")
    for step, action in enumerate(actions):
        least = () if chosen is None else (f"{chosen[step].min():.1%}",)
        table.add_row(str(step), *(f"{value:+.4f}" for value in action), *least)
