"""The blocks of the page on relatives of OpenVLA run on a small training run and a small checkpoint that reasons."""

import json

import pytest
from pages import ROOT, run_command, small_hub, walk
from prismatic_runs import FUSED, as_trained, write_run
from reasoning_policy import TEXTS

from openvla_hf.checkpoints.export import published_state_dict
from openvla_hf.testing import BRIDGE_LIKE_STATS


__all__ = ["run_command", "small_hub"]


@pytest.fixture
def sizes(small_hub, taught, tiny, tmp_path):
    """Put the repositories of the page into the Hub, and return a file with the sizes of the small run."""
    model, processor = tiny()
    write_run(
        small_hub.root / "openvla/openvla-7b-prismatic",
        as_trained(published_state_dict(model)),
        {"bridge_orig": {"action": BRIDGE_LIKE_STATS}},
        FUSED,
    )
    processor.tokenizer.save_pretrained(small_hub.root / "openvla/openvla-7b")
    for one in (taught.model, taught.processor):
        one.save_pretrained(small_hub.root / "Embodied-CoT/ecot-openvla-7b-bridge")
    config = model.config.to_dict()
    names = ("image_token_index", "pad_token_id", "vision_config", "fused_vision_config", "text_config")
    fields = {name: config[name] for name in names}
    path = tmp_path / "sizes.json"
    path.write_text(json.dumps(fields | {"prompt_suffix_token_id": None}))
    return path


def test_the_blocks_of_the_page_run_one_after_the_other(sizes, taught, capsys):
    def runs(arguments):
        return [*arguments, "--config", str(sizes)] if arguments[0] == "convert" else None

    instruction = "put the carrot on the plate"
    walked = walk(ROOT / "docs/relatives.md", runs, image=taught.images[instruction])
    assert walked.names["details"].text == [TEXTS[instruction]]
    assert walked.names["action"].shape == (7,)
    ((_, printed),) = walked.printed
    assert "openvla-7b-converted: " in printed
