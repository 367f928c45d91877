"""From the values of label files to classes, and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pglcl.errors import UserError
from pglcl.labels import LabelMap, count_values, parse_labels, value_counts, whole_numbers

HERE = Path("a.nii.gz")


@pytest.mark.parametrize("values", [(0, 255), (0, 1, 2, 4), (0, 500, 600), tuple(range(118)), (0, 1, 70000)])
def test_decoding_returns_the_encoded_values(values: tuple[int, ...]) -> None:
    labels = LabelMap.of_values(values)
    data = np.array(values)[np.random.default_rng(0).integers(0, len(values), (5, 6, 7))]
    classes = labels.encode(data, HERE)
    assert classes.dtype == np.int8
    assert classes.max() < len(labels) == len(values)
    back = labels.decode(classes)
    np.testing.assert_array_equal(back, data)
    assert back.dtype == (np.uint8 if values[-1] < 256 else np.uint16 if values[-1] < 65536 else np.uint32)
    assert LabelMap.from_state(labels.state()) == labels


def test_background_is_a_class_whether_it_occurs_or_not() -> None:
    assert LabelMap.of_values([2, 5]).values == ((0,), (2,), (5,))
    assert LabelMap.of_values([-1, 3, 2]).values == ((0,), (-1,), (2,), (3,))


def test_labels_options_are_parsed() -> None:
    labels = parse_labels("0,85=RV,170")
    assert labels.values == ((0,), (85,), (170,))
    assert labels.names == ("background", "RV", "label 170")
    merged = parse_labels("0, 1+2=kidney, 7=ignore")
    np.testing.assert_array_equal(merged.encode(np.array([[[0, 1, 2, 7]]]), HERE), [[[0, 1, 1, -1]]])
    np.testing.assert_array_equal(merged.decode(np.array([0, 1])), [0, 1])
    rest = parse_labels("0+*,10-14=lung,86+87=muscle")
    np.testing.assert_array_equal(rest.encode(np.array([[[0, 3, 10, 14, 87, 117]]]), HERE), [[[0, 0, 1, 1, 2, 0]]])
    for each in (labels, merged, rest):
        assert LabelMap.from_state(each.state()) == each
        assert parse_labels(each.describe()) == each


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be like"), ("0", "from 2 to 256 classes"), ("0,a", "must be like"), ("0,1,1", "got 1 twice"),
        ("0,1+1", "got 1 twice"), ("0,5-3", "must be like"), ("*,1", "together with"), ("0+*,1+*", r"one \*"),
        ("0,1=a,2=a", "a name twice"), ("0,1,*=ignore", "cannot ignore"), ("0,1.5", "must be like"),
        ("0,1-999999999", "must be like"), ("0,99999999999", "must be like"), ("0,,1", "must be like"),
    ],
)  # fmt: skip
def test_wrong_labels_options_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_labels(text)


def test_a_value_outside_is_named_with_its_voxels() -> None:
    data = np.zeros((3, 4, 5), np.uint8)
    data[0, 0, :2], data[1, 1, 1] = 9, 200
    with pytest.raises(UserError, match=r"a\.nii\.gz: has values that are not labels: 9 in 2 voxels, 200 in 1 voxel"):
        LabelMap.of_values([1, 2]).encode(data, HERE)
    with pytest.raises(UserError, match="has 300 different values"):
        value_counts(np.arange(300).reshape(3, 10, 10), HERE)


def test_labels_must_be_whole_numbers_within_a_thousandth() -> None:
    near = np.array([0.0, 1.0000001, 1.9995, 254.9995])
    np.testing.assert_array_equal(whole_numbers(near, HERE), [0, 1, 2, 255])
    with pytest.raises(UserError, match=r"within 0\.001, got 1\.002 in 2 voxels"):
        whole_numbers(np.array([0, 1.002, 1.002]), HERE)
    with pytest.raises(UserError, match=r"got 0\.5 in 1 voxel"):
        whole_numbers(np.array([0, 0.5], np.float32), HERE)
    with pytest.raises(UserError, match="1 voxels that are NaN"):
        whole_numbers(np.array([0, np.nan]), HERE)
    with pytest.raises(UserError, match=r"below 2\^31"):
        whole_numbers(np.array([0, 1e30]), HERE)


@pytest.mark.parametrize(("value", "dtype"), [(5_000_000_000, "i8"), (-(2**63), "i8"), (2**63, "u8"), (2**31, "u4")])
def test_values_from_2_to_the_31_on_are_refused(value: int, dtype: str) -> None:
    with pytest.raises(UserError, match=rf"below 2\^31, got {abs(value):.12g}".replace("+", r"\+")):
        whole_numbers(np.array([0, value], dtype), HERE)


@given(st.lists(st.integers(-5, 300), min_size=1, max_size=60))
def test_voxels_are_counted_by_value(values: list[int]) -> None:
    data = np.array(values, np.int16).reshape(1, -1, 1)
    assert count_values(data) == {v: values.count(v) for v in sorted(set(values))}
    assert count_values(np.asfortranarray(data)) == count_values(data)


def test_many_classes_take_two_bytes_and_ignored_ones_do_not_count() -> None:
    labels = LabelMap.of_values(range(200), ignore=[255])
    data = np.array([[[0, 199, 255]]])
    assert labels.encode(data, HERE).dtype == np.int16
    np.testing.assert_array_equal(labels.encode(data, HERE), [[[0, 199, -1]]])
    assert labels.class_counts({0: 3, 199: 2, 255: 9})[199] == 2
