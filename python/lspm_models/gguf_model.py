"""A Llama in a GGUF file: its shape, its weights, and its tokenizer, from the metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lspm_models.data.pretrained_tokenizer import Marks, PretrainedTokenizer, byte_bpe
from lspm_models.gguf import GgufFile
from lspm_models.models.llama import LlamaConfig
from lspm_models.pretrained import Pretrained

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
PRE_TOKENIZERS = {"gpt-2": False, "smollm": True}  # whether each digit is a token
CONTROL, USER_DEFINED = 3, 4  # types of tokens that no text has


class GgufModel(Pretrained):
    """A model of architecture llama with a byte-level BPE tokenizer.

    Raises:
        ValueError: the file is damaged, or of a kind that is not read; the message says what.
    """

    def __init__(self, path: str | Path):
        self._file = GgufFile(path)
        self.where = str(path)
        if (kind := self._get("general.architecture", str)) != "llama":
            self._refuse("general.architecture must be llama", kind)
        self.shapes = {name: stored.shape for name, stored in self._file.tensors.items()}
        self.config = self._config()

    def named(self, name: str) -> str:
        if name in OUTER:
            return OUTER[name]
        _, _, layer, rest = name.split(".", 3)
        return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"

    def read(self, name: str) -> Tensor:
        tensor = self._file.tensor(name)
        if name.endswith((".attn_q.weight", ".attn_k.weight")):
            # Rows lie as interleaved pairs, (D / 2, 2) of each head; ours, as Hugging Face's, in halves.
            size = self.config.head_size
            tensor = tensor.unflatten(0, (-1, size // 2, 2)).transpose(1, 2).reshape(tensor.shape)
        return tensor

    def tokenizer(self) -> PretrainedTokenizer:
        """Makes the tokenizer of the metadata.

        Raises:
            ValueError: it is not GPT-2's kind, or damaged.
        """
        if (kind := self._get("tokenizer.ggml.model", str)) != "gpt2":
            self._refuse("tokenizer.ggml.model must be gpt2, byte-level BPE", kind)
        if (kind := self._get("tokenizer.ggml.pre", str, "gpt-2")) not in PRE_TOKENIZERS:
            self._refuse(f"tokenizer.ggml.pre must be one of {', '.join(PRE_TOKENIZERS)}", kind)
        tokens, merges = (self._get(f"tokenizer.ggml.{name}", list) for name in ("tokens", "merges"))
        vocabulary = {token: index for index, token in enumerate(tokens)}
        if len(vocabulary) != len(tokens):
            self._refuse("tokenizer.ggml.tokens must differ", f"{len(tokens) - len(vocabulary)} twice")
        pairs = [tuple(merge.split(" ")) for merge in merges]
        if broken := [pair for pair in pairs if len(pair) != 2]:
            self._refuse("tokenizer.ggml.merges must be pairs of tokens", broken[0])
        tokenizer = byte_bpe(vocabulary, pairs, digits=PRE_TOKENIZERS[kind], where=self.where)
        types = self._get("tokenizer.ggml.token_type", np.ndarray, np.ones(len(tokens)))
        if len(types) != len(tokens):
            self._refuse(f"tokenizer.ggml.token_type must be of {len(tokens)} tokens", len(types))
        special = np.flatnonzero(np.isin(types, (CONTROL, USER_DEFINED))).tolist()
        tokenizer.add_special_tokens([tokens[index] for index in special])
        end = self._get("tokenizer.ggml.eos_token_id", int)
        begin = self._get("tokenizer.ggml.bos_token_id", int, -1)
        if self._get("tokenizer.ggml.add_bos_token", bool, False):
            self._begin_texts(tokenizer, tokens, begin)
        marks = Marks(
            self.config.vocabulary_size,
            end,
            (end,),
            tokens[begin] if 0 <= begin < len(tokens) else "",
            self._get("tokenizer.chat_template", str, "") or None,
        )
        return PretrainedTokenizer(tokenizer, marks, self.where)

    def _begin_texts(self, tokenizer: Any, tokens: list[str], begin: int) -> None:
        from tokenizers import processors

        if not 0 <= begin < len(tokens):
            self._refuse("tokenizer.ggml.bos_token_id must be a token", begin)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[tokens[begin], "$A"], special_tokens=[(tokens[begin], begin)]
        )

    def _config(self) -> LlamaConfig:
        heads, width = self._get("llama.attention.head_count", int), self._get("llama.embedding_length", int)
        head_size = self._get("llama.attention.key_length", int, width // heads if heads > 0 else 0)
        if (rotated := self._get("llama.rope.dimension_count", int, head_size)) != head_size:
            self._refuse(f"llama.rope.dimension_count must be the head's {head_size}", rotated)
        if (scaling := self._get("llama.rope.scaling.type", str, "none")) not in ("none", "linear"):
            self._refuse("llama.rope.scaling.type must be none or linear", scaling)
        table = self.shapes.get("token_embd.weight", (0,))
        try:
            return LlamaConfig(
                vocabulary_size=table[0],
                context=self._get("llama.context_length", int),
                layers=self._get("llama.block_count", int),
                heads=heads,
                key_value_heads=self._get("llama.attention.head_count_kv", int, heads),
                width=width,
                hidden=self._get("llama.feed_forward_length", int),
                head_size=head_size,
                tied="output.weight" not in self.shapes,
                eps=self._get("llama.attention.layer_norm_rms_epsilon", float),
                theta=self._get("llama.rope.freq_base", float, 10_000.0),
                rope_scaling=scaling,
                rope_factor=self._get("llama.rope.scaling.factor", float, 1.0),
            )
        except ValueError as error:
            raise ValueError(f"gguf: {self.where}: {error}") from None

    def _get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self._file.metadata.get(key, default)
        if type(value) is not kind:
            self._refuse(f"{key} must be {kind.__name__}", "none" if value is None else value)
        return value

    def _refuse(self, rule: str, got: Any) -> None:
        raise ValueError(f"gguf: {self.where}: {rule}, got {str(got)[:80]}")
