"""InPlaceOperator: what torch makes of an op that changes a tensor."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lspm_kernels import compiled
from lspm_kernels.dispatch import Backend
from lspm_kernels.operator import InPlaceOperator

ROW = Backend("cpu", "cpu", (torch.float32,), lambda x, by: x.add_(by), None, compiled.nothing_missing)
_add = InPlaceOperator(
    "test_in_place(Tensor(a!) x, Tensor? by) -> ()", (ROW,), lambda row, x, by: row.forward(x, by)
)


def add(x, by):
    _add(ROW, x, by)
    return x


def test_it_changes_its_tensor_and_counts_a_version():
    x = torch.zeros(3)
    before = x._version
    add(x, torch.ones(3))
    assert x.tolist() == [1, 1, 1]
    assert x._version > before


def test_a_backward_that_saved_the_tensor_sees_the_change():
    x, w = torch.ones(3), torch.ones(3, requires_grad=True)
    y = (w * x).sum()
    add(x, torch.ones(3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_a_tensor_whose_gradient_is_recorded_is_refused():
    x = torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match="test_in_place_: what it changes must not require a gradient"):
        add(x, torch.ones(3))
    with torch.no_grad():
        assert add(x, torch.ones(3)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("mode", ["eager", "aot_eager", "inductor"])
def test_compile(mode):
    torch._dynamo.reset()
    function = torch.compile(lambda x, by: add(x * 2, by) + 1, fullgraph=True, backend=mode)
    assert function(torch.ones(3), torch.ones(3)).tolist() == [4, 4, 4]


def test_opcheck_and_fake_tensors():
    op = torch.ops.lspm.test_in_place.default
    torch.library.opcheck(op, (torch.zeros(3), torch.ones(3), "cpu"))
    with FakeTensorMode():
        assert add(torch.zeros(3), torch.ones(3)).shape == (3,)
