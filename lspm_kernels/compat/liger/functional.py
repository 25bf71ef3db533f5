"""The shorter name of lspm_kernels.compat.liger_kernel.transformers.functional."""

from lspm_kernels.compat.liger_kernel.transformers.functional import *  # noqa: F403
