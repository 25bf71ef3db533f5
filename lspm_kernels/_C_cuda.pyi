from collections.abc import Sequence

from torch import Tensor

from lspm_kernels._C import attention_backward as attention_backward
from lspm_kernels._C import attention_forward as attention_forward
from lspm_kernels._C import batch_norm_act_backward as batch_norm_act_backward
from lspm_kernels._C import batch_norm_act_forward as batch_norm_act_forward
from lspm_kernels._C import batch_norm_act_statistics as batch_norm_act_statistics
from lspm_kernels._C import batch_norm_act_sums as batch_norm_act_sums
from lspm_kernels._C import bpr_update as bpr_update
from lspm_kernels._C import conv2d_backward as conv2d_backward
from lspm_kernels._C import conv2d_forward as conv2d_forward
from lspm_kernels._C import cross_entropy_backward as cross_entropy_backward
from lspm_kernels._C import cross_entropy_forward as cross_entropy_forward
from lspm_kernels._C import embedding_bag_forward as embedding_bag_forward
from lspm_kernels._C import global_avg_pool_backward as global_avg_pool_backward
from lspm_kernels._C import global_avg_pool_forward as global_avg_pool_forward
from lspm_kernels._C import layer_norm_backward as layer_norm_backward
from lspm_kernels._C import layer_norm_forward as layer_norm_forward
from lspm_kernels._C import max_pool2d_backward as max_pool2d_backward
from lspm_kernels._C import max_pool2d_forward as max_pool2d_forward
from lspm_kernels._C import mf_als_loss as mf_als_loss
from lspm_kernels._C import mf_als_update as mf_als_update
from lspm_kernels._C import mf_backward as mf_backward
from lspm_kernels._C import mf_forward as mf_forward
from lspm_kernels._C import mf_sgd_update as mf_sgd_update
from lspm_kernels._C import nmf_update as nmf_update
from lspm_kernels._C import rotary_backward as rotary_backward
from lspm_kernels._C import rotary_forward as rotary_forward
from lspm_kernels._C import top_k_scores_forward as top_k_scores_forward

def embedding_bag_backward(
    dout: Tensor,
    weight: Tensor | None,
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    bag_of: Tensor,
    sorted_rows: Tensor | None,
    order: Tensor | None,
    shares: Tensor | None,
    parts: Tensor | None,
    dweight: Tensor | None,
    dweights: Tensor | None,
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
    bag_of: Tensor,
    sorted_rows: Tensor,
    order: Tensor,
    shares: Tensor,
    parts: Tensor,
    padding_idx: int,
    mean: bool,
    optimizer: int,
    numbers: Sequence[float],
    step: int,
    seed: int | None,
    threads: int,
) -> None: ...
