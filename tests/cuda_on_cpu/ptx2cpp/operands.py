"""Operands of PTX instructions as C++ expressions: registers, numbers, parameters, addresses."""

import re

# Registers have no sign: an instruction's type says how to read them.
TYPES = {
    "pred": "bool",
    "b8": "u8",
    "b16": "u16",
    "u16": "u16",
    "f16": "u16",
    "b32": "u32",
    "u32": "u32",
    "s32": "u32",
    "b64": "u64",
    "u64": "u64",
    "s64": "u64",
    "f32": "float",
    "f64": "double",
}
SPECIAL_REGISTERS = {"%laneid": "emu::lane"}
for _ptx, _cuda in {"tid": "threadIdx", "ctaid": "blockIdx", "ntid": "blockDim", "nctaid": "gridDim"}.items():
    SPECIAL_REGISTERS |= {f"%{_ptx}.{axis}": f"{_cuda}.{axis}" for axis in "xyz"}


def identifier(name):
    """A C++ name; the letter before it because %f32 is a register and f32 a type."""
    return "v" + re.sub(r"\W", "_", name.lstrip("%$"))


def split_operands(text):
    """Cut at the commas outside of brackets."""
    operands, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            operands.append(current.strip())
            current = ""
        else:
            current += character
    return [*operands, current.strip()] if current.strip() else operands


def elements(operand):
    """Of a vector operand {a, b}."""
    return [element.strip() for element in operand.strip()[1:-1].split(",")]


class Scope:
    """The names a kernel sees.

    Attributes:
        parameters: their positions.
        shared: sizes of the module's shared arrays in bytes, None for the dynamic one.
        shared_in_use: those this kernel names.
        stack: the C++ name of its stack array, where the kernel holds 32-bit offsets in it.
        same_value_stores: several threads may store the same value to one shared address, as Triton's do.
    """

    def __init__(self, parameters, shared, same_value_stores):
        self.parameters, self.shared, self.same_value_stores = parameters, shared, same_value_stores
        self.shared_in_use, self.stack = set(), ""

    def value(self, operand, ty=None):
        """The operand, read as a `ty`."""
        operand = operand.strip()
        if operand in SPECIAL_REGISTERS:
            expression = SPECIAL_REGISTERS[operand]
        elif match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", operand):
            expression = f"as<float>(0x{match[1]}u)"
        elif match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", operand):
            expression = f"as<double>(0x{match[1]}ull)"
        elif match := re.fullmatch(r"(-?\d+|0x[0-9a-fA-F]+)U?", operand):
            return f"(({ty or 's64'}){match[1]}ll)"
        elif operand in self.parameters:
            expression = f"(u64)argv[{self.parameters[operand]}]"
        else:
            if operand in self.shared:
                self.shared_in_use.add(operand)
            expression = identifier(operand)
        return f"as<{ty}>({expression})" if ty else expression

    def address(self, operand, space):
        """A char* for [base + offset]."""
        match = re.fullmatch(r"\[\s*([^+\]\s]+)\s*(?:\+\s*(-?\w+)\s*)?\]", operand.strip())
        base, offset = self.value(match[1]), match[2] or "0"
        if space == "shared":
            return f"at_shared(as<u32>({base}) + ({offset}))"
        if space == "local" and self.stack:
            return f"{self.stack} + as<u32>({base}) + ({offset})"
        return f"at(as<u64>({base}) + ({offset}))"
