"""Bugs in what models of transformers see through compat.hugging_face; nothing is built anew."""

from functools import partial

from mutations import Mutation

in_mask = partial(
    Mutation,
    file="lspm_kernels/compat/hugging_face_mask.py",
    tests=("tests/compat/test_hugging_face_mask.py", "-x"),
)
in_models = partial(in_mask, tests=("tests/compat/test_hugging_face.py", "-x"))

MUTATIONS = [
    in_mask(
        name="hugging_face: a window one key too wide",
        old="return size - 1, 0",
        new="return size, 0",
    ),
    in_models(
        name="hugging_face: a window one key too wide, in models",
        old="return size - 1, 0",
        new="return size, 0",
    ),
    in_models(
        name="hugging_face: a window to both sides one key too narrow, in models",
        old="return size, size",
        new="return size - 1, size - 1",
    ),
    in_mask(
        name="hugging_face: the place of a cache's first key ignored",
        old="shift = q_offset - kv_offset",
        new="shift = q_offset",
    ),
    in_mask(
        name="hugging_face: empty places of a static cache are taken for keys",
        old="keys = shift + q_length if window[1] == 0 else kv_length",
        new="keys = kv_length",
    ),
    in_mask(
        name="hugging_face: padding as if a cache began at the first token",
        old="attention_mask[:, kv_offset : kv_offset + keys]",
        new="attention_mask[:, :keys]",
    ),
    in_models(
        name="hugging_face: padding lost, in models",
        old="padding = None if padding.all() else padding[:, None, None]",
        new="padding = None",
    ),
    in_mask(
        name="hugging_face: the count of a static cache read late",
        old="q_offset = int(q_offset)  #",
        new="q_offset = q_offset  #",
    ),
    in_mask(
        name="hugging_face: chunks are taken for a window",
        old="return one.__code__ is other.__code__ and _same(*map(tuple, cells))",
        new="return True",
    ),
    in_mask(
        name="hugging_face: any window is taken for the layer's",
        old="return one is other or (type(one) is type(other) is int and one == other)",
        new="return one is other or type(one) is type(other) is int",
    ),
    in_mask(
        name="hugging_face: a part behind a cache is taken to begin at the first key",
        old="placed = shift == 0 and none_is_causal if q_length > 1 else keys == kv_length",
        new="placed = True",
    ),
    in_mask(
        name="hugging_face: what a model writes into a mask is lost",
        old="if self._written is not None or tuple(",
        new="if tuple(",
    ),
    in_mask(
        name="hugging_face: a mask that a model cuts is None",
        old="if cut:",
        new="if False:",
    ),
    in_mask(
        name="hugging_face: every mask is written",
        old="mask = _unwritten(masks, like_eager, not (like_eager or cut), **arguments)",
        new="mask = None",
    ),
    in_mask(
        name="hugging_face: a step over a static cache is a window too",
        old="allowed = allow_is_causal_skip or allow_is_bidirectional_skip",
        new="allowed = True",
    ),
    in_mask(
        name="hugging_face: the window not handed over",
        file="lspm_kernels/compat/hugging_face.py",
        old="window=window,",
        new="",
    ),
    in_mask(
        name="hugging_face: masks of a trace are windows",
        old="if q_length is None or any(masks.is_tracing(x) for x in (q_offset, attention_mask)):",
        new="if q_length is None:",
    ),
]
