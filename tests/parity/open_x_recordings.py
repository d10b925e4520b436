"""Read the recordings of Open X-Embodiment's loading: the full ones, or the part kept here in the same layout."""

import json

import numpy as np

from openvla_hf.data.open_x.steps import map_fields, set_field


METADATA = "traj_metadata"


def join_texts(array):
    """Join an array of bytes for an npz file without pickles."""
    ends = np.cumsum([len(text) for text in array], dtype=np.int32)
    return np.frombuffer(b"".join(array), np.uint8), ends


def _split_texts(joined, ends):
    data, starts = joined.tobytes(), [0, *ends[:-1]]
    texts = np.empty(len(ends), object)
    texts[:] = [data[start:end] for start, end in zip(starts, ends, strict=True)]
    return texts


class RecordedTransform:
    """What the original's transform of a dataset got and gave, one trajectory after the other."""

    def __init__(self, folder, name):
        self.description = json.loads((folder / f"{name}.json").read_text())
        self.arrays = np.load(folder / self.description["file"])
        self.inputs = self._read("in", self.description["inputs"])
        self.outputs = self._read("out", self.description["outputs"])

    def _read(self, side, leaves):
        return {
            path: _split_texts(self.arrays[f"{side}.{path}@bytes"], self.arrays[f"{side}.{path}@ends"])
            if of_one["dtype"] == "bytes"
            else self.arrays[f"{side}.{path}"]
            for path, of_one in leaves.items()
        }

    def trajectories(self):
        """Yield each trajectory's description, nested input, and output by path (None where the original raised)."""
        first_in = first_out = first_metadata = 0
        for each in self.description["trajectories"]:
            given = slice(first_in, first_in := first_in + each["length_in"])
            trajectory = {}
            for path, values in self.inputs.items():
                trajectory = set_field(trajectory, path, values[given])
            if each["length_out"] < 0:
                yield each, trajectory, None
                continue
            steps = slice(first_out, first_out := first_out + each["length_out"])
            metadata_steps = each.get("metadata_length_out", each["length_out"])
            metadata = slice(first_metadata, first_metadata := first_metadata + metadata_steps)
            expected = {
                path: values[metadata if path.startswith(METADATA) else steps] for path, values in self.outputs.items()
            }
            expected |= {path: self.inputs[path][given] for path in self.description["unchanged"]}
            yield each, trajectory, expected


def leaves(trajectory, path=""):
    """Return the arrays of a nested dict by path, with texts as bytes."""
    found = {}
    for name, value in trajectory.items():
        if isinstance(value, dict):
            found |= leaves(value, f"{path}{name}.")
        elif value.dtype == object:
            found[path + name] = np.array([text.encode() if isinstance(text, str) else text for text in value], object)
        else:
            found[path + name] = value
    return found


def generator(branch):
    """Make a generator whose first draw exchanges the cameras or keeps them, as in a recorded branch."""
    seeds = (seed for seed in range(100) if (np.random.default_rng(seed).random() <= 0.5) == (branch == "swap"))
    return np.random.default_rng(next(seeds))


def copy_of(trajectory):
    return map_fields(trajectory, np.copy)
