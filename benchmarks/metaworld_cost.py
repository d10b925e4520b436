"""Measure the CPU time of an image and of a step of MetaWorld, and the number of steps that an expert needs.

    python benchmarks/metaworld_cost.py

Images are rendered in one thread, with and without shadows, reflections and antialiasing.
"""

import argparse
import os
import time

import numpy as np
from metaworld_experts import Unseen
from rich.console import Console
from rich.table import Table

from openvla_hf.suites.demonstrations import record_episode
from openvla_hf.suites.metaworld import INSTRUCTIONS
from openvla_hf.suites.metaworld_env import CAMERA


SIZE = 224
SETTINGS = ((True, True, 4), (True, True, 0), (False, True, 0), (False, False, 0))
"""Whether there are shadows and reflections, and the samples of a pixel."""


def measure(call, count):
    """Return the milliseconds of CPU time of a call."""
    call()
    started = time.process_time()
    for _ in range(count):
        call()
    return 1000 * (time.process_time() - started) / count


def measure_image(env, shadows, reflections, samples, count):
    """Return the milliseconds of CPU time of an image."""
    import mujoco  # the package chooses how it renders, so the package is imported first

    inner = env.unwrapped._env
    inner.model.vis.quality.offsamples = samples
    renderer = mujoco.Renderer(inner.model, SIZE, SIZE)
    flags = {mujoco.mjtRndFlag.mjRND_SHADOW: shadows, mujoco.mjtRndFlag.mjRND_REFLECTION: reflections}
    for flag, is_on in flags.items():
        renderer.scene.flags[flag] = is_on

    def render():
        renderer.update_scene(inner.data, CAMERA)
        renderer.render()

    milliseconds = measure(render, count)
    renderer.close()
    return milliseconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="drawer-open-v3", help="task to render and to solve")
    parser.add_argument("--images", type=int, default=50, help="images with each setting")
    parser.add_argument("--episodes", type=int, default=10, help="episodes of the expert")
    args = parser.parse_args()
    os.environ["LP_NUM_THREADS"] = "0"  # Mesa renders in the calling thread
    env = Unseen(args.task, INSTRUCTIONS[args.task])
    lengths = [len(record_episode(env, seed, noise=0.0)[0]) for seed in range(args.episodes)]
    env.reset(seed=0)
    action = np.zeros(4, dtype=np.float32)
    step = measure(lambda: env.step(action), 200)
    table = Table("shadows", "reflections", "samples", "CPU time", title=f"An image of {SIZE} x {SIZE} pixels")
    for shadows, reflections, samples in SETTINGS:
        milliseconds = measure_image(env, shadows, reflections, samples, args.images)
        table.add_row(str(shadows), str(reflections), str(samples), f"{milliseconds:.0f} ms")
    Console().print(table)
    print(f"A step takes {step:.1f} ms of CPU time. The expert needs {np.median(lengths):.0f} steps (median).")
    env.close()


if __name__ == "__main__":
    main()
