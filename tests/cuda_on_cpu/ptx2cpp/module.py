"""The frame of a PTX module: tables, shared arrays, kernels, declarations and labels."""

import math
import re

from cuda_on_cpu.ptx2cpp.instructions import UnknownInstructionError, instruction
from cuda_on_cpu.ptx2cpp.operands import TYPES, Scope, identifier, split_operands

SHARED = re.compile(r"\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[(\d*)\]\s*;")
TABLE = re.compile(r"\.(?:global|const) \.align \d+ \.b8 ([\w$]+)\[\d+\] = (\{[^}]*\});")
ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\n\{", re.S)
NUMBERED_REGISTERS = re.compile(r"^\s*\.reg\s+\.(\w+)\s+(%\w+)<(\d+)>;", re.M)
INSTRUCTION = re.compile(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)")
# An instruction that writes its first operand, behind a guard or not.
WRITE = re.compile(
    r"(?:^|[;{}])\s*(?:@!?%\w+\s+)?(?!st\.|red\.|bra|bar|cp\.)[a-z][\w.:]*\s+(\{[^}]*\}|[%\w|]+)\s*,",
    re.M,
)
MOST_THREADS = 1024


def translate(ptx, export=False, only=""):
    """Translates a module.

    Args:
        ptx: its text.
        export: kernels become C functions ptx_NAME, with ptx_NAME_threads; otherwise they register themselves
            and replace at launch the kernels of the same names that g++ compiled.
        only: a regular expression that the names of the kernels wanted match.

    Returns:
        C++ source text.

    Raises:
        ValueError: an instruction is not known.
    """
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', ptx, re.M))
    ptx = re.sub(r"//[^\n]*", "", ptx)
    shared = {name: int(size) if size else None for name, size in SHARED.findall(ptx)}
    lines = ['#include "translated_ptx.h"', "using namespace translated;", "namespace {"]
    lines += [f"const char {identifier(name)}_key = 0;" for name, size in shared.items() if size is not None]
    for name, values in TABLE.findall(ptx):
        table = identifier(name)
        lines.append(f"alignas(16) const u8 {table}_data[] = {values};")
        lines.append(f"const u64 {table} = (u64){table}_data;")
    lines.append("}")
    entries = [match for match in ENTRY.finditer(ptx) if re.search(only, match.group(1))]
    for number, match in enumerate(entries):
        kernel = Kernel(match, function_body(ptx, match.end()), shared, files, export)
        lines += kernel.definition(number)
    return "\n".join(lines) + "\n"


def function_body(ptx, start):
    """What stands between the brace before `start` and its partner."""
    depth, end = 1, start
    while depth:
        depth += {"{": 1, "}": -1}.get(ptx[end], 0)
        end += 1
    return ptx[start : end - 1]


class Kernel:
    """One .entry."""

    def __init__(self, entry, body, shared, files, export):
        self.name, parameters, attributes = entry.groups()
        self.files, self.export = files, export
        bound = re.search(r"\.(?:maxntid|reqntid) ([\d, ]+)", attributes)
        self.threads = math.prod(int(n) for n in bound.group(1).split(",")) if bound else None
        names = re.findall(r"([\w$]+)(?:\[\d+\])?\s*(?:,|$)", parameters.strip())
        self.scope = Scope({name: i for i, name in enumerate(names)}, shared, export)
        self.body = SHARED.sub("", body)
        self.locals, self.number = [], 0
        self.writes = {}  # of each register: how many instructions
        for operand in WRITE.findall(self.body):
            for register in re.findall(r"%\w+", operand):
                self.writes[register] = self.writes.get(register, 0) + 1

    def definition(self, number):
        """The lines of its C++ function, and of what makes it known."""
        registers = {identifier(name): TYPES[ty] for ty, name, _ in NUMBERED_REGISTERS.findall(self.body)}
        code = [line for statement in self.statements() for line in self.statement(statement)]
        text = "\n".join(code)
        lines = [self.head(number)]
        for name, ty in registers.items():  # only those in use: a kernel declares hundreds
            if used := sorted(set(re.findall(rf"\b{name}\d*\b", text))):
                lines.append(f"{ty} " + ", ".join(f"{register}{{}}" for register in used) + ";")
        if "wgmma_queue." in text:
            lines.append("WgmmaQueue wgmma_queue;")
        if re.search(r"\bcarry\b", text):
            lines.append("u64 carry = 0;")
        lines += [self.shared_address(name) for name in sorted(self.scope.shared_in_use)]
        return [*lines, *self.locals, *code, '#line 1 "ptx"', "}", *self.tail(number)]

    def head(self, number):
        name = (
            f'extern "C" void ptx_{identifier(self.name)[1:]}'
            if self.export
            else f"static void kernel{number}"
        )
        return f"{name}([[maybe_unused]] char** argv) {{"

    def tail(self, number):
        if self.export:
            return [
                f'extern "C" const unsigned ptx_{identifier(self.name)[1:]}_threads = {self.threads or 0};'
            ]
        arguments = f'"{as_gcc_mangles(self.name)}", kernel{number}, {self.threads or MOST_THREADS}'
        return [f"static emu::PtxEntry entry{number}({arguments});"]

    def shared_address(self, name):
        size = self.scope.shared[name]
        if size is None:
            array = "emu::dynamic_shared()"
        else:
            shown = re.sub(r".*?([a-zA-Z_]+)(E_)?(_[0-9]+)?$", r"\1", name)
            array = f'emu::shared_array(&{identifier(name)}_key, "{shown}", {size})'
        return f"const u32 {identifier(name)} = emu::to_shared({array});"

    def statements(self):
        """The body cut at semicolons, braces apart; labels and .loc lines end where their line does."""
        body = NUMBERED_REGISTERS.sub("", self.body)
        body = re.sub(r"^(\s*\.loc[^\n]*)$", r"\1;", body, flags=re.M)
        body = re.sub(r"^(\s*\$?\w+:)", r"\1;", body, flags=re.M)
        for piece in body.split(";"):
            braces, statement = re.fullmatch(r"([{}\s]*)(.*)", " ".join(piece.split())).groups()
            yield from braces.replace(" ", "")
            if statement:
                yield statement

    def statement(self, statement):
        """Its C++ lines."""
        if statement in "{}":
            return [statement]
        if statement.endswith(":"):
            return [f"{identifier(statement[:-1])}:;"]
        if statement.startswith(".loc "):
            file, line = re.match(r"\.loc (?:.*inlined_at )?(\d+) (\d+)", statement).groups()
            return [f'#line {line} "{self.files[file]}"'] if line != "0" and file in self.files else []
        if match := re.match(r"\.local \.align \d+ \.b8 ([\w$]+)\[(\d+)\]", statement):
            self.declare_stack(*match.groups())
            return []
        if match := re.match(r"\.reg \.(\w+) (.*)", statement):
            return [self.declare_registers(*match.groups())]
        return [] if statement.startswith(".") else [self.guarded(statement)]

    def declare_stack(self, name, size):
        name = identifier(name)
        self.locals.append(f"alignas(16) char {name}_data[{size}];")
        if re.search(r"\.reg \.b32\s+%SPL;", self.body):  # 32-bit offsets in the one stack array
            self.scope.stack = f"{name}_data"
            self.locals.append(f"u64 {name} = 0;")
        else:
            self.locals.append(f"u64 {name} = (u64){name}_data;")

    def declare_registers(self, ty, names):
        registers = []
        for name in names.split(","):
            count = re.fullmatch(r"(.*)<(\d+)>", name.strip())
            registers += [f"{count[1]}{i}" for i in range(int(count[2]))] if count else [name.strip()]
        return f"{TYPES[ty]} " + ", ".join(f"{identifier(register)}{{}}" for register in registers) + ";"

    def guarded(self, statement):
        negated, guard, opcode, operands = INSTRUCTION.match(statement).groups()
        operands = split_operands(operands)
        self.number += 1
        try:
            code = instruction(opcode, operands, self.scope, self.number)
        except UnknownInstructionError:
            raise ValueError(f"ptx2cpp: {self.name}: unknown instruction: {statement}") from None
        if not guard:
            return code
        code = f"if ({negated}{identifier(guard)}) {{ {code} }}"
        if opcode.startswith("ld."):  # masked off, with nothing else that sets the register: poison
            registers = [r for r in re.findall(r"%\w+", operands[0]) if self.writes[r] == 1]
            code += " else { " + " ".join(f"poison({identifier(r)});" for r in registers) + " }"
        return code


def as_gcc_mangles(name):
    """nvcc names an anonymous namespace after its file, g++ does not."""

    def plain(match):
        length = int(match.group(1))
        return "12_GLOBAL__N_1" + match.group(2)[length:]

    return re.sub(r"(\d+)(_GLOBAL__N__\w*)", plain, name)
