"""Turns the rows of an op's table into an operator: fast in eager mode, known to everything else in torch.

Eager calls on ordinary tensors go straight to the kernel, through a torch.autograd.Function where a gradient
is wanted: by way of torch's dispatcher they would take 10 to 20 microseconds more. Everything that traces,
transforms or intercepts tensors (torch.compile, torch.export, torch.func, fake tensors) meets the operator
torch.ops.lspm.<name>, which runs the same row.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from lspm_kernels.dispatch import Backend

_library = torch.library.Library("lspm", "DEF")
_is_compiling = torch.compiler.is_compiling
_jit_trace = torch._C._get_tracing_state
_transforms_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_is_grad_enabled = torch.is_grad_enabled
_PLAIN = {type(None), bool, int, float, str}
_ORDINARY = frozenset({Tensor, Parameter})


class Operator:
    """torch.ops.lspm.<name>(*args, backend), called as operator(row, *args).

    Args:
        schema: "name(Tensor first, ...) -> ...", without the name of the backend, which is added as the last
            argument.
        backends: the op's table.
        compute: compute(row, *args, saves=True) allocates the outputs and has the row's kernel fill them;
            with row None it only allocates them, which is all that a fake tensor needs. Where saves is False
            no backward follows, and an output that only the backward reads may be None.
        save, backward: as setup_context and backward of torch.library.register_autograd, without the backend:
            save(ctx, inputs, output) and backward(ctx, *grads) -> a gradient for each of args. ctx.row is the
            row that the forward ran on; ctx.needs_input_grad begins with args. backward is traced too, so it
            calls only Operators and torch functions. The gradient of an output that was not used is None, as
            zeros would cost a pass; at least one is none of these. An Operator without them has no gradient:
            to ask is an error.
    """

    def __init__(
        self,
        schema: str,
        backends: tuple[Backend, ...],
        compute: Callable,
        save: Callable | None = None,
        backward: Callable | None = None,
    ):
        name = schema.split("(", maxsplit=1)[0]
        rows = {row.name: row for row in backends}

        def gradient(ctx, *grads):
            if all(g is None for g in grads):
                return (None,) * (len(ctx.needs_input_grad) - 1)
            if backward is None:
                raise NotImplementedError(f"{name}: a second derivative is not implemented")
            return backward(ctx, *grads)

        def setup_context(ctx, inputs, output):
            *args, backend = inputs
            ctx.row = rows[backend]
            ctx.set_materialize_grads(False)
            if save is not None:
                save(ctx, args, output)

        _library.define(schema.replace(") ->", ", str backend) ->", 1))
        op = getattr(torch.ops.lspm, name).default
        _library.impl(name, lambda *args: compute(rows[args[-1]], *args[:-1]), "CompositeExplicitAutograd")
        torch.library.register_fake(op, lambda *args: compute(None, *args[:-1]), lib=_library)
        torch.library.register_vmap(op, self._vmap, lib=_library)
        # Even where there is no gradient: else torch drops it with no more than a warning.
        torch.library.register_autograd(
            op, lambda ctx, *grads: (*gradient(ctx, *grads), None), setup_context=setup_context, lib=_library
        )

        class Eager(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *args_and_row):
                *args, row = args_and_row
                output = compute(row, *args)
                ctx.row = row
                ctx.set_materialize_grads(False)
                if save is not None:
                    save(ctx, args, output)
                return output

            @staticmethod
            def backward(ctx, *grads):
                if any(g is not None and _is_batched(g) for g in grads):
                    return *_each_sample(lambda *sample: gradient(ctx, *sample), grads), None
                return *gradient(ctx, *grads), None

        # torch.func differentiates no operator, only a Function that has setup_context; that takes 20
        # microseconds a call, so eager mode does without.
        class Transformed(torch.autograd.Function):
            generate_vmap_rule = True

            @staticmethod
            def forward(*args):
                return op(*args)

            @staticmethod
            def setup_context(ctx, inputs, output):
                setup_context(ctx, inputs, output)

            @staticmethod
            def backward(ctx, *grads):
                return *gradient(ctx, *grads), None

        self._op, self._compute = op, compute
        self._eager, self._transformed = Eager.apply, Transformed.apply

    def __call__(self, row: Backend, *args):
        if _is_compiling() or _jit_trace():  # a trace would be without what a kernel writes
            return self._op(*args, row.name)
        if _transforms_active():
            return self._transformed(*args, row.name)
        if _dispatch_modes():
            return self._op(*args, row.name)
        wants_grad = False
        for a in args:
            kind = type(a)
            if (kind is Tensor or kind is Parameter) and not a.is_neg():
                wants_grad = wants_grad or a.requires_grad
            elif kind not in _PLAIN and isinstance(a, Tensor):
                # Of another class it may have no data of its own; what is_neg() has the opposite numbers.
                return self._op(*args, row.name)
        # Within a dual level a tensor may have a tangent: a Function without jvp says that it would be lost.
        if (wants_grad and _is_grad_enabled()) or forward_ad._current_level >= 0:
            return self._eager(*args, row)
        return self._compute(row, *args, saves=False)

    def _vmap(self, info, in_dims, *args):
        """Runs the operator once for each sample; where there is none, on zeros, for the shapes."""
        size = info.batch_size
        pairs = list(zip(args, in_dims, strict=True))  # of a list of numbers the dim is a list of Nones
        if not size:
            pairs = [
                (a.new_zeros(*a.shape[:d], 1, *a.shape[d + 1 :]) if isinstance(d, int) else a, d)
                for a, d in pairs
            ]
        samples = [
            self._op(*(a.select(d, i) if isinstance(d, int) else a for a, d in pairs))
            for i in range(max(size, 1))
        ]
        if isinstance(samples[0], Tensor):
            return torch.stack(samples)[:size], 0
        outputs = tuple(torch.stack(o)[:size] for o in zip(*samples, strict=True))
        return outputs, (0,) * len(outputs)


class InPlaceOperator:
    """torch.ops.lspm.<name>(*args, backend), which changes some of its tensors and has no gradient.

    Args:
        schema: "name(Tensor(a!) first, ...) -> ()", without the name of the backend; an ! marks what changes.
        backends: the op's table.
        update: update(row, *args) has the row's kernel change the tensors.
    """

    def __init__(self, schema: str, backends: tuple[Backend, ...], update: Callable):
        self._name = schema.split("(", maxsplit=1)[0]
        rows = {row.name: row for row in backends}

        def run(*args):
            update(rows[args[-1]], *args[:-1])

        _library.define(schema.replace(") ->", ", str backend) ->", 1))
        op = getattr(torch.ops.lspm, self._name).default
        _library.impl(self._name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(op, lambda *args: None, lib=_library)
        aliases = [argument.alias_info for argument in op._schema.arguments]
        self._written = [i for i, alias in enumerate(aliases) if alias is not None and alias.is_write]
        self._op, self._update = op, update

    def __call__(self, row: Backend, *args) -> None:
        written = _tensors(args[i] for i in self._written)
        if _is_grad_enabled() and any(t.requires_grad for t in written):
            rule = "not require a gradient while gradients are recorded: call it under torch.no_grad()"
            raise ValueError(f"{self._name}_: what it changes must {rule}")
        given = _tensors(args)
        if _is_compiling() or _jit_trace() or _dispatch_modes() or not _ORDINARY.issuperset(map(type, given)):
            return self._op(*args, row.name)
        if any(map(Tensor.is_neg, given)):  # their memory has the opposite numbers
            return self._op(*args, row.name)
        self._update(row, *args)
        torch.autograd.graph.increment_version(written)
        return None


def _each_sample(gradient: Callable, grads: tuple) -> list[Tensor | None]:
    """The gradients for many of an output at once, as torch.autograd.grad(is_grads_batched=True) has them.

    Those are tensors of torch's older vmap, which have no memory that a kernel could read.
    """
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    batched = [g is not None and _is_batched(g) for g in grads]
    whole = [torch._remove_batch_dim(g, level, 1, 0) if b else g for g, b in zip(grads, batched, strict=True)]
    size = max(len(g) for g, b in zip(whole, batched, strict=True) if b)
    samples = [
        gradient(*(g[i] if b else g for g, b in zip(whole, batched, strict=True))) for i in range(size)
    ]
    joined = [None if found[0] is None else torch.stack(found) for found in zip(*samples, strict=True)]
    return [None if t is None else torch._add_batch_dim(t, 0, level) for t in joined]


def _tensors(args: Iterable) -> list[Tensor]:
    """Those among the arguments, and in lists among them."""
    found = []
    for a in args:
        if isinstance(a, Tensor):
            found.append(a)
        elif type(a) is list and a and isinstance(a[0], Tensor):
            found += a
    return found
