"""config.json of Hugging Face's GPT-2, Llama and BERT: to our configs and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from lspm_models.language_models import Config
from lspm_models.models.bert import BertConfig
from lspm_models.models.gpt import GPTConfig
from lspm_models.models.llama import LlamaConfig


@dataclass(frozen=True)
class Format:
    """How one kind of model is written.

    Args:
        config: ours.
        architecture: the class of transformers with the head.
        prefix: of the model's tensors below the head; a file of the model alone has none.
        table: the token embeddings, below the prefix.
        fields: theirs and its default by ours.
        fixed: by field of theirs the values that we compute, the default first.
        transposed: layers whose weights are (inputs, outputs).
        buffers: endings of names that some versions stored and nobody learned.
        left_out: beginnings of names, of heads for what we do not compute.
    """

    config: type[Config]
    architecture: str
    prefix: str
    table: str
    fields: dict[str, tuple[str, Any]]
    fixed: dict[str, tuple]
    transposed: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


FORMATS = {
    "gpt2": Format(
        GPTConfig,
        "GPT2LMHeadModel",
        "transformer.",
        "wte.weight",
        {
            "vocabulary_size": ("vocab_size", 50257),
            "context": ("n_positions", 1024),
            "layers": ("n_layer", 12),
            "heads": ("n_head", 12),
            "width": ("n_embd", 768),
            "eps": ("layer_norm_epsilon", 1e-5),
        },
        {
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
            "tie_word_embeddings": (True,),
            "quantization_config": (None,),
        },
        ("c_attn", "c_proj", "c_fc"),
        (".attn.bias", ".attn.masked_bias"),
    ),
    "llama": Format(
        LlamaConfig,
        "LlamaForCausalLM",
        "model.",
        "embed_tokens.weight",
        {
            "vocabulary_size": ("vocab_size", 32000),
            "context": ("max_position_embeddings", 2048),
            "layers": ("num_hidden_layers", 32),
            "heads": ("num_attention_heads", 32),
            "key_value_heads": ("num_key_value_heads", None),
            "width": ("hidden_size", 4096),
            "hidden": ("intermediate_size", 11008),
            "head_size": ("head_dim", None),
            "tied": ("tie_word_embeddings", False),
            "eps": ("rms_norm_eps", 1e-6),
        },
        {
            "hidden_act": ("silu",),
            "attention_bias": (False,),
            "mlp_bias": (False,),
            "attention_dropout": (0.0,),
            "sliding_window": (None,),
            "partial_rotary_factor": (None, 1.0),
            "quantization_config": (None,),
        },
        buffers=(".rotary_emb.inv_freq",),
    ),
    "bert": Format(
        BertConfig,
        "BertForMaskedLM",
        "bert.",
        "embeddings.word_embeddings.weight",
        {
            "vocabulary_size": ("vocab_size", 30522),
            "context": ("max_position_embeddings", 512),
            "layers": ("num_hidden_layers", 12),
            "heads": ("num_attention_heads", 12),
            "width": ("hidden_size", 768),
            "hidden": ("intermediate_size", 3072),
            "token_types": ("type_vocab_size", 2),
            "activation": ("hidden_act", "gelu"),
            "eps": ("layer_norm_eps", 1e-12),
        },
        {
            "position_embedding_type": ("absolute",),
            "is_decoder": (False,),
            "add_cross_attention": (False,),
            "tie_word_embeddings": (True,),
            "quantization_config": (None,),
        },
        buffers=("embeddings.position_ids",),
        left_out=("cls.seq_relationship.",),  # whether one text follows another
    ),
}
LLAMA3 = {
    "rope_factor": "factor",
    "rope_low": "low_freq_factor",
    "rope_high": "high_freq_factor",
    "rope_context": "original_max_position_embeddings",
}
# Theirs by ours, the first to be written.
ACTIVATIONS = {
    "gelu": ("gelu",),
    "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh"),
    "relu": ("relu",),
    "silu": ("silu", "swish"),
}
CLASSES = {"gpt2": "GPT2", "llama": "Llama", "bert": "Bert"}
# The class of transformers with a head, by our task's name and their model's.
ARCHITECTURES = {
    task: {kind: f"{model}For{name}" for kind, model in CLASSES.items()}
    for task, name in (
        ("classification", "SequenceClassification"),
        ("question_answering", "QuestionAnswering"),
    )
}
SCALINGS = {"default": {}, "linear": {"rope_factor": "factor"}, "llama3": LLAMA3}


def read_config(content: Any, where: str) -> tuple[Format, Config]:
    """Returns the format and the shape of a model; dropout, which is no property of weights, is 0.

    Args:
        content: of config.json.
        where: the file, for messages.

    Raises:
        ValueError: a field has a value that we do not compute, or is of the wrong type; the message names it.
    """
    kind = content.get("model_type") if isinstance(content, dict) else None
    if not isinstance(kind, str) or kind not in FORMATS:
        _refuse("model_type", f"one of {', '.join(FORMATS)}", kind, where)
    form = FORMATS[kind]
    for name, known in form.fixed.items():
        value = content.get(name, known[0])
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in known):
            _refuse(name, " or ".join(map(repr, known)), value, where)
    fields = {ours: content.get(theirs, default) for ours, (theirs, default) in form.fields.items()}
    if form.config is LlamaConfig:
        if fields["key_value_heads"] is None:
            fields["key_value_heads"] = fields["heads"]
        if fields["head_size"] is None:
            fields["head_size"] = 0
        fields |= _rope(content, where)
    elif form.config is BertConfig:
        fields["activation"] = _activation(fields["activation"], where)
    else:
        inner = content.get("n_inner")
        if inner is not None and inner != 4 * fields["width"]:
            _refuse("n_inner", f"4 n_embd ({4 * fields['width']})", inner, where)
    for name in ("eps", "theta", "rope_factor", "rope_low", "rope_high"):
        if name in fields:
            fields[name] = _number(name, fields[name], where)
    try:
        return form, form.config(**fields)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def write_config(config: Config) -> tuple[Format, dict]:
    """Returns the format of a config, and what config.json says of it."""
    kind, form = next(item for item in FORMATS.items() if item[1].config is type(config))
    content = {"architectures": [form.architecture], "model_type": kind}
    content |= {theirs: getattr(config, ours) for ours, (theirs, _) in form.fields.items()}
    content |= {name: known[0] for name, known in form.fixed.items() if known[0] is not None}
    if isinstance(config, GPTConfig):
        return form, content | {
            "resid_pdrop": config.dropout, "embd_pdrop": config.dropout, "attn_pdrop": 0.0
        }  # fmt: skip
    if isinstance(config, BertConfig):
        dropout = {"hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": config.dropout}
        return form, content | dropout | {"hidden_act": ACTIVATIONS[config.activation][0]}
    kind = "default" if config.rope_scaling == "none" else config.rope_scaling
    scaling = {theirs: getattr(config, ours) for ours, theirs in SCALINGS[kind].items()}
    # rope_theta and rope_scaling are read by transformers before 5, rope_parameters since.
    content["rope_theta"] = config.theta
    content["rope_scaling"] = {"rope_type": kind, **scaling} if scaling else None
    content["rope_parameters"] = {"rope_type": kind, "rope_theta": config.theta, **scaling}
    return form, content


def head_prefix(task: str, kind: str, prefix: str) -> str:
    """Returns what the model's tensors begin with below a head; of one head it is not as of all others."""
    return "transformer." if (task, kind) == ("question_answering", "llama") else prefix


def head_name(kind: str, name: str) -> str:
    """Returns the name of a head's tensor: BERT's score is called classifier."""
    return name.replace("score.", "classifier.", 1) if kind == "bert" and name.startswith("score.") else name


def write_head(task: str, kind: str, labels: Sequence[str]) -> dict:
    """Returns what config.json says of a head."""
    content: dict[str, Any] = {"architectures": [ARCHITECTURES[task][kind]]}
    if task == "classification":
        content["id2label"] = {str(index): label for index, label in enumerate(labels)}
        content["label2id"] = {label: index for index, label in enumerate(labels)}
    return content


def _rope(content: dict, where: str) -> dict:
    # Of both transformers takes the older name, which people add to a config to stretch its context.
    given = content.get("rope_scaling") or content.get("rope_parameters") or {}
    if not isinstance(given, dict):
        _refuse("rope_scaling", "an object", given, where)
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in SCALINGS:
        _refuse("rope_type", f"one of {', '.join(SCALINGS)}", kind, where)
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        _refuse("partial_rotary_factor", "1.0", given["partial_rotary_factor"], where)
    fields = {"theta": given.get("rope_theta", content.get("rope_theta", 10_000.0))}
    fields["rope_scaling"] = "none" if kind == "default" else kind
    for ours, theirs in SCALINGS[kind].items():
        if theirs not in given:
            _refuse(theirs, f"given for rope_type {kind}", None, where)
        fields[ours] = given[theirs]
    return fields


def _activation(theirs: Any, where: str) -> str:
    for ours, names in ACTIVATIONS.items():
        if theirs in names:
            return ours
    _refuse(
        "hidden_act",
        f"one of {', '.join(name for names in ACTIVATIONS.values() for name in names)}",
        theirs,
        where,
    )


def _number(name: str, value: Any, where: str) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e300 or math.isnan(value):
        _refuse(name, "a number", value, where)
    return float(value)


def _refuse(name: str, rule: str, value: Any, where: str) -> NoReturn:
    raise ValueError(f"hugging_face: {name} must be {rule}, got {value!r} in {where}")
