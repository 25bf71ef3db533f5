"""Drop-in modules: subclasses of torch.nn's of the same name, with their constructors and state_dicts.

Each decides at every call whether a kernel takes it and is the faster way; else it is torch's own forward.
So is what a kernel refuses then, as an id outside a table: the error is the one that torch's callers expect.
"""

from lspm_kernels.nn.attentions import MultiheadAttention
from lspm_kernels.nn.elementwise import GELU, Dropout, SiLU
from lspm_kernels.nn.embeddings import Embedding, EmbeddingBag
from lspm_kernels.nn.images import Conv2d, ConvBatchNormAct, MaxPool2d
from lspm_kernels.nn.linears import Linear
from lspm_kernels.nn.losses import CrossEntropyLoss, LinearCrossEntropyLoss
from lspm_kernels.nn.norms import BatchNorm2d, LayerNorm, RMSNorm
from lspm_kernels.nn.transformers import TransformerEncoderLayer

__all__ = [
    "GELU",
    "BatchNorm2d",
    "Conv2d",
    "ConvBatchNormAct",
    "CrossEntropyLoss",
    "Dropout",
    "Embedding",
    "EmbeddingBag",
    "LayerNorm",
    "Linear",
    "LinearCrossEntropyLoss",
    "MaxPool2d",
    "MultiheadAttention",
    "RMSNorm",
    "SiLU",
    "TransformerEncoderLayer",
]
