"""Members are parsed as data, within bounds; writing and reading are inverse."""

import io
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from data.samples import (
    BadSample,
    check_key,
    encode_npy,
    encode_png,
    image_members,
    latent_members,
    parse_caption,
    parse_label,
    parse_metadata,
    parse_npy_layout,
)
from data.transforms import decode_image


def decoded(payload: bytes) -> np.ndarray:
    layout = parse_npy_layout(payload, size=len(payload))
    return np.frombuffer(payload, dtype=layout.dtype, offset=layout.header).reshape(layout.shape)


def npy(array: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def npy_with_header(header: str, payload: bytes = b"", version: int = 1) -> bytes:
    text = header.encode("latin-1")
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(2 if version == 1 else 4, "little") + text + payload


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        st.sampled_from(["<f2", "<f4", "<f8", "u1", "<i4", "<i8", "?"]),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    ),
    st.sampled_from([(1, 0), (2, 0), (3, 0)]),
)
def test_npy_is_read_as_numpy_reads_it(array: np.ndarray, version: tuple[int, int]) -> None:
    array = np.ascontiguousarray(array).reshape(array.shape)
    found = decoded(npy(array, version=version))
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)
    np.testing.assert_array_equal(np.load(io.BytesIO(encode_npy(array)), allow_pickle=False), array)
    assert encode_npy(array) == npy(np.atleast_1d(array), version=(1, 0))


HUGE = "{'descr': '<f2', 'fortran_order': False, 'shape': (4294967296, 4294967296, 4294967296), }"
BAD_NPY = {
    "object dtype": (npy(np.array([{}, 1], dtype=object), allow_pickle=True), "dtype '|O'"),
    "structured dtype": (npy(np.zeros(2, dtype=[("a", "<f4")])), "dtype"),
    "big-endian": (npy(np.zeros(2, dtype=">f4")), "dtype '>f4'"),
    "text dtype": (npy(np.array(["ab"])), "dtype '<U2'"),
    "Fortran order": (npy(np.asfortranarray(np.zeros((2, 3)))), "Fortran order"),
    "cut": (npy(np.zeros(9))[:-1], "needs 200 bytes, found 199"),
    "too long": (npy(np.zeros(9)) + b"x", "needs 200 bytes, found 201"),
    "huge shape": (npy_with_header(HUGE), "is over"),
    "negative shape": (npy_with_header("{'descr': '<f2', 'fortran_order': False, 'shape': (-1,), }"), "shape"),
    "boolean shape": (npy_with_header("{'descr': '<f2', 'fortran_order': False, 'shape': (True,), }"), "shape"),
    "code in the header": (npy_with_header("__import__('os').system('true')"), "not an npy header"),
    "nested header": (npy_with_header("(" * 2000), "not an npy header"),
    "long header": (npy_with_header("{" + " " * 9000 + "}"), "at most 4096"),
    "header beyond the member": (b"\x93NUMPY\x01\x00\xff\x0fabc", "inside the member"),
    "pickle": (pickle.dumps([1, 2]), "not an npy array"),
    "empty": (b"", "not an npy array"),
    "unknown version": (b"\x93NUMPY\x09\x00" + bytes(100), "not an npy array"),
}


@pytest.mark.parametrize("kind", BAD_NPY)
def test_no_bad_npy_is_read(kind: str) -> None:
    payload, phrase = BAD_NPY[kind]
    with pytest.raises(BadSample) as found:
        decoded(payload)
    assert found.value.reason == "bad_npy"
    assert phrase in str(found.value)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_an_array_or_a_finding(junk: bytes) -> None:
    payload = b"\x93NUMPY\x01\x00" + junk
    try:
        layout = parse_npy_layout(payload, size=len(payload))
    except BadSample:
        return
    assert layout.header + layout.payload_bytes == len(payload)


@given(st.integers(0, 10**17))
def test_labels_read_back(label: int) -> None:
    assert parse_label(b"%d" % label) == label
    assert parse_label(b" %d\n" % label, num_classes=label + 1) == label
    with pytest.raises(BadSample, match=f"expected a label from 0 and below {max(label, 1)}, found {label + 1}"):
        parse_label(b"%d" % (label + 1), num_classes=max(label, 1))


@pytest.mark.parametrize(
    "payload", [b"", b"cat", b"1.5", b"0x1", b"1 2", b"1_000", "\u0663".encode(), b"9" * 19, b"1\0"]
)
def test_labels_are_decimal_numbers_and_nothing_else(payload: bytes) -> None:
    with pytest.raises(BadSample, match="label_not_a_number"):
        parse_label(payload)


def test_captions_keep_their_text_without_the_white_space_around_it() -> None:
    assert parse_caption(" \u00e9t\u00e9 \U0001f9a9\n".encode()) == "\u00e9t\u00e9 \U0001f9a9"


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"\xff", "caption_not_utf8"),
        (b"\xed\xa0\x80", "caption_not_utf8"),
        (b"", "caption_empty"),
        (b"\n\t ", "caption_empty"),
        (b"a\0", "caption_has_nul"),
        (b"a" * 70_000, "caption_too_long"),
    ],
)
def test_bad_captions_have_a_reason(payload: bytes, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        parse_caption(payload)


BOM = b"\xef\xbb\xbf"


def test_a_byte_order_mark_is_no_part_of_what_it_stands_before() -> None:
    assert parse_caption(BOM + b"a cat\n") == "a cat"
    assert parse_label(BOM + b"3\r\n") == 3
    assert parse_metadata(BOM + b'{"a": 1}') == {"a": 1}
    with pytest.raises(BadSample, match="caption_empty"):
        parse_caption(BOM)
    assert parse_caption(BOM, required=False) == ""


def test_numbers_that_json_lacks_are_null() -> None:
    found = parse_metadata(b'{"a": NaN, "b": [-Infinity, 1e999, 1.5], "c": 7}')
    assert found == {"a": None, "b": [None, None, 1.5], "c": 7}
    members = image_members("k", np.zeros((4, 4, 1), dtype=np.uint8), label=-1, caption="", metadata={"a": "\ud800"})
    assert parse_metadata(members["json"]) == {"a": "\ud800"}


@pytest.mark.parametrize("payload", [b"", b"[]", b"null", b"{", b"\xff{}", b"[" * 100_000, b'{"a":' * 100_000])
def test_metadata_is_a_json_object(payload: bytes) -> None:
    with pytest.raises(BadSample, match="bad_json"):
        parse_metadata(payload)
    assert parse_metadata(b'{"a": [1]}') == {"a": [1]}


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "..", "a b", "\u00e9", "a" * 81, "a\n"])
def test_keys_hold_nothing_that_could_be_a_suffix_or_a_path(key: str) -> None:
    with pytest.raises(BadSample, match="bad_key"):
        check_key(key)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_stored_images_are_lossless(channels: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    np.testing.assert_array_equal(decode_image(encode_png(image)), image)


def test_members_without_label_and_caption_are_left_out() -> None:
    image = np.zeros((4, 4, 1), dtype=np.uint8)
    assert set(image_members("k", image, label=-1, caption="", metadata={})) == {"png", "json"}
    assert image_members("k", image, label=0, caption="a", metadata={"b": 1, "a": "\u00e9"})["json"] == (
        '{"a": "\u00e9", "b": 1}'.encode()
    )


def test_metadata_that_json_cannot_hold_is_named() -> None:
    with pytest.raises(BadSample, match=r"k\.json|json: bad_json"):
        image_members("k", np.zeros((4, 4, 1), dtype=np.uint8), label=0, caption="", metadata={"a": float("nan")})


def test_latents_are_refused_when_their_type_cannot_hold_them() -> None:
    moments = np.zeros((2, 1, 2, 2), dtype=np.float32)
    moments[0, 0, 0, 0] = 65504
    assert decoded(latent_members("k", moments, carried={})["latent.npy"])[0, 0, 0, 0] == 65504
    moments[0, 0, 0, 0] = 70000
    with pytest.raises(BadSample, match=r"latent_overflow: a value of 70000 does not fit float16"):
        latent_members("k", moments, carried={})
    assert decoded(latent_members("k", moments, dtype="float32", carried={})["latent.npy"]).max() == 70000
    moments[0, 0, 0, 0] = np.nan
    with pytest.raises(BadSample, match="latent_not_finite: 1 values are NaN"):
        latent_members("k", np.zeros_like(moments), flipped=moments, carried={})
