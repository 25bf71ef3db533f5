# %% [markdown]
# # One line makes a model of transformers faster
#
# A GPT-2 and a BERT of random weights: what `accelerate` finds in them, that they compute the same as before,
# how long a training step and a forward take before and after, and that `restore` takes it all back. Run it
# whole (`python examples/accelerate_hugging_face.py --help`), or cell by cell in an editor that knows `# %%`.

# %%
import argparse
import copy
import statistics
import time

import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import lspm_kernels

parser = argparse.ArgumentParser(description="Accelerate two models of transformers, and time them.")
parser.add_argument("--width", type=int, default=384, help="features of a token, a multiple of 64")
parser.add_argument("--layers", type=int, default=4)
parser.add_argument("--tokens", type=int, default=256, help="of each of two sequences")
parser.add_argument("--vocabulary", type=int, default=20_000)
parser.add_argument("--rounds", type=int, default=5, help="of timing")
options = parser.parse_args()
torch.manual_seed(0)

# %% [markdown]
# A copy of each model stays as it is, to compare with. Dropout is off, so that both compute the same.

# %%
heads, no_dropout = options.width // 64, {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
shape = {"n_positions": options.tokens, "n_embd": options.width, "n_layer": options.layers, "n_head": heads}
config = GPT2Config(vocab_size=options.vocabulary, **shape, bos_token_id=0, eos_token_id=0, **no_dropout)
gpt2 = GPT2LMHeadModel(config)
shape = {"hidden_size": options.width, "intermediate_size": 4 * options.width, "num_attention_heads": heads}
shape |= {"num_hidden_layers": options.layers, "max_position_embeddings": options.tokens}
bert = BertModel(BertConfig(vocab_size=options.vocabulary, **shape)).eval()
plain_gpt2, plain_bert = copy.deepcopy(gpt2), copy.deepcopy(bert)

tokens = torch.randint(options.vocabulary, (2, options.tokens))
padding = torch.ones_like(tokens)
padding[1, options.tokens // 2 :] = 0  # the second text is half as long

# %% [markdown]
# The line itself. Its report tells what each module is now.

# %%
print("GPT-2:", lspm_kernels.accelerate(gpt2), "", sep="\n")
print("BERT:", lspm_kernels.accelerate(bert), "", sep="\n")


# %% [markdown]
# Equal: the loss and every gradient of GPT-2, and what BERT makes of the tokens that are no padding.


# %%
def training_step(model):
    model.zero_grad()
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    return loss.detach()


@torch.no_grad()
def forward(model):
    return model(tokens, attention_mask=padding).last_hidden_state[padding.bool()]


def error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


loss = error(training_step(gpt2), training_step(plain_gpt2))
pairs = zip(gpt2.parameters(), plain_gpt2.parameters(), strict=True)
gradients = max(error(ours.grad, theirs.grad) for ours, theirs in pairs)
features = error(forward(bert), forward(plain_bert))
print(f"relative errors   loss {loss:.1e}, gradients up to {gradients:.1e}, features {features:.1e}")
assert max(loss, gradients, features) < 1e-4

# %% [markdown]
# Faster: both in turns, the order turned every round, and the median of the ratios. A machine that does
# something else meanwhile shows in the spread.


# %%
def compare(what, function, ours, theirs):
    ratios, seconds = [], []
    for round_ in range(options.rounds + 1):
        taken = {}
        for model in (ours, theirs) if round_ % 2 else (theirs, ours):
            began = time.perf_counter()
            function(model)
            taken[model] = time.perf_counter() - began
        if round_:  # the first one warms up
            seconds.append(taken[theirs])
            ratios.append(taken[theirs] / taken[ours])
    before, ratio = 1e3 * statistics.median(seconds), statistics.median(ratios)
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"{what:18s}{before:.0f} ms before, after it {ratio:.2f} times as fast ({spread})")


compare("training, GPT-2", training_step, gpt2, plain_gpt2)
compare("forward, BERT", forward, bert, plain_bert)

# %% [markdown]
# And back: the same objects, the same bits.

# %%
lspm_kernels.restore(bert)
assert torch.equal(forward(bert), forward(plain_bert))
print("restored          the same bits as before")
