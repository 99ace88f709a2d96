"""Our metric beside `evaluate`'s own perplexity, on the same documents and model, in turns.

    git clone https://github.com/huggingface/evaluate ../evaluate
    python tests/benchmarks/perplexity_speed.py --old ../evaluate/metrics/perplexity

The documents are top-level definitions of this Python's standard library. Both metrics load the
model from its folder, cut a document at the model's positions, and have the start token before it.
Without --model a GPT-2 of the shape --shape with random weights is made. The other metric fails on
transformers 5 unless the tokenizer has a pad token (ours have one).
"""

import argparse
import statistics
import sysconfig
import tempfile
import time
from pathlib import Path

import evaluate
import torch

from pipeline.measuring import loaded
from pipeline.model import build_model
from pipeline.perplexity import load_metric
from pipeline.recipe import ModelSection
from pipeline.tokenizer import train_tokenizer


def definitions(count: int) -> list[str]:
    """Return `count` pieces of the standard library, taken evenly from all of it."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in root.glob("*.py"))
    pieces = [
        piece.strip("\n") + "\n"
        for path in files
        for piece in path.read_text(encoding="utf-8", errors="replace").split("\n\n\n")
        if piece.strip()
    ]
    return [pieces[n * len(pieces) // count] for n in range(count)]


def random_model(shape: str, folder: Path) -> None:
    """Write a GPT-2 of random weights, and a tokenizer for such texts."""
    layers, width, vocabulary, positions = map(int, shape.split("x"))
    tokenizer = train_tokenizer(definitions(10_000), vocab_size=vocabulary)
    config = {"n_layer": layers, "n_head": max(1, width // 64), "n_embd": width}
    section = ModelSection(config=config)
    build_model(section, tokenizer, block_size=positions, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Time both, in turns, and see that they say the same."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--old", required=True, help="folder of evaluate's perplexity metric")
    parser.add_argument("--model", help="folder of a model")
    parser.add_argument(
        "--shape", default="4x128x2048x128", help="layers x width x vocabulary x positions"
    )
    parser.add_argument("--documents", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    texts = definitions(options.documents)
    with tempfile.TemporaryDirectory() as made:
        folder = options.model or made
        if options.model is None:
            random_model(options.shape, Path(made))
        model, tokenizer = loaded(folder)
        positions = model.config.max_position_embeddings
        lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
        print(
            f"{len(texts)} documents of {min(lengths)} to {max(lengths)} tokens (median "
            f"{statistics.median(lengths):.0f}), {sum(min(n, positions) for n in lengths):,} "
            f"scored; {options.model or options.shape}; {torch.get_num_threads()} threads"
        )
        del model
        arms = {
            "evaluate's own": lambda: evaluate.load(options.old).compute(
                predictions=texts, model_id=folder, max_length=positions
            ),
            "ours": lambda: load_metric().compute(
                predictions=texts, model=folder, max_length=positions
            ),
        }
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(options.rounds):
            found = {}
            for name, arm in arms.items():
                started = time.perf_counter()
                found[name] = arm()
                seconds[name].append(time.perf_counter() - started)
            means = [numbers["mean_perplexity"] for numbers in found.values()]
            assert abs(means[0] / means[1] - 1) < 1e-4, means
            print("  ".join(f"{name} {times[-1]:.2f} s" for name, times in seconds.items()))
        old, new = (statistics.median(times) for times in seconds.values())
        print(f"both: mean perplexity {means[1]:.4f}; ours {old / new:.2f} times as fast (medians)")


if __name__ == "__main__":
    main()
