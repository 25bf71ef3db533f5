"""Scenes with bars that stand and bars that lie, and a backbone that is trained in seconds."""

import numpy as np

from lspm_models.data.image_formats import Images
from lspm_models.data.synthetic import SceneData, Scenes
from lspm_models.models.resnet import ResNetConfig

BACKBONE = ResNetConfig(layers=(1, 1, 1, 1), width=8, stem=3, stem_stride=2, stem_pool=False)


def bars(kinds=2):
    """Bars of several lengths, bright on black; of one kind they all lie."""
    pixels = np.zeros((12, 1, 16, 16), np.uint8)
    for index in range(12):
        long = slice(1, 10 + index // 2)
        pixels[index, 0][(long, slice(4, 8)) if index % kinds else (slice(4, 8), long)] = 255
    return Images(np.arange(12) % kinds, pixels)


def scene_data(target, batch_size=8, kinds=2, **options):
    """Scenes of 48 by 48 pixels with at most two bars."""
    images = bars(kinds)
    scenes = [Scenes(images, 48, most=2, seed=seed) for seed in range(2)]
    return SceneData(*scenes, target, batch_size, **options)
