"""Scenes with bars that stand and bars that lie, and a backbone that is trained in seconds."""

import json

import numpy as np
from PIL import Image

from lspm_models.data.image_formats import Images
from lspm_models.data.scenes import SceneData
from lspm_models.data.synthetic import Scenes
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


OBJECT = """<object><name>{}</name><difficult>{}</difficult>
<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"""
NAMES = ("lies", "stands")


def write_voc(folder, count=10, size=48):
    """Writes scenes as VOC has them, with masks, and returns them."""
    for name in ("Annotations", "JPEGImages", "SegmentationClass"):
        (folder / name).mkdir(parents=True)
    scenes = [Scenes(bars(), size, most=2).scene(number) for number in range(count)]
    for number, (pixels, mask, boxes) in enumerate(scenes):
        Image.fromarray(pixels.transpose(1, 2, 0).copy()).save(folder / f"JPEGImages/{number}.png")
        Image.fromarray(mask).save(folder / f"SegmentationClass/{number}.png")
        objects = [
            OBJECT.format(NAMES[label], 0, x0 + 1, y0 + 1, x1, y1)
            for x0, y0, x1, y1, label in boxes.astype(int)
        ]
        sides = f"<size><width>{size}</width><height>{size}</height></size>"
        text = f"<annotation><filename>{number}.png</filename>{sides}{''.join(objects)}</annotation>"
        (folder / f"Annotations/{number}.xml").write_text(text)
    return scenes


def write_coco(folder, count=10, size=48):
    """Writes scenes as COCO has them, with run lengths for masks, and returns them."""
    folder.mkdir()
    scenes = [Scenes(bars(), size, most=2).scene(number) for number in range(count)]
    images, annotations = [], []
    for number, (pixels, mask, boxes) in enumerate(scenes):
        Image.fromarray(pixels.transpose(1, 2, 0).copy()).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": size, "height": size})
        for x0, y0, x1, y1, label in boxes.astype(int).tolist():
            inside = np.zeros_like(mask)
            inside[y0:y1, x0:x1] = mask[y0:y1, x0:x1] > 0
            column = np.concatenate(([0], inside.T.ravel(), [2]))
            edges = np.flatnonzero(np.diff(column))
            code = {"size": [size, size], "counts": np.diff(np.concatenate(([0], edges))).tolist()}
            annotation = {"image_id": number, "category_id": label, "bbox": [x0, y0, x1 - x0, y1 - y0]}
            annotations.append({**annotation, "segmentation": code})
    categories = [{"id": label, "name": name} for label, name in enumerate(NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "all.json").write_text(json.dumps(content))
    return scenes
