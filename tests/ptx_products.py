"""Runs the straight-line PTX of a matrix product, 128 threads in step, to see what is where.

It computes nothing: what is loaded is a word's address, and what wgmma leaves in a register is the
register's place. So the addresses, descriptors and stores of a compiler for the chip show its
layouts, without the chip.
"""

import re

THREADS = range(128)
WORD = 0xFFFFFFFF


class UnknownInstructionError(Exception):
    """The compiler has used another instruction than those below."""


def _bit_field(x: int, start: int, length: int, signed: bool) -> int:
    field = x >> start & (1 << length) - 1
    if signed and field >> length - 1:
        field -= 1 << length
    return field & WORD


ARITHMETIC = {
    "mov.u32": lambda x: x,
    "mov.b32": lambda x: x,
    "cvt.u64.u32": lambda x: x,
    "neg.s32": lambda x: -x & WORD,
    "add.s32": lambda x, y: x + y & WORD,
    "add.s64": lambda x, y: x + y & (1 << 64) - 1,
    "sub.s32": lambda x, y: x - y & WORD,
    "and.b32": lambda x, y: x & y,
    "or.b32": lambda x, y: x | y,
    "or.b64": lambda x, y: x | y,
    "xor.b32": lambda x, y: x ^ y,
    "shl.b32": lambda x, y: x << y & WORD,
    "shr.u32": lambda x, y: x >> y,
    "mul.lo.s32": lambda x, y: x * y & WORD,
    "mul.wide.u32": lambda x, y: x * y,
    "mad.wide.u32": lambda x, y, z: x * y + z,
    "bfe.u32": lambda x, start, length: _bit_field(x, start, length, False),
    "bfe.s32": lambda x, start, length: _bit_field(x, start, length, True),
    # `d = pack(high, low)`: both places, as in hopper.h's pack(low, high).
    "cvt.rn.bf16x2.f32": lambda high, low: (low, high),
}
WITHOUT_EFFECT = ("bar.", "fence.", "wgmma.fence", "wgmma.commit", "wgmma.wait", "mov.pred", "ret")


class Run:
    """What a kernel did.

    Attributes:
        shared: {byte: global byte}, of the words of shared memory, at the first wgmma.
        products: of each wgmma, a dict: ``shape``; ``transposes`` (of a and b); ``a``, a
            descriptor, or in each thread what its four registers hold; ``b``, a descriptor.
        stored: {global byte: (thread, register)}, of accumulators.
    """

    def __init__(self, ptx: str, parameters: list[int]):
        self.parameters = parameters
        self.registers: list[dict] = [{"%tid.x": t, "global_smem": 0} for t in THREADS]
        self.memory: dict[int, object] = {}
        self.shared: dict[int, object] = {}
        self.products: list[dict] = []
        self.stored: dict[int, object] = {}
        body = ptx[ptx.index("{") :]
        for statement in re.findall(r"^\s*([a-z][^;{]*(?:\{[^}]*\}[^;{]*)*);", body, re.MULTILINE):
            operation, _, rest = statement.partition(" ")
            self._run(operation.strip(), rest.replace("\t", " ").strip())

    def _value(self, thread: int, operand: str):
        if re.fullmatch(r"-?\d+", operand):
            return int(operand)
        return int(operand, 16) if operand.startswith("0x") else self.registers[thread][operand]

    def _run(self, operation: str, rest: str) -> None:
        if operation.startswith(WITHOUT_EFFECT):
            return
        vectors = [re.findall(r"%\w+", v) for v in re.findall(r"\{([^}]*)\}", rest)]
        address = re.search(r"\[\s*([%\w]+)(?:\s*\+\s*(\d+))?\s*\]", rest)
        if operation == "ld.param.b64":
            target = rest.split(",")[0].strip()
            value = self.parameters[int(address[1].rsplit("_", 1)[1])]
            for registers in self.registers:
                registers[target] = value
        elif operation in ("ld.global.v4.b32", "ld.shared.v4.b32", "st.shared.v4.b32",
                           "st.global.v4.b32"):  # fmt: skip
            for t in THREADS:
                first = self._value(t, address[1]) + int(address[2] or 0)
                for i, register in enumerate(vectors[0]):
                    self._move(operation[:9], first + 4 * i, self.registers[t], register)
        elif operation.startswith("wgmma.mma_async"):
            self._product(operation, rest, vectors)
        elif operation in ARITHMETIC:
            target, *operands = (part.strip() for part in rest.split(","))
            for t in THREADS:
                values = [self._value(t, operand) for operand in operands]
                self.registers[t][target] = ARITHMETIC[operation](*values)
        else:
            raise UnknownInstructionError(f"{operation} {rest}")

    def _move(self, kind: str, at: int, registers: dict, register: str) -> None:
        if kind == "ld.global":
            registers[register] = at
        elif kind == "ld.shared":
            registers[register] = self.memory[at]
        elif kind == "st.shared":
            self.memory[at] = registers[register]
        else:
            self.stored[at] = registers[register]

    def _product(self, operation: str, rest: str, vectors: list[list[str]]) -> None:
        if not self.products:
            self.shared = dict(self.memory)
        operands = [part.strip() for part in re.sub(r"\{[^}]*\}", "#", rest).split(",")]
        b = self._value(0, operands[2])
        if operands[1] == "#":
            a = [[self.registers[t][register] for register in vectors[1]] for t in THREADS]
        else:
            a = self._value(0, operands[1])
        transposes = tuple(int(x) for x in operands[6:])
        self.products.append(
            {"shape": operation.split(".")[4], "transposes": transposes, "a": a, "b": b}
        )
        for t in THREADS:
            for i, register in enumerate(vectors[0]):
                self.registers[t][register] = (t, i)
