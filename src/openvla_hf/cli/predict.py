"""Print the action for one image and one instruction."""

import argparse
import warnings

from PIL import Image
from rich.table import Table

from .common import (
    DTYPES,
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
    parser.add_argument("--image", type=image, required=True, help="file or URL of the camera image")
    parser.add_argument("--instruction", required=True, help="what the robot should do")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="data type (default: that of the checkpoint)")


def run(args: argparse.Namespace) -> None:
    # The processor refuses such an image, so no warning is needed.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    model, processor = load_model(args.model or default_model(), args.dtype, args.device)
    inputs = processor(args.image, instruction=args.instruction)
    details = model.predict_action(**inputs, unnorm_key=args.unnorm_key, return_details=True)
    action, token_ids = details.actions[0], details.token_ids[0]
    chosen = details.probabilities[0].max(-1)
    names = dimension_names(len(action), model.get_action_stats(args.unnorm_key).get("names"))
    if args.json:
        print_json(
            {
                "instruction": args.instruction,
                "names": list(names),
                "action": action.tolist(),
                "normalized_action": details.normalized_actions[0].tolist(),
                "token_ids": token_ids.tolist(),
                "probabilities": chosen.tolist(),
            }
        )
        return
    table = Table(title=args.instruction)
    for column in ("", "value", "normalised", "token", "probability"):
        table.add_column(column, justify="right")
    for name, value, normalised, token, probability in zip(
        names, action, details.normalized_actions[0], token_ids, chosen, strict=True
    ):
        table.add_row(name, f"{value:+.4f}", f"{normalised:+.3f}", str(token), f"{probability:.1%}")
    print_table(table)
