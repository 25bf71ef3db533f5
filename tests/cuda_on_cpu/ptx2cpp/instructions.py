"""The table of PTX instructions: for each, the C++ that does the same. PTX ISA, chapter "Instruction Set"."""

import re

from cuda_on_cpu.ptx2cpp.operands import elements, identifier

COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
COMPARISONS |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}  # of unsigned numbers
ARITHMETIC = {"add": "+", "sub": "-", "mul": "*", "div": "/", "and": "&", "or": "|", "xor": "^"}
FLOAT_FORMULAS = {"add": "a + b", "sub": "a - b", "mul": "a * b", "fma": "std::fma(a, b, c)"}
HALF_TYPES = {"bf16": "bf16", "f16": "f16"}
ROUNDINGS = {"rni": "nearbyint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}
NOT_MODELLED = {"sat", "satfinite", "relu", "xorsign"}

TABLE = {}  # first part of the name -> (number of operands or None, translation)


class UnknownInstructionError(Exception):
    """The table has no such instruction, or not with these modifiers or operands."""


class Instruction:
    """One instruction: its name in parts, its operands, and the kernel's names."""

    def __init__(self, name, operands, scope, number):
        self.name, self.operands, self.scope = name, operands, scope
        self.parts = name.split(".")
        self.type = re.sub(r"^b(\d)", r"u\1", self.parts[-1])  # bits are unsigned, bf16 is not bits
        self.at = f"AT({number})"
        self.value, self.address = scope.value, scope.address

    def has(self, part):
        return part in self.parts

    def operand(self, i, ty=None):
        return self.value(self.operands[i], ty or self.type)

    def put(self, expression):
        return f"set({identifier(self.operands[0])}, {expression});"

    def space(self):
        return next((p for p in self.parts if p in ("param", "global", "shared", "local")), "generic")

    def require(self, condition):
        if not condition:
            raise UnknownInstructionError(self.name)


def opcode(*names, operands=None):
    """Registers a translation. Another number of operands is then refused, so that none is ever dropped."""

    def register(translation):
        for name in names:
            TABLE[name] = operands, translation
        return translation

    return register


def instruction(name, operands, scope, number):
    """The C++ of one instruction."""
    name = name.replace("shared::cta", "shared")
    this = Instruction(name, operands, scope, number)
    this.require(this.parts[0] in TABLE)
    this.require(not NOT_MODELLED & set(this.parts) and "shared::" not in name)
    count, translation = TABLE[this.parts[0]]
    this.require(count is None or len(operands) == count)
    return translation(this)


# ---- arithmetic


@opcode("add", "sub", "mul", operands=3)
def add_sub_mul(i):
    root, ty = i.parts[0], i.type
    if packed := of_packed_or_half(i):
        return packed
    if i.has("cc"):
        return carry_chain(i)
    if i.has("wide"):
        wide = ty[0] + str(2 * int(ty[1:]))
        return i.put(f"({wide}){i.operand(1)} * ({wide}){i.operand(2)}")
    if i.has("hi"):
        return i.put(f"({ty})((__int128){i.operand(1)} * {i.operand(2)} >> {ty[1:]})")
    i.require(root != "mul" or i.has("lo") or ty[0] == "f")
    if ty[0] == "s":
        ty = "u" + ty[1:]  # it wraps
    return i.put(f"({ty})({i.operand(1, ty)} {ARITHMETIC[root]} {i.operand(2, ty)})")


@opcode("and", "or", "xor", "div", operands=3)
def logic_and_division(i):
    ty = "bool" if i.type == "pred" else i.type
    i.require(not ty.endswith("f16"))
    return i.put(f"({ty})({i.operand(1, ty)} {ARITHMETIC[i.parts[0]]} {i.operand(2, ty)})")


@opcode("fma", operands=4)
def fma(i):
    return of_packed_or_half(i) or i.put(f"std::fma({i.operand(1)}, {i.operand(2)}, {i.operand(3)})")


def of_packed_or_half(i):
    """Arithmetic of two floats in a register, or of 16-bit floats, perhaps with a float; else None."""
    root, ty = i.parts[0], i.parts[-1]
    if ty == "f32x2":
        arguments = ", ".join(i.value(o, "u64") for o in i.operands[1:])
        return i.put(f"each_of_two({float_lambda(root)}, {arguments})")
    half = HALF_TYPES.get(ty.removesuffix("x2"))
    if not half:
        i.require(not ty.endswith("x2"))
        return None
    if i.parts[-2] != "f32":
        register = "u32" if ty.endswith("x2") else "u16"
        arguments = ", ".join(i.value(o, register) for o in i.operands[1:])
        return i.put(f"halves<{half}, {register}>({float_lambda(root)}, {arguments})")
    i.require(root != "mul" and not ty.endswith("x2"))
    values = [f"to_float(as<{half}>({i.value(o)}))" for o in i.operands[1:-1]] + [
        i.value(i.operands[-1], "float")
    ]
    return i.put(f"std::fma({', '.join(values)})" if root == "fma" else f" {ARITHMETIC[root]} ".join(values))


def float_lambda(root):
    return f"[](float a, float b, [[maybe_unused]] float c) {{ return {FLOAT_FORMULAS[root]}; }}"


@opcode("mad", operands=4)
def mad(i):
    ty = i.type
    if i.has("cc"):
        return carry_chain(i)
    if i.has("hi"):
        return i.put(f"(u{ty[1:]})((__int128){i.operand(1)} * {i.operand(2)} >> {ty[1:]}) + {i.operand(3)}")
    if i.has("lo"):
        return i.put(f"(u{ty[1:]})({i.operand(1)} * {i.operand(2)} + {i.operand(3)})")
    i.require(i.has("wide"))
    wide = ty[0] + "64"
    return i.put(f"({wide}){i.operand(1)} * {i.operand(2)} + {i.operand(3, wide)}")


@opcode("addc", "subc", operands=3)
def addc_subc(i):
    return carry_chain(i)


@opcode("madc", operands=4)
def madc(i):
    return carry_chain(i)


def carry_chain(i):
    i.require(i.type == "u32")
    root = i.parts[0]
    sign = "-" if root.startswith("sub") else "+"
    if root.startswith("mad"):
        shift = 32 if i.has("hi") else 0
        sum_ = f"(u32)((u64){i.operand(1)} * {i.operand(2)} >> {shift}) + (u64){i.operand(3)}"
    else:
        sum_ = f"(u64){i.operand(1)} {sign} {i.operand(2)}"
    if root.endswith("c"):
        sum_ += f" {sign} carry"
    keep = "carry = wide >> 32 & 1; " if i.has("cc") else ""
    return f"{{ u64 wide = {sum_}; {i.put('(u32)wide')} {keep}}}"


@opcode("min", "max")
def min_max(i):
    root, ty = i.parts[0], i.type
    a, b = i.operand(1), i.operand(2)
    if len(i.operands) == 4:  # sm_100
        i.require(ty == "f32" and not i.has("NaN"))
        return i.put(f"std::f{root}(std::f{root}({a}, {b}), {i.operand(3)})")
    i.require(len(i.operands) == 3 and not ty.endswith(("x2", "f16")))
    if i.has("NaN"):
        return i.put(f"unordered({a}, {b}) ? as<f32>(0x7fffffffu) : std::f{root}({a}, {b})")
    return i.put(f"std::f{root}({a}, {b})" if ty[0] == "f" else f"std::{root}<{ty}>({a}, {b})")


FUNCTIONS = {  # of one operand, a
    "not": "({ty})~{a}",
    "neg": "({ty})-{a}",
    "abs": "({ty})std::abs({a})",
    "tanh": "std::tanh({a})",
    "rcp": "1 / {a}",
    "rsqrt": "1 / std::sqrt({a})",
    "sqrt": "std::sqrt({a})",
    "ex2": "ptx::ex2({a})",
    "lg2": "std::log2({a})",
    "popc": "(u32)__builtin_popcountll({a})",
}


@opcode(*FUNCTIONS, operands=2)
def function(i):
    i.require(not i.type.endswith(("x2", "f16")))
    if i.type == "pred":
        return i.put(f"!{i.operand(1, 'bool')}")
    return i.put(FUNCTIONS[i.parts[0]].format(a=i.operand(1), ty=i.type))


@opcode("clz", operands=2)
def clz(i):
    count = "__builtin_clzll" if i.type == "u64" else "__builtin_clz"
    return i.put(f"({i.operand(1)} ? (u32){count}({i.operand(1)}) : {i.type[1:]}u)")


@opcode("rem", operands=3)
def rem(i):
    return i.put(f"({i.type})({i.operand(1)} % {i.operand(2)})")


@opcode("copysign", operands=3)
def copysign(i):
    i.require(i.type in ("f32", "f64"))
    return i.put(f"std::copysign({i.operand(2)}, {i.operand(1)})")  # the sign comes first


# ---- bits, comparisons, moves


@opcode("shl", "shr", operands=3)
def shift(i):
    return i.put(f"{i.parts[0]}<{i.type}>({i.operand(1)}, {i.operand(2, 'u32')})")


@opcode("shf", operands=4)
def funnel_shift(i):
    count = i.operand(3, "u32") + (" & 31" if i.has("wrap") else "")
    return i.put(f"shf_{i.parts[1]}({i.operand(1)}, {i.operand(2)}, std::min<u32>({count}, 32))")


@opcode("bfi", operands=5)
def bit_field_insert(i):
    return i.put(f"bfi({i.operand(1)}, {i.operand(2)}, {i.operand(3, 'u32')}, {i.operand(4, 'u32')})")


@opcode("bfe", operands=4)
def bit_field_extract(i):
    return i.put(f"bfe<{i.type}>({i.operand(1)}, {i.operand(2, 'u32')}, {i.operand(3, 'u32')})")


@opcode("prmt", operands=4)
def prmt(i):
    return i.put(f"prmt({i.operand(1)}, {i.operand(2)}, {i.operand(3)})")


@opcode("selp", operands=4)
def selp(i):
    return i.put(f"{i.value(i.operands[3])} ? {i.operand(1)} : {i.operand(2)}")


@opcode("setp")
def setp(i):
    i.require(len(i.operands) in (3, 4))
    how, a, b = i.parts[1], i.operand(1), i.operand(2)
    is_float = i.type[0] == "f"
    if how == "num":
        condition = f"!unordered({a}, {b})"
    elif how == "nan":
        condition = f"unordered({a}, {b})"
    elif is_float and how.endswith("u"):
        condition = f"(unordered({a}, {b}) || {a} {COMPARISONS[how[:2]]} {b})"
    elif is_float and how == "ne":  # C++'s != is true of a NaN
        condition = f"(!unordered({a}, {b}) && {a} != {b})"
    else:
        condition = f"({a} {COMPARISONS[how]} {b})"
    if len(i.operands) == 4:
        condition += {"and": " & ", "or": " | ", "xor": " ^ "}[i.parts[2]] + i.value(i.operands[3])
    return f"{identifier(i.operands[0])} = {condition};"


@opcode("mov", operands=2)
def mov(i):
    to, source = i.operands
    if i.type == "pred":
        return f"{identifier(to)} = {i.value(source)};"
    bits = int(i.type[1:])
    if to.startswith("{"):
        registers = elements(to)
        each = bits // len(registers)
        value = i.value(source, i.type)
        parts = [
            f"{identifier(r)} = (u{each})({value} >> {each * n});"
            for n, r in enumerate(registers)
            if r != "_"
        ]
        return " ".join(parts)
    if source.startswith("{"):
        registers = elements(source)
        each = bits // len(registers)
        # as<> of a register, and a cast of a literal, keep the low bits only.
        parts = [f"({i.type})(u{each}){i.value(r)} << {each * n}" for n, r in enumerate(registers)]
        return i.put(" | ".join(parts))
    return i.put(i.value(source, i.type))


@opcode("cvta", operands=2)
def cvta(i):
    source = i.value(i.operands[1])
    if i.parts[1] == "shared":
        return i.put(f"(u64)at_shared((u32){source})")
    if i.parts[1:3] == ["to", "shared"]:
        return i.put(f"(u64)emu::to_shared(at({source}))")
    return i.put(i.value(i.operands[1], "u64"))


@opcode("cvt")
def cvt(i):
    to, source = i.parts[-2:]
    if to.endswith("x2"):
        half = HALF_TYPES.get(to[:-2])
        i.require(half and source == "f32" and len(i.operands) == 3)
        return i.put(f"pack<{half}>({i.operand(2, 'float')}, {i.operand(1, 'float')})")
    i.require(len(i.operands) == 2 and not source.endswith("x2"))
    if to == "tf32":
        return i.put(f"ptx::cvt_tf32({i.operand(1, 'float')})")
    if source in HALF_TYPES:
        value = f"to_float(as<{HALF_TYPES[source]}>({i.value(i.operands[1])}))"
    else:
        value = i.operand(1, source)
    if to in HALF_TYPES:
        return i.put(f"as<u16>(from_float<{HALF_TYPES[to]}>({value}))")
    rounding = next((ROUNDINGS[p] for p in i.parts if p in ROUNDINGS), None)
    if to[0] in "us" and source[0] in "bf":
        i.require(rounding)
        return i.put(f"saturated<{to}>({rounding}({value}))")
    if rounding:
        return i.put(f"({to}){rounding}({value})")
    return i.put(f"({to}){value}")


# ---- memory


def vector_of(i):
    """The number of elements a load or store moves together."""
    return int(next((p[1:] for p in i.parts if re.fullmatch(r"v\d", p)), 1))


def listed(operand):
    return elements(operand) if operand.startswith("{") else [operand]


@opcode("ld", operands=2)
def ld(i):
    registers = listed(i.operands[0])
    sets = [f"set({identifier(r)}, loaded.at[{n}]);" for n, r in enumerate(registers) if r != "_"]
    vector = f"Vec<{i.type}, {vector_of(i)}>"
    return f"{{ auto loaded = *(const {vector}*)({i.address(i.operands[1], i.space())}); {' '.join(sets)} }}"


@opcode("st", operands=2)
def st(i):
    values = ", ".join(i.value(v, i.type) for v in listed(i.operands[1]))
    vector = f"Vec<{i.type}, {vector_of(i)}>"
    note = ""
    if i.scope.same_value_stores and i.space() == "shared":
        note = "emu::about_to_store(to, &stored, sizeof stored); "
    address = i.address(i.operands[0], i.space())
    return f"{{ auto to = ({vector}*)({address}); {vector} stored{{{{{values}}}}}; {note}*to = stored; }}"


@opcode("atom", "red")
def atomic(i):
    i.require(i.parts[-2] in ("add", "max", "min", "exch", "or", "and"))
    to, operands = (i.operands[0], i.operands[1:]) if i.parts[0] == "atom" else ("_", i.operands)
    i.require(len(operands) == 2)
    address, value = i.address(operands[0], i.parts[1]), i.value(operands[1], i.type)
    call = f"atomic<{i.type}>({address}, {value}, atomic_{i.parts[-2]}(), {i.at})"
    return f"(void){call};" if to == "_" else i.put(call)


@opcode("cp")
def cp_async(i):
    if i.name == "cp.async.commit_group":
        return "emu::cp_async_commit();"
    if i.name == "cp.async.wait_group":
        return f"emu::cp_async_wait({i.operands[0]});"
    if i.name == "cp.async.wait_all":
        return "emu::cp_async_wait(-1);"
    i.require(i.name.startswith("cp.async.c") and i.has("shared") and len(i.operands) in (3, 4))
    to, source = i.address(i.operands[0], "shared"), i.address(i.operands[1], "global")
    source_bytes = i.operand(3, "u32") if len(i.operands) == 4 else i.operands[2]
    return f"emu::cp_async({to}, {source}, {i.operands[2]}, {source_bytes}, {i.at});"


@opcode("prefetch", operands=1)
def prefetch(i):
    return f"(void){i.address(i.operands[0], 'global')};"


@opcode("membar", "fence")
def fence(i):
    return "__threadfence();"


# ---- control, barriers, warps


@opcode("bra", operands=1)
def bra(i):
    return f"goto {identifier(i.operands[0])};"


@opcode("ret", "exit", operands=0)
def ret(i):
    return "return;"


@opcode("bar", "barrier", operands=1)
def bar(i):
    if i.name == "bar.warp.sync":
        return f"emu::sync_warp({i.operand(0, 'u32')}, {i.at});"
    i.require(i.name in ("bar.sync", "barrier.sync") and i.operands == ["0"])
    return f"emu::barrier(false, {i.at});"


@opcode("shfl", operands=5)
def shfl(i):
    to, _, predicate = i.operands[0].partition("|")
    values = ", ".join(i.operand(n, "u32") for n in range(1, 5))
    shuffled = f"shfl(translated::Shuffle::{i.parts[2]}, in_segment, {values}, {i.at})"
    also = f"{identifier(predicate)} = in_segment; " if predicate else ""
    return f"{{ bool in_segment; set({identifier(to)}, {shuffled}); {also}}}"


@opcode("vote", operands=3)
def vote(i):
    i.require(i.parts[2] in ("ballot", "any", "all"))
    predicate, mask = i.value(i.operands[1]), i.operand(2, "u32")
    return f"{identifier(i.operands[0])} = __{i.parts[2]}_sync({mask}, {predicate}, {i.at});"


@opcode("redux", operands=3)
def redux(i):
    i.require(i.parts[2] in ("add", "max"))
    return i.put(f"__reduce_{i.parts[2]}_sync({i.operand(2, 'u32')}, {i.operand(1, 'u32')}, {i.at})")


# ---- matrices


def matrix_arguments(i):
    i.require(i.has("m8n8") and i.type == "u16")
    count = next((p[1] for p in i.parts if p in ("x1", "x2", "x4")), None)
    i.require(count)
    return f"<{str(i.has('trans')).lower()}, {count}>"


@opcode("ldmatrix", operands=2)
def ldmatrix(i):
    sets = " ".join(f"{identifier(r)} = matrix.r[{n}];" for n, r in enumerate(elements(i.operands[0])))
    call = f"ldmatrix{matrix_arguments(i)}({i.address(i.operands[1], 'shared')}, {i.at})"
    return f"{{ auto matrix = {call}; {sets} }}"


@opcode("stmatrix", operands=2)
def stmatrix(i):
    values = ", ".join(i.value(r, "u32") for r in elements(i.operands[1]))
    return f"stmatrix{matrix_arguments(i)}({{{{{values}}}, {i.address(i.operands[0], 'shared')}}}, {i.at});"


MMA_MODELS = {
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": "ptx::model_mma_16816<bf16>",
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": "ptx::model_mma_16816<f16>",
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32": "ptx::model_mma_1688_tf32",
}


@opcode("mma", operands=4)
def mma(i):
    i.require(i.name in MMA_MODELS)
    d, a, b, c = (elements(o) for o in i.operands)
    values = [
        ", ".join(i.value(e, ty) for e in operand) for operand, ty in ((c, "float"), (a, "u32"), (b, "u32"))
    ]
    sets = " ".join(f"set({identifier(e)}, tile.d[{n}]);" for n, e in enumerate(d))
    fill = ", ".join(f"{{{v}}}" for v in values)
    return f"{{ ptx::Mma tile = {{{fill}}}; mma({MMA_MODELS[i.name]}, tile, {i.at}); {sets} }}"


@opcode("wgmma")
def wgmma(i):
    if i.name == "wgmma.fence.sync.aligned":
        return ""
    if i.name == "wgmma.commit_group.sync.aligned":
        return "wgmma_queue.commit();"
    if i.name == "wgmma.wait_group.sync.aligned":
        return f"wgmma_queue.wait({i.operands[0]});"
    shapes = r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(?:16\.f32\.(bf16|f16)|8\.f32\.(tf32))\.(?:\2|\3)"
    match = re.fullmatch(shapes, i.name)
    i.require(match and i.operands[4:6] == ["1", "1"])  # -1 would negate an operand
    cols, ty = match[1], match[2] or match[3]
    d, a, b, accumulate = i.operands[:4]
    in_registers = a.startswith("{")
    if ty == "tf32":  # has no transposes
        a_along_mn = b_along_mn = "0"
    elif in_registers:
        a_along_mn, b_along_mn = "0", i.operands[6]
    else:
        a_along_mn, b_along_mn = i.operands[6:8]
    if in_registers:
        a_operand = f"{{{', '.join(i.value(e, 'u32') for e in elements(a))}}}, 0"
    else:
        a_operand = f"{{}}, {i.value(a, 'u64')}"
    registers = ", ".join(f"(u32*)&{identifier(e)}" for e in elements(d))
    flags = f"{str(in_registers).lower()}, {a_along_mn}, {b_along_mn}"
    tile = f"Wgmma<{cols}> tile = {{{{}}, {a_operand}, {i.value(b, 'u64')}, {flags}}};"
    run = f"wgmma_queue.run<{ty}>(tile, registers, {i.value(accumulate, 'bool')}, {i.at});"
    return f"{{ u32* registers[] = {{{registers}}}; {tile} {run} }}"
