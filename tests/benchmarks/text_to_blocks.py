"""Set preparing rows beside the ecosystem's own way, on the installed packages' .py files.

python tests/benchmarks/text_to_blocks.py --tokenizer FOLDER

FOLDER holds GPT-2's vocab.json and merges.txt or any other tokenizer; without it one of 32,768
entries is trained first, untimed. Needs gigatoken, two free cores and 2 GB in TMPDIR (8 GB with
--memory_megabytes 2000); takes some minutes, with --megabytes 5 about one.

The baseline is what run_clm.py of transformers does to text files: load_dataset, map(tokenize),
map(group_texts), each in two processes. All arms read copies of the same files with the same
tokenizer, each as a process of its own from start to exit, on the same two cores, in turn. Printed
are the rates and the bytes that a token takes on disk, then encoding alone in one thread, reading
shuffled batches of 16 x 1,024, and the peak memory of prepare_data.py. Seconds are of the clock;
CPU seconds, over all processes, tell whether something else was running. The baseline reads a part
of the text, --baseline_megabytes 1000 all of it; the last arm reads that part too.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BLOCK_SIZE, BATCH_SIZE, CORES = 1024, 16, 2
FULL_RUN_MB, SAMPLE_MB, VOCAB_SIZE = 200, 20, 32_768
SECONDS_READING, SECONDS_BETWEEN_SAMPLES = 3.0, 0.05
GOLDEN_RATIO = (5**0.5 - 1) / 2
CHANGED = ("self", "return", "name", "value", "data")
LIBRARIES = ("tokenizers", "gigatoken", "datasets", "transformers", "torch")
# find_spec answers None for a module that stands as None in sys.modules, and importing it fails.
WITHOUT_FAST = 'import sys\n\nsys.modules["gigatoken"] = None\n'


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, help="folder (default: one is trained)")
    parser.add_argument("--megabytes", type=float, help="of text (default: all there is)")
    parser.add_argument(
        "--baseline_megabytes", type=float, default=40, help="of the same (%(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=1, help="of each arm (%(default)s)")
    parser.add_argument(
        "--memory_megabytes",
        type=float,
        default=0,
        help="at least so much for the peak memory: the text again and again, with changes",
    )
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(CHILDREN[options.child[0]](**json.loads(options.child[1]))))
        return
    if importlib.util.find_spec("gigatoken") is None:
        sys.exit("gigatoken is not installed: there is nothing to compare")
    if options.repeats < 1:
        sys.exit("--repeats must be at least 1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory(prefix="text_to_blocks-") as temporary:
        _measure(options, Path(temporary))


def _measure(options: argparse.Namespace, temporary: Path) -> None:
    cores = _restrict(CORES)
    files = _copy_packages(temporary / "text", options.megabytes)
    subset = _linked(_spread(files, options.baseline_megabytes), temporary / "subset")
    sample = _spread(files, SAMPLE_MB)
    tokenizer, entries = _tokenizer(options.tokenizer, sample, temporary / "tokenizer")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    print(f"{_size(files):.1f} MB in {len(files):,} .py files; {entries:,} entries; {cores} cores")
    print(f"Python {sys.version.split()[0]}, {versions}")
    if _size(files) < FULL_RUN_MB:
        print(f"less than {FULL_RUN_MB} MB: this is not a full run, start-up weighs too much")
    stub = temporary / "stub"
    stub.mkdir()
    (stub / "sitecustomize.py").write_text(WITHOUT_FAST)

    arms = _compare(options.repeats, temporary, files, subset, tokenizer, stub)
    baseline, full = arms["run_clm"], arms["ours, gigatoken"]
    print(
        f"\n{'arm':<28}{'MB':>8}{'seconds':>9}{'CPU s':>8}{'MB/s':>8}{'x baseline':>12}"
        f"{'bytes/token':>13}"
    )
    rate = baseline["megabytes"] / statistics.median(baseline["seconds"])
    for name, arm in arms.items():
        seconds = statistics.median(arm["seconds"])
        own = arm["megabytes"] / seconds
        print(
            f"{name:<28}{arm['megabytes']:>8.1f}{seconds:>9.2f}{statistics.median(arm['cpu_seconds']):>8.1f}"
            f"{own:>8.2f}{own / rate:>12.1f}{arm['bytes_per_token']:>13.2f}"
        )
    if options.repeats > 1:
        print("medians of:")
        for name, arm in arms.items():
            print(f"  {name:<26}" + "".join(f"{second:>9.2f}" for second in arm["seconds"]))
    phases = baseline["phases"]
    print(
        f"the baseline reads {baseline['megabytes']:.1f} MB of these files, spread evenly: beyond "
        "its start its\nrate hardly depends on the size. "
        f"Imports {phases['imports']:.1f} s, load_dataset {phases['load']:.1f}, tokenize "
        f"{phases['tokenize']:.1f}, group_texts {phases['group']:.1f};\nwithout the imports "
        f"{baseline['megabytes'] / sum(list(phases.values())[1:]):.2f} MB/s. Its "
        "caches of text and of ungrouped ids included: "
        f"{baseline['all_bytes_per_token']:.1f} bytes/token"
    )

    found = _child(
        "encode",
        files=[str(path) for path in sample],
        tokenizer=str(tokenizer),
        repeats=options.repeats,
    )
    same = "the same ids" if found["same_ids"] else "OTHER IDS"
    print(f"\nencoding alone, one thread, {_size(sample):.1f} MB, MB/s ({same}):")
    for name in ("tokenizers", "gigatoken"):
        print(f"  {name:<24}{_size(sample) / found[name]:>8.2f}")
    found = _child("read", files=baseline["files"], blocks=full["blocks"], repeats=options.repeats)
    print(f"reading shuffled batches of {BATCH_SIZE} x {BLOCK_SIZE:,}, one process, Mtokens/s:")
    for name in ("baseline", "ours"):
        print(f"  {name:<24}{found[name]:>8.2f}  of {found[f'{name}_rows']:,} rows")
    text, size = temporary / "text", _size(files)
    if options.memory_megabytes > size:
        text = temporary / "grown.jsonl"
        size = _grow(files, options.memory_megabytes, text)
    started = time.perf_counter()
    peak, processes = _peak_memory(_recipe(text, tokenizer, temporary / "memory"))
    seconds = time.perf_counter() - started
    imports = _child("imports")["rss"] / 1e6
    print(
        f"peak memory of ours, gigatoken, {size:.1f} MB of text ({size / seconds:.1f} MB/s): "
        f"{peak:.0f} MB in "
        f"{processes} processes (sum of RSS),\n"
        f"  {imports:.0f} MB of it for the imports of one: {peak - imports:.0f} MB beyond"
    )


def _compare(
    repeats: int,
    temporary: Path,
    files: list[Path],
    subset: list[Path],
    tokenizer: Path,
    stub: Path,
) -> dict[str, dict[str, Any]]:
    """Run the arms in turn; return for each what was timed last and all its seconds."""
    text, part = temporary / "text", temporary / "subset"
    paths = [str(stub), *filter(None, [os.environ.get("PYTHONPATH")])]
    without = {"PYTHONPATH": os.pathsep.join(paths)}
    arms: dict[str, tuple[float, Callable[[Path], dict[str, Any]]]] = {
        "run_clm": (_size(subset), lambda place: _run_clm(part, tokenizer, place)),
        "ours, gigatoken": (
            _size(files), lambda place: _prepare(text, tokenizer, place, "gigatoken")
        ),
        "ours, tokenizers": (
            _size(subset), lambda place: _prepare(part, tokenizer, place, "tokenizers", without)
        ),
        "ours, gigatoken, less text": (
            _size(subset), lambda place: _prepare(part, tokenizer, place, "gigatoken")
        ),
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in arms}
    found = {}
    for _, (number, name) in itertools.product(range(repeats), enumerate(arms)):
        place = temporary / f"arm-{number}"
        shutil.rmtree(place, ignore_errors=True)
        if hasattr(os, "sync"):
            os.sync()  # nobody waits for what another arm left to be written
        megabytes, arm = arms[name]
        before = os.times()
        found[name] = {"megabytes": megabytes, **arm(place)}
        after = os.times()
        # Of the processes that have ended, user and system.
        cpu_seconds[name].append(sum(after[i] - before[i] for i in (2, 3)))
        seconds[name].append(found[name]["seconds"])
    return {
        name: {**found[name], "seconds": seconds[name], "cpu_seconds": cpu_seconds[name]}
        for name in arms
    }


def _run_clm(text: Path, tokenizer: Path, place: Path) -> dict[str, Any]:
    started = time.perf_counter()
    result = _child(
        "baseline", {"HF_DATASETS_CACHE": str(place)}, text=str(text), tokenizer=str(tokenizer)
    )
    seconds = time.perf_counter() - started
    tokens = result["rows"] * BLOCK_SIZE
    size = sum(Path(path).stat().st_size for path in result["files"])
    everything = sum(path.stat().st_size for path in place.rglob("*.arrow"))
    return {
        "seconds": seconds,
        "bytes_per_token": size / tokens,
        "all_bytes_per_token": everything / tokens,
        **result,
    }


def _prepare(
    text: Path,
    tokenizer: Path,
    place: Path,
    encoder: str,
    environment: dict[str, str] | None = None,
) -> dict[str, Any]:
    recipe = _recipe(text, tokenizer, place)
    started = time.perf_counter()
    _run(_prepare_command(recipe), environment)
    seconds = time.perf_counter() - started
    blocks = place / "blocks"
    facts = json.loads((blocks / "manifest.json").read_text())["facts"]
    if facts["encoder"] != encoder:
        sys.exit(f"{encoder} was to encode and {facts['encoder']} did")
    splits = [facts[split] for split in ("train", "validation", "test")]
    tokens = sum(split["tokens"] - split["left_out"] for split in splits)
    size = sum(path.stat().st_size for path in blocks.iterdir())
    return {"seconds": seconds, "bytes_per_token": size / tokens, "blocks": str(blocks)}


def _recipe(text: Path, tokenizer: Path, place: Path) -> Path:
    place.mkdir()
    recipe = {
        "tokens_per_update": 8 * BLOCK_SIZE,
        "tokenizer": {"pretrained": str(tokenizer)},
        "data": {"files": str(text), "block_size": BLOCK_SIZE},
        "model": {"config": {"n_layer": 2, "n_head": 2, "n_embd": 64}},
        "training": {"output_dir": str(place)},
    }
    path = place / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


def _prepare_command(recipe: Path) -> list[str]:
    door = [sys.executable, "pipeline/prepare_data.py", "--config", str(recipe)]
    return [*door, "--num_proc", str(CORES)]


def _peak_memory(recipe: Path) -> tuple[float, int]:
    """Return the megabytes of the process tree at its largest, and its processes then.

    A run of its own: looking at every process takes time from those that work.
    """
    import psutil

    peak = (0.0, 0)
    with tempfile.TemporaryFile() as output:
        running = subprocess.Popen(
            _prepare_command(recipe), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
        )
        while running.poll() is None:
            sizes = []
            with contextlib.suppress(psutil.Error):  # one ended while it was looked at
                root = psutil.Process(running.pid)
                for process in [root, *root.children(recursive=True)]:
                    sizes.append(process.memory_info().rss / 1e6)
            peak = max(peak, (sum(sizes), len(sizes)))
            time.sleep(SECONDS_BETWEEN_SAMPLES)
        if running.returncode:
            output.seek(0)
            sys.exit(output.read().decode(errors="replace")[-2000:])
    return peak


def baseline(text: str, tokenizer: str) -> dict[str, Any]:
    """Do what run_clm.py does to text files; the last map's cache files are the result."""
    times = [time.perf_counter()]
    from datasets import load_dataset
    from transformers import AutoTokenizer

    times.append(time.perf_counter())
    files = sorted(str(path) for path in Path(text).iterdir())
    documents = load_dataset(
        "text", data_files={"train": files}, sample_by="document", keep_linebreaks=True
    )["train"]
    times.append(time.perf_counter())
    encoder = AutoTokenizer.from_pretrained(tokenizer)

    def tokenize(batch: dict[str, list]) -> dict[str, list]:
        return encoder(batch["text"], return_token_type_ids=False)

    def group_texts(batch: dict[str, list]) -> dict[str, list]:
        grouped = {}
        for name, lists in batch.items():
            stream = list(itertools.chain.from_iterable(lists))
            ends = range(BLOCK_SIZE, len(stream) + 1, BLOCK_SIZE)
            grouped[name] = [stream[end - BLOCK_SIZE : end] for end in ends]
        grouped["labels"] = grouped["input_ids"].copy()
        return grouped

    encoded = documents.map(
        tokenize, batched=True, num_proc=CORES, remove_columns=documents.column_names
    )
    times.append(time.perf_counter())
    rows = encoded.map(group_texts, batched=True, num_proc=CORES)
    times.append(time.perf_counter())
    names = ("imports", "load", "tokenize", "group")
    return {
        "rows": len(rows),
        "files": [file["filename"] for file in rows.cache_files],
        "phases": {
            name: stop - start
            for name, (start, stop) in zip(names, itertools.pairwise(times), strict=True)
        },
    }


def encode(files: list[str], tokenizer: str, repeats: int) -> dict[str, Any]:
    """Return the seconds that each encoder needs in one thread."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    _restrict(1)
    import numpy as np
    from tokenizers import Tokenizer

    from pipeline.encoder import FAST, Encoder
    from pipeline.token_shards import CHARACTERS_PER_CALL
    from pipeline.tokenizer import load_tokenizer

    description = load_tokenizer(tokenizer).backend_tokenizer.to_str()
    batches: list[list[str]] = [[]]
    for path in files:
        if sum(map(len, batches[-1])) >= CHARACTERS_PER_CALL:
            batches.append([])
        batches[-1].append(Path(path).read_bytes().decode())
    seconds: dict[str, list[float]] = {"tokenizers": [], "gigatoken": []}
    same = True
    for _ in range(repeats):
        theirs = Tokenizer.from_str(description)  # opened anew: what they have seen makes them fast
        theirs.encode_special_tokens = True
        fast = Encoder(description, FAST).open()
        started = time.perf_counter()
        ids = [
            encoding.ids
            for batch in batches
            for encoding in theirs.encode_batch_fast(batch, add_special_tokens=False)
        ]
        between = time.perf_counter()
        arrays = [array for batch in batches for array in fast.encode(batch)]
        finished = time.perf_counter()
        seconds["tokenizers"].append(between - started)
        seconds["gigatoken"].append(finished - between)
        pairs = zip(ids, arrays, strict=True)
        same = same and all(np.array_equal(one, other) for one, other in pairs)
    return {"same_ids": same} | {name: statistics.median(s) for name, s in seconds.items()}


def read(files: list[str], blocks: str, repeats: int) -> dict[str, Any]:
    """Return the millions of tokens a second that each kind of rows hands out in batches."""
    from datasets import Dataset, concatenate_datasets
    from transformers import default_data_collator

    from pipeline.blocks import Rows

    theirs = concatenate_datasets([Dataset.from_file(path) for path in files])
    ours = Rows.open(Path(blocks), "train")
    arms = {
        # What a DataLoader asks of a data set for the indices of a batch.
        "baseline": (len(theirs), lambda i: default_data_collator(theirs.__getitems__(i))),
        "ours": (len(ours), ours.__getitems__),
    }
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for seed, (name, (rows, batch_of)) in itertools.product(range(repeats), arms.items()):
        rates[name].append(_reading_rate(rows, batch_of, seed))
    return {f"{name}_rows": rows for name, (rows, _) in arms.items()} | {
        name: statistics.median(rate) for name, rate in rates.items()
    }


def _reading_rate(rows: int, batch_of: Callable[[list[int]], dict], seed: int) -> float:
    order = list(range(rows))
    random.Random(seed).shuffle(order)
    batches = [order[i : i + BATCH_SIZE] for i in range(0, rows - BATCH_SIZE + 1, BATCH_SIZE)]
    if not batches:
        sys.exit(f"the text gives fewer than {BATCH_SIZE} rows: raise --megabytes")
    tokens, started = 0, time.perf_counter()
    for indices in itertools.cycle(batches):
        batch = batch_of(indices)
        assert batch["labels"].shape == (BATCH_SIZE, BLOCK_SIZE)
        tokens += batch["input_ids"].numel()
        seconds = time.perf_counter() - started
        if seconds >= SECONDS_READING:
            break
    return tokens / seconds / 1e6


def imports() -> dict[str, int]:
    """Return the memory of a process that has imported what prepare_data.py imports."""
    import gigatoken  # noqa: F401
    import psutil

    import pipeline.corpus
    import pipeline.preparation
    import pipeline.prepare_data
    import pipeline.tokenizer  # noqa: F401

    return {"rss": psutil.Process().memory_info().rss}


CHILDREN = {"baseline": baseline, "encode": encode, "read": read, "imports": imports}


def _child(name: str, environment: dict[str, str] | None = None, **arguments: Any) -> Any:
    """Run one of CHILDREN in a process of its own and return what it returns."""
    command = [sys.executable, __file__, "--child", name, json.dumps(arguments)]
    return json.loads(_run(command, environment).splitlines()[-1])


def _run(command: list[str], environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | (environment or {}), capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)[:300]}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


def _restrict(cores: int) -> int:
    """Keep this process and its children on so many cores; return how many they are."""
    if not hasattr(os, "sched_setaffinity"):
        return os.cpu_count() or 1
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    return len(os.sched_getaffinity(0))


def _copy_packages(folder: Path, megabytes: float | None) -> list[Path]:
    """Copy the installed packages' .py files, those that hold text and are UTF-8."""
    roots = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    found = sorted(path for root in roots for path in Path(root).rglob("*.py") if path.is_file())
    if megabytes is not None:
        found = _spread(found, megabytes)
    folder.mkdir()
    copies = []
    for path in found:
        content = path.read_bytes()
        try:
            content.decode()
        except UnicodeDecodeError:
            continue
        if content:
            copies.append(folder / f"{len(copies):06}.txt")
            copies[-1].write_bytes(content)
    return copies


def _grow(files: list[Path], megabytes: float, path: Path) -> float:
    """Write the files as JSON lines again and again, words changed; return the megabytes."""
    size = 0
    with path.open("w") as lines:
        for copy in itertools.count():
            for file in files:
                text = file.read_bytes().decode()
                for word in CHANGED if copy else ():
                    text = text.replace(word, f"{word[::-1]}{copy}")
                size += len(text.encode())
                lines.write(json.dumps({"text": text}) + "\n")
            if size >= megabytes * 1e6:
                return size / 1e6


def _spread(files: Iterable[Path], megabytes: float) -> list[Path]:
    """Return some of the files, spread evenly, of so many megabytes together, or all of them."""
    files, taken, size = list(files), [], 0
    # Multiples of the golden ratio: any number of them lies evenly between 0 and 1.
    for place in sorted(range(len(files)), key=lambda place: place * GOLDEN_RATIO % 1):
        if size >= megabytes * 1e6:
            break
        taken.append(place)
        size += files[place].stat().st_size
    return [files[place] for place in sorted(taken)]


def _linked(files: list[Path], folder: Path) -> list[Path]:
    folder.mkdir()
    for path in files:
        os.link(path, folder / path.name)
    return sorted(folder.iterdir())


def _tokenizer(given: Path | None, sample: list[Path], folder: Path) -> tuple[Path, int]:
    """Have the tokenizer in a folder that every arm can load; return it and its entries."""
    from pipeline.tokenizer import load_tokenizer, train_tokenizer

    if given is not None:
        tokenizer = load_tokenizer(str(given))
    else:
        texts = (path.read_bytes().decode() for path in sample)
        tokenizer = train_tokenizer(texts, vocab_size=VOCAB_SIZE)
    tokenizer.save_pretrained(folder)
    return folder, len(tokenizer)


def _size(files: list[Path]) -> float:
    return sum(path.stat().st_size for path in files) / 1e6


if __name__ == "__main__":
    main()
