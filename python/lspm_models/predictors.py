"""From a trained run to what it says of an image file or of a text; and the options of predict.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lspm_models.checkpoint import described
from lspm_models.data.image_files import decode
from lspm_models.image_job import MODELS, load_image_model
from lspm_models.image_outputs import most_probable
from lspm_models.progress import counted
from lspm_models.run_folder import find_checkpoint
from lspm_models.scene_job import JOBS, load_scene_model, model_of
from lspm_models.sequence_models import load_sequence_model, task_of


@dataclass(frozen=True)
class Output:
    """What shall be said and drawn."""

    top: int = field(default=5, metadata={"help": "classes, or tokens of a BERT, at most"})
    score: float = field(default=0.4, metadata={"help": "the least of a box, of a detector"})
    pictures: str | None = field(
        default=None,
        metadata={
            "help": "folder for what a U-Net or a detector draws",
            "default": "predictions in the run folder",
            "metavar": "FOLDER",
        },
    )

    text: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "texts, with [MASK] where a BERT shall say what stands there; "
            "of a classifier or with --question - reads the lines of standard input",
            "default": "none",
        },
    )
    question: str | None = field(
        default=None,
        metadata={"help": "what to ask of each --text", "default": "none", "metavar": "TEXT"},
    )
    similarity: bool = field(
        default=False, metadata={"help": "say how near --text lie to each other, by a BERT's mean features"}
    )

    def __post_init__(self) -> None:
        if self.similarity and not self.text:
            raise ValueError("output: similarity must be beside text, got none")
        if self.question is not None and not self.text:
            raise ValueError(f"output: question must be beside text, got {self.question!r} alone")
        if self.top < 1:
            raise ValueError(f"output: top must be at least 1, got {self.top}")
        if not 0 <= self.score <= 1:
            raise ValueError(f"output: score must be between 0 and 1, got {self.score}")


def load_predictor(folder: str | Path, device: str | torch.device, output: Output) -> Callable[[str], str]:
    """Loads a run's model.

    Args:
        folder: a run folder, whose newest checkpoint is taken, or one checkpoint in it.
        device: where the model shall be.
        output: what shall be said.

    Returns:
        A function that says what is on an image file, whose name it takes, or of a text; that of a U-Net or a
        detector writes a picture besides, and says where. It raises ValueError where the file cannot be read
        or the text is empty.

    Raises:
        ValueError: there is no checkpoint, or its parts do not fit each other.
    """
    path = find_checkpoint(folder)
    if task_of(path):
        return _of_texts(path, device, output)
    if model_of(path).get("model") in JOBS:
        pictures = Path(output.pictures or path.resolve().parents[1] / "predictions")
        return _of_scenes(path, device, output.score, pictures)
    if (content := model_of(path)).get("model") not in MODELS:
        rule = f"predict: model must see images, or have --text, got {described(content, MODELS)} in {folder}"
        raise ValueError(rule)
    task, look = load_image_model(path, device)

    @torch.no_grad()
    def classes(file: str) -> str:
        pixels = torch.from_numpy(decode(Path(file), look.channels, look.size).copy())
        logits = task(look.normalised(pixels[None]).to(device))
        return _probable(most_probable(logits, look.classes, output.top)[0])

    return classes


def _probable(found: list[tuple[str, float]]) -> str:
    return "  ".join(f"{label} {probability:.1%}" for label, probability in found)


def _of_texts(path: Path, device: str | torch.device, output: Output) -> Callable[[str], str]:
    from lspm_models.sequence_outputs import answer, classify

    if not output.text:
        raise ValueError("output: text must be given, since the model reads texts, got none")
    task, tokenizer, head = load_sequence_model(path, device)
    if "labels" in head:
        if output.question is not None:
            raise ValueError(f"output: question must be absent of a classifier, got {output.question!r}")

        def classified(text: str) -> str:
            found, cut = classify(task, tokenizer, head["labels"], text, output.top)
            return _probable(found) + (f"   (without its last {counted(cut, 'token')})" if cut else "")

        return classified
    if output.question is None:
        raise ValueError("output: question must be given, since the model answers questions, got none")

    def answered(text: str) -> str:
        found, probability = answer(task, tokenizer, head, output.question, text)
        return f"{found or '(no answer)'} {probability:.1%}"

    return answered


def _of_scenes(path: Path, device: str | torch.device, score: float, pictures: Path) -> Callable[[str], str]:
    from lspm_models.data.drawn import BROKEN
    from lspm_models.data.image_files import reason
    from lspm_models.pictures import save
    from lspm_models.scene_outputs import look_at

    task, look = load_scene_model(path, device)
    written: set[Path] = set()

    def scene(name: str) -> str:
        file = Path(name)
        try:
            words, picture = look_at(task, look, file, score)
        except BROKEN as error:
            raise ValueError(reason(error, file)) from error
        pictures.mkdir(parents=True, exist_ok=True)
        target, more = pictures / f"{file.stem}.png", 1
        while target in written:  # images of two folders may have one name
            more += 1
            target = pictures / f"{file.stem}-{more}.png"
        written.add(target)
        save(picture, target)
        return f"{words}   {target}"

    return scene
