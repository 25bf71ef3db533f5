"""Mutations of the model layer for images."""

from mutations import Mutation

MODELS = "python/lspm_models"


def tests(name, words):
    return (f"tests/models/test_{name}.py", "-k", words)


MUTATIONS = [
    Mutation(
        "images: the residual is not added",
        f"{MODELS}/models/vision_layers.py",
        "residual=residual,",
        "residual=None,",
        tests("resnet", "one_call"),
    ),
    Mutation(
        "images: batches are not counted by the norm",
        f"{MODELS}/models/vision_layers.py",
        "num_batches_tracked.add_(1)",
        "num_batches_tracked.add_(0)",
        tests("resnet", "one_call"),
    ),
    Mutation(
        "images: the stride of the stem's pool is forgotten",
        f"{MODELS}/models/resnet.py",
        "first = self.stem_stride * (2 if self.stem_pool else 1)",
        "first = self.stem_stride",
        tests("resnet", "features"),
    ),
    Mutation(
        "images: frozen norms keep learning",
        f"{MODELS}/tasks/classification.py",
        "            module.eval()",
        "            module.train()",
        tests("classification", "replaces_the_head"),
    ),
    Mutation(
        "images: another seed after a resume",
        f"{MODELS}/data/images.py",
        'self._drawn, self._seed, self._epoch = state["drawn"], state["seed"], -1',
        'self._drawn, self._epoch = state["drawn"], -1',
        tests("images", "to_the_bit"),
    ),
    Mutation(
        "images: the order of the first epoch in all",
        f"{MODELS}/data/images.py",
        "default_rng([self._seed, epoch])",
        "default_rng([self._seed, 0])",
        tests("images", "epoch"),
    ),
    Mutation(
        "images: classes are set aside unevenly",
        f"{MODELS}/data/images.py",
        'by_class = np.argsort(images.labels, kind="stable")',
        "by_class = np.arange(len(images.labels))",
        tests("images", "share_of_every_class"),
    ),
    Mutation(
        "images: labels that disagree are not noticed",
        f"{MODELS}/data/image_formats.py",
        "if promised != labels_promised:",
        "if promised < labels_promised:",
        tests("image_files", "disagree"),
    ),
    Mutation(
        "images: CIFAR-100's coarse labels",
        f"{MODELS}/data/image_formats.py",
        "rows[:, labels - 1]",
        "rows[:, 0]",
        tests("image_files", "cifar"),
    ),
    Mutation(
        "images: metrics of the last batch only",
        f"{MODELS}/train.py",
        "sums = measured if sums is None else sums + measured",
        "sums = measured",
        tests("classification", "learns"),
    ),
    Mutation(
        "images: predicted classes in the rows",
        f"{MODELS}/image_outputs.py",
        "labels * classes + predicted",
        "predicted * classes + labels",
        tests("classification", "confusion"),
    ),
    Mutation(
        "images: the union counts what is shared twice",
        f"{MODELS}/tasks/segmentation.py",
        "counts.sum(1) - right)",
        "counts.sum(1))",
        tests("segmentation", "mean_iou"),
    ),
    Mutation(
        "images: VOC's corners counted from zero",
        f"{MODELS}/data/annotations.py",
        "(corners[0] - 1, corners[1] - 1, corners[2], corners[3])",
        "(corners[0], corners[1], corners[2], corners[3])",
        tests("annotations", "voc"),
    ),
    Mutation(
        "images: run lengths along the rows",
        f"{MODELS}/data/annotations.py",
        "inside.reshape(width, height).T",
        "inside.reshape(height, width)",
        tests("annotations", "run_lengths"),
    ),
    Mutation(
        "images: one object found twice",
        f"{MODELS}/tasks/detection.py",
        "overlaps[:, chosen] = -1.0",
        "overlaps[place, chosen] = -1.0",
        tests("detection", "found_once"),
    ),
    Mutation(
        "images: suppression across classes",
        f"{MODELS}/models/detector.py",
        " & (labels[order][:, None] == labels[order])",
        "",
        tests("detection", "suppression"),
    ),
    Mutation(
        "images: an object hides another",
        f"{MODELS}/data/synthetic.py",
        "if all(apart):",
        "if any(apart) or not boxes:",
        tests("segmentation", "exact"),
    ),
]
