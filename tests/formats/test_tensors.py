"""Safetensors files: what is written comes back, and what is none is refused."""

import json
import struct

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from minilora.errors import MiniloraError
from minilora.formats.tensors import (
    check_shapes,
    read_array,
    read_header,
    read_tensors,
    read_weight,
    write_tensors,
)

KINDS = ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?"]


def container(header, body=b"", *, length=None):
    """A safetensors file made by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def info(dtype, shape, start, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=6),
    kinds=st.lists(st.sampled_from(KINDS), min_size=6, max_size=6),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=60)
def test_round_trip(tmp_path_factory, shapes, kinds, seed):
    rng = np.random.default_rng(seed)
    tensors = {
        f"t.{i}": np.asarray(100 * rng.standard_normal(shape)).astype(kind)
        for i, (shape, kind) in enumerate(zip(shapes, kinds, strict=False))
    }
    path = tmp_path_factory.mktemp("t") / "x.safetensors"
    write_tensors(path, tensors, {"format": "pt"})
    back, metadata = read_tensors(path)
    assert metadata == {"format": "pt"} and back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape, name
        assert back[name].tobytes() == tensor.tobytes(), name
    assert [p.name for p in path.parent.iterdir()] == ["x.safetensors"]


def test_transposes_and_slices_are_written_as_they_read(tmp_path):
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    write_tensors(tmp_path / "x", {"t": x.T, "s": x[::2, 1::3], "0": np.array(3.0)})
    back, metadata = read_tensors(tmp_path / "x")
    assert metadata == {}
    assert np.array_equal(back["t"], x.T) and np.array_equal(back["s"], x[::2, 1::3])
    assert back["0"].shape == () and back["0"] == 3.0


def test_equal_arrays_make_equal_files_that_all_may_read(tmp_path):
    x = {"b": np.ones(3, np.float32), "a": np.zeros((2, 2), np.float16)}
    write_tensors(tmp_path / "1", x, {"format": "pt"})
    write_tensors(tmp_path / "2", dict(reversed(x.items())), {"format": "pt"})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    (tmp_path / "by_hand").touch()
    assert (tmp_path / "1").stat().st_mode == (tmp_path / "by_hand").stat().st_mode


def test_what_is_read_can_be_changed(tmp_path):
    write_tensors(tmp_path / "x", {"a": np.zeros(3, np.float32)})
    before = (tmp_path / "x").read_bytes()
    read_tensors(tmp_path / "x")[0]["a"][:] = 1.0
    assert (tmp_path / "x").read_bytes() == before


def test_bfloat16_is_the_upper_half_of_a_float32(tmp_path):
    values = np.array([1.0, -2.5, 0.0, 3.0e38, -1e-30, 1 / 3], np.float32)
    upper = (values.view(np.uint32) >> 16).astype("<u2")
    (tmp_path / "x").write_bytes(
        container({"a": info("BF16", [2, 3], 0, 12)}, upper.tobytes()),
    )
    (a,) = read_tensors(tmp_path / "x")[0].values()
    assert a.dtype == np.float32 and a.shape == (2, 3)
    assert np.array_equal(a.ravel().view(np.uint32), upper.astype(np.uint32) << 16)
    assert np.allclose(a.ravel(), values, rtol=2**-7)


ONE = info("F32", [1], 0, 4)
BAD = {
    "empty": b"",
    "short": b"\x08",
    "text": b"It is a truth universally acknowledged, that a single man in possession",
    "zip": b"PK\x03\x04" + bytes(100),
    "pickle": b"\x80\x04\x95\x1c\x00\x00\x00\x00\x00\x00\x00c__builtin__\neval\n",
    "no header": container(b""),
    "header is a list": container(b"[]"),
    "header is no JSON": container(b"{'a': 1}"),
    "header goes on": container({"a": ONE}, b"1234", length=10**6),
    "absurd header length": container({"a": ONE}, b"1234", length=2**63),
    "data cut off": container({"a": ONE}, b"123"),
    "data left over": container({"a": ONE}, b"12345"),
    "negative offset": container({"a": info("F32", [1], -4, 0)}, b"1234"),
    "absurd offset": container({"a": info("F32", [1], 0, 2**62)}, b"1234"),
    "absurd shape": container({"a": info("F32", [2**40, 2**40], 0, 4)}, b"1234"),
    "shape and size differ": container({"a": info("F32", [2], 0, 4)}, b"1234"),
    "overlap": container({"a": ONE, "b": ONE}, b"1234"),
    "hole": container({"a": info("F32", [1], 4, 8)}, b"12345678"),
    "unknown dtype": container({"a": info("Q32", [1], 0, 4)}, b"1234"),
    "eight bits": container({"a": info("F8_E4M3", [1], 0, 1)}, b"1"),
    "deeply nested": container(b'{"a":' * 50_000),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_by_name(tmp_path, case):
    path = tmp_path / "model.safetensors"
    path.write_bytes(BAD[case])
    with pytest.raises(MiniloraError) as caught:
        read_tensors(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(MiniloraError, match="does not exist"):
        read_tensors(tmp_path / "x.safetensors")
    with pytest.raises(MiniloraError, match="is not a file"):
        read_tensors(tmp_path)
    with pytest.raises(MiniloraError, match="cannot write"):
        write_tensors(tmp_path / "no" / "x", {"a": np.zeros(1)})


def test_weights_are_finite_floats(tmp_path):
    tensors = {
        "ints": np.zeros(2, np.int32),
        "nan": np.array([1, np.nan], np.float16),
        "big": np.array([1e300]),
        "good": np.array([1.5], np.float16),
    }
    write_tensors(tmp_path / "x", tensors)
    entries, _ = read_header(tmp_path / "x")
    for dtype in (np.float32, np.float64):
        assert read_weight(entries["good"], dtype).dtype == dtype
    for name, message in [("ints", "I32, expected F64"), ("nan", "finite"), ("big", "finite")]:
        with pytest.raises(MiniloraError, match=f"{name} .*{message}"):
            read_weight(entries[name], np.float32)
    assert read_weight(entries["big"], np.float64) == 1e300


def test_shapes_that_differ_are_listed():
    check_shapes("never", {"a": (1,)}, {"a": (1,)})
    with pytest.raises(MiniloraError) as caught:
        check_shapes("it does not fit", {"a": (1,), "c": (3,)}, {"a": (2,), "b": (4, 5)})
    assert str(caught.value) == (
        "it does not fit; of the wrong shape: a is (1,), expected (2,); "
        "missing: b (4, 5); left over: c (3,)"
    )
    with pytest.raises(MiniloraError, match=r"left over: 'a\\n\\x1b' \(\)$"):
        check_shapes("it does not fit", {"a\n\x1b": ()}, {})
    with pytest.raises(MiniloraError, match=r"n5 \(\) and 4 more$"):
        check_shapes("it does not fit", {}, {f"n{i}": () for i in range(10)})


def test_files_are_those_of_the_package_bit_for_bit(tmp_path):
    from safetensors.numpy import save

    rng = np.random.default_rng(0)
    tensors = {
        f"{name} é": rng.standard_normal(shape).astype(kind)
        for name, shape, kind in [("b", (2, 3), "f4"), ("a", (), "f4"), ("c", (0, 2), "f4"),
                                  ("d", (3,), "f8"), ("e", (5,), "f2")]
    }  # fmt: skip
    write_tensors(tmp_path / "x", tensors, {"format": "pt"})
    assert (tmp_path / "x").read_bytes() == save(tensors, {"format": "pt"})


def test_metadata_has_one_order_and_other_dtypes_are_named(tmp_path):
    numbers = {"a": np.zeros(2)}
    metadata = dict.fromkeys("qwertyuiop", "x")
    write_tensors(tmp_path / "1", numbers, metadata)
    write_tensors(tmp_path / "2", numbers, dict(reversed(metadata.items())))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    with pytest.raises(MiniloraError, match="cannot save a: safetensors has no dtype complex128"):
        write_tensors(tmp_path / "3", {"a": np.zeros(2, complex)})
    assert not (tmp_path / "3").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "cannot be read: No such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-4]), "was cut off while it was read"),
    ],
)
def test_a_file_that_changes_after_its_header_was_read_is_said(tmp_path, change, message):
    write_tensors(tmp_path / "x", {"a": np.ones(3, np.float32)})
    entries, _ = read_header(tmp_path / "x")
    change(tmp_path / "x")
    for read in (read_array, lambda entry: read_weight(entry, np.float32)):
        with pytest.raises(MiniloraError, match=message):
            read(entries["a"])
