"""Detection: from what each pixel says to boxes with classes and scores.

Source: Tian et al., FCOS, 2019, with the focal loss of Lin et al., 2017, and the generalised IoU of
Rezatofighi et al., 2019.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lspm_models.models.detector import (
    Answers,
    Detector,
    DetectorConfig,
    boxes_at,
    iou,
    non_maximum_suppression,
)

REACH = 8  # strides that a box's farthest side may lie away on its level; the coarsest takes larger ones too
RADIUS = 1.5  # strides around an object's middle in which points learn it
BINS = 1000  # of scores, in the sums of which AP is made


class Found(NamedTuple):
    """The objects on an image, the surest first: boxes (N, 4), scores (N,), labels (N,)."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


class Detection(nn.Module):
    """A detector, its loss, and AP50.

    Args:
        model: says what each pixel sees.
        score: objects below this are not found.
        overlap: IoU above which two boxes of a class are one object.
        most: objects per image at most.
    """

    unit = "image"
    metric_names = ("ap50",)

    def __init__(
        self, model: Detector, *, score: float = 0.05, overlap: float = 0.6, most: int = 100
    ) -> None:
        super().__init__()
        self.model, self.score, self.overlap, self.most = model, score, overlap, most

    @property
    def config(self) -> DetectorConfig:
        """The model's."""
        return self.model.config

    def forward(self, images: Tensor) -> list[Found]:
        """The objects on each of images (N, channels, H, W)."""
        return self._found(self.model(images), images.shape[-2:])

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """The sum of the losses of classes, boxes and centerness, per point that is in an object.

        Args:
            images: (N, channels, H, W).
            targets: (N, M, 5) x0, y0, x1, y1 and label in pixels; a label below 0 stands for no object.
        """
        return self._loss(self.model(images), targets)

    def _loss(self, answers: Answers, targets: Tensor) -> Tensor:
        pairs = [assign(answers.points, answers.strides, boxes) for boxes in targets]
        labels, distances = (torch.stack(part) for part in zip(*pairs, strict=True))
        inside = labels >= 0
        count = inside.sum().clamp(min=1)
        wanted = F.one_hot(labels.clamp(min=0), self.config.classes).float() * inside[..., None]
        of_class = focal(answers.logits, wanted).sum() / count
        centre = centerness(distances[inside])
        points = answers.points.expand(len(targets), -1, -1)[inside]
        overlap = generalised_iou(
            boxes_at(points, answers.distances[inside]), boxes_at(points, distances[inside])
        )
        of_box = ((1 - overlap) * centre).sum() / centre.sum().clamp(min=1e-6)
        of_centre = F.binary_cross_entropy_with_logits(answers.centerness[inside], centre, reduction="sum")
        return of_class + of_box + of_centre / count

    @torch.no_grad()
    def _found(self, answers: Answers, shape: torch.Size) -> list[Found]:
        limit = torch.tensor([shape[1], shape[0]] * 2, device=answers.points.device)
        scores = (answers.logits.sigmoid() * answers.centerness.sigmoid()[..., None]).sqrt()
        boxes = boxes_at(answers.points, answers.distances).clamp(min=0).minimum(limit)
        found = []
        for image_scores, image_boxes in zip(scores, boxes, strict=True):
            points, labels = (image_scores > self.score).nonzero(as_tuple=True)
            sure = image_scores[points, labels]
            sure, best = sure.topk(min(len(sure), 10 * self.most))
            points, labels = points[best], labels[best]
            kept = non_maximum_suppression(image_boxes[points], sure, labels, self.overlap)[: self.most]
            found.append(Found(image_boxes[points[kept]], sure[kept], labels[kept]))
        return found

    def evaluate(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the counts that metrics() wants summed.

        For each class these are right and wrong detections by score, in bins, and how many objects there are.
        A label of -2 - label stands for a box that nobody must find: what lies in it is neither.
        """
        answers = self.model(images)
        counts = torch.zeros(self.config.classes, 2 * BINS + 1)
        for all_found, boxes in zip(self._found(answers, images.shape[-2:]), targets, strict=True):
            present = boxes[boxes[:, 4] >= 0]
            counts[:, -1] += torch.bincount(present[:, 4].long(), minlength=self.config.classes).cpu()
            right = matched(all_found, present)
            judged = right | ~within(all_found, boxes[boxes[:, 4] < -1])
            found, right = Found(*(part[judged] for part in all_found)), right[judged]
            bins = (found.scores * BINS).long().clamp(max=BINS - 1)
            places = (found.labels, bins + BINS * (~right).long())
            counts.index_put_(tuple(p.cpu() for p in places), torch.ones(len(right)), accumulate=True)
        return self._loss(answers, targets), counts.flatten()

    def metrics(self, sums: list[float]) -> dict[str, float]:
        """Returns the mean over the classes that occur of the average precision at an IoU of one half.

        Scores count as equal where they are in the same thousandth.
        """
        average = self.average_precisions(sums)
        seen = ~average.isnan()
        return {"ap50": average[seen].mean().item() if seen.any() else 0.0}

    def average_precisions(self, sums: list[float]) -> Tensor:
        """Returns the average precision of each class, NaN where there is no object of it."""
        counts = torch.tensor(sums, dtype=torch.float64).view(self.config.classes, -1)
        right, wrong = (counts[:, i * BINS : (i + 1) * BINS].flip(1).cumsum(1) for i in range(2))
        objects = counts[:, -1]
        recall = right / objects[:, None].clamp(min=1)
        precision = right / (right + wrong).clamp(min=1)
        best = precision.flip(1).cummax(1).values.flip(1)  # of all thresholds that find as much
        steps = recall.diff(dim=1, prepend=torch.zeros(len(recall), 1, dtype=recall.dtype))
        return (best * steps).sum(1).where(objects > 0, torch.nan)


def assign(points: Tensor, strides: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Says what each point shall learn.

    A point learns an object if it is in its box, near its middle, and on the level for its size: the smallest
    one where there are several.

    Args:
        points: (P, 2).
        strides: (P,).
        boxes: (M, 5); a label below 0 stands for no object.

    Returns:
        Labels (P,) int64, -1 for none, and distances (P, 4) to the sides.
    """
    boxes = boxes[boxes[:, 4] >= 0]
    if not len(boxes):
        return torch.full_like(strides, -1, dtype=torch.int64), points.new_zeros(len(points), 4)
    before, behind = points[:, None] - boxes[:, :2], boxes[:, 2:4] - points[:, None]  # (P, M, 2)
    distances = torch.cat((before, behind), -1)
    middle = (boxes[:, :2] + boxes[:, 2:4]) / 2
    near = ((points[:, None] - middle).abs() <= RADIUS * strides[:, None, None]).all(-1)
    farthest = distances.amax(-1)
    least = torch.where(strides == strides.min(), 0.0, strides * REACH / 2)[:, None]
    most = torch.where(strides == strides.max(), torch.inf, strides * REACH)[:, None]
    fits = (distances.amin(-1) > 0) & near & (farthest > least) & (farthest <= most)
    areas = (boxes[:, 2:4] - boxes[:, :2]).prod(-1)
    smallest, chosen = torch.where(fits, areas, torch.inf).min(1)
    labels = torch.where(smallest < torch.inf, boxes[chosen, 4].long(), -1)
    return labels, distances[torch.arange(len(points)), chosen]


def centerness(distances: Tensor) -> Tensor:
    """1 in the middle of a box and 0 at its sides, of distances (N, 4); FCOS, equation 3."""
    left, upper, right, lower = distances.unbind(-1)
    across = torch.minimum(left, right) / torch.maximum(left, right)
    along = torch.minimum(upper, lower) / torch.maximum(upper, lower)
    return (across * along).sqrt()


def focal(logits: Tensor, wanted: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """The focal loss of each logit: what is right already counts little (Lin et al., 2017, equation 5)."""
    loss = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    probability = logits.sigmoid()
    right = torch.where(wanted > 0, probability, 1 - probability)
    return torch.where(wanted > 0, alpha, 1 - alpha) * (1 - right) ** gamma * loss


def generalised_iou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of boxes a (N, 4) with their partners b (N, 4), -1 to 1 (Rezatofighi et al., 2019)."""
    inner = torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])
    outer = torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])
    shared, hull = inner.clamp(min=0).prod(-1), outer.prod(-1).clamp(min=1e-9)
    union = (a[:, 2:] - a[:, :2]).prod(-1) + (b[:, 2:] - b[:, :2]).prod(-1) - shared
    return shared / union.clamp(min=1e-9) - (hull - union) / hull


def matched(found: Found, present: Tensor, threshold: float = 0.5) -> Tensor:
    """Tells which detections are right: the surest first take each object of their class at most once.

    Args:
        found: sorted by score.
        present: (M, 5) the objects that are there.
        threshold: the least IoU.

    Returns:
        (N,) bool.
    """
    overlaps = iou(found.boxes, present[:, :4])
    overlaps = torch.where(found.labels[:, None] == present[:, 4].long(), overlaps, -1.0)
    right = torch.zeros(len(found.scores), dtype=torch.bool, device=overlaps.device)
    if not len(present):
        return right
    for place in range(len(right)):
        overlap, chosen = overlaps[place].max(0)
        if overlap >= threshold:
            right[place] = True
            overlaps[:, chosen] = -1.0
    return right


def within(found: Found, crowds: Tensor) -> Tensor:
    """Tells of which detections more than half lies in one of boxes (M, 5) with labels -2 - label: (N,)."""
    corners = (
        torch.maximum(found.boxes[:, None, :2], crowds[:, :2]),
        torch.minimum(found.boxes[:, None, 2:], crowds[:, 2:4]),
    )
    shared = (corners[1] - corners[0]).clamp(min=0).prod(-1)
    areas = (found.boxes[:, 2:] - found.boxes[:, :2]).prod(-1)
    inside = shared > areas[:, None] / 2
    return (inside & (found.labels[:, None] == -2 - crowds[:, 4].long())).any(1)
