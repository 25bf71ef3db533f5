"""Rotary embeddings that a module's own file defines: what is proven to be one, and what is almost one."""

import copy
import io

import hugging_face_models as models
import pytest
import torch
from acceleration.test_accelerate import X as ROWS
from torch import nn

import lspm_kernels as lk
import oracle
from lspm_kernels.acceleration import own_calls, rotations
from lspm_kernels.acceleration.swap import is_swapped


def halves(x):
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def pairs(x):
    return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)


def of_halves(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + halves(q) * sin, k * cos + halves(k) * sin


def of_pairs(query, key, cos, sin):
    cos, sin = cos[:, None], sin[:, None]
    return query * cos + pairs(query) * sin, key * cos + pairs(key) * sin


def in_float32(q, k, cos, sin):
    return tuple(y.to(q.dtype) for y in of_halves(q.float(), k.float(), cos.float(), sin.float()))


def partial(q, k, cos, sin):
    R = cos.shape[-1]
    turned = of_halves(q[..., :R], k[..., :R], cos, sin)
    return tuple(torch.cat((y, x[..., R:]), -1) for y, x in zip(turned, (q, k), strict=True))


def once(q, k, cos, sin):
    return of_halves(q, k, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))


def backwards(q, k, cos, sin):
    return of_halves(q, k, cos, -sin)


def of_queries(q, k, cos, sin):
    return of_halves(q, k, cos, sin)[0], k


def as_list(q, k, cos, sin):
    return list(of_halves(q, k, cos, sin))


def detached(q, k, cos, sin):
    q, k = of_halves(q, k, cos, sin)
    return q, k.detach() + 0 * k


def of_rows_first(q, k, cos, sin):
    return of_halves(q, k, cos, sin, 2)


def a_little_more(q, k, cos, sin):
    return of_halves(q, k, cos * 1.00001, sin)


def first_sequence(q, k, cos, sin):
    return of_halves(q, k, cos[:1], sin[:1])


def in_place(q, k, cos, sin):
    cos.mul_(1)
    sin.neg_()
    return of_halves(q, k, cos, -sin)


def clipped(q, k, cos, sin):
    return of_halves(q.clamp(-1e3, 1e3), k, cos, sin)


def widened(q, k, cos, sin):
    return of_halves(q.double(), k.double(), cos, sin)


def unnamed(a, b, c, d):
    return of_halves(a, b, c, d)


def noisy(q, k, cos, sin):
    torch.rand(1)
    return of_halves(q, k, cos, sin)


RIGHT = {
    of_halves: rotations.Rotation(False, "halves"),
    of_pairs: rotations.Rotation(True, "pairs"),
    in_float32: rotations.Rotation(False, "halves"),
    partial: rotations.Rotation(False, "halves", partial=True, contiguous=True),
    once: rotations.Rotation(False, "once"),
}
WRONG = [
    backwards, of_queries, as_list, detached, of_rows_first, a_little_more, first_sequence, in_place, clipped,
    widened, noisy,
]  # fmt: skip
B, T, H, H_KV, D = 2, 96, 6, 2, 32


def given(form, dtype=torch.float32, R=D, B=B, tables=B):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(B, T, h, D, generator=generator).to(dtype).transpose(1, 2) for h in (H, H_KV))
    angles = 6.3 * torch.rand(tables, T, R // 2, generator=generator)
    return q, k, *(rotations._WIDEN[form](t).to(dtype) for t in (angles.cos(), angles.sin()))


@pytest.fixture
def turned(monkeypatch):
    """How many tensors the kernel turned."""
    found, rotary = [], rotations.rotary.rotary
    record = lambda x, *args, **kwargs: (found.append(x.shape), rotary(x, *args, **kwargs))[1]  # noqa: E731
    monkeypatch.setattr(rotations.rotary, "rotary", record)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("function", RIGHT)
def test_what_is_proven_is_computed_by_the_kernel(function, dtype, turned):
    found = rotations.known(function, {})
    assert found == RIGHT[function]
    widths = (D, D // 2) if found.partial else (D,)
    for R in widths:
        for tables in (1, B):
            q, k, cos, sin = given(found.form, dtype, R, tables=tables)

            def ours(q, k, cos=cos, sin=sin):
                return rotations.rotate(function, q, k, cos, sin)

            def plain(q, k, cos=cos, sin=sin):
                return function(q, k, cos.to(q), sin.to(q))

            oracle.check(ours, plain, [q, k])
            for y, expected in zip(ours(q, k), plain(q, k), strict=True):
                assert y.stride() == expected.stride()
            for y, expected in zip(
                ours(q.contiguous(), k.contiguous()), plain(q.contiguous(), k.contiguous()), strict=True
            ):
                assert y.stride() == expected.stride()
    assert len(turned) == 12 * len(widths)


@pytest.mark.parametrize("function", WRONG)
def test_what_is_almost_one_is_not(function):
    assert rotations.known(function, {}) is None


def other_halves(q, k, cos, sin):
    cos[..., 0, 0] += 1
    return q, k, cos, sin


def with_gradient(q, k, cos, sin):
    return q, k, cos.requires_grad_(), sin


def not_a_number(q, k, cos, sin):
    cos[..., 3, :] = torch.nan
    return q, k, cos, sin


LEFT = {
    "other halves": other_halves,
    "a gradient of cos": with_gradient,
    "NaN": not_a_number,
    "float64": lambda *given: [t.double() for t in given],
    "tables of another dtype": lambda q, k, cos, sin: (q, k, cos.double(), sin.double()),
    "other memory": lambda q, k, cos, sin: (
        q.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
        k,
        cos,
        sin,
    ),
    "few": lambda q, k, cos, sin: (q[:, :1, :1], k[:, :, :1], cos[:, :1], sin[:, :1]),
    "no keys": lambda q, k, cos, sin: (q, k[:, :0], cos, sin),
}


@pytest.mark.parametrize("change", LEFT)
def test_other_calls_are_computed_as_before(change, turned):
    tensors = LEFT[change](*given("halves"))
    found, expected = rotations.rotate(of_halves, *tensors), of_halves(*tensors)
    for y, other in zip(found, expected, strict=True):
        assert y.stride() == other.stride()
        torch.testing.assert_close(y, other, rtol=0, atol=0, equal_nan=True)
    assert not turned


def test_tables_that_change_are_compared_again(turned):
    q, k, cos, sin = given("halves")
    rotations.rotate(of_halves, q, k, cos, sin)
    cos[:, 0, 0] = 0.5
    for y, other in zip(rotations.rotate(of_halves, q, k, cos, sin), of_halves(q, k, cos, sin), strict=True):
        assert torch.equal(y, other)
    assert len(turned) == 2
    cos.fill_(0.25)
    for y, other in zip(rotations.rotate(of_halves, q, k, cos, sin), of_halves(q, k, cos, sin), strict=True):
        torch.testing.assert_close(y, other)
    assert len(turned) == 4
    with torch.inference_mode():
        rotations.rotate(of_halves, q, k, cos, sin)  # too few to pay there
    assert len(turned) == 4


def test_options_of_a_call_are_part_of_the_proof():
    assert rotations.known(of_halves, {"unsqueeze_dim": 1}) == RIGHT[of_halves]
    assert rotations.known(of_halves, {"unsqueeze_dim": 2}) is None
    assert rotations.known(of_halves, {"unsqueeze_dim": []}) is None
    assert rotations.known(unnamed, {}) is None


def llama(**options):
    return models.build("llama", **options).eval()


def ids(rows=96):
    return torch.randint(3, 97, (4, rows), generator=torch.Generator().manual_seed(1))


def test_attention_of_transformers_is_turned_by_the_kernel_and_by_its_own_again(turned, monkeypatch):
    model, other = llama(), llama()
    expected = model(ids()).logits
    report = lk.accelerate(model)
    attn = model.model.layers[0].self_attn
    assert report.replaced["model.layers.0.self_attn"] == "its own forward with rotary"
    assert type(attn).lspm_faster is own_calls.Remade
    torch.testing.assert_close(model(ids()).logits, expected)
    assert len(turned) == 2 * len(model.model.layers)
    copied = copy.deepcopy(model)
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    for each in (copied, torch.load(file, weights_only=False)):
        before = len(turned)
        assert torch.equal(each(ids()).logits, model(ids()).logits)
        assert len(turned) > before
    other(ids())
    assert not any(map(is_swapped, other.modules()))
    seen, count = [], len(turned)
    module = __import__(type(attn).__module__, fromlist=["apply_rotary_pos_emb"])
    own = module.apply_rotary_pos_emb
    monkeypatch.setattr(module, "apply_rotary_pos_emb", lambda *args: (seen.append(1), own(*args))[1])
    model(ids())
    assert len(seen) == len(model.model.layers)
    assert len(turned) == count
    lk.restore(model)
    assert torch.equal(model(ids()).logits, expected)


class Almost(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(64, 64)

    def forward(self, x, cos, sin):
        q = self.proj(x).view(1, 5, 4, 16).transpose(1, 2)
        q, k = backwards(q, q, cos, sin)
        return q + k


def test_a_report_says_what_is_almost_one():
    module = Almost()
    cos, sin = torch.randn(2, 1, 5, 16)
    expected = module(ROWS, cos, sin)
    report = lk.accelerate(module)
    assert report.left[""] == "backwards is no rotary embedding that is known"
    assert not is_swapped(module)
    torch.testing.assert_close(module(ROWS, cos, sin), expected)
