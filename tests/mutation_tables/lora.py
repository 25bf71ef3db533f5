"""Bugs in adapters and in what is frozen, and in training by our kernels as a whole."""

from functools import partial

from mutations import Mutation

MODELS = "python/lspm_models"
ADAPTERS = ("tests/models/test_lora.py", "-x")
TUNING = ("tests/models/test_tuning.py", "-x")
in_lora = partial(Mutation, file=f"{MODELS}/models/lora.py", tests=ADAPTERS)
in_blocks = partial(Mutation, file=f"{MODELS}/models/blocks.py", tests=ADAPTERS)
in_freezing = partial(Mutation, file=f"{MODELS}/models/freezing.py", tests=TUNING)
in_folder = partial(Mutation, file=f"{MODELS}/adapter_folder.py", tests=ADAPTERS)

MUTATIONS = [
    in_lora(name="lora: the scale is lost", old="return self.scale * F.linear(", new="return F.linear("),
    in_lora(
        name="lora: what goes to the adapter is not dropped",
        old="F.linear(self.dropout(x), self.lora_A)",
        new="F.linear(x, self.lora_A)",
    ),
    in_lora(
        name="lora: unmerging subtracts",
        old="self.weight.copy_(self.unmerged)",
        new="self.weight.sub_(self.scale * self.lora_B @ self.lora_A)",
    ),
    in_lora(
        name="lora: a merged product counts twice",
        old="return out if self.is_merged else out",
        new="return out",
    ),
    in_lora(
        name="lora: the sum is rounded on the way",
        old="wide = torch.promote_types(weight.dtype, torch.float32)",
        new="wide = torch.bfloat16",
    ),
    in_lora(
        name="lora: all else learns, too",
        old="    model.requires_grad_(False)\n",
        new="",
    ),
    in_lora(
        name="lora: a fused loss leaves the head's adapter out",
        old="        if self.is_merged:\n            return x, self.weight",
        new="        if True:\n            return x, self.weight",
    ),
    in_blocks(
        name="lora: the second layer's adapter is left out",
        old="if not are_linear(self.c_fc, self.c_proj):",
        new="if not are_linear(self.c_fc):",
    ),
    in_blocks(
        name="lora: the gated layer's adapter is left out",
        old="if not are_linear(self.gate_proj, self.up_proj, self.down_proj):",
        new="if not are_linear(self.gate_proj, self.down_proj):",
    ),
    in_folder(
        name="peft: the tensors of one layer without a matrix",
        old="if tensor is None or tensor.shape != parameter.shape:",
        new="if tensor is not None and tensor.shape != parameter.shape:",
    ),
    in_folder(name="peft: alpha is lost", old='"lora_alpha": first.alpha,', new='"lora_alpha": first.rank,'),
    in_freezing(
        name="freeze: the names of modules do not count",
        old="if frozen.intersection(inside[name]):",
        new="if name in frozen:",
    ),
    in_freezing(
        name="freeze: one stage fewer",
        old="for stage in parts[:stages] for module",
        new="for stage in parts[: stages - 1] for module",
    ),
    Mutation(
        name="lora: a run goes on without the weights",
        file="python/finetune.py",
        old=" or (run.tuning and run.tuning.adapts)",
        new="",
        tests=TUNING,
    ),
    Mutation(
        name="lora: a run is read without the weights",
        file=f"{MODELS}/run_folder.py",
        old="        open_source(self._init).load(task)\n",
        new="",
        tests=TUNING,
    ),
    Mutation(
        name="convergence: the residual's norm has another eps",
        file=f"{MODELS}/models/gpt.py",
        old="ln_2=LayerNorm(width, config.eps, bias, dropout, ops)",
        new="ln_2=LayerNorm(width, config.eps * (1.1 if ops.mlp is FUSED.mlp else 1), bias, dropout, ops)",
        tests=("tests/models/test_convergence.py", "-x"),
    ),
    Mutation(
        name="convergence: weights decay twice as fast",
        file="benchmarks/convergence.py",
        old="optimizer = AdamW(parameters, lr=self.learning_rate, clip_norm=CLIP)",
        new="optimizer = AdamW(parameters, lr=self.learning_rate, clip_norm=CLIP, weight_decay=0.02)",
        tests=("tests/models/test_convergence.py", "-x"),
    ),
]
