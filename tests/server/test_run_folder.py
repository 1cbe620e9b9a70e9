"""The files of a run, also after a crash."""

import json
import os

import numpy as np
import pytest

from adadpigu_core import archive
from adadpigu_core.exceptions import ConfigurationError, DataError
from server import run_folder
from server.run_folder import CHECKPOINT, METRICS, RunFolder


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "deep" / "run")


class TestMetrics:
    def test_one_line_a_round(self, folder):
        lines = [{"round": number, "loss": 1 / number} for number in (1, 2, 3)]
        for line in lines:
            folder.add_metrics(line)
        assert folder.metrics() == lines

    def test_a_line_cut_short_by_a_crash_does_not_count(self, folder):
        folder.add_metrics({"round": 1})
        folder.add_metrics({"round": 2, "loss": 0.25})
        path = folder.path / METRICS
        path.write_bytes(path.read_bytes()[:-9])
        assert folder.metrics() == [{"round": 1}]
        folder.keep_metrics(1)
        folder.add_metrics({"round": 2})
        assert folder.metrics() == [{"round": 1}, {"round": 2}]

    @pytest.mark.parametrize("rest", [b"12", b"null", b'"round"', b"[1]", b"{}", b"\xff\xfe", b"", b'{"rou'])
    def test_nor_does_anything_else_that_is_no_line(self, folder, rest):
        folder.add_metrics({"round": 1})
        with (folder.path / METRICS).open("ab") as file:
            file.write(rest)
        folder.keep_metrics(5)
        assert folder.metrics() == [{"round": 1}]

    def test_rounds_after_the_checkpoint_are_forgotten(self, folder):
        for number in range(1, 6):
            folder.add_metrics({"round": number})
        folder.keep_metrics(3)
        assert [line["round"] for line in folder.metrics()] == [1, 2, 3]
        folder.keep_metrics(0)
        assert (folder.path / METRICS).read_bytes() == b""

    def test_without_any(self, folder):
        assert folder.metrics() == []
        folder.keep_metrics(0)
        assert folder.metrics() == []


class TestJson:
    def test_what_is_not_finite_is_null(self, folder):
        value = {"epsilon": float("inf"), "list": [1.5, float("nan"), (-float("inf"),)], "text": "NaN", "n": 3}
        folder.write_json("x.json", value)
        folder.add_metrics({"round": 1, **value})

        def refuse(constant):
            raise AssertionError(f"{constant} is not JSON")

        expected = {"epsilon": None, "list": [1.5, None, [None]], "text": "NaN", "n": 3}
        assert json.loads((folder.path / "x.json").read_text(), parse_constant=refuse) == expected
        (line,) = (folder.path / METRICS).read_text().splitlines()
        assert json.loads(line, parse_constant=refuse) == {"round": 1, **expected}


class TestCheckpoint:
    def test_round_trip(self, folder):
        folder.save_checkpoint({"weights": np.arange(3.0)}, {"round": 2})
        arrays, values = folder.load_checkpoint()
        np.testing.assert_array_equal(arrays["weights"], np.arange(3.0), strict=True)
        assert values == {"round": 2}

    def test_there_is_none(self, folder):
        assert folder.load_checkpoint() is None

    @pytest.mark.parametrize("keep", [0, 1, 10, 0.5, 0.99])
    def test_a_damaged_one_says_what_to_do(self, folder, keep):
        folder.save_checkpoint({"weights": np.arange(300.0)}, {"round": 2})
        path = folder.path / CHECKPOINT
        whole = path.read_bytes()
        path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
        with pytest.raises(DataError, match="start a new run"):
            folder.load_checkpoint()

    def test_a_crash_while_writing_leaves_the_old_one(self, folder, monkeypatch):
        folder.save_checkpoint({"weights": np.zeros(3)}, {"round": 1})

        def crash(_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", crash)
            with pytest.raises(KeyboardInterrupt):
                folder.save_checkpoint({"weights": np.ones(3)}, {"round": 2})
        assert folder.load_checkpoint()[1] == {"round": 1}
        folder.save_checkpoint({"weights": np.ones(3)}, {"round": 2})
        assert folder.load_checkpoint()[1] == {"round": 2}

    def test_nothing_is_left_over(self, folder):
        folder.save_checkpoint({"weights": np.zeros(3)}, {"round": 1})
        folder.write_text("config.toml", "seed = 0\n")
        assert sorted(path.name for path in folder.path.iterdir()) == [CHECKPOINT, "config.toml"]


class TestPieces:
    """A checkpoint that would be a large file lies in several."""

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        monkeypatch.setattr(run_folder, "LARGEST_PIECE", 1000)

    @staticmethod
    def save(folder, number, size=2000):
        folder.save_checkpoint({"weights": np.arange(size) + number, "zeros": np.zeros(1000)}, {"round": number})

    @staticmethod
    def pieces(folder):
        return {path.name for path in folder.path.iterdir()} - {CHECKPOINT}

    def test_round_trip_in_small_files(self, folder):
        for number in (1, 2):
            self.save(folder, number)
            arrays, values = folder.load_checkpoint()
            np.testing.assert_array_equal(arrays["weights"], np.arange(2000) + number, strict=True)
            np.testing.assert_array_equal(arrays["zeros"], np.zeros(1000), strict=True)
            assert values == {"round": number}
        assert max((folder.path / name).stat().st_size for name in self.pieces(folder)) == 1000

    def test_nothing_else_is_removed_and_nothing_left_over(self, folder):
        (folder.path / "checkpoint-mine.npz").write_text("")
        (folder.path / f".checkpoint-{'0' * 64}.new").write_text("left by a crash")
        self.save(folder, 1)
        count = len(self.pieces(folder))
        self.save(folder, 2)
        assert len(self.pieces(folder)) == count
        folder.save_checkpoint({"weights": np.zeros(3)}, {"round": 3})
        assert self.pieces(folder) == {"checkpoint-mine.npz"}
        assert folder.load_checkpoint()[1] == {"round": 3}

    def test_a_crash_at_any_file_leaves_the_old_one(self, folder, monkeypatch):
        replace = RunFolder._replace
        self.save(folder, 1)
        for survived in range(len(self.pieces(folder)) + 1):  # the last is checkpoint.npz
            written = []

            def crash(self, name, data, survived=survived, written=written):
                if len(written) == survived:
                    raise KeyboardInterrupt
                written.append(name)
                replace(self, name, data)

            with monkeypatch.context() as patch:
                patch.setattr(RunFolder, "_replace", crash)
                with pytest.raises(KeyboardInterrupt):
                    self.save(folder, 2)
            assert folder.load_checkpoint()[1] == {"round": 1}
        self.save(folder, 2)
        assert folder.load_checkpoint()[1] == {"round": 2}

    @pytest.mark.parametrize("act", ["cut", "alter", "remove", "exchange"])
    def test_a_damaged_piece_is_noticed(self, folder, act):
        self.save(folder, 1)
        one, other = sorted(folder.path / name for name in self.pieces(folder))[:2]
        data = one.read_bytes()
        if act == "remove":
            one.unlink()
        else:
            one.write_bytes({"cut": data[:-1], "alter": data[:-1] + b"?", "exchange": other.read_bytes()}[act])
        with pytest.raises(DataError, match="start a new run"):
            folder.load_checkpoint()

    @pytest.mark.parametrize("names", [["../elsewhere"], ["result.json"], [7], 7, {"pieces": 1}])
    def test_only_pieces_are_read(self, folder, names):
        (folder.path.parent / "elsewhere").write_bytes(archive.pack({}, {}))
        (folder.path / "result.json").write_bytes(archive.pack({}, {}))
        (folder.path / CHECKPOINT).write_bytes(archive.pack({}, {"pieces": names}))
        with pytest.raises(DataError, match="start a new run"):
            folder.load_checkpoint()


class TestFolder:
    def test_a_file_is_no_folder(self, tmp_path):
        (tmp_path / "file").write_text("")
        for path in (tmp_path / "file", tmp_path / "file" / "run"):
            with pytest.raises(ConfigurationError, match=r"runtime\.output"):
                RunFolder(path)

    def test_a_folder_that_cannot_be_written(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        with pytest.raises(ConfigurationError, match="not writable"):
            RunFolder(tmp_path)

    def test_a_relative_path_is_fixed_at_once(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        folder = RunFolder(tmp_path.relative_to(tmp_path) / "run")
        monkeypatch.chdir("/")
        folder.write_text("x", "y")
        assert (tmp_path / "run" / "x").read_text() == "y"
