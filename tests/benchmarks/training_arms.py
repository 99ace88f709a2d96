"""The arms of training_speed.py: each is a process that makes a window of steps when it is told to.

What an arm imports, it imports in its own function: an arm's peak memory is its own.
"""

import contextlib
import ctypes
import dataclasses
import importlib.util
import os
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from pipeline.meters import peak_memory_bytes

LEARNING_RATE, MAX_NORM, STEPS_PER_LOG = 1e-3, 1.0, 10
LEVERS = ("loss path", "attention", "TanhGELU", "kept memory", "torch_compile", "determinism")
ON_CPU_ONLY = ("kept memory", "determinism")
ATTENTION_OPERATORS = ("attention", "attn", "flash", "fmha", "bmm", "softmax")


@dataclasses.dataclass(frozen=True)
class Job:
    """What an arm has to do; `kind` is a key of ARMS."""

    name: str
    kind: str
    folder: Path
    shape: dict[str, int]
    device: str
    precision: str
    threads: int
    settle: int
    """Steps at the beginning of each window that are not timed: memory and caches come back."""
    steps: int
    """Timed steps of a window."""
    total_steps: int
    levers: frozenset[str] = frozenset()
    compiled: bool = True
    nanogpt: Path | None = None
    own_cache: bool = True
    """Whether to find nothing that another arm has compiled: the first window shows what it takes.
    """

    def autocast(self) -> Any:
        """Return the context of the forward pass."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16")


class Windows:
    """Waits until the parent says go, counts and times steps, reports, and waits again.

    Attributes:
        losses: of each step, on the device.
        waiting: seconds spent on fetching batches, if the arm counts them.
    """

    def __init__(self, pipe: Connection, job: Job) -> None:
        self._pipe, self._job = pipe, job
        self._step = 0
        self.losses: list[torch.Tensor] = []
        self.waiting = 0.0
        self.peak_memory = 0

    def begin(self) -> bool:
        """Say that all is ready; return whether there is a window to make."""
        self._pipe.send({"ready": True})
        return self._wait()

    def after_step(self, loss: torch.Tensor | None = None) -> bool:
        """Count a step, at the end of a window wait; return whether there is another."""
        if loss is not None:
            self.losses.append(loss.detach())
        self._step += 1
        if self._step == self._job.settle:
            self._start_timing()
        if self._step < self._job.settle + self._job.steps:
            return True
        self._synchronise()
        now = time.perf_counter()
        self._pipe.send(
            {
                "seconds": now - self._started,
                "whole_seconds": now - self._gone,
                "waiting": self.waiting - self._waited,
            }
        )
        self._give_back()
        return self._wait()

    def _wait(self) -> bool:
        if self._pipe.recv() == "end":
            self.peak_memory = peak_memory_bytes(torch.device(self._job.device))
            return False
        self._step, self._gone = 0, time.perf_counter()
        self._start_timing()
        return True

    def _start_timing(self) -> None:
        self._synchronise()
        self._started, self._waited = time.perf_counter(), self.waiting

    def _synchronise(self) -> None:
        if self._job.device == "cuda":
            torch.cuda.synchronize()

    def _give_back(self) -> None:
        """Leave to the other arms what is free: all of them have to fit into the memory."""
        if self._job.device == "cuda":
            torch.cuda.empty_cache()
        else:
            with contextlib.suppress(AttributeError, OSError):  # another C library than glibc
                ctypes.CDLL(None).malloc_trim(0)


def work(pipe: Connection, job: Job, log: Path) -> None:
    """Be an arm, from its first message ("ready") to its last (what it found)."""
    with log.open("wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    cache = log.with_suffix(".compiled") if job.own_cache else job.folder / "compiled"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    if job.device == "cpu":
        torch.set_num_threads(job.threads)
    windows = Windows(pipe, job)
    try:
        found = ARMS[job.kind](job, windows) or {}
        losses = torch.stack(windows.losses).float().tolist() if windows.losses else []
        pipe.send(
            {
                "losses": losses,
                "peak_memory": windows.peak_memory,
                "threads": torch.get_num_threads(),
                **found,
            }
        )
    except BaseException as error:
        traceback.print_exc()
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        with contextlib.suppress(OSError):  # the parent may be gone
            pipe.send({"error": f"{type(error).__name__}: {said}"[:300]})


def nanogpt_arm(job: Job, windows: Windows) -> None:
    """NanoGPT's model, from a checkout, in the order of its train.py."""
    specification = importlib.util.spec_from_file_location("nanogpt", job.nanogpt / "model.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["nanogpt"] = module  # its dataclass looks itself up there
    specification.loader.exec_module(module)
    shape = job.shape
    model = module.GPT(
        module.GPTConfig(
            block_size=shape["block"], vocab_size=shape["vocabulary"], n_layer=shape["layers"],
            n_head=shape["heads"], n_embd=shape["width"], dropout=0.0, bias=True,
        )
    )  # fmt: skip
    with torch.no_grad():
        own = model.state_dict()
        for name, value in _weights(job).items():
            # GPT-2's Conv1D keeps [inputs, outputs], a Linear [outputs, inputs].
            is_product = name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
            own[name].copy_(value.t() if is_product else value)
    model.to(job.device)
    called = torch.compile(model) if job.compiled else model

    def loss_of(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return called(ids, targets)[1]

    # Its targets are shifted by the data; -1 is what its loss leaves out.
    ids = _ids(job)
    targets = ids.roll(-1, dims=1)
    targets[:, -1] = -1
    _train(job, windows, model, loss_of, [ids, targets])


def loop_arm(job: Job, windows: Windows) -> dict[str, Any]:
    """A plain loop over our model, without those levers that the job does not name."""
    from transformers.activations import ACT2FN

    from pipeline import attention, machine
    from pipeline.model import build_model
    from pipeline.sections import ModelSection
    from pipeline.tokenizer import load_tokenizer

    if job.device == "cpu":
        _prepare_cpu(job, machine)
    fastest = attention.fastest(
        block_size=job.shape["block"], attend_across=True, on_cpu=job.device == "cpu"
    )
    sizes = {n: job.shape[k] for n, k in (("n_layer", "layers"), ("n_head", "heads"))}
    section = ModelSection(
        config={**sizes, "n_embd": job.shape["width"]},
        attn_implementation=fastest if "attention" in job.levers else "sdpa",
    )
    tokenizer = load_tokenizer(str(job.folder / "tokenizer"))
    model = build_model(section, tokenizer, block_size=job.shape["block"], seed=0)
    model.config.use_cache = False  # as Trainer has it
    if "loss path" not in job.levers:
        del model.forward  # the stock one comes back
    if "TanhGELU" not in job.levers:
        for block in model.transformer.h:
            block.mlp.act = ACT2FN["gelu_new"]
    load_weights(model, job)
    called = model.to(job.device).train()
    if "torch_compile" in job.levers:  # as PretrainingTrainer compiles
        called = torch.compile(model, fullgraph=job.levers == frozenset(LEVERS), dynamic=False)

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        return called(input_ids=ids, labels=ids).loss

    _train(job, windows, model, loss_of, [_ids(job)])
    return {"attention": _attention_operators(job, loss_of)} if job.name == "bare loop" else {}


def stock_arm(job: Job, windows: Windows) -> None:
    """Transformers' Trainer."""
    from training_trainers import train_stock

    train_stock(job, windows)


def our_arm(job: Job, windows: Windows) -> None:
    """Our trainer."""
    from training_trainers import train_ours

    train_ours(job, windows)


ARMS: dict[str, Callable[[Job, Windows], dict[str, Any] | None]] = {
    "nanoGPT": nanogpt_arm,
    "loop": loop_arm,
    "stock": stock_arm,
    "ours": our_arm,
}


def _train(
    job: Job,
    windows: Windows,
    model: torch.nn.Module,
    loss_of: Callable[..., torch.Tensor],
    tensors: list[torch.Tensor],
) -> None:
    """Make step after step as nanoGPT's train.py does, for as long as the parent wants more."""
    if job.device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as nanoGPT and a compiled Trainer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.999), weight_decay=0.0, fused=True
    )
    size, place = job.shape["batch"], 0
    batch = [tensor[:size] for tensor in tensors]
    goes_on = windows.begin()
    while goes_on:
        with job.autocast():
            loss = loss_of(*batch)
        place += 1
        batch = [tensor[place * size : (place + 1) * size] for tensor in tensors]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if place % STEPS_PER_LOG == 0:
            loss.item()  # the Trainers and nanoGPT log it, and a GPU has to be waited for
        goes_on = windows.after_step(loss)


def _prepare_cpu(job: Job, machine: Any) -> None:
    """Apply the levers that machine.prepare_cpu pulls together, each by itself."""
    if "kept memory" in job.levers:
        machine.prepare_cpu()
        torch.set_num_threads(job.threads)
    torch.use_deterministic_algorithms("determinism" in job.levers)
    torch.utils.deterministic.fill_uninitialized_memory = False


def _weights(job: Job) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file
    from training_inputs import WEIGHTS

    return load_file(job.folder / WEIGHTS)


def load_weights(model: torch.nn.Module, job: Job) -> None:
    """Give a GPT2LMHeadModel the weights that all arms begin with."""
    found = model.load_state_dict(_weights(job), strict=False)
    assert found.missing_keys == ["lm_head.weight"] and not found.unexpected_keys, found


def _ids(job: Job) -> torch.Tensor:
    import numpy as np
    from training_inputs import IN_ORDER

    return torch.from_numpy(np.load(job.folder / IN_ORDER).astype(np.int64)).to(job.device)


def _attention_operators(job: Job, loss_of: Callable[..., torch.Tensor]) -> list[str]:
    """Return which operators and kernels a step consists of, those of attention."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if job.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    try:
        with torch.profiler.profile(activities=activities) as profile:
            with job.autocast():
                loss = loss_of(_ids(job)[: job.shape["batch"]])
            loss.backward()
            if job.device == "cuda":
                torch.cuda.synchronize()
        names = {event.key for event in profile.key_averages()}
    except Exception as error:  # a profiler without access to the GPU's counters costs no result
        return [f"not found out: {type(error).__name__}"]
    return sorted({n[:90] for n in names if any(part in n.lower() for part in ATTENTION_OPERATORS)})
