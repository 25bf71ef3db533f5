"""The rule that picks a backend, on a table made up for the purpose."""

import threading
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from lspm_kernels import __main__, dispatch, layer_norm, use_backend
from lspm_kernels.dispatch import Backend, FallbackWarning, Limit

SMALL = Limit("at most 4 columns", lambda x: x.shape[-1] <= 4, lambda x: x.shape[-1])


def row(name, device="cpu", dtypes=(torch.float32,), missing=lambda: None, limits=()):
    return Backend(name, device, dtypes, None, None, missing, limits)


TABLE = (
    row("small", limits=(SMALL,)),
    row("absent", missing=lambda: "a part that was not built"),
    row("wide", dtypes=(torch.float32, torch.bfloat16)),
    row("gpu", device="cuda"),
)


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.setattr(dispatch, "_admitted", {})
    monkeypatch.setattr(dispatch, "_warned", set())


def name_of(*args, requested=None):
    picked = dispatch.pick("op", TABLE, requested, *args)
    return picked and picked.name


def test_the_first_row_that_admits_the_call():
    assert name_of(torch.ones(2, 4)) == "small"
    assert name_of(torch.ones(2, 5)) == "wide"
    assert name_of(torch.ones(2, 4).bfloat16()) == "wide"


def test_a_row_that_goes_first_where_it_admits_the_call():
    x = torch.ones(2, 4)
    assert dispatch.pick("op", TABLE, None, x, first="wide").name == "wide"
    assert dispatch.pick("op", TABLE, None, x, first="absent").name == "small"
    assert dispatch.pick("op", TABLE, "small", x, first="wide").name == "small"


def test_no_row_warns_once_for_each_reason_and_names_them_all():
    reasons = (
        "op: small needs dtype float32, got float64; op: absent needs dtype float32, got float64; "
        "op: wide needs dtype float32, bfloat16, got float64; op: gpu needs a tensor on cuda, got cpu: "
        "op runs on plain PyTorch"
    )
    with pytest.warns(FallbackWarning) as caught:
        assert name_of(torch.ones(2, 4).double()) is None
        assert name_of(torch.ones(9, 4).double()) is None
        assert name_of(torch.ones(2, 4).half()) is None
    assert [str(w.message) for w in caught] == [reasons, reasons.replace("float64", "float16")]


def test_tensors_that_are_not_strided_are_for_plain_pytorch():
    parts = torch.randn(4, 16), torch.randn(7, 16)
    x = torch.nested.nested_tensor(parts, layout=torch.jagged)
    with pytest.warns(FallbackWarning, match="^layer_norm: cpu needs strided memory, got layout jagged;"):
        y = layer_norm(x)
    torch.testing.assert_close(y.values(), layer_norm(torch.cat(parts)))
    message = "^layer_norm: cpu needs strided memory, got layout sparse_coo$"
    with pytest.raises(NotImplementedError, match=message):
        layer_norm(parts[0].to_sparse(), backend="cpu")


def test_the_printed_table_says_what_a_row_needs_and_what_else_runs(monkeypatch):
    monkeypatch.setattr(__main__, "_tables", lambda: {"op": TABLE})
    assert __main__.backends().splitlines()[2:] == [
        "| op | small | cpu | float32 | at most 4 columns | absent, then wide, then plain PyTorch |",
        "| op | absent | cpu | float32 | nothing | wide, then plain PyTorch |",
        "| op | wide | cpu | float32, bfloat16 | nothing | plain PyTorch |",
        "| op | gpu | cuda | float32 | nothing | plain PyTorch |",
    ]


def test_meta_tensors_have_nothing_to_warn_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert name_of(torch.ones(2, 4, device="meta")) is None


@pytest.mark.parametrize(
    "requested, message",
    [
        ("small", "op: small needs at most 4 columns, got 5"),
        ("absent", "op: absent needs a part that was not built"),
        ("gpu", "op: gpu needs a tensor on cuda, got cpu"),
    ],
)
def test_a_requested_row_runs_or_raises(requested, message):
    with pytest.raises(NotImplementedError) as error:
        name_of(torch.ones(2, 5), requested=requested)
    assert str(error.value) == message
    with use_backend(requested), pytest.raises(NotImplementedError):
        name_of(torch.ones(2, 5))


def test_requested_rows_and_the_reference():
    assert name_of(torch.ones(2, 4), requested="wide") == "wide"
    assert name_of(torch.ones(2, 4), requested="reference") is None
    with use_backend("wide"):
        assert name_of(torch.ones(2, 4)) == "wide"
        with use_backend("reference"):
            assert name_of(torch.ones(2, 4)) is None
            assert name_of(torch.ones(2, 4), requested="small") == "small"  # the argument is nearer
        assert name_of(torch.ones(2, 4)) == "wide"
    assert name_of(torch.ones(2, 4)) == "small"


def test_the_first_call_of_all_may_be_compiled():
    """What it finds out of the rows does not have the second one compiled anew."""
    torch._dynamo.reset()
    counter = CompileCounter()
    f = torch.compile(layer_norm, backend=counter, fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(f(torch.ones(2, 4)), torch.zeros(2, 4))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["cudnn", ""])
def test_an_unknown_name(name):
    with pytest.raises(ValueError) as error:
        layer_norm(torch.ones(2, 4), backend=name)
    assert (
        str(error.value) == f"layer_norm: backend must be one of cpu, cuda, triton, reference, got {name!r}"
    )


def test_use_backend_holds_in_its_own_thread_only():
    seen = []
    with use_backend("wide"):
        thread = threading.Thread(target=lambda: seen.append(name_of(torch.ones(2, 4))))
        thread.start()
        thread.join()
    assert seen == ["small"]


def test_backward_runs_on_the_backend_of_the_forward():
    x = torch.randn(3, 5, requires_grad=True)
    y = layer_norm(x)
    with use_backend("reference"):
        y.sum().backward()
    assert y.grad_fn.row.name == "cpu"
