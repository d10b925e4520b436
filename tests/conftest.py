import contextlib
import copy
import functools
import gc
import importlib.util
import logging.handlers
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import HubServer
from interpreters import NO_COMPILATION, Interpreters


# Slow imports are in fixtures, so that the process that only distributes the tests does not pay for them.
STEPS = 6  # of an episode that `make_episode` makes


def pytest_addoption(parser):
    parser.addoption(
        "--golden",
        metavar="DIR",
        type=os.path.abspath,
        help="compare with the full recordings of the original code in DIR, and run the tests that need these; "
        "see tests/parity/README.md",
    )
    parser.addoption(
        "--samples",
        metavar="DIR",
        type=os.path.abspath,
        help="run the tests that read the datasets in DIR, which other libraries wrote; see CONTRIBUTING.md",
    )
    parser.addoption(
        "--vllm",
        metavar="PYTHON",
        type=os.path.abspath,
        help="run the tests that need vLLM with the interpreter of an environment that has it; see `make test-vllm`",
    )
    parser.addoption(
        "--openpi-client",
        metavar="PYTHON",
        type=os.path.abspath,
        help="run the test with PyPI's openpi-client, which this interpreter imports; see CONTRIBUTING.md",
    )


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Exempt what is imported from garbage collection, and collect less often than every 700 objects.

    A pass over what is imported takes 0.3 s, and a training run does three.
    """
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in NO_COMPILATION.items():
                patch.setenv(name, value)
            return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(20_000)
        gc.enable()


def pytest_collection_modifyitems(config, items):
    """Deselect the tests that need an option such as `--golden`, torchao, Ray or Chromium, where these are missing.

    Files with slow tests come first, then those of training, so that no process is left with a long file at the end.
    """
    missing = {name for name in ("golden", "samples", "openpi_client", "vllm") if config.getoption(name) is None}
    missing |= {name for name in ("metaworld", "libero", "torchao", "ray") if importlib.util.find_spec(name) is None}
    if find_chromium() is None:
        missing.add("chromium")
    needing = [item for item in items if missing.intersection(item.fixturenames)]
    items[:] = [item for item in items if item not in needing]
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, item.path.parent.name != "training"))
    config.hook.pytest_deselected(items=needing)


@pytest.fixture(scope="session")
def golden(pytestconfig) -> Path:
    """The folder of the full recordings. A test with this fixture runs only with `--golden`."""
    return Path(pytestconfig.getoption("golden"))


@pytest.fixture(scope="session")
def samples(pytestconfig) -> Path:
    """The folder of datasets that other libraries wrote. A test with this fixture runs only with `--samples`."""
    return Path(pytestconfig.getoption("samples"))


@pytest.fixture(scope="session")
def openpi_client(pytestconfig) -> str:
    """A Python that has openpi-client. A test with this fixture runs only with `--openpi-client`."""
    return pytestconfig.getoption("openpi_client")


def find_chromium():
    """The path of a Chromium, or `None`."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="session")
def chromium():
    """The path of a Chromium. A test with this fixture runs only where one is installed."""
    return find_chromium()


@pytest.fixture(scope="session")
def vllm(pytestconfig) -> str:
    """The Python of an environment with vLLM. A test with this fixture runs only with `--vllm`."""
    return pytestconfig.getoption("vllm")


@pytest.fixture(scope="session")
def metaworld():
    """MetaWorld, which `dev` does not install. A test with this fixture runs only where MetaWorld is installed."""
    # The first import of MuJoCo fixes how it renders, so it must be the one of the package.
    return importlib.import_module("openvla_hf.suites.metaworld_env")


@pytest.fixture(scope="session")
def libero():
    """LIBERO, which `dev` does not install. A test with this fixture runs only where LIBERO is installed."""
    return importlib.import_module("openvla_hf.suites.libero_env")


@pytest.fixture(scope="session")
def torchao():
    """torchao, which `dev` does not install. A test with this fixture runs only where torchao is installed."""
    return importlib.import_module("torchao")


@pytest.fixture(scope="session")
def ray():
    """Ray, which `make test-ray` installs. A test with this fixture runs only where Ray Serve is installed."""
    return importlib.import_module("ray")


@pytest.fixture(scope="session")
def recordings(pytestconfig, tmp_path_factory):
    """Return a function that gives the folder of a case, as kept in tests/parity or, with `--golden`, in full."""
    from recordings import unpack

    full = pytestconfig.getoption("golden")
    if full is not None:
        yield lambda case: Path(full, case)
        return
    folder = tmp_path_factory.mktemp("recordings")
    yield functools.cache(lambda case: unpack(case, folder / case))
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def recorded(recordings):
    """Return a function that gives the recordings of a case, read once per session."""
    from recordings import Recorded

    return functools.cache(lambda case: Recorded(recordings(case)))


@pytest.fixture
def silent(monkeypatch, recwarn):
    """Fail a test that asks a question on the terminal or gives a warning."""

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


@pytest.fixture(scope="session")
def interpreters(tmp_path_factory):
    """Start Python processes without the seconds that an import of PyTorch takes."""
    folder = tmp_path_factory.mktemp("interpreters")
    with Interpreters(folder) as started:
        yield started
    shutil.rmtree(folder)


@pytest.fixture
def offline(tmp_path):
    """The environment of a process with no network and empty caches."""
    return os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HOME": str(tmp_path / "home"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }


@pytest.fixture
def run_python(interpreters, offline):
    """Return a function that runs code in a process without input or network, with only PyTorch imported before."""

    def run(code: str, *args: object, **env: str) -> subprocess.CompletedProcess[str]:
        result = interpreters.run("-c", code, *map(str, args), env=offline | env)
        assert result.returncode == 0, result.stderr
        return result

    return run


@pytest.fixture
def run_fresh_python(offline):
    """Return a function like `run_python`, but with nothing imported before."""

    def run(code: str, *args: object, **env: str) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            [sys.executable, "-c", code, *map(str, args)],
            env=offline | env,
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
    """Make this process use the stand-in as the Hub, with the owner's token and an empty cache."""
    from huggingface_hub import constants

    for name, value in {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it remembers the address of its first call
    monkeypatch.setenv("HF_TOKEN", hub.token)
    return hub


@pytest.fixture
def full_disk():
    """Return a context manager in which the system refuses to let a file grow beyond a few bytes."""

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
    from openvla_hf.testing import tiny_tokenizer

    return tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny(tokenizer):
    """Return a function that builds a tiny random model and its processor: `tiny(fused=False, ...)`."""
    import torch
    from transformers import AutoModel

    from openvla_hf.testing import tiny_config, tiny_processor

    built: dict[str, Any] = {}

    def build(seed: int = 0, **fields: Any) -> tuple[Any, Any]:
        config = tiny_config(tokenizer, **fields)
        torch.manual_seed(seed)
        model = AutoModel.from_config(config).eval()
        for parameter in model.parameters():
            # Larger than in a new model, so that inputs matter.
            torch.nn.init.normal_(parameter, std=0.15)
        return model, tiny_processor(tokenizer, config)

    def copy_of(seed: int = 0, **fields: Any) -> tuple[Any, Any]:
        # A copy takes less than half the time, and the random numbers that follow are the same.
        key = repr((seed, fields))
        if key not in built:
            built[key] = (*build(seed, **fields), torch.get_rng_state())
        model, processor, random_state = built[key]
        torch.set_rng_state(random_state)
        return copy.deepcopy((model, processor))

    return copy_of


@pytest.fixture(scope="session")
def small_repositories(tiny, tmp_path_factory):
    """A folder of the repositories that the pages of the docs name, see `pages.small_hub`."""
    from pages import write_repositories

    folder = tmp_path_factory.mktemp("repositories")
    write_repositories(folder, tiny)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def taught():
    """A policy that writes its reasoning before the action, see `reasoning_policy.teach`. Tests must not change it."""
    from reasoning_policy import teach

    return teach()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Keep tables of frames in the test's own folder, and return this folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return tmp_path / "cache" / "openvla_hf"


def _make_episode(index: int, steps: int = STEPS, instruction: str | None = None):
    """Make frames that all differ: a bar moves over the episode's colour, and each action is different."""
    rng = np.random.default_rng(index)
    frames = []
    for step in range(steps):
        image = np.full((64, 96, 3), (40 + 30 * index) % 256, np.uint8)
        image[:, 12 * step : 12 * step + 12] = (200, 60, 20)
        action = np.append(np.float32(rng.normal(0, 0.01, 6)), np.float32(step < steps / 2))
        state = np.append(np.float32(rng.normal(0, 0.1, 6)), np.float32(step < steps / 2))
        text = f"move the bar {index}" if instruction is None else instruction
        frames.append({"image": image, "instruction": text, "action": action, "state": state})
    return frames


@pytest.fixture
def make_episode():
    return _make_episode


@pytest.fixture
def episodes():
    return [_make_episode(index) for index in range(5)]
