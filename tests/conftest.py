import contextlib
import functools
import json
import logging.handlers
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

import openvla_hf  # noqa: F401  registers the Auto classes
from openvla_hf.testing import tiny_config, tiny_processor, tiny_tokenizer


GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The recorded outputs of the original code; see tests/parity/README.md."""
    if not GOLDEN.is_dir():
        pytest.skip(f"no recorded outputs of the original code at {GOLDEN}")
    return GOLDEN


def read_tower_overrides(folder: Path) -> dict[str, dict[str, int]]:
    """The tiny towers of a recorded checkpoint, whose published config names only the full-size ones."""
    dims = json.loads((folder / "tiny_dims.json").read_text())

    def tower(name: str) -> dict[str, int]:
        width, depth, heads = (dims[name][key] for key in ("embed_dim", "depth", "num_heads"))
        return {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}

    siglip = tower("siglip") | {"intermediate_size": dims["siglip_mlp_hidden"]}
    if dims["dino"] is None:
        return {"vision_config": siglip}
    return {"vision_config": tower("dino"), "fused_vision_config": siglip}


@pytest.fixture(scope="session")
def tower_overrides():
    return read_tower_overrides


class Recorded:
    """A published checkpoint in miniature, and what the original code made of it in float32."""

    def __init__(self, folder: Path):
        self.checkpoint = folder / "checkpoint"
        self.overrides = read_tower_overrides(folder)
        self.cases = json.loads((folder / "cases.json").read_text())
        self.expected = json.loads((folder / "expected.json").read_text())
        self.tensors = load_file(folder / "expected.safetensors")
        self.inputs = load_file(folder / "inputs.safetensors")
        self.images = [Image.open(folder / path) for path in self.cases["images"]]

    def load(self, loader: Any = AutoModel, **kwargs: Any) -> Any:
        kwargs = {"dtype": torch.float32} | self.overrides | kwargs
        return loader.from_pretrained(self.checkpoint, **kwargs)

    @functools.cached_property
    def model(self) -> Any:
        """Shared by the tests of a session, which must leave it as it is."""
        return self.load()

    @functools.cached_property
    def processor(self) -> Any:
        return AutoProcessor.from_pretrained(self.checkpoint)

    @functools.cached_property
    def pixel_values(self) -> torch.Tensor:
        return self.processor.image_processor(self.images)["pixel_values"]

    def prompt(self, index: int) -> torch.Tensor:
        """(1, T) ids without placeholders."""
        return torch.tensor([self.processor.tokenizer(self.cases["prompts"][index])["input_ids"]])


@pytest.fixture(scope="session")
def recorded(golden):
    return functools.cache(lambda case: Recorded(golden / case))


@pytest.fixture
def silent(monkeypatch, recwarn):
    """Whatever a test does, the terminal is asked nothing and nobody is warned."""

    def refuse(prompt=""):
        raise AssertionError(f"asked: {prompt}")

    monkeypatch.setattr("builtins.input", refuse)
    handler = logging.handlers.BufferingHandler(capacity=100)
    handler.setLevel(logging.WARNING)
    logging.getLogger("transformers").addHandler(handler)
    yield
    logging.getLogger("transformers").removeHandler(handler)
    assert [record.getMessage() for record in handler.buffer] == []
    assert [str(warning.message) for warning in recwarn] == []


@pytest.fixture
def run_python(tmp_path):
    """Runs code in a fresh interpreter with nobody at the terminal and no network."""

    def run(code: str, *args: object, **env: str) -> subprocess.CompletedProcess[str]:
        offline = {
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HOME": str(tmp_path / "home"),
            "HF_MODULES_CACHE": str(tmp_path / "modules"),
        }
        result = subprocess.run(
            [sys.executable, "-c", code, *map(str, args)],
            env=os.environ | offline | env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result

    return run


@pytest.fixture
def hub(tmp_path):
    """A stand-in for the Hub."""
    with HubServer(tmp_path / "hub") as server:
        yield server


@pytest.fixture
def owner(hub, monkeypatch, tmp_path):
    """This process takes the stand-in for the Hub, with the owner's token and an empty cache."""
    for name, value in {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it keeps the address of its first call
    monkeypatch.setenv("HF_TOKEN", hub.token)
    return hub


@pytest.fixture
def full_disk():
    """Within `full_disk()`, a file can't grow beyond a few bytes: the system refuses to write more."""

    @contextlib.contextmanager
    def limit(size: int = 1000):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def tiny(tokenizer):
    """Builds a tiny model with random weights and its processor: `tiny(fused=False, ...)`."""

    def build(seed: int = 0, **fields: Any) -> tuple[Any, Any]:
        config = tiny_config(tokenizer, **fields)
        torch.manual_seed(seed)
        model = AutoModel.from_config(config).eval()
        for parameter in model.parameters():
            # Bigger than a fresh model's: inputs must matter.
            torch.nn.init.normal_(parameter, std=0.15)
        return model, tiny_processor(tokenizer, config)

    return build
