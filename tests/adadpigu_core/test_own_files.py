"""Tables and images of the user's own: what is read is what was written, what does not fit is named."""

import numpy as np
import pytest
from PIL import Image

from adadpigu_core import datasets, own_files
from adadpigu_core.configuration import parse
from adadpigu_core.exceptions import ConfigurationError, DataError

TABLE = "age,label,weight\n50,1,70.5\n61,0,80\n"


@pytest.fixture
def csv(tmp_path):
    def write(text=TABLE, name="site.csv"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    return write


class TestCsv:
    def test_a_site(self, csv):
        records = datasets.load_records(f"csv:{csv()}")
        assert records.features.tolist() == [[50.0, 70.5], [61.0, 80.0]]
        assert records.labels.tolist() == [1, 0]

    def test_another_column(self, csv):
        records = datasets.load_records(f"csv:{csv(TABLE.replace('label', 'diagnosis'))}#diagnosis")
        assert records.labels.tolist() == [1, 0]

    def test_a_byte_order_mark_quotes_and_empty_lines(self, csv):
        records = datasets.load_records(
            f"csv:{csv(chr(0xFEFF) + TABLE.replace('70.5', chr(34) + '70.5' + chr(34)) + chr(10))}"
        )
        assert records.features[0].tolist() == [50.0, 70.5]

    def test_a_task(self, csv, tmp_path):
        csv(name="task/train.csv")
        csv(TABLE.replace("50", "99"), name="task/test.csv")
        data = datasets.load(f"csv:{tmp_path}/task")
        assert (data.num_classes, data.input_shape) == (2, (2,))
        assert data.test.features[0, 0] == 99
        assert datasets.load_records(f"csv:{tmp_path}/task").features[0, 0] == 50

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("", "needs one column 'label'"),
            ("a,b\n1,2\n", "needs one column 'label'"),
            ("label\n1\n", "needs one column 'label' and features"),
            ("label,label,a\n1,1,2\n", "needs one column 'label'"),
            (TABLE.replace("61", ""), "line 3 holds something else than numbers"),
            (TABLE.replace("61", "old"), "line 3 holds something else than numbers"),
            (TABLE.replace("80", "80,1"), "line 3 has 4 fields, the header 3"),
            (TABLE.replace(",0,", ",0.5,"), r"y\[1\] is 0.5; store whole numbers"),
        ],
    )
    def test_what_does_not_fit(self, csv, text, problem):
        with pytest.raises(DataError, match=problem) as caught:
            datasets.load_records(f"csv:{csv(text)}")
        assert caught.value.public_message == ""

    def test_missing(self, tmp_path):
        with pytest.raises(DataError, match="there is no such file"):
            datasets.load_records(f"csv:{tmp_path}/none.csv")
        with pytest.raises(ConfigurationError, match="needs a path"):
            datasets.load_records("csv:")

    def test_not_a_number_is_for_the_checks_of_records(self, csv):
        records = datasets.load_records(f"csv:{csv(TABLE.replace('80', 'nan'))}")
        with pytest.raises(DataError, match="not a finite"):
            datasets.check_records(records, input_shape=(2,), num_classes=2)


@pytest.fixture
def images(tmp_path):
    """Write two images a class; gives the folder."""

    def write(mode="L", size=(4, 3), classes=("0", "2-malignant"), folder="site"):
        for number, name in enumerate(classes):
            path = tmp_path / folder / name
            path.mkdir(parents=True)
            for index in range(2):
                Image.new(mode, size, color=100 * number + index if mode == "L" else (number, index, 9)).save(
                    path / f"{index}.png"
                )
            (path / "notes.txt").write_text("not an image")
        return tmp_path / folder

    return write


class TestImages:
    def test_labels_are_the_numbers_of_the_folders(self, images):
        records = datasets.load_records(f"images:{images()}")
        assert records.features.shape == (4, 1, 3, 4)
        assert records.labels.tolist() == [0, 0, 2, 2]
        np.testing.assert_allclose(records.features[:, 0, 0, 0] * 255, [0, 1, 100, 101])

    def test_colours_come_first(self, images):
        records = datasets.load_records(f"images:{images(mode='RGB')}")
        assert records.features.shape == (4, 3, 3, 4)
        np.testing.assert_allclose(records.features[3, :, 0, 0] * 255, [1, 1, 9])

    def test_a_task(self, images, tmp_path):
        images(folder="task/train", classes=("0", "1"))
        images(folder="task/test", classes=("0", "1"))
        assert datasets.load(f"images:{tmp_path}/task").num_classes == 2
        assert len(datasets.load_records(f"images:{tmp_path}/task")) == 4

    def test_what_does_not_fit(self, images, tmp_path):
        folder = images()
        Image.new("L", (9, 9)).save(folder / "0" / "large.png")
        with pytest.raises(DataError, match=r"large.png: is of size and colours \(1, 9, 9\)"):
            datasets.load_records(f"images:{folder}")
        (folder / "0" / "large.png").write_bytes(b"no image")
        with pytest.raises(DataError, match="cannot be read as an image"):
            datasets.load_records(f"images:{folder}")
        with pytest.raises(DataError, match="by its number"):
            datasets.load_records(f"images:{images(classes=('benign',), folder='named')}")
        (tmp_path / "empty").mkdir()
        with pytest.raises(DataError, match="holds no images"):
            datasets.load_records(f"images:{tmp_path}/empty")
        with pytest.raises(DataError, match="no such folder"):
            datasets.load_records(f"images:{tmp_path}/none")


@pytest.mark.parametrize("name", ["csv:a.csv", "csv:a#b", "images:a"])
def test_the_settings_know_them(name):
    assert parse({"task.dataset": name}).task.dataset == name
    assert own_files.is_own(name)


@pytest.mark.parametrize("model", ["own.nets:wide", "mlp", "auto"])
def test_a_model_may_be_an_import_path(model):
    assert parse({"task.model": model}).task.model == model


@pytest.mark.parametrize("model", ["own.nets", "os:", "gpt"])
def test_or_is_refused(model):
    with pytest.raises(ConfigurationError, match=r"task\.model: .* package\.module:factory"):
        parse({"task.model": model})
