"""What emulation cannot see of a kernel, from its text: where registers of products are used without wgmma.fence or
while a product reads them.

Moves are let through: the compiler makes them where it likes, and its assembler takes them out.
"""

from collections.abc import Iterator
from typing import NamedTuple

from .ptx import Address, Instruction, Kernel, Label, Name, Operand, Pair, Vector
from .warpgroup import is_product

# Their first operand is no register that they write.
WITHOUT_RESULT = {"st", "red", "bra", "brx", "bar", "barrier", "call", "ret", "exit", "trap", "cp", "fence", "membar"}
WITHOUT_RESULT |= {"wgmma", "setmaxnreg", "nanosleep", "prefetch", "prefetchu", "stmatrix"}
LEAVES = {"ret", "exit", "trap"}


class Finding(NamedTuple):
    """A mistake, and the position of its instruction in the body."""

    kind: str
    at: int
    text: str


def names(operand: Operand) -> Iterator[str]:
    if isinstance(operand, Name):
        yield operand.text
    elif isinstance(operand, Vector):
        for item in operand.items:
            yield from names(item)
    elif isinstance(operand, Pair):
        yield from (operand.first.text, operand.second.text)
    elif isinstance(operand, Address):
        yield from names(operand.base)


def used(item: Instruction) -> set[str]:
    return {name for operand in item.operands for name in names(operand)}


def written(item: Instruction) -> set[str]:
    return set() if item.opcode in WITHOUT_RESULT or not item.operands else set(names(item.operands[0]))


def successors(kernel: Kernel) -> list[list[int]]:
    """Of each position of the body, the positions that may follow."""
    labels = {item.name: at for at, item in enumerate(kernel.body) if isinstance(item, Label)}
    found = []
    for at, item in enumerate(kernel.body):
        follows = [at + 1] if at + 1 < len(kernel.body) else []
        if isinstance(item, Instruction) and item.opcode in ("bra", "brx", *LEAVES):
            targets: tuple[str, ...] = ()
            if item.opcode == "bra":
                targets = (item.operands[0].text,)
            elif item.opcode == "brx":
                targets = kernel.targets[item.operands[1].text]
            follows = (follows if item.guard else []) + [labels[name] for name in targets]
        found.append(follows)
    return found


def moved(kernel: Kernel, registers: set[str], forward: bool) -> set[str]:
    """The registers, and those that moves bring their values to; backward, those whose values moves bring to them."""
    found, before = set(registers), 0
    while len(found) != before:
        before = len(found)
        for item in kernel.body:
            if isinstance(item, Instruction) and item.opcode == "mov":
                to, source = (set(names(operand)) for operand in item.operands)
                if (source if forward else to) & found:
                    found |= to if forward else source
    return found


def findings(kernel: Kernel) -> list[Finding]:
    """The mistakes of a kernel, each instruction's first."""
    products = [at for at, item in enumerate(kernel.body) if is_product(item)]
    if not products:
        return []
    follows = successors(kernel)
    precedes: list[list[int]] = [[] for _ in kernel.body]
    for at, after in enumerate(follows):
        for each in after:
            precedes[each].append(at)
    found = [*_without_fence(kernel, products, precedes), *_overwritten(kernel, products, follows)]
    return list({each.at: each for each in reversed(found)}.values())[::-1]


def _without_fence(kernel: Kernel, products: list[int], precedes: list[list[int]]) -> Iterator[Finding]:
    """Products with a path to them, from the start or an access of their registers, that has no wgmma.fence."""
    for product in products:
        sums, a = (set(names(operand)) for operand in kernel.body[product].operands[:2])
        registers = sums | a if isinstance(kernel.body[product].operands[1], Vector) else sums
        writes, reads = moved(kernel, registers, forward=False), moved(kernel, sums, forward=True)
        seen, waiting = {product}, [product]
        while waiting:
            at = waiting.pop()
            item = kernel.body[at]
            if isinstance(item, Instruction) and at != product:
                if item.opcode == "wgmma" and item.modifiers[0] == "fence":
                    continue
                accesses = written(item) & writes or (used(item) - written(item)) & reads
                if item.opcode not in ("mov", "wgmma") and accesses:
                    yield Finding("fence", product, f"no wgmma.fence after {item} uses its registers")
                    break
            if at == 0:
                yield Finding("fence", product, "no wgmma.fence before it")
                break
            waiting += [each for each in precedes[at] if each not in seen]
            seen.update(precedes[at])


MOST_GROUPS = 8  # that are told apart


def _overwritten(kernel: Kernel, products: list[int], follows: list[list[int]]) -> Iterator[Finding]:
    """Instructions that write a fragment of A while a product may still read it."""
    for product in products:
        fragments = kernel.body[product].operands[1]
        if not isinstance(fragments, Vector):
            continue
        registers = set(names(fragments))
        waiting = [(each, 0) for each in follows[product]]
        seen = set(waiting)
        while waiting:
            at, groups = waiting.pop()  # committed since
            item = kernel.body[at]
            if isinstance(item, Instruction):
                if item.opcode == "wgmma" and item.modifiers[0] == "commit_group":
                    groups = min(groups + 1, MOST_GROUPS)
                elif item.opcode == "wgmma" and item.modifiers[0] == "wait_group":
                    if groups > item.operands[0].value:
                        continue
                elif item.opcode != "mov" and written(item) & registers:
                    yield Finding("pending", at, "a fragment is written that a product may still read")
            after = {(each, groups) for each in follows[at]} - seen
            waiting += after
            seen |= after
