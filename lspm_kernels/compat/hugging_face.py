"""Attention for the models of transformers: register(), then model.set_attn_implementation("lspm")."""

from functools import partial

import torch
from torch import Tensor, nn

from lspm_kernels.compat.hugging_face_mask import WindowMask, window_mask, without_sdpa
from lspm_kernels.dispatch import admitting
from lspm_kernels.nn import calls
from lspm_kernels.ops.attention import BACKENDS, attention

IN_PLACE_OF_SDPA = "lspm_in_place_of_sdpa"
_MOST_FEATURES = 256  # of a head


def register() -> None:
    """Makes "lspm" an attention implementation of transformers, for every model that asks its interface.

    Masks come as for its "sdpa": none where all is visible or plainly causal. Sliding windows, padding and
    places in a cache cost a WindowMask, linear in the lengths. Anything else (packed sequences, chunks, masks
    of a model's own, a step over a static cache, whatever is compiled or exported) is written, bool
    (B, 1, T_q, T_k).

    Raises:
        ImportError: transformers is missing, or has no mask interface yet. Tested with 5.23.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
    except ImportError as error:
        raise ImportError(
            "hugging_face.register: transformers must be installed, with its AttentionMaskInterface"
            f" (pip install transformers), got {type(error).__name__}: {error}"
        ) from error
    # Marked here, as what marks it imports torch._dynamo, and triton.
    torch.compiler.assume_constant_result(without_sdpa)
    for name, function in (("lspm", attention_forward), (IN_PLACE_OF_SDPA, in_place_of_sdpa)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, partial(window_mask, masking_utils))


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | WindowMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """What a model calls in place of its own attention; lspm_kernels.attention says what is computed.

    Args:
        module: the attention module; its is_causal counts where the argument is None.
        query: (B, H, T_q, D).
        key, value: (B, H_kv, T_k, D), H a multiple of H_kv: heads are not repeated.
        attention_mask: None, bool (True: visible) or added to the scores, broadcast to (B, H, T_q, T_k); a
            WindowMask is not written unless there is a position_bias, which is of that size anyway.
        dropout: 0 outside training, which the model sees to.
        scaling: D ** -0.5 where None.
        is_causal: counts only where there is no mask and more than one query, in models that support "sdpa",
            which relies on it too. The first query then stands at the first key, since a key behind the last
            query is an empty place of a static cache.
        softcap: scores stay within (-softcap, softcap); None: no cap.
        s_aux: (H,) sinks, with a gradient.
        position_bias: added to the scores, with a gradient; broadcast to (B, H, T_q, T_k).
        kwargs: what other implementations need. A sliding_window is in the mask already; not all
            models tell it.

    Returns:
        (out, None): out (B, T_q, H, Dv), contiguous.

    Raises:
        ValueError: attention probabilities are asked for, which are never stored.
        NotImplementedError: a paged cache is given, or which keys are chosen for each query.
    """
    if kwargs.get("output_attentions"):
        raise ValueError(
            "attention_forward: output_attentions must be False, as probabilities are not stored"
            ' (model.set_attn_implementation("eager") stores them), got True'
        )
    if kwargs.get("cache") is not None:
        raise NotImplementedError(
            f"attention_forward: lspm needs a cache that is not paged, got {type(kwargs['cache']).__name__}"
        )
    for name in ("indices", "block_indices"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f'attention_forward: lspm needs {name} written into the mask, as for "sdpa",'
                f" got them for {type(module).__name__}"
            )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = attention_mask is None and query.shape[2] > 1 and bool(is_causal)
    causal = causal and not without_sdpa(type(getattr(module, "config", None)))
    if query.shape[0] == 1 != key.shape[0]:  # learned queries have no batch
        query = query.expand(key.shape[0], -1, -1, -1)
    bias, window = position_bias, None
    if isinstance(attention_mask, WindowMask):
        if bias is not None:
            attention_mask = attention_mask.written()
        else:
            keys, window, attention_mask = attention_mask.arguments(query, key)
            key, value = key[:, :, :keys], value[:, :, :keys]
    if attention_mask is not None and attention_mask.requires_grad:
        bias = attention_mask if bias is None else bias + attention_mask
        attention_mask = None
    out = attention(
        query,
        key,
        value,
        causal=causal,
        window=window,
        top_left=causal,
        bias=bias,
        mask=attention_mask,
        softcap=softcap or 0.0,
        dropout_p=dropout,
        scale=scaling,
        sinks=s_aux,
    )
    return out.transpose(1, 2).contiguous(), None


def in_place_of_sdpa(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs) -> tuple:
    """attention_forward for a model that was made for "sdpa": probabilities that are asked for are None, as
    there, and what no kernel takes is torch's."""
    kwargs.pop("output_attentions", None)
    features = max(query.shape[-1], value.shape[-1])
    if (
        features <= _MOST_FEATURES
        and calls.plain(query, key, value)
        and admitting("attention", BACKENDS, query)
    ):
        return attention_forward(module, query, key, value, *args, **kwargs)
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    args = [a.written() if isinstance(a, WindowMask) else a for a in args]
    kwargs = {k: v.written() if isinstance(v, WindowMask) else v for k, v in kwargs.items()}
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)
