"""The model card: what the report says, in Markdown, with the numbers in the Hub's own form."""

import re

from huggingface_hub import EvalResult, ModelCardData

from pipeline.report_parts import Part, made_from, run_parts, source
from pipeline.run_folder import PICTURE
from pipeline.run_record import RunRecord, finite


def model_card(record: RunRecord, *, base_model: str | None = None) -> str:
    """Return the model card of a finished run.

    Args:
        base_model: the Hub name of the model that it goes on from.
    """
    parts = "\n\n".join(_part(part) for part in run_parts(record))
    prompts = (record.recipe.get("generation") or {}).get("prompts")
    return f"""---
{_data(record, base_model).to_yaml()}
---

# {_plain(record.name)}

{_plain(made_from(record))}.

```python
from transformers import pipeline
write = pipeline("text-generation", "path/to/{record.name}")
print(write({(prompts or ["The "])[0]!r})[0]["generated_text"])
```

{parts}

`config.yaml` repeats the run; `metrics.json` has every number, versions and fingerprints;
`report.html` is this page with curves that tell their values.
"""


def _data(record: RunRecord, base_model: str | None) -> ModelCardData:
    have, dataset = record.metrics, (record.recipe.get("data") or {}).get("dataset")
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset or "text",
            dataset_name=source(record.recipe),
            dataset_split=split,
            metric_type=metric,
            metric_value=round(have[f"{key}_{metric}"], 4),
        )
        for key, split in (("eval", "validation"), ("test", "test"))
        for metric in ("loss", "perplexity", "bits_per_byte")
        if finite(have.get(f"{key}_{metric}"))
    ]
    return ModelCardData(
        model_name=record.name,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "pretraining"],
        base_model=base_model,
        datasets=[dataset] if dataset else None,
        eval_results=results,
    )


def _part(part: Part) -> str:
    blocks = [f"## {part.title}", *map(_plain, part.sentences)]
    for table in part.tables:
        head = table.head or [""] * len(table.rows[0])
        rows = [head, ["---"] * len(head), *table.rows]
        blocks.append("\n".join(f"| {' | '.join(map(_plain, row))} |" for row in rows))
    if part.panels:
        titles = ", ".join(panel.title.lower() for panel in part.panels)
        blocks.append(f"![{titles}]({PICTURE})")
    blocks += [f"*{_plain(label)}*\n\n{_fenced(text)}" for label, text in part.texts]
    if part.code:
        blocks.append(f"<details><summary>show</summary>\n\n{_fenced(part.code)}\n\n</details>")
    return "\n\n".join([*blocks, *map(_plain, part.notes)])


def _plain(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", " ".join(text.split()))


def _fenced(text: str) -> str:
    """Return text in a fence that is longer than any in it."""
    longest = max(map(len, re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}\n{text.rstrip()}\n{fence}"
