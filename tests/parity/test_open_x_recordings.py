"""Open X-Embodiment's loading, compared with the recorded outputs of the original; README.md gives the tolerances."""

import json
from pathlib import Path

import numpy as np
import pytest
from open_x_recordings import RecordedTransform, copy_of, generator, leaves
from recordings import KEPT

from openvla_hf.data.open_x import known_table, standardize


EULER = 1e-6


@pytest.fixture(scope="module")
def folder(pytestconfig):
    """The full recordings with `--golden`, or else the part kept here."""
    full = pytestconfig.getoption("golden")
    return Path(full, "oxe") if full is not None else KEPT / "open-x"


def test_every_recorded_transform_is_met(folder):
    names = json.loads((folder / "transforms" / "index.json").read_text())["datasets"]
    compared = 0
    for name in names:
        has_rotation = any("quaternion" in step for step in known_table().datasets[name].transform)
        tolerance = EULER if has_rotation else 0
        for each, trajectory, expected in RecordedTransform(folder / "transforms", name).trajectories():
            given = copy_of(trajectory)
            if expected is None:
                with pytest.raises(ValueError, match="without any step"):
                    standardize(name, trajectory)
                continue
            found = leaves(standardize(name, trajectory, generator(each.get("branch"))))
            assert found.keys() == expected.keys(), name
            for path, values in expected.items():
                place = f"{name}, {each['case']}, {path}"
                assert (found[path].dtype, found[path].shape) == (values.dtype, values.shape), place
                if values.dtype == object or values.dtype.kind in "bi":
                    assert found[path].tolist() == values.tolist(), place
                else:
                    assert np.abs(found[path] - values).max(initial=0) <= tolerance, place
            before, after = leaves(given), leaves(trajectory)
            assert all(np.array_equal(before[path], after[path]) for path in before)
            compared += 1
    assert compared >= len(names)
