"""The model card: what the report says, in Markdown, with the metadata that the Hub reads."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from pipeline.published_card import UNNAMED, snippet
from pipeline.report_parts import Part, made_from, run_parts, source
from pipeline.run_files import PICTURE
from pipeline.run_record import RunRecord
from pipeline.wording import finite


def model_card(record: RunRecord, *, base_model: str | None = None) -> str:
    """Return the model card of a run, or of a checkpoint that `read_checkpoint` has read.

    Args:
        base_model: the Hub name of the model that it goes on from.
    """
    parts = [_part(part, has_picture=record.is_finished) for part in run_parts(record)]
    prompts = (record.recipe.get("generation") or {}).get("prompts")
    said = [f"{_plain(made_from(record))}."]
    if not record.is_finished:
        said.append(_so_far(record))
    if _is_adapter(record):
        base = f"`{base_model}`" if base_model else "the model that it was trained beside"
        said.append(f"A LoRA adapter: loading it takes peft, and {base} is loaded with it.")
    blocks = [
        f"---\n{_data(record, base_model).to_yaml()}\n---",
        f"# {_plain(record.name)}",
        *said,
        f"```python\n{snippet(UNNAMED, (prompts or ['The '])[0])}\n```",
        *parts,
        _again(record),
    ]
    return "\n\n".join(blocks) + "\n"


def hub_name(pretrained: str | None) -> str | None:
    """Return the Hub name of the model that a run goes on from, None for a folder."""
    return None if pretrained is None or Path(pretrained).exists() else pretrained


def _data(record: RunRecord, base_model: str | None) -> ModelCardData:
    have, recipe = record.metrics, record.recipe
    datasets, hub = _datasets(recipe), recipe.get("hub") or {}
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=datasets[0] if datasets else "text",
            dataset_name=source(recipe),
            dataset_split=split,
            metric_type=metric,
            metric_value=round(have[f"{key}_{metric}"], 4),
        )
        for key, split in (("eval", "validation"), ("test", "test"))
        for metric in ("loss", "perplexity", "bits_per_byte")
        if finite(have.get(f"{key}_{metric}"))
    ]
    more: dict[str, Any] = {}
    if base_model:
        more["base_model_relation"] = "adapter" if _is_adapter(record) else "finetune"
    goes_on = (recipe.get("model") or {}).get("pretrained") is not None
    kind = "lora" if _is_adapter(record) else "fine-tuning" if goes_on else "pretraining"
    return ModelCardData(
        model_name=record.name,
        license=hub.get("license"),
        language=hub.get("language"),
        library_name="peft" if _is_adapter(record) else "transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", kind],
        base_model=base_model,
        datasets=datasets or None,
        eval_results=results,
        **more,
    )


def _datasets(recipe: dict[str, Any]) -> list[str]:
    """Return the names of data sets on the Hub that the text is from."""
    data = recipe.get("data") or {}
    names = [one.get("dataset") for one in [data, *(data.get("sources") or [])]]
    return list(dict.fromkeys(name for name in names if name and _is_hub_name(name)))


def _is_hub_name(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _is_adapter(record: RunRecord) -> bool:
    return (record.recipe.get("model") or {}).get("lora_r") is not None


def _so_far(record: RunRecord) -> str:
    of = (record.recipe.get("training") or {}).get("max_steps")
    goal = f" of {of:,}" if isinstance(of, int) and of > 0 else ""
    updates = f"{record.metrics['updates']:,}{goal} updates"
    return f"A checkpoint after {updates}, before training had ended."


def _again(record: RunRecord) -> str:
    """Say how the run is repeated."""
    said = [
        "## Repeat it",
        "```\npython pipeline/pretrain.py --config config.yaml\n```",
        "`config.yaml` is the recipe; of files only their names stand in it.",
    ]
    if record.is_finished:
        said.append("`metrics.json` has every number, versions and fingerprints.")
    return "\n\n".join(said)


def _part(part: Part, *, has_picture: bool) -> str:
    blocks = [f"## {part.title}", *map(_plain, part.sentences)]
    for table in part.tables:
        head = table.head or [""] * len(table.rows[0])
        rows = [head, ["---"] * len(head), *table.rows]
        blocks.append("\n".join(f"| {' | '.join(map(_plain, row))} |" for row in rows))
    if part.panels and has_picture:
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
