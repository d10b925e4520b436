import pytest

from openvla_hf.new_folder import new_folder, require_new_folder


@pytest.mark.parametrize("exists", [False, True])
def test_files_appear_in_a_new_or_empty_folder_once_all_are_written(tmp_path, exists):
    output = tmp_path / "outputs" / "new"
    if exists:
        output.mkdir(parents=True)
    with new_folder(output) as aside:
        (aside / "meta").mkdir()
        (aside / "meta" / "info.json").write_text("{}")
        assert not (output / "meta").exists()
    assert [path.relative_to(output).as_posix() for path in output.rglob("*.json")] == ["meta/info.json"]
    assert [path.name for path in output.parent.iterdir()] == ["new"]


def write(folder, meanwhile):
    with new_folder(folder) as aside:
        (aside / "config.json").write_text("ours")
        meanwhile()


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "new", interrupt)
    assert not list(tmp_path.iterdir())


def test_a_file_and_a_folder_with_files_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"is not empty\. Give a new or empty folder\."):
        require_new_folder(tmp_path)
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        require_new_folder(tmp_path / "notes.txt")


def test_files_that_someone_else_wrote_meanwhile_are_kept(tmp_path):
    def write_theirs():
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "config.json").write_text("theirs")

    with pytest.raises(FileExistsError, match="is not empty"):
        write(tmp_path / "new", write_theirs)
    assert (tmp_path / "new" / "config.json").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
