"""What compat.hugging_face is tested with: small models of random weights, their logits and gradients."""

import copy
import re
from collections import defaultdict

import pytest
import torch

transformers = pytest.importorskip("transformers")

TEXT = {
    "vocab_size": 97,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 16}


def gpt2(**options):
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, **TEXT, **options)
    return transformers.GPT2LMHeadModel(config)


def bert():
    config = transformers.BertConfig(max_position_embeddings=64, **SIZES, **TEXT)
    return transformers.BertForMaskedLM(config)


def llama(**options):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, **TEXT, **options))


def mistral():
    return transformers.MistralForCausalLM(transformers.MistralConfig(sliding_window=6, **GROUPED, **TEXT))


def gemma2():
    config = transformers.Gemma2Config(
        sliding_window=6, attn_logit_softcapping=2.0, query_pre_attn_scalar=9, **GROUPED, **TEXT
    )
    return transformers.Gemma2ForCausalLM(config)


def gpt_oss():
    config = transformers.GptOssConfig(
        sliding_window=6,
        num_local_experts=2,
        num_experts_per_tok=1,
        experts_implementation="eager",
        **GROUPED,
        **TEXT,
    )
    return transformers.GptOssForCausalLM(config)


def vit():
    config = transformers.ViTConfig(image_size=32, patch_size=8, initializer_range=0.1, **SIZES)
    return transformers.ViTForImageClassification(config)


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=97, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, num_mel_bins=8, init_std=0.1,
        max_source_positions=30, max_target_positions=40, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def t5():
    config = transformers.T5Config(
        vocab_size=97, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=None, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def qwen2():
    """The second layer alone has a window."""
    config = transformers.Qwen2Config(
        use_sliding_window=True, sliding_window=6, max_window_layers=1, **GROUPED, **TEXT
    )
    return transformers.Qwen2ForCausalLM(config)


def qwen2_moe():
    """Its layers do not tell their window: the mask alone has it."""
    config = transformers.Qwen2MoeConfig(
        use_sliding_window=True, sliding_window=6, max_window_layers=1, num_experts=2, num_experts_per_tok=2,
        moe_intermediate_size=32, shared_expert_intermediate_size=32, experts_implementation="eager",
        **GROUPED, **TEXT,
    )  # fmt: skip
    return transformers.Qwen2MoeForCausalLM(config)


def gemma3():
    config = transformers.Gemma3TextConfig(
        sliding_window=6, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=9,
        **GROUPED, **TEXT,
    )  # fmt: skip
    return transformers.Gemma3ForCausalLM(config)


def gemma4():
    """Its last two layers share the keys of the two before them."""
    config = transformers.Gemma4TextConfig(
        num_kv_shared_layers=2, sliding_window=6, layer_types=["sliding_attention", "full_attention"] * 2,
        global_head_dim=16, vocab_size_per_layer_input=97, hidden_size_per_layer_input=16,
        **GROUPED | {"num_hidden_layers": 4}, **TEXT,
    )  # fmt: skip
    return transformers.Gemma4ForCausalLM(config)


def modernbert():
    """Windows to both sides."""
    config = transformers.ModernBertConfig(
        local_attention=8, layer_types=["sliding_attention", "full_attention"], initializer_cutoff_factor=2.0,
        **SIZES, **TEXT | {"eos_token_id": 2},
    )  # fmt: skip
    return transformers.ModernBertForMaskedLM(config)


def deepseek_v32():
    """Its indexer chooses 4 keys for a query, and hides the others where its attention is called "sdpa"."""
    config = transformers.DeepseekV32Config(
        index_topk=4, index_n_heads=2, index_head_dim=16, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=16, first_k_dense_replace=2, n_routed_experts=4, n_group=1,
        topk_group=1, moe_intermediate_size=32, num_key_value_heads=4, **SIZES, **TEXT,
    )  # fmt: skip
    return transformers.DeepseekV32ForCausalLM(config)


def clip():
    """Its text and its images have a config each, within its own."""
    text = {**SIZES, **TEXT, "max_position_embeddings": 64}
    vision = {"image_size": 32, "patch_size": 8, **SIZES}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))


def git():
    """Its text layers have code of their own, which adds masks to scores."""
    vision = {"image_size": 32, "patch_size": 16, **SIZES}
    return transformers.GitForCausalLM(transformers.GitConfig(vision_config=vision, **SIZES, **TEXT))


def pegasus_x():
    """Its decoder's attention does not tell that it is causal."""
    config = transformers.PegasusXConfig(
        d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=96, decoder_ffn_dim=96, block_size=8, num_global_tokens=4, init_std=0.1,
        max_position_embeddings=64, **TEXT | {"decoder_start_token_id": 1},
    )  # fmt: skip
    return transformers.PegasusXForConditionalGeneration(config)


def build(name, **options):
    """One of the models above, by its name."""
    return globals()[name](**options)


def three(model, dtype):
    """The model with lspm in dtype, with eager in float64, and with eager in dtype."""
    model = model.to(dtype).eval()
    models = model, copy.deepcopy(model).double(), copy.deepcopy(model)
    for m, implementation in zip(models, ("lspm", "eager", "eager"), strict=True):
        m.set_attn_implementation(implementation)
    return models


def prompts(padded=0):
    ids = torch.randint(3, 97, (2, 17))
    mask = torch.ones_like(ids)
    ids[0, :padded] = mask[0, :padded] = 0
    return ids, mask


def inputs(name, padded):
    """What a model of that name takes."""
    ids, mask = prompts(padded)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 32, 32)}
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 60), "decoder_input_ids": ids}
    if name == "t5":
        return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, 3:9]}
    return {"input_ids": ids, "attention_mask": mask}


def logits_and_gradients(model, batches, padded):
    """The logits, and the gradients of each parameter, of all batches and layers beside each other.

    A bias has 16 numbers, sinks have 4: in one batch their largest rounding error is a matter of luck.
    """
    found = defaultdict(list)
    for batch in batches:
        given = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in batch.items()}
        logits = model(**given).logits
        if padded and logits.shape[1] == given["attention_mask"].shape[1]:
            logits = logits[given["attention_mask"].bool()]  # what padding gives is nobody's
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
        model.zero_grad()
        (logits * weights.to(logits.dtype)).sum().backward()
        found["logits"].append(logits.detach().flatten())
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[re.sub(r"\.\d+\.", ".N.", name)].append(parameter.grad.flatten())
    return {name: torch.cat(parts) for name, parts in found.items()}
