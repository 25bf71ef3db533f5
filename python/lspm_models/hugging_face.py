"""Checkpoints of Hugging Face's transformers, GPT-2, Llama and BERT: a folder for each.

Nothing is unpickled: a folder that has only pytorch_model.bin is refused.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lspm_models.data.mask_tokenizer import MaskTokenizer
from lspm_models.data.pretrained_tokenizer import PretrainedTokenizer
from lspm_models.data.tokenizer_folder import (
    read_folder,
    read_mask_folder,
    write_folder,
    write_mask_folder,
)
from lspm_models.data.tokenizers import ByteBpe
from lspm_models.files import replaced, write_tensors
from lspm_models.hugging_face_config import (
    Format,
    head_name,
    head_prefix,
    read_config,
    write_config,
    write_head,
)
from lspm_models.json_files import read_object
from lspm_models.language_models import Task
from lspm_models.models.bert import Bert, BertConfig
from lspm_models.pretrained import Pretrained
from lspm_models.tasks.question_answering import QuestionAnswering
from lspm_models.tasks.sequence_classification import SequenceClassification

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD = "lm_head.weight"
BERT_HEAD, BERT_BIAS = "cls.predictions.decoder.weight", "cls.predictions.bias"
# What the files of BERTs converted long ago call a norm's weight and bias.
OLD = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


class HuggingFaceFolder(Pretrained):
    """A folder with config.json and model.safetensors, or its shards and their index.

    Raises:
        ValueError: a file is missing or damaged, or the config asks for what we do not compute.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.where = str(folder)
        path = self.folder / "config.json"
        self._content = read_object(path)
        self._format, self.config = read_config(self._content, str(path))
        self._files: dict[str, tuple[Path, str]] = {}  # and what the tensor is called there
        self.shapes = {}
        for file in self._shards():
            with _opened(file) as tensors:
                for stored in tensors.keys():
                    name = _renamed(stored)
                    if name in self.shapes:
                        raise ValueError(
                            f"hugging_face: {name} must be in one shard, got a second one in {file}"
                        )
                    shape = tuple(tensors.get_slice(stored).get_shape())
                    self.shapes[name] = shape[::-1] if self._transposed(name) else shape
                    self._files[name] = file, stored
        passed_over = self._format.left_out
        self.shapes = {
            name: shape
            for name, shape in self.shapes.items()
            if not name.endswith(self._format.buffers) and not (passed_over and name.startswith(passed_over))
        }
        self._prefix = self._format.prefix
        if not any(name.startswith(self._prefix) for name in self.shapes):
            self._prefix = ""  # the model without its head
        if isinstance(self.config, BertConfig):
            pooler = f"{self._prefix}pooler.dense.weight" in self.shapes
            self.config = replace(self.config, pooler=pooler)
            self._untie(BERT_HEAD, self._prefix + self._format.table)
            self._untie("cls.predictions.decoder.bias", BERT_BIAS)
        elif self.config.tied:
            self._untie(HEAD, self._prefix + self._format.table)

    def named(self, name: str) -> str:
        return self._prefix + name.removeprefix("model.") if name.startswith("model.") else name

    def heads(self) -> Collection[str]:
        """Returns the names of what is beside the model; of a model alone there is none."""
        return [name for name in self.shapes if not name.startswith(self._prefix)]

    def read(self, name: str) -> Tensor:
        file, stored = self._files[name]
        with _opened(file) as tensors:
            tensor = tensors.get_tensor(stored)
        return tensor.t() if self._transposed(name) else tensor

    def tokenizer(self) -> PretrainedTokenizer | MaskTokenizer:
        if isinstance(self.config, BertConfig):
            return read_mask_folder(self.folder, self.config.vocabulary_size)
        return read_folder(self.folder, self._content, self.config.vocabulary_size)

    def _transposed(self, name: str) -> bool:
        return name.endswith(tuple(f".{layer}.weight" for layer in self._format.transposed))

    def _untie(self, again: str, first: str) -> None:
        """Passes over a tensor that is stored again; where it is stored there alone, it is the first."""
        if again not in self.shapes:
            return
        shape = self.shapes.pop(again)
        if first not in self.shapes:
            self.shapes[first], self._files[first] = shape, self._files[again]
        elif not torch.equal(self.read(again), self.read(first)):
            raise ValueError(
                f"hugging_face: {again} must equal {first} where tie_word_embeddings is true, "
                f"got others in {self.folder}"
            )

    def _shards(self) -> list[Path]:
        if (self.folder / ONE).exists():
            return [self.folder / ONE]
        if not (self.folder / INDEX).exists():
            pickled = "pytorch_model.bin, which is never unpickled"
            got = pickled if (self.folder / "pytorch_model.bin").exists() else "neither"
            raise ValueError(f"hugging_face: {self.folder} must hold {ONE} or {INDEX}, got {got}")
        places = read_object(self.folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise ValueError(
                f"hugging_face: weight_map of {self.folder / INDEX} must be an object, got {places!r}"
            )
        for name in places.values():
            if not isinstance(name, str) or Path(name).name != name:
                where = f"weight_map of {self.folder / INDEX}"
                raise ValueError(f"hugging_face: {where} must name files beside it, got {name!r}")
        return [self.folder / name for name in sorted(set(places.values()))]


def load_pretrained(folder: str | Path) -> Task:
    """Loads a model that transformers' save_pretrained wrote.

    Args:
        folder: with config.json (model_type gpt2, llama or bert) and model.safetensors, or shards with an
            index; of the model with its language modelling head, or, of a GPT or a Llama with a tied one, of
            the model alone. load_encoder takes a BERT without its head.

    Returns:
        The task in float32, in eval mode.

    Raises:
        ValueError: a file is missing or damaged, the config asks for what we do not compute, or tensors are
            missing, unknown or of another shape; the message names them.
    """
    return HuggingFaceFolder(folder).task()


def load_encoder(folder: str | Path) -> Bert:
    """Loads the BERT in a folder, from tokens to features, whatever heads it has; else as load_pretrained."""
    source = HuggingFaceFolder(folder)
    if not isinstance(source.config, BertConfig):
        raise ValueError(
            f"load_encoder: folder must have a BERT, got {type(source.config).__name__} in {folder}"
        )
    return source.model()


def save_pretrained(
    task: Task | Bert | SequenceClassification | QuestionAnswering,
    folder: str | Path,
    tokenizer: ByteBpe | PretrainedTokenizer | MaskTokenizer | None = None,
    *,
    shard_bytes: int | None = None,
    labels: Sequence[str] = (),
) -> None:
    """Writes a folder that transformers' from_pretrained loads, and load_pretrained, whole or not at all.

    Args:
        task: a GPT with biases, a Llama, a BERT, or one without its head.
        folder: a new one.
        tokenizer: byte-level BPE, or of a BERT what it was trained with, to be written beside it as
            tokenizer.json and tokenizer_config.json.
        shard_bytes: begin a new file where one would be larger than this; None: one file.
        labels: of a classifier, a name for each class.

    Raises:
        ValueError: the folder is there already, the GPT has no biases, the tokenizer is of another kind, or a
            classifier pools as transformers does not, or has another number of labels.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"save_pretrained: folder must be a new one, got {folder}")
    if getattr(task.config, "bias", None) is False:
        raise ValueError("save_pretrained: task must have biases, which GPT2LMHeadModel has, got bias=False")
    masked = isinstance(task.config, BertConfig)
    if masked and tokenizer is not None and not isinstance(tokenizer, MaskTokenizer):
        raise ValueError(f"save_pretrained: tokenizer must have a mask, got {tokenizer.kind}")
    if not masked and tokenizer is not None and not isinstance(tokenizer, ByteBpe | PretrainedTokenizer):
        raise ValueError(f"save_pretrained: tokenizer must be byte-level BPE, got {tokenizer.kind}")
    form, content = write_config(task.config)
    head, kind = _head(task, labels), content["model_type"]
    content |= write_head(head, kind, labels) if head else {}
    shards = _sharded(_theirs(task, form, head, kind), shard_bytes)
    with replaced(folder) as partial:
        partial.mkdir(parents=True)
        if masked and tokenizer is not None:
            content |= {"pad_token_id": tokenizer.marks.padding}
            write_mask_folder(tokenizer, partial)
        elif tokenizer is not None:
            content |= {"eos_token_id": tokenizer.end_of_text}
            write_folder(tokenizer, partial)
        content["dtype"] = str(next(task.parameters()).dtype).removeprefix("torch.")
        if isinstance(task, Bert):
            content["architectures"] = ["BertModel"]
        (partial / "config.json").write_text(json.dumps(content, indent=2) + "\n")
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        names = names if len(shards) > 1 else [ONE]
        for name, tensors in zip(names, shards, strict=True):
            write_tensors(tensors, partial / name, metadata={"format": "pt"})
        if len(shards) > 1:
            size = sum(tensor.nbytes for tensors in shards for tensor in tensors.values())
            places = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
            index = {"metadata": {"total_size": size}, "weight_map": places}
            (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _head(task: nn.Module, labels: Sequence[str]) -> str | None:
    """Returns the name of a task on whole texts; a ValueError where transformers has none like it."""
    if isinstance(task, QuestionAnswering):
        return "question_answering"
    if not isinstance(task, SequenceClassification):
        return None
    theirs = "first" if isinstance(task.config, BertConfig) else "last"
    if task.pooling != theirs:
        raise ValueError(f"save_pretrained: pooling must be {theirs} of this model, got {task.pooling}")
    if len(labels) != task.classes:
        raise ValueError(f"save_pretrained: labels must be {task.classes}, got {len(labels)}")
    return "classification"


def _theirs(task: nn.Module, form: Format, head: str | None, kind: str) -> dict[str, Tensor]:
    endings = tuple(f".{layer}.weight" for layer in form.transposed)
    prefix = head_prefix(head, kind, form.prefix) if head else form.prefix
    tensors = {}
    for name, tensor in task.state_dict().items():
        theirs = prefix + name.removeprefix("model.") if name.startswith("model.") else head_name(kind, name)
        tensors[theirs] = (tensor.t() if name.endswith(endings) else tensor).contiguous().cpu()
    return tensors


def _sharded(tensors: dict[str, Tensor], most: int | None) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if most is not None and shards[-1] and size + tensor.nbytes > most:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _renamed(name: str) -> str:
    for old, new in OLD.items():
        if name.endswith(f".{old}"):
            return name.removesuffix(old) + new
    return name


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as tensors:
            yield tensors
    except FileNotFoundError:
        raise ValueError(f"hugging_face: {path} must be there, got no such file") from None
    except SafetensorError as error:
        raise ValueError(f"hugging_face: {path} must be a whole safetensors file, got {error}") from None
