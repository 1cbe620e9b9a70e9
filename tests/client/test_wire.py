"""The last inch between Flower's records and messages, where a server may have put anything."""

import io
import zipfile

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from adadpigu_core.exceptions import MessageError
from adadpigu_core.messages import DescribeRequest, TrainRequest, Wire, decode, encode
from client.wire import from_content, to_content


def content(arrays=None, values=None):
    return RecordDict({"arrays": ArrayRecord(arrays or {}), "values": ConfigRecord(values or {})})


def damaged(data, stype="numpy.ndarray"):
    return content({"weights": Array(dtype="float32", shape=(3,), stype=stype, data=data)})


def saved(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def zipped(entries):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def test_messages_survive(requests):
    for request, kind in ((requests.describe(), DescribeRequest), (requests.train(), TrainRequest)):
        wire = from_content(to_content(encode(request)))
        again = decode(wire, kind)
        assert encode(again).values == encode(request).values
        for name, array in encode(request).arrays.items():
            np.testing.assert_array_equal(wire.arrays[name], array, strict=True)


def test_lists_may_be_empty():
    wire = Wire({}, {"numbers": [], "text": ""})
    assert from_content(to_content(wire)).values == {"numbers": [], "text": ""}


@pytest.mark.parametrize(
    "records",
    [
        {},
        {"arrays": ArrayRecord()},
        {"values": ConfigRecord()},
        {"arrays": ConfigRecord(), "values": ArrayRecord()},
        {"arrays": ArrayRecord(), "values": MetricRecord()},
        {"arrays": ArrayRecord(), "values": ConfigRecord(), "more": ConfigRecord()},
    ],
)
def test_other_records_are_refused(records):
    with pytest.raises(MessageError, match="expected the records 'arrays' and 'values'") as caught:
        from_content(RecordDict(records))
    assert caught.value.public_message == str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"nonsense",
        b"\x93NUMPY",
        saved(np.ones(100))[:-1],
        saved(np.ones(3)).replace(b"'descr': '<f8'", b"'descr': '<f9'"),
        saved(np.ones(3)).replace(b"(3,)", b"(9,)"),
        saved(np.ones(3)).replace(b"(3,)", b"3**99"),
        saved(np.array([{"an": "object"}]), allow_pickle=True),
        b"\x80\x04cos\nsystem\n.",
        b"PK\x03\x04 no archive",
    ],
)
def test_damaged_arrays_are_refused(data):
    with pytest.raises(MessageError, match="an array is damaged"):
        from_content(damaged(data))


def test_other_serialisations_are_refused():
    with pytest.raises(MessageError, match="an array is damaged"):
        from_content(damaged(saved(np.ones(3)), stype="pickle"))


def test_an_archive_is_no_array():
    with pytest.raises(MessageError, match="an array is an archive"):
        from_content(damaged(zipped({"weights.npy": saved(np.ones(3))})))
