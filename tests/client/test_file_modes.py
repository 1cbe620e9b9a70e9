"""Files that others may change, or replace."""

import pytest

from client.file_modes import open_to_others


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "folder" / "inner" / "file"
    path.parent.mkdir(parents=True)
    path.touch(0o644)
    return path


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_a_file_that_others_may_write(file, mode):
    assert open_to_others(file) is None
    file.chmod(mode)
    assert open_to_others(file) == file


@pytest.mark.parametrize("mode", [0o775, 0o777, 0o757])
@pytest.mark.parametrize("above", [0, 1])
def test_a_folder_in_which_others_may_put_another_file(file, mode, above):
    folder = file.parents[above]
    folder.chmod(mode)
    assert open_to_others(file) == folder
    folder.chmod(mode | 0o1000)  # the control: what is there cannot be replaced
    assert open_to_others(file) is None


def test_a_link_counts_on_both_ways(file, tmp_path):
    for name in ("safe", "open"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "link").symlink_to(file)
    (tmp_path / "open").chmod(0o777)
    assert open_to_others(tmp_path / "safe" / "link") is None
    assert open_to_others(tmp_path / "open" / "link") == tmp_path / "open"
    file.parent.chmod(0o777)
    assert open_to_others(tmp_path / "safe" / "link") == file.parent


def test_a_file_that_is_not_there_yet(file):
    path = file.with_name("later") / "ledger.sqlite"
    assert open_to_others(path) is None
    file.parent.chmod(0o777)
    assert open_to_others(path) == file.parent
