"""The detector: boxes and suppression as torchvision has them, what points learn, and AP50."""

import pytest
import torch
import torchvision
from tiny_scenes import BACKBONE, scene_data

from lspm_models.fit_config import FitConfig
from lspm_models.models.detector import (
    Answers,
    Detector,
    DetectorConfig,
    boxes_at,
    iou,
    non_maximum_suppression,
)
from lspm_models.run_log import read_log
from lspm_models.tasks.detection import (
    Detection,
    Found,
    assign,
    centerness,
    focal,
    generalised_iou,
    matched,
    within,
)
from lspm_models.train import fit


def make_task(classes=2):
    torch.manual_seed(0)
    return Detection(Detector(DetectorConfig(classes, BACKBONE, width=16, convolutions=1)))


def random_boxes(count, size=60.0):
    corners = torch.rand(count, 2) * size
    return torch.cat((corners, corners + 1 + torch.rand(count, 2) * size / 2), 1)


def test_overlaps_and_suppression_are_torchvisions():
    a, b = random_boxes(60), random_boxes(40)
    torch.testing.assert_close(iou(a, b), torchvision.ops.box_iou(a, b))
    paired = torchvision.ops.generalized_box_iou(a[:40], b).diagonal()
    torch.testing.assert_close(generalised_iou(a[:40], b), paired)
    scores, labels = torch.rand(60), torch.randint(3, (60,))
    for threshold in (0.1, 0.5):
        expected = torchvision.ops.batched_nms(a, scores, labels, threshold)
        assert torch.equal(non_maximum_suppression(a, scores, labels, threshold), expected)
    nothing = torch.zeros(0)
    assert len(non_maximum_suppression(torch.zeros(0, 4), nothing, nothing.long(), 0.5)) == 0


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.6])
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_overlaps_at_the_threshold_and_tiny_boxes_go_as_torchvisions_do(threshold, scale):
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 6, (400, 4), generator=generator).float()  # many overlaps are round numbers
    boxes = torch.cat((corners.view(-1, 2, 2).amin(1), corners.view(-1, 2, 2).amax(1)), 1) * scale
    scores = torch.randperm(400, generator=generator).float()
    kept = non_maximum_suppression(boxes, scores, torch.zeros(400, dtype=torch.int64), threshold)
    assert torch.equal(kept, torchvision.ops.nms(boxes, scores, threshold))


def test_the_focal_loss_is_torchvisions():
    logits, wanted = torch.randn(50) * 3, (torch.rand(50) < 0.3).float()
    torch.testing.assert_close(focal(logits, wanted), torchvision.ops.sigmoid_focal_loss(logits, wanted))


def test_points_learn_the_smallest_object_on_the_level_of_its_size():
    answers = make_task().eval().model(torch.zeros(1, 3, 64, 64))
    points, strides = answers.points, answers.strides
    assert strides.unique().tolist() == [4, 8, 16]
    assert (len(points), points[0].tolist(), points[256].tolist()) == (256 + 64 + 16, [2, 2], [4, 4])
    boxes = torch.tensor([[3.0, 3, 61, 61, 0], [26, 26, 38, 38, 1], [0, 0, 9, 9, -1]])
    labels, distances = assign(points, strides, boxes)
    at = {(x, y, int(s)): i for i, ((x, y), s) in enumerate(zip(points.tolist(), strides, strict=True))}
    assert labels[at[34, 30, 4]] == 1
    assert distances[at[34, 30, 4]].tolist() == [8, 4, 4, 8]
    assert labels[at[36, 36, 8]] == 0  # the large one, whose farthest side is 33 pixels away
    assert labels[at[2, 2, 4]] == -1  # outside
    assert labels[at[28, 52, 8]] == -1  # inside, but not near the middle
    assert set(labels[strides == 16].tolist()) == {-1}
    assert torch.equal(boxes_at(points[at[34, 30, 4]], distances[at[34, 30, 4]]), boxes[1, :4])
    assert set(assign(points, strides, boxes[2:])[0].tolist()) == {-1}


def test_centerness_is_one_in_the_middle():
    found = centerness(torch.tensor([[2.0, 3, 2, 3], [1, 1, 4, 1], [1, 1, 4, 9]]))
    torch.testing.assert_close(found, torch.tensor([1.0, 0.5, 1 / 6]))


def answers_for(task, targets, size=64):
    """Answers that are as good as can be."""
    empty = task.model(torch.zeros(len(targets), 3, size, size))
    pairs = [assign(empty.points, empty.strides, boxes) for boxes in targets]
    labels, distances = (torch.stack(part) for part in zip(*pairs, strict=True))
    logits = torch.full_like(empty.logits, -20.0)
    logits[labels >= 0] = torch.where(torch.nn.functional.one_hot(labels[labels >= 0], 2) > 0, 20.0, -20.0)
    middle = torch.where(labels >= 0, centerness(distances.clamp(min=1e-3)), 0.5)
    return Answers(logits, distances, middle.clamp(1e-6, 1 - 1e-6).logit(), empty.points, empty.strides)


def test_perfect_answers_find_everything_and_lose_nothing():
    targets = torch.tensor(
        [[[4.0, 6, 30, 20, 0], [34, 30, 50, 62, 1]], [[10, 10, 26, 22, 1], [-1, -1, -1, -1, -1]]]
    )
    task = make_task().eval()
    answers = answers_for(task, targets)
    found = task._found(answers, (64, 64))
    assert [len(image.boxes) for image in found] == [2, 1]
    order = found[0].labels.argsort()
    torch.testing.assert_close(found[0].boxes[order], targets[0, :, :4])
    worse = answers._replace(distances=answers.distances + 3)
    assert task._loss(answers, targets) < task._loss(worse, targets) - 0.1
    task.model.forward = lambda images: answers
    loss, sums = task.evaluate(torch.zeros(2, 3, 64, 64), targets)
    assert task.metrics(sums.tolist()) == {"ap50": 1.0}
    assert loss == task._loss(answers, targets)


def test_an_object_is_found_once():
    present = torch.tensor([[0.0, 0, 10, 10, 0], [20, 20, 30, 30, 1]])
    boxes = torch.tensor([[0.0, 0, 10, 9], [0, 0, 10, 10], [20, 20, 30, 30], [20, 20, 30, 31]])
    found = Found(boxes, torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([0, 0, 0, 1]))
    assert matched(found, present).tolist() == [True, False, False, True]
    assert matched(found, present[:0]).tolist() == [False] * 4


def test_average_precision_by_hand():
    task = make_task()
    counts = torch.zeros(2, 2001)
    # Class 0: right at 0.9, wrong at 0.8, right at 0.7, one of three objects missed. Class 1 is not there.
    counts[0, 900] = counts[0, 1800] = counts[0, 700] = 1
    counts[0, -1] = 3
    counts[1, 1500] = 4
    expected = 1 / 3 * 1 + 1 / 3 * 2 / 3
    assert task.metrics(counts.flatten().tolist())["ap50"] == pytest.approx(expected)
    assert task.average_precisions(counts.flatten().tolist())[0].item() == pytest.approx(expected)
    assert task.average_precisions(counts.flatten().tolist())[1].isnan()
    # Wrong at 0.95, right at 0.9 and 0.8, of two: who takes half of them may as well take all, at 2 / 3.
    counts[1] = 0
    counts[1, 1950] = counts[1, 900] = counts[1, 800] = 1
    counts[1, -1] = 2
    assert task.average_precisions(counts.flatten().tolist())[1].item() == pytest.approx(2 / 3)
    assert task.metrics(counts.flatten().tolist())["ap50"] == pytest.approx((expected + 2 / 3) / 2)
    assert task.metrics([0.0] * 4002) == {"ap50": 0.0}


def test_half_an_overlap_is_enough():
    present, score, label = torch.tensor([[0.0, 0, 10, 10, 0]]), torch.ones(1), torch.zeros(1, dtype=int)
    for height, right in ((5.0, True), (4.9, False)):
        box = torch.tensor([[0.0, 0, 10, height]])
        assert matched(Found(box, score, label), present).tolist() == [right]


def test_what_lies_in_a_crowd_is_neither_right_nor_wrong():
    task = make_task().eval()
    boxes = torch.tensor(
        [
            [0.0, 0, 10, 10],  # right
            [20, 20, 30, 30],  # in the crowd
            [34, 20, 44, 30],  # more than half of it
            [20, 20, 30, 30],  # of another class
            [35, 20, 45, 30],  # half of it
            [1, 0, 11, 10],  # found before
            [24, 32, 28, 36],  # right, in the crowd
        ]
    )
    labels = torch.tensor([0, 0, 0, 1, 0, 0, 0])
    found = Found(boxes, torch.linspace(0.9, 0.4, 7), labels)
    targets = torch.tensor([[[0.0, 0, 10, 10, 0], [20, 20, 40, 40, -2], [24, 32, 28, 36, 0]]])
    assert within(found, targets[0, 1:2]).tolist() == [False, True, True, False, False, False, True]
    answers = answers_for(task, targets)
    task.model.forward = lambda images: answers
    task._found = lambda answers, shape: [found]
    counts = task.evaluate(torch.zeros(1, 3, 64, 64), targets)[1].view(2, -1)
    assert counts[:, :1000].sum(1).tolist() == [2, 0]
    assert counts[:, 1000:2000].sum(1).tolist() == [2, 1]
    assert counts[:, -1].tolist() == [2, 0]
    points, strides = answers.points, answers.strides
    assert (assign(points, strides, targets[0, 1:2])[0] == -1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 0}, "classes must be a positive integer, got 0"),
        ({"classes": 1, "levels": 5}, "levels must be at most 4, got 5"),
    ],
)
def test_bad_shapes(options, message):
    with pytest.raises(ValueError) as error:
        DetectorConfig(**options)
    assert str(error.value) == "DetectorConfig: " + message


def test_an_image_without_objects_has_a_loss_and_gradients():
    task = make_task().train()
    loss = task.loss(torch.randn(2, 3, 48, 48), torch.full((2, 1, 5), -1.0))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in task.parameters())


def test_it_learns_to_find_bars(tmp_path):
    options = {"learning_rate": 5e-3, "evaluate_every": 80, "checkpoint_every": 80, "device": "cpu"}
    data, config = scene_data("boxes", kinds=1), FitConfig(steps=80, batch_size=8, **options)
    fit(make_task(classes=1), data, config, tmp_path)
    rows = read_log(tmp_path / "log.csv")
    assert float(rows[0]["ap50"]) < 0.05
    assert float(rows[-1]["ap50"]) > 0.25
