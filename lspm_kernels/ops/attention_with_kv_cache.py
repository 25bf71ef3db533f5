"""Attention to a cache of keys and values that grows in place, as when a text is generated."""

import torch
from torch import Tensor

from lspm_kernels import attention_checks, checks, compiled, dispatch
from lspm_kernels.ops import attention as dense
from lspm_kernels.ops import rotary as rotation
from lspm_kernels.reference import attention_with_kv_cache as reference

BACKENDS = dense.BACKENDS
_OP = "attention_with_kv_cache"
_append_on_cpu = compiled.cpu_kernel("attention_with_kv_cache_append")


def attention_with_kv_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: int | Tensor | None = None,
    block_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Appends k and v to a cache, in place, and gives q's attention to what the cache then holds.

    The last query stands at the last key; lspm_kernels.attention has the formula and the options. With cos
    and sin, q and k are rotated first: query and key i of a sequence by the angle of position
    cache_seqlens + i, but every query by that of cache_seqlens where it sees all keys (neither causal nor
    window).

    Args:
        q: (B, H, T_q, D), float32, bfloat16 or float16. D from 1 to 256.
        k_cache: (B, H_kv, S, D), with room for S keys of each sequence; or, with a block_table, pages
            (N, H_kv, S, D) of S keys. Any strides with a contiguous last dimension, so that a cache
            (B, S, H_kv, D) is taken by its transpose(1, 2).
        v_cache: as k_cache, with Dv dims.
        k, v: (B, H_kv, T, D) and (B, H_kv, T, Dv), or None: what is appended behind cache_seqlens.
        cache_seqlens: keys in the cache before the call: an int, or int32 or int64 (B,). None, without k:
            the cache is full.
        block_table: (B, P), int32 or int64: key i of sequence b is row i % S of page block_table[b, i // S].
        cache_batch_idx: (B,), int32 or int64: which sequence of the cache is each of q's. None: 0, 1, 2, ...
        cache_leftpad: (B,), int32 or int64: where the keys of each sequence begin. None: at 0.
        cos, sin: (positions, R / 2): as rotary's.
        interleaved: as rotary's.
        causal, window, softcap, scale: as attention's.
        alibi_slopes: (H,) or (B, H).
        sinks: (H,).
        return_lse: return the logarithms of the denominators too.
        backend: as attention's.

    Returns:
        out: (B, H, T_q, Dv), q's dtype; out.transpose(1, 2) is contiguous. With return_lse (out, lse),
        lse (B, H, T_q) float32. There is no gradient.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value; the cache is too small; a
            gradient is wanted. Nothing has been appended then.
        NotImplementedError: the backend asked for does not take this call.

    Source: Dao, "FlashAttention-2" (2023), whose flash_attn_with_kvcache this is with attention's options;
    Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention" (2023).
    """
    _check(q, k_cache, v_cache, k, v)
    B, H, T_q, D = q.shape
    heads = B, H
    left, right, slopes, sinks = attention_checks.options(
        _OP, heads, q.device, causal=causal, window=window, alibi_slopes=alibi_slopes, sinks=sinks,
        softcap=softcap,
    )  # fmt: skip
    steps = left is not None or right is not None
    last_angle = _last_angle(q, k, cos, sin, steps)
    new = 0 if k is None else k.shape[2]
    table, counts, begins, longest = _places(
        q, k_cache, new, cache_seqlens, block_table, cache_batch_idx, cache_leftpad, last_angle
    )
    scale = attention_checks.scale(_OP, scale, D)
    first = dense.first_for(q, q.shape[2])
    row = dispatch.pick(_OP, BACKENDS, backend, q, k_cache, v_cache, heads, None, first=first)
    given = q, k_cache, v_cache, k, v, counts, table, cos, sin
    if k is not None and row is not None and row.device == "cpu" and checks.plain(*given):
        q = _append_at_once(*given, bool(interleaved), steps)
    elif k is not None:
        q = _append(*given, bool(interleaved), steps, cache_seqlens, backend)
    if begins is not None:
        counts = counts - begins
    if row is None:
        starts = [0] * B if begins is None else begins.tolist()
        return reference.attention_with_kv_cache(
            q, k_cache, v_cache, starts, counts.tolist(), table, window=(left, right), alibi_slopes=slopes,
            softcap=softcap, scale=scale, sinks=sinks, return_lse=return_lse,
        )  # fmt: skip
    sequences = None, begins, counts, table, T_q, longest
    out, lse = dense.run(
        row, q, k_cache, v_cache, None, None, slopes, sinks, heads, sequences, left, right, False, None,
        scale, float(softcap), 0.0,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _append_at_once(q, k_cache, v_cache, k, v, counts, table, cos, sin, interleaved, steps):
    """_append by one kernel, which saves a step of decoding most of its torch operations."""
    turned = None
    if cos is not None:
        cos, sin, turned = cos.contiguous(), sin.contiguous(), dense.empty_rows(q, q.shape[-1])
    _append_on_cpu(
        checks.rows(q), checks.rows(k), checks.rows(v), turned, k_cache, v_cache, counts, table, cos, sin,
        interleaved, steps,
    )  # fmt: skip
    for cache in (k_cache, v_cache):
        if not cache.is_inference():
            torch.autograd.graph.increment_version(cache)
    return q if turned is None else turned


def _append(
    q, k_cache, v_cache, k, v, counts, table, cos, sin, interleaved, steps, cache_seqlens, backend
):  # fmt: skip
    """Writes k and v behind cache_seqlens; counts includes them. Rotates k before and gives q rotated."""
    B, _, new, _ = k.shape
    if cos is not None:
        turned = q if steps else q.flatten(1, 2)[:, :, None]
        before = (counts - new).long() if isinstance(cache_seqlens, Tensor) else cache_seqlens
        turn = {"interleaved": interleaved, "offsets": before, "backend": backend}
        q = rotation.rotary(turned, cos, sin, **turn).reshape(q.shape)
        k = rotation.rotary(k, cos, sin, **turn)
    if new and table is None and not isinstance(cache_seqlens, Tensor):
        for cache, x in ((k_cache, k), (v_cache, v)):
            cache[:, :, cache_seqlens : cache_seqlens + new] = x
    elif new:
        at = counts[:, None] + torch.arange(-new, 0, device=k.device)  # (B, T)
        batch = torch.arange(B, device=k.device)[:, None]
        if table is not None:
            batch, at = table[batch, at // k_cache.shape[2]], at % k_cache.shape[2]
        for cache, x in ((k_cache, k), (v_cache, v)):
            cache[batch, :, at] = x.transpose(1, 2)
    return q


def _check(q, k_cache, v_cache, k, v):
    """Checks what has nothing to do with places in the cache."""
    if (k is None) != (v is None):
        raise ValueError(f"{_OP}: v must be there where k is, got {checks.shape(v)}")
    caches, new = {"k_cache": k_cache, "v_cache": v_cache}, {} if k is None else {"k": k, "v": v}
    attention_checks.head_sizes(_OP, {"q": q, **caches}, dense.MAX_DIM, paged=True)
    for name, x in caches.items():
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{_OP}: {name} must have a contiguous last dimension, got strides {x.stride()}")
        if new and 0 in x.stride() and any(n > 1 and x.stride(i) == 0 for i, n in enumerate(x.shape)):
            rule = "not be expanded where k is appended"
            raise ValueError(f"{_OP}: {name} must {rule}, got strides {x.stride()}")
    for name, x in new.items():
        if not isinstance(x, Tensor) or x.dim() != 4:
            raise ValueError(f"{_OP}: {name} must be a tensor (B, H_kv, T, D), got {checks.shape(x)}")
    for (name, x), cache in zip(new.items(), caches.values(), strict=False):
        sizes = (q.shape[0], cache.shape[1], k.shape[-2], cache.shape[-1])
        if tuple(x.shape) != sizes:
            raise ValueError(f"{_OP}: {name} must have shape {sizes}, got {tuple(x.shape)}")
        if x.device != q.device:
            raise ValueError(f"{_OP}: {name} must be on q's device {q.device}, got {x.device}")
    attention_checks.dtype_of(_OP, q, caches | new)
    attention_checks.without_gradient(_OP, {"q": q} | caches | new)


def _last_angle(q, k, cos, sin, steps):
    """Checks cos and sin; gives how many keys may be there before the new ones, None: any number."""
    if (cos is None) != (sin is None) or (cos is not None and k is None):
        raise ValueError(f"{_OP}: cos must come with sin and k, got {checks.shape(cos)}")
    if cos is None:
        return None
    longer = q if steps and q.shape[2] > k.shape[2] else k
    rotation.check(_OP, longer, cos, sin)
    return len(cos) - longer.shape[2]


def _places(q, k_cache, new, cache_seqlens, block_table, cache_batch_idx, cache_leftpad, last_angle):
    """Checks where keys lie: table, keys of each sequence after the call, where they begin, the longest."""
    B, (N, _, room, _) = q.shape[0], k_cache.shape
    table = rows = None
    if block_table is not None:
        if cache_batch_idx is not None or cache_leftpad is not None:
            raise ValueError(f"{_OP}: block_table must come without cache_batch_idx and cache_leftpad")
        table, rows = attention_checks.block_table(_OP, block_table, B, q.device)
        room *= table.shape[1]
    elif cache_batch_idx is not None:
        flat, chosen = checks.integers(_OP, "cache_batch_idx", cache_batch_idx, B, q.device)
        checks.within(_OP, "cache_batch_idx", chosen, 0, N - 1)
        table = flat[:, None]
    elif N != B:
        raise ValueError(f"{_OP}: k_cache must have q's batch size {B}, got {N}")
    counts, lengths = _counts(q, cache_seqlens, room, new)
    begins, pads = None, [0] * B
    if cache_leftpad is not None:
        begins, pads = checks.integers(_OP, "cache_leftpad", cache_leftpad, B, q.device)
    if lengths is None or pads is None:
        return table, _with_new(counts, new), begins, room
    for length, pad in zip(lengths, pads, strict=True):
        _check_length(length, room, new)
        if last_angle is not None and length > last_angle:
            raise ValueError(
                f"{_OP}: cache_seqlens must be at most {last_angle} by the rows of cos, got {length}"
            )
        if not 0 <= pad <= length + new:
            raise ValueError(f"{_OP}: cache_leftpad must be from 0 to the keys {length + new}, got {pad}")
    attention_checks.pages(_OP, rows, [length + new for length in lengths], k_cache)
    return table, _with_new(counts, new), begins, max(lengths, default=0) + new


def _with_new(counts, new):
    if not checks.plain(counts) or compiled.recorded.get() is None:
        return counts + new
    total = torch.empty_like(counts)
    compiled.call(lambda: torch.add(counts, new, out=total))
    return total


def _counts(q, cache_seqlens, room, new):
    """Keys of each sequence before the call, as a tensor and, where they can be read, as a list."""
    B = q.shape[0]
    if cache_seqlens is None and new:
        raise ValueError(f"{_OP}: cache_seqlens must be given where k is, got None")
    if isinstance(cache_seqlens, Tensor):
        return checks.integers(_OP, "cache_seqlens", cache_seqlens, B, q.device)
    given = room if cache_seqlens is None else cache_seqlens
    if (length := checks.whole(given)) is None:
        raise ValueError(f"{_OP}: cache_seqlens must be an int or a tensor, got {type(given).__name__}")
    _check_length(length, room, new)  # first, as what does not fit may be no int32
    return torch.full((B,), length, dtype=torch.int32, device=q.device), [length] * B


def _check_length(length, room, new):
    if not 0 <= length <= room - new:
        raise ValueError(
            f"{_OP}: cache_seqlens must be from 0 to the cache's room of {room} less {new} new keys, got"
            f" {length}"
        )
