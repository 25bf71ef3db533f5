"""The shorter name of lspm_kernels.compat.liger_kernel.transformers."""

from lspm_kernels.compat.liger_kernel.transformers import *  # noqa: F403
