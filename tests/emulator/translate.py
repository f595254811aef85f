"""C++ from PTX: each kernel becomes a function that one thread runs, each instruction a statement of the table."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from .opcodes import TYPES, statement
from .ptx import (
    SIZES,
    Address,
    Instruction,
    Kernel,
    Label,
    Location,
    Name,
    Number,
    Operand,
    Parameter,
    Program,
    PtxError,
    Vector,
)

REDZONE = 1024  # bytes between shared arrays, so that one index too many falls between them
STACK = 96 * 1024  # bytes for the compiler's own use, on top of local arrays and registers

SPECIAL = {f"%{name}.{axis}": f"{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"}
SPECIAL |= {f"%tid.{axis}": f"self.tid.{axis}" for axis in "xyz"}
SPECIAL |= {"%laneid": "self.lane", "%warpid": "self.warp", "%dynamic_smem_size": "dynamic_shared_bytes"}
SPECIAL |= {"%lanemask_eq": "(1u << self.lane)", "%lanemask_lt": "((1u << self.lane) - 1)"}
SPECIAL |= {"%lanemask_le": "(2u << self.lane) - 1", "%lanemask_gt": "~((2u << self.lane) - 1)"}
SPECIAL |= {"%lanemask_ge": "~((1u << self.lane) - 1)"}


@dataclass(frozen=True)
class Translation:
    """C++ of a module, and what its numbers mean."""

    code: str
    kernels: dict[str, list[Parameter]]  # in the order of the table in the code
    sites: list[Instruction]  # by site number

    def place(self, site: int) -> Location | str:
        """Where a site is in the source; its PTX line where the text has no line information."""
        if site < 0:
            return "launch"
        return self.sites[site].location or f"PTX line {self.sites[site].line}"


def identifier(prefix: str, name: str) -> str:
    """A C++ name, apart from those of the runtime: `$` is legal, `%` and `.` are not."""
    return prefix + re.sub(r"[^\w$]", "_", name)


def register(name: str) -> str:
    return identifier("r_", name)


def variable(name: str) -> str:
    return identifier("v_", name)


class _KernelWriter:
    def __init__(self, kernel: Kernel, program: Program):
        self.kernel = kernel
        self.parameters = {p.name: p for p in kernel.parameters}
        used = {name for item in kernel.body if isinstance(item, Instruction) for name in _names(item.operands)}
        shared = [v for v in program.variables if v.space == "shared" and v.name in used]
        self.shared = shared + [v for v in kernel.variables if v.space == "shared"]
        self.local = {v.name: v for v in kernel.variables if v.space == "local"}
        self.module = {v.name for v in program.variables if v.space in ("const", "global")}
        self.offsets, self.dynamic_offset = self._lay_out()
        self.positions = {item.name: at for at, item in enumerate(kernel.body) if isinstance(item, Label)}
        self.at = 0

    def _lay_out(self) -> tuple[dict[str, int], int]:
        """Offsets of the shared arrays, and of the dynamic one. The first bytes are reserved, as on a device."""
        offsets, end = {}, 0
        for v in self.shared:
            if not v.dynamic:
                offsets[v.name] = math.ceil((end + REDZONE) / v.align) * v.align
                end = offsets[v.name] + v.size
        dynamic = math.ceil((end + REDZONE) / 1024) * 1024
        return offsets | {v.name: dynamic for v in self.shared if v.dynamic}, dynamic

    # What the opcode table asks

    def read(self, operand: Operand, kind: str) -> str:
        target = TYPES[kind]
        if isinstance(operand, Number):
            if operand.float_bits:
                return f"as<{target}>(u{operand.float_bits}({operand.value}ull))"
            return f"as<{target}>(u64({operand.value % 2**64}ull))"
        if not isinstance(operand, Name):
            raise PtxError(f"a register, a number or a variable is expected. Received: {operand}")
        value = f"as<{target}>({self._value(operand.text)})"
        return f"!{value}" if operand.negated else value

    def write(self, operand: Operand, value: str) -> str:
        if not isinstance(operand, Name):
            raise PtxError(f"a register is expected. Received: {operand}")
        if operand.text == "_":
            return f"{value};"
        if operand.text not in self.kernel.registers:
            raise PtxError(f"an undeclared register. Received: {operand.text}")
        target = register(operand.text)
        return f"{target} = as<decltype({target})>({value});"

    def label(self, name: str) -> str:
        return identifier("L_", name)

    def is_backward(self, name: str) -> bool:
        return self.positions[name] < self.at

    def _value(self, name: str) -> str:
        if name in self.kernel.registers:
            return register(name)
        if name in SPECIAL:
            return SPECIAL[name]
        if name in self.offsets:
            return f"u64({self.offsets[name]})"
        if name in self.parameters:
            return f"u64(parameters + {self.parameters[name].offset})"
        if name in self.local or name in self.module:
            return f"u64({variable(name)})"
        raise PtxError(f"an undeclared name. Received: {name}")

    # The function

    def function(self, index: int, sites: list[Instruction]) -> str:
        registers = self.kernel.registers
        lines = [f"static void kernel_{index}(Thread& self, const u8* parameters) {{  // {self.kernel.name}"]
        for name, kind in registers.items():
            cpp = "bool" if kind == "pred" else f"u{8 * SIZES[kind]}"
            lines.append(f"  {cpp} {register(name)} = 0;")
        lines += [f"  alignas({v.align}) u8 {variable(v.name)}[{v.size}];" for v in self.local.values()]
        for at, item in enumerate(self.kernel.body):
            self.at = at
            if isinstance(item, Label):
                lines.append(f" {self.label(item.name)}:;")
                continue
            try:
                code = statement(item, len(sites), self)
            except PtxError as error:
                if str(error).startswith("PTX line"):
                    raise
                raise PtxError(f"PTX line {item.line}: {error} in {item}") from None
            guard = f"if ({self.read(item.guard, 'pred')}) " if item.guard else ""
            lines.append(f"  {guard}{{ {code} }}")
            sites.append(item)
        return "\n".join([*lines, "}"])

    def info(self, index: int) -> tuple[str, str]:
        """The lines that describe the kernel to the runtime: its shared arrays, its row in the table."""
        arrays = [f"{{{self.offsets[v.name]}, {v.size}}}" for v in self.shared if not v.dynamic]
        stack = STACK + 16 * len(self.kernel.registers) + sum(v.size + v.align for v in self.local.values())
        stack = math.ceil(stack / 4096) * 4096
        return (
            f"static const SharedArray arrays_{index}[] = {{{', '.join([*arrays, '{0, 0}'])}}};",
            f"  {{kernel_{index}, arrays_{index}, {len(arrays)}, {self.dynamic_offset}, {stack}}},",
        )


def _names(operands: tuple[Operand, ...]) -> Iterator[str]:
    """The names that can stand for a variable: operands, items of vectors, bases of addresses."""
    for operand in operands:
        if isinstance(operand, Vector):
            yield from _names(operand.items)
        elif isinstance(operand, Address):
            yield from _names((operand.base,))
        elif isinstance(operand, Name):
            yield operand.text


def translate(program: Program) -> Translation:
    """The C++ of every kernel of a program."""
    sites: list[Instruction] = []
    lines = ['#include "collectives.h"', "namespace emulator {"]
    variables = [v for v in program.variables if v.space in ("const", "global")]
    for v in variables:
        data = ", ".join(map(str, v.data))
        lines.append(f"alignas({max(v.align, 16)}) static u8 {variable(v.name)}[{max(v.size, 1)}] = {{{data}}};")
    rows = [f"  {{{variable(v.name)}, {v.size}, {str(v.space == 'global').lower()}}}," for v in variables]
    table = []
    for index, kernel in enumerate(program.kernels.values()):
        writer = _KernelWriter(kernel, program)
        lines.append(writer.function(index, sites))
        arrays, row = writer.info(index)
        lines.append(arrays)
        table.append(row)
    lines += ["const KernelInfo kernels[] = {", *table, "};"]
    lines += ["const ModuleVariable module_variables[] = {", *rows, "  {nullptr, 0, false},", "};"]
    lines += [f"const u32 module_variable_count = {len(variables)}, site_count = {len(sites)};", "}"]
    kernels = {kernel.name: kernel.parameters for kernel in program.kernels.values()}
    return Translation("\n".join(lines) + "\n", kernels, sites)
