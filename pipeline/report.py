"""What a run leaves to be read: numbers and logs, page, picture and model card; the summary."""

import shlex
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline import artifact
from pipeline.curves import draw
from pipeline.machine import hardware
from pipeline.model_card import hub_name, model_card
from pipeline.recipe import Recipe
from pipeline.report_page import run_page
from pipeline.report_parts import made_from
from pipeline.run_files import HISTORY, METRICS, PAGE, PICTURE
from pipeline.run_record import read_run
from pipeline.tasks import sentence
from pipeline.tokenizer import tokenizer_fingerprint
from pipeline.wording import written


def write_report(
    recipe: Recipe,
    metrics: dict[str, Any],
    sample: str,
    history: list[dict[str, float]],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write metrics.json and history.json, and from the run folder alone page, picture and card.

    Raises:
        InputError: the disk is full.
    """
    folder = recipe.output_dir
    blocks = artifact.read_manifest(recipe.blocks_dir)
    documents = {"eval_documents": blocks["facts"]["validation"]["documents"]}
    metrics = (
        documents
        | metrics
        | {
            "data_fingerprint": artifact.fingerprint(recipe.blocks_dir),
            "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
            "versions": artifact.versions(),
            "git_commit": artifact.git_commit(),
            "hardware": hardware(),
            "sample": sample,
        }
    )
    with artifact.full_disk_said(folder):
        artifact.write_whole(folder / HISTORY, _json_lines(history))
        artifact.write_whole(folder / METRICS, artifact.as_json(metrics), synced=True)
        record = read_run(folder)
        draw(record.panels, folder / PICTURE)
        card = model_card(record, base_model=hub_name(recipe.model.pretrained))
        artifact.write_whole(folder / "README.md", card)
        artifact.write_whole(folder / PAGE, run_page(record))


def summary(recipe: Recipe) -> str:
    """Return what a person wants to know when the run has ended, from its run folder."""
    folder = recipe.output_dir
    record = read_run(folder)
    metrics = record.metrics

    def both(key: str, form: str) -> str:
        test = (
            f"   (test {written(metrics[f'test_{key}'], form)})" if f"test_{key}" in metrics else ""
        )
        return written(metrics[f"eval_{key}"], form) + test

    lines = [
        made_from(record),
        "",
        f"held-out loss  {both('loss', '.4f')} nats per token",
        f"perplexity     {both('perplexity', '.2f')}",
        f"bits per byte  {both('bits_per_byte', '.4f')}",
        *_interval(metrics),
        *(f"task           {sentence(t, n)}" for t, n in metrics.get("tasks", {}).items()),
        f"speed          {metrics['train_tokens_per_second']:,.0f} tokens/s; "
        f"{metrics['train_tokens']:,} tokens in {metrics['train_seconds']:.0f} s, with the first "
        f"update ({metrics['compile_seconds']:.0f} s), evaluations and checkpoints",
    ]
    if "mfu" in metrics:  # a run that ended before there were meters has none
        lines.append(
            f"machine        {metrics['mfu']:.0%} of its matrix-product rate (MFU), "
            f"{metrics['peak_memory_bytes'] / 1e9:.1f} GB at most; of the updates' time "
            f"{metrics['data_wait_fraction']:.1%} waiting for data, "
            f"{metrics['logging_fraction']:.1%} for logging"
        )
    if metrics["sample"]:
        lines += ["", "It writes:", *(f"    {line}" for line in metrics["sample"].split("\n"))]
    prompts = recipe.generation.prompts or ["The "]
    wrote = [PAGE, METRICS, "samples.txt", "README.md", "config.yaml"]
    what = "the model (from_pretrained opens the folder)"
    if recipe.model.lora_r is not None:
        what = (
            "the adapter (peft opens the folder; convert_weights.py makes it one with "
            f"{recipe.model.pretrained})"
        )
    lines += [
        "",
        f"In {folder}: {what}, {', '.join(name for name in wrote if (folder / name).exists())}",
        f"Go on: python pipeline/generate.py --model {folder} --prompt {shlex.quote(prompts[0])}",
    ]
    return "\n".join(lines)


def _interval(metrics: dict[str, Any]) -> list[str]:
    ends = (metrics.get("eval_confidence_intervals") or {}).get("bits_per_byte")
    if ends is None:
        return []
    return [
        f"               {ends[0]:.4f} to {ends[1]:.4f} for other documents like the "
        f"{metrics['eval_documents']} held out (95 %)"
    ]


def _json_lines(history: list[dict[str, Any]]) -> str:
    """Return a JSON list, a log on each line."""
    return "[\n" + ",\n".join(artifact.as_json(log, indent=None) for log in history) + "\n]"
