"""What keeping attention within documents costs: the same training step with and without.

python tests/benchmarks/boundaries.py

Rows of random ids in documents of random length; the model of recipes/quickstart.yaml and a larger
one, compiled, in bf16 where the processor has it; forward, backward and AdamW; arms interleaved,
median of the timed steps.
"""

import statistics
import time

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline import packing
from pipeline.blocks import Rows
from pipeline.model import build_model
from pipeline.recipe import ModelSection
from pipeline.row_file import RowFile

SHAPES = [  # layers, heads, width, block, rows, attention
    (4, 3, 192, 128, 16, "eager"),
    (4, 3, 192, 128, 16, "sdpa"),
    (4, 4, 256, 512, 4, "eager"),
    (4, 4, 256, 512, 4, "sdpa"),
]
WARM_UP, TIMED, MEAN_DOCUMENT = 4, 15, 100
VOCABULARY = 4096


def main() -> None:
    """Measure and print."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'shape':<40}{'across':>12}{'within':>12}{'cost':>9}   tokens/s")
    for layers, heads, width, block, rows, attention in SHAPES:
        steps = {
            across: step_of(layers, heads, width, block, rows, attention, across, device)
            for across in (True, False)
        }
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for number in range(WARM_UP + TIMED):
            for across, step in steps.items():
                started = time.perf_counter()
                step()
                if number >= WARM_UP:
                    seconds[across].append(time.perf_counter() - started)
        speed = {a: block * rows / statistics.median(s) for a, s in seconds.items()}
        name = f"{layers} x {width}, {rows} rows of {block}, {attention}"
        cost = speed[True] / speed[False] - 1
        print(f"{name:<40}{speed[True]:>12,.0f}{speed[False]:>12,.0f}{cost:>9.1%}")


def step_of(layers, heads, width, block, rows, attention, across, device):
    """Return a function that makes one update."""
    section = ModelSection(
        config={"n_layer": layers, "n_head": heads, "n_embd": width}, attn_implementation=attention
    )
    model = build_model(section, tokenizer(), block_size=block, seed=0, attend_across=across)
    model = model.to(device).train()
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=device == "cuda")
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    source = np.random.default_rng(0)
    lengths = source.geometric(1 / MEAN_DOCUMENT, 4000)
    ids = source.integers(1, VOCABULARY, int(lengths.sum())).astype(np.uint16)
    chunk = packing.Chunk(ids, np.cumsum(lengths) - lengths)
    file = RowFile(list(packing.windows([chunk], block, stride=block)))
    data = Rows(file, tokens=1, bytes=1, scored_tokens=1, scored_bytes=1, attend_across=across)
    places = iter(np.random.default_rng(1).permutation(len(data)).tolist() * 100)

    def step() -> None:
        batch = data.__getitems__([next(places) for _ in range(rows)])
        batch = {name: value.to(device) for name, value in batch.items()}
        with torch.autocast(device, torch.bfloat16):
            loss = compiled(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of the right size; it encodes nothing here."""
    names = ["<|endoftext|>", *(f"t{n}" for n in range(VOCABULARY - 1))]
    backend = Tokenizer(models.BPE({name: n for n, name in enumerate(names)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


if __name__ == "__main__":
    main()
