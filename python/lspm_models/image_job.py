"""Images for the training scripts: a ResNet that learns their classes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from lspm_models.checkpoint import copy_weights, described, read_state, read_tensors, refuse_mismatch
from lspm_models.data.image_config import ImageConfig, ImageFormat, load_format
from lspm_models.data.images import ImageData, prepare_images
from lspm_models.fit_config import FitConfig
from lspm_models.models.resnet import NAMED, ResNet, ResNetConfig
from lspm_models.options import Parser, option
from lspm_models.progress import counted
from lspm_models.run_folder import find_checkpoint
from lspm_models.scripts import Run
from lspm_models.tasks.classification import Classification, from_torchvision

MODELS = tuple(NAMED)
STEMS = {
    "7x7": {},
    "3x3": {"stem": 3, "stem_stride": 1, "stem_pool": False},
    "3x3/2": {"stem": 3, "stem_stride": 2, "stem_pool": False},
}
STEM_HELP = "7x7 with a pool, for photos; 3x3 for small images; 3x3/2, of stride 2, for those between"
# The means and deviations that every ResNet trained on ImageNet for torchvision has seen.
IMAGENET = ImageFormat((), 3, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

PRETRAINING = """\
Train a ResNet to tell classes of images apart. Without any option it learns Fashion-MNIST, from a package.
The run folder gets images.json, checkpoints, log.csv, loss.png and TensorBoard events, and at the end
confusion.png and mistakes.png; Ctrl-C saves first. In brackets stands what holds without the option."""

FINE_TUNING = """\
Fine-tune a ResNet on other images: the same loop as pretrain.py, beginning with the weights of a run or of a
safetensors file with torchvision's names. Where the classes are others, the head is new. In brackets stands
what holds without the option."""


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a ResNet but for what the images bring."""

    model: str = option("resnet18", ", ".join(MODELS))
    width: int = option(64, "features of the first stage")
    stem: str = option("7x7", STEM_HELP, choices=tuple(STEMS))
    zero_init_residual: bool = option(False, "every block begins as the identity")
    freeze: int = option(0, "keep the stem and so many stages less one as they are: 0 none, 5 all")

    def __post_init__(self) -> None:
        if self.model not in NAMED:
            raise ValueError(f"model: name must be one of {', '.join(MODELS)}, got {self.model!r}")
        if self.stem not in STEMS:
            raise ValueError(f"model: stem must be one of {', '.join(STEMS)}, got {self.stem!r}")
        if not 0 <= self.freeze <= 5:
            raise ValueError(f"model: freeze must be 0 to 5, got {self.freeze}")
        self.for_images(1)  # the shape checks its own rules

    def for_images(self, channels: int) -> ResNetConfig:
        """Returns the whole shape."""
        return replace(
            NAMED[self.model],
            channels=channels,
            width=self.width,
            zero_init_residual=self.zero_init_residual,
            **STEMS[self.stem],
        )


class ImageJob:
    """See Job."""

    sections = {"model": ModelConfig, "data": ImageConfig, "training": FitConfig}  # noqa: RUF012
    defaults = {  # noqa: RUF012
        "training": {
            "batch_size": 128,
            "learning_rate": 4e-3,
            "final_learning_rate": 0.0,
            "weight_decay": 0.05,
        }
    }
    fine_tuning_rate = {"learning_rate": 5e-4}  # noqa: RUF012
    pretraining = (
        PRETRAINING,
        (
            "pretrain.py --config python/configs/resnet18_fashion.toml --out runs/fashion",
            "pretrain.py --model resnet50 --data photos/ --size 160 --crop 16 --flip",
            "pretrain.py --resume runs/fashion --steps 10000",
        ),
    )
    fine_tuning = (
        FINE_TUNING,
        (
            "finetune.py --init runs/fashion --data mnist_5k --freeze 3 --out runs/digits",
            "finetune.py --model resnet50 --init resnet50.safetensors --data photos/ --freeze 4",
            "finetune.py --resume runs/digits",
        ),
    )
    init_help = "run folder, one checkpoint in it, or a safetensors file with torchvision's names"

    def add_options(self, parser: Parser, *, fine_tuning: bool = False) -> None:
        defaults = self.defaults["training"] | (self.fine_tuning_rate if fine_tuning else {})
        parser.add_config("model", ModelConfig, skip=() if fine_tuning else ("freeze",))
        parser.add_config("images", ImageConfig)
        parser.add_config("training", FitConfig, defaults)

    def prepare(self, run: Run) -> tuple[Classification, ImageData]:
        with run.processes.first_before_others():
            begun = run.init is None or (run.folder / "images.json").exists()
            like = None if begun else format_of(Path(run.init))
            training, held_out, look = prepare_images(run.data, run.folder, run.report, like)
        torch.manual_seed(run.training.seed)
        task = make_task(run.model, look, label_smoothing=run.data.label_smoothing)
        data = ImageData(
            training,
            held_out,
            look,
            run.data,
            run.training.batch_size,
            validation_batches=run.training.evaluation_batches,
            seed=run.training.seed,
            process=run.processes.rank,
            processes=run.processes.count,
            report=run.report,
        )
        return task, data

    def find(self, init: str) -> Path:
        return Path(init).resolve() if Path(init).is_file() else find_checkpoint(init).resolve()

    def fine_tuning_defaults(self, init: Path) -> dict[str, dict]:
        model = {} if init.is_file() else _shape_of(init)
        return {"model": {**model, "freeze": 0}, "training": self.fine_tuning_rate}

    def adopt(self, run: Run, init: Path) -> None:
        if not init.is_file():
            free = {"model.freeze", "model.zero_init_residual"}
            refuse_mismatch({"model": _shape_of(init)}, {"model": asdict(run.model)}, str(init), free)
        channels = format_of(init).channels
        if run.data.channels not in (None, channels):
            raise ValueError(f"data: channels must be {channels} as in {init}, got {run.data.channels}")

    def load(self, run: Run, init: Path, task: Classification) -> None:
        if init.is_file():
            stored = from_torchvision(read_tensors(init))
        else:
            stored = read_tensors(init / "model.safetensors")
        if format_of(init).classes != load_format(run.folder / "images.json").classes:
            stored |= {f"fc.{name}": tensor for name, tensor in task.fc.state_dict().items()}
            run.report(f"head       a new one, for {counted(task.fc.out_features, 'class')}")
        copy_weights(stored, task, init)

    def settings(self, run: Run, task: Classification) -> dict:
        return {**asdict(run.model), "channels": task.config.channels, "classes": task.fc.out_features}

    def shape(self, task: Classification) -> str:
        shape = task.config
        blocks = counted(sum(shape.layers), f"{shape.block} block")
        classes = counted(task.fc.out_features, "class")
        return f"{blocks}, {shape.width} to {shape.features[-1]} features, {classes}"

    def finish(self, run: Run, task: Classification, data: ImageData) -> None:
        from lspm_models.image_outputs import report_classes

        if run.processes.first and len(data.held_out.images):
            report_classes(task, data, run.folder, run.report)
            run.report(f"try it     python python/predict.py {run.quoted} image.png")


def make_task(model: ModelConfig, look: ImageFormat, *, label_smoothing: float = 0.0) -> Classification:
    """Makes a classifier for images of a format."""
    net = ResNet(model.for_images(look.channels))
    return Classification(net, len(look.classes), label_smoothing=label_smoothing, frozen=model.freeze)


def load_image_model(
    folder: str | Path, device: str | torch.device = "cpu"
) -> tuple[Classification, ImageFormat]:
    """Loads a trained classifier with the format of its images.

    Args:
        folder: a run folder, whose newest checkpoint is taken, or one checkpoint in it.
        device: where the model shall be.

    Returns:
        The task, in eval mode, and the format.

    Raises:
        ValueError: there is no checkpoint, or its parts do not fit each other.
    """
    path = find_checkpoint(folder)
    look = format_of(path.resolve())
    task = make_task(ModelConfig(**_shape_of(path)), look)
    copy_weights(read_tensors(path / "model.safetensors"), task, path)
    return task.to(device).eval(), look


def format_of(init: Path) -> ImageFormat:
    """Returns the format of the images that weights were trained on: a file's are ImageNet's."""
    return IMAGENET if init.is_file() else load_format(init.parents[1] / "images.json")


def _shape_of(path: Path) -> dict:
    content = read_state(path).get("settings", {}).get("model")
    try:
        return asdict(ModelConfig(**{name: content[name] for name in asdict(ModelConfig())}))
    except (KeyError, TypeError) as error:
        got = described(content, MODELS)
        raise ValueError(f"checkpoint: {path} must hold the config of a ResNet, got {got}") from error
