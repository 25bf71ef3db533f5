"""compat.hugging_face without a model, and without transformers."""

import subprocess
import sys

import pytest
import torch

from lspm_kernels.compat import hugging_face


def test_the_output_is_contiguous():
    q, k = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16)
    out, probabilities = hugging_face.attention_forward(torch.nn.Module(), q, k, k, None)
    assert (out.shape, out.is_contiguous(), probabilities) == ((2, 5, 4, 16), True, None)
    one, _ = hugging_face.attention_forward(torch.nn.Module(), q[:1], k, k, None)
    assert torch.equal(one[:1], out[:1])


def test_a_mask_that_learns():
    q = torch.randn(1, 2, 5, 16)
    bias = torch.randn(1, 2, 5, 5, requires_grad=True)
    module = torch.nn.Module()
    first, _ = hugging_face.attention_forward(module, q, q, q, bias)
    second, _ = hugging_face.attention_forward(module, q, q, q, None, is_causal=False, position_bias=bias)
    both, _ = hugging_face.attention_forward(module, q, q, q, bias / 2, position_bias=bias / 2)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, both)
    assert torch.autograd.grad(first.square().sum(), bias)[0].abs().max() > 0


def test_errors():
    q = torch.randn(1, 2, 5, 16)
    with pytest.raises(ValueError) as raised:
        hugging_face.attention_forward(torch.nn.Module(), q, q, q, None, output_attentions=True)
    assert str(raised.value) == (
        "attention_forward: output_attentions must be False, as probabilities are not stored"
        ' (model.set_attn_implementation("eager") stores them), got True'
    )
    with pytest.raises(NotImplementedError) as raised:
        hugging_face.attention_forward(torch.nn.Module(), q, q, q, None, cache=object())
    assert str(raised.value) == "attention_forward: lspm needs a cache that is not paged, got object"
    with pytest.raises(NotImplementedError) as raised:
        hugging_face.attention_forward(torch.nn.Module(), q, q, q, None, indices=torch.zeros(1, 5, 4).long())
    assert str(raised.value) == (
        'attention_forward: lspm needs indices written into the mask, as for "sdpa", got them for Module'
    )


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError) as raised:
        hugging_face.register()
    assert str(raised.value) == (
        "hugging_face.register: transformers must be installed, with its AttentionMaskInterface"
        " (pip install transformers), got ModuleNotFoundError:"
        " import of transformers halted; None in sys.modules"
    )


def test_importing_does_not_import_transformers():
    code = (
        "import sys, lspm_kernels, lspm_kernels.compat.hugging_face; assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
