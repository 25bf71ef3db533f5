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


def own(file, test):
    """Mutations of what is done within a module's own forward."""
    path = f"tests/acceleration/test_own_{test}.py"
    return partial(Mutation, file=f"lspm_kernels/acceleration/{file}.py", tests=(path, "-x"))


in_rotations, in_sums = own("rotations", "rotary"), own("sums", "sums")
in_places, in_source = own("places", "places"), own("source", "sources")
in_attentions = own("attentions", "attention")

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
        old="far = torch.logspace(-6, 12, 110, dtype=_F64)",
        new="far = torch.logspace(-6, 1, 110, dtype=_F64)",
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
        old="marks = weight._version, weight.data_ptr(),",
        new="marks = weight.data_ptr(),",
    ),
    in_hugging_face(
        name="accelerate: models that share a config all change",
        old="module.config = copy.deepcopy(config, copies)",
        new="module.config = config",
    ),
    in_rotations(
        name="own forwards: a rotation's tables are taken although an angle's two numbers differ",
        old="if again is not None and not all(torch.equal(once(t), again(t)) for t in (cos, sin)):",
        new="if again is None and form != 'once':",
    ),
    in_rotations(
        name="own forwards: a rotation's gradients are not compared",
        old="pairs = zip((*found, *grads), (*expected, *turned), strict=True)",
        new="pairs = zip(found, expected, strict=True)",
    ),
    in_rotations(
        name="own forwards: tables that were changed in place are not compared again",
        old="marks = form, cos._version, sin._version,",
        new="marks = form,",
    ),
    in_rotations(
        name="own forwards: what is turned lies otherwise than before",
        old="y.contiguous() if found.contiguous or x.is_contiguous() else y",
        new="y",
    ),
    in_sums(
        name="own forwards: a norm's hooks see no call",
        old="or not unhooked(module):",
        new="or False:",
    ),
    in_sums(
        name="own forwards: an option of a norm that changed is not followed",
        old="or known[0] != names or not all(map(operator.is_, known[1], values)):",
        new="or known[0] != names:",
    ),
    in_places(
        name="own forwards: a sum is normalised before what changes it",
        old="""                copied.add(statement.targets[0].id)
            else:
                return None""",
        new="""                copied.add(statement.targets[0].id)
            else:
                continue""",
    ),
    in_places(
        name="own forwards: a norm is called before what a statement does first",
        old="return next(_done(statement.value), None)",
        new="return next((c for c in _done(statement.value) if c is not None and _is_of(c, 'h')), None)",
    ),
    in_attentions(
        name="own forwards: what stands in torch's place later is not called",
        old="if function is TORCHS and _takes(",
        new="if _takes(",
    ),
    in_attentions(
        name="own forwards: heads of keys that do not fit are taken",
        old="return heads == H or (enable_gqa and H % heads == 0)",
        new="return H % heads == 0",
    ),
    in_source(
        name="own forwards: a source is believed that is not what runs",
        old="if not _same(_compiled(function, tree, ()), function.__code__):",
        new="if _compiled(function, tree, ()) is None:",
    ),
]
