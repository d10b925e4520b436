"""Frames with several cameras, chunks of actions and a state, in every format."""

import itertools
import json
import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, List, Value, concatenate_datasets
from PIL import Image as PILImage
from torch.utils.data import DataLoader

from openvla_hf.data import (
    BadEpisodeError,
    Gripper,
    Robot,
    TrainingStream,
    compute_statistics,
    from_episodes,
    load,
    mix,
    write_lerobot,
    write_rlds,
)
from openvla_hf.data.frame_spec import name_cameras
from openvla_hf.data.images import encode_png
from openvla_hf.data.readers.lerobot import INFO_FILE
from openvla_hf.data.robots import GENERIC, describe_robot
from openvla_hf.data.splits import read_split


CHUNK, STEPS = 4, 6  # of actions, and of frames in an episode
LOSSY = 6.0
CAMERAS = ["wrist", "front"]
OPTIONS = {"cameras": CAMERAS, "chunk": CHUNK, "state": True}


def with_wrist(episode):
    """Give the frames a second camera of another size, whose colour differs from frame to frame."""
    return [
        {**{key: value for key, value in frame.items() if key != "image"}}
        | {"images": {"front": frame["image"], "wrist": np.full((48, 64, 3), 15 * step, np.uint8)}}
        for step, frame in enumerate(episode)
    ]


@pytest.fixture
def two_cameras(episodes):
    return [with_wrist(episode) for episode in episodes]


def as_table(episodes):
    rows = [
        {
            **{camera: PILImage.fromarray(image) for camera, image in frame["images"].items()},
            "task": frame["instruction"],
            "action": frame["action"],
            "state": frame["state"],
            "episode_index": index,
            "frame_index": step,
        }
        for index, episode in enumerate(episodes)
        for step, frame in enumerate(episode)
    ]
    numbers = List(Value("float32"))
    features = {"front": Image(), "wrist": Image(), "task": Value("string"), "action": numbers, "state": numbers}
    features |= dict.fromkeys(("episode_index", "frame_index"), Value("int64"))
    return Dataset.from_list(rows, features=Features(features))


SOURCES = {
    "lerobot": lambda episodes, path: write_lerobot(episodes, path),
    "rlds": lambda episodes, path: write_rlds(episodes, path, episodes_per_file=2),
    "table": lambda episodes, path: as_table(episodes),
    "python": lambda episodes, path: episodes,
}


@pytest.fixture(params=SOURCES)
def source(request, two_cameras, tmp_path):
    return SOURCES[request.param](two_cameras, tmp_path / "arm")


@pytest.fixture(params=["lerobot", "rlds", "python"])
def streamed(request, two_cameras, tmp_path):
    """Select the sources whose streams read whole episodes."""
    return SOURCES[request.param](two_cameras, tmp_path / "arm")


def read(source, **options):
    if isinstance(source, list):
        return from_episodes(lambda: source, name="arm", **options)
    return load(source, name="arm", **options)


def identical(one, other):
    return list(one) == list(other) and all(
        identical(one[key], other[key]) if isinstance(one[key], dict) else np.array_equal(one[key], other[key])
        for key in one
    )


def expected_frames(episodes, chunk_end="drop"):
    for index, episode in enumerate(episodes):
        actions = [frame["action"] for frame in episode]
        kept = len(episode) - (CHUNK - 1) * (chunk_end == "drop")
        for step in range(kept):
            yield index, step, episode[step], [actions[min(step + k, len(actions) - 1)] for k in range(CHUNK)]


@pytest.mark.parametrize("chunk_end", ["drop", "pad"])
def test_frames_have_the_images_the_chunk_and_the_state_that_were_recorded(source, two_cameras, chunk_end):
    frames = read(source, **OPTIONS, chunk_end=chunk_end)
    expected = list(expected_frames(two_cameras, chunk_end))
    assert len(frames) == len(expected)
    for frame, (index, step, truth, chunk) in zip(frames, expected, strict=True):
        assert (frame["episode_index"], frame["frame_index"]) == (index, step)
        assert list(frame["images"]) == CAMERAS
        assert "image" not in frame
        for camera, image in frame["images"].items():
            assert image.dtype == np.uint8
            assert image.shape == truth["images"][camera].shape
            assert np.abs(image.astype(float) - truth["images"][camera]).mean() < LOSSY
        assert frame["actions"].dtype == frame["state"].dtype == np.float64
        np.testing.assert_array_equal(frame["actions"], chunk)
        np.testing.assert_array_equal(frame["action"], chunk[0])
        np.testing.assert_array_equal(frame["state"], truth["state"])
        assert ("chunk_mask" in frame) == (chunk_end == "pad")
        if chunk_end == "pad":
            assert frame["chunk_mask"].tolist() == [step + k < STEPS for k in range(CHUNK)]


def test_a_stream_gives_the_frames_of_the_table(streamed):
    for options in (OPTIONS, OPTIONS | {"chunk_end": "pad"}):
        table, stream = read(streamed, **options), read(streamed, streaming=True, **options)
        assert all(
            identical(frame, dict(zip(frame, map(other.get, frame), strict=True)))
            for frame, other in zip(table, stream, strict=True)
        )
        assert {*stream.column_names} == {*next(iter(stream))} == {*table[0]}


def test_a_plain_load_of_several_cameras_reads_the_named_one(tmp_path, two_cameras):
    frame = load(write_lerobot(two_cameras, tmp_path / "arm"), camera="observation.images.wrist")[3]
    assert set(frame) == {
        "image", "instruction", "action", "action_mask", "state", "episode_index", "frame_index", "dataset",
    }  # fmt: skip
    assert np.abs(frame["image"].astype(float) - 45).mean() < LOSSY


def test_a_stream_continues_from_a_saved_position(tmp_path, two_cameras):
    folder = write_lerobot(two_cameras, tmp_path / "arm")
    stream = load(folder, streaming=True, **OPTIONS)
    everything = list(stream)
    reading = iter(stream)
    for _ in range(5):
        next(reading)
    position = json.loads(json.dumps(stream.state_dict()))
    resumed = load(folder, streaming=True, **OPTIONS)
    resumed.load_state_dict(position)
    assert all(identical(one, other) for one, other in zip(resumed, everything[5:], strict=True))


def test_workers_of_a_training_stream_read_chunks_and_resume_exactly(tmp_path, two_cameras):
    stream = load(write_rlds(two_cameras, tmp_path / "arm"), streaming=True, shuffle_buffer=4, **OPTIONS)

    def batches(first, count):
        training = TrainingStream(stream, batch_size=2)
        training.first_batch = first
        loader = iter(DataLoader(training, batch_size=2, num_workers=2, collate_fn=list))
        return [next(loader) for _ in range(count)]

    straight, resumed = batches(0, 6), batches(4, 6)
    assert all(frame == {} for batch in resumed[:4] for frame in batch)
    for one, other in zip(straight[4:], resumed[4:], strict=True):
        assert all(map(identical, one, other))


def test_chunks_are_made_after_merging_and_dropping_and_stay_inside_an_episode(make_episode):
    episodes = [make_episode(index, steps=13) for index in range(2)]
    for episode in episodes:
        for step in (4, 5, 8, 9):
            episode[step]["action"] = np.append(np.zeros(6), episode[3]["action"][-1])
            episode[3 if step < 8 else 7]["action"][-1] = episode[step]["action"][-1]
    robot = Robot("arm", space="end_effector_delta", gripper=Gripper())
    options = {"robot": robot, "every": 2, "drop_idle": True}
    merged = from_episodes(episodes, **options)
    chunked = from_episodes(episodes, **options, chunk=3)
    padded = from_episodes(episodes, **options, chunk=3, chunk_end="pad")
    assert 0 < len(merged) < 14
    actions, of = np.stack(merged[:]["action"]), np.array(merged[:]["episode_index"])
    expected = [start for start in range(len(of) - 2) if of[start] == of[start + 2]]
    assert [frame["frame_index"] for frame in chunked] == [merged[start]["frame_index"] for start in expected]
    for frame, start in zip(chunked, expected, strict=True):
        np.testing.assert_array_equal(frame["actions"], actions[start : start + 3])
    assert len(padded) == len(merged)
    for frame, start in zip(padded, range(len(merged)), strict=True):
        inside = [at for at in range(start, start + 3) if at < len(of) and of[at] == of[start]]
        np.testing.assert_array_equal(frame["actions"][: len(inside)], actions[inside])
        assert frame["chunk_mask"].tolist() == [k < len(inside) for k in range(3)]
        assert (frame["actions"][len(inside) :] == actions[inside[-1]]).all()


def test_statistics_do_not_depend_on_the_chunk(source):
    plain = compute_statistics(read(source, cameras=["front"]))
    assert plain["arm"]["num_transitions"] == 5 * STEPS
    for options in (OPTIONS, OPTIONS | {"chunk_end": "pad"}, OPTIONS | {"chunk": STEPS}):
        assert compute_statistics(read(source, **options)) == plain
        if not isinstance(source, Dataset):
            assert compute_statistics(read(source, streaming=True, **options)) == plain
    assert plain["arm"]["proprio"].keys() == {"mean", "std", "min", "max", "q01", "q99"}
    assert plain["arm"]["action"].keys() == {"mean", "std", "min", "max", "q01", "q99", "mask"}


def test_statistics_of_some_episodes_count_their_dropped_frames(tmp_path, two_cameras):
    folder = write_lerobot(two_cameras, tmp_path / "arm")
    plain, chunked = load(folder, camera="observation.images.front"), load(folder, **OPTIONS)
    halves = [read_split(frames, eval_share=0.4, seed=3) for frames in (plain, chunked)]
    for one, other in zip(*halves, strict=True):
        assert compute_statistics(one.shuffle(seed=1)) == compute_statistics(other.shuffle(seed=2))
    mixture = mix([(chunked, 1.0), (load(folder, name="again", **OPTIONS), 0.3)], seed=1)
    assert compute_statistics(mixture)["arm"] == compute_statistics(plain)["arm"]


def test_mixtures_of_tables_and_of_streams_contain_chunks(tmp_path, two_cameras):
    folders = [write_lerobot(two_cameras[:2], tmp_path / "one"), write_rlds(two_cameras[2:], tmp_path / "two")]
    tables = [load(folder, **OPTIONS) for folder in folders]
    known = {
        (frame["dataset"], frame["episode_index"], frame["frame_index"]): frame
        for frame in concatenate_datasets(tables)
    }
    stream = mix([(load(folder, streaming=True, **OPTIONS), 1.0, 9) for folder in folders], seed=5)
    for mixture in (mix([(table, 1.0) for table in tables], seed=5), stream.take(40)):
        drawn = list(mixture)
        assert {frame["dataset"] for frame in drawn} == {"one", "two"}
        for frame in drawn:
            truth = known[frame["dataset"], frame["episode_index"], frame["frame_index"]]
            np.testing.assert_array_equal(frame["actions"], truth["actions"])
            assert list(frame["images"]) == CAMERAS
            assert all(np.array_equal(frame["images"][name], truth["images"][name]) for name in CAMERAS)


@pytest.mark.parametrize("other", [{}, {"chunk": 2}, {"cameras": ["front"]}, {"chunk_end": "pad"}], ids=str)
def test_a_mixture_of_different_cameras_or_chunks_is_refused(two_cameras, other):
    options = OPTIONS | other if other else {"cameras": CAMERAS}
    parts = [(from_episodes(two_cameras, **options), 1.0), (from_episodes(two_cameras, **OPTIONS), 1.0)]
    with pytest.raises(ValueError, match=r"must have the same cameras and chunks, but one has .*Load them with"):
        mix(parts)


def test_the_table_is_cached_by_what_its_frames_contain(tmp_path, two_cameras, cache):
    folder = write_lerobot(two_cameras, tmp_path / "arm")
    for options in (OPTIONS, OPTIONS, OPTIONS | {"chunk": 2}, OPTIONS | {"cameras": ["front"]}, OPTIONS):
        load(folder, **options)
    assert len(list(cache.glob("arm-*.arrow"))) == 3


def test_cameras_may_be_renamed_and_come_from_the_adapter(tmp_path, two_cameras):
    folder = write_lerobot(two_cameras, tmp_path / "arm")
    by_hand = load(folder, cameras={"full_image": "observation.images.front", "wrist_image": "wrist"})[2]
    robot = Robot("arm", cameras={"wrist_image": ("hand", "observation.images.wrist"), "full_image": "front"})
    by_robot = load(folder, robot, cameras=["full_image", "wrist_image"])[2]
    assert list(by_hand["images"]) == list(by_robot["images"]) == ["full_image", "wrist_image"]
    assert identical(by_hand, by_robot)
    assert describe_robot(robot) == describe_robot(Robot("arm"))
    recorded = json.loads(json.dumps(name_cameras(robot, ["full_image", "wrist_image"])))
    assert identical(load(folder, cameras=recorded)[2], by_hand)


def test_liberos_adapter_names_the_cameras_as_oft_does(tmp_path, make_episode):
    episode = with_wrist(make_episode(0))
    for frame in episode:
        frame["images"] = {"image": frame["images"]["front"], "wrist_image": frame["images"]["wrist"]}
        frame["action"][-1] = 2 * frame["action"][-1] - 1
    cameras = ["full_image", "wrist_image"]
    shapes = {"full_image": (64, 96, 3), "wrist_image": (48, 64, 3)}
    for write in (write_lerobot, write_rlds):
        frame = load(write([episode], tmp_path / write.__name__), "libero", cameras=cameras)[0]
        assert {camera: image.shape for camera, image in frame["images"].items()} == shapes


def test_a_damaged_image_of_any_camera_makes_its_episode_bad(two_cameras, tmp_path):
    two_cameras[1][2]["images"]["wrist"] = b"not an image"
    with pytest.raises(BadEpisodeError, match=r"episode 1, frame 2: .*can't be decoded"):
        from_episodes(two_cameras, **OPTIONS)
    table = as_table(two_cameras[:1] + two_cameras[2:])
    broken = table.map(lambda row: {"wrist": None}).cast_column("wrist", Image(decode=False))
    bytes_of = [
        {"bytes": b"\xff\xd8 no", "path": None} if n == 8 else row
        for n, row in enumerate(table.cast_column("wrist", Image(decode=False))["wrist"])
    ]
    broken = table.remove_columns("wrist").add_column("wrist", bytes_of).cast_column("wrist", Image())
    frames = load(broken, name="arm", skip_bad_episodes=0.5, **OPTIONS)
    assert sorted(set(frames[:]["episode_index"])) == [0, 2, 3]


def test_a_required_state_must_be_complete(two_cameras):
    two_cameras[2][4]["state"] = np.full(7, np.nan)
    assert from_episodes(two_cameras, cameras=["front"])[2 * STEPS]["state"] is None
    with pytest.raises(BadEpisodeError, match=r"episode 2: 'state' contains NaN or infinity at frame 4\."):
        from_episodes(two_cameras, **OPTIONS)
    for frame in two_cameras[2]:
        frame["state"] = np.zeros(5)
    message = r"episode 2: the state has 5 numbers, but it has 7 in earlier episodes\."
    with pytest.raises(BadEpisodeError, match=message):
        from_episodes(two_cameras, **OPTIONS)
    with pytest.raises(BadEpisodeError, match=message):
        list(from_episodes(lambda: two_cameras, streaming=True, **OPTIONS))
    del two_cameras[0][0]["state"]
    with pytest.raises(BadEpisodeError, match="episode 0: "):
        from_episodes(two_cameras, **OPTIONS)


@pytest.mark.parametrize("format", ["lerobot", "rlds", "table"])
def test_a_dataset_without_a_state_is_refused_if_a_state_is_required(two_cameras, tmp_path, format):
    for frame in (frame for episode in two_cameras for frame in episode):
        if format != "table":
            del frame["state"]
    data = SOURCES[format](two_cameras, tmp_path / "arm")
    data = data.remove_columns("state") if format == "table" else data
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"Unknown state 'observation\.state' or 'state'.*Choose from"):
            load(data, cameras=["front"], state=True, streaming=streaming)


def test_an_unknown_camera_is_refused_with_the_nearest_name(source):
    with pytest.raises(ValueError, match=r"Unknown camera 'wirst'\. Did you mean '.*wrist'\? Choose from"):
        read(source, cameras=["front", "wirst"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cameras": "front"}, TypeError, r"cameras='front' is a single name\. Give a list"),
        ({"cameras": []}, ValueError, r"cameras=\[\] must contain at least one name"),
        ({"cameras": ["front", "front"]}, ValueError, "and each name once"),
        ({"cameras": [0]}, TypeError, "cameras contains 0, which is not a name"),
        ({"chunk": 2.5}, ValueError, r"chunk=2\.5 is not a number of actions\. Give a whole number"),
        ({"chunk": 0}, ValueError, "chunk=0 is not a number of actions"),
        ({"chunk": 2, "chunk_end": "padd"}, ValueError, r"Unknown chunk_end 'padd'\. Did you mean 'pad'\?"),
        ({"cameras": ["front"], "chunk": 7}, ValueError, r"No episode of 'arm' has chunk=7 usable frames"),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_make_no_frames_are_refused(two_cameras, options, error, message):
    with pytest.raises(error, match=message):
        from_episodes(two_cameras, name="arm", **options)


def test_a_table_that_is_not_in_order_has_no_chunks(two_cameras):
    frames = as_table(two_cameras)
    with pytest.raises(ValueError, match=r"The rows of episode 0 are not consecutive, so chunks can't be made\."):
        load(frames.select([*range(STEPS, 2 * STEPS), *range(3), *range(12, 18), *range(3, 6)]), **OPTIONS)
    with pytest.raises(ValueError, match="The rows of episode 1 are not in the order of 'frame_index'"):
        load(frames.select([*range(STEPS + 3), STEPS + 5, STEPS + 4]), **OPTIONS)
    assert len(load(frames.select(range(STEPS, 3 * STEPS)), **OPTIONS)) == 2 * (STEPS - CHUNK + 1)


def test_a_table_with_missing_frames_has_no_chunks(two_cameras):
    frames = as_table(two_cameras)
    with pytest.raises(ValueError, match="missing from episode 1: 'frame_index' jumps from 1 to 3, so chunks can't"):
        load(frames.select([*range(STEPS + 2), *range(STEPS + 3, 3 * STEPS)]), **OPTIONS)
    with pytest.raises(ValueError, match=r"chunk=4 needs every frame .*there is no column 'frame_index'"):
        load(frames.remove_columns("frame_index"), **OPTIONS)
    assert len(load(frames.remove_columns("frame_index"), cameras=CAMERAS)) == 5 * STEPS
    every_other = load(frames.select(range(0, 3 * STEPS, 2)), **OPTIONS | {"chunk": 2})
    assert len(every_other) == 3 * 2
    np.testing.assert_array_equal(every_other[1]["actions"][1], two_cameras[0][4]["action"])


def test_a_chunk_continues_when_the_instruction_changes(two_cameras):
    for step, frame in enumerate(two_cameras[0]):
        frame["instruction"] = ("first", "first", "second", "second", "", "")[step]
    frames = from_episodes(two_cameras[:1], **OPTIONS, chunk_end="pad")
    assert [frame["instruction"] for frame in frames] == ["first"] * 2 + ["second"] * 2
    np.testing.assert_array_equal(frames[1]["actions"], [frame["action"] for frame in two_cameras[0][1:5]])
    assert frames[1]["chunk_mask"].all()


def test_a_stream_of_rows_checks_the_size_of_states(two_cameras):
    for frame in two_cameras[3]:
        frame["state"] = np.zeros(5)
    stream = as_table(two_cameras).to_iterable_dataset()
    message = "arm, row 18: the state has 5 numbers, but it has 7 in earlier episodes"
    with pytest.raises(BadEpisodeError, match=message):
        list(load(stream, name="arm", cameras=CAMERAS, state=True))
    assert len(list(load(stream, name="arm", cameras=CAMERAS))) == 5 * STEPS
    with pytest.raises(
        ValueError, match=r"'arm: state' has rows of 5 and 7 numbers: give every frame the same number\."
    ):
        compute_statistics(from_episodes(two_cameras, name="arm", cameras=["front"]))


def test_a_stream_that_may_skip_leaves_out_frames_with_a_damaged_camera(two_cameras):
    for step in (0, 2):
        two_cameras[1][step]["images"]["wrist"] = b"damaged"
    stream = from_episodes(lambda: two_cameras, streaming=True, skip_bad_episodes=0.5, **OPTIONS)
    expected = [
        (index, step) for index, step, _, _ in expected_frames(two_cameras) if (index, step) not in [(1, 0), (1, 2)]
    ]
    assert [(frame["episode_index"], frame["frame_index"]) for frame in stream] == expected
    drawn = list(itertools.islice(TrainingStream(stream), len(expected)))
    assert all(list(frame["images"]) == CAMERAS for frame in drawn)
    assert all(image is not None for frame in drawn for image in frame["images"].values())


def test_images_in_parquet_files_of_lerobot_are_read_from_every_camera(two_cameras, tmp_path):
    folder = write_lerobot(two_cameras, tmp_path / "arm")
    info = json.loads((folder / INFO_FILE).read_text())
    data = next((folder / "data").rglob("*.parquet"))
    table = pq.read_table(data)
    for camera in CAMERAS:
        info["features"][f"observation.images.{camera}"]["dtype"] = "image"
        images = [encode_png(frame["images"][camera]) for episode in two_cameras for frame in episode]
        table = table.append_column(f"observation.images.{camera}", pa.array(images, Image().pa_type))
    pq.write_table(table, data)
    (folder / INFO_FILE).write_text(json.dumps(info))
    for frames in (load(folder, **OPTIONS), load(folder, streaming=True, **OPTIONS)):
        for frame, (_, _, truth, _) in zip(frames, expected_frames(two_cameras), strict=True):
            for camera in CAMERAS:
                np.testing.assert_array_equal(frame["images"][camera], truth["images"][camera])


@pytest.mark.parametrize("other", [{"chunk": 2}, {"cameras": ["front"]}], ids=str)
def test_a_mixture_of_different_streams_is_refused(two_cameras, other):
    streams = [from_episodes(lambda: two_cameras, streaming=True, **options) for options in (OPTIONS, OPTIONS | other)]
    with pytest.raises(ValueError, match="must have the same cameras and chunks"):
        mix([(stream, 1.0, 15) for stream in streams])


def test_an_adapter_gives_a_feature_for_each_camera():
    with pytest.raises(ValueError, match=r"cameras=\['wrist'\] must give a feature for each name"):
        Robot("arm", cameras=["wrist"])


def test_rows_of_a_stream_have_no_chunks_but_several_cameras(two_cameras):
    stream = as_table(two_cameras).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"chunk=4 needs whole episodes\. Load this dataset without streaming\."):
        load(stream, **OPTIONS)
    frames = list(load(stream, cameras=CAMERAS, state=True))
    assert [list(frame["images"]) for frame in frames] == [CAMERAS] * 5 * STEPS
    with pytest.raises(ValueError, match="needs whole episodes, but there is no column 'episode_index'"):
        load(as_table(two_cameras).remove_columns("episode_index"), **OPTIONS)


def test_several_cameras_that_are_given_but_not_named_are_refused(two_cameras):
    message = (
        r"episode 0, frame 0: the images of several cameras are given\. Pass cameras=, a list of 'front', 'wrist'\."
    )
    with pytest.raises(BadEpisodeError, match=message):
        from_episodes(two_cameras)


def test_camera_and_cameras_exclude_each_other(tmp_path, two_cameras):
    with pytest.raises(ValueError, match="exclude each other"):
        load(write_lerobot(two_cameras, tmp_path / "arm"), camera="front", cameras=["front"])


def test_frames_keep_their_chunks_and_are_not_chunked_again(two_cameras):
    frames = from_episodes(two_cameras, **OPTIONS)
    with pytest.raises(ValueError, match="already have chunks"):
        load(frames, **OPTIONS)
    assert list(load(frames, cameras=["front"])[0]["images"]) == ["front"]


def test_an_episode_shorter_than_a_chunk_is_logged(make_episode, caplog):
    short, long = with_wrist(make_episode(0, steps=3)), with_wrist(make_episode(1))
    with caplog.at_level(logging.WARNING, "openvla_hf"):
        frames = from_episodes([short, long], name="arm", **OPTIONS)
    assert set(frames[:]["episode_index"]) == {1}
    message = (
        "arm has 1 episode shorter than chunk=4. Such episodes give no frames and do not count in the statistics."
    )
    assert message in caplog.text
    assert compute_statistics(frames)["arm"]["num_transitions"] == STEPS
    padded = from_episodes([short, long], name="arm", **OPTIONS, chunk_end="pad")
    assert len(padded) == compute_statistics(padded)["arm"]["num_transitions"] == 3 + STEPS


def test_samples_of_every_format_give_the_same_chunks_and_states(samples):
    metaworld = Robot("metaworld", gripper=Gripper(open=-1.0, closed=1.0))
    options = {"name": "arm", "chunk": 8, "state": True}
    plain = load(samples / "hf_parquet", metaworld, cameras=["image"], **options)
    whole = load(samples / "hf_parquet", metaworld, name="arm")
    assert len(plain) == len(whole) - 7 * len(set(whole[:]["episode_index"]))
    statistics = compute_statistics(plain)["arm"]
    assert statistics == compute_statistics(whole)["arm"]
    for folder in ("lerobot_v21_av1", "lerobot_v3_h264"):
        frames = load(samples / folder, cameras=["front"], **options)
        assert len(frames) == len(plain)
        for index in range(0, len(frames), 50):
            np.testing.assert_allclose(frames[index]["actions"], plain[index]["actions"], atol=1e-6)
            np.testing.assert_array_equal(frames[index]["state"], plain[index]["state"])
            assert (
                np.abs(frames[index]["images"]["front"] - plain[index]["images"]["image"].astype(float)).mean() < LOSSY
            )
        for part in ("action", "proprio"):
            np.testing.assert_allclose(
                compute_statistics(frames)["arm"][part]["q99"], statistics[part]["q99"], atol=1e-6
            )


def test_samples_of_bridge_give_several_cameras_and_a_state_of_seven_numbers(samples):
    folder = samples / "rlds" / "bridge_orig"
    cameras = {"full_image": "observation.image_0", "black": "image_1"}
    for robot, frames_left_out in ((GENERIC, 0), ("bridge_orig", 2)):
        table = load(folder, robot, cameras=cameras, chunk=5, state=True)
        stream = load(folder, robot, cameras=cameras, chunk=5, state=True, streaming=True)
        plain = load(folder, robot, camera="observation.image_0")
        assert len(table) == len(plain) - 4 * 4 == sum(1 for _ in stream)
        assert plain[0]["frame_index"] == (frames_left_out > 0)
        for frame, other in zip(table.select(range(20)), stream.take(20), strict=True):
            assert frame["state"].shape == (7,)
            assert frame["images"]["full_image"].max() > 0 == frame["images"]["black"].max()
            np.testing.assert_array_equal(frame["actions"], other["actions"])
        assert compute_statistics(table) == compute_statistics(stream) == compute_statistics(plain)
    assert list(load(folder, cameras=["full_image"])[0]["images"]) == ["full_image"]
