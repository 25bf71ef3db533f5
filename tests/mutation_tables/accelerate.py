"""Bugs in accelerate: what is believed of a module, what a loss reads, what stays behind."""

from functools import partial

from mutations import Mutation

ALL = "tests/acceleration/test_accelerate.py"
LOOKALIKES = "tests/acceleration/test_lookalikes.py"
in_probe = partial(Mutation, file="lspm_kernels/acceleration/probe.py", tests=(LOOKALIKES, "-x"))
in_lookalikes = partial(Mutation, file="lspm_kernels/acceleration/lookalikes.py", tests=(LOOKALIKES, "-x"))
in_swap = partial(Mutation, file="lspm_kernels/acceleration/swap.py", tests=(ALL, "-x"))
in_logits = partial(
    Mutation, file="lspm_kernels/acceleration/logits.py", tests=("tests/acceleration/test_heads.py", "-x")
)
in_copies = partial(
    Mutation,
    file="lspm_kernels/acceleration/weight_copies.py",
    tests=("tests/acceleration/test_weight_copies.py", "-x"),
)
in_hugging_face = partial(
    Mutation,
    file="lspm_kernels/acceleration/hugging_face.py",
    tests=("tests/acceleration/test_hugging_face_models.py", "-x", "-k", "config or saved"),
)

MUTATIONS = [
    in_probe(
        name="accelerate: a module's gradients are not compared",
        old="return bool((y <= allowed).all()) and all(",
        new="return bool((y <= allowed).all()) or all(",
    ),
    in_probe(
        name="accelerate: a module that changes itself is believed",
        old="return found if unchanged else None",
        new="return found",
    ),
    in_lookalikes(
        name="accelerate: a module is asked in two dimensions only",
        old="shapes = x, x[None], x[:, None, None]\n    outcomes",
        new="shapes = (x,)\n    outcomes",
    ),
    in_lookalikes(
        name="accelerate: an activation is asked for small numbers only",
        old="far = torch.logspace(-6, 4, 60, dtype=_F64)",
        new="far = torch.logspace(-6, 1, 60, dtype=_F64)",
    ),
    in_swap(
        name="accelerate: what a module knows stays behind when it is restored",
        old='    module.__dict__.pop("lspm", None)\n',
        new="",
    ),
    in_logits(
        name="logits: a part that was taken before is not what is written",
        old="for member in [reference() for reference in self._origin.members]:",
        new="for member in [self]:",
    ),
    in_logits(
        name="logits: of parts that were read a loss is still computed without them",
        old="type(first) is Logits and not first._origin.is_tensor",
        new="type(first) is Logits",
    ),
    in_logits(
        name="logits: what no loss read leaves its model unmade",
        old="return output if output.gave_loss else output.tensor()",
        new="return output",
    ),
    in_copies(
        name="weight copies: a weight that changed in place is not copied again",
        old="made_of = weight.data_ptr(), version,",
        new="made_of = weight.data_ptr(),",
    ),
    in_hugging_face(
        name="accelerate: models that share a config all change",
        old="module.config = copy.deepcopy(config, copies)",
        new="module.config = config",
    ),
]
