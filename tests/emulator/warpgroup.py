"""Instructions of warpgroups (warpgroup.cpp): products on the tensor cores, and the trade with registers."""

from .opcodes import Site, opcode
from .ptx import Kernel, Name, Number, Vector

ELEMENTS = {"f16": "HALF", "bf16": "BFLOAT", "tf32": "TF32"}
SHAPES = tuple(f"m64n{n}k{k}" for n in range(8, 257, 8) for k in (8, 16))


def is_product(item: object) -> bool:
    return getattr(item, "opcode", "") == "wgmma" and item.modifiers[0] == "mma_async"


def sums_of(kernel: Kernel) -> set[str]:
    """The registers that can hold a sum that is not yet made: those of products, and where they are moved to."""
    found = {item.text for each in kernel.body if is_product(each) for item in each.operands[0].items}
    moves = [each.operands for each in kernel.body if getattr(each, "opcode", "") == "mov"]
    pairs = [(to.text, of.text) for to, of in moves if isinstance(to, Name) and isinstance(of, Name)]
    before = -1
    while found and len(found) != before:
        before = len(found)
        found |= {to for to, of in pairs if of in found}
    return found


def immediate(site: Site, operand: object, *choices: int) -> int:
    if not isinstance(operand, Number) or operand.value not in choices:
        raise site.unsupported(f"one of {', '.join(map(str, choices))} is expected")
    return operand.value


@opcode("wgmma.mma_async")
def multiply(site: Site) -> str:
    for modifier in ("sync", "aligned"):
        site.need(modifier)
    shape = site.need(*SHAPES)
    columns, depth = map(int, shape[4:].split("k"))
    site.need("f32")
    element = site.need(*ELEMENTS)
    if site.need(*ELEMENTS) != element or depth != (8 if element == "tf32" else 16):
        raise site.unsupported("no such shape")
    sums, a, *_ = site.operands
    rest = site.operands[4:]
    from_registers = isinstance(a, Vector)
    transposes = 0 if element == "tf32" else 1 if from_registers else 2
    if len(rest) != 2 + transposes or len(sums.items) != columns // 2 or (from_registers and len(a.items) != 4):
        raise site.unsupported("no such operands")
    signs = [immediate(site, each, 1, -1) < 0 for each in rest[:2]]
    transposed = [bool(immediate(site, each, 0, 1)) for each in rest[2:]]
    transposed = [False] * (2 - len(transposed)) + transposed
    flags = ", ".join(str(each).lower() for each in (*transposed, *signs))
    registers = [site.writer.read(item, "b32") for item in sums.items]
    code = f"u32 d[] = {{{', '.join(registers)}}}; "
    fragments, descriptor = "nullptr", "0"
    if from_registers:
        code += f"const u32 a[] = {{{', '.join(site.writer.read(item, 'b32') for item in a.items)}}}; "
        fragments = "a"
    else:
        descriptor = site.read(1, "u64")
    code += f"multiply({site.here}, {{{ELEMENTS[element]}, {columns}, {flags}}}, {fragments}, {descriptor}, "
    code += f"{site.read(2, 'u64')}, {site.read(3, 'pred')}, d); "
    return code + " ".join(site.writer.write(item, f"d[{i}]", "b32") for i, item in enumerate(sums.items))


@opcode("wgmma.fence")
def fence(site: Site) -> str:
    """Only lint.py looks at it."""
    site.need("sync")
    site.need("aligned")
    return ";"


@opcode("wgmma.commit_group")
def commit(site: Site) -> str:
    site.need("sync")
    site.need("aligned")
    return "commit_products(self);"


@opcode("wgmma.wait_group")
def wait(site: Site) -> str:
    site.need("sync")
    site.need("aligned")
    sums = [f"reinterpret_cast<u32*>(&{register})" for register in site.writer.sums()]
    code = f"u32* const sums[] = {{{', '.join([*sums, 'nullptr'])}}}; "
    return code + f"wait_products(self, {site.read(0, 'u32')}, sums, {len(sums)});"


@opcode("setmaxnreg")
def change_registers(site: Site) -> str:
    more = str(site.need("inc", "dec") == "inc").lower()
    for modifier in ("sync", "aligned", "u32"):
        site.need(modifier)
    return f"change_registers({site.here}, {site.read(0, 'u32')}, {more});"
