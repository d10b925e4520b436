"""The notebooks, each executed from top to bottom in its own kernel, with a stand-in for the Hub to push to.

make test-notebooks                        # run all notebooks
SAVE_OUTPUTS=1 make test-notebooks         # also save their outputs in the files
"""

import base64
import io
import os
import re
from pathlib import Path

import nbformat
import pytest
from hub_server import HubServer
from nbclient import NotebookClient
from PIL import Image


NOTEBOOKS = sorted(Path(__file__).parent.glob("*.ipynb"))
COLAB = "https://colab.research.google.com/github/openvla-hf/openvla-hf/blob/main/notebooks/"
LARGEST = 600_000
CELL_TIMEOUT = 900
QUIET = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore"}


def outputs_of(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_top_to_bottom(path, tmp_path, monkeypatch):
    notebook = nbformat.read(path, as_version=4)
    work = tmp_path / "work"
    work.mkdir()
    with HubServer(tmp_path / "hub") as hub:
        for name, value in {**QUIET, **hub.env, "HF_HOME": str(tmp_path / "home")}.items():
            monkeypatch.setenv(name, value)
        resources = {"metadata": {"path": str(work)}}
        NotebookClient(
            notebook, timeout=CELL_TIMEOUT, startup_timeout=CELL_TIMEOUT, kernel_name="python3", resources=resources
        ).execute()
    assert not [output for output in outputs_of(notebook) if output.output_type == "error"]
    if os.environ.get("SAVE_OUTPUTS"):
        tidy(notebook)
        nbformat.write(notebook, path)


def tidy(notebook):
    """Remove execution times and warnings, keep one small copy of each picture, and set the same kernel name."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data.pop("image/jpeg", None)
                    output.data["image/png"] = with_palette(output.data["image/png"])


def with_palette(png):
    """Give a picture in base64 a palette, which makes the file several times smaller."""
    small = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.quantize(method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_committed_notebook_is_complete(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    text = path.read_text(encoding="utf-8")
    assert len(text) < LARGEST
    assert COLAB + path.name in notebook.cells[0].source
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "pip install" in code[0].source
    assert ["parameters" in cell.metadata.get("tags", []) for cell in code].count(True) == 1
    assert "openvla/openvla-7b" in next(cell.source for cell in code if cell.metadata.get("tags"))
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run it and save its outputs"
    outputs = outputs_of(notebook)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error"]
    printed = str([{**output, "data": {**output.get("data", {}), "image/png": ""}} for output in outputs])
    assert not re.search(r"hf_[A-Za-z]{6}|/home/|/root/|/tmp/|127\.0\.0\.1", printed)
