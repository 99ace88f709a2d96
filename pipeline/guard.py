"""A loss or gradient that is not a number: no update is made of it, and its rows are named."""

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

ROWS_SHOWN = 8


class NonFinite(Exception):
    """An update was not made, because its loss or gradient was infinite or not a number."""

    def __init__(self, step: int) -> None:
        """`step`: the update, counted from 1."""
        super().__init__(
            f"update {step} was not made: its loss or gradient is infinite or not a number"
        )
        self.step = step

    def described(self, rows: list[int], alone: list[list[int]]) -> str:
        """Return the sentence that names the update's rows, or what else is to blame.

        Args:
            rows: those of the update.
            alone: of those that each process tried, the ones whose loss alone is not finite.
        """
        count = len(alone)
        whole = [n for n, found in enumerate(alone) if len(found) == len(rows[n::count])]
        blamed = sorted(sum(alone, []))
        named = ", ".join(map(str, (blamed or rows)[:ROWS_SHOWN]))
        named += ", ..." if len(blamed or rows) > ROWS_SHOWN else ""
        if len(blamed) == len(rows):
            return (
                f"{self}; all of its {len(rows)} rows give it ({named}): see to the learning rate "
                "and to the weights that the run began with"
            )
        if whole and len(blamed) == sum(len(alone[n]) for n in whole):
            return (
                f"{self}; all rows give it in process {', '.join(map(str, whole))}, and none in "
                "the others: see to that machine and its memory"
            )
        if blamed:
            return f"{self}; of its {len(rows)} rows these give it by themselves: {named}"
        return (
            f"{self}; none of its {len(rows)} rows gives it by itself ({named}): see to the "
            "learning rate, the clipping and the precision"
        )


class _Pending(NamedTuple):
    step: int
    flag: torch.Tensor
    copied: Any


class Guard:
    """Looks at every update before it is made.

    On a CPU the answer is there at once. A GPU works behind the host: it is told to skip the
    update by itself (the optimizer's `found_inf`, which PyTorch's gradient scaler uses as well),
    and the host asks one update later, when the answer is there without waiting for it. An
    optimizer that is not fused cannot be told, nor can one on MPS: then the host waits.
    """

    def __init__(self, *, process_count: int) -> None:
        self._process_count = process_count
        self._pending: _Pending | None = None

    def look(
        self,
        step: int,
        *,
        grad_norm: torch.Tensor | float | None,
        loss: torch.Tensor,
        optimizer: torch.optim.Optimizer,
        is_scaled: bool,
    ) -> None:
        """See that the update `step` can be made, or that the device will not make it.

        With fp16 (`is_scaled`) the gradient scaler skips what overflowed; only the loss counts.

        Raises:
            NonFinite: in all processes, if it is so in one of them.
        """
        self.settle()
        wrong = ~torch.isfinite(loss.detach())
        if not is_scaled and grad_norm is not None:  # DeepSpeed may have none
            norm = torch.as_tensor(grad_norm, device=wrong.device)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            wrong = wrong | ~torch.isfinite(norm)
        flag = wrong.float()
        if self._process_count > 1:
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        lags = flag.device.type == "cuda" and getattr(
            optimizer, "_step_supports_amp_scaling", False
        )
        if lags and not is_scaled:
            optimizer.found_inf = flag
        if lags:
            self._wait_later(step, flag)
        elif flag.item():
            raise NonFinite(step)

    def settle(self) -> None:
        """Wait for the answer that is still to come: nothing may be saved or logged before it.

        Raises:
            NonFinite: see `look`.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.copied.synchronize()
            if pending.flag.item():
                raise NonFinite(pending.step)

    def _wait_later(self, step: int, flag: torch.Tensor) -> None:
        host = torch.empty((), dtype=flag.dtype, pin_memory=True)
        host.copy_(flag.reshape(()), non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._pending = _Pending(step, host, copied)


def wrong_rows(model: torch.nn.Module, batches: dict[int, dict[str, Any]]) -> list[int]:
    """Return those rows (by number, each a batch of one) whose loss alone is not finite."""
    with torch.no_grad():
        return [
            row for row, batch in batches.items() if not math.isfinite(model(**batch).loss.item())
        ]
