"""Reads what the TPU compiler made of a program: cycles, collectives, kernels."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "collective-broadcast",
)
# What computes nothing, or is counted by what it calls.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional")
# A transfer between slices: a send to the host, and a receipt of what the others sent, summed up.
_BETWEEN_SLICES = '_xla_host_transfer_handler_name="xla_megascale_runtime"'
_OPCODE = re.compile(r" ([a-z][a-z0-9\-]*)\(")
_SHAPE = re.compile(r"(pred|[a-z]+\d+)\w*\[([\d,]*)\]")


@dataclass(frozen=True)
class Transfer:
    """A collective, each time it runs.

    Attributes:
        kind: all-gather, all-reduce, reduce-scatter, collective-permute or all-to-all.
        output_bytes: of its result on one device.
        group: ids of the devices that talk with each other, of the first group; of a permutation
            the first source that has another target, and that; of none where slices talk.
        between_cycles: compute scheduled between its start and its end, which hides it.
        times: it runs in a step.
        across_slices: each device talks with its like in the other slices, by way of the hosts.
    """

    kind: str
    output_bytes: int
    group: tuple[int, ...]
    between_cycles: int
    times: int
    across_slices: bool = False


@dataclass(frozen=True)
class Kernel:
    """A custom call without an estimate, each time it runs.

    Attributes:
        name: of the kernel.
        shapes: of its operands that are floats of three axes: queries, keys, values, ...; where
            there are more, as of several rows, the first ones are one.
        fused: one of its results has more axes than its queries: of a backward kernel, the parts
            of the gradient of the queries.
        times: it runs in a step.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    fused: bool
    times: int


@dataclass
class Program:
    """Sums over one run of an optimized program, loops counted as often as they turn.

    Attributes:
        cycles: that the compiler estimates.
        transfers: that it has no estimate for.
        kernels: likewise.
        unknown: operations that have none either and compute more than one number, by their code,
            custom calls by what they call; each counts once, however often it runs.
    """

    cycles: int = 0
    transfers: list[Transfer] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    unknown: Counter[str] = field(default_factory=Counter)


_NO_ESTIMATE = 2**63 - 1


@dataclass(frozen=True)
class _Op:
    name: str
    shape: str
    code: str
    text: str

    def find(self, pattern: str) -> str:
        match = re.search(pattern, self.text)
        return match[1] if match else ""


def read_program(text: str) -> Program:
    """Adds up the optimized HLO of a TPU executable (`compiled.as_text()`).

    The compiler writes its own estimate of cycles beside most operations. Loops are weighted by
    their trip counts, which are the constants their conditions compare with; of a choice the
    costliest branch counts, as if it were always taken. An operation inside an asynchronous wrapper
    counts where the wrapper stands. A transfer that runs through a chain of fusions, which compute
    meanwhile, counts once.
    """
    computations, entry = _split(text)
    trips = {
        body: _trip_count(computations, condition)
        for ops in computations.values()
        for op in ops
        if op.code == "while"
        for condition, body in [(op.find(r"condition=%?([\w.\-]+)"), op.find(r"body=%?([\w.\-]+)"))]
    }
    cycles_of: dict[str, int] = {}

    def count_cycles(name: str) -> int:
        if name not in cycles_of:
            cycles_of[name] = sum(_cycles(op, trips, count_cycles) for op in computations[name])
        return cycles_of[name]

    def cycles_at(op: _Op) -> int:
        return _cycles(op, trips, count_cycles)

    program = Program(cycles=count_cycles(entry))

    def collect(name: str, times: int) -> None:
        ops, seen = computations[name], set()
        for op in ops:
            if op.code == "while":
                body = op.find(r"body=%?([\w.\-]+)")
                collect(body, times * trips[body])
            elif op.code == "conditional":
                collect(max(_branches(op), key=count_cycles), times)
            elif op.code == "custom-call" and "tpu_custom_call" in op.text:
                program.kernels.append(_kernel(op, times))
            elif _BETWEEN_SLICES in op.text:
                if op.code == "send":
                    hidden = _hidden_behind(op, _find_arrival(op, ops), ops, cycles_at)
                    kind = op.find(r'_xla_megascale_transfer_type="(\w+)"')
                    kind = kind.lower().replace("_", "-")
                    size = _sizes(op.shape)[0]
                    program.transfers.append(Transfer(kind, size, (), hidden, times, True))
            elif _is_unknown(op) and not any(_collectives(op, computations)):
                program.unknown[op.find(r'custom_call_target="(\w+)"') or op.code] += 1
            for kind, inner in _collectives(op, computations):
                chain = inner.find(r'chain_id="(\d+)"')
                if op.code.endswith("-done") or chain in seen:
                    continue
                seen |= {chain} - {""}
                program.transfers.append(
                    Transfer(
                        kind,
                        _output_bytes(kind, op, inner),
                        read_group(inner.text),
                        _hidden_behind(op, _end(op, chain, ops, computations), ops, cycles_at),
                        times,
                    )
                )

    collect(entry, 1)
    return program


def _split(text: str) -> tuple[dict[str, list[_Op]], str]:
    computations: dict[str, list[_Op]] = {}
    current, entry = "", ""
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            current = head[2]
            computations[current] = []
            entry = current if head[1] else entry
        elif current and line.startswith("  "):
            name, equals, rest = line.strip().removeprefix("ROOT ").partition(" = ")
            code = _OPCODE.search(" " + rest)
            if equals and code:
                shape = rest[: code.start()]
                computations[current].append(_Op(name.lstrip("%"), shape, code[1], rest))
    assert entry, "every HLO module has an entry computation"
    return computations, entry


def _trip_count(computations: dict[str, list[_Op]], condition: str) -> int:
    constants = [
        int(n) for op in computations[condition] for n in re.findall(r"constant\((\d+)\)", op.text)
    ]
    return max(constants, default=1)


def _cycles(op: _Op, trips: dict[str, int], count: Callable[[str], int]) -> int:
    if op.code == "while":
        body = op.find(r"body=%?([\w.\-]+)")
        return trips[body] * count(body)
    if op.code == "conditional":
        return max(map(count, _branches(op)))
    return _estimate(op) or 0


def _estimate(op: _Op) -> int | None:
    """Cycles of one run; the compiler writes its largest number where it has no estimate."""
    found = op.find(r'"estimated_cycles":"(\d+)"')
    return int(found) if found and int(found) < _NO_ESTIMATE else None


def _is_unknown(op: _Op) -> bool:
    """Whether it computes an array in time that nobody estimates."""
    free = op.code in _FREE or op.code.endswith(("-start", "-done")) or "AllocateBuffer" in op.text
    numbers = sum(
        math.prod(int(n) for n in dims.split(",") if n) for _, dims in _SHAPE.findall(op.shape)
    )
    return not free and _estimate(op) is None and numbers > 1


def _branches(op: _Op) -> list[str]:
    """The computations that a conditional chooses from."""
    found = re.search(r"branch_computations=\{([^}]*)\}", op.text)
    if found:
        return re.findall(r"[\w.\-]+", found[1])
    return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", op.text)


def _collectives(op: _Op, computations: dict[str, list[_Op]]) -> Iterator[tuple[str, _Op]]:
    """The collectives of an operation: itself, or what it calls in a fusion or a wrapper."""
    kind = op.code.removesuffix("-start")
    if kind in _COLLECTIVES:
        yield kind, op
        return
    if op.code == "while":
        return
    called = op.find(r"(?:calls|to_apply)=%?([\w.\-]+)")
    for inner in computations.get(called, ()):
        for kind, found in _collectives(inner, computations):
            scatters = kind == "all-reduce" and "all-reduce-scatter" in called
            yield "reduce-scatter" if scatters else kind, found


def _output_bytes(kind: str, op: _Op, inner: _Op) -> int:
    shapes = _sizes(op.shape if kind == "reduce-scatter" else inner.shape)
    if inner.code in ("all-gather-start", "collective-permute-start"):  # (operand, result, ...)
        return shapes[1]
    return sum(shapes)


def _sizes(shape: str) -> list[int]:
    return [
        _bits(kind) * math.prod(int(n) for n in dims.split(",") if n) // 8
        for kind, dims in _SHAPE.findall(shape)
    ]


def _bits(kind: str) -> int:
    """Of one value, by the name of its type; a TPU packs four bits (`E(4)` in layouts of u4)."""
    return 8 if kind == "pred" else int(kind.lstrip("abcdefghijklmnopqrstuvwxyz"))


def _end(op: _Op, chain: str, ops: list[_Op], computations: dict[str, list[_Op]]) -> _Op:
    """The operation that waits for a transfer which `op` begins; `op` itself if that does.

    That is the `-done` of a `-start`; or, where a transfer runs as a chain of fusions that compute
    meanwhile, the last of them.
    """
    if chain:
        return next(
            later
            for later in reversed(ops)
            for _, inner in _collectives(later, computations)
            if inner.find(r'chain_id="(\d+)"') == chain
        )
    if not op.code.endswith("-start"):
        return op
    done = op.code.removesuffix("-start") + "-done"
    waits = re.compile(rf"%{re.escape(op.name)}\b(?![.\-])")
    rest = ops[ops.index(op) + 1 :]
    return next((o for o in rest if o.code == done and waits.search(o.text)), rest[-1])


def _find_arrival(send: _Op, ops: list[_Op]) -> _Op:
    """The operation that waits for what comes back of what was sent to other slices."""
    meeting = send.find(r'_xla_host_transfer_rendezvous="([^"]+)"')
    receive = next(op for op in ops if op.code == "recv" and f'"{meeting}"' in op.text)
    return next(op for op in ops if op.code == "recv-done" and f"(%{receive.name})" in op.text)


def _hidden_behind(op: _Op, end: _Op, ops: list[_Op], cycles_at: Callable[[_Op], int]) -> int:
    """Cycles scheduled between the start of a transfer and the operation that waits for it."""
    return sum(map(cycles_at, ops[ops.index(op) + 1 : ops.index(end)]))


def _kernel(op: _Op, times: int) -> Kernel:
    operands = re.search(r"operand_layout_constraints=\{(.*?\})\}", op.text)
    floats = _float_shapes(operands[1] if operands else "")
    axes = len(floats[0]) if floats else 0
    folded = tuple((math.prod(dims[:-2]), *dims[-2:]) for dims in floats)
    fused = any(len(dims) > axes for dims in _float_shapes(op.shape))
    return Kernel(op.name.rsplit(".", 1)[0], folded, fused, times)


def _float_shapes(text: str) -> list[tuple[int, ...]]:
    """Of three axes or more."""
    found = [
        tuple(int(n) for n in dims.split(",") if n)
        for kind, dims in _SHAPE.findall(text)
        if kind in ("bf16", "f32")
    ]
    return [dims for dims in found if len(dims) >= 3]


def read_group(text: str) -> tuple[int, ...]:
    """The first group of devices of a collective, in any of the notations of HLO.

    Of a permutation the first pair that moves something.
    """
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", text):
        moves = [(int(a), int(b)) for a, b in re.findall(r"(\d+),(\d+)", pairs[1]) if a != b]
        return moves[0] if moves else ()
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return tuple(int(n) for n in listed[1].split(","))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        ids = _iota(iota[2], iota[3])
        return tuple(int(n) for n in ids.reshape([int(n) for n in iota[1].split(",")])[0])
    if mesh := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? "
        r"\{([^}]*)\}",
        text,
    ):
        axes = re.findall(r"'(\w+)'=(\d+)", mesh[1])
        total = str(math.prod(int(n) for _, n in axes))
        ids = _iota(mesh[2] or total, mesh[3]).reshape([int(n) for _, n in axes])
        talking = re.findall(r"'(\w+)'", mesh[4])
        names = [name for name, _ in axes]
        ids = np.moveaxis(ids, [names.index(n) for n in talking], range(len(talking)))
        count = math.prod(ids.shape[: len(talking)])
        return tuple(int(n) for n in ids.reshape(count, -1)[:, 0])
    return ()


def _iota(dims: str, order: str | None) -> np.ndarray:
    sizes = [int(n) for n in dims.split(",")]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return (ids.transpose([int(n) for n in order.split(",")]) if order else ids).reshape(-1)


def sum_by_axes(program: Program, mesh_shape: dict[str, int]) -> dict[str, dict[str, float]]:
    """Bytes that each kind of collective puts out on a device, by the mesh axes it runs over.

    What goes between slices is told as `slices`.
    """
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for transfer in program.transfers:
        axes = "slices" if transfer.across_slices else axes_of(transfer.group, mesh_shape)
        sums[axes][transfer.kind] += transfer.output_bytes * transfer.times
    return {axes: dict(kinds) for axes, kinds in sums.items()}


def axes_of(group: tuple[int, ...], mesh_shape: dict[str, int]) -> str:
    """The mesh axes along which the members of a group differ, as `fsdp` or `data*fsdp`."""
    places = np.stack(np.unravel_index(np.array(group or (0,)), tuple(mesh_shape.values())))
    differ = (places != places[:, :1]).any(axis=1)
    return "*".join(name for name, moves in zip(mesh_shape, differ, strict=True) if moves) or "none"
