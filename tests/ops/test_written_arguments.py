"""The tensors that a call of an operator writes."""

import pytest
import torch

from snnfx.ops.written_arguments import written_tensors

aten = torch.ops.aten


def _changed(func, args, kwargs):
    """The tensors whose values a call changes."""
    tensors = [t for a in (*args, *kwargs.values()) for t in (a if isinstance(a, list) else [a])]
    tensors = [t for t in tensors if isinstance(t, torch.Tensor)]
    before = [t.clone() for t in tensors]
    func(*args, **kwargs)
    return [t for t, value in zip(tensors, before, strict=True) if not torch.equal(t, value)]


def _x():
    return torch.full((2, 3), 0.5)


@pytest.mark.parametrize(
    ("func", "args", "kwargs"),
    [
        (aten.add.Tensor, lambda: (_x(), _x()), dict),
        (aten.add_.Tensor, lambda: (_x(), _x()), dict),
        (aten.add.out, lambda: (_x(), _x()), lambda: {"out": _x()}),
        (aten.sort.values, lambda: (_x() + 1,), lambda: {"values": _x(), "indices": torch.full((2, 3), 7)}),
        (aten.copy_.default, lambda: (_x(), torch.ones(2, 3)), dict),
        (aten.index_put_.default, lambda: (_x(), [torch.tensor([0])], torch.ones(3)), dict),
        (aten._foreach_add_.Scalar, lambda: ([_x(), _x()], 1.0), dict),
        (
            aten._native_batch_norm_legit.default,
            lambda: (torch.arange(6.0).view(2, 3), None, None, torch.zeros(3), torch.ones(3), True, 0.1, 1e-5),
            dict,
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, torch._ops.OpOverload) else "",
)
def test_written_tensors_are_those_that_the_call_changes(func, args, kwargs):
    args, kwargs = args(), kwargs()
    written = written_tensors(func, args, kwargs)
    changed = _changed(func, args, kwargs)
    assert [id(t) for t in written] == [id(t) for t in changed]


def test_an_operator_without_schema_writes_nothing():
    assert written_tensors(torch.ops.higher_order.cond, (_x(),), {}) == []
