import json
import logging
import shutil

import fsspec
import numpy as np
import pytest

from openvla_hf.data import compute_statistics, load, load_mixture, write_rlds
from openvla_hf.data.mixtures import MIXTURES, read_mixture, select_datasets, training_splits
from openvla_hf.data.open_x import known_table
from openvla_hf.data.whole_statistics import whole_statistics
from openvla_hf.training.arguments import TrainingMixture


SARA, SAILOR = "dlr_sara_pour_converted_externally_to_rlds", "austin_sailor_dataset_converted_externally_to_rlds"
RPT = "berkeley_rpt_converted_externally_to_rlds"
WEIGHTS = {SARA: 1.0, SAILOR: 3.0}


@pytest.fixture
def folder(make_episode, tmp_path):
    """Two datasets of the table, of 60 and 24 frames; the first 95 % of the episodes are all of them."""
    for name, count in ((SARA, 10), (SAILOR, 4)):
        write_rlds([make_episode(index) for index in range(count)], tmp_path / name, episodes_per_file=3)
    return tmp_path


def test_a_mixture_has_a_name_a_file_or_weights(tmp_path):
    assert read_mixture("oxe_magic_soup") == MIXTURES["oxe_magic_soup"]
    assert read_mixture("droid_wipe") == {"droid_wipe": 1.0}
    (tmp_path / "own.json").write_text(json.dumps(WEIGHTS))
    (tmp_path / "own.toml").write_text("\n".join(f"{name} = {weight}" for name, weight in WEIGHTS.items()))
    given = (WEIGHTS, tmp_path / "own.json", str(tmp_path / "own.toml"), json.dumps(WEIGHTS))
    assert all(read_mixture(mixture) == WEIGHTS for mixture in given)


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ("oxe_magic_soop", "Did you mean 'oxe_magic_soup'"),
        ({"bridge_orig": -1}, "weight -1. Give a number above 0"),
        ({"bridge_orig": "1.0"}, "weight '1.0', which is text. Write the number without quotes"),
        ({}, "does not give weights by dataset"),
        ("{", "The mixture can't be parsed"),
        ({"datasets": {"own_arm": {}}, "mixtures": {}}, "is a table of datasets, and not the weights of a mixture"),
    ],
)
def test_a_wrong_mixture_is_told(mixture, message):
    with pytest.raises(ValueError, match=message):
        read_mixture(mixture)


def test_missing_datasets_are_listed_with_where_to_get_them(folder, caplog):
    shutil.rmtree(folder / SAILOR)
    mixture = {**WEIGHTS, "bridge_orig": 1.0, "own_arm": 1.0}
    with pytest.raises(FileNotFoundError) as error:
        select_datasets(mixture, folder)
    message = str(error.value)
    assert f"Datasets of the mixture are missing from {folder} (3 of 4):" in message
    assert f"{SAILOR}: gs://gresearch/robotics/{SAILOR}" in message
    assert "bridge_orig: https://rail.eecs.berkeley.edu/" in message
    assert "own_arm: the source is not known" in message
    assert "Download or record each into a folder of its name" in message
    assert "allow_missing=True" in message
    with caplog.at_level(logging.WARNING):
        assert select_datasets(mixture, folder, allow_missing=True) == {SARA: 1.0}
    assert SAILOR in caplog.text
    with pytest.raises(ValueError, match="contains no dataset of the mixture"):
        select_datasets("kuka", folder, allow_missing=True)


def test_a_dataset_without_a_robot_is_noted_once(folder, caplog):
    (folder / SAILOR).rename(folder / "own_arm")
    load_mixture({SARA: 1.0, "own_arm": 1.0}, folder)
    (note,) = (one.getMessage() for one in caplog.records if "No robot is known" in one.getMessage())
    assert "for the dataset 'own_arm', so its actions are kept as recorded" in note


def test_a_misspelt_dataset_is_told_with_a_near_name(folder):
    for name in ("own_arm", "shelf"):
        (folder / name).mkdir()
    misspelt = dict.fromkeys(("own_amr", "brigde_orig", "tabeltop", "elsewhere", "kuka", "shelf", "shelf_2"), 1.0)
    with pytest.raises(FileNotFoundError) as error:
        select_datasets(misspelt, folder)
    hints = dict(line.strip().split(": ", 1) for line in str(error.value).splitlines() if line.startswith("  "))
    unknown = "the source is not known"
    assert hints == {
        "own_amr": f"{unknown}. Did you mean 'own_arm'?",  # a folder
        "brigde_orig": f"{unknown}. Did you mean 'bridge_orig'?",  # a row of the table
        "tabeltop": f"{unknown}. Did you mean 'tabletop'?",  # a robot
        "elsewhere": unknown,
        "shelf_2": unknown,  # the similar name is part of the mixture
        "kuka": "gs://gresearch/robotics/kuka",
    }


def test_a_file_of_weights_that_does_not_exist_is_told_in_a_sentence(tmp_path):
    for path in (tmp_path / "own.toml", tmp_path / "own.json"):
        with pytest.raises(FileNotFoundError, match=r"^There is no file '.*own\.(toml|json)' with"):
            read_mixture(path)


def test_a_misspelt_folder_of_datasets_is_told(folder):
    with pytest.raises(FileNotFoundError, match=r" are missing from .*typo, which does not exist \(2 of 2\)") as error:
        select_datasets(WEIGHTS, folder / "typo")
    # No dataset is left to go on with.
    assert str(error.value).endswith("\nDownload each into a folder of its name, or correct the path of the folder.")


def test_datasets_without_a_known_source_are_to_be_recorded(folder):
    with pytest.raises(FileNotFoundError) as error:
        select_datasets({SARA: 1.0, "own_arm": 1.0}, folder)
    assert str(error.value).splitlines()[-1] == (
        "Record each into a folder of its name, or correct the path of the folder. Pass allow_missing=True to go on "
        "without them."
    )


def test_a_url_with_a_slash_at_its_end_contains_the_same_datasets(folder):
    fsspec.filesystem("memory").put(str(folder), "/oxe", recursive=True)
    mixture = TrainingMixture(WEIGHTS, "memory://oxe/", {"streaming": True})
    assert [one.source for one in mixture.select()] == [f"memory://oxe/{name}" for name in WEIGHTS]
    frames = load_mixture(WEIGHTS, "memory://oxe/", streaming=True, num_frames={SARA: 60, SAILOR: 24})
    assert next(iter(frames))["dataset"] in WEIGHTS


def test_a_mixture_refuses_joint_positions_by_name_or_goes_on_without(folder, caplog):
    mixture = {**WEIGHTS, RPT: 1.0}
    with pytest.raises(ValueError, match=f"'{RPT}' can't be trained on"):
        select_datasets(mixture, folder)
    with caplog.at_level(logging.WARNING):
        assert select_datasets(mixture, folder, allow_missing=True) == WEIGHTS
    assert RPT in caplog.text


def test_streams_of_a_mixture_are_balanced_by_steps_that_are_counted_once(folder, cache, monkeypatch):
    mixture = load_mixture(WEIGHTS, folder, streaming=True)
    shares = {part.name: share for part, share in mixture.parts}
    assert shares == pytest.approx({SARA: 60 / 132, SAILOR: 72 / 132}, abs=1e-12)
    monkeypatch.setattr("openvla_hf.data.whole_statistics._compute", None)  # not called again
    again = load_mixture(WEIGHTS, folder, streaming=True)
    assert [share for _, share in again.parts] == [share for _, share in mixture.parts]


def test_whole_statistics_count_all_splits_and_are_those_of_the_frames_otherwise(folder, cache):
    whole = whole_statistics(folder / SARA)
    frames = load(folder / SARA, state=True)
    of_frames = compute_statistics(frames)[SARA]
    assert (whole["num_transitions"], whole["num_trajectories"]) == (60, 10)
    for column in ("action", "proprio"):
        for figure, values in whole[column].items():
            assert np.array_equal(values, of_frames[column][figure]), figure

    root = folder / SARA / "1.0.0"
    info = json.loads((root / "dataset_info.json").read_text())
    parts = info["splits"][0]["shardLengths"]
    info["splits"] = [
        {**info["splits"][0], "name": name, "shardLengths": lengths,
         "filepathTemplate": f"{SARA}-train.tfrecord-{{SHARD_INDEX}}-of-{len(parts):05d}"}
        for name, lengths in (("train", parts[:2]), ("val", parts[:1]))
    ]  # fmt: skip
    (root / "dataset_info.json").write_text(json.dumps(info))
    assert training_splits(str(folder / SARA)) == ("train", "val")
    assert whole_statistics(folder / SARA)["num_trajectories"] == 9
    assert training_splits(str(folder / SAILOR)) == ("train[:95%]", "train[95%:]")


def test_a_part_of_a_split_reads_its_episodes_alone(folder):
    assert sorted({*load(folder / SARA, split="train[2:70%]")["episode_index"]}) == [2, 3, 4, 5, 6]
    frames = load(folder / SARA, split="train[80%:]", streaming=True)
    assert sorted({frame["episode_index"] for frame in frames}) == [8, 9]
    with pytest.raises(ValueError, match=r"'train\[95%:\]' of .* contains no episodes"):
        load(folder / SARA, split="train[95%:]")


def test_every_named_mixture_consists_of_datasets_of_the_table():
    assert all(dataset in known_table().datasets for name in MIXTURES for dataset in read_mixture(name))
