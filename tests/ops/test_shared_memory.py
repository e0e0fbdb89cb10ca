"""Views of one memory share elements exactly if the numbers of their elements do; unknown cases count as shared."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from snnfx.ops.shared_memory import are_disjoint

BASE = torch.arange(240)


def shares(a: Tensor, b: Tensor) -> bool:
    return bool(set(a.flatten().tolist()) & set(b.flatten().tolist()))


def test_pieces_of_a_split_are_disjoint() -> None:
    for dim in range(3):
        pieces = BASE.view(4, 6, 10).split(2, dim)
        for a, b in itertools.combinations(pieces, 2):
            assert are_disjoint(a, b)
        assert not are_disjoint(pieces[0], BASE)
        assert not are_disjoint(pieces[0], pieces[0])


def test_rows_are_disjoint_from_other_rows_but_not_from_columns() -> None:
    x = BASE.view(24, 10)
    assert are_disjoint(x[3], x[4]) and are_disjoint(x[:, 1], x[:, 2])
    assert not are_disjoint(x[3], x[:, 2])


def test_expanded_views_and_other_dtypes_count_as_shared() -> None:
    x = BASE.float()
    assert not are_disjoint(x[:1].expand(3), x[5:8])
    assert not are_disjoint(x[:4], x[4:8].view(torch.int32))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), *[st.integers(1, 4), st.integers(0, 12)] * 3), min_size=2, max_size=2))
def test_disjoint_views_share_no_element(made: list[tuple[int, ...]]) -> None:
    a, b = (BASE.as_strided(view[1::2], view[2::2], view[0]) for view in made)
    if are_disjoint(a, b):
        assert not shares(a, b)
