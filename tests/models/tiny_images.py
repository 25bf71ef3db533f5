"""Twelve images of six by six pixels and three classes, and how they become an IDX file."""

import gzip

import numpy as np

PIXELS = np.random.default_rng(0).integers(256, size=(12, 1, 6, 6), dtype=np.uint8)
LABELS = np.arange(12) % 3


def idx(values):
    header = bytes((0, 0, 8, values.ndim)) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    return header + values.astype(np.uint8).tobytes()


def write_idx(folder, pixels=PIXELS, labels=LABELS, part="train", packed=True):
    folder.mkdir(exist_ok=True)
    for name, values in (("images-idx3", pixels[:, 0]), ("labels-idx1", labels)):
        content = idx(values)
        path = folder / f"{part}-{name}-ubyte{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(content) if packed else content)
    return folder / f"{part}-images-idx3-ubyte{'.gz' if packed else ''}"
