"""Text that a model writes: each text drawn by a generator of its own, many together.

What is drawn for a text depends on its seed, its prompt and the model's probabilities, not on what
is written beside it. In a batch those differ from those alone by rounding (1e-6 of a logit in
fp32), so the text is the same unless a draw falls within that of a boundary.
"""

import hashlib
import inspect
from collections.abc import Iterator

import numpy as np
import torch
from transformers import DynamicCache, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from pipeline.prompts import context_ids, fitted
from pipeline.sections import SamplingFields

# transformers renamed the argument in 5.2x; under its old name it warns at each call.
_PARAMETERS = inspect.signature(GPT2LMHeadModel.forward).parameters
CACHE = "cache" if "cache" in _PARAMETERS else "past_key_values"


def continuation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
) -> str:
    """Return what the model writes after `prompt`; the global random state is left as it was.

    A temperature of 0 takes the likeliest token each time. An empty prompt starts a new document.
    Beyond the model's positions the text goes on from the last half of them.

    Raises:
        RuntimeError: the model's logits are not finite.
    """
    sampling = SamplingFields(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        repetition_penalty=repetition_penalty, seed=seed,
    )  # fmt: skip
    ids = fitted(
        context_ids(prompt, tokenizer),
        positions=model.config.max_position_embeddings, max_new_tokens=max_new_tokens,
    )  # fmt: skip
    ends = end_ids(model, tokenizer)
    written = [new for [new] in new_ids(model, [ids], [seed], sampling, ends)]
    return tokenizer.decode(written, skip_special_tokens=True)


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids that end a text: the tokenizer's, and those the model was saved with."""
    own = getattr(model.generation_config, "eos_token_id", None)
    own = own if isinstance(own, list) else [own]
    return {tokenizer.eos_token_id, *own} - {None}


@torch.no_grad()
def new_ids(
    model: PreTrainedModel,
    contexts: list[list[int]],
    seeds: list[int],
    sampling: SamplingFields,
    ends: set[int],
) -> Iterator[list[int | None]]:
    """Yield, token by token, the next id of each context, None for those that have ended.

    A context that fills the model's positions is cut to the last half of them, for itself: the
    batch is then read anew.

    Args:
        contexts: ids, at least one each and at most as many as the model has positions.
        seeds: one for each context, instead of `sampling.seed`.
        ends: ids after which a text has ended; they are yielded, too.

    Raises:
        RuntimeError: the model's logits are not finite.
    """
    positions = model.config.max_position_embeddings
    contexts = [list(context) for context in contexts]
    sources = [_source(seed, context) for seed, context in zip(seeds, contexts, strict=True)]
    rows = list(range(len(contexts)))
    was_training, batch = model.training, None
    model.eval()
    try:
        for _ in range(sampling.max_new_tokens):
            full = [row for row in rows if len(contexts[row]) >= positions]
            for row in full:
                contexts[row] = contexts[row][-max(1, positions // 2) :]
            if batch is None or full:
                batch = _Batch(model, [contexts[row] for row in rows])
            scores = batch.scores()
            if sampling.repetition_penalty != 1:
                scores = penalised(scores, batch.seen, sampling.repetition_penalty)
            new = chosen(scores, [sources[row].random() for row in rows], sampling)
            following: list[int | None] = [None] * len(contexts)
            for row, number in zip(rows, new, strict=True):
                following[row] = number
                contexts[row].append(number)
            yield following
            places = [place for place, number in enumerate(new) if number not in ends]
            rows = [rows[place] for place in places]
            if not rows:
                return
            batch.extend(new, places)
    finally:
        model.train(was_training)


def penalised(scores: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Return logits [rows, vocabulary] with those of `seen` ids lower (Keskar et al. 2019, CTRL).

    Args:
        seen: ids that the text has already [rows, any number].
    """
    own = scores.gather(1, seen)
    return scores.scatter(1, seen, torch.where(own < 0, own * penalty, own / penalty))


def chosen(scores: torch.Tensor, draws: list[float], sampling: SamplingFields) -> list[int]:
    """Return one id for each row of logits [rows, vocabulary].

    Args:
        draws: a number in [0, 1) for each row: where in the row's probabilities, in the order of
            the ids, its id is.

    Raises:
        RuntimeError: the logits are not finite.
    """
    if not scores.amax(-1).isfinite().all():
        raise RuntimeError("the model's logits are not finite numbers")
    if sampling.temperature == 0:
        return scores.argmax(-1).tolist()
    ids, probabilities = candidates(scores, sampling)
    sums = probabilities.cumsum(-1)
    wanted = torch.tensor(draws, dtype=sums.dtype)[:, None] * sums[:, -1:]
    return ids.gather(1, torch.searchsorted(sums, wanted, right=True))[:, 0].tolist()


def candidates(scores: torch.Tensor, sampling: SamplingFields) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids [rows, candidates], rising, and their probabilities, in fp64 on the CPU.

    The CPU adds in the same order each time, which CUDA does not, and MPS has no fp64. As in
    transformers, top-k comes after the temperature, and top-p counts among what it leaves.
    """
    scores = scores.float() / sampling.temperature
    count = scores.shape[-1]
    if 0 < sampling.top_k < count:
        scores, ids = scores.topk(sampling.top_k)
        ids, order = ids.sort()  # two that are all but equal may change places, ids never do
        scores = scores.gather(1, order)
    else:
        ids = torch.arange(count).expand(len(scores), -1)
    ids, probabilities = ids.cpu(), scores.cpu().double().softmax(-1)
    if sampling.top_p < 1:
        rising, order = probabilities.sort()
        beyond = rising.cumsum(-1) <= 1 - sampling.top_p
        beyond[:, -1] = False  # the likeliest always stays
        probabilities = probabilities.masked_fill(beyond.scatter(1, order, beyond), 0)
    return ids, probabilities


class _Batch:
    """Contexts of several lengths, filled up on the left, and the model's cache of them.

    Attributes:
        seen: the ids of each row [rows, width]; what fills a row up is its own first id.
    """

    def __init__(self, model: PreTrainedModel, contexts: list[list[int]]) -> None:
        self._model, self._cache = model, DynamicCache(config=model.config)
        lengths = torch.tensor([len(context) for context in contexts], device=model.device)
        width = max(map(len, contexts))
        filled = [context[:1] * (width - len(context)) + context for context in contexts]
        self.seen = self._new = torch.tensor(filled, device=model.device)
        self._mask = (torch.arange(width, device=model.device) >= width - lengths[:, None]).long()
        self._is_filled = any(len(context) < width for context in contexts)
        has_mask = model.config._attn_implementation in ALL_MASK_ATTENTION_FUNCTIONS
        assert has_mask or not self._is_filled  # it would read what fills rows up

    def scores(self) -> torch.Tensor:
        """Return the logits [rows, vocabulary] of what follows, having read what is new."""
        filled = {}
        if self._is_filled:  # without it the model's own positions are right, and a kernel faster
            places = (self._mask.cumsum(-1) - 1).clamp(min=0)[:, -self._new.shape[1] :]
            filled = {"attention_mask": self._mask, "position_ids": places}
        output = self._model(
            self._new, use_cache=True, logits_to_keep=1, **{CACHE: self._cache}, **filled
        )
        return output.logits[:, -1]

    def extend(self, new: list[int], places: list[int]) -> None:
        """Go on with a new id in each row, and only with the rows at `places`."""
        self._new = torch.tensor(new, device=self._model.device)[:, None]
        self.seen = torch.cat([self.seen, self._new], 1)
        self._mask = torch.cat([self._mask, torch.ones_like(self._new)], 1)
        if len(places) < len(new):
            kept = torch.tensor(places, device=self._model.device)
            self._new, self.seen, self._mask = self._new[kept], self.seen[kept], self._mask[kept]
            self._cache.batch_select_indices(kept)


def _source(seed: int, context: list[int]) -> np.random.Generator:
    """Return the text's own source of draws, the same on every device."""
    prompt = hashlib.sha256(np.array(context, dtype="<i8").tobytes()).digest()
    return np.random.default_rng([seed, *np.frombuffer(prompt, dtype="<u4").tolist()])
