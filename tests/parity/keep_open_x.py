"""Make the part of Open X-Embodiment's recordings that is kept."""

import json

import numpy as np
from open_x_recordings import RecordedTransform, join_texts

from openvla_hf.data.open_x import find_row
from openvla_hf.data.open_x.steps import select_steps


# Together, their transforms contain nearly every kind of step and function.
TRANSFORMS = (
    "bridge_orig",
    "kuka",
    "language_table",
    "droid",
    "furniture_bench_dataset_converted_externally_to_rlds",
)
# Fields that no transform reads, but whose steps it drops.
OTHERS = {"_frame_index", "traj_metadata.episode_metadata.file_path"}


def keep_open_x(source, target):
    """Write a part of the recordings in `source` into `target`."""
    keep_transforms(source / "transforms", target / "transforms")


def keep_transforms(source, target):
    target.mkdir(parents=True, exist_ok=True)
    (target / "index.json").write_text(json.dumps({"datasets": {name: {} for name in TRANSFORMS}}))
    for name in TRANSFORMS:
        record = RecordedTransform(source, name)
        description = record.description
        steps = find_row(name).steps
        changed = {field for step in steps for field in step.fields}
        fields = changed | select_steps(steps, changed)[1] | OTHERS
        arrays = {}
        for side, kept in (("in", "inputs"), ("out", "outputs")):
            description[kept] = {path: known for path, known in description[kept].items() if path in fields}
            for path in description[kept]:
                values = getattr(record, kept)[path]
                if values.dtype == object:
                    arrays[f"{side}.{path}@bytes"], arrays[f"{side}.{path}@ends"] = join_texts(values)
                else:
                    arrays[f"{side}.{path}"] = values
        description["unchanged"] = [path for path in description["unchanged"] if path in fields]
        np.savez_compressed(target / f"{name}.npz", **arrays)
        (target / f"{name}.json").write_text(json.dumps(description))
