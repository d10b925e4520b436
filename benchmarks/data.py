"""Measure how fast frames are read, how long a step waits for workers, what a mixture draws, and the memory in use.

    taskset -c 0 python benchmarks/data.py rlds
    taskset -c 0 python benchmarks/data.py video --codec av1
    python benchmarks/data.py workers
    python benchmarks/data.py memory --gigabytes 20
    taskset -c 0 python benchmarks/data.py lerobot --episodes 100 1000 5000
    python benchmarks/data.py mixture --gigabytes 20
    taskset -c 0 python benchmarks/data.py throughput --tensorflow /path/to/python

`--tensorflow` takes the Python of a virtual environment with tensorflow-cpu, whose pipeline then reads the same files.

The data is written to a temporary folder first, except for `memory`, which generates it while reading.
"""

import argparse
import itertools
import os
import resource
import subprocess
import tempfile
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np


SIZE = 256
EPISODE_STEPS = 40
# Ten datasets: the weight of each in the mixture, and the number of its episodes.
MIXTURE = {
    f"robot{index}": (weight, 6 + 2 * index) for index, weight in enumerate([1, 0.5, 2, 1, 1.5, 1, 3, 0.2, 1, 1])
}
BATCH = 16
RESUMED_BATCHES = 20


def frames(index: int, steps: int = EPISODE_STEPS, size: int = SIZE, width: int = 0) -> Iterator[dict[str, Any]]:
    """Yield an episode of moving images with some noise, which compress about as well as those of a camera."""
    rng = np.random.default_rng(index)
    coarse = rng.integers(0, 256, (size // 8, (width or size) // 8, 3), dtype=np.uint8)
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


def write_mixture(folder: str, scale: float = 1.0) -> dict[str, float]:
    """Write the datasets of `MIXTURE` with images of 480 x 640, and return the mean bytes of a frame of each."""
    from openvla_hf.data import write_rlds

    sizes = {}
    for number, (name, (_, count)) in enumerate(MIXTURE.items()):
        episodes = max(4, round(scale * count))
        made = (frames(1000 * number + index, size=480, width=640) for index in range(episodes))
        root = write_rlds(made, f"{folder}/{name}", episodes_per_file=2)
        sizes[name] = sum(path.stat().st_size for path in root.glob("*.tfrecord*")) / episodes / EPISODE_STEPS
    return sizes


def load_ten(folder: str, buffer: int) -> Any:
    from openvla_hf.data import load_mixture

    weights = {name: weight for name, (weight, _) in MIXTURE.items()}
    return load_mixture(weights, folder, streaming=True, shuffle_buffer=buffer)


def note_batch(batch: list[dict[str, Any]]) -> tuple[list[tuple[Any, ...]], float]:
    """Return what identifies the frames of a batch, and the resident memory of the worker (MB)."""
    names = ("dataset", "episode_index", "frame_index", "epoch")
    noted = [(*(frame[name] for name in names), zlib.crc32(frame["image"])) for frame in batch if frame]
    return noted, int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def read_rank(folder: str, rank: int, args: argparse.Namespace, first: int, batches: int) -> list[Any]:
    """Draw the batches of a rank as in training. Batches before the first one are passed over, as in a resumed run."""
    from torch.utils.data import DataLoader

    from openvla_hf.data import TrainingStream
    from openvla_hf.data.frames import FrameDecoder

    class Undecoded(FrameDecoder):
        def decode_row(self, row: dict[str, Any]) -> dict[str, Any]:
            return row | {"image": row["image"]["bytes"]}

    stream = TrainingStream(load_ten(folder, args.buffer), rank, args.ranks, BATCH)
    stream.first_batch = first
    if args.undecoded:
        stream.decoder = Undecoded()
    loader = DataLoader(stream, BATCH, num_workers=args.workers, collate_fn=note_batch)
    return list(itertools.islice(loader, batches))[first:]


def read_ranks(folder: str, args: argparse.Namespace, first: int, batches: int) -> list[list[Any]]:
    with ProcessPoolExecutor(args.ranks) as pool:
        started = [pool.submit(read_rank, folder, rank, args, first, batches) for rank in range(args.ranks)]
        return [each.result() for each in started]


def mixture(args: argparse.Namespace) -> None:
    """Check what several ranks and workers draw from a mixture of ten datasets, and measure their memory."""
    import datasets

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder, "cache")
        sizes = write_mixture(folder, args.scale)
        stream = load_ten(folder, args.buffer)
        shares = {part.name: share for part, share in stream.parts}
        lengths = {part.name: part.shards.source.num_episodes * EPISODE_STEPS for part, _ in stream.parts}
        mean_size = sum(shares[name] * sizes[name] for name in sizes)
        batches = round(args.gigabytes * 1e9 / mean_size / args.ranks / BATCH)
        start = time.perf_counter()
        ranks = read_ranks(folder, args, 0, batches)
        seconds = time.perf_counter() - start
        # Workers make the batches of a rank in turn.
        readers = [each[worker :: args.workers] for each in ranks for worker in range(args.workers)]
        drawn = [[row for rows, _ in reader for row in rows] for reader in readers]
        total = sum(map(len, drawn))
        print(f"{total} frames, {total * mean_size / 1e9:.1f} GB of records; {rate(total, seconds, 'frames')} in all")
        check_passes(drawn, lengths)
        check_shares(Counter(row[0] for reader in drawn for row in reader), shares, total)
        middle = max(0, batches - RESUMED_BATCHES)
        resumed = read_ranks(folder, args, middle, batches)
        same = [[rows for rows, _ in one] for one in resumed] == [[rows for rows, _ in one[middle:]] for one in ranks]
        print(f"resumed at batch {middle} of {batches}: {'the same' if same else 'OTHER'} frames, bit for bit")
        for number, reader in enumerate(readers):
            memory = [resident for _, resident in reader]
            second, last = memory[len(memory) // 3 : 2 * len(memory) // 3], memory[2 * len(memory) // 3 :]
            print(f"reader {number}: {max(second):.0f} MB in the second third, {max(last):.0f} MB in the last")


def check_passes(drawn: list[list[tuple[Any, ...]]], lengths: dict[str, int]) -> None:
    """Check that the readers together draw each frame once in each pass, and in another order in each."""
    finished, order_differs = 0, []
    for name, length in lengths.items():
        of_pass: dict[int, Counter[Any]] = defaultdict(Counter)
        orders: list[dict[int, list[Any]]] = []
        for reader in drawn:
            order = defaultdict(list)
            for dataset, episode, frame, epoch, _ in reader:
                if dataset == name:
                    of_pass[epoch][episode, frame] += 1
                    order[epoch].append((episode, frame))
            orders.append(order)
        complete = min(max(order, default=0) for order in orders)
        for epoch in range(complete):
            assert len(of_pass[epoch]) == of_pass[epoch].total() == length, (name, epoch)
        finished += complete
        # A reader has the same frames again after as many passes as there are readers.
        for order in orders:
            for epoch in range(complete - len(drawn)):
                again = order[epoch + len(drawn)]
                assert sorted(order[epoch]) == sorted(again), (name, epoch)
                order_differs.append(order[epoch] != again or len(again) < 2)
    print(
        f"{finished} complete passes over datasets: each frame exactly once; {sum(order_differs)} of "
        f"{len(order_differs)} repeated parts in another order"
    )


def check_shares(counts: Counter[str], shares: dict[str, float], total: int) -> None:
    errors = {
        name: (counts[name] - total * share) / np.sqrt(total * share * (1 - share)) for name, share in shares.items()
    }
    worst = max(errors, key=lambda name: abs(errors[name]))
    print(f"shares of the draws: at most {abs(errors[worst]):.1f} standard errors from the weights ({worst})")


def throughput(args: argparse.Namespace) -> None:
    """Measure decoding, resizing and augmenting frames of a mixture, from 480 x 640 to 224 x 224, without workers."""
    import datasets
    import torch

    from openvla_hf.data import Augmentation, TrainingStream

    torch.set_num_threads(1)
    augment = Augmentation()
    script = Path(__file__).with_name("tensorflow_pipeline.py")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder, "cache")
        write_mixture(folder, args.scale)
        stream = TrainingStream(load_ten(folder, args.buffer))
        for _ in range(args.repeats):
            drawn = iter(stream)
            for frame in itertools.islice(drawn, args.buffer // 10):
                augment(frame["image"])
            start = time.perf_counter()
            for frame in itertools.islice(drawn, args.frames):
                augment(frame["image"])
            print(f"480 x 640 JPEG to 224, augmented: {rate(args.frames, time.perf_counter() - start, 'frames')}")
            if args.tensorflow:
                command = [
                    args.tensorflow,
                    str(script),
                    folder,
                    "--frames",
                    str(args.frames),
                    "--buffer",
                    str(args.buffer),
                ]
                subprocess.run(command, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for run in (rlds, video, lerobot, workers, memory, mixture, throughput):
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
        elif run in (mixture, throughput):
            command.add_argument("--scale", type=float, default=1.0, help="multiplies the number of episodes")
            command.add_argument(
                "--buffer", type=int, default=1000, help="frames in the buffer (default: %(default)s)"
            )
            command.add_argument("--folder", help="where the datasets are written (default: a temporary folder)")
        else:
            command.add_argument("--episodes", type=int, default=50, help="with 40 frames each (default: %(default)s)")
        if run is mixture:
            command.add_argument("--gigabytes", type=float, default=20.0, help="GB of records to read")
            command.add_argument(
                "--undecoded", action="store_true", help="leave the images encoded, to read more data"
            )
            command.add_argument("--ranks", type=int, default=2)
            command.add_argument("--workers", type=int, default=2, help="of each rank (default: %(default)s)")
        if run is throughput:
            command.add_argument("--frames", type=int, default=2000, help="to measure (default: %(default)s)")
            command.add_argument("--tensorflow", metavar="PYTHON", help="compare with TensorFlow's pipeline")
        if run in (rlds, video, lerobot, throughput):
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
