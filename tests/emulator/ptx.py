"""PTX text as plain dataclasses.

The parser knows the grammar: directives, declarations, scopes, labels, predicates, operands, line information. It does
not know what an instruction means; that is the table in opcodes.py.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

SIZES = {"pred": 1, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2}
SIZES |= {"b32": 4, "u32": 4, "s32": 4, "f32": 4, "f16x2": 4, "bf16x2": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8}


class PtxError(ValueError):
    """The text is not PTX that the emulator understands; the message names the line."""


# --- What a text says --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Name:
    """A register, a special register, a label or a variable."""

    text: str
    negated: bool = False


@dataclass(frozen=True)
class Number:
    """An immediate: an integer, or the bits of a float of `float_bits` bits."""

    value: int
    float_bits: int = 0


@dataclass(frozen=True)
class Vector:
    """`{a, b, ...}`, or `(a, b, ...)` of a call."""

    items: tuple["Operand", ...]


@dataclass(frozen=True)
class Address:
    """`[base+offset]`, or `[base, {coordinates}]`, the form of tensor copies."""

    base: Name | Number
    offset: int = 0
    coordinates: Vector | None = None


@dataclass(frozen=True)
class Pair:
    """`first|second`: a value and a predicate, or two predicates."""

    first: Name
    second: Name


Operand = Name | Number | Vector | Address | Pair


@dataclass(frozen=True)
class Location:
    """A line of the CUDA C source, and the line that the function there was inlined into."""

    file: str
    line: int
    caller: tuple[str, int] | None = None

    def __str__(self) -> str:
        inlined = f" (inlined at {self.caller[0]}:{self.caller[1]})" if self.caller else ""
        return f"{self.file}:{self.line}{inlined}"


@dataclass(frozen=True)
class Label:
    name: str


@dataclass(frozen=True)
class Instruction:
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Name | None
    line: int
    location: Location | None

    def __str__(self) -> str:
        return ".".join((self.opcode, *self.modifiers))


@dataclass(frozen=True)
class Parameter:
    """A kernel parameter at its byte offset; `array` is true for a structure passed by value."""

    name: str
    type: str
    size: int
    align: int
    offset: int
    array: bool


@dataclass(frozen=True)
class Variable:
    """A variable in the state space shared, local, param, const or global; `data` is its initial value."""

    name: str
    space: str
    align: int
    size: int
    dynamic: bool = False
    data: bytes = b""


@dataclass
class Kernel:
    """A kernel, or a function: what a function takes and returns are variables in the space param."""

    name: str
    parameters: list[Parameter]
    results: list[Parameter] = field(default_factory=list)
    most_threads: int = 0  # of a block; 0 where the text sets no bound
    least_blocks: int = 0  # of a multiprocessor; 0 likewise
    most_registers: int = 0  # of a thread; 0 likewise
    cluster: int = 1  # blocks along x
    registers: dict[str, str] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    body: list[Label | Instruction] = field(default_factory=list)
    targets: dict[str, tuple[str, ...]] = field(default_factory=dict)  # lists of labels that brx.idx branches to


@dataclass
class Program:
    target: str = ""
    kernels: dict[str, Kernel] = field(default_factory=dict)
    functions: dict[str, Kernel] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)


# --- Tokens ------------------------------------------------------------------------------------------------------

TOKEN = re.compile(
    r"""
    (?P<skip>\s+|//[^\n]*|/\*.*?\*/)
  | (?P<directive>\.(?:version|target|address_size|file|loc)\b[^\n]*)      # these end with their line
  | (?P<string>"[^"]*")
  | (?P<number>0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|0[xX][0-9a-fA-F]+U?|\d+U?)
  | (?P<word>\.?[A-Za-z_%$][\w$]*(?:(?:\.|::)\w+)*)
  | (?P<mark>[{}()\[\],;:<>=@!|+-])
    """,
    re.VERBOSE | re.DOTALL,
)


@dataclass(frozen=True)
class Token:
    kind: str
    text: str
    line: int


def _tokens(text: str) -> Iterator[Token]:
    position, line = 0, 1
    while position < len(text):
        match = TOKEN.match(text, position)
        if match is None:
            raise PtxError(f"PTX line {line}: cannot read {text[position : position + 20]!r}")
        if match.lastgroup != "skip":
            yield Token(match.lastgroup, match.group(), line)
        line += match.group().count("\n")
        position = match.end()
    yield Token("end", "", line)


# --- Parser ------------------------------------------------------------------------------------------------------


@dataclass
class _Scope:
    """Braces inside a body: what is declared in them gets a name that is unique in the kernel."""

    suffix: str
    names: dict[str, str] = field(default_factory=dict)

    def declare(self, name: str) -> str:
        self.names[name] = name + self.suffix
        return self.names[name]


class _Parser:
    def __init__(self, text: str):
        # .file stands at the end of the text, after the .loc that need it.
        files = re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.MULTILINE)
        self.files = {int(number): name.rsplit("/", 1)[-1] for number, name in files}
        self.tokens = list(_tokens(text))
        self.at = 0
        self.location: Location | None = None
        self.scopes: list[_Scope] = []  # innermost last
        self.scope_count = 0

    # Token stream

    @property
    def token(self) -> Token:
        return self.tokens[self.at]

    def next(self) -> Token:
        self.at += 1
        return self.tokens[self.at - 1]

    def accept(self, *texts: str) -> bool:
        if self.token.kind != "string" and self.token.text in texts:
            self.at += 1
            return True
        return False

    def expect(self, text: str) -> None:
        if not self.accept(text):
            raise self.error(f"expected {text!r}")

    def error(self, message: str) -> PtxError:
        return PtxError(f"PTX line {self.token.line}: {message}. Received: {self.token.text!r}")

    def word(self) -> str:
        if self.token.kind != "word":
            raise self.error("expected a name")
        return self.next().text

    def integer(self) -> int:
        sign = -1 if self.accept("-") else 1
        if self.token.kind != "number":
            raise self.error("expected a number")
        return sign * _number(self.next().text).value

    def skip_block(self) -> None:
        depth = 0
        while True:
            depth += {"{": 1, "}": -1}.get(self.next().text, 0)
            if depth == 0:
                return

    # Module level

    def program(self) -> Program:
        program = Program()
        while self.token.kind != "end":
            if self.token.kind == "directive":
                keyword, _, rest = self.next().text.partition(" ")
                if keyword.strip() == ".target":
                    program.target = rest.split(",")[0].strip()
                continue
            while self.accept(".visible", ".extern", ".weak", ".common"):
                pass
            if self.accept(".entry"):
                kernel = self.kernel()
                program.kernels[kernel.name] = kernel
            elif self.accept(".section"):
                self.word()
                self.skip_block()
            elif self.accept(".func"):
                if function := self.function():
                    program.functions[function.name] = function
            elif self.token.text in (".global", ".const", ".shared"):
                program.variables.append(self.variable())
            else:
                raise self.error("unknown directive")
        return program

    def variable(self) -> Variable:
        space, align, kind = self.word()[1:], 0, ""
        while not kind:
            word = self.word()
            if word == ".align":
                align = self.integer()
            elif word[1:] in SIZES:
                kind = word[1:]
            else:
                raise self.error(f"unknown attribute {word} of a variable")
        name, count, dynamic = self.word(), 1, False
        if self.scopes:
            name = self.scopes[-1].declare(name)
        while self.accept("["):
            if self.accept("]"):
                dynamic = True
            else:
                count *= self.integer()
                self.expect("]")
        data = self.initial_value(kind) if self.accept("=") else b""
        self.expect(";")
        size = 0 if dynamic else count * SIZES[kind]
        return Variable(name, space, align or SIZES[kind], size, dynamic, data)

    def initial_value(self, kind: str) -> bytes:
        values = []
        closing = ";"
        if self.accept("{"):
            closing = "}"
        while self.token.text != closing:
            values.append(self.integer() % (1 << 8 * SIZES[kind]))
            self.accept(",")
        if closing == "}":
            self.next()
        code = {1: "B", 2: "H", 4: "I", 8: "Q"}[SIZES[kind]]
        return struct.pack(f"<{len(values)}{code}", *values)

    # Kernels

    def kernel(self) -> Kernel:
        kernel = Kernel(self.word(), self.parameters())
        while self.token.text != "{":
            if self.accept(".maxntid", ".reqntid"):
                kernel.most_threads = self.integer()
                while self.accept(","):
                    kernel.most_threads *= self.integer()
            elif self.accept(".minnctapersm"):
                kernel.least_blocks = self.integer()
            elif self.accept(".maxnreg"):
                kernel.most_registers = self.integer()
            elif self.accept(".reqnctapercluster"):
                kernel.cluster = self.integer()
                while self.accept(","):
                    if self.integer() != 1:
                        raise self.error("clusters are supported along x")
            else:
                self.next()
        self.body(kernel)
        return kernel

    def function(self) -> Kernel | None:
        """A function; None where it is only declared."""
        results = self.parameters()
        function = Kernel(self.word(), self.parameters(), results)
        while self.token.text not in ("{", ";"):
            self.next()
        if self.accept(";"):
            return None
        self.body(function)
        return function

    def body(self, kernel: Kernel) -> None:
        self.expect("{")
        self.location = None
        self.scope_count = 0
        self.open_scope()
        while self.scopes:
            self.statement(kernel)

    def parameters(self) -> list[Parameter]:
        found: list[Parameter] = []
        if self.accept("("):
            while not self.accept(")"):
                found.append(self.parameter(found))
                self.accept(",")
        return found

    def parameter(self, before: list[Parameter]) -> Parameter:
        self.expect(".param")
        align, kind = 0, ""
        while self.token.text.startswith("."):
            word = self.word()
            if word == ".align":
                given = self.integer()
                if not kind:  # after the type it is the alignment of what a pointer points to
                    align = given
            elif word[1:] in SIZES:
                kind = word[1:]
        name, size, array = self.word(), SIZES[kind], False
        if self.accept("["):
            size, array = self.integer() * size, True
            self.expect("]")
        align = align or SIZES[kind]
        end = before[-1].offset + before[-1].size if before else 0
        return Parameter(name, kind, size, align, -(-end // align) * align, array)

    def open_scope(self) -> None:
        """Enters a scope; its labels are known from the start, since branches go forward too."""
        self.scope_count += 1
        scope = _Scope(f".{self.scope_count}" if self.scopes else "")
        depth, index = 0, self.at
        while depth >= 0:
            token, after = self.tokens[index], self.tokens[index + 1]
            depth += {"{": 1, "}": -1}.get(token.text, 0)
            if depth == 0 and token.kind == "word" and after.text == ":":
                scope.declare(token.text)
            index += 1
        self.scopes.append(scope)

    def resolve(self, name: str) -> str:
        return next((scope.names[name] for scope in reversed(self.scopes) if name in scope.names), name)

    def statement(self, kernel: Kernel) -> None:
        token = self.token
        if token.kind == "directive":
            self.next()
            self.locate(token.text)
        elif self.accept("{"):
            self.open_scope()
        elif self.accept("}"):
            self.scopes.pop()
        elif self.accept(".reg"):
            self.declare_registers(kernel)
        elif token.text in (".shared", ".local", ".param"):
            kernel.variables.append(self.variable())
        elif self.accept(".pragma"):
            while not self.accept(";"):
                self.next()
        elif token.kind == "word" and self.tokens[self.at + 1].text == ":":
            label = self.resolve(self.word())
            self.expect(":")
            if self.accept(".branchtargets"):
                kernel.targets[label] = tuple(self.names_until_semicolon())
            else:
                kernel.body.append(Label(label))
        elif not self.accept(";"):
            kernel.body.append(self.instruction())

    def names_until_semicolon(self) -> Iterator[str]:
        while not self.accept(";"):
            yield self.resolve(self.word())
            self.accept(",")

    def locate(self, directive: str) -> None:
        if match := re.match(r"\.loc\s+(\d+)\s+(\d+)", directive):
            inlined = re.search(r"inlined_at\s+(\d+)\s+(\d+)", directive)
            caller = (self.files.get(int(inlined[1]), "?"), int(inlined[2])) if inlined else None
            self.location = Location(self.files.get(int(match[1]), "?"), int(match[2]), caller)

    def declare_registers(self, kernel: Kernel) -> None:
        kind = self.word()[1:]
        if kind not in SIZES:
            raise self.error(f"unknown register type .{kind}")
        while True:
            name = self.word()
            names = [name]
            if self.accept("<"):
                names = [f"{name}{index}" for index in range(self.integer())]
                self.expect(">")
            for each in names:
                kernel.registers[self.scopes[-1].declare(each)] = kind
            if not self.accept(","):
                break
        self.expect(";")

    def instruction(self) -> Instruction:
        guard = None
        if self.accept("@"):
            guard = self.name()
        line = self.token.line
        opcode, *modifiers = self.word().split(".")
        if not opcode:
            raise self.error(f"unknown directive .{'.'.join(modifiers)}")
        operands = []
        while not self.accept(";"):
            operands.append(self.operand())
            if self.token.text != ";":
                self.expect(",")
        return Instruction(opcode, tuple(modifiers), tuple(operands), guard, line, self.location)

    def name(self) -> Name:
        negated = self.accept("!")
        return Name(self.resolve(self.word()), negated)

    def operand(self) -> Operand:
        if self.accept("{"):
            return self.vector("}")
        if self.accept("("):
            return self.vector(")")
        if self.accept("["):
            base = self.name() if self.token.kind == "word" else Number(self.integer())
            offset, coordinates = 0, None
            if self.accept("+") or self.token.text == "-":
                offset = self.integer()
            if self.accept(","):
                self.expect("{")
                coordinates = self.vector("}")
            self.expect("]")
            return Address(base, offset, coordinates)
        if self.token.kind == "number":
            return _number(self.next().text)
        if self.token.text == "-":
            return Number(self.integer())
        first = self.name()
        return Pair(first, self.name()) if self.accept("|") else first

    def vector(self, closing: str) -> Vector:
        items = []
        while not self.accept(closing):
            items.append(self.operand())
            self.accept(",")
        return Vector(tuple(items))


def _number(text: str) -> Number:
    if text[:2] in ("0f", "0F"):
        return Number(int(text[2:], 16), 32)
    if text[:2] in ("0d", "0D"):
        return Number(int(text[2:], 16), 64)
    text = text.rstrip("U")
    if text.startswith("0") and text.isdigit():
        return Number(int(text, 8))
    return Number(int(text, 0))


def parse(text: str) -> Program:
    """What a PTX text says."""
    return _Parser(text).program()
