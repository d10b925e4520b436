"""The code that ships with a checkpoint works where this package is not installed."""

import ast
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from interpreters import WITHOUT_THE_PACKAGE
from PIL import Image

import openvla_hf
from openvla_hf.modeling.configuration_openvla import AUTO_MAP
from openvla_hf.testing import BRIDGE_LIKE_STATS, fake_episode


PACKAGE = Path(openvla_hf.__file__).parent
SHIPPED = [
    path
    for folder in ("modeling", "processing")
    for path in sorted((PACKAGE / folder).glob("*.py"))
    if path.name != "__init__.py"
]
THIRD_PARTY = {"torch", "transformers", "numpy", "PIL", "safetensors", "huggingface_hub"}

REMOTE = (
    WITHOUT_THE_PACKAGE
    + """
import json, sys

from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

image, *folders = sys.argv[1:]
trusted = {"trust_remote_code": True}
for folder, copy in zip(folders[::2], folders[1::2]):
    processor = AutoProcessor.from_pretrained(folder, **trusted)
    config = AutoConfig.from_pretrained(folder, **trusted)
    assert config.model_type == "openvla"
    if config.is_parallel:
        inputs = processor([Image.open(image)] * 2, instruction="pick up the red block", state=[0.1, 0.2])
    else:
        inputs = processor(Image.open(image), instruction="pick up the red block")
        image_processor = AutoImageProcessor.from_pretrained(folder, **trusted)
        assert (image_processor(Image.open(image))["pixel_values"] == inputs["pixel_values"]).all()
    actions = []
    for auto_class in (AutoModel, AutoModelForImageTextToText):
        model = auto_class.from_pretrained(folder, **trusted)
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        actions.append(model.predict_action(**inputs).tolist())
        stream = model.action_stream()
        for passes in () if config.is_parallel else (len(actions[0]), 1):
            assert stream.predict_action(**inputs).tolist() == actions[0]
            assert stream.forward_passes == passes
    model.save_pretrained(copy)
    processor.save_pretrained(copy)
    print(json.dumps(actions))
"""
)


# A chunk from two images and a state, with towers that the instruction modulates.
FILM = {
    "action_decoding": "parallel",
    "action_head": "l1",
    "action_horizon": 3,
    "action_dim": 7,
    "num_images": 2,
    "proprio_dim": 2,
    "use_film": True,
    "norm_stats": {"tiny": {"action": BRIDGE_LIKE_STATS, "proprio": {"q01": [-1.0, -1.0], "q99": [1.0, 1.0]}}},
}
KINDS = {"one": {"fused": False}, "two": {}, "film": FILM}


def test_neither_a_saved_model_nor_its_copy_needs_the_package(tiny, run_python, tmp_path):
    image, expected = fake_episode(steps=1)[0]["image"], []
    Image.fromarray(image).save(tmp_path / "image.png")
    for kind, fields in KINDS.items():
        model, processor = tiny(**fields)
        model.save_pretrained(tmp_path / f"saved_{kind}")
        processor.save_pretrained(tmp_path / f"saved_{kind}")
        observation = {"images": [image, image], "state": [0.1, 0.2]} if kind == "film" else {"images": image}
        action = model.predict_action(**processor(**observation, instruction="pick up the red block"))
        expected.append([action.tolist()] * 2)
    for name, copy_name in (("saved", "copy"), ("copy", "copy_of_copy")):
        pairs = [(tmp_path / f"{name}_{kind}", tmp_path / f"{copy_name}_{kind}") for kind in KINDS]
        result = run_python(REMOTE, tmp_path / "image.png", *sum(pairs, ()))
        for actions, right in zip(result.stdout.splitlines(), expected, strict=True):
            # Tokens are exact. A regressed chunk rounds differently where another process places its matrices.
            np.testing.assert_allclose(json.loads(actions), right, rtol=0, atol=1e-5 if np.ndim(right) == 3 else 0)
        for folder, copy in pairs:
            assert {path.name for path in copy.iterdir()} == {path.name for path in folder.iterdir()}
            assert json.loads((copy / "config.json").read_text())["auto_map"] == AUTO_MAP
            for path in SHIPPED:
                assert (copy / path.name).read_text() == path.read_text()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_files_obey_the_rules(path):
    """transformers finds the files to copy by searching the text for `from .sibling import name`."""
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"line {node.lineno} leaves the folder"
            assert node.module, f"line {node.lineno}: `from . import` is not copied"
            assert (path.parent / f"{node.module}.py") in SHIPPED, f"line {node.lineno}: {node.module} does not ship"
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            roots = {name.split(".")[0] for name in names}
            assert roots <= THIRD_PARTY | sys.stdlib_module_names, f"line {node.lineno}"
    imports = [node.lineno for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    for number, line in enumerate(text.splitlines(), start=1):
        if re.match(r"\s*(from\s+\.|import\s+\.)", line):
            assert number in imports, f"line {number} only looks like an import, and transformers reads it as one"
            assert re.match(r"\s*from\s+\.\w+\s+import\s", line), f"line {number} names more than a sibling"


def test_all_files_that_the_auto_map_names_ship():
    shipped = {path.stem for path in SHIPPED}
    assert {name.split(".")[0] for name in AUTO_MAP.values()} <= shipped
