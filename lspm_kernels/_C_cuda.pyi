from lspm_kernels._C import attention_backward as attention_backward
from lspm_kernels._C import attention_forward as attention_forward
from lspm_kernels._C import conv2d_backward as conv2d_backward
from lspm_kernels._C import conv2d_forward as conv2d_forward
from lspm_kernels._C import layer_norm_backward as layer_norm_backward
from lspm_kernels._C import layer_norm_forward as layer_norm_forward
from lspm_kernels._C import rotary_backward as rotary_backward
from lspm_kernels._C import rotary_forward as rotary_forward
