"""Which bytes does a compiled program move, between devices and to and from their memory?

The answer is parsed from the program's HLO text. The body of a loop counts once per iteration,
which the compiler's own cost analysis does not do. All sizes are bytes of one device.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from star_jax.parallel.collectives import Collective

BITS = re.compile(r'[a-z]+?(\d+)')  # in the name of a number type, such as bf16 or f8e4m3fn
SHAPE = re.compile(r'\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?')
INSTRUCTION = re.compile(r'^\s*(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\d\-]*)\((.*)$')
HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
MESH_GROUPS = re.compile(
    r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}',
)
COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
SCATTER_FUSION = 'all-reduce-scatter'  # the TPU compiler's fusion of an all-reduce and a slice
TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# The TPU compiler writes a collective between slices as a pair of `send` and `recv`.
MEGASCALE = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
# These operations move nothing themselves: their operands and results count where they are used.
WITHOUT_TRAFFIC = {
    'after-all',
    'bitcast',
    'conditional',
    'constant',
    'get-tuple-element',
    'iota',
    'opt-barrier',
    'parameter',
    'partition-id',
    'recv',
    'send',
    'tuple',
    'while',
}


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An array of a program.

    Attributes:
        bytes: its size.
        on_chip: whether it is in fast memory of the chip instead of main memory.
    """

    bytes: int
    on_chip: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction:
    """One line of HLO text.

    Attributes:
        name: the name of its result.
        buffers: the arrays that it produces.
        operation: the HLO operation, such as fusion or all-gather.
        operands: names of the instructions whose results it reads.
        details: the text behind the operation's opening parenthesis: operands and attributes.
        root: whether its result is that of its computation.
    """

    name: str
    buffers: tuple[Buffer, ...]
    operation: str
    operands: tuple[str, ...]
    details: str
    root: bool

    @property
    def size(self) -> int:
        """Bytes of all results."""
        return sum(buffer.bytes for buffer in self.buffers)

    def called(self, attribute: str) -> str | None:
        """The name of the computation in an attribute, such as `body` of a loop."""
        match = re.search(rf'\b{attribute}=%?([\w.\-]+)', self.details)
        return match and match[1]


class HloText:
    """The text of a compiled program for `devices` devices, in order of their `slices`."""

    def __init__(self, text: str, devices: int = 1, slices: int = 1) -> None:
        self.computations, self.entry = _parse(text)
        self._devices, self._slices = devices, slices
        self._slice_size = max(devices // slices, 1)

    @functools.cached_property
    def executions(self) -> dict[str, int]:
        """The number of executions of each computation, without computations of fusions."""
        counts: dict[str, int] = {}

        def visit(name: str, count: int) -> None:
            counts[name] = counts.get(name, 0) + count
            for line in self.computations.get(name, ()):
                if line.operation == 'while':
                    visit(line.called('body'), count * self._trip_count(line))
                elif line.operation in ('call', 'async-start'):
                    visit(line.called('to_apply') or line.called('calls'), count)
                elif line.operation == 'conditional':
                    for branch in _branches(line.details):
                        visit(branch, count)

        visit(self.entry, 1)
        return counts

    def collectives(self) -> list[Collective]:
        """All collectives, equal ones summed, the largest first."""
        sums: dict[tuple, list[int]] = {}
        for name, executions in self.executions.items():
            counted = set()
            for line, scatters in self._with_fusions(name):
                collective = self._collective(line, scatters)
                channel = re.search(r'channel_id=(\d+)', line.details)
                label = line.operation, channel[1] if channel else line.name
                # A collective that overlaps other work appears in every fusion of that work.
                if collective is None or label in counted:
                    continue
                counted.add(label)
                *key, sent = collective
                count_and_bytes = sums.setdefault(tuple(key), [0, 0])
                count_and_bytes[0] += executions
                count_and_bytes[1] += executions * sent
        totals = [
            Collective(
                kind=kind,
                group_size=group_size,
                local_size=local_size,
                count=count,
                bytes=size,
                groups=groups,
            )
            for (kind, group_size, local_size, groups), (count, size) in sums.items()
        ]
        return sorted(totals, key=lambda collective: -collective.bytes)

    def _collective(self, line: Instruction, scatters: bool) -> tuple | None:
        """Kind, group size, members in one slice, groups, and bytes that one device sends."""
        if transfer := MEGASCALE.search(line.details):
            if line.operation != 'send':
                return None
            kind = transfer[1].lower().replace('_', '-')
            size, slices = line.buffers[0].bytes, self._slices
            result = size * slices if kind == 'all-gather' else size
            result = size // slices if kind == 'reduce-scatter' else result
            return kind, slices, 1, (), _sent(kind, result, slices)
        kind = _collective_kind(line.operation)
        if kind is None:
            return None
        groups = parse_groups(line.details, self._devices)
        group_size = groups.shape[1]
        _, members = np.unique(groups[0] // self._slice_size, return_counts=True)
        result = line.size
        if line.operation == 'all-gather-start':  # its results are (operand, gathered)
            result = max(buffer.bytes for buffer in line.buffers)
        if line.operation == 'collective-permute-start':
            result = line.buffers[0].bytes
        if kind == 'all-reduce' and scatters:
            kind, result = 'reduce-scatter', result // group_size
        if group_size == 1:
            return None
        local_size, sent = int(members.max()), _sent(kind, result, group_size)
        if kind == 'collective-permute':
            groups = parse_pairs(line.details)
        # Groups without neighbours in a slice use no links: one sum for all of them.
        numbers = () if local_size == 1 else tuple(map(tuple, groups.tolist()))
        return kind, group_size, local_size, numbers, sent

    def traffic(self) -> int:
        """Bytes read from and written to a device's main memory."""
        return sum(
            executions * sum(self._moved(line, name) for line in self.computations.get(name, ()))
            for name, executions in self.executions.items()
        )

    def _with_fusions(
        self, name: str, scatters: bool = False
    ) -> Iterator[tuple[Instruction, bool]]:
        """Instructions of a computation and its fusions; whether each is in a SCATTER_FUSION."""
        for line in self.computations.get(name, ()):
            yield line, scatters
            if line.operation == 'fusion':
                fused = line.called('calls')
                yield from self._with_fusions(fused, scatters or fused.startswith(SCATTER_FUSION))

    def _moved(self, line: Instruction, computation: str) -> int:
        """Bytes of main memory that one instruction reads and writes."""
        if line.operation in WITHOUT_TRAFFIC or line.operation.endswith('-done'):
            return 0
        if line.operation in ('copy-start', 'slice-start'):  # (to, from, ...): one is on the chip
            return min((buf.bytes for buf in line.buffers[:2] if not buf.on_chip), default=0)
        results = self._results[computation]
        operands = [results.get(name, ()) for name in line.operands]
        if line.operation == 'fusion':
            fused = line.called('calls')
            read = sum(
                _at_most(_off_chip(buffers), self._read_of_operand(fused, index))
                for index, buffers in enumerate(operands)
            )
            written = sum(
                _at_most(_off_chip((buffer,)), size)
                for buffer, size in zip(
                    line.buffers, self._written_by_fusion(fused, len(line.buffers)), strict=True
                )
            )
            return read + written
        written = _off_chip(line.buffers)
        if line.operation in ('dynamic-slice', 'gather', 'slice'):
            return 2 * written
        if line.operation == 'dynamic-update-slice':
            return 2 * _off_chip(operands[1])
        return sum(map(_off_chip, operands)) + written

    @functools.cached_property
    def _results(self) -> dict[str, dict[str, tuple[Buffer, ...]]]:
        """Computation -> instruction -> the arrays that it produces."""
        return {
            name: {line.name: line.buffers for line in lines}
            for name, lines in self.computations.items()
        }

    def _read_of_operand(self, fusion: str, index: int) -> int | None:
        """Bytes that a fusion reads of its operand; None if it reads all of them."""
        lines = self.computations.get(fusion, ())
        parameters = [line for line in lines if line.operation == 'parameter']
        names = (line.name for line in parameters if line.details.startswith(f'{index})'))
        return self._read_of_array(lines, next(names, None))

    def _read_of_array(self, lines: list[Instruction], name: str | None) -> int | None:
        """Bytes actually read of an array; None if all of them are.

        A slice counts its own size, forwarded operands count nothing.
        """
        total = 0
        for line in lines:
            if name not in line.operands:
                continue
            if line.operation == 'tuple' or _collective_kind(line.operation):
                continue
            size, is_first = None, line.operands[0] == name
            if is_first and line.operation in ('dynamic-slice', 'gather', 'slice'):
                size = line.size
            elif is_first and line.operation == 'dynamic-update-slice':
                size = 0
            elif line.operation == 'bitcast':
                size = self._read_of_array(lines, line.name)
            elif line.operation == 'fusion':
                size = self._read_of_operand(line.called('calls'), line.operands.index(name))
            if size is None:
                return None
            total += size
        return total

    def _written_by_fusion(self, fusion: str, count: int) -> list[int | None]:
        """Bytes that a fusion writes of each of its `count` results; None for a whole result."""
        lines = {line.name: line for line in self.computations.get(fusion, ())}
        root = next((line for line in lines.values() if line.root), None)
        names = () if root is None else (root.name,)
        if root is not None and root.operation == 'tuple':
            names = root.operands
        if len(names) != count:
            return [None] * count
        return [self._written(lines.get(name), lines) for name in names]

    def _written(self, line: Instruction | None, lines: dict[str, Instruction]) -> int | None:
        """Bytes that an instruction writes of its result: forwarded or received bytes are not."""
        if line is None:
            return None
        if line.operation == 'parameter' or _collective_kind(line.operation):
            return 0
        if line.operation == 'bitcast':
            return self._written(lines.get(line.operands[0]), lines)
        if line.operation == 'dynamic-update-slice' and line.operands[1] in lines:
            return lines[line.operands[1]].size
        if line.operation == 'fusion':
            return self._written_by_fusion(line.called('calls'), len(line.buffers))[0]
        return None

    def _trip_count(self, loop: Instruction) -> int:
        """Iterations of a loop: its annotation, or the constant its counter is compared with."""
        if annotation := TRIP_COUNT.search(loop.details):
            return int(annotation[1])
        lines = {line.name: line for line in self.computations.get(loop.called('condition'), ())}
        for line in lines.values():
            if line.operation == 'compare' and line.root:
                for name in line.operands:
                    number = re.match(r'(\d+)\)', lines[name].details) if name in lines else None
                    if number and lines[name].operation == 'constant':
                        return int(number[1])
        return 1


def parse_groups(details: str, devices: int) -> np.ndarray:
    """The groups of a collective, [groups, devices of a group], in any notation that XLA uses.

    Listed groups of several sizes give the first group alone, and so do pairs (`parse_pairs`).
    """
    if 'source_target_pairs=' in details:
        return parse_pairs(details)[:1]
    if mesh := MESH_GROUPS.search(details):
        return _mesh_groups(*mesh.groups())
    if lists := re.search(r'replica_groups=\{(\{[\d, {}]+\})\}', details):
        groups = [_numbers(group) for group in lists[1].split('}') if group]
        equal = len({len(group) for group in groups if group}) == 1
        return np.array([group for group in groups if group] if equal else groups[:1])
    if iota := re.search(r'replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)', details):
        shape, ids = iota[1].split('<=')
        return _device_ids(ids).reshape(_numbers(shape))
    return np.arange(devices)[None]


def parse_pairs(details: str) -> np.ndarray:
    """The pairs [pairs, (source, target)] of a collective-permute."""
    pairs = re.search(r'source_target_pairs=\{([\d,{} ]*)\}', details)
    return np.array(_numbers(pairs[1] if pairs else '')).reshape(-1, 2)


def _mesh_groups(axes: str, ids: str | None, group_axes: str) -> np.ndarray:
    """Groups along axes of a mesh; a part of an axis is written 'name':(outer)size."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    shape, along = [], []
    parts = {}
    for name, outer, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", group_axes):
        parts[name] = (int(outer), int(size)) if size else (1, sizes[name])
    for name, size in sizes.items():
        outer, inner = parts.get(name, (1, 1))
        along += [len(shape) + 1] if name in parts else []
        shape += [outer, inner, size // (outer * inner)]
    device_ids = _device_ids(ids) if ids else np.arange(math.prod(shape))
    device_ids = np.moveaxis(device_ids.reshape(shape), along, range(-len(along), 0))
    return device_ids.reshape(-1, math.prod(shape[axis] for axis in along))


def _device_ids(text: str) -> np.ndarray:
    """The array that `[2,2]T(1,0)` denotes: numbers from 0 in that shape, transposed."""
    shape, _, permutation = text.partition('T')
    ids = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return ids.transpose(_numbers(permutation)) if permutation else ids


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r'\d+', text)]


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of every computation, and the name of the entry computation."""
    computations: dict[str, list[Instruction]] = {}
    lines: list[Instruction] = []
    entry = ''
    for text_line in text.splitlines():
        if header := HEADER.match(text_line):
            lines = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif match := INSTRUCTION.match(text_line):
            root, name, results, operation, details = match.groups()
            operands = re.findall(r'%([\w.\-]+)', details[: _end_of_operands(details)])
            lines.append(
                Instruction(
                    name=name,
                    buffers=_buffers(results),
                    operation=operation,
                    operands=tuple(operands),
                    details=details,
                    root=root is not None,
                )
            )
    return computations, entry


def _end_of_operands(details: str) -> int:
    """The index of the parenthesis that closes the list of operands."""
    depth = 1
    for index, letter in enumerate(details):
        depth += (letter == '(') - (letter == ')')
        if not depth:
            return index
    return len(details)


def _buffers(text: str) -> tuple[Buffer, ...]:
    """The arrays of a type; `S(n)` in a layout is a memory space other than main memory."""
    return tuple(
        Buffer(
            bytes=math.prod(map(int, filter(None, sides.split(',')))) * _bits(kind) // 8,
            on_chip=bool(re.search(r'S\([1-9]', layout or '')),
        )
        for kind, sides, layout in SHAPE.findall(text)
    )


def _bits(kind: str) -> int:
    match = BITS.match(kind)
    return 8 if kind == 'pred' or match is None else int(match[1])


def _collective_kind(operation: str) -> str | None:
    kind = operation.removesuffix('-start')
    return kind if kind in COLLECTIVES else None


def _sent(kind: str, result: int, group_size: int) -> int:
    """Bytes that a device sends for a result of `result` bytes, by the cheapest algorithm."""
    formulas: dict[str, Callable[[], int]] = {
        'all-gather': lambda: result * (group_size - 1) // group_size,
        'all-reduce': lambda: 2 * result * (group_size - 1) // group_size,
        'reduce-scatter': lambda: result * (group_size - 1),
        'all-to-all': lambda: result * (group_size - 1) // group_size,
    }
    return formulas.get(kind, lambda: result)()


def _branches(details: str) -> list[str]:
    """The computations of a conditional that count: one branch runs, the first is taken."""
    match = re.search(r'branch_computations=\{%?([\w.\-]+)', details)
    return [match[1]] if match else re.findall(r'true_computation=%?([\w.\-]+)', details)


def _off_chip(buffers: Sequence[Buffer]) -> int:
    return sum(buffer.bytes for buffer in buffers if not buffer.on_chip)


def _at_most(size: int, limit: int | None) -> int:
    return size if limit is None else min(size, limit)
