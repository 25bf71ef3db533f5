"""accelerate and restore: which modules change, that nothing else does, and that all of it can be undone."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import lspm_kernels as lk
from lspm_kernels.acceleration.swap import is_swapped


class ScaledNorm(nn.Module):
    """An RMS norm under a name that says nothing."""

    def __init__(self, features):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(features) + 0.5)
        self.tiny = 1e-5

    def forward(self, hidden):
        return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.tiny) * self.scale


class Block(nn.Module):
    def __init__(self, features=64):
        super().__init__()
        self.norm = ScaledNorm(features)
        self.final = nn.LayerNorm(features)
        self.act = nn.GELU()

    def forward(self, x):
        return self.final(self.act(self.norm(x)) + x)


def model():
    return nn.Sequential(Block(), Block())


X = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))


def test_a_model_keeps_its_objects_and_gets_its_classes_and_bits_back():
    m = model()
    before = {name: (module, type(module), dict(vars(module))) for name, module in m.named_modules()}
    keys, expected = list(m.state_dict()), m(X)
    report = lk.accelerate(m)
    assert {"0.norm", "0.act", "0.final", "1.norm", "1.act", "1.final"} <= report.replaced.keys()
    assert [id(module) for module in m.modules()] == [id(module) for module, _, _ in before.values()]
    assert list(m.state_dict()) == keys
    torch.testing.assert_close(m(X), expected)
    assert lk.restore(m) is m
    for name, module in m.named_modules():
        assert (module, type(module)) == before[name][:2]
        assert vars(module).keys() == before[name][2].keys()
    assert torch.equal(m(X), expected)


def test_only_this_model_changes():
    m, other = model(), model()
    lk.accelerate(m)
    assert not any(map(is_swapped, other.modules()))
    assert type(other[0].norm) is ScaledNorm


def test_names_signatures_and_pictures_are_those_of_the_class():
    m = model()
    plain = copy.deepcopy(m)
    lk.accelerate(m)
    assert repr(m) == repr(plain)
    norm = m[0].norm
    assert isinstance(norm, ScaledNorm)
    assert type(norm).__module__ == ScaledNorm.__module__
    assert inspect.signature(norm.forward) == inspect.signature(plain[0].norm.forward)
    torch.testing.assert_close(norm(hidden=X), plain[0].norm(X))


def test_who_calls_the_class_means_the_one_it_stands_for():
    m = model()
    lk.accelerate(m)
    for module, args, cls in ((m[0].norm, (8,), ScaledNorm), (m[0].final, (8,), nn.LayerNorm)):
        assert is_swapped(module)
        another = type(module)(*args)
        assert type(another) is cls and is_swapped(module)
        assert another(X[:, :8]).shape == (5, 8)
        assert inspect.signature(type(module)) == inspect.signature(cls)


def test_a_second_call_changes_nothing():
    m = model()
    lk.accelerate(m)
    classes = [type(module) for module in m.modules()]
    again = lk.accelerate(m)
    assert [type(module) for module in m.modules()] == classes
    assert set(again.replaced.values()) == {"replaced before"}
    lk.restore(m)
    assert type(m[0].norm) is ScaledNorm
    lk.restore(m)
    assert type(m[0].norm) is ScaledNorm


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), None])
def test_copies_are_as_fast_and_can_be_restored(way):
    m = model()
    lk.accelerate(m)
    if way is None:
        torch.save(m, file := io.BytesIO())
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    else:
        copied = way(m)
    assert [type(module) for module in copied.modules()] == [type(module) for module in m.modules()]
    assert torch.equal(copied(X), m(X))
    lk.restore(copied)
    assert type(copied[0].norm) is ScaledNorm
    assert is_swapped(m[0].norm)


def test_state_moves_between_a_model_and_an_accelerated_one():
    m, other = model(), model()
    lk.accelerate(m)
    m.load_state_dict(other.state_dict())
    torch.testing.assert_close(m(X), other(X))
    other.load_state_dict(m.state_dict())


@pytest.mark.parametrize("change", [nn.Module.double, nn.Module.half, lambda m: m.to("meta")])
def test_it_may_change_its_dtype_and_device_afterwards(change):
    m, plain = model(), model()
    plain.load_state_dict(m.state_dict())
    lk.accelerate(m)
    m, plain = change(m), change(plain)
    x = X.to(next(plain.parameters()))
    actual, expected = m(x), plain(x)
    assert (actual.dtype, actual.device, actual.shape) == (expected.dtype, expected.device, expected.shape)
    if x.dtype == torch.float64:
        assert torch.equal(actual, expected)


def test_hooks_fire_and_stay():
    m, seen = model(), []
    m[0].norm.register_forward_hook(lambda *_: seen.append("before"))
    lk.accelerate(m)
    m[0].final.register_forward_hook(lambda *_: seen.append("after"))
    m[0].final.register_full_backward_hook(lambda *_: seen.append("backward"))
    m(X).sum().backward()
    assert seen == ["before", "after", "backward"]
    lk.restore(m)
    m(X)
    assert seen[3:] == ["before", "after"]


def test_it_compiles_in_one_graph_and_is_a_function_of_its_parameters():
    m = model()
    lk.accelerate(m)
    torch.testing.assert_close(torch.compile(m, fullgraph=True, backend="aot_eager")(X), m(X))
    others = {name: torch.randn_like(p) for name, p in m.named_parameters()}
    plain = model()
    plain.load_state_dict(others)
    torch.testing.assert_close(torch.func.functional_call(m, others, (X,)), plain(X))
    exported = torch.export.export(m.eval(), (X,))
    torch.testing.assert_close(exported.module()(X), m(X))


def test_gradients_come_although_it_was_done_without():
    m = model()
    with torch.no_grad():
        lk.accelerate(m)
    m(X).sum().backward()
    assert all(p.grad is not None for p in m.parameters())


@pytest.mark.parametrize(
    ("allow", "deny", "expected"),
    [
        ("0", None, {"0.norm", "0.act", "0.final"}),
        (["*.norm"], None, {"0.norm", "1.norm"}),
        ([nn.LayerNorm, "1.act"], None, {"0.final", "1.final", "1.act"}),
        (None, ["1", nn.GELU], {"0.norm", "0.final"}),
        (Block, "*.act", {"0.norm", "0.final", "1.norm", "1.final"}),
        (nn.Sequential, "1", {"0.norm", "0.act", "0.final"}),  # the model itself, with all in it
        ("2", None, {"0.norm", "0.act", "0.final"}),
        (None, "2.*", {"1.norm", "1.act", "1.final"}),
    ],
)
def test_allow_and_deny(allow, deny, expected):
    m = model()
    m.append(m[0])  # "2" is another name of "0"
    report = lk.accelerate(m, allow=allow, deny=deny)
    leaves = {path for path in report.replaced if path[2:]}
    assert leaves == expected
    assert {path for path, module in m.named_modules() if is_swapped(module)} == set(report.replaced)


def test_a_report_counts_what_is_alike(capsys):
    m = model()
    m.append(nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)))
    report = lk.accelerate(m, deny="*.act", verbose=True)
    text = str(report)
    assert capsys.readouterr().err == text + "\n"
    assert len([line for line in text.splitlines() if line.startswith("  *.norm ")]) == 1
    assert report.left["2"] == "its parameters are parametrized"


class Overridden(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) + 1


def test_what_cannot_be_touched_is_left_and_said():
    m = nn.ModuleDict(
        {
            "overridden": Overridden(64),
            "parametrized": parametrizations.weight_norm(nn.Linear(64, 64)),
            "scripted": torch.jit.script(nn.LayerNorm(64)),
            "own": nn.LayerNorm(64),
        }
    )
    sparse = nn.Linear(64, 64)
    sparse.weight = nn.Parameter(sparse.weight.detach().to_sparse())
    m["sparse"] = sparse
    m["own"].forward = lambda x: x
    left = lk.accelerate(m).left
    assert left["parametrized"] == "its parameters are parametrized"
    assert left["scripted"] == "it is compiled TorchScript"
    assert left["sparse"] == "weight is sparse"
    assert left["own"] == "its forward was set on the object"
    assert not any(map(is_swapped, m.values()))


def test_what_is_lazy_is_left_until_it_has_its_shape():
    x = torch.randn(600, 128)
    m = nn.Sequential(nn.LazyLinear(256), nn.GELU(), nn.LazyBatchNorm1d())
    assert lk.accelerate(m).left["0"] == "its parameters have no shape yet"
    m(x)
    assert type(m[0]) is nn.Linear
    lk.accelerate(m)
    torch.testing.assert_close(m(x), lk.restore(m)(x))


def test_parameters_that_become_sparse_are_torchs():
    x = torch.randn(600, 128)
    m = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128))
    lk.accelerate(m)
    for linear in (m[0], m[2]):
        linear.weight = nn.Parameter(linear.weight.detach().to_sparse_csr())
    torch.testing.assert_close(m(x), lk.restore(m)(x))


def test_what_was_built_upon_a_replaced_class_is_not_lost():
    m = nn.Sequential(ScaledNorm(64))
    lk.accelerate(m)
    m[0].__class__ = type("Upon", (type(m[0]),), {})
    assert lk.accelerate(m).left == {"0": "Upon was made of a replaced class"}
    with pytest.raises(ValueError, match="'0' must have the class that accelerate gave it, got Upon"):
        lk.restore(m)


def test_forwards_that_others_kept_on_the_object_are_restored():
    m, x = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU()), torch.randn(512, 64)
    expected = m(x)
    lk.accelerate(m)
    for layer in m:  # as Hugging Face's accelerate hooks a module
        layer._old_forward, layer.forward = layer.forward, lambda x, layer=layer: layer._old_forward(x)
    m[1].forward = m[1]._old_forward  # as it takes a hook away
    torch.testing.assert_close(m(x), expected)
    lk.restore(m)
    assert torch.equal(m(x), expected)
    assert m[1].forward.__func__ is nn.LayerNorm.forward


def test_bad_input():
    with pytest.raises(TypeError, match=r"accelerate: model must be a torch\.nn\.Module, got function"):
        lk.accelerate(model)
    with pytest.raises(TypeError, match=r"restore: model must be a torch\.nn\.Module, got NoneType"):
        lk.restore(None)
    with pytest.raises(ValueError, match=r"dtype must be None, or with inference=True one of .*, got"):
        lk.accelerate(model(), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"got torch\.float64 with inference=True"):
        lk.accelerate(model(), inference=True, dtype=torch.float64)
    for name in ("allow", "deny"):
        message = f"{name} must have names or classes of its modules, got 'layers"
        with pytest.raises(ValueError, match=message):
            lk.accelerate(model(), **{name: ["layers.*"]})
        for bad, got in ((5, "5"), ([None], "None"), ([nn.GELU()], r"GELU\(")):
            message = f"accelerate: {name} must have names or classes of its modules, got {got}"
            with pytest.raises(TypeError, match=message):
                lk.accelerate(model(), **{name: bad})
