"""A causal language model as `lm-eval` asks one: how likely is a text after another, and go on.

How texts are cut into tokens is `lm-eval`'s own (its HFLM), so that numbers compare with those in
the literature: no token is put before a text but before an empty context, where it is end-of-text.
Log-likelihoods are summed here: in fp32 and fp64, with logits for little more than what is asked.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm.auto import tqdm
from transformers import GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from pipeline.recipe import InputError

# What lm-eval generates at most where a task does not say (lm_eval.defaults).
DEFAULT_NEW_TOKENS = 256


def new_tokens(settings: dict[str, Any]) -> int:
    """Return the tokens that a task lets a model write at most; lm-eval knows four names of it."""
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    given = (settings[name] for name in names if settings.get(name) is not None)
    return int(next(given, DEFAULT_NEW_TOKENS))


class TaskModel(HFLM):
    """A loaded model, in evaluation mode from here on.

    Attributes:
        cut: texts of which the beginning was left out, because they are longer than the model's
            positions.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        batch_size: int,
        after_batch: Callable[[], None],
    ) -> None:
        """Ask `model` for a task, so many texts in one forward pass."""
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.cut = 0
        self._name, self._after_batch = name, after_batch
        self._bar: tqdm | None = None

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether it is the likeliest."""
        return super().loglikelihood(requests, disable_tqdm=True)  # the bar is ours

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of whole texts, in windows that overlap by one token."""
        windows, counts = [], []
        for request in requests:
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own = [(None, *make_disjoint_window(window)) for window in cut]
            windows += own
            counts.append(len(own))
        found = iter(self._loglikelihood_tokens(windows))
        return [sum(next(found)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after each context, up to a stop sequence.

        Raises:
            InputError: the task lets a model write more tokens than this one has positions.
        """
        for request in requests:
            length = new_tokens(request.args[1])
            if length >= self.max_length:
                raise InputError(too_long(self._name, length, self.max_length))
            self.cut += len(self.tok_encode(request.args[0])) > self.max_length - length
        size = self.batch_size_per_gpu
        if self.model.config._attn_implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
            self.batch_size_per_gpu = 1  # without a mask it would read what fills shorter contexts
        try:
            with self._progress(len(requests)):
                return super().generate_until(requests, disable_tqdm=True)
        finally:
            self.batch_size_per_gpu = size

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        before, ids = super()._encode_pair(context, continuation)
        return before or [self.prefix_token_id], ids  # a context of nothing but spaces has no token

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Sum each continuation's log-probabilities; requests that share their input share a row.

        What is longer than the positions loses its beginning; a continuation that alone is longer
        is summed in pieces, each after the half of the positions before it.
        """
        rows: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            ids, length = context + continuation, len(continuation)
            self.cut += len(ids) > self.max_length + 1
            size = length if length <= self.max_length else max(1, self.max_length // 2)
            for end in range(len(context) + size, len(ids) + size, size):
                start, end = end - size, min(end, len(ids))
                row = tuple(ids[max(0, end - self.max_length - 1) : end - 1])
                rows.setdefault(row, []).append((number, ids[start:end]))
        sums, greedy = [0.0] * len(requests), [True] * len(requests)
        order = sorted(rows, key=len, reverse=True)  # what does not fit into memory fails at once
        size = self.batch_size_per_gpu
        with self._progress(len(order)):
            for start in range(0, len(order), size):
                batch = [(row, rows[row]) for row in order[start : start + size]]
                for number, log_likelihood, is_greedy in self._scored(batch):
                    sums[number] += log_likelihood
                    greedy[number] &= is_greedy
                self._has_done(len(batch))
        return list(zip(sums, greedy, strict=True))

    @torch.no_grad()
    def _scored(
        self, batch: list[tuple[tuple[int, ...], list[tuple[int, list[int]]]]]
    ) -> list[tuple[int, float, bool]]:
        """Return request, log-likelihood and greediness of the last tokens of each row."""
        lengths = [len(row) for row, _ in batch]
        inputs = torch.zeros(len(batch), max(lengths), dtype=torch.long)
        for place, (row, _) in enumerate(batch):
            inputs[place, : len(row)] = torch.tensor(row)  # filled up behind: causal, so unseen
        first = min(len(row) - len(ids) for row, wanted in batch for _, ids in wanted)
        only = {}
        if isinstance(self.model, GPT2LMHeadModel):
            kept = torch.arange(first, max(lengths), device=self.device)
            only = {"logits_to_keep": kept, "use_cache": False}
        logits = self.model(inputs.to(self.device), **only).logits
        first = max(lengths) - logits.shape[1]
        found = []
        for place, (row, wanted) in enumerate(batch):
            for number, ids in wanted:
                end = len(row) - first
                here = logits[place, end - len(ids) : end].float()
                targets = torch.tensor(ids, device=self.device)
                nats = F.cross_entropy(here, targets, reduction="none").cpu().double().sum()
                found.append((number, -nats.item(), bool((here.argmax(-1) == targets).all())))
        return found

    def _model_generate(self, context: torch.Tensor, *given: Any, **settings: Any) -> torch.Tensor:
        """Generate as long as is asked: the model's own `max_new_tokens` would win over it."""
        config = self.model.generation_config
        kept, config.max_new_tokens = config.max_new_tokens, None
        try:
            return super()._model_generate(context, *given, **settings)
        finally:
            config.max_new_tokens = kept
            self._has_done(len(context))

    def _progress(self, total: int) -> tqdm:
        self._bar = tqdm(desc=self._name, total=total, delay=2, leave=False, disable=None)
        return self._bar

    def _has_done(self, count: int) -> None:
        self._bar.update(count)
        self._after_batch()


def too_long(name: str, length: int, positions: int) -> str:
    """Return the sentence for a task that makes a model write beyond its positions."""
    return (
        f"task {name}: lets the model write up to {length} tokens, and the model has {positions} "
        "positions for them and what stands before; leave the task out, or lower max_gen_toks in "
        "a task file of your own"
    )
