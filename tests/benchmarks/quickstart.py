"""Set a finished quickstart beside what general compressors need for the same held-out files.

python tests/benchmarks/quickstart.py outputs/quickstart

Prints bits per byte of the run, of xz -9 and of bz2 -9 on the validation files laid end to end, how
long each part of the preparation takes, and how long --help takes (median of five).
"""

import bz2
import json
import lzma
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pipeline.corpus import Corpus
from pipeline.preparation import prepare_blocks
from pipeline.recipe import read_recipe
from pipeline.tokenizer import obtain_tokenizer


def main(folder: Path) -> None:
    """Measure and print."""
    recipe = read_recipe(folder / "config.yaml")
    metrics = json.loads((folder / "metrics.json").read_text())
    with tempfile.TemporaryDirectory() as temporary:
        started = time.perf_counter()
        corpus = Corpus(recipe.data)
        tokenizer = obtain_tokenizer(recipe.tokenizer, corpus, Path(temporary) / "tokenizer")
        trained = time.perf_counter()
        prepare_blocks(recipe.data, corpus, tokenizer, Path(temporary) / "blocks")
        packed = time.perf_counter()
    held_out = "".join(corpus.texts("validation")).encode()
    manifest = json.loads((folder / "blocks" / "manifest.json").read_text())
    if manifest["made_from"]["corpus"] != corpus.identity:
        sys.exit("this interpreter's standard library is not the one that the run read")
    rows = {
        "this run": metrics["eval_bits_per_byte"],
        "xz -9": 8 * len(lzma.compress(held_out, preset=9)) / len(held_out),
        "bz2 -9": 8 * len(bz2.compress(held_out, 9)) / len(held_out),
    }
    print(f"{len(held_out):,} bytes of held-out files, bits per byte:")
    for name, bits in rows.items():
        print(f"  {name:<10}{bits:.4f}")
    print(f"corpus and tokenizer {trained - started:.1f} s, blocks {packed - trained:.1f} s")
    print(
        f"training {metrics['train_seconds']:.0f} s, {metrics['train_tokens_per_second']:,.0f} "
        f"tokens/s, {metrics['threads']} threads, {metrics['precision']}"
    )
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "pipeline/pretrain.py", "--help"], check=True, capture_output=True
        )
        seconds.append(time.perf_counter() - started)
    print(f"--help {statistics.median(seconds):.2f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
