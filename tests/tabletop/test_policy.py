"""The shipped policy is complete, has the files that the package would save, and acts."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoProcessor

from openvla_hf.tabletop.rollouts import FIRST_UNSEEN_SEED, TABLETOP_POLICY, load_policy, run_episodes
from openvla_hf.tabletop.train_policy import save_policy


@pytest.fixture(scope="module")
def act():
    return load_policy(AutoModel.from_pretrained(TABLETOP_POLICY), AutoProcessor.from_pretrained(TABLETOP_POLICY))


def test_it_is_small_and_safe():
    files = [path for path in TABLETOP_POLICY.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 7e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".txt"}


def test_saving_it_again_writes_the_same_files(tmp_path):
    model, processor = AutoModel.from_pretrained(TABLETOP_POLICY), AutoProcessor.from_pretrained(TABLETOP_POLICY)
    save_policy(model, processor, tmp_path)
    weights_and_configs = [path for path in tmp_path.iterdir() if path.suffix != ".py"]
    assert weights_and_configs
    for path in weights_and_configs:
        kept, saved = (TABLETOP_POLICY / path.name).read_bytes(), path.read_bytes()
        if path.name == "tokenizer.json":  # kept without its indentation
            kept, saved = json.loads(kept), json.loads(saved)
        assert kept == saved, path.name


@pytest.mark.parametrize("options", [{}, {"dtype": "auto"}])
def test_its_weights_are_float16_in_the_file_and_float32_in_memory(options):
    with safe_open(TABLETOP_POLICY / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float16}  # noqa: SIM118
    assert AutoModel.from_pretrained(TABLETOP_POLICY, **options).dtype == torch.float32


def test_its_card_says_what_it_is():
    card = (TABLETOP_POLICY / "README.md").read_text(encoding="utf-8")
    for what in ("pipeline_tag: robotics", "python -m openvla_hf.tabletop.train_policy", "openvla-hf evaluate"):
        assert what in card
    statistics = json.loads((TABLETOP_POLICY / "dataset_statistics.json").read_text(encoding="utf-8"))
    assert list(statistics) == ["tabletop"]


def remembering(act):
    """Return a policy that predicts once for each instruction, because black images are all the same."""
    actions = {}

    def recall(images, instructions):
        assert not np.any(images)
        if not actions:
            actions.update(zip(instructions, act(images, instructions), strict=True))
        return np.stack([actions[instruction] for instruction in instructions])

    return recall


def rates(act, episodes, condition):
    seeds = range(FIRST_UNSEEN_SEED, FIRST_UNSEEN_SEED + episodes)
    played = list(run_episodes(act, seeds, condition=condition, batch_size=episodes))
    return np.mean([one.success for one in played]), np.mean([one.moved_target for one in played])


@pytest.mark.slow
def test_it_does_what_it_is_told_and_looks(act):
    """A part of the measurement of `openvla-hf evaluate`, with bounds far below the figures in the card."""
    assert rates(act, 12, "as told")[0] >= 0.8
    assert rates(act, 12, "swapped")[1] >= 0.8
    assert rates(remembering(act), 4, "black")[0] == 0
