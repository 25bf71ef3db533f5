"""What a module computes, found out by its numbers: activations, norms and linear layers of any class.

A module is believed to be one of them only if its course is the same for all inputs (courses.py) and, for
inputs from the smallest to the largest and with random parameters in place of its own, it gives what the
definition gives; its name counts for nothing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lspm_kernels.acceleration import courses, probe
from lspm_kernels.acceleration.swap import OF_EVERY_MODULE, original

_F64 = torch.float64
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}
_EXACT = 1e-10  # of x, of what is computed in float64; erf's gelu is up to 1e-4 from tanh's
_ROUNDED = 2e-6  # of a row's largest, of norms, which many compute in float32 whatever their input is
_ROWS = 3


@dataclass(frozen=True)
class Meaning:
    """What a module computes; weight and bias are the names of its parameters.

    kind "activation": `activation` names it as bias_act does. "linear": `weight` (out, in), transposed:
    (in, out), and `bias`. "layer_norm" and "rms_norm", over the last dimension: weight + offset, `bias`, and
    eps, the attribute that holds it.
    """

    kind: str
    activation: str | None = None
    weight: str | None = None
    bias: str | None = None
    eps: str | None = None
    offset: float = 0.0
    transposed: bool = False


_known: dict[tuple, Meaning | None] = {}


def meaning(module: nn.Module) -> Meaning | None:
    """What a module without children computes, or None where it is none of these, or not proven to be."""
    key = _signature(module)
    if key is None:
        return None
    if key not in _known:
        with torch.device("cpu"):  # whatever torch's default is
            _known[key] = _of_torch(module) if original(module) in _TORCH else _probed(module)
    return _known[key]


def _signature(module: nn.Module) -> tuple | None:
    """All that a forward without children can depend on; None where that cannot be told."""
    if module._modules or module._buffers or isinstance(module, torch.jit.ScriptModule):
        return None
    cls = original(module)
    own = {k: v for k, v in vars(module).items() if k not in OF_EVERY_MODULE}
    if cls not in _TORCH:
        read = courses.read_by(cls)
        if read is None or not all(k not in read or courses.is_plain(v) for k, v in own.items()):
            return None
        own = {k: v for k, v in own.items() if k in read}
    if any("hook" in name and value for name, value in vars(module).items()):
        return None
    try:
        hash(tuple(own.values()))
    except TypeError:
        return None
    shapes = tuple((n, None if p is None else tuple(p.shape)) for n, p in module._parameters.items())
    return cls, shapes, tuple(sorted(own.items(), key=lambda item: item[0]))


def _of_torch(module):
    kind = original(module)
    names = {name for name, p in module._parameters.items() if p is not None}
    weight, bias = (name if name in names else None for name in ("weight", "bias"))
    if kind is nn.Linear:
        return Meaning("linear", weight=weight, bias=bias)
    if kind in (nn.LayerNorm, nn.RMSNorm):
        if len(module.normalized_shape) != 1:
            return None
        norm = "layer_norm" if kind is nn.LayerNorm else "rms_norm"
        return Meaning(norm, weight=weight, bias=bias, eps="eps")
    if kind is nn.GELU:
        return Meaning("activation", activation="gelu_tanh" if module.approximate == "tanh" else "gelu")
    return Meaning("activation", activation="silu" if kind is nn.SiLU else "relu")


_TORCH = {nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.GELU, nn.SiLU, nn.ReLU}


def _probed(module) -> Meaning | None:
    if original(module).__call__ is not nn.Module.__call__:
        return None
    sizes = [tuple(p.shape) for p in module._parameters.values() if p is not None]
    if not sizes:
        return _first(module, _activations(), _wide_numbers(), lambda x, y: _EXACT * x.abs())
    if len(sizes) <= 2 and all(len(s) == 1 and s == sizes[0] for s in sizes):
        return _first(module, _norms(module), _numbers_of_all_sizes(sizes[0][0]), _share_of_a_row)
    if len(sizes) <= 2 and sorted(map(len, sizes))[-1] == 2:
        return _linear(module)
    return None


def _first(module, candidates, x, allowed) -> Meaning | None:
    """The first candidate that gives what the module gives, and its gradients, for all shapes."""
    generator = torch.Generator().manual_seed(0)
    given = {
        name: torch.randn(p.shape, generator=generator, dtype=_F64)
        for name, p in module._parameters.items()
        if p is not None
    }
    shapes = x, x[None], x[:, None, None]
    outcomes = [probe.outcome(module, given, shaped, shaped is x) for shaped in shapes]
    if None in outcomes or not probe.keeps_half_types(module, given, x):
        return None
    for found, define in candidates:
        truths = [probe.run(define, shaped, given) for shaped in shapes]
        trios = zip(outcomes, truths, shapes, strict=True)
        if all(probe.close(outcome, truth, allowed(x, truth[0])) for outcome, truth, x in trios):
            return found
    return None


def _wide_numbers() -> Tensor:
    """Both signs, from the smallest to the largest that float32 cubes, and densely where curves bend."""
    far = torch.logspace(-6, 12, 110, dtype=_F64)
    x = torch.cat([-far, torch.linspace(-12, 12, 964, dtype=_F64), far])
    return x.view(-1, 2)


def _activations() -> Iterator[tuple[Meaning, Callable]]:
    for name, function in ACTIVATIONS.items():
        yield Meaning("activation", activation=name), lambda x, _, function=function: function(x)


def _numbers_of_all_sizes(size: int) -> Tensor:
    """Rows so small that eps decides and so large that it does not, with another mean than 0."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, size, generator=generator, dtype=_F64) + 0.3
    return x * torch.tensor([1e-6, 1e-4, 1e-3, 1e-2, 1, 1e3, 1e9], dtype=_F64)[:, None]


def _share_of_a_row(x: Tensor, y: Tensor) -> Tensor:
    return _ROUNDED * y.abs().amax(-1, keepdim=True)


def _norms(module) -> Iterator[tuple[Meaning, Callable]]:
    names = [name for name, p in module._parameters.items() if p is not None]
    pairs = [(names[0], None)] if len(names) == 1 else [tuple(names), tuple(reversed(names))]
    numbers = [k for k, v in vars(module).items() if type(v) is float and 0 < v < 0.1]
    for weight, bias in pairs:
        for eps in numbers:
            for offset in (0.0, 1.0):
                for kind in ("rms_norm", "layer_norm") if bias is None else ("layer_norm",):
                    found = Meaning(kind, weight=weight, bias=bias, eps=eps, offset=offset)
                    yield found, _norm(found, getattr(module, eps))


def _norm(found, eps):
    def define(x, given):
        if found.kind == "layer_norm":
            x = x - x.mean(-1, keepdim=True)
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (given[found.weight] + found.offset)
        return y if found.bias is None else y + given[found.bias]

    return define


def _linear(module) -> Meaning | None:
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    weight, *rest = sorted(parameters, key=lambda name: -parameters[name].dim())
    bias = rest[0] if rest else None
    generator = torch.Generator().manual_seed(0)
    random = partial(torch.randn, generator=generator, dtype=torch.float32)
    given = {name: random(p.shape) for name, p in parameters.items()}
    for transposed in (False, True):
        ins, outs = parameters[weight].shape if transposed else reversed(parameters[weight].shape)
        if bias is not None and parameters[bias].shape != (outs,):
            continue
        found = Meaning("linear", weight=weight, bias=bias, transposed=transposed)
        x = random(_ROWS, ins)
        for shaped in (x, x[None], x[:, None, None]):
            outcome = probe.outcome(module, given, shaped, shaped is x)
            if outcome is None or not probe.close(
                outcome, probe.run(_product(found), shaped, given), 1e-5 * ins**0.5
            ):
                break
        else:
            return found
    return None


def _product(found):
    def define(x, given):
        y = x @ (given[found.weight] if found.transposed else given[found.weight].t())
        return y if found.bias is None else y + given[found.bias]

    return define
