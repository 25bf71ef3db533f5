"""Scenes for the training scripts: a U-Net that learns pixels, a detector that learns boxes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import nn

from lspm_models.checkpoint import copy_weights, described, read_state, read_tensors, refuse_mismatch
from lspm_models.data.image_config import ImageFormat, load_format
from lspm_models.data.scene_config import SceneConfig
from lspm_models.data.scenes import NO_FORMAT, SceneData, prepare_scenes
from lspm_models.fit_config import FitConfig
from lspm_models.image_job import STEM_HELP, STEMS, format_of
from lspm_models.models.detector import Detector, DetectorConfig
from lspm_models.models.resnet import NAMED, ResNetConfig
from lspm_models.models.unet import UNet, UNetConfig
from lspm_models.options import Parser, option
from lspm_models.progress import counted
from lspm_models.run_folder import find_checkpoint
from lspm_models.scripts import Run
from lspm_models.tasks.detection import Detection
from lspm_models.tasks.segmentation import Segmentation

PRETRAINING = """\
Train a {what}, on a ResNet. Without any option it learns digits
pasted on textures, out of a package. Your own: a folder with Pascal VOC's XML, or COCO's JSON. The run folder
gets images.json, checkpoints, log.csv, loss.png and TensorBoard events, and at the end classes.csv and
found.png; Ctrl-C saves first. In brackets stands what holds without the option."""

FINE_TUNING = """\
Fine-tune a {what}, on other images: the same loop as pretrain.py.
It begins with the weights of such a run, or those of a ResNet for its backbone: a run, or a safetensors file
with torchvision's names. In brackets stands what holds without the option."""


@dataclass(frozen=True)
class BackboneConfig:
    """The shape of the ResNet below a U-Net or a detector."""

    model: str = option("unet", "unet, or detector, which has other options")
    backbone: str = option("resnet18", ", ".join(NAMED))
    width: int = option(64, "features of the ResNet's first stage")
    stem: str = option("7x7", STEM_HELP, choices=tuple(STEMS))

    def __post_init__(self) -> None:
        if self.backbone not in NAMED:
            raise ValueError(f"model: backbone must be one of {', '.join(NAMED)}, got {self.backbone!r}")
        if self.stem not in STEMS:
            raise ValueError(f"model: stem must be one of {', '.join(STEMS)}, got {self.stem!r}")
        self.task(1)  # the shape checks its own rules

    @property
    def resnet(self) -> ResNetConfig:
        """The whole shape of the ResNet."""
        return replace(NAMED[self.backbone], width=self.width, **STEMS[self.stem])

    def task(self, classes: int) -> Segmentation | Detection:
        """Makes the task, with random weights."""
        raise NotImplementedError


@dataclass(frozen=True)
class UNetOptions(BackboneConfig):
    """The shape of a U-Net."""

    features: int = option(32, "of every pixel; coarser levels have up to eight times as many")

    def task(self, classes: int) -> Segmentation:
        """Makes the task, with random weights; a pixel may also be background."""
        return Segmentation(UNet(UNetConfig(self.resnet, self.features)), 1 + classes)


@dataclass(frozen=True)
class DetectorOptions(BackboneConfig):
    """The shape of a detector."""

    model: str = option("detector", "detector, or unet, which has other options")
    features: int = option(64, "of every level of the pyramid")
    levels: int = option(3, "of the pyramid, 1 to 4: the coarsest of the ResNet")
    convolutions: int = option(2, "of each of the two heads")

    def task(self, classes: int) -> Detection:
        """Makes the task, with random weights."""
        shape = DetectorConfig(classes, self.resnet, self.features, self.levels, self.convolutions)
        return Detection(Detector(shape))


@dataclass(frozen=True)
class SceneJob:
    """See Job.

    Args:
        name: of the model.
        options: its config class.
        target: what SceneData gives it.
        head: how the names of the weights begin that depend on the classes.
        what: the model in words.
    """

    name: str
    options: type[BackboneConfig]
    target: str
    head: str
    what: str
    defaults: dict[str, dict] = field(
        default_factory=lambda: {
            "training": {"learning_rate": 4e-3, "final_learning_rate": 0.0, "weight_decay": 0.05}
        }
    )
    init_help = "run folder or one checkpoint in it, or a safetensors file with torchvision's names"
    fine_tuning_rate = {"learning_rate": 1e-3}  # noqa: RUF012

    @property
    def sections(self) -> dict[str, type]:
        """The config classes."""
        return {"model": self.options, "data": SceneConfig, "training": FitConfig}

    @property
    def pretraining(self) -> tuple[str, tuple[str, ...]]:
        """Description and examples of pretrain.py."""
        return PRETRAINING.format(what=self.what), (
            f"pretrain.py --config python/configs/{self.name}_digits.toml --out runs/{self.name}",
            f"pretrain.py --model {self.name} --data photos/annotations.json --images photos/ --flip",
            f"pretrain.py --resume runs/{self.name} --steps 5000",
        )

    @property
    def fine_tuning(self) -> tuple[str, tuple[str, ...]]:
        """Description and examples of finetune.py."""
        return FINE_TUNING.format(what=self.what), (
            f"finetune.py --model {self.name} --init resnet18.safetensors --data VOC2012/ --flip",
            f"finetune.py --init runs/{self.name} --data photos/annotations.json --out runs/photos",
            "finetune.py --resume runs/photos",
        )

    def add_options(self, parser: Parser, *, fine_tuning: bool = False) -> None:
        defaults = self.defaults["training"] | (self.fine_tuning_rate if fine_tuning else {})
        parser.add_config("model", self.options)
        parser.add_config("scenes", SceneConfig)
        parser.add_config("training", FitConfig, defaults)

    def prepare(self, run: Run) -> tuple[nn.Module, SceneData]:
        with run.processes.first_before_others():
            begun = run.init is None or (run.folder / "images.json").exists()
            like = NO_FORMAT if begun else format_of(Path(run.init))
            training, held_out, count, look = prepare_scenes(
                run.data, self.target, run.folder, run.report, like, seed=run.training.seed
            )
        torch.manual_seed(run.training.seed)
        data = SceneData(
            training,
            held_out,
            self.target,
            run.training.batch_size,
            look=look,
            validation_batches=run.training.evaluation_batches,
            set_aside=count,
            process=run.processes.rank,
            processes=run.processes.count,
        )
        return run.model.task(len(look.classes)), data

    def find(self, init: str) -> Path:
        return Path(init).resolve() if Path(init).is_file() else find_checkpoint(init).resolve()

    def fine_tuning_defaults(self, init: Path) -> dict[str, dict]:
        return {"model": self._shape_in(init), "training": self.fine_tuning_rate}

    def adopt(self, run: Run, init: Path) -> None:
        shape = self._shape_in(init)
        wanted = {name: value for name, value in asdict(run.model).items() if name in shape}
        refuse_mismatch({"model": shape}, {"model": wanted}, str(init))
        if (channels := format_of(init).channels) != 3:
            raise ValueError(f"checkpoint: {init} must be of images in colours, 3 channels, got {channels}")

    def load(self, run: Run, init: Path, task: nn.Module) -> None:
        stored = read_tensors(init / "model.safetensors" if init.is_dir() else init)
        fresh, new = task.state_dict(), ""
        if "model" not in self._shape_in(init):
            weights = {name.removeprefix("model."): tensor for name, tensor in stored.items()}
            stored = {f"model.backbone.{name}": weights[name] for name in weights if name[:3] != "fc."}
            fresh = {name: fresh[name] for name in fresh if not name.startswith("model.backbone.")}
            new = "; all above the backbone is new"
        elif (classes := load_format(run.folder / "images.json").classes) != format_of(init).classes:
            fresh = {name: fresh[name] for name in fresh if name.startswith(self.head)}
            new = f"; the head is new, for {counted(len(classes), 'class')}"
        else:
            fresh = {}
        copy_weights(stored | fresh, task, init)
        run.report(f"weights    from {init}{new}")

    def settings(self, run: Run, task: nn.Module) -> dict:
        return {**asdict(run.model), "classes": len(load_format(run.folder / "images.json").classes)}

    def shape(self, task: nn.Module) -> str:
        shape = task.config.backbone
        blocks = counted(sum(shape.layers), f"{shape.block} block")
        features = f"{shape.width} to {shape.features[-1]} features"
        return f"{blocks}, {features}, below a {self.name} of {task.config.width}"

    def finish(self, run: Run, task: nn.Module, data: SceneData) -> None:
        from lspm_models.scene_outputs import report_scenes

        if run.processes.first:
            report_scenes(task, data, run.folder, run.report)
            run.report(f"try it     python python/predict.py {run.quoted} image.png")

    def _shape_in(self, init: Path) -> dict:
        """Returns the options of the model that weights bring: all, those of a ResNet, or of a file none."""
        if init.is_file():
            return {}
        content = model_of(init)
        if content.get("model") in NAMED:
            return {"backbone": content["model"], "width": content["width"], "stem": content["stem"]}
        return asdict(self.options_in(init))

    def options_in(self, path: Path) -> BackboneConfig:
        """Returns the options of the model in a checkpoint.

        Raises:
            ValueError: it is another model.
        """
        content = model_of(path)
        try:
            if content["model"] != self.name:
                raise KeyError
            return self.options(**{item.name: content[item.name] for item in fields(self.options)})
        except (KeyError, TypeError) as error:
            rule = f"must hold the config of a {self.name} or of a ResNet"
            raise ValueError(f"checkpoint: {path} {rule}, got {described(content, [self.name])}") from error


JOBS = {
    "unet": SceneJob(
        "unet", UNetOptions, "mask", "head.", "U-Net to tell what every pixel of an image shows"
    ),
    "detector": SceneJob(
        "detector", DetectorOptions, "boxes", "model.classes.", "detector to find objects and their boxes"
    ),
}


def model_of(path: Path) -> dict:
    """Returns what a checkpoint says of its model."""
    content = read_state(path).get("settings", {}).get("model")
    return content if isinstance(content, dict) else {}


def load_scene_model(
    folder: str | Path, device: str | torch.device = "cpu"
) -> tuple[Segmentation | Detection, ImageFormat]:
    """Loads a trained U-Net or detector with the format of its images.

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
    job = JOBS.get(model_of(path).get("model"), JOBS["unet"])
    task = job.options_in(path).task(len(look.classes))
    copy_weights(read_tensors(path / "model.safetensors"), task, path)
    return task.to(device).eval(), look
