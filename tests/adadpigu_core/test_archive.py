"""Packed arrays and values, whole and damaged."""

import io
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from adadpigu_core.archive import pack, unpack
from adadpigu_core.exceptions import DataError

NAMES = st.text(st.characters(categories=("L", "N")), min_size=1).filter(
    lambda name: name not in ("file", "allow_pickle")
)
ARRAYS = arrays_of.arrays(
    st.sampled_from([np.float32, np.float64, np.uint8, np.int64, np.bool_]),
    arrays_of.array_shapes(min_dims=0, max_dims=3),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
WHOLE = pack({"weights": np.arange(40, dtype=np.float32)}, {"round": 3, "run": "abc"})


class TestRoundTrip:
    @settings(max_examples=100, deadline=None)
    @given(st.dictionaries(NAMES, ARRAYS, max_size=4), st.dictionaries(st.text(), JSON, max_size=4))
    def test_gives_back_what_was_packed(self, arrays, values):
        got, read = unpack(pack(arrays, values))
        assert list(got) == list(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(got[name], array, strict=True)
        assert read == values

    @pytest.mark.parametrize("name", ["a/b", "../a", "importance.", "a.npy", "optimiser.step", "mask-12"])
    def test_names_are_names_and_not_paths(self, name):
        got, _ = unpack(pack({name: np.ones(2)}, {}))
        assert list(got) == [name]

    def test_bits_stay_as_they_are(self):
        array = np.array([np.nan, -0.0, np.inf, 5e-324])
        assert unpack(pack({"x": array}, {}))[0]["x"].tobytes() == array.tobytes()


class TestWhatCannotBePacked:
    @pytest.mark.parametrize("name", ["", "file", "allow_pickle", "values.json", "a\x00b", "a\nb"])
    def test_names(self, name):
        with pytest.raises(ValueError, match="named"):
            pack({name: np.ones(2)}, {})

    def test_objects(self):
        with pytest.raises(ValueError, match="Python objects"):
            pack({"x": np.array([{}, None])}, {})

    def test_values_that_json_does_not_know(self):
        with pytest.raises(TypeError):
            pack({}, {"x": np.ones(2)})


class TestDamage:
    def test_the_whole_is_whole(self):
        assert unpack(WHOLE)[1] == {"round": 3, "run": "abc"}

    @pytest.mark.parametrize("size", [0, 1, 4, 30, len(WHOLE) // 2, len(WHOLE) - 1])
    def test_cut_short(self, size):
        with pytest.raises(DataError, match="damaged"):
            unpack(WHOLE[:size])

    @settings(max_examples=400, deadline=None)
    @given(st.integers(0, len(WHOLE) - 1), st.integers(1, 255))
    def test_one_byte_changed_is_found_or_does_not_matter(self, index, change):
        damaged = bytearray(WHOLE)
        damaged[index] ^= change
        try:
            arrays, values = unpack(bytes(damaged))
        except DataError:
            return
        # some bytes, such as times and names of attributes, have no meaning
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, np.arange(40, dtype=np.float32), err_msg=name)
        assert values in ({"round": 3, "run": "abc"}, {})

    @given(st.binary(max_size=200))
    def test_anything_else(self, data):
        with pytest.raises(DataError):
            unpack(data)

    def archive(self, **members):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, data in members.items():
                archive.writestr(name.replace("__", "."), data)
        return buffer.getvalue()

    def saved(self, array, **settings):
        buffer = io.BytesIO()
        np.save(buffer, array, **settings)
        return buffer.getvalue()

    @pytest.mark.parametrize("text", [b"", b"[1]", b"3", b"null", b"{", b"\xff", b"[" * 100_000])
    def test_values_that_are_no_table(self, text):
        with pytest.raises(DataError):
            unpack(self.archive(values__json__npy=self.saved(np.frombuffer(text, np.uint8))))

    def test_a_single_array_is_no_archive(self):
        with pytest.raises(DataError):
            unpack(self.saved(np.ones(3)))

    def test_a_pickle_is_not_opened(self):
        class Bomb:
            def __reduce__(self):
                return (pytest.fail, ("it was opened",))

        bomb = np.array([Bomb()], dtype=object)
        with pytest.raises(DataError, match="pickle"):
            unpack(self.archive(x__npy=self.saved(bomb, allow_pickle=True)))

    def test_members_that_are_no_arrays(self):
        with pytest.raises(DataError):
            unpack(self.archive(values__json__npy=self.saved(np.frombuffer(b"{}", np.uint8)), x__npy=b"text"))
