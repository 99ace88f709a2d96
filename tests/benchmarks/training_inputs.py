"""What each arm of training_speed.py is given: the same weights, and the same rows in each step."""

import json
from pathlib import Path
from typing import Any

import numpy as np

SEED = 1
TOKENIZER, ROWS, IN_ORDER = "tokenizer", "train.arrow", "in_order.npy"
RUN_CLM_ROWS, WEIGHTS, RECIPE = "run_clm", "initial.safetensors", "recipe.yaml"


def prepare(folder: Path, shape: dict[str, int], *, steps: int, precision: str, cpu: bool) -> None:
    """Write rows, weights, tokenizer and our recipe for so many steps of a shape."""
    rows = steps * shape["batch"]
    ids = _random_rows(rows, shape["block"], shape["vocabulary"])
    _write_ours(folder / ROWS, ids)
    from pipeline.row_order import RowOrder

    # As `ResumableTrainer._get_train_sampler` makes it; the others get the rows in that order.
    ids = ids[RowOrder(rows, rows, SEED).rows(0, 0, rows)]
    np.save(folder / IN_ORDER, ids)
    _write_run_clm(folder / RUN_CLM_ROWS, ids)
    _write_tokenizer(folder / TOKENIZER, shape["vocabulary"])
    _write_weights(folder / WEIGHTS, shape)
    recipe = _recipe(folder, shape, steps=steps, precision=precision, cpu=cpu)
    (folder / RECIPE).write_text(json.dumps(recipe))  # JSON is YAML


def config(shape: dict[str, int]) -> dict[str, Any]:
    """Return the fields of a stock GPT2Config without dropout."""
    return {
        "vocab_size": shape["vocabulary"],
        "n_positions": shape["block"],
        "n_layer": shape["layers"],
        "n_head": shape["heads"],
        "n_embd": shape["width"],
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def _random_rows(rows: int, block: int, vocabulary: int) -> np.ndarray:
    """Draw ids by Zipf's law: their frequencies are something to learn, so that the loss falls."""
    source = np.random.default_rng(SEED)
    weights = 1 / (np.arange(vocabulary) + 3)
    ids = source.permutation(vocabulary)
    drawn = source.choice(ids, size=(rows, block), p=weights / weights.sum())
    return drawn.astype(np.uint16 if vocabulary <= 1 << 16 else np.uint32)


def _write_ours(path: Path, ids: np.ndarray) -> None:
    from pipeline.packing import Rows
    from pipeline.row_file import RowWriter

    rows, block = ids.shape
    starts, offsets = np.zeros(0, np.int64), np.zeros(rows + 1, np.int64)
    writer = RowWriter(path, block_size=block, dtype=ids.dtype)
    writer.write(Rows(ids, starts, offsets, np.full(rows, block, np.int64)))
    writer.close()


def _write_run_clm(folder: Path, ids: np.ndarray) -> None:
    """Write the columns that run_clm.py's last map leaves, with the types that they have there."""
    from datasets import Dataset, Features, List, Value, disable_progress_bars

    disable_progress_bars()
    rows = ids.tolist()
    types = {"input_ids": "int32", "attention_mask": "int8", "labels": "int64"}
    columns = {"input_ids": rows, "attention_mask": [[1] * ids.shape[1]] * len(ids), "labels": rows}
    features = Features({name: List(Value(type_)) for name, type_ in types.items()})
    Dataset.from_dict(columns, features=features).save_to_disk(folder)


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Write a byte-level tokenizer of so many entries; it only has to be that long."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    entries = [end, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    entries += [f"<filler {number}>" for number in range(vocabulary - len(entries))]
    vocab = {entry: number for number, entry in enumerate(entries)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=end, eos_token=end, pad_token=end
    ).save_pretrained(folder)


def _write_weights(path: Path, shape: dict[str, int]) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(SEED)
    state = GPT2LMHeadModel(GPT2Config(**config(shape))).state_dict()
    del state["lm_head.weight"]  # tied: it is the token embedding
    save_file({name: value.contiguous() for name, value in state.items()}, path)


def _recipe(
    folder: Path, shape: dict[str, int], *, steps: int, precision: str, cpu: bool
) -> dict[str, Any]:
    """Return our recipe: its defaults, but for what all arms have in common."""
    return {
        "tokens_per_update": shape["batch"] * shape["block"],
        "precision": precision,
        "tokenizer": {"pretrained": str(folder / TOKENIZER)},
        "data": {"files": "unused", "block_size": shape["block"]},
        "model": {
            "config": {"n_layer": shape["layers"], "n_head": shape["heads"]}
            | {"n_embd": shape["width"]}
        },
        "schedule": {"warmup_steps": 0, "floor": 1.0},  # constant
        "faults": {"hang_seconds": 1e9},  # it waits while others have their turn
        "training": {
            "output_dir": str(folder / "ours"),
            "max_steps": steps,
            "learning_rate": 1e-3,
            "weight_decay": 0.0,
            "per_device_train_batch_size": shape["batch"],
            "torch_compile": True,
            "logging_steps": 10,
            "eval_strategy": "no",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": cpu,
            "seed": SEED,
        },
    }
