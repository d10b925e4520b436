"""Measure how fast frames are read on one core, how long a step waits for workers, and whether memory stays constant.

    taskset -c 0 python benchmarks/data.py rlds
    taskset -c 0 python benchmarks/data.py video --codec av1
    python benchmarks/data.py workers
    python benchmarks/data.py memory --gigabytes 20
    taskset -c 0 python benchmarks/data.py lerobot --episodes 100 1000 5000

The data is written to a temporary folder first, except for `memory`, which generates it while reading.
"""

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


SIZE = 256
EPISODE_STEPS = 40


def frames(index: int, steps: int = EPISODE_STEPS, size: int = SIZE) -> Iterator[dict[str, Any]]:
    """Yield an episode of moving images with some noise, which compress about as well as those of a camera."""
    rng = np.random.default_rng(index)
    coarse = rng.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8)
    scene = np.kron(coarse, np.ones((8, 8, 1), np.uint8))
    scene = np.clip(scene + rng.normal(0, 4, scene.shape), 0, 255).astype(np.uint8)
    for step in range(steps):
        yield {
            "image": np.ascontiguousarray(np.roll(scene, step, axis=1)),
            "instruction": f"do task number {index}",
            "action": np.append(rng.normal(0, 0.01, 6), float(step < steps / 2)),
            "state": rng.normal(0, 0.1, 7),
        }


def rate(count: float, seconds: float, unit: str) -> str:
    return f"{count / seconds:,.0f} {unit}/s"


def rlds(args: argparse.Namespace) -> None:
    """Read RLDS files that are in the system's cache, without and with decoding the images."""
    from openvla_hf.data import load, write_rlds
    from openvla_hf.data.frame_spec import FrameSpec
    from openvla_hf.data.loading import open_source
    from openvla_hf.data.robots import GENERIC

    with tempfile.TemporaryDirectory() as folder:
        # JPEG quality 95 makes the records as large as those of Open X-Embodiment.
        write_rlds((frames(index) for index in range(args.episodes)), f"{folder}/bench")
        megabytes = sum(path.stat().st_size for path in Path(folder).rglob("*.tfrecord*")) / 1e6
        count = args.episodes * EPISODE_STEPS
        for _ in range(args.repeats):
            source = open_source(f"{folder}/bench", "train", streaming=True)
            start = time.perf_counter()
            read = sum(
                len(each.instructions) for shard in source.shards() for each in source.read(shard, FrameSpec(GENERIC))
            )
            seconds = time.perf_counter() - start
            assert read == count
            print(f"records, undecoded: {rate(megabytes, seconds, 'MB')}, {rate(count, seconds, 'frames')}", end="; ")
            stream = load(f"{folder}/bench", streaming=True)
            start = time.perf_counter()
            assert sum(1 for _ in stream) == count
            print(f"decoded, as a stream: {rate(count, time.perf_counter() - start, 'frames')}")


def video(args: argparse.Namespace) -> None:
    """Read LeRobot frames in sequence, compared with PyAV alone on the same file, and in random order."""
    import av
    import datasets

    from openvla_hf.data import load, write_lerobot

    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder, "cache")
        episodes = (frames(index) for index in range(args.episodes))
        root = write_lerobot(episodes, f"{folder}/bench", codec=args.codec)
        path = next(root.rglob("*.mp4"))
        count = args.episodes * EPISODE_STEPS
        table = load(root)
        order = np.random.default_rng(0).permutation(count)[:300].tolist()
        for _ in range(args.repeats):
            start = time.perf_counter()
            with av.open(str(path)) as container:
                container.streams.video[0].codec_context.thread_count = 1
                alone = sum(len(frame.to_ndarray(format="rgb24")) > 0 for frame in container.decode(video=0))
            library = time.perf_counter() - start
            assert alone == count
            start = time.perf_counter()
            assert sum(1 for _ in load(root, streaming=True)) == count
            stream = time.perf_counter() - start
            start = time.perf_counter()
            assert sum(1 for _ in table) == count
            ours = time.perf_counter() - start
            start = time.perf_counter()
            for index in order:
                table[index]
            random = time.perf_counter() - start
            print(
                f"{args.codec}: PyAV alone {rate(count, library, 'frames')}; stream {rate(count, stream, 'frames')} "
                f"({library / stream:.2f}x); table {rate(count, ours, 'frames')} ({library / ours:.2f}x); "
                f"at random {rate(len(order), random, 'frames')}"
            )


def lerobot(args: argparse.Namespace) -> None:
    """Make the table of LeRobot files with more and more short episodes: the time per episode should not grow."""
    import datasets
    import pyarrow.parquet as pq

    from openvla_hf.data import load, write_lerobot

    with tempfile.TemporaryDirectory() as folder:
        for count in args.episodes:
            root = write_lerobot((frames(index, steps=8, size=64) for index in range(count)), f"{folder}/bench{count}")
            data = next((root / "data").rglob("*.parquet"))
            for groups in ("a row group for each episode", "one row group"):
                if groups == "one row group":  # like files that were converted from version 2
                    pq.write_table(pq.read_table(data), data)
                seconds = []
                for repeat in range(args.repeats):
                    datasets.config.HF_DATASETS_CACHE = Path(folder, f"cache{count}", groups, str(repeat))
                    start = time.perf_counter()
                    assert len(load(root)) == 8 * count
                    seconds.append(time.perf_counter() - start)
                print(f"{count} episodes in a file, {groups}: {1e3 * min(seconds) / count:.2f} ms an episode")


def workers(args: argparse.Namespace) -> None:
    """Measure how many augmented samples workers deliver, and how long a training step waits for a batch."""
    import datasets
    from torch.utils.data import DataLoader

    from openvla_hf.data import Augmentation, load, write_lerobot, write_rlds
    from openvla_hf.modeling.action_tokenizer import ActionTokenizer
    from openvla_hf.testing import BRIDGE_LIKE_STATS, tiny_config, tiny_processor, tiny_tokenizer
    from openvla_hf.training.collator import ActionCollator

    tokenizer = tiny_tokenizer()
    processor = tiny_processor(tokenizer, tiny_config(tokenizer, image_size=224))
    collate = ActionCollator(processor, ActionTokenizer(), BRIDGE_LIKE_STATS, augment=Augmentation())
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder, "cache")
        write_rlds((frames(index) for index in range(args.episodes)), f"{folder}/rlds")
        write_lerobot((frames(index) for index in range(args.episodes)), f"{folder}/lerobot", codec=args.codec)
        for name in ("rlds", "lerobot"):
            table = load(f"{folder}/{name}").shuffle(seed=0)
            loader = DataLoader(table, args.batch_size, num_workers=args.workers, collate_fn=collate, drop_last=True)
            batches = iter(loader)
            next(batches)  # the workers have started
            start = time.perf_counter()
            count = args.batch_size * sum(1 for _ in batches)
            seconds = time.perf_counter() - start
            # Simulate a device that computes during the step and leaves the cores to the workers, as a GPU does.
            waits, batches = [], iter(loader)
            next(batches)
            time.sleep(args.step_seconds)
            while True:
                start = time.perf_counter()
                if next(batches, None) is None:
                    break
                waits.append(time.perf_counter() - start)
                time.sleep(args.step_seconds)
            print(
                f"{name}: {args.workers} workers deliver {rate(count, seconds, 'samples')}; after a step of "
                f"{args.step_seconds:.2f} s, the wait for a batch of {args.batch_size} is "
                f"{1e3 * np.median(waits):.1f} ms (median), {1e3 * max(waits):.0f} ms (longest)"
            )


def memory(args: argparse.Namespace) -> None:
    """Measure the resident memory over an epoch of generated episodes, with a shuffle buffer."""
    from openvla_hf.data import from_episodes

    page = os.sysconf("SC_PAGE_SIZE")
    total = int(args.gigabytes * 1e9 / SIZE**2 / 3)

    def episodes() -> Iterator[list[dict[str, Any]]]:
        base = list(frames(0))
        for index in range(total // EPISODE_STEPS):
            yield [{**frame, "image": np.roll(frame["image"], index, axis=0)} for frame in base]

    stream = from_episodes(episodes, name="bench", streaming=True).shuffle(seed=0, buffer_size=args.buffer)
    seen, first, highest, start = 0, 0, 0, time.perf_counter()
    for frame in stream:
        seen += 1
        assert frame["image"].shape == (SIZE, SIZE, 3)
        if seen % 500 == 0:
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * page / 1e6
            # The buffer is full from here on.
            first = first or (resident if seen > args.buffer else 0)
            highest = max(highest, resident)
    speed = rate(seen, time.perf_counter() - start, "frames")
    print(
        f"{seen * SIZE**2 * 3 / 1e9:.1f} GB in {seen} frames, {speed}: resident {first:.0f} MB once the buffer of "
        f"{args.buffer} is full, {highest:.0f} MB at most: +{highest - first:.0f} MB; "
        f"peak of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for run in (rlds, video, lerobot, workers, memory):
        command = commands.add_parser(run.__name__, help=run.__doc__)
        command.set_defaults(run=run)
        if run is memory:
            command.add_argument(
                "--gigabytes", type=float, default=20.0, help="raw pixels in GB (default: %(default)s)"
            )
            command.add_argument("--buffer", type=int, default=500, help="frames in the buffer (default: %(default)s)")
        elif run is lerobot:
            command.add_argument(
                "--episodes", type=int, nargs="+", default=[100, 1000, 5000], help="with 8 frames each"
            )
        else:
            command.add_argument("--episodes", type=int, default=50, help="with 40 frames each (default: %(default)s)")
        if run in (rlds, video, lerobot):
            command.add_argument("--repeats", type=int, default=3)
        if run in (video, workers):
            command.add_argument("--codec", choices=("h264", "av1"), default="h264")
        if run is workers:
            command.add_argument("--workers", type=int, default=2)
            command.add_argument("--batch-size", type=int, default=16)
            # openvla-7b with LoRA on one GPU takes about as long as this or longer.
            command.add_argument("--step-seconds", type=float, default=0.5)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
