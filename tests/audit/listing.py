"""Machine code as the audit reads it: SASS (NVIDIA) and AMDGCN listings, parsed into one `Listing`.

Nothing here runs a compiler or a GPU: text in, dataclasses out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import networkx  # already needed by torch

Location = tuple[str, int]

LINES = 100_000
"""More lines than any file has. In SASS, compile.py adds a multiple of it to the line numbers of each file."""


@dataclass(frozen=True)
class Access:
    """One global-memory instruction.

    Attributes:
        kind: "load" or "store".
        bits: per thread; 0 for a bulk copy by the tensor-memory accelerator, which has no width per thread.
        asynchronous: goes to shared memory without passing through registers.
        location: (file, line) of the source, the innermost if inlined; None if the listing has no lines.
    """

    kind: str
    bits: int
    asynchronous: bool
    location: Location | None


@dataclass(frozen=True)
class Instruction:
    """One line of machine code.

    Attributes:
        opcode: mnemonic with its modifiers.
        operands: the rest.
        location: its source line.
        predicated: may be skipped, so control can also fall through.
    """

    opcode: str
    operands: str
    location: Location | None = None
    predicated: bool = False


@dataclass
class Listing:
    """Instructions in address order, and the targets of labels.

    Attributes:
        instructions: in address order.
        labels: label to the index of the instruction after it.
        amd: AMDGCN rather than SASS.
    """

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    amd: bool = False

    def main_loop(self) -> list[int]:
        """Indices of the first outermost loop that multiplies; empty if there is none.

        A loop is a set of instructions that can reach each other, not a range of addresses: compilers put waits past
        the program's end and jump back from there. A loop multiplies if it has a tensor-core instruction or more than
        32 fused multiply-adds.
        """
        sums = ("v_fma", "v_pk_fma", "v_fmac", "v_mac") if self.amd else ("FFMA", "DFMA", "HFMA2")
        count = len(self.instructions)
        flow = networkx.DiGraph((i, target) for i in range(count) for target in self._successors(i))
        for loop in sorted(sorted(c) for c in networkx.strongly_connected_components(flow) if len(c) > 1):
            body = [self.instructions[i] for i in loop]
            if any(map(self.tensor_core, body)) or sum(i.opcode.startswith(sums) for i in body) > 32:
                return loop
        return []

    def tensor_core(self, instruction: Instruction) -> str | None:
        """Class of a tensor-core instruction: HMMA, HGMMA, UTCHMMA, DMMA, MFMA …; None for any other."""
        name = instruction.opcode
        if self.amd:
            return "MFMA" if name.startswith(("v_mfma", "v_smfmac")) else None
        stem = name.split(".")[0]
        return stem if re.fullmatch(r"(H|D|Q|O|I|B)?(G|W)?MMA|UTC[A-Z]*MMA", stem) and stem != "MMA" else None

    def access(self, instruction: Instruction) -> Access | None:
        """The global-memory access of an instruction, or None."""
        return (_amd_access if self.amd else _sass_access)(instruction)

    def local_bytes(self) -> int:
        """Bytes of local memory (distinct addresses) that SASS stores to, which are spilled registers."""
        spilled: set[tuple[str, int]] = set()
        for instruction in self.instructions:
            if self.amd or not instruction.opcode.startswith("STL"):
                continue
            address = re.search(r"\[(\w*)(?:\+(-?0x[0-9a-f]+))?\]", instruction.operands)
            base, offset = (address[1], int(address[2] or "0", 16)) if address else ("?", 0)
            spilled.update((base, offset + byte) for byte in range(_sass_bits(instruction.opcode) // 8))
        return len(spilled)

    def early_writes(self) -> int:
        """Count writes to registers of a Hopper product's left operand before its wait.

        The tensor core may not have read it yet. Assemblers before 13.3 did this (triton-lang/triton#9433, #11781).
        """
        found, written = 0, [set(_written(each)) for each in self.instructions]
        follows = [self._successors(index) for index in range(len(written))]
        waits = [re.fullmatch(r"gsb0, 0x(\d)", each.operands) for each in self.instructions]
        ends = [each.opcode.startswith("HGMMA") and "gsb0" in each.operands for each in self.instructions]
        for index, product in enumerate(self.instructions):
            left = re.match(r"R\d+, R(\d+)\S*, gdesc", product.operands)
            if left is None or not product.opcode.startswith("HGMMA"):
                continue
            read, seen, early = set(range(int(left[1]), int(left[1]) + 4)), set(), set()
            ahead = [(place, ends[index]) for place in follows[index]]
            while ahead:
                place, groups = at = ahead.pop()  # groups: ended since the product, its own included
                wait = waits[place]  # allows this many groups to be unfinished
                if at in seen or (wait and (wait[1] == "0" or groups > int(wait[1]))):
                    continue
                seen.add(at)
                if read & written[place]:
                    early.add(place)
                ahead += [(following, min(groups + ends[place], 9)) for following in follows[place]]
            found += len(early)
        return found

    def _successors(self, index: int) -> list[int]:
        instruction = self.instructions[index]
        opcode, operands = instruction.opcode, instruction.operands
        following = [index + 1] if index + 1 < len(self.instructions) else []
        if opcode.startswith(("EXIT", "RET", "s_endpgm")):
            return following if instruction.predicated else []
        if not opcode.startswith(("s_cbranch", "s_branch") if self.amd else ("BRA", "JMP")):
            return following
        label = re.search(r"\.L\w+", operands)
        target = [self.labels[label[0]]] if label and label[0] in self.labels else []
        # SASS also spells conditions as operands: BRA.U !UP0, `(.L_x_3)
        conditional = instruction.predicated or opcode.startswith("s_cbranch") or "," in operands
        return [*target, *following] if conditional else target


_SASS_LINE = re.compile(r'//## File "([^"]*)", line (\d+)')
_SASS_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")


def parse_sass(text: str) -> Listing:
    """Parse what `nvdisasm -g -c` prints. Without `-g` accesses have no location."""
    listing = Listing()
    location: Location | None = None
    after_code = True
    for line in text.splitlines():
        if marker := _SASS_LINE.search(line):
            # If several markers follow each other, the first is the innermost inlined call.
            if after_code:
                location = (marker[1], int(marker[2]) % LINES)
            after_code = False
        elif label := re.match(r"^\s*(\.L\w+):", line):
            listing.labels[label[1]] = len(listing.instructions)
        elif code := _SASS_INSTRUCTION.match(line):
            listing.instructions.append(Instruction(code[2], code[3], location, predicated=bool(code[1])))
            after_code = True
    return listing


def _sass_bits(opcode: str) -> int:
    for modifier, bits in ((".256", 256), (".128", 128), (".64", 64), (".U16", 16), (".S16", 16)):
        if modifier in opcode:
            return bits
    return 8 if ".U8" in opcode or ".S8" in opcode else 32


_WRITES_NONE = re.compile(
    r"HGMMA|STG?\b|ST[SLM]|RED|BRA|BAR|WARP|LDGSTS|DEPBAR|LDGDEPBAR|SYNCS|[IF]SETP|R2UR|UTMA|EXIT"
)


def _written(instruction: Instruction) -> range:
    """Registers that a SASS instruction writes; none for products, which the tensor core executes in order."""
    register = re.match(r"(?:U?P\w+,\s*)*R(\d+)\b", instruction.operands)
    if register is None or _WRITES_NONE.match(instruction.opcode):
        return range(0)
    wide = "WIDE" in instruction.opcode
    matrices = re.match(r"LDSM.*\.([24])\b", instruction.opcode)
    count = int(matrices[1]) if matrices else max(_sass_bits(instruction.opcode) // 32, 1 + wide)
    return range(int(register[1]), int(register[1]) + count)


def _sass_access(instruction: Instruction) -> Access | None:
    opcode, where = instruction.opcode, instruction.location
    stem = opcode.split(".")[0]
    if stem in ("LDG", "LD"):
        return Access("load", _sass_bits(opcode), False, where)
    if stem == "LDGSTS":
        return Access("load", _sass_bits(opcode), True, where)
    if stem in ("UTMALDG", "UBLKCP", "UTMASTG"):
        return Access("store" if stem == "UTMASTG" else "load", 0, True, where)
    if stem in ("STG", "ST"):
        return Access("store", _sass_bits(opcode), False, where)
    return None


_AMD_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?')
_AMD_LINE = re.compile(r"^\s*\.loc\s+(\d+)\s+(\d+)")
_AMD_INSTRUCTION = re.compile(r"^\s+([a-z]\w+)\s*([^;]*)")


def parse_amdgcn(text: str) -> Listing:
    """Parse the assembly that Triton's AMD backend stores under "amdgcn"."""
    listing = Listing(amd=True)
    files: dict[int, str] = {}
    location: Location | None = None
    for line in text.splitlines():
        if name := _AMD_FILE.match(line):
            files[int(name[1])] = "/".join(part for part in (name[2], name[3]) if part)
        elif marker := _AMD_LINE.match(line):
            number = int(marker[2])
            # Line 0 means "no line of its own": keep the previous one.
            location = (files.get(int(marker[1]), "?"), number) if number else location
        elif label := re.match(r"^(\.L\w+):", line):
            listing.labels[label[1]] = len(listing.instructions)
        elif "s_endpgm" in line:
            listing.instructions.append(Instruction("s_endpgm", "", location))
        elif code := _AMD_INSTRUCTION.match(line):
            listing.instructions.append(Instruction(code[1], code[2].strip(), location))
    return listing


def _amd_access(instruction: Instruction) -> Access | None:
    width = r"(?:[us]?(dword|short|byte)(?:x(\d))?)?"
    code = re.match(rf"(?:global|buffer|flat)_(load|store)_(?:lds_)?{width}", instruction.opcode)
    if code is None:
        return None
    bits = {"short": 16, "byte": 8}.get(code[2], 32) * int(code[3] or 1)
    to_lds = "_lds_" in instruction.opcode or instruction.operands.endswith(" lds")
    return Access(code[1], bits, to_lds, instruction.location)
