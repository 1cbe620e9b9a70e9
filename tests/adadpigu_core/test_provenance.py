"""The fingerprint of the code."""

import re
import shutil
from pathlib import Path

import pytest

import adadpigu_core
from adadpigu_core.provenance import code_fingerprint

ROOT = Path(adadpigu_core.__file__).parent.parent


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the packages that count, and the fingerprint as it is there."""
    for package in ("adadpigu_core", "client", "server"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(adadpigu_core, "__file__", str(tmp_path / "adadpigu_core" / "__init__.py"))
    return tmp_path


def fingerprint():
    return code_fingerprint.__wrapped__()


def test_names_version_and_source():
    assert re.fullmatch(re.escape(adadpigu_core.__version__) + r"\+[0-9a-f]{12}", code_fingerprint())


def test_is_the_same_wherever_the_code_lies(copy):
    assert fingerprint() == code_fingerprint()


@pytest.mark.parametrize(
    "path", ["adadpigu_core/noise.py", "client/node.py", "server/tally.py", "adadpigu_core/gradients/simple.py"]
)
def test_every_change_counts(copy, path):
    before = fingerprint()
    source = copy / path
    source.write_bytes(source.read_bytes() + b"#")
    changed = fingerprint()
    source.unlink()
    assert len({before, changed, fingerprint()}) == 3


def test_a_new_or_renamed_file_counts(copy):
    before = fingerprint()
    (copy / "client" / "more.py").write_text("")
    more = fingerprint()
    (copy / "client" / "more.py").rename(copy / "client" / "other.py")
    assert len({before, more, fingerprint()}) == 3


def test_line_ends_and_other_files_do_not_count(copy):
    before = fingerprint()
    for path in copy.rglob("*.py"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    (copy / "README.md").write_text("text")
    (copy / "simulations").mkdir()
    (copy / "simulations" / "new.py").write_text("x = 1")
    (copy / "client" / "__pycache__").mkdir()
    (copy / "client" / "__pycache__" / "node.cpython-311.pyc").write_bytes(b"\x00")
    assert fingerprint() == before
