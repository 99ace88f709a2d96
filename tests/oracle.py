"""What a model needs for texts, computed plainly: fp64, one window of one text at a time.

Nothing of `pipeline` is used here.
"""

import copy
import math

import torch


def ids_of(text, tokenizer) -> list[int]:
    """Return the ids of a text in which <|endoftext|> is ordinary text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def stream_of(texts, tokenizer) -> list[int]:
    """Return the ids of texts laid end to end, end-of-text after each that is not empty."""
    return [i for t in texts if t for i in [*ids_of(t, tokenizer), tokenizer.eos_token_id]]


def in_fp64(model):
    """Return a copy that computes in fp64."""
    return copy.deepcopy(model).double().eval()


def scores(model, sequence, block_size, stride, first=1):
    """Return {place: (nats, hit)} of a sequence's tokens from `first` on.

    Windows of `block_size` tokens begin every `stride` tokens; what none before it scored, a
    window scores, but never its own first token.
    """
    found = {}
    for start in range(0, max(1, len(sequence)), stride):
        window = sequence[start : start + block_size]
        if len(window) < 2:
            break
        with torch.no_grad():
            logs = model(torch.tensor([window])).logits[0].log_softmax(-1)
        for column in range(1, len(window)):
            place = start + column
            if place >= first and place not in found:
                row = logs[column - 1]
                hit = row.argmax().item() == sequence[place]
                found[place] = -row[sequence[place]].item(), hit
        if start + block_size >= len(sequence):
            break
    return found


def by_text(model, texts, tokenizer, block_size, stride, *, start=True, end=False):
    """Return for each text by itself its list of (nats, hit)."""
    model, eos = in_fp64(model), [tokenizer.eos_token_id]
    found = []
    for text in texts:
        ids = ids_of(text, tokenizer)
        sequence = eos * start + ids + eos * (end and len(ids) > 0)
        found.append(list(scores(model, sequence, block_size, stride).values()))
    return found


def joined(model, texts, tokenizer, block_size, stride):
    """Return the list of (nats, hit) of each text of a stream, its end-of-text included."""
    stream = stream_of(texts, tokenizer)
    found = scores(in_fp64(model), stream, block_size, stride)
    each, place = [], 0
    for text in texts:
        length = len(stream_of([text], tokenizer))
        each.append([found[p] for p in range(place, place + length) if p in found])
        place += length
    return each


def numbers(each, texts):
    """Return the corpus's numbers; the texts' first tokens must have been scored."""
    nats = math.fsum(n for text in each for n, _ in text)
    tokens = sum(map(len, each))
    size = sum(len(t.encode()) for t in texts)
    own = [math.exp(math.fsum(n for n, _ in text) / len(text)) for text in each if text]
    return {
        "perplexity": math.exp(nats / tokens),
        "mean_perplexity": sum(own) / len(own),
        "nats_per_token": nats / tokens,
        "bits_per_byte": nats / math.log(2) / size,
        "word_perplexity": math.exp(nats / sum(len(t.split()) for t in texts)),
        "accuracy": sum(hit for text in each for _, hit in text) / tokens,
    }
