"""Scenes with exact masks and boxes, U-Net's sizes, and segmentation's loss and mean IoU."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_scenes import BACKBONE, bars, scene_data

from lspm_models.data.image_formats import Images
from lspm_models.data.scenes import SceneData, padded
from lspm_models.data.synthetic import Scenes
from lspm_models.fit_config import FitConfig
from lspm_models.models.resnet import ResNetConfig
from lspm_models.models.unet import UNet, UNetConfig
from lspm_models.run_log import read_log
from lspm_models.tasks.segmentation import Segmentation
from lspm_models.train import fit


def make_task(classes=3):
    torch.manual_seed(0)
    return Segmentation(UNet(UNetConfig(BACKBONE, width=8)), classes)


def test_masks_and_boxes_are_exact_and_apart():
    scenes, counts = Scenes(bars(), 48, most=3), []
    for number in range(40):
        pixels, mask, boxes = scenes.scene(number)
        assert (pixels.shape, pixels.dtype, mask.shape) == ((3, 48, 48), np.uint8, (48, 48))
        seen = np.zeros_like(mask)
        for x0, y0, x1, y1, label in boxes.astype(int):
            inside = mask[y0:y1, x0:x1]
            assert set(np.unique(inside)) <= {0, 1 + label}
            ink = inside > 0
            assert ink[0].any() and ink[-1].any() and ink[:, 0].any() and ink[:, -1].any()
            assert not seen[y0:y1, x0:x1].any()
            seen[y0:y1, x0:x1] = 1
        assert not mask[seen == 0].any()
        counts.append(len(boxes))
    assert set(counts) >= {1, 2}


def test_objects_can_be_seen():
    """Every object differs from the background it was pasted on."""
    scenes = Scenes(bars(), 48, most=1)
    for number in range(20):
        pixels, mask, boxes = scenes.scene(number)
        x0, y0, x1, y1 = (int(value) for value in boxes[0, :4])
        inside = mask > 0
        around = ~inside
        around[: max(0, y0 - 3)] = around[y1 + 3 :] = False
        around[:, : max(0, x0 - 3)] = around[:, x1 + 3 :] = False
        differences = pixels[:, inside].mean(1) - pixels[:, around].mean(1)
        assert np.abs(differences).max() > 40


def test_the_same_number_gives_the_same_scene():
    for first, second in zip(Scenes(bars(), 48).scene(7), Scenes(bars(), 48).scene(7), strict=True):
        assert np.array_equal(first, second)
    assert not np.array_equal(Scenes(bars(), 48).scene(7)[0], Scenes(bars(), 48, seed=1).scene(7)[0])
    assert Scenes(bars(), 48).fingerprint() != Scenes(bars(), 48, seed=1).fingerprint()


def test_scenes_for_training_go_on_and_are_shared():
    data = scene_data("mask", 2)
    data.next_batch()
    state, following = data.training.state(), data.training.next_batch()
    again = scene_data("mask", 2)
    again.training.restore(state)
    assert all(torch.equal(a, b) for a, b in zip(following, again.next_batch(), strict=True))
    shares = [scene_data("mask", 1, process=rank, processes=2).next_batch() for rank in range(2)]
    whole = scene_data("mask", 2).next_batch()
    assert all(torch.equal(torch.cat(pair), part) for *pair, part in zip(*shares, whole, strict=True))
    first, second = (next(iter(data.validation())) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert first[1].dtype == torch.int64


def test_boxes_are_padded():
    boxes = padded([np.ones((1, 5)), np.zeros((0, 5)), np.ones((2, 5))])
    assert boxes[..., 4].tolist() == [[1, -1], [-1, -1], [1, 1]]


def test_scenes_that_cannot_be_made():
    colour = Images(np.zeros(1, np.int64), np.zeros((1, 3, 8, 8), np.uint8))
    for images, size in ((colour, 48), (bars(), 12)):
        with pytest.raises(ValueError, match=r"^scenes: images must be grey and fit into \d+ pixels, got \("):
            Scenes(images, size)
    with pytest.raises(ValueError, match=r"^scenes: target must be one of mask, boxes, got 'words'$"):
        SceneData(Scenes(bars(), 48), Scenes(bars(), 48), "words", 1)


@pytest.mark.parametrize("stem", [(7, 2, True), (3, 1, False), (3, 2, False)])
def test_every_pixel_gets_features(stem):
    backbone = ResNetConfig(
        layers=(1, 1, 1, 1), width=8, stem=stem[0], stem_stride=stem[1], stem_pool=stem[2]
    )
    model = UNet(UNetConfig(backbone, width=4)).eval()
    assert len({backbone.strides[level] for level in model.config.levels}) == len(set(backbone.strides))
    for height, width in ((64, 64), (33, 50)):
        assert model(torch.randn(1, 3, height, width)).shape == (1, 4, height, width)
    images = torch.randn(1, 3, 64, 64, requires_grad=True)
    model(images)[0, :, 32, 32].sum().backward()
    assert (images.grad != 0).float().mean() > 0.9  # it sees far


def test_the_shape_is_checked():
    with pytest.raises(ValueError, match=r"^UNetConfig: width must be a positive integer, got 0$"):
        UNetConfig(width=0)


def test_the_loss_is_over_the_pixels_that_count():
    task, images = make_task().eval(), torch.randn(2, 3, 24, 24)
    targets = torch.randint(3, (2, 24, 24))
    targets[:, :5] = -100
    expected = F.cross_entropy(task(images), targets)
    torch.testing.assert_close(task.loss(images, targets), expected)
    loss, counts = task.evaluate(images, targets)
    torch.testing.assert_close(loss, expected)
    assert counts.sum() == 2 * 19 * 24
    with pytest.raises(ValueError, match=r"^Segmentation.loss: targets must have the shape \(2, 24"):
        task.loss(images, targets[:1])


def test_mean_iou_is_what_it_says():
    task, images = make_task(classes=5).eval(), torch.randn(2, 3, 24, 24)
    targets = torch.randint(4, (2, 24, 24))
    predicted = task(images).argmax(1)
    ious = []
    for label in range(5):
        there, said = targets == label, predicted == label
        if (there | said).any():
            ious.append(((there & said).sum() / (there | said).sum()).item())
    found = task.metrics(task.evaluate(images, targets)[1].tolist())
    assert found["mean_iou"] == pytest.approx(sum(ious) / len(ious), rel=1e-6)
    assert found["pixel_accuracy"] == pytest.approx((predicted == targets).double().mean().item())


def test_mean_iou_by_hand():
    task = make_task(classes=4)
    # Rows are true, columns predicted: 6 of 6 + 2 + 1 are right, 3 of 3 + 2, 0 of 1; class 3 is nowhere.
    counts = [[6, 2, 0, 0], [0, 3, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    sums = [float(count) for row in counts for count in row]
    assert task.ious(sums)[:3].tolist() == pytest.approx([6 / 9, 3 / 5, 0])
    assert task.ious(sums)[3].isnan()
    assert task.metrics(sums) == pytest.approx({"mean_iou": (6 / 9 + 3 / 5) / 3, "pixel_accuracy": 9 / 12})


def test_it_learns_to_find_bars(tmp_path):
    options = {"learning_rate": 1e-2, "evaluate_every": 100, "checkpoint_every": 100, "device": "cpu"}
    data, config = scene_data("mask", 4, kinds=1), FitConfig(steps=100, batch_size=4, **options)
    fit(make_task(classes=2), data, config, tmp_path)
    rows = read_log(tmp_path / "log.csv")
    assert float(rows[0]["mean_iou"]) < 0.5  # all background has 0.47
    assert float(rows[-1]["mean_iou"]) > 0.65
