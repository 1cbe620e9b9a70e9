import pytest

from adadpigu_core.client_list import ClientEntry, read_clients
from adadpigu_core.exceptions import ConfigurationError

HEADING = "id,records,target_epsilon\n"


@pytest.fixture
def read(tmp_path):
    def write_and_read(content):
        path = tmp_path / "clients.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_clients(path)

    return write_and_read


@pytest.mark.parametrize(
    "text",
    [
        HEADING + "north,1200,8\nsouth,300,0.5\n",
        "\ufeff" + HEADING + "north,1200,8.0\r\nsouth,300,5e-1",
        "target_epsilon, id ,records\n8,north,1200\n\n 0.5, south ,300\n,,\n",
    ],
)
def test_a_list_is_read(read, text):
    assert read(text) == (ClientEntry("north", 1200, 8.0), ClientEntry("south", 300, 0.5))


def test_quotes_are_read_and_lines_are_counted_in_the_file(read):
    assert read(HEADING + '"a, b",1,1\n')[0].id == "a, b"
    with pytest.raises(ConfigurationError, match="line 4, column records"):
        read(HEADING + "a,1,1\n\nb,-1,1\n")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "line 1, column id: is missing"),
        ("id,records\na,1\n", "line 1, column target_epsilon: is missing"),
        ("id,records,target_epsilon,city\na,1,1,x\n", "line 1, column 'city': there is no such column"),
        ("id,id,records,target_epsilon\na,a,1,1\n", "line 1, column id: stands there more than once"),
        (HEADING, "line 2: there are no clients"),
        (HEADING + "a,1\n", "line 2: has 2 columns instead of 3"),
        (HEADING + "a,1,1,1\n", "line 2: has 4 columns instead of 3"),
        (HEADING + ",1,1\n", "line 2, column id"),
        (HEADING + "a" * 101 + ",1,1\n", "line 2, column id"),
        (HEADING + "a\x07,1,1\n", "line 2, column id"),
        (HEADING + "a,0,1\n", "line 2, column records"),
        (HEADING + "a,1.5,1\n", "line 2, column records"),
        (HEADING + "a,\u0663,1\n", "line 2, column records"),
        (HEADING + "a,99999999999999,1\n", "line 2, column records"),
        (HEADING + "a,1,zero\n", "line 2, column target_epsilon: must be a number, got 'zero'"),
        (HEADING + "a,1,\n", "line 2, column target_epsilon"),
        (HEADING + "a,1,nan\n", "line 2, column target_epsilon: must be positive and finite"),
        (HEADING + "a,1,inf\n", "line 2, column target_epsilon"),
        (HEADING + "a,1,0\n", "line 2, column target_epsilon"),
        (HEADING + "a,1,1\nb,1,1\na,2,2\n", "line 4, column id: 'a' is on line 2 already"),
        (HEADING + '"a,1,1\n', "is not CSV"),
        (b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_what_is_wrong_is_named_by_line_and_column(read, text, problem):
    with pytest.raises(ConfigurationError) as caught:
        read(text)
    assert problem in str(caught.value)
    assert "clients.csv" in str(caught.value)


def test_everything_is_named_at_once_up_to_a_length(read):
    with pytest.raises(ConfigurationError) as caught:
        read(HEADING + "a,x,y\n" * 30)
    assert "line 2, column records" in str(caught.value)
    assert "line 2, column target_epsilon" in str(caught.value)
    assert "and 50 more" in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"nowhere\.csv: cannot be read"):
        read_clients(tmp_path / "nowhere.csv")
