"""What `python -m lspm_kernels bench` times: a model by its name, and inputs for it."""

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_BATCH, _LENGTH = 4, 128  # of a language model's inputs, where none are given
_INPUT = re.compile(r"(?:(\w+):)?(\d+(?:,\d+)*)(?:@(\d+))?")
_HEADS = ("MASKED_LM", "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_CLASSIFICATION")


class UsageError(Exception):
    """What the command was given cannot be run; the message is one sentence."""


@contextmanager
def told(what: str) -> Iterator[None]:
    """Makes what someone else's code raises a sentence: anything may come from there."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        text = " ".join(str(error).split()) or "no message"
        raise UsageError(f"{what} raised {type(error).__name__}: {text}") from error


def load(name: str) -> nn.Module:
    """The model that a name stands for.

    Args:
        name: "package.module:factory", "hf:<model type or folder>" or "torchvision:<model>".

    Raises:
        UsageError: there is no such model, or making it raises.
    """
    kind, _, rest = name.partition(":")
    if not kind or not rest:
        rule = "'package.module:factory', 'hf:<model type or folder>' or 'torchvision:<model>'"
        raise UsageError(f"MODEL must be {rule}, got {name!r}")
    torch.manual_seed(0)
    if kind == "hf":
        return _hugging_face(rest)
    if kind == "torchvision":
        models = _package("torchvision").models
        if rest not in models.list_models():
            raise UsageError(f"MODEL must be one of torchvision.models.list_models(), got {rest!r}")
        takes = inspect.signature(models.get_model_builder(rest)).parameters
        backbone = {"weights_backbone": None} if "weights_backbone" in takes else {}
        with told(name):
            return models.get_model(rest, weights=None, **backbone)  # nothing is downloaded
    found = attribute("MODEL", name)
    if not isinstance(found, nn.Module) and callable(found):
        with told(f"{name}()"):
            found = found()
    if not isinstance(found, nn.Module):
        raise UsageError(f"MODEL must be or return a torch.nn.Module, got {type(found).__name__}")
    return found


def attribute(what: str, name: str) -> Any:
    """package.module:attribute."""
    module, _, path = name.partition(":")
    if not module or not path:
        raise UsageError(f"{what} must be 'package.module:name', got {name!r}")
    sys.path.insert(0, str(Path.cwd()))
    try:
        with told(f"import {module}"):
            found = importlib.import_module(module)
    finally:
        sys.path.remove(str(Path.cwd()))
    for part in path.split("."):
        if not hasattr(found, part):
            raise UsageError(f"{what} must name what {module} has, got {path!r}")
        found = getattr(found, part)
    return found


def _package(name):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"{name} must be installed for this MODEL (pip install {name}): {error}") from None


def _hugging_face(name):
    transformers, folder = _package("transformers"), Path(name)
    known = folder.is_dir() or name in transformers.CONFIG_MAPPING
    if not known:
        raise UsageError(f"MODEL must be hf: and a model type of transformers or a folder, got {name!r}")
    with told(f"hf:{name}"):
        if folder.is_dir():
            config = transformers.AutoConfig.from_pretrained(name, local_files_only=True)
        else:
            config = transformers.AutoConfig.for_model(name)
        if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = getattr(config, "pad_token_id", None) or 0
        auto = transformers.models.auto.modeling_auto
        tables = [getattr(auto, f"MODEL_FOR_{head}_MAPPING") for head in _HEADS] + [auto.MODEL_MAPPING]
        named = [getattr(transformers, n, None) for n in config.architectures or ()]
        classes = [*filter(None, named), *(table[type(config)] for table in tables if type(config) in table)]
        cls = classes[0][0] if isinstance(classes[0], tuple) else classes[0]
        if folder.is_dir() and any(folder.glob("*.safetensors")):
            return cls.from_pretrained(name, local_files_only=True)
        return cls._from_config(config)


def inputs_of(
    model: nn.Module, name: str, texts: list[str] | None, function: str | None, training: bool
) -> tuple[tuple, dict[str, Any]]:
    """(args, kwargs) of a call: those that a function returns, that texts describe, or that suit the model.

    Raises:
        UsageError: a text is none, nothing suits, or the function raises.
    """
    torch.manual_seed(1)
    if function is not None:
        with told(f"{function}()"):
            found = attribute("--inputs", function)()
        if isinstance(found, dict):
            return (), found
        pair = isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], dict)
        return (tuple(found[0]), found[1]) if pair else (found if isinstance(found, tuple) else (found,), {})
    config = getattr(model, "config", None)
    if texts:
        args = tuple(_tensor(model, text) for text in texts)
        if config is None:
            return args, {}
        given = dict(zip([model.main_input_name, "attention_mask"], args, strict=False))
        return (), given | _labels(model, config, args[0], training)
    if name.startswith("torchvision:"):
        return (torch.randn(8, 3, 224, 224),), {}
    main = getattr(model, "main_input_name", None)
    if main == "input_ids":
        first = torch.randint(_vocabulary(model), (_BATCH, _LENGTH))
    elif main == "pixel_values":
        first = torch.randn(_BATCH, config.num_channels, config.image_size, config.image_size)
    else:
        raise UsageError("--input must be given for this MODEL, as in --input 8,3,224,224, got none")
    return (), {main: first} | _labels(model, config, first, training)


def _labels(model, config, first, training):
    """What a model of transformers needs for its loss, where that follows from its input."""
    if first.is_floating_point():
        return {"labels": torch.zeros(len(first), dtype=torch.int64)} if training else {}
    if getattr(config, "is_encoder_decoder", False):
        return {"labels": first} if training else {"decoder_input_ids": first}
    takes = hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is not None
    return {"labels": first} if training and takes else {}


def _vocabulary(model):
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    tables = [embedding] if isinstance(embedding, nn.Embedding) else model.modules()
    return min((m.num_embeddings for m in tables if isinstance(m, nn.Embedding)), default=2)


def _tensor(model: nn.Module, text: str) -> Tensor:
    """The tensor that "8,3,224,224", "int64:2,512" or "int64:2,512@1000" describes."""
    match = _INPUT.fullmatch(text)
    dtype = getattr(torch, (match and match[1]) or "float32", None)
    if match is None or not isinstance(dtype, torch.dtype):
        rule = "sizes, as 8,3,224,224 or int64:2,512 or int64:2,512@1000 (integers below 1000)"
        raise UsageError(f"--input must be {rule}, got {text!r}")
    sizes = tuple(map(int, match[2].split(",")))
    with told(f"--input {text}"):  # sizes beyond memory, dtypes that cannot be made
        if dtype.is_floating_point or dtype.is_complex:
            return torch.randn(sizes).to(dtype)
        most = 2 if dtype == torch.bool else int(match[3] or _vocabulary(model))
        return torch.randint(max(most, 1), sizes).to(dtype)


def moved(value: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    """value with every tensor in it converted."""
    return torch.utils._pytree.tree_map_only(Tensor, convert, value)
