"""What each PTX instruction does: the table from opcode to C++ of arithmetic.h, runtime.h and collectives.h.

A builder takes the modifiers it knows from a `Site`; what is left over is an error, so that nothing is ever ignored by
mistake. A family of instructions is a section of this file, or a module that calls `opcode` like it.
"""

from collections.abc import Callable
from typing import Protocol

from .ptx import Address, Instruction, Name, Number, Operand, Pair, PtxError, Vector

# PTX type -> C++ type of arithmetic.h. Untyped bits are unsigned integers.
TYPES = {f"{kind}{bits}": f"{'s' if kind == 's' else 'u'}{bits}" for kind in "bsu" for bits in (8, 16, 32, 64)}
TYPES |= {name: name for name in ("f16", "bf16", "f32", "f64", "f16x2", "bf16x2")} | {"pred": "bool"}

PACKED = {"f16x2": "f16", "bf16x2": "bf16"}
FLOATS = ("f16", "bf16", "f32", "f64", *PACKED)
HALVES = ("f16", "bf16", *PACKED)
FLUSHED = ("f16", "bf16", "f32")  # types that .ftz applies to


class UnsupportedError(PtxError):
    """An instruction or a modifier that is not in the table."""


class Writer(Protocol):
    """What a builder needs of the kernel that is being translated."""

    def read(self, operand: Operand, kind: str) -> str: ...
    def write(self, operand: Operand, value: str, kind: str | None = None) -> str: ...
    def label(self, name: str) -> str: ...
    def targets(self, name: str) -> tuple[str, ...]: ...
    def call(self, name: str, results: Vector, arguments: Vector) -> str: ...
    def is_backward(self, name: str) -> bool: ...
    def sums(self) -> list[str]: ...


class Site:
    """One instruction while it is translated: its operands as C++, its modifiers to be taken."""

    def __init__(self, instruction: Instruction, number: int, writer: Writer):
        self.instruction = instruction
        self.writer = writer
        self.here = f"self, {number}"  # the first two arguments of every runtime call
        self.modifiers = list(instruction.modifiers)
        self.operands = instruction.operands

    def unsupported(self, why: str) -> UnsupportedError:
        place = f" ({self.instruction.location})" if self.instruction.location else ""
        return UnsupportedError(f"PTX line {self.instruction.line}{place}: {why}. Received: {self.instruction}")

    def take(self, *choices: str) -> str | None:
        """The first modifier that is one of `choices`, removed, or None."""
        for modifier in self.modifiers:
            if modifier in choices:
                self.modifiers.remove(modifier)
                return modifier
        return None

    def need(self, *choices: str) -> str:
        taken = self.take(*choices)
        if taken is None:
            raise self.unsupported(f"one of {', '.join(choices)} is expected")
        return taken

    def type(self) -> str:
        """The first type among the modifiers, removed."""
        return self.need(*TYPES)

    def read(self, index: int, kind: str) -> str:
        return self.writer.read(self.operands[index], kind)

    def reads(self, kind: str, start: int = 1) -> list[str]:
        return [self.writer.read(operand, kind) for operand in self.operands[start:]]

    def write(self, value: str, kind: str | None = None) -> str:
        """`value` to the first operand; `kind` is its type, where it is known."""
        return self.writer.write(self.operands[0], value, kind)

    def write_pair(self, first: str, second: str, kind: str | None = None) -> str:
        """Writes to `a|b`; only `first` where there is no pair."""
        target = self.operands[0]
        if isinstance(target, Pair):
            return f"{self.writer.write(target.first, first, kind)} {self.writer.write(target.second, second)}"
        return self.write(first, kind)

    def array(self, operand: Operand, kind: str) -> str:
        """A vector operand, or a single one, as a std::array."""
        items = operand.items if isinstance(operand, Vector) else (operand,)
        values = ", ".join(self.writer.read(item, kind) for item in items)
        return f"std::array<{TYPES[kind]}, {len(items)}>{{{values}}}"

    def unpack(self, operand: Operand, value: str, kind: str | None = None) -> str:
        """Writes a std::array to a vector operand, or to a single one."""
        if not isinstance(operand, Vector):
            return self.writer.write(operand, f"{value}[0]", kind)
        return f"const auto v = {value}; " + " ".join(
            self.writer.write(item, f"v[{i}]", kind) for i, item in enumerate(operand.items)
        )

    def address(self, index: int) -> str:
        operand = self.operands[index]
        if not isinstance(operand, Address) or operand.coordinates:
            raise self.unsupported("an address is expected")
        base = self.writer.read(operand.base, "u64")
        return f"{base} + {operand.offset}" if operand.offset else base


Builder = Callable[[Site], str]
TABLE: dict[str, Builder] = {}


def opcode(*names: str) -> Callable[[Builder], Builder]:
    """Enters a builder into the table, for all instructions that begin so: `mma`, or `cp.async.bulk`."""

    def enter(builder: Builder) -> Builder:
        TABLE.update(dict.fromkeys(names, builder))
        return builder

    return enter


def statement(instruction: Instruction, number: int, writer: Writer) -> str:
    """The C++ of one instruction, its guard aside."""
    site = Site(instruction, number, writer)
    words = [instruction.opcode, *instruction.modifiers]
    name = next((name for n in range(len(words), 0, -1) if (name := ".".join(words[:n])) in TABLE), None)
    if name is None:
        raise site.unsupported("unknown opcode")
    site.modifiers = words[name.count(".") + 1 :]
    code = TABLE[name](site)
    if site.modifiers:
        raise site.unsupported(f"unknown modifier .{site.modifiers[0]}")
    return code


# --- Arithmetic --------------------------------------------------------------------------------------------------

ROUNDINGS = {"rn": "NEAREST", "rz": "TO_ZERO", "rm": "DOWN", "rp": "UP"}
INTEGER_ROUNDINGS = {"rni": "NEAREST", "rzi": "TO_ZERO", "rmi": "DOWN", "rpi": "UP"}


def call(site: Site, function: str, kind: str, arguments: list[str]) -> str:
    """A function of arithmetic.h on values of one type, with the modifiers that change inputs and results."""
    wrappers = [wrapper for modifier, wrapper in (("sat", "saturate"), ("relu", "relu")) if site.take(modifier)]
    if wrappers and kind not in FLOATS:
        raise site.unsupported("saturating integers are not supported")
    if kind in PACKED:
        value = f"both([](auto... v) {{ return {function}(v...); }}, {', '.join(arguments)})"
        for wrapper in wrappers:
            value = f"both([](auto v) {{ return {wrapper}(v); }}, {value})"
        return value
    if kind in FLUSHED and site.take("ftz"):
        arguments = [f"flush({argument})" for argument in arguments]
        wrappers.insert(0, "flush")
    value = f"{function}({', '.join(arguments)})"
    for wrapper in wrappers:
        value = f"{wrapper}({value})"
    return value


# What C++ has an operator for, or the compiler a name that needs no overload resolution: most of a kernel.
OPERATORS = {"add": "({0} + {1})", "sub": "({0} - {1})", "mul": "({0} * {1})", "mad": "({0} * {1} + {2})"}
FUSED = {"f32": "__builtin_fmaf({0}, {1}, {2})", "f64": "__builtin_fma({0}, {1}, {2})"}

AS_FMA = {"add": ("{0}", "1.f", "{1}"), "sub": ("{1}", "-1.f", "{0}"), "mul": ("{0}", "{1}", "-0.f")}
AS_FMA |= {"fma": ("{0}", "{1}", "{2}")}


@opcode("add", "sub", "mul", "fma", "mad")
def arithmetic(site: Site) -> str:
    name = site.instruction.opcode
    part = site.take("lo", "hi", "wide")
    rounding = site.take(*ROUNDINGS) or "rn"
    kind = site.type()
    if name == "mad" and kind.startswith("f"):
        name = "fma"
    if site.take("cc"):
        return carrying(site, name, kind, part, "false")
    form = FUSED.get(kind) if name == "fma" else OPERATORS[name]
    if part == "lo" or (part is None and not site.modifiers and rounding == "rn" and kind not in HALVES):
        unsigned = kind.replace("s", "u")  # wraps around
        values = site.reads(unsigned)
        return site.write(form.format(*values), unsigned)
    values = site.reads(kind)
    if part in ("hi", "wide") or name == "mad":
        product = {"wide": "mul_wide", "hi": "mul_high"}[part] + f"({values[0]}, {values[1]})"
        sum_kind = kind[0] + str(2 * int(kind[1:])) if part == "wide" else kind
        if name == "mul":
            return site.write(product, sum_kind)
        return site.write(f"add<{TYPES[sum_kind]}>({product}, {site.read(3, sum_kind)})", sum_kind)
    if rounding != "rn":
        if kind != "f32":
            raise site.unsupported("directed rounding is supported for f32 only")
        values = [part.format(*values) for part in AS_FMA[name]]
        name = f"fma_directed<{ROUNDINGS[rounding]}>"
    return site.write(call(site, name, kind, values))


def carrying(site: Site, name: str, kind: str, part: str | None, carry: str) -> str:
    """A sum with a carry bit, for integers of more than 64 bits; without .cc the carry that goes out is dropped."""
    unsigned = kind.replace("s", "u")
    cpp = TYPES[unsigned]
    if name.startswith("mad"):
        factors = ", ".join(site.read(index, kind) for index in (1, 2))
        a, b = f"{cpp}({'mul_high' if part == 'hi' else 'mul'}({factors}))", site.read(3, unsigned)
    else:
        a, b = site.reads(unsigned)
    subtracts = str(name.startswith("sub")).lower()
    return site.write(f"with_carry<{subtracts}, {cpp}>({a}, {b}, {carry}, carry)", unsigned)


@opcode("addc", "subc", "madc")
def carried(site: Site) -> str:
    part = site.take("lo", "hi")
    keeps = site.take("cc")
    kind = site.type()
    code = carrying(site, site.instruction.opcode, kind, part, "carry")
    return code if keeps else f"const bool kept = carry; {code} carry = kept;"


@opcode("min", "max")
def extremum(site: Site) -> str:
    suffix = "_nan" if site.take("NaN") else ""
    kind = site.type()
    return site.write(call(site, site.instruction.opcode + suffix, kind, site.reads(kind)))


@opcode("div", "rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh")
def function(site: Site) -> str:
    precision = site.take("approx", "full", "rn")  # the emulator is correctly rounded, or nearly, in each of them
    kind = site.type()
    if kind == "f64" and precision == "approx":  # but here the lower half of the result is zero
        site.need("ftz")
        return site.write(f"upper_half({site.instruction.opcode}(flush({site.read(1, kind)})))", kind)
    return site.write(call(site, site.instruction.opcode, kind, site.reads(kind)))


@opcode("neg", "abs", "rem", "copysign")
def plain(site: Site) -> str:
    kind = site.type()
    return site.write(call(site, site.instruction.opcode, kind, site.reads(kind)))


# --- Bits --------------------------------------------------------------------------------------------------------


@opcode("and", "or", "xor")
def logic(site: Site) -> str:
    kind = site.type()
    a, b = site.reads(kind)
    return site.write(f"({a} {dict(zip(('and', 'or', 'xor'), '&|^'))[site.instruction.opcode]} {b})", kind)


@opcode("not")
def invert(site: Site) -> str:
    kind = site.type()
    return site.write(f"{'!' if kind == 'pred' else '~'}{site.read(1, kind)}", kind)


@opcode("shl", "shr")
def shift(site: Site) -> str:
    kind = site.type()
    value, by = site.read(1, kind), site.operands[2]
    if isinstance(by, Number) and 0 <= by.value < int(kind[1:]):
        operator = "<<" if site.instruction.opcode == "shl" else ">>"
        return site.write(f"{TYPES[kind]}({value} {operator} {by.value})", kind)
    return site.write(f"{site.instruction.opcode}({value}, {site.read(2, 'u32')})", kind)


@opcode("shf")
def funnel_shift(site: Site) -> str:
    right, wrap = site.need("l", "r") == "r", site.need("wrap", "clamp") == "wrap"
    return site.write(f"funnel<{int(right)}, {int(wrap)}>({', '.join(site.reads(site.need('b32')))})")


@opcode("lop3", "prmt")
def table_of_bits(site: Site) -> str:
    return site.write(f"{site.instruction.opcode}({', '.join(site.reads(site.need('b32')))})")


@opcode("bfi")
def insert_field(site: Site) -> str:
    kind = site.type()
    return site.write(f"bfi({site.read(1, kind)}, {site.read(2, kind)}, {site.read(3, 'u32')}, {site.read(4, 'u32')})")


@opcode("bfe")
def extract_field(site: Site) -> str:
    return site.write(f"bfe({site.read(1, site.type())}, {site.read(2, 'u32')}, {site.read(3, 'u32')})")


@opcode("bfind")
def find_bit(site: Site) -> str:
    shift = str(site.take("shiftamt") is not None).lower()
    return site.write(f"bfind<{shift}>({site.read(1, site.type())})", "u32")


@opcode("popc", "clz", "brev")
def count_bits(site: Site) -> str:
    return site.write(f"{site.instruction.opcode}({site.read(1, site.type())})")


# --- Comparison, selection, movement -----------------------------------------------------------------------------

COMPARISONS = {name: name.upper() for name in ("eq", "ne", "lt", "le", "gt", "ge")}
COMPARISONS |= {"lo": "LT", "ls": "LE", "hi": "GT", "hs": "GE"}
OPERATOR_OF = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
OPERATOR_OF |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
UNORDERED = {f"{name}u": name for name in ("eq", "ne", "lt", "le", "gt", "ge")}


@opcode("setp")
def set_predicate(site: Site) -> str:
    value, combine = comparison(site)
    if combine is None and not isinstance(site.operands[0], Pair):
        return site.write(value, "pred")
    third = site.read(3, "pred") if combine else "true"
    join = {"or": "|", "xor": "^"}.get(combine, "&")
    code = f"const bool t = {value}, c = {third}; "
    return code + site.write_pair(f"bool(t {join} c)", f"bool(!t {join} c)", "pred")


@opcode("set")
def set_value(site: Site) -> str:
    to = site.need("u32", "s32", "f32")
    value, combine = comparison(site)
    if combine:
        value = f"({value} {dict(zip(('and', 'or', 'xor'), '&|^'))[combine]} {site.read(3, 'pred')})"
    one, zero = ("1.f", "0.f") if to == "f32" else ("0xffffffffu", "0u")
    return site.write(f"({value} ? {one} : {zero})", "f32" if to == "f32" else "u32")


def comparison(site: Site) -> tuple[str, str | None]:
    """What `set` and `setp` compare, and how they combine it with a third operand."""
    name = site.need(*COMPARISONS, *UNORDERED, "num", "nan")
    combine = site.take("and", "or", "xor")
    kind = site.type()
    a, b = site.read(1, kind), site.read(2, kind)
    if kind in FLUSHED and site.take("ftz"):
        a, b = f"flush({a})", f"flush({b})"
    direct = OPERATOR_OF.get(name)
    if kind in HALVES or (kind in FLOATS and name in ("ne", *UNORDERED)):
        direct = None
    if name in ("num", "nan"):
        value = f"({a} == {a} && {b} == {b})"
        return value if name == "num" else f"!{value}", combine
    if direct:
        return f"({a} {direct} {b})", combine
    code = COMPARISONS[UNORDERED.get(name, name)]
    return f"compare<{code}, {int(name in UNORDERED)}>({a}, {b})", combine


@opcode("testp")
def test_number(site: Site) -> str:
    tests = {"finite": "std::isfinite", "infinite": "std::isinf", "notanumber": "std::isnan"}
    tests |= {"number": "!std::isnan", "normal": "is_normal", "subnormal": "is_subnormal"}
    test = tests[site.need(*tests)]
    return site.write(f"{test}({site.read(1, site.need('f32', 'f64'))})", "pred")


@opcode("selp")
def select(site: Site) -> str:
    kind = site.type()
    return site.write(f"({site.read(3, 'pred')} ? {site.read(1, kind)} : {site.read(2, kind)})", kind)


@opcode("mov")
def move(site: Site) -> str:
    kind = site.type()
    target, source = site.operands
    if isinstance(target, Vector):
        width = int(kind[1:]) // len(target.items)
        return f"const auto t = {site.read(1, kind)}; " + " ".join(
            site.writer.write(item, f"u{width}(t >> {width * i})", f"u{width}") for i, item in enumerate(target.items)
        )
    if isinstance(source, Vector):
        width = int(kind[1:]) // len(source.items)
        parts = (f"u64({site.writer.read(item, f'u{width}')}) << {width * i}" for i, item in enumerate(source.items))
        return site.write(f"{TYPES[kind]}({' | '.join(parts)})", kind)
    return site.write(site.read(1, kind), kind)


@opcode("cvta")
def convert_address(site: Site) -> str:
    to = site.take("to")
    space = site.need("global", "shared", "shared::cta", "local", "const", "param")
    value = site.read(1, site.need("u64"))
    if space.startswith("shared"):
        value = f"{'shared_from_generic' if to else 'generic_from_shared'}(self, {value})"
    return site.write(value, "u64")


@opcode("cvt")
def convert(site: Site) -> str:
    rounding = site.take(*ROUNDINGS, *INTEGER_ROUNDINGS, "rna")
    ftz, sat, relu = site.take("ftz"), site.take("sat"), site.take("relu")
    if site.take("tf32"):
        value = site.read(1, site.need("f32"))
        if rounding not in ("rn", "rna"):
            raise site.unsupported("tf32 is rounded by rn or rna")
        return site.write(f"round_tf32<{int(rounding == 'rna')}>({f'relu({value})' if relu else value})")
    to, source = site.type(), site.type()
    values = [f"flush({v})" if ftz and source == "f32" else v for v in site.reads(source)]
    if to in PACKED:
        one = PACKED[to]
        high, low = (f"float_from<{one}>({v})" for v in values)
        if relu:
            high, low = f"relu({high})", f"relu({low})"
        if rounding != "rn" or len(values) != 2:
            raise site.unsupported("two values, rounded by rn, are expected")
        return site.write(f"{to}{{{low}, {high}}}")
    value = values[0]
    if to in FLOATS:
        if rounding in INTEGER_ROUNDINGS:
            value = f"narrow<{to}>(to_integer<{INTEGER_ROUNDINGS[rounding]}>(wide({value})))"
        elif rounding in ROUNDINGS or source != to:
            value = f"float_from<{to}, {ROUNDINGS.get(rounding, 'NEAREST')}>({value})"
        if ftz and to == "f32":
            value = f"flush({value})"
        value = f"saturate({value})" if sat else f"relu({value})" if relu else value
    elif source in FLOATS:
        if rounding not in INTEGER_ROUNDINGS:
            raise site.unsupported("a rounding to an integer is expected")
        value = f"integer_from<{TYPES[to]}, {INTEGER_ROUNDINGS[rounding]}>({value})"
    else:
        value = f"clamp<{TYPES[to]}>({value})" if sat else f"{TYPES[to]}({value})"
    return site.write(value, to)


# --- Memory ------------------------------------------------------------------------------------------------------

SPACES = {"global": "GLOBAL", "shared": "SHARED", "shared::cta": "SHARED", "local": "LOCAL", "const": "GLOBAL"}
SPACES["shared::cluster"] = "SHARED"
CACHE_HINTS = ("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "L2::64B", "L2::128B", "L2::256B")
CACHE_HINTS += tuple(f"L1::{what}" for what in ("evict_normal", "evict_first", "evict_last", "no_allocate"))
STRONG = ("volatile", "relaxed", "acquire", "release", "acq_rel")
SCOPES = ("cta", "cluster", "gpu", "sys")


def space_and_kind(site: Site, kind: str) -> tuple[str, str]:
    """The state space and the kind of an access; cache hints do not change what it does."""
    strong = site.take(*STRONG)
    site.take(*SCOPES)
    site.take("weak")
    space = site.take(*SPACES)
    while site.take(*CACHE_HINTS):
        pass
    return SPACES[space] if space else "GENERIC", f"STRONG_{kind}" if strong else kind


def element(site: Site) -> tuple[str, int]:
    """Type and count of what is loaded or stored."""
    count = int((site.take("v2", "v4", "v8") or "v1")[1:])
    return site.type(), count


def is_byte_access(instruction: Instruction) -> bool:
    """Whether memory that threads share is accessed by single bytes."""
    modifiers = set(instruction.modifiers)
    private = modifiers & {"param", "local"}
    return instruction.opcode in ("ld", "ldu", "st") and bool(modifiers & {"b8", "u8", "s8"}) and not private


@opcode("ld", "ldu")
def load(site: Site) -> str:
    if site.take("param"):
        kind, count = element(site)
        value = f"load_parameter<{TYPES[kind]}, {count}>({site.address(1)})"
        return site.unpack(site.operands[0], value, kind)
    space, access = space_and_kind(site, "READ")
    kind, count = element(site)
    value = f"load<{TYPES[kind]}, {count}>({site.here}, {space}, {site.address(1)}, {access})"
    return site.unpack(site.operands[0], value, kind)


@opcode("st")
def store(site: Site) -> str:
    if site.take("param"):
        kind, count = element(site)
        return f"store_parameter({site.address(0)}, {site.array(site.operands[1], kind)});"
    space, access = space_and_kind(site, "WRITE")
    kind, count = element(site)
    value = site.array(site.operands[1], kind)
    return f"store<{TYPES[kind]}, {count}>({site.here}, {space}, {site.address(0)}, {value}, {access});"


ATOMICS = {"add": "add(old, a)", "min": "min(old, a)", "max": "max(old, a)", "exch": "a"}
ATOMICS |= {"and": "a & old", "or": "a | old", "xor": "a ^ old", "cas": "old == a ? b : old"}
ATOMICS |= {"inc": "old >= a ? 0 : old + 1", "dec": "old == 0 || old > a ? a : old - 1"}


@opcode("atom", "red")
def atomic(site: Site) -> str:
    space, _ = space_and_kind(site, "WRITE")
    operation = site.need(*ATOMICS)
    kind = site.type()
    site.take("noftz")
    at = 1 if site.instruction.opcode == "atom" else 0
    values = site.reads(kind, at + 1)
    names = " ".join(f"const auto {name} = {value};" for name, value in zip("ab", values))
    cpp = TYPES[kind]
    update = f"[=]({cpp} old) -> {cpp} {{ return {ATOMICS[operation]}; }}"
    if kind in PACKED:
        update = f"[=]({cpp} old) -> {cpp} {{ return both([](auto... v) {{ return {operation}(v...); }}, old, a); }}"
    result = f"atomic<{cpp}>({site.here}, {space}, {site.address(at)}, {update})"
    return f"{names} {site.write(result) if at else result + ';'}"


@opcode("membar", "fence", "prefetch", "prefetchu")
def no_effect(site: Site) -> str:
    """Fibers see memory in program order; only barriers order it for the detector."""
    site.modifiers.clear()
    return ";"


# --- Control -----------------------------------------------------------------------------------------------------


@opcode("bra")
def branch(site: Site) -> str:
    site.take("uni")
    (target,) = site.operands
    watch = f"backward({site.here}); " if site.writer.is_backward(target.text) else ""
    return f"{watch}goto {site.writer.label(target.text)};"


@opcode("brx")
def branch_by_index(site: Site) -> str:
    site.need("idx")
    site.take("uni")
    index, table = site.read(0, "u32"), site.writer.targets(site.operands[1].text)
    watch = f"backward({site.here}); " if any(map(site.writer.is_backward, table)) else ""
    cases = " ".join(f"case {i}: goto {site.writer.label(target)};" for i, target in enumerate(table))
    return f"{watch}switch ({index}) {{ {cases} default: trap({site.here}); }}"


@opcode("call")
def call_function(site: Site) -> str:
    site.take("uni")
    lists = [operand for operand in site.operands if isinstance(operand, Vector)]
    names = [operand for operand in site.operands if isinstance(operand, Name)]
    if len(names) != 1:
        raise site.unsupported("a function is called by its name")
    results = lists.pop(0) if lists and site.operands[0] is lists[0] else Vector(())
    return site.writer.call(names[0].text, results, lists[0] if lists else Vector(()))


@opcode("ret")
def go_back(site: Site) -> str:
    site.take("uni")
    return "return;"


@opcode("exit")
def leave(site: Site) -> str:
    return "leave(self);"


@opcode("trap")
def trap(site: Site) -> str:
    return f"trap({site.here});"


@opcode("nanosleep")
def sleep(site: Site) -> str:
    site.need("u32")
    return f"watch({site.here});"


# --- Barriers and collectives ------------------------------------------------------------------------------------


@opcode("bar", "barrier")
def barrier(site: Site) -> str:
    site.take("cta")
    site.take("aligned")
    if site.take("warp"):
        site.need("sync")
        return f"sync_warp({site.here}, {site.read(0, 'u32')});"
    if site.take("red"):
        reduction = site.need("popc", "and", "or")
        kind = site.need("u32", "pred")
        count = site.read(2, "u32") if len(site.operands) == 4 else "0"
        value = site.writer.read(site.operands[-1], "pred")
        result = f"barrier({site.here}, {site.read(1, 'u32')}, {count}, true, {reduction.upper()}, {value})"
        return site.write(f"{TYPES[kind]}({result})")
    waits = site.need("sync", "arrive") == "sync"
    count = site.read(1, "u32") if len(site.operands) == 2 else "0"
    return f"barrier({site.here}, {site.read(0, 'u32')}, {count}, {str(waits).lower()});"


@opcode("barrier.cluster")
def barrier_of_cluster(site: Site) -> str:
    waits = site.need("arrive", "wait") == "wait"
    releases = str(site.take("release", "acquire", "relaxed") != "relaxed").lower()
    site.take("aligned")
    return f"wait_for_cluster({site.here});" if waits else f"arrive_in_cluster({site.here}, {releases});"


@opcode("mapa")
def address_in_cluster(site: Site) -> str:
    """The same place in another block of the cluster."""
    site.need("shared::cluster")
    kind = site.type()
    return site.write(f"in_block(u32({site.read(1, kind)}), {site.read(2, 'u32')})", "u32")


@opcode("shfl")
def shuffle(site: Site) -> str:
    site.need("sync")
    mode = {"up": "UP", "down": "DOWN", "bfly": "BUTTERFLY", "idx": "INDEX"}[site.need("up", "down", "bfly", "idx")]
    site.need("b32")
    code = f"const auto s = shuffle<SHUFFLE_{mode}>({site.here}, {', '.join(site.reads('u32'))}); "
    return code + site.write_pair("s.value", "s.in_range")


@opcode("vote")
def vote(site: Site) -> str:
    site.need("sync")
    mode = site.need("ballot", "any", "all", "uni")
    site.need("b32" if mode == "ballot" else "pred")
    value, mask = site.read(1, "pred"), site.read(2, "u32")
    code = f"const u32 m = {mask}; const u32 votes = ballot({site.here}, {value}, m); "
    results = {"ballot": "votes", "any": "bool(votes)", "all": "votes == m", "uni": "(votes == m || votes == 0)"}
    return code + site.write(results[mode])


@opcode("match")
def match(site: Site) -> str:
    mode = site.need("any", "all")
    site.need("sync")
    kind = site.need("b32", "b64")
    code = f"const u32 m = {site.read(2, 'u32')}; const u32 equal = match_any({site.here}, {site.read(1, kind)}, m); "
    if mode == "any":
        return code + site.write("equal")
    return code + site.write_pair("u32(equal == m ? m : 0)", "(equal == m)")


@opcode("redux")
def reduce_lanes(site: Site) -> str:
    site.need("sync")
    operation = site.need("add", "min", "max", "and", "or", "xor")
    kind = TYPES[site.need("u32", "s32", "b32")]
    function = {"and": "a & b", "or": "a | b", "xor": "a ^ b"}.get(operation, f"emulator::{operation}<{kind}>(a, b)")
    code = f"[]({kind} a, {kind} b) -> {kind} {{ return {function}; }}"
    return site.write(f"reduce_lanes<{code}>({site.here}, {site.read(1, kind)}, {site.read(2, 'u32')})")


@opcode("elect")
def elect(site: Site) -> str:
    site.need("sync")
    mask = site.read(1, "u32")
    code = f"const u32 m = {mask}, leader = u32(std::countr_zero(m)); ballot({site.here}, true, m); "
    return code + site.write_pair("leader", "(self.lane == leader)", "u32")


@opcode("activemask")
def active(site: Site) -> str:
    site.need("b32")
    return site.write("active_mask(self)")


# --- Matrices ----------------------------------------------------------------------------------------------------

# (elements of A and B, of C and D) -> shapes
MMA_SHAPES = {
    ("f16", "f32"): ("m16n8k8", "m16n8k16"),
    ("f16", "f16"): ("m16n8k8", "m16n8k16"),
    ("bf16", "f32"): ("m16n8k8", "m16n8k16"),
    ("tf32", "f32"): ("m16n8k4", "m16n8k8"),
    ("f64", "f64"): ("m8n8k4", "m16n8k4", "m16n8k8", "m16n8k16"),
}


@opcode("mma")
def multiply_matrices(site: Site) -> str:
    for modifier in ("sync", "aligned", "row", "col"):
        site.need(modifier)
    shape = site.need(*(shape for shapes in MMA_SHAPES.values() for shape in shapes))
    result, a, b, c = (site.need("f16", "bf16", "tf32", "f32", "f64") for _ in range(4))
    if a != b or result != c or shape not in MMA_SHAPES.get((a, result), ()):
        raise site.unsupported("no such shape")
    rows, depth = (int(n) for n in shape[1:].split("n8k"))
    inputs = "f64" if a == "f64" else "b32"
    sums = "b32" if result == "f16" else result
    fragments = ", ".join(site.array(operand, kind) for operand, kind in zip(site.operands[1:], (inputs, inputs, sums)))
    return site.unpack(site.operands[0], f"mma<{a}, {result}, {rows}, {depth}>({site.here}, {fragments})")


@opcode("ldmatrix")
def load_matrix(site: Site) -> str:
    for modifier in ("sync", "aligned", "m8n8", "b16"):
        site.need(modifier)
    count = int(site.need("x1", "x2", "x4")[1:])
    transposed = int(site.take("trans") is not None)
    space, _ = space_and_kind(site, "READ")
    value = f"load_matrices<{count}, {transposed}>({site.here}, {space}, {site.address(1)})"
    return site.unpack(site.operands[0], value)


# --- Asynchronous copies -----------------------------------------------------------------------------------------


@opcode("cp")
def copy_async(site: Site) -> str:
    site.need("async")
    if site.take("commit_group"):
        return "commit_group(self);"
    if site.take("wait_group"):
        return f"wait_group(self, {site.read(0, 'u32')});"
    if site.take("wait_all"):
        return "wait_all(self);"
    site.need("ca", "cg")
    site.need("shared", "shared::cta")
    site.need("global")
    while site.take(*CACHE_HINTS):
        pass
    size = site.read(2, "u32")
    source = site.read(3, "u32") if len(site.operands) == 4 else size
    return f"copy_async({site.here}, {site.address(0)}, {site.address(1)}, {size}, {source});"


@opcode("mbarrier")
def mbarrier(site: Site) -> str:
    action = site.need("init", "inval", "arrive", "expect_tx", "complete_tx", "test_wait", "try_wait")
    parity = site.take("parity") is not None
    expects = site.take("expect_tx") is not None
    site.take("release", "acquire", "relaxed")
    site.take("cta", "cluster")
    site.take("shared", "shared::cta", "shared::cluster")
    site.need("b64")
    if action in ("init", "inval"):
        name = {"init": "mbarrier_init", "inval": "mbarrier_invalidate"}[action]
        count = f", {site.read(1, 'u32')}" if action == "init" else ""
        return f"{name}({site.here}, {site.address(0)}{count});"
    if action in ("expect_tx", "complete_tx"):
        return f"mbarrier_{action[:-3]}({site.here}, {site.address(0)}, {site.read(1, 'u32')});"
    if action == "arrive":
        count = site.read(2, "u32") if len(site.operands) == 3 else "1"
        if expects:
            expect = f"mbarrier_expect({site.here}, {site.address(1)}, {count}); "
            return expect + site.write(f"mbarrier_arrive({site.here}, {site.address(1)}, 1)")
        return site.write(f"mbarrier_arrive({site.here}, {site.address(1)}, {count})")
    phase = site.read(2, "u32" if parity else "u64")  # a fourth operand limits how long to wait
    waits = str(action == "try_wait").lower()
    return site.write(f"mbarrier_test({site.here}, {site.address(1)}, {phase}, {str(parity).lower()}, {waits})")
