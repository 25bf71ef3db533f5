from collections.abc import Callable, Sequence

from torch import Tensor

isa: str
_Sequences = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, int, int]
_Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]

def adamw_count(steps: Sequence[Tensor], counts: Tensor) -> None: ...
def adamw_norm(grads: Sequence[Tensor], norm: Tensor, threads: int) -> None: ...
def adamw_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    master_params: Sequence[Tensor],
    scale: Tensor | None,
    steps: Sequence[int],
    numbers: Sequence[float],
    maximize: bool,
    seed: int | None,
    threads: int,
) -> None: ...
def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    out: Tensor,
    statistics: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dbias: Tensor | None,
    delta: Tensor,
    sequences: _Sequences | None,
    window: tuple[int, int, int, int],
    scalars: tuple[float, float, float],
    threads: int,
) -> None: ...
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    statistics: Tensor | None,
    sequences: _Sequences | None,
    window: tuple[int, int, int, int],
    scalars: tuple[float, float, float],
    threads: int,
    scratch: Tensor | None = None,
) -> None: ...
def attention_with_kv_cache_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    turned: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    counts: Tensor,
    pages: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    steps: bool,
    threads: int,
) -> None: ...
def batch_norm_act_backward(
    dy: Tensor,
    x: Tensor,
    beside: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    sums: Tensor | None,
    dx: Tensor,
    eps: float,
    activation: int,
    threads: int,
) -> None: ...
def batch_norm_act_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    y: Tensor,
    eps: float,
    activation: int,
    running: bool,
    threads: int,
) -> None: ...
def batch_norm_act_statistics(
    x: Tensor | None, partial: Tensor, mean: Tensor, variance: Tensor, threads: int
) -> None: ...
def batch_norm_act_sums(
    dy: Tensor,
    x: Tensor,
    beside: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    dresidual: Tensor | None,
    partial: Tensor,
    sums: Tensor,
    eps: float,
    activation: int,
    threads: int,
) -> None: ...
def bias_act_backward(
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    dx: Tensor,
    dbias: Tensor | None,
    y: Tensor | None,
    partial: Tensor | None,
    activation: int,
    threads: int,
) -> None: ...
def bias_act_forward(x: Tensor, bias: Tensor | None, y: Tensor, activation: int, threads: int) -> None: ...
def bpr_update(
    user_factors: Tensor,
    item_factors: Tensor,
    item_bias: Tensor | None,
    users: Tensor,
    items: Tensor,
    offsets: Tensor,
    part_items: Tensor,
    part_offsets: Tensor,
    seen_indptr: Tensor | None,
    seen: Tensor | None,
    loss: Tensor,
    skipped: Tensor,
    step: Sequence[float],
    seed: int,
    threads: int,
) -> None: ...
def conv2d_backward(
    dz: Tensor,
    x: Tensor,
    weight: Tensor,
    dx: Tensor | None,
    dweight: Tensor | None,
    geometry: _Geometry,
    threads: int,
    packed: Tensor | None = None,
    partial: Tensor | None = None,
) -> None: ...
def conv2d_forward(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    statistics: Tensor | None,
    geometry: _Geometry,
    activation: int,
    threads: int,
    packed: Tensor | None = None,
) -> None: ...
def conv2d_pack(weight: Tensor, packed: Tensor, geometry: _Geometry, threads: int) -> None: ...
def conv2d_packed_bytes(weight: Tensor, geometry: _Geometry) -> int: ...
def cross_entropy_backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    dlogits: Tensor,
    ignore_index: int,
    reduction: int,
    smoothing: float,
    threads: int,
) -> None: ...
def cross_entropy_forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    loss: Tensor,
    statistics: Tensor | None,
    row_losses: Tensor | None,
    ignore_index: int,
    reduction: int,
    smoothing: float,
    threads: int,
) -> None: ...
def dropout_forward(
    x: Tensor, residual: Tensor | None, out: Tensor, p: float, scale: float, seed: int, threads: int
) -> None: ...
def embedding_bag_backward(
    dout: Tensor,
    weight: Tensor | None,
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    dweight: Tensor | None,
    dweights: Tensor | None,
    padding_idx: int,
    mean: bool,
    threads: int,
) -> None: ...
def embedding_bag_forward(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    out: Tensor,
    padding_idx: int,
    mean: bool,
    threads: int,
) -> None: ...
def embedding_bag_update(
    weight: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    dout: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    padding_idx: int,
    mean: bool,
    optimizer: int,
    numbers: Sequence[float],
    step: int,
    seed: int | None,
    threads: int,
) -> None: ...
def embedding_forward(
    tokens: Tensor,
    weight: Tensor,
    positions: Tensor | None,
    position_weight: Tensor | None,
    token_types: Tensor | None,
    token_type_weight: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    out: Tensor,
    statistics: Tensor | None,
    first: int,
    length: int,
    eps: float,
    p: float,
    scale: float,
    seed: int,
    threads: int,
) -> None: ...
def global_avg_pool_backward(dy: Tensor, dx: Tensor, threads: int) -> None: ...
def global_avg_pool_forward(x: Tensor, y: Tensor, threads: int) -> None: ...
def layer_norm_backward(
    dy: Tensor,
    dsum: Tensor | None,
    sum: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    dx: Tensor,
    dweight: Tensor | None,
    dbias: Tensor | None,
    partial: Tensor,
    centered: bool,
    threads: int,
) -> None: ...
def layer_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    sum: Tensor | None,
    y: Tensor,
    statistics: Tensor | None,
    eps: float,
    centered: bool,
    threads: int,
) -> None: ...
def linear_cross_entropy_backward(
    dloss: Tensor,
    dlse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    dbias: Tensor | None,
    first: int,
    classes: int,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float,
    threads: int,
) -> None: ...
def linear_cross_entropy_forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    kept: Tensor,
    losses: Tensor,
    first: int,
    classes: int,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float,
    threads: int,
) -> None: ...
def linear_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor | None, y: Tensor, threads: int
) -> None: ...
def matmul(a: Tensor, b: Tensor, bias: Tensor | None, c: Tensor, accumulate: bool, threads: int) -> None: ...
def max_pool2d_backward(
    dy: Tensor, positions: Tensor, dx: Tensor, window: Sequence[int], threads: int
) -> None: ...
def max_pool2d_forward(
    x: Tensor, y: Tensor, positions: Tensor | None, window: Sequence[int], threads: int
) -> None: ...
def mf_als_loss(
    factors: Tensor,
    other_factors: Tensor,
    indptr: Tensor,
    indices: Tensor,
    values: Tensor | None,
    weight: Tensor | None,
    loss: Tensor,
    reg: float,
    reg_exponent: float,
    alpha: float,
    implicit: bool,
    threads: int,
    grams: Tensor | None = None,
    scratch: Tensor | None = None,
) -> None: ...
def mf_als_update(
    factors: Tensor,
    other_factors: Tensor,
    indptr: Tensor,
    indices: Tensor,
    values: Tensor | None,
    weight: Tensor | None,
    failed: Tensor,
    reg: float,
    reg_exponent: float,
    alpha: float,
    implicit: bool,
    steps: int,
    threads: int,
    gram: Tensor | None = None,
) -> None: ...
def mf_backward(
    dratings: Tensor,
    user_factors: Tensor,
    item_factors: Tensor,
    users: Tensor,
    items: Tensor,
    duser_factors: Tensor | None,
    ditem_factors: Tensor | None,
    duser_bias: Tensor | None,
    ditem_bias: Tensor | None,
    threads: int,
) -> None: ...
def mf_forward(
    user_factors: Tensor,
    item_factors: Tensor,
    user_bias: Tensor | None,
    item_bias: Tensor | None,
    users: Tensor,
    items: Tensor,
    ratings: Tensor,
    mean: float,
    threads: int,
) -> None: ...
def mf_sgd_blocks(
    users: Tensor,
    items: Tensor,
    ratings: Tensor,
    weight: Tensor | None,
    user_part: Tensor,
    item_part: Tensor,
    users_out: Tensor,
    items_out: Tensor,
    ratings_out: Tensor,
    weight_out: Tensor | None,
    offsets: Tensor,
    threads: int,
) -> None: ...
def mf_sgd_update(
    user_factors: Tensor,
    item_factors: Tensor,
    user_bias: Tensor | None,
    item_bias: Tensor | None,
    user_squares: Tensor | None,
    item_squares: Tensor | None,
    users: Tensor,
    items: Tensor,
    ratings: Tensor,
    weight: Tensor | None,
    offsets: Tensor,
    loss: Tensor,
    step: Sequence[float],
    nonnegative: bool,
    logistic: bool,
    seed: int,
    threads: int,
) -> None: ...
def nmf_update(
    factors: Tensor,
    other_factors: Tensor,
    indptr: Tensor,
    indices: Tensor,
    values: Tensor,
    failed: Tensor,
    reg: float,
    eps: float,
    threads: int,
) -> None: ...
def rotary_backward(
    dout: Tensor,
    cos: Tensor,
    sin: Tensor,
    offsets: Tensor | None,
    dx: Tensor,
    offset: int,
    interleaved: bool,
    threads: int,
) -> None: ...
def rotary_forward(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    offsets: Tensor | None,
    out: Tensor,
    offset: int,
    interleaved: bool,
    threads: int,
) -> None: ...
def run_in_team(main: Callable[[], None], threads: int) -> None: ...
def sample_forward(
    logits: Tensor,
    temperatures: Tensor | None,
    previous: Tensor | None,
    tokens: Tensor,
    logprobs: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    gumbel: bool,
    seed: int,
    threads: int,
) -> None: ...
def swiglu_backward(
    dy: Tensor,
    gate: Tensor,
    up: Tensor | None,
    dgate: Tensor,
    dup: Tensor | None,
    y: Tensor | None,
    activation: int,
    threads: int,
) -> None: ...
def swiglu_forward(gate: Tensor, up: Tensor | None, y: Tensor, activation: int, threads: int) -> None: ...
def top_k_scores_forward(
    queries: Tensor,
    items: Tensor,
    item_bias: Tensor | None,
    exclude_indptr: Tensor | None,
    exclude_indices: Tensor | None,
    scores: Tensor,
    indices: Tensor,
    threads: int,
    scratch: Tensor | None = None,
) -> None: ...
