"""All Python blocks of the page on data run in order, on small data in the layouts that the page names."""

import io
from pathlib import Path

import h5py
import numpy as np
import pytest
from pages import ROOT, small_hub, walk
from PIL import Image


STEPS = 12

__all__ = ["small_hub"]


def make_image(step):
    return np.full((48, 64, 3), 10 * step, np.uint8)


def write_aloha(folder, compressed):
    folder.mkdir()
    for episode in range(2):
        with h5py.File(folder / f"episode_{episode}.hdf5", "w") as file:
            file["action"] = np.random.default_rng(episode).normal(size=(STEPS, 14)).astype(np.float32)
            file["observations/qpos"] = np.zeros((STEPS, 14), np.float32)
            images = [make_image(step) for step in range(STEPS)]
            if compressed:
                images = [encode_jpeg(image) for image in images]
                size = max(map(len, images))
                images = [np.frombuffer(image.ljust(size, b"\0"), np.uint8) for image in images]
            file["observations/images/cam_high"] = np.stack(images)


def encode_jpeg(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG", quality=95)
    return file.getvalue()


def write_robomimic(path):
    with h5py.File(path, "w") as file:
        for demo in (0, 10, 2):
            group = file.create_group(f"data/demo_{demo}")
            group["actions"] = np.full((STEPS, 7), demo / 10)
            group["obs/agentview_image"] = np.stack([make_image(step) for step in range(STEPS)])
            for name, size in (("robot0_eef_pos", 3), ("robot0_eef_quat", 4), ("robot0_gripper_qpos", 2)):
                group[f"obs/{name}"] = np.zeros((STEPS, size))


def write_diffusion_policy(path):
    import zarr

    images = np.stack([make_image(step) for step in range(STEPS)]).astype(np.float32)
    store = zarr.open(path, mode="w")
    arrays = {
        "data/img": images,
        "data/action": np.arange(2.0 * STEPS).reshape(STEPS, 2),
        "data/state": np.zeros((STEPS, 5)),
        "meta/episode_ends": np.array([5, STEPS]),
    }
    for name, values in arrays.items():
        store.create_array(name, data=values, chunks=(1, *values.shape[1:]))


@pytest.mark.parametrize("compressed", [False, True])
def test_the_blocks_of_the_page_run_one_after_the_other(small_hub, compressed):
    write_aloha(Path("aloha_demos"), compressed)
    write_robomimic("lift.hdf5")
    write_diffusion_policy("pusht.zarr")
    names = walk(ROOT / "docs/data.md", lambda arguments: arguments if arguments[1] == "lab/kitchen" else None).names

    aloha = list(names["stream"])
    assert [frame["frame_index"] for frame in aloha] == [0, 5, 10] * 2
    assert [int(frame["image"].mean() + 0.5) // 10 for frame in aloha] == [0, 5, 10] * 2
    with h5py.File("aloha_demos/episode_1.hdf5") as file:
        np.testing.assert_array_equal(aloha[-1]["action"], file["action"][STEPS - 1])

    lift = names["table"]
    assert len(lift) == 3 * STEPS
    assert lift[STEPS]["action"][0] == 0.2, "demo 2 comes before demo 10"
    assert lift[0]["state"].shape == (9,)
    np.testing.assert_array_equal(lift[3]["image"], make_image(3))

    pusht = list(names["pusht"])
    assert [(frame["episode_index"], frame["frame_index"]) for frame in pusht[4:6]] == [(0, 4), (1, 0)]
    np.testing.assert_array_equal(pusht[7]["image"], make_image(7))
