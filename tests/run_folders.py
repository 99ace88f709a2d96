"""Run folders as a run leaves them, written in milliseconds: for what reads them."""

import json
from pathlib import Path
from typing import Any

import yaml

METRICS = {
    "eval_loss": 3.5, "eval_perplexity": 33.12, "eval_bits_per_byte": 1.75, "eval_tokens": 999,
    "eval_accuracy": 0.31, "eval_word_perplexity": 250.0, "eval_bytes": 2900, "eval_documents": 7,
    "eval_confidence_intervals": {
        "loss": [3.4, 3.6], "perplexity": [30.0, 36.6], "bits_per_byte": [1.7, 1.8],
    },
    "test_loss": 3.6, "test_perplexity": 36.6, "test_bits_per_byte": 1.8, "test_documents": 1,
    "test_confidence_intervals": {"loss": None, "perplexity": None, "bits_per_byte": None},
    "updates": 40, "train_tokens": 40960, "train_tokens_per_second": 9000.0, "train_bytes": 99000,
    "train_seconds": 3725.0, "compile_seconds": 30.0, "measuring_seconds": 10.0, "mfu": 0.41,
    "peak_memory_bytes": 2_000_000_000, "parameters": 1_071_872, "world_size": 1, "threads": 2,
    "device": "cpu", "precision": "fp32", "block_size": 128, "data_fingerprint": "d" * 64,
    "tokenizer_fingerprint": "e" * 64, "git_commit": "c" * 40, "versions": {"torch": "2.13.0"},
    "hardware": {"processor": "A Processor", "cores": 2, "memory_bytes": 8 * 10**9},
}  # fmt: skip


def history(updates: int = 40, *, best: int | None = None) -> list[dict[str, Any]]:
    """Logs of a run with an evaluation each 10 updates; held-out loss rises after `best`."""
    logs: list[dict[str, Any]] = []
    for step in range(5, updates + 1, 5):
        seen = {"step": step, "tokens_seen": 1024 * step, "tokens_per_second": 9000.0 + step}
        loss = 6 - 2 * step / updates
        logs.append(
            {"loss": loss, "bits_per_byte": loss / 2, "learning_rate": 1e-3, "grad_norm": 1.0}
            | seen
        )
        if step % 10 == 0:
            beyond = 0 if best is None else max(0, step - best)
            loss += 0.1 + 4 * beyond / updates
            for name in ("eval", "eval_book"):
                logs.append(
                    {f"{name}_loss": loss, f"{name}_perplexity": 2.718**loss,
                     f"{name}_bits_per_byte": loss / 2, **seen}
                )  # fmt: skip
    return logs


def write_run(
    folder: Path, *, recipe: dict[str, Any] | None = None, rows: str = "a" * 64, **metrics: Any
) -> Path:
    """Write a finished run: `recipe` and `metrics` are laid over, a metric of None is left out."""
    values = {
        "data": {"files": ["/home/somebody/texts/book.txt"], "block_size": 128},
        "model": {"config": {"n_layer": 4}},
        "evaluation": {"texts": {"book": "../texts/other.txt"}, "tokens": 512},
        "generation": {"prompts": ["/usr/bin is", "Once"]},
        "training": {"output_dir": str(folder), "max_steps": 40, "learning_rate": 1e-3},
    } | (recipe or {})
    (folder / "blocks").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    kept = {k: v for k, v in (METRICS | metrics).items() if v is not None}
    (folder / "metrics.json").write_text(json.dumps(kept))
    (folder / "history.json").write_text(json.dumps(history()))
    (folder / "run_status.json").write_text(json.dumps({"state": "finished"}))
    (folder / "config.json").write_text(json.dumps({"n_layer": 4, "n_embd": 128}))
    samples = [
        f"--- update {n}\n/usr/bin is {n}\n\n--- update {n}\nOnce {n}\n\n" for n in (10, 20, 30, 40)
    ]
    (folder / "samples.txt").write_text("".join(samples))
    counts = {"documents": 7, "bytes": 2901, "tokens": 1000, "rows": 8}
    facts = {split: counts for split in ("train", "validation", "test")}
    facts["sources"] = [{"name": "/home/somebody/texts/book.txt", **counts}]
    files = {f"{split}.arrow": {"size": 1, "sha256": rows} for split in facts if split != "sources"}
    manifest = {"made_from": {}, "facts": facts, "files": files}
    (folder / "blocks" / "manifest.json").write_text(json.dumps(manifest))
    return folder


def make_unfinished(folder: Path, step: int = 20) -> Path:
    """Turn a finished run into one that was preempted after `step`."""
    for name in ("metrics.json", "history.json", "config.json"):
        (folder / name).unlink()
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": history(step)}))
    status = {"state": "preempted", "why": f"SIGTERM, in {folder}/blocks, after update {step}"}
    (folder / "run_status.json").write_text(json.dumps(status))
    return folder
