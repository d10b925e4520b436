"""The files of a checkpoint: which are absent, and which are unknown or can't be read."""

import json

import pytest
from huggingface_hub import constants, snapshot_download

from openvla_hf.modeling.checkpoint_files import CheckpointFiles, read_json


REPO = "someone/policy"
STATISTICS = "dataset_statistics.json"


@pytest.fixture
def repository(owner, monkeypatch):
    """A small repository on a Hub whose client retries without waiting."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    folder = owner.root / REPO
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / STATISTICS).write_text('{"kitchen": 1}')
    return folder


@pytest.fixture
def offline(monkeypatch):
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_a_file_that_the_hub_does_not_have_is_absent_and_others_are_found(repository):
    files = CheckpointFiles.locate(REPO)
    assert files.names == {"config.json", STATISTICS}
    assert files.read_json(STATISTICS) == {"kitchen": 1}
    assert files.find("adapter_config.json") is None


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (401, "the token is missing or invalid .HTTP 401."),
        (403, "no access .HTTP 403."),
        (429, "too many requests were made .HTTP 429."),
        (500, "the Hub failed .HTTP 500."),
        (503, "the Hub failed .HTTP 503."),
        (0, "the Hub does not answer"),
    ],
)
def test_only_404_makes_a_file_absent(repository, owner, status, reason):
    files = CheckpointFiles.locate(REPO)
    owner.faults[f"/{REPO}/resolve/*/{STATISTICS}"] = status
    with pytest.raises(OSError, match=reason):
        files.find(STATISTICS)
    owner.faults.clear()
    assert files.read_json(STATISTICS) == {"kitchen": 1}


@pytest.mark.parametrize("status", [401, 403, 429, 500, 0])
def test_without_the_list_of_files_nothing_is_located(repository, owner, status):
    owner.faults["/api/models/*"] = status
    with pytest.raises(OSError, match=REPO):
        CheckpointFiles.locate(REPO)


@pytest.mark.parametrize("status", [403, 429, 500, 0])
def test_without_the_list_of_files_the_cache_is_used_alone(repository, owner, status):
    files = CheckpointFiles.locate(REPO)
    for name in ("config.json", "adapter_config.json"):
        files.find(name)
    (repository / "config.json").write_text('{"newer": 1}')
    owner.faults["/api/models/*"] = status
    files = CheckpointFiles.locate(REPO)
    assert files.hub_kwargs["local_files_only"]
    assert files.read_json("config.json") == {}
    assert files.find("adapter_config.json") is None
    with pytest.raises(OSError, match=f"Cannot read {STATISTICS} of {REPO}: it is not in the cache"):
        files.find(STATISTICS)


def test_offline_a_file_that_was_never_requested_does_not_count_as_absent(repository, offline):
    CheckpointFiles.locate(REPO).find("config.json")
    offline()
    files = CheckpointFiles.locate(REPO)
    assert files.read_json("config.json") == {}
    with pytest.raises(OSError, match="Load it once online, or give a folder that contains all files"):
        files.find(STATISTICS)


def test_offline_a_downloaded_repository_has_no_more_than_its_files(repository, offline):
    (repository / STATISTICS).unlink()
    snapshot_download(REPO)
    offline()
    files = CheckpointFiles.locate(REPO)
    assert files.names == {"config.json"}
    assert files.find(STATISTICS) is None
    assert files.match(["action_head--*"]) == []


def test_offline_an_incomplete_repository_is_recognised_as_such(repository, offline):
    (repository / "action_head--100_checkpoint.pt").write_bytes(b"weights")
    snapshot_download(REPO, allow_patterns=["config.json"])
    offline()
    files = CheckpointFiles.locate(REPO)
    with pytest.raises(OSError, match=f"Cannot read {STATISTICS}"):
        files.find(STATISTICS)
    assert files.match(["action_head--*", "proprio--*"]) == ["action_head--*"]


def test_all_files_come_from_the_commit_that_was_listed(repository):
    files = CheckpointFiles.locate(REPO)
    (repository / STATISTICS).write_text('{"bathroom": 1}')
    assert files.read_json(STATISTICS) == {"kitchen": 1}
    assert CheckpointFiles.locate(REPO).read_json(STATISTICS) == {"bathroom": 1}


def test_a_subfolder_has_its_own_files(repository):
    (repository / "inner").mkdir()
    (repository / "inner" / "config.json").write_text('{"inner": 1}')
    files = CheckpointFiles.locate(REPO, subfolder="inner")
    assert files.names == {"config.json"}
    assert files.read_json("config.json") == {"inner": 1}
    assert files.find(STATISTICS) is None


@pytest.mark.parametrize("source", ["/no/where", "./nowhere", "../no/where", "", "no where"])
def test_a_source_that_is_neither_a_folder_nor_a_hub_id_is_reported(owner, source):
    with pytest.raises(OSError, match="is neither an existing folder nor a Hub id such as 'openvla/openvla-7b'"):
        CheckpointFiles.locate(source)


def test_an_absent_repository_and_revision_are_named(repository, owner):
    with pytest.raises(OSError, match=r"^someone/absent is not a local folder, and the Hub has no such repository"):
        CheckpointFiles.locate("someone/absent")
    with pytest.raises(OSError, match="the repository has no such revision"):
        CheckpointFiles.locate(REPO, revision="absent")


@pytest.mark.parametrize("content", ["", '{"kitchen": ', "[1]", "null", "\udce9{}"])
def test_a_damaged_json_file_is_named(tmp_path, content):
    path = tmp_path / STATISTICS
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=f"{STATISTICS} (is damaged|must contain a JSON object)"):
        read_json(path)
    path.write_text(json.dumps({"kitchen": 1}))
    assert read_json(path) == {"kitchen": 1}
