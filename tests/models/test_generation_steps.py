"""Steps of a text by recorded kernels alone: the model's bits, and the model itself where it is more."""

import pytest
import torch
from tiny_gpt import BOTH, make_task
from torch.utils._python_dispatch import TorchDispatchMode

from lspm_models.generate import generate
from lspm_models.models.cache import KeyValueCache
from lspm_models.models.lora import add_lora, lora_layers, merge, unmerge

PROMPT = [7, 3, 60, 0]


def runs_of_the_model(monkeypatch, task, **arguments):
    """How often the model's forward ran, and the tokens, which are those of the full loop."""
    forward, runs = type(task.model).forward, []
    full = generate(task, PROMPT, max_new_tokens=20, seed=5, **arguments, use_cache=False)
    monkeypatch.setattr(type(task.model), "forward", lambda *args: runs.append(0) or forward(*args))
    assert generate(task, PROMPT, max_new_tokens=20, seed=5, **arguments) == full
    return len(runs)


def adapted(task, targets=("*attn.*",)):
    """The task with adapters that have learned something."""
    torch.manual_seed(1)
    for layer in lora_layers(add_lora(task, 4, targets=targets)).values():
        torch.nn.init.normal_(layer.lora_B)
    return task


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("sequences", [1, 2])
@pytest.mark.parametrize("config", BOTH.values(), ids=BOTH)
def test_steps_run_by_their_kernels_once_a_replay_was_right(monkeypatch, config, sequences, read_only):
    task = make_task(config)
    if read_only:
        task.read_only_(torch.int8)
    # The prompt, what is recorded, and what it is compared with, which waits for another token in each row.
    assert 3 <= runs_of_the_model(monkeypatch, task, sequences=sequences) < 8


def test_steps_that_torch_takes_part_in_run_by_the_model(monkeypatch):
    assert runs_of_the_model(monkeypatch, adapted(make_task(), ["*c_attn"])) == 20


def changed_behind_a_token(make, change, by_the_model):
    """Tokens of make(), which change takes after the eighth; by_the_model: none is a replay's."""
    task, seen = make(), []
    if by_the_model:
        task.model.register_forward_hook(lambda *_: None)

    @torch.no_grad()
    def stream(sequence, token):
        seen.append(token)
        if len(seen) == 8:
            torch.manual_seed(2)
            change(task)

    return generate(task, PROMPT, max_new_tokens=20, seed=5, stream=stream)


def check_change(make, change):
    found, wanted = (changed_behind_a_token(make, change, by_the_model) for by_the_model in (False, True))
    assert found == wanted
    assert found != changed_behind_a_token(make, lambda task: None, by_the_model=False)


def test_what_torch_computes_is_missed_where_no_logit_shows_it_yet():
    def make():
        task = adapted(make_task(), ["*c_attn"])
        for block in task.model.h:
            torch.nn.init.zeros_(block.attn.c_proj.weight)
        return task

    def change(task):
        for block in task.model.h:
            torch.nn.init.normal_(block.attn.c_proj.weight)

    check_change(make, change)


def assign(task):
    state = {name: torch.randn_like(value) for name, value in task.state_dict().items()}
    task.load_state_dict(state, assign=True)


def put_new_head(task):
    task.model.wte = torch.nn.Embedding(*task.model.wte.weight.shape)


def swap_blocks(task):
    task.model.h[0], task.model.h[1] = task.model.h[1], task.model.h[0]


def add_noise(task):
    for parameter in task.parameters():
        parameter.add_(torch.randn_like(parameter))


def put_noise(task):
    for parameter in task.parameters():
        parameter.data = parameter + torch.randn_like(parameter)


def hook_in(task):
    task.model.h[1].register_forward_hook(lambda module, inputs, output: (output[0] * 0, output[1]))


@pytest.mark.parametrize(
    "change",
    [assign, put_new_head, swap_blocks, add_noise, put_noise, hook_in, adapted],
    ids=lambda change: change.__name__,
)
def test_a_model_that_changes_meanwhile(change):
    check_change(make_task, change)


@pytest.mark.parametrize("by_the_model", [False, True])
def test_another_dtype_meanwhile_is_not_the_caches(by_the_model):
    rule = r"^attention_with_kv_cache: k_cache must have q's dtype torch\.float16, got torch\.float32$"
    with pytest.raises(ValueError, match=rule):
        changed_behind_a_token(make_task, torch.nn.Module.half, by_the_model)


def test_adapters_that_leave_the_weights_meanwhile():
    def make():
        task = adapted(make_task())
        merge(task)
        return task

    def change(task):
        unmerge(task)
        for layer in lora_layers(task).values():
            layer.lora_B.neg_()

    check_change(make, change)


class Decider(torch.nn.Module):
    """One of two MLPs, by what it is given."""

    def __init__(self, *mlps):
        super().__init__()
        self.mlps = torch.nn.ModuleList(mlps)

    def forward(self, x):
        return self.mlps[x[0, -1, 0].item() > 0.5](x)


@pytest.mark.parametrize("seed", range(4))
def test_a_model_that_decides_by_values_runs_by_itself(seed):
    task = make_task()
    task.model.h[1].mlp = Decider(task.model.h[1].mlp, task.model.h[2].mlp)
    tokens = generate(task, PROMPT, max_new_tokens=20, seed=seed)
    task.model.register_forward_hook(lambda *_: None)  # by which no token is a replay's
    assert generate(task, PROMPT, max_new_tokens=20, seed=seed) == tokens


@pytest.mark.parametrize("part", ["model", "model.h.1.mlp"])
def test_a_model_with_compiled_parts(part):
    task = make_task()
    arguments = {"max_new_tokens": 20, "seed": 5}
    tokens = generate(task, PROMPT, **arguments)
    task.get_submodule(part).compile(backend="eager")
    assert generate(task, PROMPT, **arguments) == tokens


def test_numbers_that_change_are_found_by_the_comparison(monkeypatch):
    begin = KeyValueCache.begin

    def by_number(self, tokens):
        begin(self, tokens)
        return self.length

    monkeypatch.setattr(KeyValueCache, "begin", by_number)
    assert runs_of_the_model(monkeypatch, make_task()) == 20


def test_hooks_see_each_token(monkeypatch):
    task, seen = make_task(), []
    task.model.h[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs))
    assert runs_of_the_model(monkeypatch, task) == 20
    assert len(seen) == 40


def test_a_forward_of_the_module_itself_sees_each_token(monkeypatch):
    task, seen = make_task(), []
    block = task.model.h[0]
    forward = block.forward
    block.forward = lambda *args: seen.append(args) or forward(*args)
    assert runs_of_the_model(monkeypatch, task) == 20
    assert len(seen) == 40


def test_hooks_of_all_modules_see_each_token(monkeypatch):
    seen = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: seen.append(module)
    )
    try:
        task = make_task()
        assert runs_of_the_model(monkeypatch, task) == 20
    finally:
        hook.remove()
    assert seen.count(task.model) == 40


def test_a_dispatch_mode_sees_each_token():
    class Counts(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += "linear" in str(function)
            return function(*args, **(kwargs or {}))

    counted = []
    for tokens in (5, 20):
        with Counts() as counts:
            generate(make_task(), PROMPT, max_new_tokens=tokens, seed=5)
        counted.append(counts.calls)
    assert counted[1] - counted[0] == 15 * counted[0] // 5 > 0
