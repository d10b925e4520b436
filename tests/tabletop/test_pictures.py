import re

import numpy as np
import pytest
from PIL import Image

from openvla_hf.evaluation.fidelity import Fidelity, plot
from openvla_hf.tabletop import pictures, rollouts


LONG = "put the yellow cube into the red bowl that stands beside the wall"
NAMES = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")


def episode(instruction, steps):
    """An episode with blue frames, so that any pixel that is neither blue nor paper belongs to text."""
    frame = np.full((224, 224, 3), (0, 0, 255), np.uint8)
    return rollouts.Rollout(0, "put", instruction, success=True, steps=steps, frames=[frame] * steps)


def dark(picture):
    """Return where there is text in the colour of the instructions."""
    return np.asarray(picture.convert("RGB")).max(-1) < 100


def test_an_instruction_stands_above_its_picture_alone(tmp_path):
    pictures.save_gif([episode(LONG, 4), episode("push the red ball", 4)], tmp_path / "episodes.gif")
    with Image.open(tmp_path / "episodes.gif") as gif:
        rows = np.flatnonzero(dark(gif).any(axis=1))
        columns = np.flatnonzero(dark(gif).any(axis=0))
        blue = np.flatnonzero((np.asarray(gif.convert("RGB")) == (0, 0, 255)).all(-1).any(axis=1))
        assert rows.max() < blue.min()
        assert columns.max() < gif.width - pictures.MARGIN


def test_a_caption_is_broken_between_words_into_lines_that_fit():
    lines = pictures._lines(LONG, 224)
    assert " ".join(lines) == LONG
    assert max(map(pictures.FONT.getlength, lines)) <= 224
    assert pictures._lines("push the red ball", 224) == ["push the red ball"]


def result(name, agreement, l1, success=None):
    return Fidelity(name, False, 10, agreement, agreement, l1, 0.0, success, 0, 0, 4_000_000, None, 0.1)


@pytest.mark.parametrize("l1", [[0.0] * 7, [0.0, 0.001, 0.0, 0.2, 0.0, 0.0, 0.01]])
def test_a_difference_of_zero_has_a_point(l1, tmp_path):
    results = [result("16-bit", 1.0, [0.0] * 7), result("8bit", 0.9, l1), result("4bit", 0.8, l1)]
    plot(results, tmp_path / "fidelity.svg", NAMES)
    points = re.findall(r"<use [^>]*style=\"fill: #ff7f0e[^>]*>", (tmp_path / "fidelity.svg").read_text())
    assert len(points) == len(NAMES) + 1  # and one in the legend


def test_formats_with_equal_figures_are_rings_of_different_sizes(tmp_path):
    results = [result(name, 1.0, [0.0] * 7, success=0.9) for name in ("16-bit", "8bit", "4bit")]
    plot(results, tmp_path / "fidelity.svg", NAMES)
    collections = (tmp_path / "fidelity.svg").read_text().split("PathCollection_")[1:]
    rings = [re.search(r" d=\"([^\"]*)\"[^>]*style=\"fill: none; stroke: #", one) for one in collections]
    rings = [ring[1] for ring in rings if ring]
    assert len(rings) == len(set(rings)) == 2 * len(results)
