"""What conv2d and batch_norm_act compute again in the backward instead of keeping it."""

import weakref

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import lspm_kernels as lk

LAST = torch.channels_last


class Block:
    """A residual block, with a projection of its input where channels change."""

    def __init__(self, inputs, outputs, activation="relu"):
        def norm():
            return torch.rand(outputs) + 0.5, torch.randn(outputs)

        self.weights = torch.randn(outputs, inputs, 3, 3) / 9, torch.randn(outputs, outputs, 1, 1) / 4
        self.projection = torch.randn(outputs, inputs, 1, 1) / 4 if inputs != outputs else None
        self.norms = norm(), norm(), norm()
        self.activation = activation

    def __call__(self, x):
        norm = {"training": True, "activation": self.activation}
        y = lk.conv2d_batch_norm(x, self.weights[0], *self.norms[0], padding=1, **norm)
        if self.projection is not None:
            x = lk.conv2d_batch_norm(x, self.projection, *self.norms[2], training=True)
        return lk.conv2d_batch_norm(y, self.weights[1], *self.norms[1], residual=x, **norm)

    def parameters(self):
        tensors = [*self.weights, *self.norms[0], *self.norms[1]]
        return tensors if self.projection is None else [*tensors, self.projection, *self.norms[2]]


def chain(activation="relu", dtype=torch.float32):
    """Blocks as in a stage of a ResNet, their parameters, and images."""
    blocks = [Block(*sizes, activation) for sizes in ((8, 16), (16, 16), (16, 16), (16, 24), (24, 24))]
    parameters = [p.requires_grad_() for block in blocks for p in block.parameters()]
    for block in blocks:
        block.weights = tuple(w.to(dtype) for w in block.weights)
        block.projection = None if block.projection is None else block.projection.to(dtype)
    x = torch.randn(4, 8, 9, 7).to(dtype).to(memory_format=LAST).requires_grad_()
    return blocks, parameters, x


def gradients(blocks, parameters, x, run=lambda block, x: block(x)):
    y = x
    for block in blocks:
        y = run(block, y)
    for t in (leaves := [x, *parameters]):
        t.grad = None
    (y.float() ** 2).sum().backward()
    return [t.grad for t in leaves]


def same(actual, expected):
    return all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def kept(f):
    """f under hooks, which are shown all that is saved: so the outputs themselves are."""
    with saved_tensors_hooks(lambda t: t, lambda t: t):
        return f()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["relu", "silu", "relu6", None])
def test_same_gradients_as_of_what_is_kept(activation, dtype):
    given = chain(activation, dtype)
    assert same(gradients(*given), kept(lambda: gradients(*given)))


def held(f):
    """Bytes that f's graph keeps alive, parameters aside; each memory once."""
    found = {}

    def walk(node):
        if node is None or node in walked:
            return
        walked.add(node)
        for t in getattr(node, "saved_tensors", ()):
            if t is not None and t.dim() == 4:
                found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        for before, _ in node.next_functions:
            walk(before)

    walked = set()
    walk(f().grad_fn)
    return sum(found.values())


def test_no_output_within_a_block_is_kept_nor_every_second_blocks():
    blocks, _, x = chain()

    def run():
        y = x
        for block in blocks[:3]:
            y = block(y)
        return y

    outputs = x.nbytes * 2  # one of 16 channels
    weights = sum(t.nbytes for block in blocks[:3] for t in block.parameters() if t.dim() == 4)
    # x, what 7 norms took, and the outputs of the first and the third block; of all, 4 norms' outputs more.
    assert held(run) - weights == x.nbytes + 9 * outputs
    assert kept(lambda: held(run)) - weights == x.nbytes + 13 * outputs


def test_an_output_dies_once_its_convolution_has_run():
    x, w = torch.randn(2, 8, 5, 5), torch.randn(8, 8, 1, 1, requires_grad=True)
    y = lk.conv2d_batch_norm(x, w, training=True, activation="relu")
    seen = weakref.ref(y)
    z = lk.conv2d(y, w)
    del y
    assert seen() is None
    z.sum().backward()
    assert w.grad.isfinite().all()


def test_a_convolution_of_a_convolution():
    x, w = torch.randn(2, 8, 5, 5), torch.randn(8, 8, 1, 1, requires_grad=True)

    def run():
        y = lk.conv2d_batch_norm(x, w, training=True)
        for activation in (None, "relu", "gelu", None):
            y = lk.conv2d(y, w, activation=activation)
        return torch.autograd.grad(y.sin().sum(), w)

    assert same(run(), kept(run))


def test_what_was_changed_in_place_is_kept():
    x, w = torch.randn(2, 8, 5, 5), torch.randn(8, 8, 1, 1, requires_grad=True)

    def run(change):
        y = change(lk.conv2d_batch_norm(x, w, training=True, activation="relu"))
        return torch.autograd.grad((lk.conv2d(y, w) ** 2).sum(), w)

    assert same(run(lambda y: y.mul_(2)), run(lambda y: y * 2))


def test_a_residual_that_is_changed_afterwards_is_an_error():
    (first, second, *_), _, x = chain()
    y = first(x)
    z = second(y)
    with torch.no_grad():
        y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_twice_through_one_graph():
    blocks, parameters, x = chain()
    y = x
    for block in blocks:
        y = block(y)
    first = torch.autograd.grad(y.sum(), parameters, retain_graph=True)
    assert same(torch.autograd.grad(y.sum(), parameters), first)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks(reentrant):
    given = chain()
    expected = gradients(*given)
    actual = gradients(*given, lambda block, x: checkpoint(block, x, use_reentrant=reentrant))
    assert same(actual, expected)


def test_every_second_block_checkpointed():
    blocks, parameters, x = chain()
    expected = gradients(blocks, parameters, x)

    def run(block, x):
        return checkpoint(block, x, use_reentrant=False) if blocks.index(block) % 2 else block(x)

    assert same(gradients(blocks, parameters, x, run), expected)


def test_frozen_parts():
    blocks, parameters, x = chain()
    expected = gradients(blocks, parameters, x)
    for p in parameters[::2]:
        p.requires_grad_(False)
    wanted = parameters[1::2]
    y = x
    for block in blocks:
        y = block(y)
    assert same(torch.autograd.grad((y**2).sum(), wanted), expected[2::2])


def test_under_compile():
    given = chain()
    expected = gradients(*given)
    compiled = [torch.compile(block, backend="aot_eager", fullgraph=True) for block in given[0]]
    assert same(gradients(compiled, *given[1:]), expected)
