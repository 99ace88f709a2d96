"""What a batch holds on each device at the most, and how many rows of it fit.

Where it was measured, on a CPU that has the whole model, it is the peak of a process
(`pipeline.peak_memory`); elsewhere an upper bound (`pipeline.memory_bound`).
"""

from typing import Any, NamedTuple

from pipeline.memory_bound import FP32, memory_by_part
from pipeline.peak_memory import peak
from pipeline.planning import Shape, parameters

# A share of a device's memory that nothing of ours takes: CUDA's context, NCCL's buffers, holes
# between allocations. An assumption; nothing here could measure it.
KEPT_FREE = 0.1
# How far what a process was measured to hold may be from what `peak_memory` says of it.
PEAK_ERROR = 0.1


class Batch(NamedTuple):
    """What decides how much memory a batch takes, but for its rows."""

    shape: Shape
    block_size: int
    precision: str = "bf16"
    """fp32, or bf16 or fp16 by autocast."""
    topology: str = "none"
    """none, ddp, fsdp2, zero2 or zero3."""
    devices: int = 1
    kind: str = "cuda"
    """cpu, cuda or mps."""
    optimizer: str = "adamw"
    """adamw or muon."""
    trained: float = 1.0
    """Share of the parameters that learn: the others have neither gradient nor averages."""
    is_accumulating: bool = True
    is_checkpointed: bool = False
    is_blockwise: bool = False
    is_compiled: bool = False
    is_saving: bool = True

    def held(self, rows: int) -> tuple[str | None, dict[str, int]]:
        """Return what a batch of so many rows takes of each device, in bytes by part, and in which
        phase of an update (`pipeline.peak_memory`); the phase is None where it is a bound.
        """
        batch: dict[str, Any] = {
            "rows": rows, "block_size": self.block_size, "precision": self.precision,
            "optimizer": self.optimizer, "is_accumulating": self.is_accumulating,
            "is_checkpointed": self.is_checkpointed, "is_blockwise": self.is_blockwise,
        }  # fmt: skip
        phase = None
        if self.kind == "cpu" and self.topology in ("none", "ddp"):
            phase, parts = peak(
                self.shape, kind="cpu", is_compiled=self.is_compiled, is_saving=self.is_saving,
                **batch,
            )  # fmt: skip
            if self.topology == "ddp":  # its buckets, besides gradients that are added up
                parts["buffers"] = FP32 * parameters(self.shape) * self.is_accumulating
        else:
            parts = memory_by_part(
                self.shape, topology=self.topology, devices=self.devices,
                device="cpu" if self.kind == "cpu" else "cuda", **batch,
            )  # fmt: skip
        if self.trained < 1:
            for name in {"gradients", "optimizer", "buffers", "checkpoint"} & set(parts):
                parts[name] = round(parts[name] * self.trained)
        return phase, parts

    def peak_bytes(self, rows: int) -> int:
        """Return what it takes together."""
        return sum(self.held(rows)[1].values())

    def least_bytes(self, rows: int) -> int:
        """Return what it takes for certain: of a bound whatever is there at the same time."""
        phase, parts = self.held(rows)
        if phase is not None:
            return round(sum(parts.values()) * (1 - PEAK_ERROR))
        return parts["weights"] + parts["optimizer"] + max(parts["gradients"], parts["activations"])

    def largest_rows(self, memory_bytes: float) -> int:
        """Return the largest power of two of rows that fits, or 0; `KEPT_FREE` of the memory is
        left."""
        usable, rows = memory_bytes * (1 - KEPT_FREE), 1
        while self.peak_bytes(rows) <= usable and rows < 2**20:
            rows *= 2
        return rows // 2
