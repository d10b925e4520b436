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
    keep_normalisation(source / "normalise", target / "normalise")
    keep_chunks(source / "chunking", target / "chunking")
    keep_mixtures(source / "mixtures", target / "mixtures")
    keep_operations(source / "augment", target / "augment")
    cases = json.loads((source / "split_95_percent.json").read_text())
    (target / "split_95_percent.json").write_text(json.dumps(cases, separators=(",", ":")))


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


def keep_normalisation(source, target):
    """Keep the case with constant dimensions, and every sixth row."""
    target.mkdir(exist_ok=True)
    description = json.loads((source / "normalise.json").read_text())
    description["cases"] = {"constant": description["cases"]["constant"]}
    (target / "normalise.json").write_text(json.dumps(description, separators=(",", ":")))
    arrays = np.load(source / "normalise.npz")
    kept = {name: arrays[name][::6] for name in arrays if name.startswith("constant.") and ".all." not in name}
    np.savez_compressed(target / "normalise.npz", **kept)


def keep_chunks(source, target):
    """Keep openvla-oft's chunks of episodes of ten steps, and openvla's without future actions."""
    target.mkdir(exist_ok=True)
    for code, futures in (("oft", (3, 7)), ("openvla", (0,))):
        cases = [
            case for case in json.loads((source / f"{code}.json").read_text())
            if case["T"] in (3, 10) and case["window"] == 1 and case["future"] in futures and not case["goal_timestep"]
        ]  # fmt: skip
        (target / f"{code}.json").write_text(json.dumps(cases, separators=(",", ":")))
        arrays = np.load(source / f"{code}.npz")
        names = [f"T{steps}.in.action" for steps in (3, 10)]
        names += [f"{case['case']}.action" for case in cases if "raises" not in case]
        np.savez_compressed(target / f"{code}.npz", **{name: arrays[name] for name in names})


def keep_mixtures(source, target):
    target.mkdir(exist_ok=True)
    record = json.loads((source / "arithmetic.json").read_text())
    kept = {name: record["mixtures"][name] for name in ("rtx_franka", "bridge_rt_1")}
    for case in kept.values():
        del case["requested"]
    (target / "arithmetic.json").write_text(json.dumps({"mixtures": kept}, separators=(",", ":")))


def keep_operations(source, target):
    """Keep one image with one draw of each operation, and two rows of what they give."""
    target.mkdir(exist_ok=True)
    arrays = np.load(source / "ops.npz")
    kept = {"input_uint8": arrays["input_uint8"][:1], "rows": np.arange(0, 40, 20)}
    for name in arrays:
        if name.endswith(".param"):
            kept[name] = arrays[name][:1]
            stem = name.removesuffix(".param")
            kept[f"{stem}.output"] = arrays[f"{stem}.output"][:1, :1, kept["rows"]]
    np.savez_compressed(target / "ops.npz", **kept)
