"""Bugs in BERT: what it computes, what is hidden from it, and what is read of the files of others."""

from functools import partial

from mutations import Mutation

MODELS = "python/lspm_models"
FORMULAS = ("tests/models/test_bert.py", "-x", "-k", "formulas or dropout or padding or head_sees")
MASKS = ("tests/models/test_bert_masking.py", "-x")
FOLDERS = ("tests/models/test_bert_checkpoints.py", "-x")
in_bert = partial(Mutation, file=f"{MODELS}/models/bert.py", tests=FORMULAS)
in_task = partial(Mutation, file=f"{MODELS}/tasks/masked_language_modelling.py", tests=FORMULAS)
in_masking = partial(Mutation, file=f"{MODELS}/data/masking.py", tests=MASKS)
in_tokenizer = partial(Mutation, file=f"{MODELS}/data/mask_tokenizer.py", tests=MASKS)
in_folder = partial(Mutation, file=f"{MODELS}/hugging_face.py", tests=FOLDERS)
in_config = partial(Mutation, file=f"{MODELS}/hugging_face_config.py", tests=FOLDERS)
in_files = partial(Mutation, file=f"{MODELS}/data/tokenizer_folder.py", tests=FOLDERS)
in_outputs = partial(
    Mutation,
    file=f"{MODELS}/encoder_outputs.py",
    tests=("tests/models/test_bert_checkpoints.py", "-x", "-k", "sentences"),
)

MUTATIONS = [
    in_bert(
        name="bert: padding is seen",
        old="visible = None if mask is None else mask.bool()[:, None, None]",
        new="visible = None if mask is None else (mask > -1)[:, None, None]",
    ),
    in_bert(
        name="bert: a norm forgets the residual",
        old="        return self.output.add(self.mlp(x), x)",
        new="        return self.output.add(self.mlp(x), torch.zeros_like(x))",
    ),
    in_bert(
        name="bert: keys are queries",
        old="projections = self.query, self.key, self.value",
        new="projections = self.query, self.query, self.value",
    ),
    in_bert(
        name="bert: every token is of the first part",
        old="torch.zeros_like(tokens) if token_types is None else token_types",
        new="torch.zeros_like(tokens)",
    ),
    in_bert(
        name="bert: the pooler takes the last token",
        old="features[:, 0], self.ops",
        new="features[:, -1], self.ops",
    ),
    in_bert(
        name="bert: attention drops nothing",
        old="dropout = self.dropout if self.training else 0.0",
        new="dropout = 0.0",
    ),
    in_task(
        name="bert: the head has no bias",
        old="        return F.linear(predictions(features), self.head_weight, predictions.bias)",
        new="        return F.linear(predictions(features), self.head_weight)",
    ),
    in_task(
        name="bert: the head sees every token",
        old="        places = (targets != IGNORE_INDEX).nonzero().flatten()",
        new="        places = (targets < 1 << 60).nonzero().flatten()",
    ),
    in_masking(
        name="masks: nine of ten are hidden", old="HIDDEN, OTHER = 0.8, 0.9", new="HIDDEN, OTHER = 0.9, 0.9"
    ),
    in_masking(
        name="masks: special tokens are hidden",
        old="chance = np.where(self._tokenizer.special[ids], np.inf, chance)",
        new="chance = np.where(False, np.inf, chance)",
    ),
    in_masking(
        name="masks: a word's tokens each by themselves",
        old="            chance = np.take_along_axis(chance, begins, axis=1)",
        new="            chance = chance + 0 * begins",
    ),
    in_masking(
        name="masks: not restored",
        old='        self._generator.bit_generator.state = state["masks"]',
        new="        pass",
    ),
    in_masking(
        name="masks: every process has the first one's",
        old="seeds[self._process]",
        new="seeds[0]",
    ),
    in_masking(
        name="masks: another validation each time",
        old="        generator = np.random.default_rng(0)",
        new="        generator = np.random.default_rng()",
    ),
    in_masking(
        name="masks: the most frequent token may be special",
        old="        counts[self._masking.special[: len(counts)]] = 0",
        new="        counts[:] = self._masking.special[: len(counts)]",
    ),
    in_tokenizer(
        name="masks: a word goes on behind a special token",
        old=" & ~self.special[ids[:, :-1]]",
        new="",
    ),
    in_tokenizer(
        name="masks: half a character begins a word",
        old="        return CONTINUES\n    return _whole(",
        new="        return APART\n    return _whole(",
    ),
    in_tokenizer(
        name="masks: a hidden token leaves its space",
        old='part.removesuffix(" ") for part in parts[:-1]',
        new="part for part in parts[:-1]",
    ),
    in_folder(
        name="hugging face: a pooler is passed over",
        old='pooler = f"{self._prefix}pooler.dense.weight" in self.shapes',
        new="pooler = False",
    ),
    in_folder(
        name="hugging face: gamma is no name",
        old='"LayerNorm.gamma": "LayerNorm.weight", ',
        new="",
    ),
    in_folder(
        name="hugging face: heads are unknown tensors",
        old="return [name for name in self.shapes if not name.startswith(self._prefix)]",
        new="return []",
    ),
    in_config(
        name="hugging face: gelu_new is gelu",
        old='    "gelu": ("gelu",),\n    "gelu_tanh": ("gelu_new", ',
        new='    "gelu": ("gelu", "gelu_new"),\n    "gelu_tanh": (',
    ),
    in_files(
        name="tokenizer: all letters become small",
        old='lowercase=flags["do_lower_case"] is not False',
        new="lowercase=True",
    ),
    in_outputs(
        name="sentences: padding counts",
        old="features.sum(1) / mask.sum(1, keepdim=True)",
        new="model(tokens, mask).float().mean(1)",
    ),
]
