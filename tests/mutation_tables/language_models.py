"""Bugs in Llama, and in what reads it out of the files of others."""

from functools import partial

from mutations import Mutation

MODELS = "python/lspm_models"
FORMULAS = ("tests/models/test_llama.py", "-x", "-k", "formulas or names or begins")
FOLDERS = ("tests/models/test_hugging_face_checkpoints.py", "-x")
FILES = ("tests/models/test_gguf.py", "-x")
in_llama = partial(Mutation, file=f"{MODELS}/models/llama.py")
in_blocks = partial(Mutation, file=f"{MODELS}/models/blocks.py", tests=FORMULAS)
in_config = partial(Mutation, file=f"{MODELS}/hugging_face_config.py", tests=FOLDERS)
in_folder = partial(Mutation, file=f"{MODELS}/hugging_face.py", tests=FOLDERS)
in_gguf = partial(Mutation, file=f"{MODELS}/gguf.py", tests=FILES)
in_gguf_model = partial(Mutation, file=f"{MODELS}/gguf_model.py", tests=FILES)

MUTATIONS = [
    in_llama(
        name="llama: a cache's new tokens are rotated as the first",
        old="        return cache.rotation\n",
        new="        return tuple(t[:1].expand(t.shape) for t in cache.rotation)\n",
        tests=("tests/models/test_cache.py", "-x", "-k", "rotates"),
    ),
    in_llama(
        name="llama: wavelengths of twice as many pairs",
        old="torch.arange(0, config.head_size, 2,",
        new="torch.arange(0, config.head_size // 2,",
        tests=FORMULAS,
    ),
    in_llama(
        name="llama3: waves between are divided too",
        old="frequencies = (1 - kept) * scaled + kept * frequencies",
        new="frequencies = torch.where(kept < 1, scaled, frequencies)",
        tests=FOLDERS,
    ),
    in_blocks(
        name="llama: the gate is not gated",
        old="self.ops.swiglu(gate, up)",
        new="gate * up",
        tests=("tests/models/test_lora.py", "-x", "-k", "sums"),
    ),
    in_blocks(
        name="llama: keys are not rotated",
        old="q, k = self.ops.rotary(q, *rotation), self.ops.rotary(k, *rotation)",
        new="q = self.ops.rotary(q, *rotation)",
    ),
    in_blocks(
        name="llama: what adds to the residual begins as large as the rest",
        file=f"{MODELS}/models/transformer.py",
        old='name.split(".")[-2] in outputs',
        new="name in outputs",
    ),
    in_config(
        name="hugging face: eps is the default",
        old='"eps": ("rms_norm_eps", 1e-6)',
        new='"eps": ("rms_norm_epsilon", 1e-6)',
    ),
    in_config(
        name="hugging face: theta is lost", old='given.get("rope_theta", content', new='given.get("", content'
    ),
    in_folder(
        name="hugging face: Conv1D as it lies",
        old="        return tensor.t() if self._transposed(name) else tensor\n",
        new="        return tensor\n",
    ),
    in_folder(
        name="hugging face: an index names any file",
        old="or Path(name).name != name:",
        new="or False:",
    ),
    in_gguf(
        name="gguf: the nibbles change places",
        old="(nibbles & 15, nibbles >> 4)",
        new="(nibbles >> 4, nibbles & 15)",
    ),
    in_gguf(
        name="gguf: a count is believed",
        old="        if count * size > rest:",
        new="        if count > 2**62:",
    ),
    in_gguf(
        name="gguf: a tensor ends behind the file",
        old="or begin + length > size:",
        new="or begin > size:",
    ),
    in_gguf_model(
        name="gguf: pairs stay interleaved",
        old='        if name.endswith((".attn_q.weight", ".attn_k.weight")):',
        new='        if name.endswith(".attn_q.weight"):',
    ),
    in_gguf_model(name="gguf: digits join", old='"smollm": True', new='"smollm": False'),
]
