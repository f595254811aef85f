"""Instructions of the copy engine (tensor_copies.cpp), and the fences that it needs."""

from .opcodes import Site, opcode
from .ptx import Address, Instruction

HINTS = ("L2::cache_hint",)
COMPLETION = "mbarrier::complete_tx::bytes"


def uses_engine(instruction: Instruction) -> bool:
    """Whether something else than a thread works after this instruction."""
    return instruction.opcode == "wgmma" or instruction.modifiers[:2] == ("async", "bulk")


def box(site: Site, index: int) -> tuple[str, str, int]:
    """The address of a tensor map, coordinates in it as a C++ array, and how many."""
    operand = site.operands[index]
    if not isinstance(operand, Address) or operand.coordinates is None or operand.offset:
        raise site.unsupported("a tensor map and coordinates in it are expected")
    items = operand.coordinates.items
    start = ", ".join(site.writer.read(item, "s32") for item in items)
    return site.writer.read(operand.base, "u64"), f"const s32 start[] = {{{start}}}; ", len(items)


def blocks(site: Site, index: int) -> str:
    """Which blocks of the cluster a load goes to; 0 where it goes to an address."""
    return site.read(index, "u16") if site.take("multicast::cluster") else "0"


def no_hint(site: Site) -> None:
    while site.take(*HINTS):
        pass


@opcode("cp.async.bulk.tensor")
def copy_box(site: Site) -> str:
    rank = int(site.need("1d", "2d", "3d", "4d", "5d")[0])
    loads = site.take("shared::cluster") is not None
    if not loads:
        loads = site.instruction.modifiers.index("shared::cta") < site.instruction.modifiers.index("global")
        site.need("shared::cta")
    site.need("global")
    site.take("tile")
    site.need(COMPLETION if loads else "bulk_group")
    no_hint(site)
    map_address, coordinates, count = box(site, 1 if loads else 0)
    if count != rank:
        raise site.unsupported(f"{rank} coordinates are expected")
    if loads:
        to, barrier, mask = site.address(0), site.address(2), blocks(site, 3)
        return f"{coordinates}load_box({site.here}, {to}, {map_address}, start, {rank}, {barrier}, {mask});"
    return f"{coordinates}store_box({site.here}, {map_address}, start, {rank}, {site.address(1)});"


@opcode("cp.async.bulk")
def copy_bytes(site: Site) -> str:
    loads = site.take("shared::cluster") is not None or site.instruction.modifiers[2] == "shared::cta"
    site.take("shared::cta")
    site.need("global")
    site.need(COMPLETION if loads else "bulk_group")
    no_hint(site)
    to, source, size = site.address(0), site.address(1), site.read(2, "u32")
    if loads:
        return f"load_bytes({site.here}, {to}, {source}, {size}, {site.address(3)}, {blocks(site, 4)});"
    return f"store_bytes({site.here}, {to}, {source}, {size});"


@opcode("cp.async.bulk.commit_group")
def commit(site: Site) -> str:
    return "commit_stores(self);"


@opcode("cp.async.bulk.wait_group")
def wait(site: Site) -> str:
    until_read = str(site.take("read") is not None).lower()
    return f"wait_stores(self, {site.read(0, 'u32')}, {until_read});"


@opcode("cp.async.bulk.prefetch")
def prefetch(site: Site) -> str:
    site.modifiers.clear()
    return ";"


@opcode("fence.proxy.async")
def fence(site: Site) -> str:
    if site.take("global"):  # what threads write to global memory counts as theirs until the launch ends
        return ";"
    site.take("shared::cta", "shared::cluster")
    return "fence_async(self);"


@opcode("fence.mbarrier_init")
def fence_of_mbarriers(site: Site) -> str:
    site.need("release")
    site.need("cluster")
    return "fence_mbarrier_init(self);"
