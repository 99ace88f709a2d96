"""What a person reads after the run: metrics.json, loss.png, the model card, the summary."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from matplotlib.figure import Figure
from transformers import PreTrainedTokenizerBase

from pipeline import artifact
from pipeline.recipe import Recipe
from pipeline.run_folder import METRICS
from pipeline.tokenizer import tokenizer_fingerprint


def write_report(
    recipe: Recipe,
    metrics: dict[str, Any],
    sample: str,
    history: list[dict[str, float]],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write metrics.json, loss.png and the model card into the run folder.

    Raises:
        InputError: the disk is full.
    """
    folder = recipe.output_dir
    blocks = artifact.read_manifest(recipe.blocks_dir)
    metrics = metrics | {
        "eval_documents": blocks["facts"]["validation"]["documents"],
        "data_fingerprint": artifact.fingerprint(recipe.blocks_dir),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "versions": artifact.versions(),
        "git_commit": artifact.git_commit(),
        "sample": sample,
    }
    with artifact.full_disk_said(folder):
        draw_loss(history, folder / "loss.png")
        artifact.write_whole(folder / "README.md", model_card(recipe, metrics))
        text = json.dumps(metrics, indent=1, ensure_ascii=False)
        artifact.write_whole(folder / METRICS, text, synced=True)


def draw_loss(history: list[dict[str, float]], path: Path) -> None:
    """Draw training and held-out loss over tokens, with the learning rate on a second axis."""
    training = [h for h in history if "loss" in h]
    held_out = [h for h in history if "eval_loss" in h]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        [h["tokens_seen"] for h in training],
        [h["loss"] for h in training],
        color="tab:blue", linewidth=1, marker="." if len(training) < 20 else None,
        label="training loss",
    )  # fmt: skip
    axes.plot(
        [h["tokens_seen"] for h in held_out],
        [h["eval_loss"] for h in held_out],
        color="tab:orange", marker="o", markersize=4, label="held-out loss",
    )  # fmt: skip
    axes.set(xlabel="tokens", ylabel="nats per token")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    rate = axes.twinx()
    rate.plot(
        [h["tokens_seen"] for h in training],
        [h["learning_rate"] for h in training],
        color="tab:gray", linewidth=1, linestyle="--", marker="." if len(training) < 20 else None,
        label="learning rate",
    )  # fmt: skip
    rate.set(ylabel="learning rate", ylim=(0, None))
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)


def model_card(recipe: Recipe, metrics: dict[str, Any]) -> str:
    """Return the model card, its numbers in the Hub's model-index form."""
    source = _source(recipe)
    name = recipe.output_dir.resolve().name
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=recipe.data.dataset or "text",
            dataset_name=source,
            dataset_split=split,
            metric_type=metric,
            metric_value=round(metrics[f"{key}_{metric}"], 4),
        )
        for key, split in (("eval", "validation"), ("test", "test"))
        for metric in ("loss", "perplexity", "bits_per_byte")
        if f"{key}_{metric}" in metrics
    ]
    data = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "pretraining"],
        base_model=recipe.model.pretrained,
        datasets=[recipe.data.dataset] if recipe.data.dataset else None,
        eval_results=results,
    )
    return f"""---
{data.to_yaml()}
---

# {name}

{_made_from(recipe, metrics)}

| | validation | test |
|---|---|---|
{_card_rows(metrics)}

{metrics["train_tokens"]:,} training tokens in {metrics["train_seconds"]:.0f} s
({metrics["train_tokens_per_second"]:,.0f} tokens/s, {metrics["world_size"]} process(es),
{metrics["precision"]}). Held-out numbers are of these saved weights in fp32, every token of the
held-out text after the first predicted once; bits per byte can be compared between tokenizers,
perplexity cannot.

![training and held-out loss](loss.png)

```python
from transformers import pipeline
write = pipeline("text-generation", "path/to/{name}")
print(write({_sample_prompt(recipe)!r})[0]["generated_text"])
```

`config.yaml` repeats the run; `metrics.json` has every number, versions and fingerprints.
"""


def summary(recipe: Recipe) -> str:
    """Return what a person wants to know when the run has ended, from its run folder."""
    folder = recipe.output_dir
    metrics = json.loads((folder / METRICS).read_text())

    def both(key: str, form: str) -> str:
        test = (
            f"   (test {format(metrics[f'test_{key}'], form)})" if f"test_{key}" in metrics else ""
        )
        return format(metrics[f"eval_{key}"], form) + test

    lines = [
        _made_from(recipe, metrics),
        "",
        f"held-out loss  {both('loss', '.4f')} nats per token",
        f"perplexity     {both('perplexity', '.2f')}",
        f"bits per byte  {both('bits_per_byte', '.4f')}",
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
    lines += [
        "",
        f"In {folder}: the model (from_pretrained opens the folder), metrics.json, loss.png, "
        f"{'samples.txt, ' if (folder / 'samples.txt').exists() else ''}README.md, config.yaml",
        f"Go on: python pipeline/generate.py --model {folder} --prompt {_sample_prompt(recipe)!r}",
    ]
    return "\n".join(lines)


def _made_from(recipe: Recipe, metrics: dict[str, Any]) -> str:
    source = _source(recipe)
    origin = f"from {recipe.model.pretrained}" if recipe.model.pretrained else "from scratch"
    return (
        f"GPT-2 with {metrics['parameters']:,} parameters, {origin}, trained on "
        f"{metrics['train_bytes']:,} bytes of {source}; held out: {metrics['eval_bytes']:,} bytes "
        f"({metrics['eval_documents']} document(s)) for validation, "
        f"{metrics.get('test_bytes', 0):,} for the test"
    )


def _source(recipe: Recipe) -> str:
    """Name the text; of a file only its name, for the card is meant to be published."""
    names = []
    for source in recipe.data.all_sources:
        files = ", ".join(Path(file).name for file in source.files or [])
        names.append(source.name or files or source.dataset)
    return ", ".join(names)


def _card_rows(metrics: dict[str, Any]) -> str:
    labels = {"loss": "loss (nats per token)", "perplexity": "perplexity"}
    labels["bits_per_byte"] = "bits per byte"
    rows = []
    for key, label in labels.items():
        test = metrics.get(f"test_{key}")
        rows.append(
            f"| {label} | {metrics[f'eval_{key}']:.4f} | {f'{test:.4f}' if test else '-'} |"
        )
    return "\n".join(rows)


def _sample_prompt(recipe: Recipe) -> str:
    return recipe.generation.prompts[0] if recipe.generation.prompts else "The "
