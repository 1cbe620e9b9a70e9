"""Texts become records by a fixed public hash."""

import numpy as np
import pytest
import torch

from adadpigu_core import datasets
from adadpigu_core.exceptions import ConfigurationError, DataError
from adadpigu_core.gradients import check_model, cross_entropy
from adadpigu_core.models import ModelSpec, build, check_isolation, default_model
from adadpigu_core.text import VOCABULARY, TextSource, features_of

LINES = ["ham\tHello, you there", "spam\tWIN now! Win!", "ham\tok", "spam\tfree £1000", "ham\t\u00fcber ok\tok"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "texts.tsv"
    path.write_text("\n".join(LINES * 4) + "\n", encoding="utf-8")
    return path


def test_one_file_is_split_by_lines(file):
    data = datasets.load(f"text:{file}#ham,spam#words-64")
    assert (len(data.train), len(data.test), data.input_shape, data.num_classes) == (16, 4, (64,), 2)
    assert data.train.labels.tolist() == [0, 1, 0, 1] * 4
    assert data.test.labels.tolist() == [0] * 4


def test_a_site_has_all_lines_and_a_folder_has_two_files(file, tmp_path):
    assert len(datasets.load_records(f"text:{file}#ham,spam")) == 20
    for split in ("train", "test"):
        (tmp_path / f"{split}.tsv").write_text("0\tone\n1\ttwo\n", encoding="utf-8")
    assert len(datasets.load(f"text:{tmp_path}").test) == 2
    assert len(datasets.load_records(f"text:{tmp_path}")) == 2


def test_words_are_counted_whatever_their_case_and_scaled():
    features = features_of(["Win win", "lose", ""], "words", 512)
    assert np.linalg.norm(features, axis=1).tolist() == [1.0, 1.0, 0.0]
    assert features[0].nonzero()[0].tolist() == features_of(["WIN"], "words", 512)[0].nonzero()[0].tolist()


def test_a_record_is_a_function_of_its_own_text():
    alone = features_of(["some text"], "bytes", 128)
    beside = features_of(["other", "some text", "words"], "bytes", 128)
    assert np.array_equal(alone[0], beside[1])


def test_a_sequence_is_padded_and_cut():
    features = features_of(["a b", "a b c d e"], "sequence", 3)
    assert features[0].tolist() == [*features[1][:2].tolist(), 0.0]
    assert features.max() <= VOCABULARY
    assert features[1].min() >= 1


def test_the_hash_is_the_same_everywhere():
    assert features_of(["hello"], "sequence", 1)[0, 0] == 1671


@pytest.mark.parametrize(
    ("line", "problem"), [("ham no tab", "no tab"), ("eggs\ttext", "one of ham, spam"), ("1\ttext", "one of ham, spam")]
)
def test_a_bad_line_is_named(tmp_path, line, problem):
    path = tmp_path / "bad.tsv"
    path.write_text(f"ham\tgood\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match=problem) as caught:
        datasets.load_records(f"text:{path}#ham,spam")
    assert "line 2" in str(caught.value)
    assert "text" not in caught.value.public_message


def test_labels_are_numbers_unless_named(tmp_path):
    path = tmp_path / "bad.tsv"
    path.write_text("ham\tgood\n", encoding="utf-8")
    with pytest.raises(DataError, match="name the classes"):
        datasets.load_records(f"text:{path}")
    with pytest.raises(DataError, match="no such file"):
        datasets.load_records(f"text:{tmp_path / 'none.tsv'}")


@pytest.mark.parametrize("name", ["text:", "text:a#b,c#words", "text:a#b,c#words-0", "text:a#b#words-9#more"])
def test_other_names_are_refused(name):
    with pytest.raises(ConfigurationError, match="write text:PATH"):
        TextSource.of(name)


def test_the_embedding_bag_is_a_model_like_any_other(file):
    data = datasets.load(f"text:{file}#ham,spam#sequence-8")
    spec = ModelSpec("adadpigu_core.text:embedding_bag", "relu", "none", data.input_shape, 2)
    model = build(spec, seed=0)
    check_isolation(model, torch.rand(4, 8))
    check_model(model, cross_entropy, spec.input_shape, 2)
    padded = torch.cat([data.test.features, torch.zeros(4, 3)], dim=1)
    assert torch.allclose(model(padded), model(data.test.features), atol=1e-6)
    assert default_model("text:any.tsv") == "linear"
