"""What perplexity, bits per byte and held-out loss mean here, and how they are measured.

All three come from one sum: the nats (natural-log units) that the model needs for every predicted
token. They are added up in fp64 and divided once, by the tokens that were predicted or by the
UTF-8 bytes that those tokens stand for; no mean of batch means, no dependence on batch size.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import evaluate
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.blocks import NO_LABEL, HeldOutBatches, Rows
from pipeline.recipe import InputError


@dataclasses.dataclass(frozen=True)
class Score:
    """The sum over a text, and the numbers that follow from it."""

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats per predicted token."""
        return self.nats / self.tokens

    def as_metrics(self, prefix: str) -> dict[str, float]:
        """Return loss, perplexity, bits per byte and the counts under `<prefix>_...`."""
        return {
            f"{prefix}_loss": self.loss,
            f"{prefix}_perplexity": perplexity(self.loss),
            f"{prefix}_bits_per_byte": bits_per_byte(self.nats, self.bytes),
            f"{prefix}_tokens": self.tokens,
            f"{prefix}_bytes": self.bytes,
        }


def perplexity(loss: float) -> float:
    """Return exp(loss) for a loss in nats per token; infinity where a float cannot hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def bits_per_byte(nats: float, byte_count: float) -> float:
    """Return nats / ln 2 / bytes: comparable between tokenizers, unlike perplexity."""
    return nats / math.log(2) / byte_count


@torch.no_grad()
def sum_nats(
    model: torch.nn.Module,
    batches: Iterable[dict[str, torch.Tensor]],
    *,
    device: torch.device | str,
    after_batch: Callable[[], None] = lambda: None,
) -> float:
    """Return the nats of all labels in `batches`, as `Rows` hands them out.

    The label of position t is predicted from the positions before t; labels of -100 and those at
    position 0 are not scored. Cross-entropy per token is fp32, the sum fp64.
    """
    was_training = model.training
    model.eval()
    nats = 0.0
    try:
        for batch in batches:
            inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
            labels = batch["labels"].to(device)
            logits = model(**inputs, use_cache=False).logits
            losses = F.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(),
                labels[:, 1:].flatten(),
                ignore_index=NO_LABEL,
                reduction="none",
            )
            nats += losses.cpu().double().sum().item()  # MPS has no fp64
            after_batch()
    finally:
        model.train(was_training)
    return nats


def score_rows(model: torch.nn.Module, batches: HeldOutBatches, **options: Any) -> Score:
    """Return the score of a held-out split in one process; `options` as for `sum_nats`."""
    rows = batches.dataset
    nats = sum_nats(model, batches, **options)
    return Score(nats=nats, tokens=rows.scored_tokens, bytes=rows.scored_bytes)


def score_texts(
    texts: Iterable[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int | None = None,
    batch_size: int = 8,
) -> Score:
    """Return the score of texts laid end to end, every token after the first scored once.

    A model that was trained with `attend_across: false` says so in its config, and is then scored
    as it was trained: each text by itself, every token after its first.

    Raises:
        InputError: nothing to predict, a window beyond the model's positions, or a tokenizer with
            ids that the model lacks.
    """
    positions = model.config.max_position_embeddings
    if block_size is not None and block_size > positions:
        raise InputError(f"block_size is {block_size}, but the model has {positions} positions")
    if len(tokenizer) > model.config.vocab_size:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} entries and the model {model.config.vocab_size}: "
            "they do not belong together"
        )
    rows = Rows.held_out(
        texts,
        tokenizer,
        block_size=block_size or positions,
        attend_across=getattr(model.config, "attend_across", True),
    )
    batches = HeldOutBatches(rows, batch_size=batch_size)
    with tqdm(desc="scoring", total=len(batches), delay=2, disable=None) as bar:
        return score_rows(model, batches, device=model.device, after_batch=bar.update)


def load_metric() -> evaluate.Metric:
    """Return the package's own `evaluate` metric; loading it needs no network."""
    return evaluate.load(str(Path(__file__).parent / "metrics" / "token_perplexity"))


def check_target(path: str | None) -> None:
    """Check before the work that numbers can be written to `path` without harm.

    Raises:
        InputError: its folder cannot be written to, or it holds something other than JSON.
    """
    if path is None:
        return
    target = Path(path)
    if not os.access(target.parent, os.W_OK) or target.is_dir():
        raise InputError(f"--json {path}: cannot be written; give a file in a folder that can")
    if target.exists():
        try:
            json.loads(target.read_text())
        except ValueError:
            raise InputError(
                f"--json {path}: holds something other than JSON; name another"
            ) from None
