"""Measure a server on the loopback interface: what it adds to a prediction, and how it serves many robots at once.

    python benchmarks/serving.py overhead                     # one robot
    python benchmarks/serving.py load --robots 32 --seconds 60

`openvla-hf serve` runs in its own process, with the policy that ships with the package or with --model. Clients send
256 x 256 JPEG images of the tabletop. `load` compares every answer with a single call of `predict_action`, and also
measures a single robot in the same run. Run nothing else on the machine meanwhile.
"""

import argparse
import asyncio
import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from openvla_hf.cli.common import default_model, load_model
from openvla_hf.tabletop.env import TabletopEnv
from openvla_hf.tabletop.rollouts import FIRST_UNSEEN_SEED


SIDE = 256
JPEG_QUALITY = 95
FRAMES = 8  # of each robot
BLOCK, WARM_UP = 20, 3  # calls of one kind before those of the next
READ_BYTES = 65_536
TOLERANCE = 1e-6  # in robot units
PERCENTILES = (50, 95, 99)


@dataclass
class Frame:
    """What a robot sends, and the action that it should get."""

    jpeg: bytes
    instruction: str
    expected: np.ndarray | None = None


@contextlib.contextmanager
def running_server(model: str, *options: str) -> Iterator[tuple[str, int]]:
    """Start a server on a free port, and yield its URL and process id."""
    command = [sys.executable, "-m", "openvla_hf.cli", "serve", model, "--port", "0", "--json", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        ready = process.stdout.readline()
        if not ready:
            raise SystemExit("The server did not start.")
        yield json.loads(ready)["url"], process.pid
    finally:
        process.terminate()
        process.wait()


def make_frames(robot: int) -> list[Frame]:
    """Make the frames of one robot: images of an episode of its own."""
    env = TabletopEnv()
    image, info = env.reset(seed=FIRST_UNSEEN_SEED + robot)
    frames = []
    for _ in range(FRAMES):
        file = io.BytesIO()
        Image.fromarray(image).resize((SIDE, SIDE)).save(file, "JPEG", quality=JPEG_QUALITY)
        frames.append(Frame(file.getvalue(), info["instruction"]))
        image, *_ = env.step(env.action_space.sample())
    return frames


def predict(model: Any, processor: Any, frame: Frame) -> np.ndarray:
    """Predict in this process, including the decoding of the JPEG."""
    return model.predict_action(**processor(Image.open(io.BytesIO(frame.jpeg)), instruction=frame.instruction))


def overhead(options: argparse.Namespace) -> dict[str, Any]:
    """Time calls in this process and over HTTP, in alternating blocks."""
    model, processor = load_model(options.model)
    frames = make_frames(0)
    blocks = max(options.rounds // BLOCK, 1)
    inputs = [processor(Image.open(io.BytesIO(one.jpeg)), instruction=one.instruction) for one in frames]
    seconds: dict[str, list[float]] = {"predict_action": [], "JPEG to action": [], "over HTTP": []}
    around: list[float] = []
    with running_server(options.model) as (url, _), contextlib.closing(connect(url)) as connection:
        requests = [write_request(url, one) for one in frames]
        calls: dict[str, Callable[[int], Any]] = {
            "predict_action": lambda number: model.predict_action(**inputs[number]),
            "JPEG to action": lambda number: predict(model, processor, frames[number]),
            "over HTTP": lambda number: ask(connection, requests[number]),
        }
        for _ in track(range(blocks), "calls", console=Console(stderr=True)):
            for name, call in calls.items():
                for number in range(-WARM_UP, BLOCK):
                    started = time.perf_counter()
                    answer = call(number % FRAMES)
                    taken = time.perf_counter() - started
                    if number >= 0:
                        seconds[name].append(taken)
                        if name == "over HTTP":
                            timings = answer["timings"]
                            around.append(1000 * taken - timings["preprocess_ms"] - timings["model_ms"])
    medians = {name: np.median(np.reshape(values, (blocks, BLOCK)), axis=1) for name, values in seconds.items()}
    added = 1000 * (medians["over HTTP"] - medians["JPEG to action"])
    return {
        "calls": blocks * BLOCK,
        "median_ms": {name: 1000 * float(np.median(values)) for name, values in seconds.items()},
        "added_ms": float(np.median(added)),
        "added_quartiles_ms": np.percentile(added, (25, 75)).tolist(),
        "around_ms": float(np.median(around)),
        "around_quartiles_ms": np.percentile(around, (25, 75)).tolist(),
    }


def connect(url: str) -> socket.socket:
    """Connect with a bare socket, so that the time is that of the server."""
    host, _, port = url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)))
    # Otherwise the kernel may hold back the end of a request until its beginning has been acknowledged.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def write_request(url: str, frame: Frame) -> bytes:
    """Write the form of a frame as a request."""
    form = httpx.Request("POST", f"{url}/v1/act", data={"instruction": frame.instruction}, files={"image": frame.jpeg})
    body = form.read()
    head = b"".join(b"%s: %s\r\n" % header for header in form.headers.raw)
    return b"POST /v1/act HTTP/1.1\r\n%s\r\n%s" % (head, body)


def ask(connection: socket.socket, request: bytes) -> dict[str, Any]:
    """Send a request and read its answer."""
    connection.sendall(request)
    received = connection.recv(READ_BYTES)
    while b"\r\n\r\n" not in received:
        received += connection.recv(READ_BYTES)
    head, _, body = received.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    while len(body) < length:
        body += connection.recv(READ_BYTES)
    if not head.startswith(b"HTTP/1.1 200 "):
        raise SystemExit(f"The server answered: {received.decode()}")
    return json.loads(body)


@dataclass
class Phase:
    """Result of robots that acted for some time."""

    robots: int
    seconds: float
    answers: int
    errors: int
    wrong: int
    milliseconds: list[float]
    mean_batch: float
    answers_per_second: float

    @classmethod
    def of(cls, robots: int, seconds: float, times: list[float], batches: list[int], errors: int, wrong: int) -> Any:
        percentiles = [1000 * float(value) for value in np.percentile(times, PERCENTILES)]
        count = len(times)
        return cls(robots, seconds, count, errors, wrong, percentiles, float(np.mean(batches)), count / seconds)


async def act(url: str, robots: list[list[Frame]], seconds: float) -> Phase:
    """Let robots act at the same time, each as fast as it gets answers, and check the answers."""
    times: list[float] = []
    batches: list[int] = []
    errors = wrong = 0
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as client:
        end = time.perf_counter() + seconds

        async def run(frames: list[Frame]) -> None:
            nonlocal errors, wrong
            session = (await client.post("/v1/sessions")).json()["session"]
            number = 0
            while time.perf_counter() < end:
                frame = frames[number % len(frames)]
                number += 1
                fields = {"instruction": frame.instruction, "session": session}
                started = time.perf_counter()
                answer = await client.post("/v1/act", data=fields, files={"image": frame.jpeg})
                times.append(time.perf_counter() - started)
                if answer.status_code != httpx.codes.OK:
                    errors += 1
                    continue
                found = answer.json()
                batches.append(found["batch_size"])
                wrong += not np.allclose(found["actions"][0], frame.expected, atol=TOLERANCE, rtol=0)

        await asyncio.gather(*map(run, robots))
    return Phase.of(len(robots), seconds, times, batches, errors, wrong)


def resident_mib(pid: int) -> float:
    """Return the resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"Process {pid} has no VmRSS.")


async def watched(phase: Any, pid: int) -> tuple[Phase, list[float]]:
    """Sample the server's memory every second during a phase."""
    acting = asyncio.ensure_future(phase)
    samples = []
    while not acting.done():
        samples.append(resident_mib(pid))
        await asyncio.wait([acting], timeout=1)
    return await acting, samples


def load(options: argparse.Namespace) -> dict[str, Any]:
    """Measure one robot, then many, then one again."""
    model, processor = load_model(options.model)
    robots = [make_frames(robot) for robot in range(options.robots)]
    for frames in track(robots, "single calls", console=Console(stderr=True)):
        for frame in frames:
            frame.expected = predict(model, processor, frame)
    del model
    batch = ("--max-batch", str(options.max_batch), "--max-wait-ms", str(options.max_wait_ms))
    with running_server(options.model, *batch) as (url, pid):
        asyncio.run(act(url, robots, 3))  # each size of a batch is slower at first
        alone = asyncio.run(act(url, robots[:1], options.seconds / 4))
        together, memory = asyncio.run(watched(act(url, robots, options.seconds), pid))
        again = asyncio.run(act(url, robots[:1], options.seconds / 4))
    quarter = max(1, len(memory) // 4)
    rate_alone = (alone.answers + again.answers) / (alone.seconds + again.seconds)
    return {
        "phases": [asdict(phase) for phase in (alone, together, again)],
        "speed_up": together.answers_per_second / rate_alone,
        "memory_mib": {"first_quarter": np.mean(memory[:quarter]), "last_quarter": np.mean(memory[-quarter:])},
    }


def print_overhead(result: dict[str, Any]) -> None:
    table = Table(title=f"One robot, {result['calls']} calls of each kind")
    table.add_column("from")
    table.add_column("median ms", justify="right")
    for name, value in result["median_ms"].items():
        table.add_row(name, f"{value:.2f}")
    Console().print(table)
    for what, name in (
        ("A call over HTTP takes longer by", "added"),
        ("The server adds, without the model and its inputs:", "around"),
    ):
        low, high = result[f"{name}_quartiles_ms"]
        print(f"{what} {result[f'{name}_ms']:.2f} ms (quartiles {low:.2f} to {high:.2f}).")


def print_load(result: dict[str, Any]) -> None:
    table = Table(title="Robots that act as fast as they get answers")
    for column in ("robots", "s", "answers", "errors", "wrong", "answers/s", "p50 ms", "p95 ms", "p99 ms", "batch"):
        table.add_column(column, justify="right")
    for phase in result["phases"]:
        numbers = [f"{value:.0f}" for value in phase["milliseconds"]]
        table.add_row(
            str(phase["robots"]),
            f"{phase['seconds']:.0f}",
            *(str(phase[name]) for name in ("answers", "errors", "wrong")),
            f"{phase['answers_per_second']:.1f}",
            *numbers,
            f"{phase['mean_batch']:.1f}",
        )
    Console(width=120).print(table)
    memory = result["memory_mib"]
    print(
        f"{result['speed_up']:.2f} times the answers of one robot. The server's memory: "
        f"{memory['first_quarter']:.0f} MiB in the first quarter, {memory['last_quarter']:.0f} MiB in the last."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("overhead", "load"))
    parser.add_argument(
        "--model", default=default_model(), help="policy (default: the one that ships with the package)"
    )
    parser.add_argument("--rounds", type=int, default=200, help="calls of each kind for overhead")
    parser.add_argument("--robots", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--max-wait-ms", type=float, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    result = {"overhead": overhead, "load": load}[options.what](options)
    if options.json:
        print(json.dumps(result))
    else:
        {"overhead": print_overhead, "load": print_load}[options.what](result)


if __name__ == "__main__":
    main()
