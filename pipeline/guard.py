"""Every update before it is made: of what is no number none is made, and its rows are named."""

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from pipeline.notices import Notices
from pipeline.symptoms import LEAST_LOSS_SPREAD, LEAST_NORM_SPREAD, enough

ROWS_SHOWN = 8


class NonFinite(Exception):
    """An update was not made, because its loss or gradient was infinite or not a number."""

    def __init__(self, step: int) -> None:
        """`step`: the update, counted from 1."""
        super().__init__(
            f"update {step} was not made: its loss or gradient is infinite or not a number"
        )
        self.step = step

    def symptom(self, rows: list[int], alone: list[list[int]]) -> str | None:
        """Return which of `symptoms.SYMPTOMS` it is; of a machine's fault none. See `described`."""
        if _whole(rows, alone) and sum(map(len, alone)) < len(rows):
            return None
        return "rows_not_finite" if 0 < sum(map(len, alone)) < len(rows) else "not_finite"

    def described(self, rows: list[int], alone: list[list[int]]) -> str:
        """Return the sentence that names the update's rows, or what else is to blame.

        Args:
            rows: those of the update.
            alone: of those that each process tried, the ones whose loss alone is not finite.
        """
        whole = _whole(rows, alone)
        blamed = sorted(sum(alone, []))
        named = ", ".join(map(str, (blamed or rows)[:ROWS_SHOWN]))
        named += ", ..." if len(blamed or rows) > ROWS_SHOWN else ""
        if len(blamed) == len(rows):
            return (
                f"{self}; all of its {len(rows)} rows give it ({named}): see to the learning rate "
                "and to the weights that the run began with"
            )
        if whole:
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


def _whole(rows: list[int], alone: list[list[int]]) -> list[int]:
    """Return the processes all of whose rows are to blame, if in the others none is."""
    count = len(alone)
    whole = [n for n, found in enumerate(alone) if len(found) == len(rows[n::count])]
    return whole if all(n in whole or not found for n, found in enumerate(alone)) else []


class _Pending(NamedTuple):
    step: int
    values: torch.Tensor
    copied: Any


class Guard:
    """Looks at every update before it is made.

    On a CPU the answer is there at once. A GPU works behind the host: it is told to skip the
    update by itself (the optimizer's `found_inf`, which PyTorch's gradient scaler uses as well),
    and the host asks one update later, when the answer is there without waiting for it. An
    optimizer that is not fused cannot be told, nor can one on MPS: then the host waits.
    """

    def __init__(self, *, process_count: int, notices: Notices | None = None) -> None:
        """Look; `notices` are told the loss and the norm of every update that is finite."""
        self._process_count, self._notices = process_count, notices
        self._pending: _Pending | None = None
        self._window: DeviceWindow | None = None

    def look(
        self,
        step: int,
        *,
        grad_norm: torch.Tensor | float | None,
        loss: torch.Tensor,
        optimizer: torch.optim.Optimizer,
        is_scaled: bool,
    ) -> None:
        """See that the update `step` can be made, or that it will not be made.

        With fp16 (`is_scaled`) the gradient scaler skips what overflowed; only the loss counts.

        Args:
            step: the update, counted from 1.
            grad_norm: before clipping.
            loss: this process's of the update; the mean of all processes is the update's.
            optimizer: whose gradients are dropped, or that is told not to use them.
            is_scaled: whether gradients are multiplied by a scale.

        Raises:
            NonFinite: in all processes, if it is so in one of them.
        """
        self.settle()
        loss = loss.detach()
        wrong, norm = ~torch.isfinite(loss), torch.full_like(loss, math.nan)
        if grad_norm is not None:  # DeepSpeed may have none
            norm = torch.as_tensor(grad_norm, device=loss.device)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            wrong = wrong if is_scaled else wrong | ~torch.isfinite(norm)
        values = torch.stack([v.float().reshape(()) for v in (wrong, loss, norm)])
        if self._process_count > 1:  # also so that all decide by the same numbers
            dist.all_reduce(values)
            values /= self._process_count
        lags = values.device.type == "cuda" and getattr(
            optimizer, "_step_supports_amp_scaling", False
        )
        if lags:
            self._wait_later(step, values if is_scaled else self._told(values, optimizer))
        elif self._said(step, values.tolist()):
            optimizer.zero_grad(set_to_none=True)  # without gradients it does nothing at all

    def settle(self) -> None:
        """Wait for the answer that is still to come: nothing may be saved or logged before it.

        Raises:
            NonFinite: see `look`.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.copied.synchronize()
            self._said(pending.step, pending.values.tolist())

    def _said(self, step: int, values: list[float]) -> bool:
        """Tell what was seen, and return whether the update must not be made."""
        wrong, loss, norm, *is_spike = values
        if wrong:
            raise NonFinite(step)
        if self._notices is None:
            return False
        decided = bool(is_spike[0]) if is_spike else None
        return self._notices.update(step, loss=loss, norm=norm, is_spike=decided)

    def _told(self, values: torch.Tensor, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        """Tell the device not to make an update that is no number, or a spike if so wished."""
        skip = values[:1] > 0
        if self._notices is not None and self._notices.section.skip_spikes:
            if self._window is None:
                self._window = DeviceWindow(self._notices, values.device)
            is_spike = self._window.is_spike(values[1:])
            skip, values = skip | is_spike, torch.cat([values, is_spike.float()])
        optimizer.found_inf = skip.float().reshape(())
        return values

    def _wait_later(self, step: int, values: torch.Tensor) -> None:
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._pending = _Pending(step, host, copied)


class DeviceWindow:
    """The losses and norms of the last updates where they are, so that nobody waits for them.

    Its rule is `symptoms.score`'s; how many updates it holds is known without looking.
    """

    def __init__(self, notices: Notices, device: torch.device) -> None:
        """Hold what `notices` have seen until now."""
        section, count = notices.section, min(len(notices.losses), len(notices.norms))
        past = [list(one)[len(one) - count :] for one in (notices.losses, notices.norms)]
        self._sigmas, self._count = section.spike_sigmas, count
        self._enough = enough(section.spike_window)
        self._values = torch.zeros(2, section.spike_window, device=device)
        self._values[:, :count] = torch.tensor(past, device=device)
        self._least = torch.tensor([LEAST_LOSS_SPREAD, LEAST_NORM_SPREAD], device=device)

    def is_spike(self, values: torch.Tensor) -> torch.Tensor:
        """Return whether loss and norm, [2], are a spike, [1], and hold them from now on."""
        size = self._values.shape[1]
        before = self._values[:, : min(self._count, size)]
        found = torch.zeros(1, dtype=torch.bool, device=values.device)
        if before.shape[1] >= self._enough:
            mean = before.mean(dim=1)
            deviation = (before - mean[:, None]).square().mean(dim=1).sqrt()
            spread = torch.maximum(deviation, self._least * mean.abs())
            found = (values - mean > self._sigmas * spread).any().reshape(1)
        self._values[:, self._count % size] = values
        self._count += 1
        return found


def wrong_rows(model: torch.nn.Module, batches: dict[int, dict[str, Any]]) -> list[int]:
    """Return those rows (by number, each a batch of one) whose loss alone is not finite."""
    with torch.no_grad():
        return [
            row for row, batch in batches.items() if not math.isfinite(model(**batch).loss.item())
        ]
