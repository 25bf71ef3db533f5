from torch import Tensor

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
