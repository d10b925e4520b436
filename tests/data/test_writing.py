import json

import numpy as np
import pytest

from openvla_hf.data import load, write_lerobot, write_rlds


WRITERS = {"lerobot": write_lerobot, "rlds": write_rlds}
# Largest mean difference in levels of lossy images.
LOSSY = 6.0


def two_cameras(episode):
    """Replace each frame's image by those of two cameras of different sizes."""
    return [
        {name: frame[name] for name in ("instruction", "action", "state")}
        | {"images": {"image": frame["image"], "wrist": 255 - frame["image"][:32, :48]}}
        for frame in episode
    ]


@pytest.fixture(params=WRITERS)
def write(request):
    return WRITERS[request.param]


def test_each_camera_is_written_and_read_by_its_name(write, make_episode, tmp_path):
    episodes = [two_cameras(make_episode(index, steps=4)) for index in range(2)]
    write(episodes, tmp_path / "arm")
    truth = [frame for episode in episodes for frame in episode]
    prefix = "observation." if write is write_rlds else "observation.images."
    for camera in ("image", "wrist"):
        frames = load(tmp_path / "arm", camera=prefix + camera)
        assert len(frames) == len(truth)
        for frame, written in zip(frames, truth, strict=True):
            assert frame["image"].shape == written["images"][camera].shape
            assert np.abs(frame["image"].astype(float) - written["images"][camera]).mean() < LOSSY
            np.testing.assert_array_equal(frame["state"], written["state"])


def test_a_frame_without_one_of_the_cameras_is_refused(write, make_episode, tmp_path):
    first, second = (two_cameras(make_episode(index, steps=2)) for index in range(2))
    del second[1]["images"]["wrist"]
    with pytest.raises(ValueError, match="A frame has the cameras 'image', but the first frame has 'image', 'wrist'"):
        write([first, second], tmp_path / "arm")
    with pytest.raises(ValueError, match="'image', but the first frame has 'image', 'wrist'"):
        write([second], tmp_path / "arm")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    first[0]["images"] = {}
    with pytest.raises(ValueError, match="A frame has no images"):
        write([first], tmp_path / "arm")


def test_lerobot_gets_the_statistics_of_each_cameras_colours(make_episode, tmp_path):
    episodes = [two_cameras(make_episode(index, steps=4)) for index in range(2)]
    write_lerobot(episodes, tmp_path / "arm")
    statistics = json.loads((tmp_path / "arm/meta/stats.json").read_text())
    for camera in ("image", "wrist"):
        images = np.stack([frame["images"][camera] for episode in episodes for frame in episode]) / 255
        found = statistics[f"observation.images.{camera}"]
        for name in ("min", "max", "mean", "std"):
            assert np.shape(found[name]) == (3, 1, 1)
            np.testing.assert_allclose(np.ravel(found[name]), getattr(images, name)((0, 1, 2)), atol=1e-9)
        assert found["count"] == [8]
