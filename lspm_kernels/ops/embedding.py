"""What stands before the first block of a transformer: rows of tables, a layer norm and dropout."""

import torch
from torch import Tensor

from lspm_kernels import checks, compiled, dispatch, embedding_checks, triton
from lspm_kernels import embedding_bag_checks as bag_checks
from lspm_kernels.dispatch import Backend, Limit
from lspm_kernels.operator import Operator
from lspm_kernels.ops import dropout, embedding_bag, layer_norm
from lspm_kernels.reference import embedding as reference

_OP = "embedding"
# The limits take weight, how many tokens there are, and whether there is a norm.
_LIMITS = (
    Limit(
        "fewer than 2 ** 31 tokens",
        lambda weight, tokens, norm: tokens < 2**31,
        lambda weight, tokens, norm: tokens,
    ),
    Limit(
        "D of at most 16384 beside a norm",
        lambda weight, tokens, norm: not norm or weight.shape[1] <= 16384,
        lambda weight, tokens, norm: weight.shape[1],
    ),
)
# No row has a backward: gradients are those of dropout, layer_norm and, for each table, embedding_bag.
BACKENDS = tuple(
    Backend(name, device, bag_checks.FLOATS, kernel("embedding_forward"), None, missing, limits)
    for name, device, kernel, missing, limits in (
        ("cpu", "cpu", compiled.cpu_kernel, compiled.nothing_missing, ()),
        ("triton", "cuda", triton.kernel, triton.missing, _LIMITS),
    )
)


def _forward(
    row, tokens, weight, positions, position_weight, token_types, token_type_weight, norm_weight, norm_bias,
    seed, padding_idx, first, eps, p, saves=True,
):  # fmt: skip
    out = weight.new_empty(*tokens.shape, weight.shape[1])
    wants = norm_weight is not None and (saves or not weight.is_cpu)
    statistics = weight.new_empty(2 if wants else 0, tokens.numel(), dtype=torch.float32)
    if row is not None and out.numel():
        given = weight, positions, position_weight, token_types, token_type_weight, norm_weight, norm_bias
        given = (None if t is None else t.contiguous() for t in given)
        row.forward(
            tokens.contiguous(), *given, out, statistics if wants else None, first, tokens.shape[-1], eps, p,
            dropout.scale_of(p), 0 if seed is None else int(seed),
        )  # fmt: skip
    return out, statistics


def _save(ctx, inputs, output):
    *tensors, seed, ctx.padding_idx, ctx.first, ctx.eps, ctx.p = inputs
    tokens, weight, positions, position_weight, token_types, token_type_weight, norm_weight, _ = tensors
    tables = weight, position_weight, token_type_weight
    ctx.rows = [None if t is None else t.shape[0] for t in tables]
    if norm_weight is None:  # only the norm's backward reads the tables again
        tensors = tokens, None, positions, None, token_types, None, None, None
    ctx.save_for_backward(*tensors, seed, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx, dout, _):
    *tensors, seed, statistics = ctx.saved_tensors
    tokens, _, positions, _, token_types, _, norm_weight, _ = tensors
    wants, of_norm = ctx.needs_input_grad, (None, None)
    scale = dropout.scale_of(ctx.p)
    if ctx.p:  # beside a norm, whose gradients then take the scale, dout keeps its bits
        given = dout, None, seed, ctx.p, scale if norm_weight is None else 1.0
        dout = dropout.drop(_row(dropout, ctx), *given)
    if norm_weight is not None:  # the sum is gathered again rather than kept
        total, _ = _embedding(ctx.row, *tensors[:6], None, None, None, -1, ctx.first, ctx.eps, 0.0)
        scaled = norm_weight.float() * scale if ctx.p else norm_weight
        bias = torch.empty_like(scaled) if wants[7] else None
        dout, *of_norm = layer_norm.norm_backward(
            _row(layer_norm, ctx), dout, None, total, statistics, scaled, bias, wants[6], True
        )
        of_norm = [(grad * scale).to(norm_weight.dtype) if ctx.p else grad for grad in of_norm]
    rows = dout.reshape(tokens.numel(), dout.shape[-1])
    bags = _row(embedding_bag, ctx)

    def of_table(table, ids, wanted, padding=-1):
        if not wanted:
            return None
        if ids is None:
            T = tokens.shape[-1]
            ids = torch.arange(ctx.first, ctx.first + T, dtype=tokens.dtype, device=tokens.device)
            ids = ids.expand(tokens.shape)
        ids = ids.reshape(-1).contiguous()
        return embedding_bag.table_backward(bags, rows, ids, None, None, ctx.rows[table], padding, False)

    return (
        None, of_table(0, tokens, wants[1], ctx.padding_idx), None, of_table(1, positions, wants[3]), None,
        of_table(2, token_types, wants[5]), of_norm[0] if wants[6] else None,
        of_norm[1] if wants[7] else None, None, None, None, None, None,
    )  # fmt: skip


def _row(op, ctx):
    """The backend's row in another op's table."""
    return next(row for row in op.BACKENDS if row.name == ctx.row.name)


_embedding = Operator(
    "embedding(Tensor tokens, Tensor weight, Tensor? positions, Tensor? position_weight, Tensor? token_types,"
    " Tensor? token_type_weight, Tensor? norm_weight, Tensor? norm_bias, Tensor? seed, int padding_idx,"
    " SymInt first, float eps, float p) -> (Tensor out, Tensor statistics)",
    BACKENDS,
    _forward,
    _save,
    _gradient,
)


def embedding(
    tokens: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    *,
    position_weight: Tensor | None = None,
    positions: Tensor | int = 0,
    token_type_weight: Tensor | None = None,
    token_types: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Embeddings of tokens, with their positions and types, a layer norm and dropout where wanted:

        out = dropout(layer_norm(
            weight[tokens] + position_weight[positions] + token_type_weight[token_types]))

    What is not given is left out. Neither the sum nor a mask is kept: the backward gathers the one and draws
    the other again. Gradients of tables are dense, and each of their rows is added up in the order of the
    tokens: the same bits on every run and any number of threads.

    Args:
        tokens: (..., T), int32 or int64, from 0 to N - 1. An id outside a table is an error on a CPU; on a
            GPU, for which nothing waits, it makes its row NaN and adds to no gradient.
        weight: (N, D), float32, bfloat16 or float16; sums and statistics are in float32.
        padding_idx: a row of weight that gets no gradient; below 0 it counts from N.
        position_weight: (P, D), weight's dtype.
        positions: where the first of T tokens stands, or each one's place, broadcast to tokens' shape.
        token_type_weight: (types, D), weight's dtype.
        token_types: of token_type_weight, broadcast to tokens' shape; there where that is.
        norm_weight: (D,), weight's dtype or float32; without it there is no norm.
        norm_bias: (D,), norm_weight's dtype, or None.
        eps: added to the variance.
        dropout_p: the share of elements that is dropped, from 0 to 1.
        seed: of dropout, as dropout's: the same elements are dropped.
        backend: "cpu", "triton" or "reference"; None takes the first that admits the call.

    Returns:
        out: (..., T, D), weight's dtype.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        NotImplementedError: the backend asked for does not take this call.

    Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.4; Devlin et al., "BERT" (2019),
    section 3.
    """
    bag_checks.table(_OP, weight)
    places, first, token_types = embedding_checks.lookups(
        _OP, tokens, weight, position_weight, positions, token_type_weight, token_types
    )
    embedding_checks.norm(_OP, weight, norm_weight, norm_bias)
    checks.probability(_OP, "dropout_p", dropout_p)
    eps = checks.eps(_OP, eps)
    padding = bag_checks.padding(_OP, padding_idx, weight.shape[0])
    seed = checks.seed(_OP, seed) if dropout_p else None
    row = dispatch.pick(_OP, BACKENDS, backend, weight, tokens.numel(), norm_weight is not None)
    if row is not None:
        return _embedding(
            row, tokens, weight, places, position_weight, token_types, token_type_weight, norm_weight,
            norm_bias, seed, padding, first, eps, float(dropout_p),
        )[0]  # fmt: skip
    for name, ids, table in (
        ("tokens", tokens, weight), ("positions", places, position_weight),
        ("token_types", token_types, token_type_weight),
    ):  # fmt: skip
        if ids is not None:
            checks.rows_of(_OP, name, ids, table.shape[0])
    return reference.embedding(
        tokens, weight, positions=first if places is None else places, position_weight=position_weight,
        token_types=token_types, token_type_weight=token_type_weight, norm_weight=norm_weight,
        norm_bias=norm_bias, eps=eps, dropout_p=dropout_p, seed=seed, padding_idx=padding_idx,
    )  # fmt: skip
