"""What ptxas made of a kernel: its registers, stack and shared memory from the cubin, its instructions from nvdisasm.

    function = functions(compile_cubin(path, "sm_90", constants))["conv_simt"]
    function.registers, function.stack_bytes         # a spill needs a stack
    loop = function.main_loop("FFMA")
    loop.share("FFMA"), loop.count("LDS", "128")

The cubin is read here; instructions need `nvdisasm`, from the wheel `nvidia-cuda-nvdisasm` or on PATH.
"""

import functools
import hashlib
import importlib.util
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from emulator import cache

# Every architecture that the kernels are compiled for; `a` has instructions that later ones do not.
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_120")

# Opcodes of the integer and logic units, those of a warp's own registers among them (U...): indices, addresses,
# predicates, and what only moves between registers.
INTEGER = frozenset(
    """
    BMSK BREV FLO IABS IADD IADD3 IADD32I IDP IMAD IMNMX IMUL ISCADD ISETP LEA LOP LOP3 LOP32I MOV MOV32I P2R
    PLOP3 POPC PRMT PSETP R2P R2UR SEL SGXT SHF SHL SHR UBMSK UBREV UFLO UIADD UIADD3 UIMAD UISETP ULEA ULOP ULOP3
    UMOV UP2UR UPLOP3 UPOPC UPRMT UPSETP UR2UP USEL USGXT USHF USHL USHR UVIADD VABSDIFF VIADD VIADDMNMX VIMNMX VOTE
    VOTEU
    """.split()
)


@functools.lru_cache(maxsize=1)
def _nvdisasm() -> str | None:
    if spec := importlib.util.find_spec("nvidia"):
        for folder in spec.submodule_search_locations or ():
            for pattern in ("cu*/bin/nvdisasm", "cuda_nvdisasm/bin/nvdisasm"):
                for path in sorted(Path(folder).glob(pattern), reverse=True):
                    return str(path)
    return shutil.which("nvdisasm")


def missing() -> str | None:
    """Why no instructions can be listed here, or None."""
    return None if _nvdisasm() else "nvdisasm is missing: pip install nvidia-cuda-nvdisasm"


# --- Instructions ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    """One machine instruction; `target` is the label it can branch to."""

    address: int
    guard: str  # "P0", "!UP1", or "" where it always executes
    opcode: str  # with its modifiers: "LDG.E.128.CONSTANT"
    operands: str
    target: str | None

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    def is_a(self, name: str, *modifiers: str) -> bool:
        """Whether it is `name` with all of `modifiers`."""
        first, *rest = self.opcode.split(".")
        return first == name and set(modifiers) <= set(rest)

    def __str__(self) -> str:
        return f"/*{self.address:04x}*/ {f'@{self.guard} ' if self.guard else ''}{self.opcode} {self.operands}"


@dataclass(frozen=True)
class Code:
    """Instructions: of a function or of a loop in it."""

    instructions: tuple[Instruction, ...]

    def count(self, name: str, *modifiers: str) -> int:
        """Instructions that are `name` with all of `modifiers`."""
        return sum(instruction.is_a(name, *modifiers) for instruction in self.instructions)

    def share(self, *names: str) -> float:
        """The part of the instructions that are one of `names`."""
        return sum(instruction.name in names for instruction in self.instructions) / len(self.instructions)

    def mix(self) -> dict[str, int]:
        """How often each opcode stands there, modifiers aside, the most frequent first."""
        counts: dict[str, int] = {}
        for instruction in self.instructions:
            counts[instruction.name] = counts.get(instruction.name, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: -item[1]))


@dataclass(frozen=True)
class Loop(Code):
    """A natural loop: what can run between two passes of its first instruction."""

    innermost: bool


@dataclass(frozen=True)
class Function(Code):
    """A function of a cubin; without nvdisasm it has no instructions."""

    name: str = ""
    registers: int = 0  # of a thread
    stack_bytes: int = 0  # of a thread: local arrays and spilled registers
    shared_bytes: int = 0  # static, of a block
    labels: dict[str, int] = field(default_factory=dict)  # address of what follows

    @functools.cached_property
    def loops(self) -> list[Loop]:
        """The natural loops, in the order of their first instructions."""
        return _loops(self.instructions, self.labels)

    def main_loop(self, *names: str) -> Loop:
        """The loop that holds the most instructions that are one of `names`, and else as little as possible."""
        assert self.loops, f"{self.name} has no loop"
        return max(self.loops, key=lambda loop: (sum(map(loop.count, names)), -len(loop.instructions)))

    @property
    def spills(self) -> int:
        """Accesses to the stack."""
        return self.count("STL") + self.count("LDL")


ROW = re.compile(
    r"\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@(?P<guard>!?U?P\w+)\s+)?(?P<opcode>[A-Z][\w.]*)(?P<rest>[^;]*);"
)
LABEL = re.compile(r"(\.L\w+):")
TARGET = re.compile(r"`\((\.L\w+)\)")


def _listing(cubin: bytes) -> str:
    """What nvdisasm prints of the code, kept by content."""

    def make() -> bytes:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            return subprocess.run([_nvdisasm(), "--print-code", file.name], capture_output=True, check=True).stdout

    digest = hashlib.sha256(cubin).hexdigest()
    return cache.cached(f"{_nvdisasm()} {digest}", ".sass", make).read_text()


def _disassemble(cubin: bytes) -> dict[str, tuple[tuple[Instruction, ...], dict[str, int]]]:
    """Instructions and labels of each function."""
    found: dict[str, tuple[list[Instruction], dict[str, int]]] = {}
    waiting: list[str] = []
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in _listing(cubin).splitlines():
        if match := re.match(r"\s*\.section\s+\.text\.([\w$]+)", line):
            instructions, labels = found.setdefault(match[1], ([], {}))
        elif match := LABEL.match(line):
            waiting.append(match[1])
        elif match := ROW.match(line):
            address, guard, rest = int(match["address"], 16), match["guard"] or "", match["rest"].strip()
            labels.update(dict.fromkeys(waiting, address))
            waiting.clear()
            target = TARGET.search(rest)
            instruction = Instruction(address, guard, match["opcode"], rest, target[1] if target else None)
            if guard != "!PT" and instruction.name != "NOP":  # filling, never executed
                instructions.append(instruction)
    return {name: (tuple(code), labels) for name, (code, labels) in found.items()}


# --- Loops -------------------------------------------------------------------------------------------------------

ENDS = ("BRA", "BRX", "JMP", "JMX", "EXIT", "RET", "BSYNC", "KILL", "BPT")


def _successors(instructions: Sequence[Instruction], labels: dict[str, int]) -> list[list[int]]:
    """For each instruction those that can come next, by index. Calls come back; indirect branches go nowhere."""
    addresses = [instruction.address for instruction in instructions]
    first_at = {}  # labels may name an instruction that was left out: the next one counts
    for label, address in labels.items():
        first_at[label] = next((i for i, a in enumerate(addresses) if a >= address), None)
    joins: dict[str, int | None] = {}  # where the threads that wait at a convergence barrier go on, by its last BSSY
    result = []
    for i, instruction in enumerate(instructions):
        following: list[int | None] = []
        operands = TARGET.sub("", instruction.operands).strip(" ,")
        conditional = bool(instruction.guard) or (instruction.name == "BRA" and operands)
        if instruction.name not in ENDS or conditional:
            following.append(i + 1 if i + 1 < len(instructions) else None)
        # A call of a label within the function does not come back: ptxas' way to branch out of a long loop.
        if instruction.name in ("BRA", "JMP", "CALL") and instruction.target:
            following.append(first_at.get(instruction.target))
        if instruction.name == "BSSY":
            joins[instruction.operands.split(",")[0]] = first_at.get(instruction.target)
        if instruction.name == "BSYNC":
            following.append(joins.get(instruction.operands))
        result.append([each for each in following if each is not None])
    return result


def _loops(instructions: Sequence[Instruction], labels: dict[str, int]) -> list[Loop]:
    after = _successors(instructions, labels)
    dominators = _dominators(after)
    before: list[list[int]] = [[] for _ in instructions]
    for i, following in enumerate(after):
        for j in following:
            before[j].append(i)
    bodies: dict[int, set[int]] = {}  # first instruction -> all of the loop
    for i, following in enumerate(after):
        for head in following:
            if dominators[i] is None or not _dominates(head, i, dominators):
                continue
            body = bodies.setdefault(head, {head})
            waiting = [i]
            while waiting:
                j = waiting.pop()
                if j not in body:
                    body.add(j)
                    waiting += before[j]
    loops = []
    for head in sorted(bodies):
        innermost = not any(other != head and other in bodies[head] for other in bodies)
        loops.append(Loop(tuple(instructions[i] for i in sorted(bodies[head])), innermost))
    return loops


def _dominators(after: Sequence[Iterable[int]]) -> list[int | None]:
    """The immediate dominator of each node, its own index for the first; None for what cannot be reached."""
    order: list[int] = []  # in postorder
    seen, waiting = {0}, [(0, iter(after[0]))]
    while waiting:
        node, rest = waiting[-1]
        for following in rest:
            if following not in seen:
                seen.add(following)
                waiting.append((following, iter(after[following])))
                break
        else:
            order.append(node)
            waiting.pop()
    number = {node: n for n, node in enumerate(order)}
    before: dict[int, list[int]] = {node: [] for node in order}
    for node in order:
        for following in after[node]:
            before[following].append(node)
    found: list[int | None] = [None] * len(after)
    found[0] = 0
    changed = True
    while changed:
        changed = False
        for node in reversed(order[:-1]):
            new = None
            for each in before[node]:
                if found[each] is None:
                    continue
                a, b = each, each if new is None else new
                while a != b:
                    while number[a] < number[b]:
                        a = found[a]
                    while number[b] < number[a]:
                        b = found[b]
                new = a
            if found[node] != new:
                found[node], changed = new, True
    return found


def _dominates(head: int, node: int, dominators: Sequence[int | None]) -> bool:
    while node != head:
        if dominators[node] == node:
            return False
        node = dominators[node]
    return True


# --- The cubin ---------------------------------------------------------------------------------------------------

# Attributes of .nv.info, a value for the function with a symbol's index.
REGISTER_COUNT, FRAME_SIZE, MINIMUM_STACK_SIZE = 0x2F, 0x11, 0x12
RESERVED_SHARED = 1024  # bytes of a block, from sm_90 on, which the cubin counts in
WITH_SIZE = 0x04  # the format of an attribute whose value has a size of its own


@dataclass(frozen=True)
class _Section:
    name: str
    size: int
    data: bytes


def _sections(cubin: bytes) -> list[_Section]:
    """The sections of a 64-bit ELF file."""
    assert cubin[:5] == b"\x7fELF\x02", "a cubin is an ELF file of 64 bits"
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry_size, count, names_at = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * entry_size) for i in range(count)]

    def data(header) -> bytes:
        no_bits = header[1] == 8
        return b"" if no_bits else cubin[header[4] : header[4] + header[5]]

    names = data(headers[names_at])
    return [_Section(_text(names, header[0]), header[5], data(header)) for header in headers]


def _text(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()


def _attributes(info: bytes) -> dict[tuple[int, int], int]:
    """(attribute, index of the symbol) -> value, of those that have both."""
    found, at = {}, 0
    while at + 4 <= len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == WITH_SIZE:
            if size == 8:
                symbol, value = struct.unpack_from("<II", info, at)
                found[attribute, symbol] = value
            at += size
    return found


def functions(cubin: bytes) -> dict[str, Function]:
    """Every function of a cubin, by its name."""
    sections = {section.name: section for section in _sections(cubin)}
    strings = sections[".strtab"].data
    symbols = [_text(strings, at) for (at,) in struct.iter_unpack("<I20x", sections[".symtab"].data)]
    attributes = _attributes(sections[".nv.info"].data)
    code = _disassemble(cubin) if _nvdisasm() else {}
    reserved = RESERVED_SHARED if ".nv.shared.reserved.0" in sections else 0
    found = {}
    for (attribute, symbol), registers in attributes.items():
        name = symbols[symbol]
        if attribute != REGISTER_COUNT or f".text.{name}" not in sections:
            continue
        stack = max(attributes.get((each, symbol), 0) for each in (FRAME_SIZE, MINIMUM_STACK_SIZE))
        shared = sections[f".nv.shared.{name}"].size if f".nv.shared.{name}" in sections else 0
        instructions, labels = code.get(name, ((), {}))
        found[name] = Function(instructions, name, registers, stack, max(0, shared - reserved), labels)
    return found
