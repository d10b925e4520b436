"""The code blocks of the README and of the docs, and how tests run them.

Blocks run in the order of the page, in this process. Beside them is a stand-in for the Hub with small versions of the
repositories that the pages name. A shell reads the blocks of commands, so variables and line continuations are bash's;
`python -c` runs in this process, too.
"""

import contextlib
import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.merge import merge_command_parser
from hub_server import HubServer
from PIL import Image

from openvla_hf.cli import build_parser, main
from openvla_hf.cli.config_file import insert_config
from openvla_hf.data import robots, write_lerobot
from openvla_hf.data.open_x import known_table
from openvla_hf.modeling.checkpoint_files import STATISTICS_FILE
from openvla_hf.serving.vllm import SERVER_OPTIONS
from openvla_hf.testing import BRIDGE_LIKE_STATS, fake_episode, write_tiny_oft


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Arguments that replace `...` in a command.
RUN = ["--model", "openvla/openvla-7b", "--data", "lab/kitchen", "--output", "outputs/kitchen"]
# Folders of the modules that `python -m` runs.
SOURCES = [ROOT / "src", ROOT / "integrations/lerobot/src"]
HARNESSES = ("vla-eval", "lerobot-eval", "lerobot-train", "lerobot-rollout")
# Functions that record a command instead of running it.
RECORD = f"""
record() {{ printf '%s\\0' "$#" "$@" >> "$RECORDED"; }}
for program in openvla-hf accelerate docker pip make hf ray serve vllm python {" ".join(HARNESSES)}; do
    eval "$program() {{ record $program \\"\\$@\\"; }}"
done
taskset() {{ shift 2; "$@"; }}
srun() {{ "$@"; }}
scontrol() {{ echo first; }}
"""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file that its title names, and its text."""

    language: str
    title: str
    code: str


def read_blocks(page: Path) -> list[Block]:
    """Find the fenced blocks of a page."""
    found = re.findall(
        r'^```(\w+)(?: title="([\w.]+)")?\n(.*?)^```$', page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    return [Block(*one) for one in found]


def run_code(code: str) -> str:
    """Return what Python code prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {})
    return printed.getvalue().strip()


def read_commands(code: str, variables: dict[str, str] | None = None) -> list[list[str]]:
    """Let bash read a block, and return the arguments of each command without running any."""
    recorded = Path("recorded")
    environment = {**os.environ, **(variables or {}), "RECORDED": str(recorded)}
    code = re.sub(r'python -c "([^"]+)"', lambda found: f"echo {shlex.quote(run_code(found[1]))}", code)
    subprocess.run(["bash", "-euc", f"set +u\n{RECORD}{code}"], env=environment, check=True)
    words = iter(recorded.read_text().split("\0")[:-1] if recorded.exists() else [])
    recorded.unlink(missing_ok=True)
    return [[next(words) for _ in range(int(count))] for count in words]


def fill_in(arguments: list[str]) -> list[str]:
    """Replace `...` in the arguments of `openvla-hf` with a run, and the GPU with the CPU."""
    filled = [word for argument in arguments for word in (RUN if argument == "..." else [argument])]
    return ["cpu" if word == "cuda" else word for word in filled]


def run_command(*arguments: str) -> str:
    """Run `openvla-hf` in this process, and return its output."""
    printed, complaint = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaint):
        status = main(arguments)
    assert status == 0, f"openvla-hf {' '.join(arguments)}\n{complaint.getvalue()}"
    return printed.getvalue()


def check_command(program: str, *arguments: str) -> None:
    """Check that the options of a command are known and the files that it names exist, without running it."""
    if program == "openvla-hf":
        build_parser().parse_args(insert_config(fill_in(list(arguments))))
    elif (program, arguments[0]) == ("accelerate", "merge-weights"):
        merge_command_parser().parse_args(arguments[1:])
    elif program == "accelerate":
        assert (ROOT / "src/openvla_hf/configs" / Path(arguments[2]).name).is_file(), arguments
        check_command("openvla-hf", *arguments[arguments.index("openvla_hf.cli") + 1 :])
    elif program == "make":
        subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True)
    elif program == "python" and arguments[0] == "-m":
        files = [Path(source, *arguments[1].split(".")) for source in SOURCES]
        assert any(file.with_suffix(".py").is_file() or (file / "__main__.py").is_file() for file in files), arguments
    elif program == "python":
        text = (ROOT / arguments[0]).read_text(encoding="utf-8")
        for option in arguments[1:]:
            assert not option.startswith("--") or f'"{option}"' in text, arguments
    elif program == "docker":
        check_docker(*arguments)
    elif program == "vllm":
        assert arguments[0] == "serve", arguments
        assert {*SERVER_OPTIONS} <= {*arguments}, arguments
    elif program in ("ray", "serve"):  # tests/serving/test_ray.py checks the settings
        assert arguments[0] in ("get-auth-token", "start", "run", "deploy"), arguments
    elif program in HARNESSES:  # integrations/tests runs their commands
        assert arguments[0] == "run" or program != "vla-eval", arguments
    elif program == "pip":
        assert arguments[0] == "install", arguments
    else:
        assert (program, *arguments) == ("hf", "auth", "login")


def check_docker(command: str, *arguments: str) -> None:
    """Check that the files of a command exist, and that the arguments of the image are options of the server."""
    options = [*itertools.pairwise(arguments)]
    for option, value in options:
        assert option != "--file" or (ROOT / value).is_file(), arguments
    if command == "run":
        mounts = [value.split(":") for option, value in options if option == "--volume"]
        outside = {target: source for source, target, *_ in mounts}
        server = arguments[arguments.index("openvla-hf") + 1 :]
        check_command("openvla-hf", "serve", *(outside.get(argument, argument) for argument in server))


@dataclass
class Walk:
    """A walk through a page: the names that its Python blocks define, and what each command printed."""

    names: dict[str, Any]
    printed: list[tuple[list[str], str]]


def write_repositories(root: Path, tiny: Callable[..., tuple[Any, Any]]) -> None:
    """Write small versions of the repositories that the pages name."""
    keys = ("bridge_orig", "fractal20220817_data", "libero_spatial")
    model, processor = tiny(norm_stats={key: {"action": BRIDGE_LIKE_STATS} for key in keys})
    for repository in ("openvla-7b", "openvla-7b-finetuned-libero-spatial"):
        for one in (model, processor):
            one.save_pretrained(root / "openvla" / repository)
    oft = write_tiny_oft(root / "moojink/openvla-7b-oft-finetuned-libero-spatial")
    statistics = json.loads((oft / STATISTICS_FILE).read_text())
    (oft / STATISTICS_FILE).write_text(json.dumps({"libero_spatial_no_noops": statistics["tiny"]}))
    for name in ("kitchen", "workshop"):
        episodes = [fake_episode(seed=seed, steps=6) for seed in range(3)]
        write_lerobot(episodes, root / "datasets/lab" / name)


@pytest.fixture
def small_hub(small_repositories, owner, tmp_path, monkeypatch) -> HubServer:
    """Create small versions of the repositories that the pages name, and `frame.png` where their code runs."""
    (tmp_path / "work").mkdir()
    monkeypatch.setattr(robots, "_REGISTRY", dict(robots._REGISTRY))  # pages register robots
    table = known_table()
    for name in ("datasets", "mixtures"):  # to which pages add
        monkeypatch.setitem(table.__dict__, name, dict(getattr(table, name)))
    monkeypatch.chdir(tmp_path / "work")
    Image.fromarray(fake_episode(steps=1)[0]["image"]).save("frame.png")
    shutil.copytree(small_repositories, owner.root, dirs_exist_ok=True)
    return owner


def walk(
    page: Path, runs: Callable[[list[str]], list[str] | None], smaller: dict[str, str] | None = None, **names: Any
) -> Walk:
    """Go through a page: run its Python blocks, and run or check its commands.

    Args:
        page: The page.
        runs: Returns the arguments to run an `openvla-hf` command with, or `None` to check only its options.
        smaller: Texts in Python blocks -> their replacements, which make a run small.
        names: Names that are defined before the first Python block.
    """
    names = {"__name__": "page", **names}
    printed = []
    for block in read_blocks(page):
        if block.title:
            if block.language == "python":
                compile(block.code, block.title, "exec")
            Path(block.title).write_text(block.code)
        elif block.language == "python":
            code = block.code
            for text, replacement in (smaller or {}).items():
                code = code.replace(text, replacement)
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(code, str(page), "exec"), names)
        elif block.language == "bash":
            for program, *arguments in read_commands(block.code):
                ready = runs(fill_in(arguments)) if program == "openvla-hf" else None
                if ready is None:
                    check_command(program, *arguments)
                else:
                    printed.append((ready, run_command(*ready)))
    return Walk(names, printed)
