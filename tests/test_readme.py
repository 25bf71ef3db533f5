"""The README's Python runs, and its table of ops says what the ops' tables say."""

import importlib
import re
from pathlib import Path

import pytest

from lspm_kernels.__main__ import backends

README = (Path(__file__).parents[1] / "README.md").read_text()
PUBLIC = {
    "adamw": ["adamw_"],
    "layer_norm": ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"],
    "attention": ["attention"],
    "attention_varlen": ["attention_varlen"],
    "attention_with_kv_cache": ["attention_with_kv_cache"],
    "rotary": ["rotary"],
    "max_pool2d": ["max_pool2d"],
    "global_avg_pool": ["global_avg_pool"],
    "cross_entropy": ["cross_entropy"],
    "bias_act": ["bias_act", "bias_gelu"],
    "swiglu": ["swiglu", "geglu"],
    "mlp": ["mlp", "gated_mlp"],
    "linear_cross_entropy": ["linear_cross_entropy"],
    "sample": ["sample"],
    "mf": ["mf"],
    "top_k_scores": ["top_k_scores"],
    "mf_sgd": ["mf_sgd_"],
    "bpr": ["bpr_"],
    "mf_als": ["mf_als_"],
    "nmf": ["nmf_"],
    "dropout": ["dropout"],
    "embedding": ["embedding"],
    "embedding_bag": ["embedding_bag"],
    "embedding_bag_update": ["embedding_bag_sgd_", "embedding_bag_adagrad_", "embedding_bag_adam_"],
}


def test_the_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) >= 2
    exec("\n".join(blocks), {})


@pytest.mark.parametrize("op", PUBLIC)
def test_the_table_of_ops(op):
    table = importlib.import_module(f"lspm_kernels.ops.{op}").BACKENDS
    backends = ", ".join(row.name for row in table)
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in table[0].dtypes)
    assert all(set(row.dtypes) <= set(table[0].dtypes) for row in table)
    for name in PUBLIC[op]:
        (line,) = re.findall(rf"^\| `{name}\(.*$", README, re.M)
        assert line.endswith(f"| {backends} | {dtypes} |")


def test_the_table_of_backends():
    (table,) = re.findall(r"<!-- backends:begin -->\n(.*?)\n<!-- backends:end -->", README, re.S)
    assert table == backends(), "stale: run python benchmarks/report.py readme"
