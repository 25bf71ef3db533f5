"""Checkpoints of Hugging Face's transformers, GPT-2 and Llama: a folder for each.

Nothing is unpickled: a folder that has only pytorch_model.bin is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lspm_models.data.pretrained_tokenizer import PretrainedTokenizer
from lspm_models.data.tokenizer_folder import read_folder, write_folder
from lspm_models.data.tokenizers import ByteBpe
from lspm_models.files import replaced
from lspm_models.hugging_face_config import Format, read_config, write_config
from lspm_models.json_files import read_object
from lspm_models.pretrained import Pretrained
from lspm_models.tasks.language_modelling import LanguageModelling

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD = "lm_head.weight"


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
        self._files: dict[str, Path] = {}
        self.shapes = {}
        for file in self._shards():
            with _opened(file) as tensors:
                for name in tensors.keys():
                    if name in self.shapes:
                        raise ValueError(
                            f"hugging_face: {name} must be in one shard, got a second one in {file}"
                        )
                    shape = tuple(tensors.get_slice(name).get_shape())
                    self.shapes[name] = shape[::-1] if self._transposed(name) else shape
                    self._files[name] = file
        self.shapes = {n: shape for n, shape in self.shapes.items() if not n.endswith(self._format.buffers)}
        self._prefix = self._format.prefix
        if not any(name.startswith(self._prefix) for name in self.shapes):
            self._prefix = ""  # the model without its head
        if self.config.tied and HEAD in self.shapes:
            self._check_tied()

    def named(self, name: str) -> str:
        return name if name == HEAD else self._prefix + name.removeprefix("model.")

    def read(self, name: str) -> Tensor:
        with _opened(self._files[name]) as tensors:
            tensor = tensors.get_tensor(name)
        return tensor.t() if self._transposed(name) else tensor

    def tokenizer(self) -> PretrainedTokenizer:
        return read_folder(self.folder, self._content, self.config.vocabulary_size)

    def _transposed(self, name: str) -> bool:
        return name.endswith(tuple(f".{layer}.weight" for layer in self._format.transposed))

    def _check_tied(self) -> None:
        table = self._prefix + self._format.table
        if table in self.shapes and not torch.equal(self.read(HEAD), self.read(table)):
            raise ValueError(
                f"hugging_face: {HEAD} must equal {table} where tie_word_embeddings is true, "
                f"got others in {self.folder}"
            )
        del self.shapes[HEAD]

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


def load_pretrained(folder: str | Path) -> LanguageModelling:
    """Loads a model that transformers' save_pretrained wrote.

    Args:
        folder: with config.json (model_type gpt2 or llama) and model.safetensors, or shards with an index;
            of the model with its language modelling head, or, where the head is tied, of the model alone.

    Returns:
        The task in float32, in eval mode.

    Raises:
        ValueError: a file is missing or damaged, the config asks for what we do not compute, or tensors are
            missing, unknown or of another shape; the message names them.
    """
    return HuggingFaceFolder(folder).task()


def save_pretrained(
    task: LanguageModelling,
    folder: str | Path,
    tokenizer: ByteBpe | PretrainedTokenizer | None = None,
    *,
    shard_bytes: int | None = None,
) -> None:
    """Writes a folder that transformers' from_pretrained loads, and load_pretrained, whole or not at all.

    Args:
        task: a GPT with biases, or a Llama.
        folder: a new one.
        tokenizer: byte-level BPE, to be written beside it as tokenizer.json and tokenizer_config.json.
        shard_bytes: begin a new file where one would be larger than this; None: one file.

    Raises:
        ValueError: the folder is there already, the GPT has no biases, or the tokenizer is of characters.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"save_pretrained: folder must be a new one, got {folder}")
    if getattr(task.config, "bias", None) is False:
        raise ValueError("save_pretrained: task must have biases, which GPT2LMHeadModel has, got bias=False")
    if tokenizer is not None and not isinstance(tokenizer, ByteBpe | PretrainedTokenizer):
        raise ValueError(f"save_pretrained: tokenizer must be byte-level BPE, got {tokenizer.kind}")
    form, content = write_config(task.config)
    shards = _sharded(_theirs(task, form), shard_bytes)
    with replaced(folder) as partial:
        partial.mkdir(parents=True)
        if tokenizer is not None:
            content |= {"eos_token_id": tokenizer.end_of_text}
            write_folder(tokenizer, partial)
        content["dtype"] = str(task.head_weight.dtype).removeprefix("torch.")
        (partial / "config.json").write_text(json.dumps(content, indent=2) + "\n")
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        names = names if len(shards) > 1 else [ONE]
        for name, tensors in zip(names, shards, strict=True):
            save_file(tensors, partial / name, metadata={"format": "pt"})
        if len(shards) > 1:
            size = sum(tensor.nbytes for tensors in shards for tensor in tensors.values())
            places = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
            index = {"metadata": {"total_size": size}, "weight_map": places}
            (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _theirs(task: LanguageModelling, form: Format) -> dict[str, Tensor]:
    endings = tuple(f".{layer}.weight" for layer in form.transposed)
    tensors = {}
    for name, tensor in task.state_dict().items():
        theirs = name if name == HEAD else form.prefix + name.removeprefix("model.")
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
