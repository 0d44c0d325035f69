"""PTX text -> `Kernel`: parameters, basic blocks, operands. Knows syntax, not what opcodes do.

Covers what Triton writes: one entry, virtual registers, labels, guards, and inline assembly whose
registers have a scope of their own. Only labels that a branch names end a block, because those for
debuggers would make twenty times as many.
"""

import re
from bisect import bisect
from dataclasses import dataclass, field

REGISTER_BITS = {"pred": 1, "8": 8, "16": 16, "32": 32, "64": 64}
_ITEM = re.compile(
    r"""\s*(?:
    (?P<note>\.(?:loc|file|section|b8|b32|pragma)\b[^\n]*)
    | (?P<label>[$\w]+):
    | (?P<open>\{) | (?P<close>\})
    | (?P<statement>[^\s;{}][^;]*);
    )""",
    re.VERBOSE,
)

# A vector, an address, or what lies between commas.
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^\s,][^,]*")


class Unsupported(NotImplementedError):
    """What the emulator does not know; names the PTX line."""

    def __init__(self, ins, why):
        super().__init__(f"PTX line {ins.line}: {'.'.join(ins.op)}: {why}; {ins.text}")


@dataclass(frozen=True)
class Register:
    name: str
    index: int
    bits: int


@dataclass(frozen=True)
class Literal:
    """A number as it is written; floats are bits in hexadecimal."""

    text: str

    @property
    def integer(self):
        return int(self.text.rstrip("U"), 0)


@dataclass(frozen=True)
class Symbol:
    """Any other name: of a special register, a parameter, shared memory, a label."""

    name: str


@dataclass(frozen=True)
class Address:
    base: Register | Symbol
    offset: int


@dataclass
class Instruction:
    """One statement. op: parts of the opcode; guard: (register, negated) or None.

    args: operands; a vector is a list of them.
    """

    op: list
    args: list
    guard: tuple | None
    line: int
    text: str

    @property
    def name(self):
        return self.op[0]

    def ends_block(self):
        # Warps run in step here, so that a barrier of one warp does nothing.
        leaves = self.name in ("bra", "ret", "exit", "bar", "barrier")
        return leaves and self.op[1:2] != ["warp"]


@dataclass
class Block:
    """Instructions that run together.

    end: "fall", "jump", "branch", "exit" or "barrier". target: the block that a branch names.
    next: the block that follows in the text. Both are indices, or None.
    """

    code: list = field(default_factory=list)
    end: str = "fall"
    target: int | None = None
    next: int | None = None


@dataclass
class Kernel:
    """params: (type, offset) by name. symbols: names of shared memory, which starts there."""

    name: str
    params: dict
    threads: int
    registers: int
    blocks: list
    symbols: set
    lines: list

    def at(self, line):
        return self.lines[line - 1].strip()


def parse(text):
    """The `Kernel` of a PTX module with one entry."""
    lines = text.splitlines()
    text = re.sub(r"//[^\n]*", "", text)
    entry = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)", text, re.DOTALL)
    start = text.index("{", entry.end())
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", text[entry.end() : start])
    symbols = re.findall(r"\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)", text[:start])
    if len(symbols) > 1:
        raise NotImplementedError(f"one piece of shared memory is known, not {symbols}")
    body = _Body(text)
    body.read(start + 1)
    return Kernel(
        entry[1],
        _params(entry[2]),
        int(threads[1]),
        body.count,
        body.finished(),
        set(symbols),
        lines,
    )


def _params(text):
    params, offset = {}, 0
    for piece in filter(str.strip, text.split(",")):
        words = piece.split()
        kind = next(word for word in words if re.fullmatch(r"\.[usbf]\d+", word))[1:]
        size = int(kind[1:]) // 8
        offset = -(-offset // size) * size
        params[words[-1]] = kind, offset
        offset += size
    return params


class _Body:
    def __init__(self, text):
        self.text = text
        self.starts = [0, *(found.end() for found in re.finditer("\n", text))]
        self.targets = set(re.findall(r"\bbra[.\w]*\s+([$\w]+)", text))
        self.scopes, self.count = [{}], 0
        self.blocks, self.labels = [Block()], {}

    def read(self, at):
        while self.scopes:
            item = _ITEM.match(self.text, at)
            if item is None:
                line = bisect(self.starts, at)
                raise ValueError(f"PTX line {line} is no statement: {self.text[at : at + 80]!r}")
            at = item.end()
            if item["label"] in self.targets:
                if self.blocks[-1].code:
                    self.blocks.append(Block())
                self.labels[item["label"]] = len(self.blocks) - 1
            elif item["open"]:
                self.scopes.append({})
            elif item["close"]:
                self.scopes.pop()
            elif item["statement"]:
                self._statement(item["statement"], bisect(self.starts, item.start("statement")))

    def _statement(self, text, line):
        text = " ".join(text.split())
        if text.startswith(".reg"):
            self._declare(*text.split(None, 2)[1:])
        if text.startswith("."):
            return
        guard, rest = None, text
        if match := re.match(r"@(!?)([%\w]+) ", text):
            guard, rest = (self._find(match[2]), bool(match[1])), text[match.end() :]
        opcode, _, operands = rest.partition(" ")
        args = [self._operand(piece) for piece in _OPERAND.findall(operands)]
        ins = Instruction(opcode.split("."), args, guard, line, text)
        block = self.blocks[-1]
        block.code.append(ins)
        if ins.ends_block():
            ends = {"bra": "branch" if guard else "jump", "ret": "exit", "exit": "exit"}
            block.end = ends.get(ins.name, "barrier")
            self.blocks.append(Block())

    def _declare(self, kind, names):
        bits = REGISTER_BITS[kind.lstrip(".").lstrip("busf")]
        for piece in names.split(","):
            many = re.fullmatch(r"([%\w]+)<(\d+)>", piece.strip())
            every = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [piece.strip()]
            for name in every:
                self.scopes[-1][name] = Register(name, self.count, bits)
                self.count += 1

    def _find(self, name):
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), None)

    def _operand(self, text):
        text = text.strip()
        if found := self._find(text):
            return found
        if text.startswith("{"):
            return [self._operand(piece) for piece in _OPERAND.findall(text[1:-1])]
        if text.startswith("["):
            base, _, offset = text[1:-1].replace(" ", "").partition("+")
            return Address(self._operand(base), int(offset or "0", 0))
        return Literal(text) if re.match(r"-?\d", text) else Symbol(text)

    def finished(self):
        if not self.blocks[-1].code and self.blocks[-1].end == "fall":
            self.blocks.pop()
        for number, block in enumerate(self.blocks):
            block.next = number + 1 if number + 1 < len(self.blocks) else None
            if block.end in ("jump", "branch"):
                block.target = self.labels[block.code[-1].args[0].name]
        return self.blocks
