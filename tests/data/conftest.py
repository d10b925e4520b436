import datasets
import numpy as np
import pytest

from openvla_hf.data import frames, loading


STEPS = 6


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Tables of frames are kept in the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return tmp_path / "cache" / "openvla_hf"


def _make_episode(index: int, steps: int = STEPS, instruction: str | None = None):
    """Frames that differ: a bar that moves, over a colour of the episode; actions that can be told apart."""
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


@pytest.fixture
def decoded(monkeypatch):
    """Every image reference that is decoded in this process."""
    references = []
    decode_image = frames.decode_image

    def decode(reference):
        references.append(reference)
        return decode_image(reference)

    monkeypatch.setattr(frames, "decode_image", decode)
    monkeypatch.setattr(loading, "decode_image", decode)
    return references
