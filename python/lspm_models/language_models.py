"""The language models there are: the config and the module of each, and the options of the scripts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lspm_kernels.reference.bias_act import ACTIVATIONS
from lspm_models.checkpoint import described
from lspm_models.models.bert import Bert, BertConfig
from lspm_models.models.gpt import GPT, GPTConfig
from lspm_models.models.llama import ROPE_SCALINGS, Llama, LlamaConfig
from lspm_models.options import option
from lspm_models.tasks.language_modelling import LanguageModelling
from lspm_models.tasks.masked_language_modelling import MaskedLanguageModelling

Config = GPTConfig | LlamaConfig | BertConfig
Task = LanguageModelling | MaskedLanguageModelling
CONFIGS: dict[str, type[Config]] = {"gpt": GPTConfig, "llama": LlamaConfig, "bert": BertConfig}
MODELS = {GPTConfig: GPT, LlamaConfig: Llama, BertConfig: Bert}


def make_model(config: Config, **arguments: Any) -> GPT | Llama | Bert:
    """Makes the model of a config, from tokens to features, with random weights."""
    return MODELS[type(config)](config, **arguments)


def make_task(config: Config, **arguments: Any) -> Task:
    """Makes the task of a config, with random weights; arguments are the model's."""
    task = MaskedLanguageModelling if isinstance(config, BertConfig) else LanguageModelling
    return task(make_model(config, **arguments))


def name_of(config: Config) -> str:
    """Returns what the scripts call the model of a config."""
    return next(name for name, kind in CONFIGS.items() if kind is type(config))


def to_settings(config: Config) -> dict:
    """Returns what a checkpoint keeps of a config. A GPT's has no name: it was the first."""
    name = name_of(config)
    return asdict(config) if name == "gpt" else {"model": name, **asdict(config)}


def from_settings(settings: Any, where: str) -> Config:
    """Returns the config that to_settings described.

    Raises:
        ValueError: it describes none; `where` is what the reader calls the place it is from.
    """
    try:
        fields = dict(settings)
        return CONFIGS[fields.pop("model", "gpt")](**fields)
    except (TypeError, KeyError, ValueError) as error:
        rule = "must hold the config of a language model"
        raise ValueError(f"checkpoint: {where} {rule}, got {described(settings, CONFIGS)}") from error


class Options:
    """The shape of a model but for the vocabulary, which the tokenizer brings; a subclass has its fields."""

    model: str

    def __post_init__(self) -> None:
        self.with_vocabulary(1)  # the shape checks its own rules

    def with_vocabulary(self, size: int) -> Config:
        """Returns the whole shape; a ValueError names a field that breaks its rule."""
        fields = asdict(self)
        name, mine = fields.pop("model"), type(self).model
        if name != mine:  # a config file's; jobs have read it and choose by it
            raise ValueError(f"model: name must be {mine} beside its options, got {name!r}")
        return CONFIGS[name](vocabulary_size=size, **fields)


@dataclass(frozen=True)
class GPTOptions(Options):
    """See Options."""

    model: str = option("gpt", "gpt; llama and bert have other options", choices=("gpt",))
    context: int = option(256, "tokens seen at once, and per training sequence")
    layers: int = option(4, "blocks")
    heads: int = option(4, "attention heads per block")
    width: int = option(256, "features per token, a multiple of heads")
    dropout: float = option(0.0, "probability of dropping a feature in training")
    bias: bool = option(True, "biases in linear layers and norms")
    eps: float = option(1e-5, "added to the variance in norms")


@dataclass(frozen=True)
class LlamaOptions(Options):
    """See Options."""

    model: str = option("llama", "llama; gpt and bert have other options", choices=("llama",))
    context: int = option(256, "tokens seen at once, and per training sequence")
    layers: int = option(4, "blocks")
    heads: int = option(4, "heads of queries per block")
    key_value_heads: int = option(2, "heads of keys and values, which divide heads")
    width: int = option(256, "features per token")
    hidden: int = option(768, "features between the layers of an MLP")
    head_size: int = option(0, "features of a head, even", default="width / heads")
    tied: bool = option(True, "the head is the table of token embeddings")
    eps: float = option(1e-5, "added to the mean square in norms")
    theta: float = option(10_000.0, "base of the rotation's wavelengths")
    rope_scaling: str = option("none", "how angles are scaled for a longer context", choices=ROPE_SCALINGS)
    rope_factor: float = option(1.0, "what angles are divided by")
    rope_low: float = option(1.0, "llama3: waves that fit in rope_context less often are divided")
    rope_high: float = option(4.0, "llama3: waves that fit in rope_context more often are kept")
    rope_context: int = option(8192, "llama3: the context that was pretrained with")


@dataclass(frozen=True)
class BertOptions(Options):
    """See Options."""

    model: str = option("bert", "bert; gpt and llama have other options", choices=("bert",))
    context: int = option(128, "tokens seen at once, and per training sequence, marks included")
    layers: int = option(4, "blocks")
    heads: int = option(4, "attention heads per block")
    width: int = option(256, "features per token, a multiple of heads")
    hidden: int = option(0, "features between the layers of an MLP", default="4 width")
    token_types: int = option(2, "parts that a text may have; here it has one")
    dropout: float = option(0.0, "probability of dropping a feature, or a token's attention, in training")
    activation: str = option("gelu", "of the MLPs and the head", choices=tuple(ACTIVATIONS))
    eps: float = option(1e-12, "added to the variance in norms")
    pooler: bool = option(False, "a layer for tasks on whole texts, which this one leaves as it is")
