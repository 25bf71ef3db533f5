"""What only a GPU can show: streams, graphs, no waiting, offsets beyond 2^31, memory, the same bits again."""

import pytest
import torch
from ops.bags import made

import lspm_kernels as lk
import oracle
from lspm_kernels.reference import attention as attention_reference
from lspm_kernels.reference import rotary as rotary_reference

pytestmark = [pytest.mark.every_backend, pytest.mark.gpu]
BF16 = torch.bfloat16


def attention(causal=True, **options):
    q, k, v = (torch.randn(2, 4, 200, 64).to(BF16) for _ in range(3))
    return lambda q, k, v: lk.attention(q, k, v, causal=causal, **options), [q, k, v]


def norm():
    x, residual = torch.randn(2, 300, 768).to(BF16).unbind()
    return lk.add_layer_norm, [x, residual, *torch.randn(2, 768).to(BF16).unbind()]


def convolution():
    x, weight = torch.randn(2, 64, 14, 14).to(BF16), torch.randn(32, 64, 3, 3).to(BF16) / 24
    return lambda x, w: lk.conv2d(x, w, padding=1), [x.contiguous(memory_format=torch.channels_last), weight]


def batch_norm():
    x = torch.randn(4, 32, 14, 14).to(BF16).contiguous(memory_format=torch.channels_last)
    return lambda x, w, b: lk.batch_norm_act(x, w, b, training=True), [x, *torch.randn(2, 32).unbind()]


def pools():
    x = torch.randn(2, 32, 16, 16).contiguous(memory_format=torch.channels_last)
    return lambda x: (lk.max_pool2d(x, 3, 2, 1), lk.global_avg_pool(x)), [x]


def loss():
    target = torch.randint(1000, (64,))
    return lambda x: lk.cross_entropy(x, target, label_smoothing=0.1), [torch.randn(64, 1000).to(BF16)]


def linear_loss():
    target, (h, w) = torch.randint(300, (64,)), (torch.randn(n, 32).to(BF16) for n in (64, 300))
    return lambda h, w: lk.linear_cross_entropy(h, w, target, z_loss=0.1), [h, w]


def linear_loss_in_one_pass():
    target = torch.randint(300, (64,))
    return lambda h, w: lk.linear_cross_entropy(h, w, target), [torch.randn(64, 32), torch.randn(300, 32)]


def bags():
    indices, offsets, options = made(90, [3, 0, 200, 17], "mean with padding", BF16)
    return lambda w: lk.embedding_bag(w, indices, offsets, **options), [torch.randn(90, 64).to(BF16)]


def weighted_bags():
    indices, weights = torch.randint(90, (30, 7)), torch.randn(30, 7).to(BF16)
    given = [torch.randn(90, 64).to(BF16), weights]
    return lambda w, s: lk.embedding_bag(w, indices, per_sample_weights=s), given


def updated_bags():
    indices, offsets, options = made(90, [3, 0, 200, 17], "mean with padding", BF16)

    def step(w, dout):
        changed, state_sum = w.detach().clone(), torch.zeros(90)
        lk.embedding_bag_adagrad_(changed, state_sum, dout.detach(), indices, offsets, lr=0.1, **options)
        return changed + 0 * w, state_sum + 0 * dout.sum()  # the tests ask for gradients

    return step, [torch.randn(90, 64).to(BF16), torch.randn(4, 64).to(BF16)]


def dropped():
    x, residual = torch.randn(2, 300, 770).to(BF16).unbind()
    return lambda x, r: lk.dropout(x, 0.1, residual=r, seed=3), [x, residual]


def embeddings():
    tokens, sizes = torch.randint(90, (4, 50)), ((90, 64), (50, 64), (2, 64), (64,), (64,))
    options = {"token_types": tokens % 2, "padding_idx": 0, "dropout_p": 0.1, "seed": 3}

    def embed(w, p, t, norm_weight, norm_bias):
        tables = {"position_weight": p, "token_type_weight": t}
        return lk.embedding(tokens, w, **tables, norm_weight=norm_weight, norm_bias=norm_bias, **options)

    return embed, [torch.randn(size).to(BF16) for size in sizes]


def activations():
    x, bias = torch.randn(300, 768).to(BF16), torch.randn(768)
    return lambda x, b: (lk.bias_act(x, b), lk.swiglu(x)), [x, bias]


def few_rows():
    x, weight = torch.randn(2, 768).to(BF16), torch.randn(300, 768).to(BF16)

    def products(x, w):
        small, scales = lk.quantize_int8(w.detach(), 32)
        y = lk.linear(x.detach(), w.detach()), lk.linear(x.detach(), small, scales=scales)
        return y[0] + 0 * x.sum(), y[1] + 0 * w.sum()  # the tests ask for gradients

    return products, [x, weight]


def optimizer():
    def step(param, grad):
        changed, moments = param.detach().clone(), [torch.zeros_like(param) for _ in range(2)]
        lk.adamw_(changed, grad.detach(), *moments, step=3)
        norm = lk.adamw_norm(grad.detach())
        return changed + 0 * param, norm + 0 * grad.sum()

    return step, list(torch.randn(2, 300, 70).unbind())


def rotation():
    tables = torch.randn(2, 40, 16).unbind()
    return lambda x: lk.rotary(x, *tables), [torch.randn(2, 3, 40, 64).to(BF16)]


def draws():
    temperature, previous = torch.tensor([0.0, 0.5, 2.0] * 10), torch.randint(5000, (30, 9))
    filters = {"top_k": 300, "top_p": 0.9, "min_p": 1e-3, "repetition_penalty": 1.3, "previous": previous}

    def step(x, y):
        token, logprob = lk.sample(
            x.detach(), temperature=temperature, seed=1, return_logprob=True, **filters
        )
        other = lk.sample(y.detach(), method="gumbel", seed=2)
        return token + logprob + 0 * x.sum(), other + 0 * y.sum()  # the tests ask for gradients

    return step, [torch.randn(30, 5000) * 3, torch.randn(30, 900).to(BF16)]


OPS = {
    f.__name__: f
    for f in (
        *(attention, norm, convolution, batch_norm, pools, loss, activations, rotation),
        *(
            dropped,
            embeddings,
            few_rows,
            optimizer,
            linear_loss,
            linear_loss_in_one_pass,
            bags,
            weighted_bags,
            updated_bags,
            draws,
        ),
    )
}
of_each_op = pytest.mark.parametrize("op", OPS)


def results(function, tensors):
    return list(oracle.outputs_and_gradients(function, tensors).values())


@of_each_op
def test_the_same_bits_again(op):
    function, tensors = OPS[op]()
    first = results(function, tensors)
    for _ in range(5):
        for again, then in zip(results(function, tensors), first, strict=True):
            assert torch.equal(again, then)


@of_each_op
def test_nothing_waits_for_the_gpu(op):
    function, tensors = OPS[op]()
    results(function, tensors)
    leaves = [t.detach().requires_grad_() for t in tensors]
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@of_each_op
def test_work_is_queued_on_the_current_stream(op):
    """A wait stands before it on that stream: queued elsewhere, it would read what is not yet written."""
    function, tensors = OPS[op]()
    expected = results(function, tensors)
    places = [torch.full_like(t, float("nan")) for t in tensors]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for place, t in zip(places, tensors, strict=True):
            place.copy_(t)
        found = results(function, places)
    torch.cuda.synchronize()
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@of_each_op
def test_captured_in_a_graph(op):
    function, tensors = OPS[op]()
    leaves = [t.clone().requires_grad_() for t in tensors]

    def step():
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return *outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(torch.randn_like(leaf) / 8)
    graph.replay()
    for ours, theirs in zip(captured, step(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_decoding_step_captured_in_a_graph_follows_lengths_on_the_gpu():
    cache = [torch.randn(2, 4, 512, 64).to(BF16) for _ in range(2)]
    plain = [c.clone() for c in cache]
    q, k, v = (torch.randn(2, n, 1, 64).to(BF16) for n in (8, 4, 4))
    lengths = torch.tensor([100, 300], dtype=torch.int32)

    def step(caches, lengths):
        return lk.attention_with_kv_cache(q, *caches, k, v, cache_seqlens=lengths)

    step(cache, lengths)
    step(plain, lengths)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(cache, lengths)
    lengths.copy_(torch.tensor([511, 7]))
    graph.replay()
    assert torch.equal(out, step(plain, torch.tensor([511, 7], dtype=torch.int32)))


def test_layer_norm_of_more_than_2_to_the_31_elements():
    x = torch.empty(2**31 // 1024 + 5, 1024, dtype=BF16).uniform_(-1, 1)
    weight, bias = torch.randn(2, 1024).to(BF16)
    y = lk.layer_norm(x, weight, bias)
    oracle.check(
        lambda x: lk.layer_norm(x, weight, bias), lambda x: x * 0 + y[-9:], [x[-9:]], gradients=False
    )


def test_rotary_of_more_than_2_to_the_31_elements():
    x = torch.empty(2, 2**20 // 8 + 3, 64, 128, dtype=BF16).uniform_(-1, 1).transpose(1, 2)
    tables = torch.randn(2, x.shape[2], 64).unbind()
    y = lk.rotary(x, *tables)
    end = slice(-9, None)
    expected = rotary_reference.rotary(x[-1:, -1:, end], *(t[end] for t in tables))
    torch.testing.assert_close(y[-1:, -1:, end], expected)


def test_attention_to_keys_beyond_2_to_the_31_elements():
    k = torch.empty(1, 2, 2**31 // 256 + 100, 128, dtype=BF16).uniform_(-1, 1)
    v, q = k.flip(1), torch.randn(1, 2, 3, 128).to(BF16)
    near = lk.attention(q, k, v, window=(40, 0))
    last = [t[:, :, -43:] for t in (k, v)]
    truth, plain = (
        attention_reference.attention(*(t.to(dtype) for t in (q, *last)), window=(40, 0))
        for dtype in (torch.float64, BF16)
    )
    oracle.compare("out", near, truth, plain)


def test_an_id_that_is_none_makes_a_rating_nan():
    users, items = torch.randn(6, 8), torch.randn(9, 8)
    ratings = lk.mf(users, items, torch.tensor([0, 6, 5, -1, 3]), torch.tensor([0, 1, 9, 2, 8]))
    assert ratings.isnan().tolist() == [False, True, True, True, False]


def test_an_index_that_is_none_makes_its_bag_nan():
    weight, indices = torch.randn(6, 8), torch.tensor([[0, 6], [5, 1], [-1, 2]])
    assert lk.embedding_bag(weight, indices).isnan().all(1).tolist() == [True, False, True]


def test_memory_of_attention_is_linear_in_the_length():
    T = 16384
    q, k, v = (torch.randn(1, 2, T, 64, dtype=BF16, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, 1, 1, T, dtype=BF16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = lk.attention(q, k, v, bias=bias, dropout_p=0.1, seed=1, softcap=20.0, window=(None, 5))
    torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert torch.cuda.max_memory_allocated() - before < 64 * 2**20  # one head's scores alone would be 512 MiB
