"""lspm_kernels.nn: convolutions, batch norms and pooling, against torch.nn's."""

import pytest
import torch
from torch import nn

import lspm_kernels as lk
from lspm_kernels.nn import images
from torch_layers import DTYPES, LAST, Called, check, is_ours, pair, same


def image(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).contiguous(memory_format=LAST)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{"padding": 1}, {"bias": False, "stride": 2}, {"padding": "same"}])
def test_grouped_convolution(options, dtype):
    check(*pair("Conv2d", 64, 32, 3, groups=8, **options), [image(4, 64, 17, 17, dtype=dtype)])


def test_convolution():
    x = image(2, 64, 40, 40)
    check(*pair("Conv2d", 64, 24, 3, padding=1), [x])
    ours, theirs = pair("Conv2d", 64, 24, 1)
    same(ours, theirs, x)  # with a gradient
    with torch.no_grad():
        assert is_ours(ours, x)
        y = ours(x)
        torch.testing.assert_close(y, theirs(x))
        assert y.is_contiguous(memory_format=LAST)
        for module in (ours, theirs):
            module.to(memory_format=LAST)
        ours, theirs = pair("Conv2d", 64, 24, 3)
        assert is_ours(ours.to(memory_format=LAST), x.contiguous())
        assert ours(x.contiguous()).stride() == theirs.to(memory_format=LAST)(x.contiguous()).stride()


def test_convolutions_that_are_torchs():
    x = image(2, 32, 40, 40)
    same(*pair("Conv2d", 32, 24, 3, padding=1, padding_mode="reflect"), x)
    same(*pair("Conv2d", 32, 32, 3, groups=32), x)
    same(*pair("Conv2d", 32, 24, 3), x[0])
    same(*pair("Conv2d", 32, 24, 3), image(1, 32, 8, 8))
    same(*pair("Conv2d", 32, 24, 3, dtype=torch.float64), x.double())
    same(*pair("Conv2d", 32, 24, 3, dtype=torch.bfloat16), x.bfloat16())
    ours, _ = pair("Conv2d", 32, 24, 3)
    same(ours, _, x.contiguous())
    assert ours(x.contiguous()).view(2, -1).shape == (2, 24 * 38 * 38)  # contiguous, as torch's
    with pytest.raises(RuntimeError, match="to have 32 channels"):
        ours(image(2, 33, 40, 40))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("options", [{}, {"affine": False, "eps": 0.1, "momentum": 0.3}])
def test_batch_norm(options, train, dtype):
    check(*pair("BatchNorm2d", 32, train=train, **options), [image(16, 32, 33, 33, dtype=dtype)])


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_batch_norm_counts_and_averages(dtype):
    ours, theirs = pair("BatchNorm2d", 32, momentum=0.3)
    x = image(16, 32, 33, 33, dtype=dtype)
    with torch.no_grad():
        assert is_ours(ours, x)
        ours.load_state_dict(theirs.state_dict())
        for _ in range(3):
            torch.testing.assert_close(ours(x), theirs(x))
    assert ours.num_batches_tracked == 3
    for name, expected in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], expected)


@pytest.mark.parametrize("options", [{"momentum": None}, {"track_running_stats": False}])
def test_batch_norms_that_are_torchs(options):
    x = image(16, 32, 33, 33, dtype=torch.bfloat16)
    ours, theirs = pair("BatchNorm2d", 32, **options)
    for _ in range(2):
        theirs.load_state_dict(ours.state_dict())
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
        same(ours.eval(), theirs.eval(), x)
        ours.train(), theirs.train()
    same(*pair("BatchNorm2d", 32, train=False), x.contiguous())
    same(*pair("BatchNorm2d", 32, train=False), x[:, :, :5, :5])
    same(*pair("BatchNorm2d", 32, train=False, dtype=torch.float64), x.double())
    with pytest.raises(ValueError, match="expected 4D input"):
        ours(torch.randn(1024, 32, 40))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("args", [(2,), (3, 2, 1), ((3, 2), 1, 0, 2, False, True)])
def test_max_pool(args, dtype):
    x = image(8, 128, 24, 25, dtype=dtype)
    ours, theirs = pair("MaxPool2d", *args)
    y = ours(x)
    assert torch.equal(y, theirs(x))
    assert y.stride() == theirs(x).stride()
    check(ours, theirs, [x])


def test_max_pools_that_are_torchs():
    x = image(8, 128, 24, 25)
    for args in ((x.contiguous(),), (x[:, :4],), (x.double(),), (image(4, 40, 60, 60),), (x[0],)):
        same(*pair("MaxPool2d", 3, 2, 1), *args)
    same(*pair("MaxPool2d", 2, return_indices=True), x)


ACTIVATIONS = {None: nn.Identity, "relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "gelu": nn.GELU}


def conv_norm(activation="relu", train=True, **options):
    """Ours, and Sequential's of the same parameters, which takes a residual too."""
    ours = lk.nn.ConvBatchNormAct(16, 24, 3, activation=activation, **options)
    layers = [nn.Conv2d(16, 24, 3, bias=False, **options), nn.BatchNorm2d(24)]
    theirs = Added(*layers, *([ACTIVATIONS[activation]()] if activation else []))
    with torch.no_grad():
        theirs[1].running_mean.uniform_(-1, 1), theirs[1].running_var.uniform_(0.5, 2)
        theirs[1].weight.uniform_(0.5, 1.5), theirs[1].bias.uniform_(-1, 1)
    ours.load_state_dict(theirs.state_dict())
    return ours.train(train), theirs.train(train)


class Added(nn.Sequential):
    def forward(self, x, residual=None):
        y = self[1](self[0](x))
        y = y if residual is None else y + residual
        return self[2](y) if len(self) > 2 else y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_conv_batch_norm_act(activation, train, dtype):
    ours, theirs = conv_norm(activation, train, padding=1)
    x, residual = image(4, 16, 33, 32, dtype=dtype), image(4, 24, 33, 32, dtype=dtype)
    # In half types plain PyTorch rounds before ReLU6, so that what is nearly 6 has a gradient or has none.
    gradients = activation != "relu6" or dtype is torch.float32
    check(ours, theirs, [x, residual] if activation in (None, "relu") else [x], gradients=gradients)
    if not train:  # folded into the convolution
        with torch.no_grad():
            check(ours, theirs, [x], gradients=False)


def test_conv_batch_norm_act_keeps_statistics_and_names():
    ours, theirs = conv_norm(padding=1)
    x = image(8, 16, 33, 32)
    for module in (ours, theirs):
        module(x)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, expected in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], expected)
    torchvision = pytest.importorskip("torchvision")
    other = torchvision.ops.Conv2dNormActivation(16, 24, 3)
    ours.load_state_dict(other.state_dict())
    torch.testing.assert_close(ours.eval()(x), other.eval()(x), rtol=1e-4, atol=1e-4)


def test_conv_batch_norm_acts_parts_are_called_where_it_is_not_one():
    ours, theirs = conv_norm(train=False)
    x = image(8, 16, 33, 32)
    for args in ((x.contiguous(),), (x[:1],), (x, torch.ones(24, 1, 1))):
        same(ours, theirs, *args)
    seen = []
    handle = ours[1].register_forward_hook(lambda *_: seen.append(1))
    same(ours, theirs, x)
    handle.remove()
    assert seen and is_ours(ours, x)
    for part in (nn.Tanh(), nn.GELU("tanh")):
        ours[2] = theirs[2] = part
        same(ours, theirs, x)


def test_conv_batch_norm_act_names_an_activation_that_it_does_not_have():
    names = ", ".join(map(repr, images._ACTIVATIONS))
    with pytest.raises(ValueError) as error:
        lk.nn.ConvBatchNormAct(3, 4, 3, activation="tanh")
    assert str(error.value) == f"ConvBatchNormAct: activation must be None or one of {names}, got 'tanh'"


def test_the_spy_sees_kernels_and_torch():
    assert is_ours(Called(lk.nn.RMSNorm(8)), torch.randn(2, 8))
    assert not is_ours(nn.RMSNorm(8), torch.randn(2, 8))
