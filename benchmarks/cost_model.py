"""What an initialisation costs, as formulas: bytes moved, floating-point operations and memory, by stage and placement.

The constants are those that were measured where there are measurements (benchmarks/results), else data sheets'.
benchmarks/tables.py makes tables of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

Placement = Literal["device", "host", "disk"]
Schedule = Literal["rows", "blocks"]
PASSES = 3  # forward, backward, evaluation: each needs every block once
WEIGHT, GRADIENT = 2, 4  # bytes of bf16 and fp32
ACTIVATIONS = (
    1.4  # a block's graph, for each element into or out of a linear layer; as in loraone_init.initialization.estimate
)
LOGITS = 3 * 4 * 2**22  # bytes of the head's buffers; as in loraone_init.gradients.objective
RESERVE = 0.9  # of a memory that can be filled
SVD_VECTORS, SVD_ITERATIONS = 24, 5
SVD_BATCH = 2**28  # bytes of the gradients in one batch of SVDs; as in loraone_init.initialization.layer_starts
BLOCKS_ON_DEVICE = {"host": 2, "disk": 2}  # one computes while the next one arrives


@dataclass(frozen=True)
class Model:
    """A Llama: `kv` is the width of keys and values, `rows` of `length` tokens are its sample."""

    name: str
    hidden: int
    intermediate: int
    kv: int
    layers: int
    vocabulary: int
    rows: int = 64
    length: int = 1024
    batch_tokens: int = 8192

    @property
    def block(self) -> int:
        """Parameters of one block's linear layers."""
        return 2 * self.hidden**2 + 2 * self.hidden * self.kv + 3 * self.hidden * self.intermediate

    @property
    def blocks(self) -> int:
        return self.layers * self.block

    @property
    def outside(self) -> int:
        """Parameters of embeddings and head."""
        return 2 * self.vocabulary * self.hidden

    @property
    def weight_bytes(self) -> int:
        return WEIGHT * (self.blocks + self.outside)

    @property
    def widths(self) -> int:
        """Elements into and out of a block's linear layers, for one token."""
        return 6 * self.hidden + 2 * (self.hidden + self.kv) + 3 * self.intermediate + self.hidden


@dataclass(frozen=True)
class Machine:
    """Rates in bytes or floating-point operations per second, memories in bytes."""

    matrix_rate: float
    efficiency: float  # share of it that whole blocks reach
    memory_rate: float
    device_memory: float
    host_memory: float  # of a node
    host_to_device: float
    disk: float  # of a node
    file_cache: float  # for each process
    link: float  # between the GPUs of a node, one direction
    network: float  # between nodes, for each GPU
    gpus: int  # of a node
    svd_overhead: float  # seconds for each batch of layers: small products, QR, waiting for the host


H100_NODE = Machine(
    matrix_rate=989e12,
    efficiency=0.5,
    memory_rate=0.5 * 3.35e12,
    device_memory=80e9,
    host_memory=2e12,
    host_to_device=0.8 * 64e9,
    disk=7e9,
    file_cache=5e9,
    link=0.7 * 450e9,
    network=0.7 * 50e9,
    gpus=8,
    svd_overhead=0.05,
)
LLAMA_8B = Model("Llama-3.1-8B", 4096, 14336, 1024, 32, 128256)
LLAMA_70B = Model("Llama-3.1-70B", 8192, 28672, 1024, 80, 128256)
LLAMA_405B = Model("Llama-3.1-405B", 16384, 53248, 1024, 126, 128256)


@dataclass(frozen=True)
class Cost:
    """Of one rank; seconds by stage, in order."""

    placement: Placement
    schedule: Schedule
    device_bytes: float
    host_bytes: float  # of a node
    inputs_on_host: bool
    moved_bytes: float
    flops: float
    seconds: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def device_bytes(model: Model, ranks: int, placement: Placement, inputs: bool = True) -> float:
    """Weights outside of blocks, blocks, a block's gradients and a copy of the largest, a micro-batch, block inputs."""
    blocks = model.layers if placement == "device" else BLOCKS_ON_DEVICE[placement]
    gradients = GRADIENT * (model.block + model.hidden * model.intermediate)
    tokens = min(model.batch_tokens, _tokens(model.rows, model, ranks))
    working = max(ACTIVATIONS * WEIGHT * model.widths * tokens, LOGITS)
    kept = input_bytes(model, ranks) if inputs else 0.0
    return WEIGHT * (model.outside + blocks * model.block) + gradients + working + kept


def device_bytes_by_rows(model: Model, ranks: int) -> float:
    """All weights, the sums of all layers and a copy of the largest, and a micro-batch of one row in all blocks.

    More rows together take what is left.
    """
    gradients = GRADIENT * (model.blocks + model.hidden * model.intermediate)
    working = ACTIVATIONS * WEIGHT * model.layers * model.widths * model.length + LOGITS
    return model.weight_bytes + gradients + working


def shared_reading(model: Model, ranks: int, machine: Machine) -> Cost:
    """If the ranks of a node held one copy of the blocks between them, each reading its part and passing it on.

    A block comes over PCIe and the link at once, a part after the other; this is not built.
    """
    alone = predict(model, ranks, machine)
    size, share = WEIGHT * model.blocks, WEIGHT * model.blocks / min(ranks, machine.gpus)
    load = max(share / machine.host_to_device, (size - share) / machine.link)
    computed = {stage: seconds for stage, seconds in predict(model, ranks, _reading_free(machine)).seconds.items()}
    stages = {stage: max(computed[stage], load) for stage in ("forward", "backward", "evaluate")}
    seconds = {**computed, **stages, "open": WEIGHT * (model.blocks + model.outside) / machine.disk}
    moved = alone.moved_bytes - PASSES * (size - share)
    return replace(alone, placement="host", host_bytes=size, moved_bytes=moved, seconds=seconds)


def _reading_free(machine: Machine) -> Machine:
    """The machine with links that take no time: what is left is computing."""
    return replace(machine, host_to_device=math.inf, disk=math.inf, file_cache=math.inf)


def input_bytes(model: Model, ranks: int) -> float:
    """Of all blocks, for the rows of one rank: kept from the forward to the backward."""
    return float(WEIGHT * model.layers * model.hidden * _tokens(model.rows, model, ranks))


def predict(model: Model, ranks: int, machine: Machine) -> Cost:
    """With the first placement and schedule that fit, as "auto" chooses."""
    placement, on_host = _place(model, ranks, machine)
    by_rows = device_bytes_by_rows(model, ranks) <= RESERVE * machine.device_memory
    tokens = _tokens(model.rows, model, ranks)
    evaluated = _tokens(num_evaluated(model.rows), model, ranks)
    rate = machine.matrix_rate * machine.efficiency
    forward, head = _forward_flops(model, tokens), 4.0 * model.vocabulary * model.hidden * tokens
    evaluate = _forward_flops(model, evaluated) + head / 2 * evaluated / tokens
    loads = list(_load_seconds(model, machine, placement))
    inputs = input_bytes(model, ranks) / machine.host_to_device if on_host else 0.0
    seconds = {
        "open": _open_seconds(model, machine, placement),
        "forward": max(forward / rate, loads[0] + inputs) + head / rate,
        "backward": max((2 if by_rows else 3) * forward / rate, loads[1] + inputs),
        "reduce": _reduce_seconds(model, ranks, machine),
        "svd": _svd_seconds(model, ranks, machine),
        "evaluate": max(evaluate / rate, loads[2]),
    }
    node = min(ranks, machine.gpus)
    streamed = 0.0 if placement == "device" else PASSES * WEIGHT * model.blocks
    kept = input_bytes(model, ranks) if on_host else 0.0
    return Cost(
        placement=placement,
        schedule="rows" if by_rows else "blocks",
        device_bytes=device_bytes_by_rows(model, ranks)
        if by_rows
        else device_bytes(model, ranks, placement, not on_host),
        host_bytes=node * (kept + (WEIGHT * model.blocks if placement == "host" else 0.0)),
        inputs_on_host=on_host,
        moved_bytes=streamed + 2 * kept + (GRADIENT * model.blocks if ranks > 1 else 0.0),
        flops=(3 if by_rows else 4) * forward + head + evaluate,
        seconds=seconds,
    )


def num_evaluated(rows: int) -> int:
    """As loraone_init.initialization.evaluation has it."""
    return max(1, min(rows // 4, max(8, rows // 8)))


def _tokens(rows: int, model: Model, ranks: int) -> int:
    """Of the rank that has the most."""
    return math.ceil(rows / ranks) * model.length


def _forward_flops(model: Model, tokens: int) -> float:
    """Products with weights, and attention's own: Q·Kᵀ and its product with V, without the masked half."""
    return 2.0 * model.blocks * tokens + 2.0 * model.layers * tokens * model.length * model.hidden


def _place(model: Model, ranks: int, machine: Machine) -> tuple[Placement, bool]:
    """(placement, whether the blocks' inputs go to the host)."""
    room = RESERVE * machine.device_memory
    if device_bytes(model, ranks, "device") <= room:
        return "device", False
    on_host = device_bytes(model, ranks, "host") > room
    node = min(ranks, machine.gpus)
    inputs = input_bytes(model, ranks) if on_host else 0.0
    fits = node * (WEIGHT * model.blocks + inputs) <= RESERVE * machine.host_memory
    return ("host" if fits else "disk"), on_host


def _open_seconds(model: Model, machine: Machine, placement: Placement) -> float:
    """Reading from the disk what stays; the ranks of a node read the same files, which the file cache gives them."""
    parameters = model.outside if placement == "disk" else model.blocks + model.outside
    return WEIGHT * parameters / machine.disk


def _load_seconds(model: Model, machine: Machine, placement: Placement) -> Iterator[float]:
    """Of all blocks, for each pass. The file cache holds them after the first one if the host's memory does."""
    size = WEIGHT * model.blocks
    cached = size <= RESERVE * machine.host_memory
    for number in range(PASSES):
        if placement == "device":
            yield 0.0
        elif placement == "host":
            yield size / machine.host_to_device
        else:
            yield size / (min(machine.file_cache, machine.host_to_device) if number and cached else machine.disk)


def _reduce_seconds(model: Model, ranks: int, machine: Machine) -> float:
    """Each rank sends each layer's fp32 gradient once, to the one that decomposes it."""
    if ranks == 1:
        return 0.0
    return GRADIENT * model.blocks / (machine.link if ranks <= machine.gpus else machine.network)


def _svd_seconds(model: Model, ranks: int, machine: Machine) -> float:
    """Each iteration reads G twice, and the largest layer of a block is one rank's."""
    largest = model.hidden * model.intermediate
    share = max(model.block / ranks, largest)
    reading = 2 * SVD_ITERATIONS * GRADIENT * share / machine.memory_rate
    return model.layers * (reading + max(1.0, svd_batches(model) / ranks) * machine.svd_overhead)


def svd_batches(model: Model) -> float:
    """Of one block: layers of equal shape share one, with those of other blocks too, as long as they are small."""
    sizes = {  # elements, and how many layers of a block have this shape
        "q, o": (model.hidden**2, 2),
        "k, v": (model.hidden * model.kv, 2),
        "gate, up": (model.hidden * model.intermediate, 2),
        "down": (model.hidden * model.intermediate, 1),
    }
    return sum(count / math.ceil(SVD_BATCH / (GRADIENT * elements)) for elements, count in sizes.values())
