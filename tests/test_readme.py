"""Every code block of the README runs, against a stand-in for the Hub that has what the blocks name."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hub_server import HubServer
from PIL import Image

from openvla_hf.data import write_lerobot
from openvla_hf.testing import BRIDGE_LIKE_STATS, fake_episode


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# A tiny model on a CPU: two steps instead of thousands.
SMALLER = {"finetune": "--steps 2 --workers 0 --set dtype=float32 batch_size=2 lora_rank=2 use_cpu=true --json"}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def hub(tiny, tmp_path):
    """The repositories that the README names, small, and `frame.png` in the folder where its code runs."""
    with HubServer(tmp_path / "hub") as server:
        statistics = {key: {"action": BRIDGE_LIKE_STATS} for key in ("bridge_orig", "fractal20220817_data")}
        for one in tiny(norm_stats=statistics):
            one.save_pretrained(server.root / "openvla/openvla-7b")
        write_lerobot([fake_episode(seed=seed, steps=6) for seed in range(2)], server.root / "datasets/lab/kitchen")
        yield server


def test_the_python_blocks_run_one_after_the_other(hub, run_python, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "\n".join([*blocks("python"), "print(action.shape, action.dtype, details.probabilities.shape)"])
    result = run_python(code, **hub.env)
    assert result.stdout.splitlines()[-1] == "(7,) float64 (2, 7, 256)"
    assert Image.open(tmp_path / "frame.png").size == (224, 224)


@pytest.mark.slow
def test_the_commands_run_one_after_the_other(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in {**hub.env, "HF_HOME": str(tmp_path / "home")}.items():
        monkeypatch.setenv(name, value)
    Image.fromarray(fake_episode(steps=1)[0]["image"]).save("frame.png")
    ran = []
    for line in "".join(blocks("bash")).splitlines():
        program, *arguments = shlex.split(line, comments=True)
        if program == "make":
            # They build an environment of their own: whether the targets are there is what can be seen here.
            subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True)
            continue
        assert program == "openvla-hf"
        arguments += shlex.split(SMALLER.get(arguments[0], ""))
        command = [sys.executable, "-m", "openvla_hf.cli", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{line}\n{result.stderr}"
        ran.append(arguments[0])
    assert ran == ["predict", "doctor", "finetune", "merge", "quantize", "push", "info"]
    pushed = hub.files("someone/openvla-7b-kitchen")
    assert json.loads(pushed["adapter_config.json"])["base_model_name_or_path"] == "openvla/openvla-7b"
    assert "datasets:\n- lab/kitchen" in pushed["README.md"].decode()


def test_what_it_names_is_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"sim", "data", "quantize"} <= project["optional-dependencies"].keys()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
    configs = re.findall(r"\$CONFIGS/([\w.]+)", README + (ROOT / "docs/finetuning.md").read_text(encoding="utf-8"))
    assert len(set(configs)) == 3
    for name in configs:
        # In the package, so that it is installed with it.
        assert (ROOT / "src/openvla_hf/configs" / name).is_file(), name
    tree = re.findall(r"^  ([\w/.]+(?:, [\w/.]+)*)\s{2,}", README[README.index("src/openvla_hf/") :], re.MULTILINE)
    files = [name for names in tree for name in names.split(", ")]
    assert len(files) > 10
    for name in files:
        assert (ROOT / "src/openvla_hf" / name).exists(), name
