"""Measure how often the tokens of the last action are right for the next one, in a policy's rollouts on the tabletop.

    python benchmarks/drafts.py --model outputs/tabletop --observations 2000 --json

One robot acts with an `ActionStream`. On each frame, plain `predict_action` is timed too, and both must give the same
tokens as `generate`. So must a third prediction, whose draft is right, wrong, random, too short and too long in turn.
"""

import argparse
import json
import sys
import time
from collections import Counter
from itertools import count
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from openvla_hf.cli.common import default_model, load_model
from openvla_hf.evaluation.latency import generate_action_ids, prepare_inputs
from openvla_hf.tabletop.env import TabletopEnv
from openvla_hf.tabletop.rollouts import FIRST_UNSEEN_SEED


def draft(kind: int, right: np.ndarray, model: Any, rng: np.random.Generator) -> np.ndarray:
    """Make a draft for ids (1, A): right, wrong, random, too short, too long."""
    first_id, end_id = model.action_tokenizer.first_id, model.action_tokenizer.vocab_end
    wrong = first_id + (right - first_id + 1) % (end_id - first_id)
    guesses = [right, wrong, rng.integers(first_id, end_id, right.shape), right[:, :3], np.tile(right, 2)]
    return guesses[kind % len(guesses)]


def measure(model: Any, processor: Any, observations: int, unnorm_key: str | None, quiet: bool) -> dict[str, Any]:
    """Act on a number of frames, and measure the passes, the time and the number of frames whose tokens differ."""
    rng, env, stream = np.random.default_rng(0), TabletopEnv(), model.action_stream(unnorm_key)
    steps = model.get_action_dim(unnorm_key)
    passes: Counter[int] = Counter()
    seconds: dict[str, list[float]] = {"plain": [], "stream": []}
    differing, seeds, done = 0, count(FIRST_UNSEEN_SEED), True
    for number in track(range(observations), "acting", console=Console(stderr=True), disable=quiet):
        if done:
            image, info = env.reset(seed=next(seeds))
            instruction = info["instruction"]
            stream.reset()
        inputs = processor(image, instruction=instruction)
        predictions = {}
        for name in ("plain", "stream") if number % 2 else ("stream", "plain"):
            start = time.perf_counter()
            if name == "plain":
                predictions[name] = model.predict_action(**inputs, unnorm_key=unnorm_key, return_details=True)
            else:
                predictions[name] = stream.predict_action(**inputs, return_details=True)
            seconds[name].append(time.perf_counter() - start)
        passes[stream.forward_passes] += 1
        right = generate_action_ids(model, prepare_inputs(model, inputs), steps)
        guess = draft(number, right, model, rng)
        predictions["draft"] = model.predict_action(
            **inputs, unnorm_key=unnorm_key, return_details=True, draft_token_ids=guess
        )
        differing += any(not np.array_equal(one.token_ids, right) for one in predictions.values())
        image, _, terminated, truncated, _ = env.step(predictions["stream"].actions[0])
        done = terminated or truncated
    mean_passes = sum(number * times for number, times in passes.items()) / observations
    return {
        "observations": observations,
        "observations_with_other_tokens_than_generate": differing,
        "passes_without_draft": steps,
        "mean_passes": mean_passes,
        "passes": {number: passes[number] for number in sorted(passes)},
        "median_seconds": {name: float(np.median(values)) for name, values in seconds.items()},
        "mean_seconds": {name: float(np.mean(values)) for name, values in seconds.items()},
    }


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark, and return exit status 1 if any token differed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id (default: the tabletop policy that ships with the package)")
    parser.add_argument("--observations", type=int, default=2000, help="frames to act on (default: %(default)s)")
    parser.add_argument("--unnorm-key", help="statistics to use, if the model has several")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object on standard output, and nothing else"
    )
    args = parser.parse_args(argv)
    model, processor = load_model(args.model or default_model())
    result = measure(model, processor, args.observations, args.unnorm_key, quiet=args.json)
    if args.json:
        print(json.dumps(result))
    else:
        plain, stream = (result["median_seconds"][name] for name in ("plain", "stream"))
        table = Table("", "plain", "drafts of the last action", title=f"{args.observations} frames of rollouts")
        table.add_row("mean passes", str(result["passes_without_draft"]), f"{result['mean_passes']:.2f}")
        table.add_row("median, ms", f"{1e3 * plain:.1f}", f"{1e3 * stream:.1f}")
        for number, times in result["passes"].items():
            table.add_row(f"  {number} passes", "", f"{times / args.observations:.1%}")
        Console().print(table)
        print(f"{result['observations_with_other_tokens_than_generate']} frames whose tokens differ from generate's")
    return int(result["observations_with_other_tokens_than_generate"] > 0)


if __name__ == "__main__":
    sys.exit(main())
