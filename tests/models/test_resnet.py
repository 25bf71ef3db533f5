"""ResNet: torchvision's numbers and names, its shapes, and what it refuses."""

import copy

import pytest
import torch
import torchvision
from torch import nn

import oracle
from lspm_models.models.freezing import freeze_stages
from lspm_models.models.resnet import NAMED, ResNet, ResNetConfig
from lspm_models.models.vision_layers import conv_batch_norm
from lspm_models.tasks.classification import Classification, from_torchvision, to_torchvision

IN_TORCHVISION = sorted(set(NAMED) - {"resnet10"})
TINY = ResNetConfig(layers=(1, 1, 1, 1), width=8, channels=1, stem=3, stem_stride=1, stem_pool=False)


def strong(module):
    """Gives norms weights and statistics that show where one is left out."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                for tensor in (norm.weight, norm.running_var):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
                for tensor in (norm.bias, norm.running_mean):
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return module


def pair(name, classes=7, width=16):
    """Our model and torchvision's of the same weights, narrow so that the tests are quick."""
    wide = NAMED[name]
    ours = Classification(ResNet(ResNetConfig(**{**vars(wide), "width": width})), classes)
    block = {
        "basic": torchvision.models.resnet.BasicBlock,
        "bottleneck": torchvision.models.resnet.Bottleneck,
    }
    theirs = Narrow(block[wide.block], list(wide.layers), width, classes, wide.groups, wide.group_width)
    theirs.load_state_dict(to_torchvision(strong(ours)))
    return ours, theirs


class Narrow(torchvision.models.ResNet):
    """torchvision's, whose width is a constant, with another."""

    def __init__(self, block, layers, width, classes, groups, group_width):
        super().__init__(block, layers, classes, groups=groups, width_per_group=group_width)
        self.inplanes, self.dilation = width, 1
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        for stage, count in enumerate(layers):
            made = self._make_layer(block, width * 2**stage, count, stride=2 if stage else 1)
            setattr(self, f"layer{stage + 1}", made)
        self.fc = nn.Linear(width * 8 * block.expansion, classes)


def run(task, images, targets):
    """Logits, loss, gradients and running statistics of a step in training, then logits in evaluation."""
    task.train()
    logits = task(images)
    loss = nn.functional.cross_entropy(logits, targets)
    loss.backward()
    found = {"training logits": logits, "loss": loss}
    found |= {f"gradient of {name}": parameter.grad for name, parameter in task.named_parameters()}
    found |= {name: buffer.clone() for name, buffer in task.named_buffers()}
    with torch.no_grad():
        found["logits"] = task.eval()(images)
    return {name.replace("model.", ""): tensor.detach() for name, tensor in found.items()}


@pytest.mark.parametrize("name", IN_TORCHVISION)
def test_names_and_shapes_are_torchvisions(name):
    with torch.device("meta"):
        ours = Classification(ResNet(NAMED[name]), 1000)
        theirs = getattr(torchvision.models, name)()
    assert {key: tensor.shape for key, tensor in to_torchvision(ours).items()} == {
        key: tensor.shape for key, tensor in theirs.state_dict().items()
    }
    back = from_torchvision(theirs.state_dict())
    assert back.keys() == ours.state_dict().keys()


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_a_training_step_is_torchvisions(name):
    torch.manual_seed(1)  # no ReLU's input lies within rounding of 0, where the gradient is anyone's
    ours, theirs = pair(name)
    wide = copy.deepcopy(theirs).double()
    images, targets = torch.randn(4, 3, 64, 48), torch.tensor([0, 3, 6, 3])
    rows = images.contiguous(memory_format=torch.channels_last)  # as ours makes them
    actual, plain = run(ours, images, targets), run(theirs, rows, targets)
    truth = run(wide, images.double(), targets)
    assert actual.keys() == truth.keys()
    for key in truth:
        if key.endswith("num_batches_tracked"):
            assert torch.equal(actual[key], truth[key])
        else:
            oracle.compare(key, actual[key], truth[key], plain[key])


def test_torchvisions_own_weights_give_torchvisions_logits():
    theirs = strong(torchvision.models.resnet18(num_classes=5)).eval()
    ours = Classification(ResNet(NAMED["resnet18"]), 5).eval()
    ours.load_state_dict(from_torchvision(theirs.state_dict()))
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        truth = copy.deepcopy(theirs).double()(images.double())
        rows = images.contiguous(memory_format=torch.channels_last)
        oracle.compare("logits", ours(images), truth, theirs(rows))


@pytest.mark.parametrize("training", [True, False])
def test_a_convolution_a_norm_and_a_residual_in_one_call(training):
    conv, norm = nn.Conv2d(3, 6, 3, 2, 1, bias=False), strong(nn.BatchNorm2d(6)).train(training)
    other = copy.deepcopy(norm)
    x, residual = torch.randn(2, 3, 9, 9), torch.randn(2, 6, 5, 5)
    expected = torch.relu(other(conv(x)) + residual)
    torch.testing.assert_close(conv_batch_norm(x, conv, norm, "relu", residual), expected)
    torch.testing.assert_close(norm.running_var, other.running_var)
    assert norm.num_batches_tracked == other.num_batches_tracked == int(training)
    assert (conv_batch_norm(x, conv, norm) < 0).any()


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("stem", [(7, 2, True), (3, 1, False), (3, 2, False)])
def test_features_have_the_sizes_that_the_config_tells(name, stem):
    config = ResNetConfig(**{**vars(NAMED[name]), "width": 8, "stem": stem[0], "stem_stride": stem[1]})
    config = ResNetConfig(**{**vars(config), "stem_pool": stem[2]})
    images = torch.randn(1, 3, 64, 96)
    found = ResNet(config).eval().pyramid(images)
    shapes = zip(config.features, config.strides, strict=True)
    assert [tuple(x.shape) for x in found] == [(1, C, 64 // stride, 96 // stride) for C, stride in shapes]
    assert config.strides[-1] == {(7, 2): 32, (3, 1): 8, (3, 2): 16}[stem[:2]]
    odd = ResNet(config).eval().pyramid(images[:, :, :37, :51])
    assert odd[-1].shape[-1] == -(-51 // config.strides[-1])


def test_a_zero_residual_makes_blocks_the_identity():
    config = ResNetConfig(layers=(2, 2, 2, 2), width=8, zero_init_residual=True)
    x = torch.rand(1, 8, 6, 6)
    model = ResNet(config).eval()
    assert torch.equal(model.layer1(x), x)
    assert not torch.equal(ResNet(ResNetConfig(width=8)).eval().layer1(x), x)


def test_frozen_stages_do_not_move():
    task = Classification(ResNet(TINY), 3, frozen=2).train()
    before = copy.deepcopy(task.state_dict())
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.1)
    task.loss(torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    moved = {name for name, tensor in task.state_dict().items() if not torch.equal(tensor, before[name])}
    assert not any(name.startswith(("model.conv1", "model.bn1", "model.layer1")) for name in moved)
    assert {"model.layer2.0.conv1.weight", "model.layer2.0.bn1.running_mean", "fc.weight"} <= moved
    assert freeze_stages(ResNet(TINY), 0) == []
    with pytest.raises(
        ValueError, match=r"^freeze: stages must be 0 to 5, the stem or the embeddings and 4 more, got 6$"
    ):
        freeze_stages(ResNet(TINY), 6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options", [{"momentum": None}, {"track_running_stats": False}, {"affine": False}, {"eps": 0.1}]
)
def test_norms_and_convolutions_of_any_kind(options, training):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(4, 6, 3, (2, 1), (1, 2), (1, 2), groups=2)
    norms = [torch.nn.BatchNorm2d(6, **options).train(training) for _ in range(2)]
    for x in torch.randn(3, 2, 4, 9, 8):
        actual = conv_batch_norm(x, conv, norms[0], "relu")
        torch.testing.assert_close(actual, norms[1](conv(x)).relu(), rtol=1e-5, atol=1e-5)
    for name, t in norms[1].state_dict().items():
        torch.testing.assert_close(norms[0].state_dict()[name], t, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": "plain"}, "block must be one of basic, bottleneck, got 'plain'"),
        ({"layers": (2, 2)}, "layers must be four positive integers, got (2, 2)"),
        ({"width": 0}, "width must be a positive integer, got 0"),
        ({"channels": True}, "channels must be a positive integer, got True"),
        ({"stem": 4}, "stem must be odd, got 4"),
        ({"groups": 32}, "groups must be 1 of 64 where block is 'basic', got 32 of 64"),
        (
            {"block": "bottleneck", "width": 24, "group_width": 4},
            "width times group_width must be a multiple of 64, got 24 times 4",
        ),
        ({"stem_pool": 1}, "stem_pool must be true or false, got 1"),
    ],
)
def test_bad_shapes(options, message):
    with pytest.raises(ValueError) as error:
        ResNetConfig(**options)
    assert str(error.value) == "ResNetConfig: " + message


@pytest.mark.parametrize(
    ("images", "got"),
    [
        (torch.zeros(1, 3, 8, 8), r"\(1, 3, 8, 8\) float32"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), r"\(1, 1, 8, 8\) uint8"),
        (torch.zeros(1, 8, 8), r"\(1, 8, 8\) float32"),
    ],
)
def test_bad_images(images, got):
    with pytest.raises(
        ValueError, match=rf"^ResNet: images must be \(N, 1, H, W\) floating point, got {got}$"
    ):
        ResNet(TINY)(images)
