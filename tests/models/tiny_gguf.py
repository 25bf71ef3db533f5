"""GGUF files written by hand, value by value: of numbers in every kind, and of a whole Llama that chats."""

import struct

import numpy as np
import torch

from lspm_models.language_models import make_task
from lspm_models.models.llama import LlamaConfig

U32, F32, TEXT, ARRAY, I32 = 4, 6, 8, 9, 5
KINDS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "BF16": 30}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
)


def text(value):
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def field(key, kind, value):
    """A metadata field; an array of texts or of int32 from a list."""
    if isinstance(value, list):
        items = [text(v) for v in value] if kind == TEXT else [struct.pack("<i", v) for v in value]
        value = struct.pack("<IQ", kind, len(items)) + b"".join(items)
        kind = ARRAY
    elif kind == TEXT:
        value = text(value)
    elif kind in (U32, F32):
        value = struct.pack("<I" if kind == U32 else "<f", value)
    return text(key) + struct.pack("<I", kind) + value


def entry(name, shape, kind, offset):
    """A tensor's entry; shape as torch has it."""
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return text(name) + dims + struct.pack("<IQ", kind, offset)


def gguf(fields, tensors, version=3):
    """A file of fields and of (name, shape, kind, bytes)."""
    entries, data = [], b""
    for name, shape, kind, content in tensors:
        entries.append(entry(name, shape, kind, len(data)))
        data += content + bytes(-len(content) % 32)
    head = b"GGUF" + struct.pack("<IQQ", version, len(entries), len(fields)) + b"".join(fields + entries)
    return head + bytes(-len(head) % 32) + data


def encoded(values, kind):
    """A tensor's bytes in one of KINDS, and the values they stand for, block by block in plain Python."""
    values = values.float()
    if kind in ("F32", "F16", "BF16"):
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
        kept = values.to(dtype)
        return kept.view(torch.uint8).numpy().tobytes(), kept.float()
    data, meant = b"", []
    for block in values.view(-1, 32).tolist():
        least, most, size = min(block), max(block), max(map(abs, block))
        if kind == "Q8_0":
            scale = float(np.float16(size / 127)) or 1.0
            levels = [max(-128, min(127, round(v / scale))) for v in block]
            data += struct.pack("<e32b", scale, *levels)
            meant += [level * scale for level in levels]
            continue
        scale = float(np.float16((most - least) / 15 if kind == "Q4_1" else size / 7)) or 1.0
        least = float(np.float16(least)) if kind == "Q4_1" else -8 * scale
        levels = [max(0, min(15, round((v - least) / scale))) for v in block]
        data += struct.pack(
            "<ee" if kind == "Q4_1" else "<e", *([scale, least] if kind == "Q4_1" else [scale])
        )
        data += bytes(low | high << 4 for low, high in zip(levels[:16], levels[16:], strict=True))
        meant += [level * scale + least for level in levels]
    return data, torch.tensor(meant, dtype=torch.float64).float().view(values.shape)


def interleaved(weight, size):
    """Rows of q or k as llama.cpp's converter lays them: halves of each head become pairs."""
    return weight.view(-1, 2, size // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def llama_file(pre="smollm"):
    """A Llama over a byte-level BPE: the file, and the task with the very same weights."""
    letters = list("abcdefghijklmnopqrstuvwxyzĠĊ.:?0123456789")
    merges = ["t h", "th e", "Ġ the", "1 0"]
    tokens = ["<e>", "<s>", "</s>", *letters, *(m.replace(" ", "") for m in merges)]
    config = LlamaConfig(len(tokens), 64, 2, heads=4, key_value_heads=2, width=32, hidden=64, tied=True)
    torch.manual_seed(0)
    task = make_task(config).eval()
    names = {
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    tensors = []
    for name, tensor in task.state_dict().items():
        kind = "F32" if tensor.ndim == 1 else "Q8_0" if "embed" in name else "Q4_1"
        data, meant = encoded(tensor.add_(torch.randn_like(tensor), alpha=0.1), kind)
        theirs = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm"}.get(name)
        if theirs is None:
            _, _, layer, rest = name.split(".", 3)
            theirs = f"blk.{layer}.{names[rest.removesuffix('.weight')]}"
        if theirs.endswith(("attn_q", "attn_k")):
            data, meant = encoded(interleaved(tensor, 8), kind)
            meant = meant.view(-1, 4, 2, 32).transpose(1, 2).reshape(tensor.shape)
        tensor.copy_(meant)
        shape = tuple(tensor.shape)
        tensors.append((f"{theirs}.weight", shape, KINDS[kind], data))
    sizes = {
        "block_count": 2, "context_length": 64, "embedding_length": 32, "feed_forward_length": 64,
        "attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 8,
    }  # fmt: skip
    fields = [field("general.architecture", TEXT, "llama")]
    fields += [field(f"llama.{name}", U32, value) for name, value in sizes.items()]
    fields += [
        field("llama.attention.layer_norm_rms_epsilon", F32, 1e-5),
        field("llama.rope.freq_base", F32, 10000.0),
        field("tokenizer.ggml.model", TEXT, "gpt2"),
        field("tokenizer.ggml.pre", TEXT, pre),
        field("tokenizer.ggml.tokens", TEXT, tokens),
        field("tokenizer.ggml.token_type", I32, [3, 3, 3, *[1] * (len(tokens) - 3)]),
        field("tokenizer.ggml.merges", TEXT, merges),
        field("tokenizer.ggml.bos_token_id", U32, 1),
        field("tokenizer.ggml.eos_token_id", U32, 2),
        field("tokenizer.chat_template", TEXT, TEMPLATE),
    ]
    return gguf(fields, tensors), task
