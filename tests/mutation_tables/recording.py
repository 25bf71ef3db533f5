"""Bugs in what makes kernel calls again, and in the steps of a text that are made so."""

import sys
from functools import partial

from mutations import Mutation

PACKAGE, MODELS = "lspm_kernels", "python/lspm_models"
SETUP = f"LSPM_ISAS=base LSPM_CUDA=0 {sys.executable} setup.py build_ext --inplace"
BUILD = ("sh", "-c", f"rm -rf lspm_kernels/_cpu && {SETUP}")
REPLAYS = ("tests/test_recording.py", "-x")
STEPS = (
    "tests/models/test_generation_steps.py",
    "tests/models/test_generate.py",
    "-x",
    "-k",
    "steps or full_loop",
)
in_recording = partial(Mutation, file=f"{PACKAGE}/recording.py", tests=REPLAYS)
in_team = partial(Mutation, file="csrc/cpu/team.cpp", tests=REPLAYS, command=BUILD)
in_cached_attention = partial(Mutation, file=f"{PACKAGE}/ops/attention_with_kv_cache.py", tests=REPLAYS)
in_cache = partial(Mutation, file=f"{MODELS}/models/cache.py", tests=STEPS)
in_generate = partial(Mutation, file=f"{MODELS}/generate.py", tests=STEPS)

MUTATIONS = [
    in_recording(
        name="recording: nothing is recorded",
        file=f"{PACKAGE}/compiled.py",
        old="    calls.append((function, args))",
        new="    pass",
    ),
    in_recording(
        name="recording: it goes on behind the block",
        old="        compiled.recorded.reset(self._token)",
        new="        pass",
    ),
    in_recording(
        name="recording: what torch computes is not told",
        old="or _computes(result, args, kwargs)",
        new="",
    ),
    in_recording(
        name="recording: what is read is not told",
        old="name in _READS or ",
        new="",
    ),
    in_recording(
        name="recording: what is written is not told",
        old=" or _writes(name, kwargs)",
        new="",
    ),
    in_recording(
        name="recording: modes are not asked for",
        old="if not checks.plain():",
        new="if False:",
    ),
    in_recording(
        name="recording: a recorded call records what it calls",
        file=f"{PACKAGE}/compiled.py",
        old="    token = recorded.set(None)",
        new="    token = recorded.set(calls)",
    ),
    in_team(
        name="recording: a team waits for threads that a fork has not",
        old=" || is_forked) return main();",
        new=") return main();",
    ),
    in_team(
        name="recording: a team's other threads do nothing",
        old="    if (call) call(body_, thread, threads_);",
        new="    if (call && thread == 0) call(body_, thread, threads_);",
    ),
    in_cached_attention(
        name="recording: keys are those of the first call",
        old="    compiled.call(lambda: torch.add(counts, new, out=total))\n    return total",
        new="    return counts + new",
    ),
    Mutation(
        name="recording: lengths are read, so that the longest is that of the first call",
        file=f"{PACKAGE}/checks.py",
        old="if not plain(t) or compiled.recorded.get() is not None:",
        new="if not plain(t):",
        tests=REPLAYS,
    ),
    in_cache(
        name="recording: look-ups stay at the first place",
        old="        self._places.fill_(end)\n",
        new="",
    ),
    in_cache(
        name="recording: attention stays at the first place",
        old="        self._counts.fill_(end)\n",
        new="",
    ),
    in_cache(
        name="recording: a shared prompt is only in the first row",
        old="                    held[1:, :, self.length : end] = held[:1, :, self.length : end]",
        new="                    pass",
    ),
    in_generate(
        name="recording: a replay is believed before it is compared",
        old="            self.is_proven = torch.equal(logits, self.found)",
        new="            self.is_proven = True",
    ),
    in_generate(
        name="recording: the token is that of the recording",
        old="        self.tokens.copy_(tokens)\n",
        new="",
    ),
    in_generate(
        name="recording: a replay does not move the cache on",
        old="            self.cache.advance(tokens)\n",
        new="",
    ),
    in_generate(
        name="recording: hooks are left out",
        old="or any(self.hooks) ",
        new="",
    ),
    in_generate(
        name="recording: what torch computes is left out",
        old="False if self.recording.missed else None",
        new="None",
    ),
    in_generate(
        name="recording: parts that are replaced meanwhile stay",
        old="list(map(id, self._held())) == self.ids",
        new="True",
    ),
    in_generate(
        name="recording: tensors that are replaced meanwhile stay",
        old="(part._modules, part._parameters, part._buffers)",
        new="(part._modules,)",
    ),
]
