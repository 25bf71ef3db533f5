"""A GPT-2 of random weights, by Hugging Face's transformers and by ours, of weights kept in a dtype."""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import harness
from lspm_kernels import WeightOnlyLinear, use_backend
from lspm_kernels.reference import linear as reference
from lspm_models.hugging_face import load_pretrained
from lspm_models.sources import WEIGHTS
from lspm_models.tasks.language_modelling import LanguageModelling

PROMPT, NEW_TOKENS = 32, 32
SMALL = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 128, "vocab_size": 199}


@dataclass(frozen=True)
class Generation:
    """One sequence by a model whose weights are kept in a dtype."""

    name: str
    weights: str
    sizes: dict = field(default_factory=dict)  # other than GPT-2's

    def __str__(self) -> str:
        return f"generate/greedy/{self.weights}/{self.name}-B1-T{PROMPT}-new{NEW_TOKENS}"

    def models(self) -> tuple[Any, LanguageModelling, Tensor]:
        """Theirs, ours, and a prompt, (1, PROMPT)."""
        import transformers

        torch.manual_seed(0)
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**self.sizes)).eval()
        prompt = torch.randint(theirs.config.vocab_size, (1, PROMPT))
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            theirs.save_pretrained(folder)
            task, plain = load_pretrained(folder).eval(), load_pretrained(folder).eval()
            task.read_only_(*WEIGHTS[self.weights])
            self._check(task, plain, prompt)
        return theirs, task, prompt

    def _check(self, task: LanguageModelling, plain: LanguageModelling, prompt: Tensor) -> None:
        """Holds the prompt's logits to those of the model whose weights are written out as they are kept."""
        for layer in plain.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(as_kept(layer.weight, self.weights))
        head = as_kept(plain.head_weight, self.weights)
        with use_backend("reference"):
            eager = plain.model(prompt)[:, -1] @ head.T
            truth = copy.deepcopy(plain).double().model(prompt)[:, -1] @ head.double().T
        harness.compare("lspm", [task.head(task.model(prompt)[:, -1])], [truth], [eager])


def by_ctranslate2(theirs: Any, prompt: Tensor) -> Callable[[], object] | None:
    """The loop by CTranslate2 with weights and activations in int8; None where it is not installed.

    With float32 weights it gives transformers' tokens.
    """
    try:
        import ctranslate2
        from ctranslate2.converters.transformers import GPT2Loader
    except ImportError:
        return None
    names = [str(token) for token in range(theirs.config.vocab_size)]
    spec = GPT2Loader().get_model_spec(theirs)
    spec.register_vocabulary(names)
    spec.config.unk_token = spec.config.bos_token = spec.config.eos_token = names[0]
    spec.validate()
    spec.optimize(quantization="int8")
    with tempfile.TemporaryDirectory() as folder:
        spec.save(folder)
        options = {"compute_type": "int8", "inter_threads": 1, "intra_threads": torch.get_num_threads()}
        generator = ctranslate2.Generator(folder, **options)
    length = {"max_length": NEW_TOKENS, "min_length": NEW_TOKENS, "include_prompt_in_result": False}
    tokens = [[names[token] for token in prompt[0].tolist()]]
    return lambda: generator.generate_batch(tokens, sampling_topk=1, **length)


def as_kept(weight: Tensor, weights: str) -> Tensor:
    """A weight as WeightOnlyLinear has it, written out in float32."""
    kept = WeightOnlyLinear(weight, dtype=WEIGHTS[weights][0], group_size=(*WEIGHTS[weights], None)[1])
    return reference.dequantized(kept.weight, kept.scales, torch.float32)
