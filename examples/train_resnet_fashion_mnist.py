# %% [markdown]
# # A ResNet learns Fashion-MNIST
#
# 60,000 pictures of clothes, ten classes, and a quarter-width ResNet-18 whose convolutions, batch norms and
# optimizer are this library's, for some steps. In earnest, with 16 passes over the pictures, does it
# `python/pretrain.py --config python/configs/resnet18_fashion.toml`, which keeps the weights.

# %%
import argparse
import time
from dataclasses import replace

import numpy as np
import torch

import lspm_kernels
from lspm_models.data.image_files import Dataset, open_images
from lspm_models.data.image_formats import Images
from lspm_models.models.resnet import NAMED, ResNet
from lspm_models.tasks.classification import Classification
from lspm_models.train import parameter_groups

parser = argparse.ArgumentParser(description="Train a ResNet on Fashion-MNIST for a while.")
parser.add_argument("--steps", type=int, default=90)
parser.add_argument("--batch-size", type=int, default=128)
parser.add_argument("--width", type=int, default=16, help="features of the first stage")
parser.add_argument("--test-images", type=int, default=2000)
options = parser.parse_args()
torch.manual_seed(0)

# %% [markdown]
# The pictures come out of Debian's package `dataset-fashion-mnist`. Where that is missing, this draws
# pictures of its own, stripes in ten directions under noise, and says so: these show that it learns, and no
# more.


# %%
def stripes(count, seed):
    random = np.random.default_rng(seed)
    labels = random.integers(10, size=count)
    y, x = np.mgrid[:28, :28]
    angles = (np.pi * labels / 10)[:, None, None]
    waves = np.sin(0.9 * (x * np.cos(angles) + y * np.sin(angles)) + random.uniform(0, 6, (count, 1, 1)))
    pixels = 128 + 60 * waves + random.normal(0, 150, waves.shape)
    return Images(labels, pixels.clip(0, 255).astype(np.uint8)[:, None])


try:
    dataset = open_images("fashion-mnist")
except ValueError as error:
    print(f"{error}\nInstead, stripes in ten directions are drawn here: no clothes, and an easier task.\n")
    classes = tuple(f"{18 * number} degrees" for number in range(10))
    dataset = Dataset("stripes", stripes(20_000, 0), stripes(2_000, 1), classes)
learned, held_out = dataset.training, dataset.held_out
print(f"{dataset.name}: {len(learned):,} pictures to learn from, {len(held_out):,} to test on")

# %% [markdown]
# Pictures as the model wants them: floats of mean 0 and deviation 1, channels last in memory.

# %%
mean, deviation = learned.pixels.mean(), learned.pixels.std()


def batch(images, places):
    pixels = torch.from_numpy(images.pixels[places]).float().sub_(mean).div_(deviation)
    labels = torch.from_numpy(images.labels[places]).long()
    return pixels.contiguous(memory_format=torch.channels_last), labels


shape = replace(NAMED["resnet18"], channels=1, width=options.width, stem=3, stem_stride=1, stem_pool=False)
task = Classification(ResNet(shape), len(dataset.classes), label_smoothing=0.05)
task = task.to(memory_format=torch.channels_last)
groups = parameter_groups(task, weight_decay=0.05)
optimizer = lspm_kernels.AdamW(groups, lr=4e-3, clip_norm=1.0)  # which clips as it reads the gradients
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=options.steps)
print(f"a ResNet-18 of {sum(p.numel() for p in task.parameters()):,} parameters")

# %%
random, began = np.random.default_rng(0), time.perf_counter()
for step in range(1, options.steps + 1):
    images, labels = batch(learned, random.integers(len(learned), size=options.batch_size))
    loss = task.loss(images, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    if step % max(options.steps // 6, 1) == 0:
        speed = step * options.batch_size / (time.perf_counter() - began)
        print(f"step {step:4d}   loss {loss.item():.3f}   {speed:,.0f} images/s")

# %% [markdown]
# How many of the pictures that were set aside are named rightly, and which classes are hardest.

# %%
task.eval()
places = random.permutation(len(held_out))[: options.test_images]
with torch.no_grad():
    parts = np.array_split(places, 8)
    found = torch.cat([task(batch(held_out, part)[0]).argmax(1) for part in parts])
labels = held_out.labels[places]
right = found.numpy() == labels
print(f"right: {right.mean():.1%} of {len(right):,} pictures that were set aside")
numbered = [(name, labels == number) for number, name in enumerate(dataset.classes)]
by_class = {name: right[of_class].mean() for name, of_class in numbered if of_class.any()}
for name in sorted(by_class, key=by_class.get)[:3]:
    print(f"hardest: {name:12s} {by_class[name]:.0%}")
