"""What a model says of batches of tokens: nats and hits of each predicted one, summed by document.

The head's logits are made only for what is predicted, and turned into losses a few tokens at a
time. Cross-entropy of a token is fp32, every sum fp64.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import GPT2LMHeadModel

from pipeline.blocks import NO_LABEL
from pipeline.held_out import HeldOutBatches
from pipeline.linear_cross_entropy import chunk_rows
from pipeline.perplexity import Score
from pipeline.processes import Processes
from pipeline.sharding import is_divided

# Of a batch, what the model does not take.
NOT_INPUTS = ("labels", "documents")


class Sums:
    """Sums by document, which grow as documents come; see `Score` for their meaning."""

    def __init__(self) -> None:
        self.nats, self.tokens, self.correct = np.zeros(0), np.zeros(0, int), np.zeros(0, int)

    def add(self, documents: np.ndarray, nats: np.ndarray, correct: np.ndarray) -> None:
        """Count tokens [n] of these documents, with their nats and hits."""
        if not len(documents):
            return
        first, end = int(documents.min()), int(documents.max()) + 1
        self.resize(max(end, len(self.nats)))
        place, here = documents - first, slice(first, end)
        self.nats[here] += np.bincount(place, nats)
        self.tokens[here] += np.bincount(place)
        self.correct[here] += np.bincount(place[correct], minlength=end - first)

    def resize(self, count: int) -> None:
        """Make room for `count` documents."""
        missing = count - len(self.nats)
        if missing > 0:
            # Twice as much, so that a million documents are not a million copies.
            grown = max(missing, len(self.nats))
            self.nats, self.tokens, self.correct = (
                np.append(field, np.zeros(grown, field.dtype))
                for field in (self.nats, self.tokens, self.correct)
            )

    def together(self, processes: Processes | None, *, documents: int) -> "Sums":
        """Return the sums of all processes over the first `documents`."""
        self.resize(documents)
        fields = [f[:documents] for f in (self.nats, self.tokens, self.correct)]
        all_ = [fields] if processes is None else processes.gathered(fields)
        total = Sums()
        total.nats, total.tokens, total.correct = (sum(parts) for parts in zip(*all_, strict=True))
        return total


class TokenScores(NamedTuple):
    """Of each predicted token, [tokens]."""

    documents: np.ndarray
    nats: np.ndarray
    correct: np.ndarray


def sum_scores(
    model: torch.nn.Module,
    batches: Iterable[dict[str, torch.Tensor]],
    *,
    device: torch.device | str,
    after_batch: Callable[[], None] = lambda: None,
) -> Sums:
    """Return the sums over all labels in `batches`, as `Rows` hands them out.

    The label of position t is predicted from the positions before t; labels of -100 and those at
    position 0 are not scored. Without "documents" in a batch all belong to document 0.
    """
    sums = Sums()
    for scores in token_scores(model, batches, device=device):
        sums.add(*scores)
        after_batch()
    return sums


@torch.no_grad()
def token_scores(
    model: torch.nn.Module,
    batches: Iterable[dict[str, torch.Tensor]],
    *,
    device: torch.device | str,
) -> Iterator[TokenScores]:
    """Yield the scores of each batch's labels; the model is left in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            targets = batch["labels"][:, 1:]
            wanted = targets != NO_LABEL
            inputs = {n: v.to(device) for n, v in batch.items() if n not in NOT_INPUTS}
            logits = _logits(model, inputs, wanted.to(device))
            nats, correct = _of_logits(logits, targets[wanted].to(device), model.config.vocab_size)
            documents = batch.get("documents")
            if documents is None:
                documents = torch.zeros_like(batch["labels"])
            yield TokenScores(
                documents[:, 1:][wanted].numpy(),
                nats.cpu().double().numpy(),  # MPS has no fp64
                correct.cpu().numpy(),
            )
    finally:
        model.train(was_training)


def score_rows(
    model: torch.nn.Module,
    batches: HeldOutBatches,
    processes: Processes | None = None,
    *,
    device: torch.device | str,
    after_batch: Callable[[], None] = lambda: None,
) -> Score:
    """Return the score of held-out rows as one document; all processes get the same number."""
    sums = sum_scores(model, batches, device=device, after_batch=after_batch)
    found = np.array([sums.nats.sum(), sums.correct.sum()])
    nats, correct = found if processes is None else sum(processes.gathered(found))
    rows = batches.dataset
    counts = (rows.scored_tokens, int(correct), rows.scored_bytes, 0)
    return Score(np.array([nats]), *(np.array([count]) for count in counts))


def _logits(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], wanted: torch.Tensor
) -> Callable[[int, int], torch.Tensor]:
    """Return what makes the logits of a range of the `wanted` positions, bool [batch, block - 1].

    A GPT-2's head is applied to those alone; whole logits would take 200 kB a token at GPT-2's
    vocabulary. A head that is sharded, or another architecture's, is the model's own business.
    """
    if isinstance(model, GPT2LMHeadModel) and not is_divided(model):
        hidden = model.transformer(**inputs, use_cache=False).last_hidden_state[:, :-1][wanted]
        return lambda start, end: model.lm_head(hidden[start:end])
    logits = model(**inputs, use_cache=False).logits[:, :-1][wanted]
    return lambda start, end: logits[start:end]


def _of_logits(
    logits: Callable[[int, int], torch.Tensor], targets: torch.Tensor, vocabulary: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the nats, fp32 [n], and hits, bool [n], of predicting `targets` [n]."""
    nats = torch.empty(len(targets), device=targets.device)
    correct = torch.empty(len(targets), dtype=torch.bool, device=targets.device)
    step = chunk_rows(vocabulary, targets.device.type)
    for start in range(0, len(targets), step):
        here = slice(start, start + step)
        wanted, chunk = targets[here], logits(start, start + step).float()
        nats[here] = F.cross_entropy(chunk, wanted, reduction="none")
        hit = chunk.gather(1, wanted[:, None])[:, 0] >= chunk.amax(-1)
        # Of equally likely tokens the first one counts, as for argmax, which is six times as slow.
        hit[hit.clone()] = chunk[hit].argmax(-1) == wanted[hit]
        correct[here] = hit
    return nats, correct
