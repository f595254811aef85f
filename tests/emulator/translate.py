"""C++ from PTX: each kernel becomes a function that one thread runs, each instruction a statement of the table."""

import functools
import math
import pickle
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from . import cache, lint
from .opcodes import TYPES, is_byte_access, statement
from .ptx import (
    SIZES,
    Address,
    Instruction,
    Kernel,
    Label,
    Name,
    Number,
    Operand,
    Parameter,
    Program,
    PtxError,
    Vector,
    parse,
)
from .tensor_copies import uses_engine
from .warpgroup import sums_of

REDZONE = 1024  # bytes between shared arrays, so that one index too many falls between them
STACK = 96 * 1024  # bytes for the compiler's own use, on top of local arrays and registers

ENGINES = 96  # of a cluster: mbarriers that copies count on, warpgroups, two of each thread that stores in bulk

INTEGERS = {f"{sign}{bits}" for sign in "us" for bits in (8, 16, 32, 64)}

SPECIAL = {f"%{name}.{axis}": f"{name}.{axis}" for name in ("ntid", "nctaid") for axis in "xyz"}
SPECIAL |= {f"%{name}.{axis}": f"self.{name}.{axis}" for name in ("tid", "ctaid") for axis in "xyz"}
SPECIAL |= {"%laneid": "self.lane", "%warpid": "(self.warp % block_warps)"}
SPECIAL |= {"%dynamic_smem_size": "dynamic_shared_bytes"}
SPECIAL |= dict.fromkeys(("%cluster_ctarank", "%cluster_ctaid.x"), "self.rank")
SPECIAL |= dict.fromkeys(("%cluster_nctarank", "%cluster_nctaid.x"), "cluster_size")
SPECIAL |= {"%clusterid.x": "(self.ctaid.x / cluster_size)", "%nclusterid.x": "(nctaid.x / cluster_size)"}
SPECIAL |= {"%lanemask_eq": "(1u << self.lane)", "%lanemask_lt": "((1u << self.lane) - 1)"}
SPECIAL |= {"%lanemask_le": "(2u << self.lane) - 1", "%lanemask_gt": "~((2u << self.lane) - 1)"}
SPECIAL |= {"%lanemask_ge": "~((1u << self.lane) - 1)"}


@dataclass(frozen=True)
class KernelInfo:
    """What a launch must know of a kernel."""

    parameters: list[Parameter]
    shared_bytes: int  # of its static arrays
    most_threads: int  # of a block, from its launch bounds; 0 without
    cluster: int  # blocks
    findings: list[tuple[str, int, str]]  # of lint.py: kind, site, text


class Spot(NamedTuple):
    """An instruction as reports name it."""

    instruction: str
    place: str  # in the source; its PTX line where the text has no line information
    line: int | None  # of the source


@dataclass(frozen=True)
class Translation:
    """C++ of a module, and what its numbers mean."""

    code: str
    kernels: dict[str, KernelInfo]  # in the order of the table in the code
    sites: list[Spot]  # by site number
    cell_bytes: int  # of memory that the detector tells apart


def identifier(prefix: str, name: str) -> str:
    """A C++ name, apart from those of the runtime: `$` is legal, `%` and `.` are not."""
    return prefix + re.sub(r"[^\w$]", "_", name)


def literal(number: Number, target: str) -> str:
    """A number as a C++ expression of a type of arithmetic.h."""
    bits, value = number.float_bits, number.value
    if bits == 0 and target in INTEGERS:
        return f"{target}({value})" if 0 <= value < 2**31 else f"{target}({value % 2**64}ull)"
    if target == f"f{bits}":
        decoded = struct.unpack("<f" if bits == 32 else "<d", value.to_bytes(bits // 8, "little"))[0]
        if math.isfinite(decoded):
            return f"({decoded.hex()}{'f' if bits == 32 else ''})"
    return f"as<{target}>(u{bits or 64}({value % 2**64}ull))"


def register(name: str) -> str:
    return identifier("r_", name)


def variable(name: str) -> str:
    return identifier("v_", name)


class _KernelWriter:
    """A kernel and the functions that it calls."""

    def __init__(self, kernel: Kernel, index: int, program: Program):
        self.index = index
        self.parts = list(_reachable(kernel, program))  # the kernel first
        self.functions = {part.name: f"function_{index}_{n}" for n, part in enumerate(self.parts) if n}
        used = {name for part in self.parts for name in _used(part)}
        self.shared = [v for v in program.variables if v.space == "shared" and v.name in used]
        self.shared += [v for part in self.parts for v in part.variables if v.space == "shared"]
        self.module = {v.name for v in program.variables if v.space in ("const", "global")}
        self.offsets, self.dynamic_offset = self._lay_out()
        self.findings: list[tuple[str, int, str]] = []
        self._enter(kernel)

    def _enter(self, part: Kernel) -> None:
        self.kernel = part
        is_function = part.name in self.functions
        self.parameters = {} if is_function else {p.name: p for p in part.parameters}
        self.local = {v.name: v for v in part.variables if v.space in ("local", "param")}
        self.passed = {p.name for p in (*part.results, *part.parameters)} if is_function else set()
        self.positions = {item.name: at for at, item in enumerate(part.body) if isinstance(item, Label)}
        self.late = sums_of(part)
        self.at = self.site = 0
        self.sites: dict[int, int] = {}  # position in the body -> number of the site

    def _lay_out(self) -> tuple[dict[str, int], int]:
        """Offsets of the shared arrays, and of the dynamic one. The first bytes are reserved, as on a device."""
        offsets, end = {}, 0
        for v in self.shared:
            if not v.dynamic:
                offsets[v.name] = math.ceil((end + REDZONE) / v.align) * v.align
                end = offsets[v.name] + v.size
        dynamic = math.ceil((end + REDZONE) / 1024) * 1024
        return offsets | {v.name: dynamic for v in self.shared if v.dynamic}, dynamic

    @property
    def shared_bytes(self) -> int:
        """What the static shared arrays take, laid out without the zones between them."""
        end = 0
        for v in self.shared:
            end = math.ceil(end / v.align) * v.align + v.size
        return end

    # What the opcode table asks

    # The compiler spends most of its time on reading, so a conversion is written only where the types differ.

    def read(self, operand: Operand, kind: str) -> str:
        target = TYPES[kind]
        if isinstance(operand, Number):
            return literal(operand, target)
        if not isinstance(operand, Name):
            raise PtxError(f"a register, a number or a variable is expected. Received: {operand}")
        held = self._type(operand.text)
        value = self._value(operand.text)
        if operand.text in self.late and not self._passes_on(self.kernel.body[self.at]):
            value = f"settled(self, {self.site}, {value})"
        if held != target:
            value = f"{target}({value})" if {held, target} <= INTEGERS else f"as<{target}>({value})"
        return f"!{value}" if operand.negated else value

    @staticmethod
    def _passes_on(item: Instruction) -> bool:
        """Whether a sum that is not yet made may go through an instruction."""
        plain = all(isinstance(operand, Name) for operand in item.operands)
        return item.opcode == "wgmma" or (item.opcode == "mov" and plain)

    def write(self, operand: Operand, value: str, kind: str | None = None) -> str:
        if not isinstance(operand, Name):
            raise PtxError(f"a register is expected. Received: {operand}")
        if operand.text == "_":
            return f"{value};"
        if operand.text not in self.kernel.registers:
            raise PtxError(f"an undeclared register. Received: {operand.text}")
        held, given = self._type(operand.text), kind and TYPES[kind]
        if held != given and not {held, given} <= INTEGERS:
            value = f"as<{held}>({value})"
        return f"{register(operand.text)} = {value};"

    def label(self, name: str) -> str:
        return identifier("L_", name)

    def is_backward(self, name: str) -> bool:
        return self.positions[name] < self.at

    def targets(self, name: str) -> tuple[str, ...]:
        return self.kernel.targets[name]

    def sums(self) -> list[str]:
        return [register(name) for name in sorted(self.late)]

    def call(self, name: str, results: Vector, arguments: Vector) -> str:
        if name not in self.functions:
            raise PtxError(f"a function without a body. Received: {name}")
        passed = (variable(item.text) for item in (*results.items, *arguments.items))
        return f"{self.functions[name]}({', '.join(('self', *passed))});"

    def _type(self, name: str) -> str:
        """The C++ type of what `_value` gives; None where it takes a conversion in any case."""
        kind = self.kernel.registers.get(name)
        if kind is None:
            return "u32" if name in SPECIAL else "u64"
        return TYPES[kind] if kind in ("f32", "f64", "pred") else f"u{8 * SIZES[kind]}"

    def _value(self, name: str) -> str:
        if name in self.kernel.registers:
            return register(name)
        if name in SPECIAL:
            return SPECIAL[name]
        if name in self.offsets:
            return f"u64({self.offsets[name]})"
        if name in self.parameters:
            return f"u64(parameters + {self.parameters[name].offset})"
        if name in self.local or name in self.passed or name in self.module:
            return f"u64({variable(name)})"
        raise PtxError(f"an undeclared name. Received: {name}")

    # The functions

    def code(self, sites: list[Instruction]) -> str:
        """The kernel as a C++ function, behind those that it calls."""
        heads = [f"static void kernel_{self.index}(Thread& self, const u8* parameters)"]
        for part in self.parts[1:]:
            passed = (f"u8* {variable(p.name)}" for p in (*part.results, *part.parameters))
            heads.append(f"static void {self.functions[part.name]}({', '.join(('Thread& self', *passed))})")
        lines = [f"{head};" for head in heads]
        for head, part in zip(heads, self.parts):
            self._enter(part)
            lines.append(self._function(head, sites))
            self.findings += [(kind, self.sites[at], text) for kind, at, text in lint.findings(part)]
        self._enter(self.parts[0])
        return "\n".join(lines)

    def _function(self, head: str, sites: list[Instruction]) -> str:
        registers = self.kernel.registers
        lines = [f"KERNEL {head} {{  // {self.kernel.name}"]
        lines += [f"  {self._type(name)} {register(name)} = 0;" for name in registers]
        if any(
            item.opcode[:4] in ("addc", "subc", "madc") or "cc" in item.modifiers for item in _instructions(self.kernel)
        ):
            lines.append("  bool carry = false;")
        lines += [f"  alignas({v.align}) u8 {variable(v.name)}[{v.size}];" for v in self.local.values()]
        for at, item in enumerate(self.kernel.body):
            self.at = at
            if isinstance(item, Label):
                lines.append(f" {self.label(item.name)}:;")
                continue
            self.site = len(sites)
            self.sites[at] = self.site
            try:
                code = statement(item, self.site, self)
            except PtxError as error:
                if str(error).startswith("PTX line"):
                    raise
                raise PtxError(f"PTX line {item.line}: {error} in {item}") from None
            guard = f"if ({self.read(item.guard, 'pred')}) " if item.guard else ""
            lines.append(f"  {guard}{{ {code} }}" if guard or "; " in code else f"  {code}")
            sites.append(item)
        return "\n".join([*lines, "}"])

    def info(self) -> tuple[str, str]:
        """The lines that describe the kernel to the runtime: its shared arrays, its row in the table."""
        index = self.index
        arrays = [f"{{{self.offsets[v.name]}, {v.size}}}" for v in self.shared if not v.dynamic]
        stack = STACK
        for part in self.parts:
            stack += 16 * len(part.registers) + sum(v.size + v.align for v in part.variables if v.space != "shared")
        stack = math.ceil(stack / 4096) * 4096
        kernel = self.kernel
        limits = (kernel.most_threads, kernel.least_blocks, kernel.most_registers, kernel.cluster)
        bounds = ", ".join(map(str, limits))
        return (
            f"static const SharedArray arrays_{index}[] = {{{', '.join([*arrays, '{0, 0}'])}}};",
            f"  {{kernel_{index}, arrays_{index}, {len(arrays)}, {self.dynamic_offset}, {stack}, {bounds}}},",
        )


def _instructions(part: Kernel) -> Iterator[Instruction]:
    return (item for item in part.body if isinstance(item, Instruction))


def _used(part: Kernel) -> set[str]:
    return {name for item in _instructions(part) for name in _names(item.operands)}


def _reachable(kernel: Kernel, program: Program) -> Iterator[Kernel]:
    """A kernel and the functions that it calls, and those that they call."""
    found, waiting = {kernel.name}, [kernel]
    while waiting:
        part = waiting.pop()
        yield part
        called = [name for name in program.functions if name in _used(part) and name not in found]
        found.update(called)
        waiting += [program.functions[name] for name in called]


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
    table, infos = [], {}
    for index, kernel in enumerate(program.kernels.values()):
        writer = _KernelWriter(kernel, index, program)
        lines.append(writer.code(sites))
        infos[kernel.name] = KernelInfo(
            kernel.parameters, writer.shared_bytes, kernel.most_threads, kernel.cluster, writer.findings
        )
        arrays, row = writer.info()
        lines.append(arrays)
        table.append(row)
    lines += ["const KernelInfo kernels[] = {", *table, "};"]
    lines += ["const ModuleVariable module_variables[] = {", *rows, "  {nullptr, 0, false},", "};"]
    cell_bytes = 1 if any(map(is_byte_access, sites)) else 2
    lines += [f"const u32 module_variable_count = {len(variables)}, site_count = {len(sites)};"]
    engines = ENGINES if any(map(uses_engine, sites)) else 0
    lines += [f"const u32 cell_bytes = {cell_bytes}, engine_limit = {engines};", "}"]
    return Translation("\n".join(lines) + "\n", infos, [_spot(item) for item in sites], cell_bytes)


def _spot(item: Instruction) -> Spot:
    return Spot(str(item), str(item.location or f"PTX line {item.line}"), item.location.line if item.location else None)


TRANSLATOR = ("ptx", "opcodes", "tensor_copies", "warpgroup", "lint", "translate")


@functools.lru_cache(maxsize=1)
def _sources() -> str:
    return "".join((Path(__file__).parent / f"{name}.py").read_text() for name in TRANSLATOR)


def translated(ptx: str) -> Translation:
    """The C++ of every kernel of a PTX text, kept by content."""
    path = cache.cached(_sources() + ptx, ".translation", lambda: pickle.dumps(translate(parse(ptx))))
    return pickle.loads(path.read_bytes())
