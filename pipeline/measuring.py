"""A model and texts to numbers: perplexity, bits per byte, accuracy, their intervals and counts."""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.attention import check_documents_are_apart
from pipeline.conventions import DETOKENIZERS
from pipeline.model import load_model
from pipeline.perplexity import LAST_WORD_MEASURES, MEASURES, Score, perplexity
from pipeline.processes import Processes
from pipeline.recipe import InputError
from pipeline.scoring import sum_scores
from pipeline.text_pieces import WindowOptions
from pipeline.tokenizer import check_tokenizer, load_tokenizer
from pipeline.windows import TextBatches

logger = logging.getLogger(__name__)

# Rows by which a model's vocabulary may be larger than the tokenizer's: it is padded to multiples
# of 64 or 128 for speed (nanoGPT 50,304 for 50,257).
PADDED_TO = 128
# Window of a model with more positions, unless one is asked for: whole logits of more tokens of a
# large vocabulary take gigabytes.
LONGEST_BY_ITSELF = 4096


class Measured(NamedTuple):
    """What a model needs for texts."""

    score: Score
    truncated: int
    """See `TextPieces`."""
    target: str

    def numbers(self) -> dict[str, Any]:
        """Return every number by name, with intervals and counts; see the metric's own page."""
        score = self.score
        scored = score.tokens > 0
        names = LAST_WORD_MEASURES if self.target == "last_word" else MEASURES
        found: dict[str, Any] = score.measures(names)
        return found | {
            "perplexities": [
                perplexity(nats / tokens) if tokens else None
                for nats, tokens in zip(score.nats.tolist(), score.tokens.tolist(), strict=True)
            ],
            "confidence_intervals": score.intervals(names),
            "tokens": int(score.tokens.sum()),
            "bytes": int(score.bytes.sum()),
            "words": int(score.words.sum()),
            "bytes_per_token": float(score.bytes.sum() / score.tokens.sum()),
            "documents": int(scored.sum()),
            "nothing_to_predict": int((~scored).sum()),
            "truncated": self.truncated,
        }


def measure_texts(
    texts: Iterable[str | Iterator[str]],
    model: PreTrainedModel | str,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    *,
    block_size: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    joined: bool = False,
    add_start_token: bool | None = None,
    add_end_token: bool = False,
    packed: bool = False,
    max_length: int | None = None,
    target: Literal["all", "last_word", "completion"] = "all",
    detokenize: str | None = None,
    device: str | None = None,
    processes: Processes | None = None,
    bytes_to_read: int | None = None,
) -> Measured:
    """Score texts, every token once, in fp32 sums that no batch size or process count changes.

    Args:
        texts: each whole, or in pieces that tokenise as the whole does.
        model: loaded, or a folder or Hub name.
        tokenizer: its tokenizer (default: what lies beside the model).
        block_size: tokens in a window, by default the model's positions.
        stride: tokens from the start of one window to that of the next (default and at most
            block_size - 1); the smaller, the more context and the slower.
        batch_size: windows in one forward pass; of shorter ones as many as have as many tokens.
        joined: lay the texts end to end, end-of-text after each, as held-out text is in training;
            else each is by itself.
        add_start_token: each by itself: end-of-text stands before every text, so that its first
            token is predicted, too (default: unless the model was trained without such a context,
            `attend_across: false` in its config).
        add_end_token: each by itself: the end-of-text after every text is predicted, too.
        packed: windows share rows instead of being filled up; the same numbers (GPT-2 only).
        max_length: tokens of a text, the start token included, after which the rest is left out.
        target: "all" tokens, those of the "last_word" of each text (LAMBADA), or the "completion"
            of each, where every text is a `completions.Example`.
        detokenize: a name of `conventions.DETOKENIZERS`.
        processes: which divide the work, all called with the same texts (default: none do).
        bytes_to_read: of all texts, for the progress bar.

    Raises:
        InputError: nothing to predict, options that contradict each other or the model, a model
            and a tokenizer that are missing or do not belong together, a model whose probabilities
            are no numbers, or too little memory.
    """
    model, tokenizer = loaded(model, tokenizer, device)
    processes = processes or Processes.alone()
    options = _options(
        model, block_size=block_size, stride=stride, joined=joined, start_token=add_start_token,
        end_token=add_end_token, packed=packed, max_length=max_length, target=target,
        detokenize=detokenize,
    )  # fmt: skip
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size is {batch_size!r}: a forward pass takes at least one window")
    with tqdm(
        desc="scoring", total=bytes_to_read, unit="B", unit_scale=True, delay=2,
        disable=None if processes.is_main else True,
    ) as bar:  # fmt: skip
        batches = TextBatches(
            texts, tokenizer, options, batch_size=batch_size, rank=processes.rank,
            world_size=processes.count, after_read=bar.update,
        )  # fmt: skip
        try:
            sums = sum_scores(model, batches, device=model.device)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and "memory" not in str(error):
                raise
            raise InputError(
                f"batch_size {batch_size} x block_size {options.block_size}: so many tokens in one "
                "forward pass do not fit into memory; lower one of them"
            ) from None
    sums = sums.together(processes, documents=len(batches.pieces.bytes))
    if not sums.tokens.sum():
        raise InputError(_nothing(len(batches.pieces.bytes), options))
    if np.isnan(sums.nats).any():
        raise InputError(
            f"{model.config._name_or_path or 'model'}: its probabilities are not numbers (NaN); "
            "its weights are damaged, take an earlier checkpoint"
        )
    scored = sums.tokens > 0
    if (left := int((~scored).sum())) and processes.is_main:
        logger.warning(
            "%d of %d texts have no token to predict%s and are counted only",
            left, len(scored), _reason(options),
        )  # fmt: skip
    score = Score(
        sums.nats, sums.tokens, sums.correct,
        np.where(scored, batches.pieces.bytes, 0), np.where(scored, batches.pieces.words, 0),
    )  # fmt: skip
    return Measured(score, batches.pieces.truncated, target)


def loaded(
    model: PreTrainedModel | str,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    device: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model and its tokenizer, loaded where they were named.

    Raises:
        InputError: they are missing, or do not belong together.
    """
    if not isinstance(model, str) and not isinstance(model, PreTrainedModel):
        raise InputError(f"model is {model!r}: give a loaded model, a folder or a Hub name")
    home = model if isinstance(model, str) else model.config._name_or_path
    if tokenizer is None and not home:
        raise InputError(
            "this model does not say where its tokenizer is: give tokenizer, loaded or by name"
        )
    if isinstance(model, str):
        model = load_model(model)
    if tokenizer is None or isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer or home)
    else:
        check_tokenizer(tokenizer, "tokenizer")
        if home and (Path(home) / "tokenizer.json").exists():
            if load_tokenizer(home).get_vocab() != tokenizer.get_vocab():
                raise InputError(
                    f"the tokenizer is not the one in {home}, where the model is from: they do not "
                    "belong together"
                )
    if device is not None:
        try:
            model = model.to("cuda" if device == "gpu" else device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"device {device}: {str(error).splitlines()[0]}") from None
    entries, wanted = len(tokenizer), model.config.vocab_size
    if not entries <= wanted < entries + PADDED_TO:
        raise InputError(
            f"the tokenizer has {entries} entries and the model {wanted}: they do not belong "
            "together"
        )
    ends = tokenizer.eos_token_id, model.config.eos_token_id
    if isinstance(ends[1], int) and ends[0] != ends[1]:
        raise InputError(
            f"end-of-text is id {ends[0]} in the tokenizer and {ends[1]} in the model: they do not "
            "belong together"
        )
    if not isinstance(model, GPT2LMHeadModel):
        _check_causal(model)
    return model, tokenizer


@torch.no_grad()
def _check_causal(model: PreTrainedModel) -> None:
    """See that what comes later changes nothing: a masked language model has no perplexity."""
    was_training = model.training
    model.eval()
    ids = torch.tensor([[1, 2, 3], [1, 2, 4]], device=model.device) % model.config.vocab_size
    one, other = model(input_ids=ids).logits[:, 1].float()
    model.train(was_training)
    if not torch.allclose(one, other, atol=1e-3):
        raise InputError(
            f"model: a {model.config.model_type} sees the tokens after the one that it predicts; "
            "give a causal language model"
        )


def _options(
    model: PreTrainedModel,
    *,
    block_size: int | None,
    stride: int | None,
    joined: bool,
    start_token: bool | None,
    end_token: bool,
    packed: bool,
    max_length: int | None,
    target: str,
    detokenize: str | None,
) -> WindowOptions:
    """Check the options against each other and the model, and fill in what is not given."""
    given = {"block_size": block_size, "stride": stride, "max_length": max_length}
    for name, value in given.items():
        if value is not None and not isinstance(value, int):
            raise InputError(f"{name} is {value!r}: give a whole number of tokens")
    positions = getattr(model.config, "max_position_embeddings", None)
    if block_size is None:
        block_size = min(positions or LONGEST_BY_ITSELF, LONGEST_BY_ITSELF)
    if positions is not None and block_size > positions:
        raise InputError(f"block_size is {block_size}, but the model has {positions} positions")
    if block_size < 2:
        raise InputError(f"block_size is {block_size}: a window has a context and a token, so 2")
    stride_given = stride is not None
    if stride is None:
        stride = block_size - 1
    if not 1 <= stride < block_size:
        raise InputError(
            f"stride is {stride}: windows of {block_size} tokens begin every 1 to "
            f"{block_size - 1} tokens, since the first of each is context only"
        )
    if joined and (start_token is not None or end_token or packed or max_length is not None):
        raise InputError(
            "add_start_token, add_end_token, packed and max_length have a meaning for texts each "
            "by itself only; leave out joined"
        )
    if target not in ("all", "last_word", "completion"):
        raise InputError(f"target is {target!r}; it is all, last_word or completion")
    if target == "completion" and (
        joined or stride_given or start_token or end_token or max_length is not None or detokenize
    ):
        raise InputError(
            "completions are scored each by itself, after all of its prompt that fits, and with "
            "its end-of-text: leave out joined, stride, add_start_token, add_end_token, max_length "
            "and detokenize"
        )
    if target == "last_word" and (joined or end_token or max_length is not None):
        raise InputError(
            "target last_word is for texts each by itself, whole and without end-of-text: leave "
            "out joined, add_end_token and max_length"
        )
    if detokenize is not None and detokenize not in DETOKENIZERS:
        raise InputError(f"detokenize is {detokenize!r}; known: {', '.join(DETOKENIZERS)}")
    if max_length is not None and (max_length < 2 or detokenize):
        raise InputError(
            f"max_length is {max_length}: at least 2 tokens, and not together with detokenize"
        )
    if packed and not isinstance(model, GPT2LMHeadModel):
        raise InputError(
            f"packed is for GPT-2, which is known to keep texts in a row apart; this is a "
            f"{model.config.model_type}: leave it out"
        )
    apart = not getattr(model.config, "attend_across", True)
    if packed or joined and apart:
        check_documents_are_apart(model)
    return WindowOptions(
        block_size=block_size,
        stride=stride,
        joined=joined,
        apart=apart and joined,
        start_token=not joined
        and target != "completion"
        and (not apart if start_token is None else start_token),
        end_token=end_token,
        packed=packed,
        max_length=max_length,
        target=target,
        prepare=DETOKENIZERS[detokenize] if detokenize else None,
    )


def _reason(options: WindowOptions) -> str:
    if options.target == "completion":
        return " (their completion does not fit into the window)"
    if options.start_token or options.joined:
        return ""
    return " (their first one has no context without add_start_token)"


def _nothing(texts: int, options: WindowOptions) -> str:
    if not texts:
        return "there are no texts to score: the list is empty"
    if options.target == "completion":
        return (
            f"none of the {texts} completions fits into {options.block_size} tokens with a prompt"
        )
    what = f"the {texts} texts have" if texts > 1 else "the text has"
    return f"{what} no token to predict: give more than an empty text" + (
        "" if options.start_token else " or a single token, which has no context here"
    )
