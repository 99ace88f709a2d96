"""Of an example the completion alone is learnt and scored, whatever it shares a row with."""

import itertools
import json
import math
import random
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import ROOT, make_texts
from runs import assert_ended_the_same, cut_back, made, trained
from test_trainer import make_trainer, true_loss
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from pipeline import artifact, measure_perplexity, prepare_data, pretrain
from pipeline.blocks import NO_LABEL, Rows
from pipeline.completions import CHAT_TEMPLATE
from pipeline.generation import continuation
from pipeline.marks import PREDICTED, bare, fit, fitted, runs
from pipeline.model import build_model
from pipeline.packing import Chunk
from pipeline.recipe import ModelSection
from pipeline.row_file import RowFile

NAMES = "zero one two three four five six seven eight nine".split()
BLOCK = {"prompt_completion": 32, "messages": 48}


def prompts(count: int) -> list[dict]:
    """Return rows whose completion is the name of the digit at the end of the prompt."""
    source, words = random.Random(0), make_texts(4)[0].split()
    rows = []
    for number in range(count):
        before = " ".join(source.choices(words, k=source.randint(0, 5)))
        rows.append({"prompt": f"{before} {number % 10}=", "completion": NAMES[number % 10]})
    return rows


def chats(count: int) -> list[dict]:
    """Return conversations of one to four turns, some longer than a row."""
    source, texts = random.Random(0), make_texts(count)
    rows = []
    for text in texts:
        messages = [{"role": "system", "content": "Be kind."}] * source.randint(0, 1)
        for line in text.splitlines()[: source.randint(1, 4)]:
            half = len(line) // 2
            messages = [*messages, {"role": "user", "content": f" {line[:half]}\n"}]
            messages.append({"role": "assistant", "content": line[half : half + 40]})
        messages += [{"role": "user", "content": "Thanks"}] * source.randint(0, 1)
        rows.append({"messages": messages})
    return rows


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> dict[str, Path]:
    """The smoke recipe on prompts and completions, and on conversations."""
    folder, found = tmp_path_factory.mktemp("examples"), {}
    for kind, rows in (("prompt_completion", prompts(600)), ("messages", chats(200))):
        table = folder / f"{kind}.jsonl"
        table.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        (folder / "extra.txt").write_text(make_texts(1, seed=5)[0])
        values = yaml.safe_load((ROOT / "recipes" / "smoke.yaml").read_text())
        values["tokenizer"] = {"vocab_size": 320}
        values["data"] = {"files": str(table), "format": kind, "block_size": BLOCK[kind]}
        values["tokens_per_update"] = 16 * BLOCK[kind]
        values["evaluation"] = {"texts": {"extra": str(folder / "extra.txt")}}
        values["training"] |= {"report_to": "none", "logging_steps": 1, "disable_tqdm": True}
        found[kind] = folder / f"{kind}.yaml"
        found[kind].write_text(yaml.safe_dump(values))
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory, recipes) -> dict[str, Path]:
    """The folders of two finished runs; read them, do not change them."""
    folders = {kind: tmp_path_factory.mktemp("runs") / kind for kind in recipes}
    for kind, folder in folders.items():
        learning = {
            "prompt_completion": [
                *("--training.max_steps", "150", "--training.learning_rate", "1e-2"),
                *("--training.eval_steps", "75", "--training.save_steps", "75"),
            ],
            "messages": ["--data.validation_fraction", "0.2"],
        }
        pretrain.main(
            ["--config", str(recipes[kind]), "--training.output_dir", str(folder), *learning[kind]]
        )
    return folders


def held_out(run: Path, split: str, kind: str):
    """Return (ids, whether each is predicted) of a run's held-out examples, from its table."""
    tokenizer, found = AutoTokenizer.from_pretrained(run), []
    for line in (run / "blocks" / f"{split}_documents.jsonl").read_text().splitlines():
        path, _, offset = json.loads(line).rpartition(":")
        with open(path, "rb") as file:
            file.seek(int(offset))
            row = json.loads(file.readline())
        if kind == "messages":
            turns = row["messages"]
            turns = turns[: -1 if turns[-1]["role"] == "user" else None]
            asked = {"return_dict": True, "return_assistant_tokens_mask": True}
            out = tokenizer.apply_chat_template(turns, **asked)
            ids, flags = out["input_ids"], out["assistant_masks"]
        else:
            given = tokenizer(row["prompt"])["input_ids"]
            ids = oracle.ids_of(row["completion"], tokenizer) + [tokenizer.eos_token_id]
            ids, flags = given + ids, [0] * len(given) + [1] * len(ids)
        ids, flags = ids[-BLOCK[kind] :], flags[-BLOCK[kind] :]
        for place in itertools.takewhile(lambda p, flags=flags: flags[p], range(len(flags))):
            flags[place] = 0
        if any(flags):
            found.append((ids, flags))
    return found


def scored(model, ids, flags):
    """Return (nats, hit) of each predicted token of an example that is alone in the world."""
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    places = [place for place, flag in enumerate(flags) if flag]
    assert places and 0 not in places
    return [(-logs[p - 1, ids[p]].item(), logs[p - 1].argmax().item() == ids[p]) for p in places]


def numbers(run: Path, split: str, kind: str) -> dict:
    """Return what stands in metrics.json, computed plainly in fp64 with the stock model."""
    model = GPT2LMHeadModel.from_pretrained(run).double().eval()
    tokenizer = AutoTokenizer.from_pretrained(run)
    examples = held_out(run, split, kind)
    each = [scored(model, ids, flags) for ids, flags in examples]
    said = [
        tokenizer.decode(
            [i for i, flag in zip(*one, strict=True) if flag], skip_special_tokens=True
        )
        for one in examples
    ]
    nats, tokens = math.fsum(n for one in each for n, _ in one), sum(map(len, each))
    size, words = sum(len(s.encode()) for s in said), sum(len(s.split()) for s in said)
    own = [math.exp(math.fsum(n for n, _ in one) / len(one)) for one in each]
    return {
        "loss": nats / tokens, "perplexity": math.exp(nats / tokens), "tokens": tokens,
        "bits_per_byte": nats / math.log(2) / size, "bytes": size, "words": words,
        "accuracy": sum(hit for one in each for _, hit in one) / tokens,
        "word_perplexity": math.exp(nats / words), "mean_perplexity": sum(own) / len(own),
        "documents": len(each),
    }  # fmt: skip


# -- held-out numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(BLOCK))
@pytest.mark.parametrize(("split", "prefix"), [("validation", "eval"), ("test", "test")])
def test_held_out_numbers_are_of_completions_alone(finished, kind, split, prefix):
    metrics = json.loads((finished[kind] / "metrics.json").read_text())
    for name, value in numbers(finished[kind], split, kind).items():
        assert metrics[f"{prefix}_{name}"] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("kind", list(BLOCK))
def test_evaluation_while_training_agrees_with_the_final_numbers(finished, kind):
    history = json.loads((finished[kind] / "history.json").read_text())
    metrics = json.loads((finished[kind] / "metrics.json").read_text())
    last = [entry for entry in history if "eval_loss" in entry][-1]
    for name in ("loss", "bits_per_byte", "perplexity", "accuracy", "tokens", "bytes"):
        assert last[f"eval_{name}"] == pytest.approx(metrics[f"eval_{name}"], rel=1e-4)
    extra = [entry for entry in history if "eval_extra_loss" in entry][-1]
    assert extra["eval_extra_tokens"] > 100  # a text, predicted from end to end


@pytest.mark.parametrize("kind", list(BLOCK))
def test_measure_perplexity_repeats_metrics_json(finished, kind, tmp_path, capsys):
    run, target = finished[kind], tmp_path / "numbers.json"
    metrics = json.loads((run / "metrics.json").read_text())
    argv = ["--model", str(run), "--held_out", str(run), "--json", str(target)]
    measure_perplexity.main(argv)
    assert "of which the completion is scored" in capsys.readouterr().out
    found = json.loads(target.read_text())["models"][str(run)]
    for name in ("perplexity", "bits_per_byte", "mean_perplexity", "word_perplexity", "accuracy"):
        assert found[name] == pytest.approx(metrics[f"eval_{name}"], rel=1e-6)
        ends = metrics["eval_confidence_intervals"].get(name)
        assert found["confidence_intervals"][name] == pytest.approx(ends, rel=1e-6)
    for name in ("tokens", "bytes", "words", "documents"):
        assert found[name] == metrics[f"eval_{name}"]


def test_a_table_is_measured_as_it_would_be_held_out(finished, recipes, tmp_path):
    run, kind = finished["messages"], "messages"
    table, target = tmp_path / "held-out.jsonl", tmp_path / "numbers.json"
    lines = recipes[kind].with_suffix(".jsonl").read_bytes()
    names = (run / "blocks" / "validation_documents.jsonl").read_text().splitlines()
    places = [int(json.loads(name).rpartition(":")[2]) for name in names]
    table.write_bytes(b"".join(lines[p:].partition(b"\n")[0] + b"\n" for p in places))
    for packed in ("false", "true"):
        measure_perplexity.main(
            ["--model", str(run), "--files", str(table), "--format", kind, "--json", str(target),
             "--packed", packed]
        )  # fmt: skip
        found = json.loads(target.read_text())
        assert found["text"]["format"] == kind
        found = found["models"][str(run)]
        wanted = numbers(run, "validation", kind)
        for name in ("perplexity", "bits_per_byte", "tokens", "bytes", "words", "documents"):
            assert found[name] == pytest.approx(wanted[name], rel=1e-5)
        assert found["truncated"] > 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--joined", "true"], "leave out joined, stride, add_start_token"),
        (["--stride", "4"], "leave out joined, stride, add_start_token"),
        (["--target", "last_word"], "--target: of examples the completion is scored; leave it out"),
        (["--format", "messages"], "--format has no meaning with these options; leave it out"),
    ],
)
def test_options_that_examples_cannot_have_are_one_sentence(finished, argv, words):
    run = str(finished["messages"])
    with pytest.raises(ValueError, match=words):
        measure_perplexity.main(["--model", run, "--held_out", run, *argv])


def test_part_of_the_held_out_examples(finished, tokenizer):
    run = finished["messages"]
    tokenizer = AutoTokenizer.from_pretrained(run)
    rows = Rows.open(run / "blocks", "validation", attend_across=False)
    part = rows.part(rows.scored_tokens // 3, tokenizer)
    assert 1 < len(part) < len(rows)
    labels = part.__getitems__(range(len(part)))["labels"]
    assert part.scored_tokens == int((labels[:, 1:] != NO_LABEL).sum())
    said = tokenizer.decode(labels[labels != NO_LABEL], skip_special_tokens=True)
    assert part.scored_bytes == len(said.encode())
    assert abs(part.scored_tokens - rows.scored_tokens / 3) < rows.scored_tokens / 6


# -- training --------------------------------------------------------------------------------------


def test_a_run_learns_to_complete_and_stops(finished):
    run = finished["prompt_completion"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    for digit, name in enumerate(NAMES):
        for before in ("", "the model"):
            said = continuation(
                model, tokenizer, f"{before} {digit}=", max_new_tokens=12, temperature=0
            )
            assert said == name


def test_the_saved_tokenizer_has_the_template(finished):
    chatting = AutoTokenizer.from_pretrained(finished["messages"])
    assert chatting.chat_template == CHAT_TEMPLATE
    newest = max(finished["messages"].glob("checkpoint-*"))
    assert AutoTokenizer.from_pretrained(newest).chat_template == CHAT_TEMPLATE
    assert AutoTokenizer.from_pretrained(finished["prompt_completion"]).chat_template is None


@pytest.mark.parametrize("kind", list(BLOCK))
def test_the_loss_of_an_example_in_a_row_is_its_loss_alone(finished, kind):
    run = finished[kind]
    model = GPT2LMHeadModel.from_pretrained(run).double().eval()
    rows = Rows.open(run / "blocks", "train", attend_across=False)
    file, several = RowFile.open(run / "blocks" / "train.arrow"), 0
    for index in range(0, len(rows), max(1, len(rows) // 12)):
        batch = rows.__getitems__([index])
        labels = batch.pop("labels")[0, 1:]
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits[0, :-1]
        nats = F.cross_entropy(logits, labels, reduction="none")[labels != NO_LABEL]
        examples = file.documents_of(index)
        several += len(examples) > 1
        alone = [n for e in examples for n, _ in scored(model, bare(e).tolist(), e >= PREDICTED)]
        assert nats.tolist() == pytest.approx(alone, rel=1e-5)
    assert several or kind == "messages"


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_training_loss_is_the_mean_over_what_an_update_predicts(
    recipes, tmp_path, accumulation
):
    trainer = make_trainer(
        recipes["prompt_completion"], tmp_path, training__max_steps=1,
        training__per_device_train_batch_size=16 // accumulation, training__eval_strategy="no",
    )  # fmt: skip
    seen, collate, before = [], trainer.data_collator, trainer.model.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    trainer.data_collator = lambda rows: seen.append(rows) or collate(rows)
    trainer.train()
    trainer.model.load_state_dict(before)
    nats = tokens = 0
    for batch in seen[:accumulation]:
        labels = batch["labels"][:, 1:]
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        logits = trainer.model(**inputs, use_cache=False).logits[:, :-1].double()
        nats += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        tokens += int((labels != NO_LABEL).sum())
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert tokens and log["loss"] == pytest.approx(nats / tokens, rel=1e-6)
    facts = artifact.read_manifest(tmp_path / "blocks")["facts"]["train"]
    in_a_token = facts["predicted_bytes"] / facts["predicted_tokens"]
    assert log["bits_per_byte"] == pytest.approx(log["loss"] / math.log(2) / in_a_token)


def test_a_gradient_does_not_depend_on_what_shares_the_row(tokenizer):
    section = ModelSection(config={"n_layer": 2, "n_head": 2, "n_embd": 32})
    model = build_model(section, tokenizer, block_size=24, seed=0, attend_across=False)
    source = np.random.default_rng(0)
    own, others = source.integers(1, 300, 9), [source.integers(1, 300, 15) for _ in range(2)]
    labels = np.where(np.arange(9) > 4, own, NO_LABEL)
    gradients = []
    for other in (*others, others[0][:0]):
        size = len(other)
        batch = {
            "input_ids": np.append(other, own),
            "labels": np.append(np.full(size, NO_LABEL), labels),
            "position_ids": np.append(np.arange(size), np.arange(9)),
        }
        model.zero_grad()
        inputs = {name: torch.from_numpy(value)[None] for name, value in batch.items()}
        model(**inputs, num_items_in_batch=torch.tensor(4)).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for found in gradients[:2]:
        for one, alone in zip(found, gradients[2], strict=True):
            torch.testing.assert_close(one, alone, rtol=1e-5, atol=1e-7)
    assert any(g.abs().max() > 1e-3 for g in gradients[2])


def test_resumed_equals_uninterrupted(recipes, tmp_path):
    changes = {"training__max_steps": 6, "training__save_steps": 2, "training__eval_steps": 2}
    whole = trained(made(recipes["messages"], tmp_path / "whole", **changes))
    cut_back(tmp_path / "whole", tmp_path / "cut", 4)
    resumed = trained(made(recipes["messages"], tmp_path / "cut", **changes), "must")
    assert_ended_the_same(whole, resumed)


# -- rows ------------------------------------------------------------------------------------------


def test_only_what_fits_is_kept_and_the_end_first():
    def marked(pattern):
        return np.array(
            [n | (int(PREDICTED) if c == "P" else 0) for n, c in enumerate(pattern)], np.uint32
        )

    for pattern, wanted in [
        ("ggPP", "ggPP"),
        ("gggggggPP", "gggPP"),  # a long prompt keeps its end
        ("gggPPPP", "gPPPP"),
        ("gPPPPP", None),  # no token would be left before the completion
        ("gPPPPPPPP", None),
        ("gggPPPgP", "ggggP"),  # a completion without its beginning is predicted no more
        ("gPPgPPgP", "gPPgP"),
    ]:
        found = fitted(marked(pattern), 5)
        if wanted is None:
            assert found is None
            continue
        kept = marked(pattern)[-5:] if len(pattern) > 5 else marked(pattern)
        assert bare(found).tolist() == bare(kept).tolist()
        assert "".join("P" if i >= PREDICTED else "g" for i in found) == wanted
    patterns = ["ggPP", "gPPPPPP", "gggggggPP", "gP"]
    starts = np.cumsum([0, *map(len, patterns)])[:-1]
    found = fit(Chunk(np.concatenate([marked(p) for p in patterns]), starts), 5)
    assert (found.shortened, found.left_out) == (1, 1)
    assert found.chunk.starts.tolist() == [0, 4, 9] and len(found.chunk.ids) == 11
    assert [len(run) for run in runs(marked("gggPPgP"))] == [3, 2, 1, 1]
    nothing = fit(Chunk(marked("gPPPPPP"), np.array([0])), 5)
    assert not len(nothing.chunk.ids) and nothing.left_out == 1


def test_what_the_rows_hold_is_said_and_shown(finished, recipes, capsys):
    run = finished["messages"]
    prepare_data.main(["--config", str(run / "config.yaml"), "--show", "3"])
    shown = capsys.readouterr().out
    assert "[an example] [given]" in shown and "Assistant:[predicted]" in shown
    facts = artifact.read_manifest(run / "blocks")["facts"]
    splits = ("train", "validation", "test")
    assert sum(facts[s]["shortened"] for s in splits) > 0
    assert 0 < facts["train"]["predicted_tokens"] < facts["train"]["tokens"]
    for split in splits:
        rows = Rows.open(run / "blocks", split, attend_across=False)
        labels = rows.__getitems__(range(len(rows)))["labels"]
        assert int((labels[:, 1:] != NO_LABEL).sum()) == rows.scored_tokens
        assert (labels[:, 0] == NO_LABEL).all()


def test_examples_that_share_text_with_held_out_ones_are_dropped(recipes, tmp_path):
    """Whether the text is in the prompt here and in the completion there."""
    shared, table = " ".join(make_texts(1, seed=9)[0].split()[:30]), tmp_path / "train.jsonl"
    rows = [*prompts(120), {"prompt": "a 1=", "completion": shared}]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "held.jsonl").write_text(json.dumps({"prompt": shared, "completion": "one"}))
    prepare_data.main(
        ["--config", str(recipes["prompt_completion"]), "--data.files", str(table),
         "--data.validation_files", str(tmp_path / "held.jsonl"), "--data.block_size", "256",
         "--training.output_dir", str(tmp_path / "run"), "--cleaning.decontaminate", "drop"]
    )  # fmt: skip
    sources = artifact.read_manifest(tmp_path / "run" / "blocks")["facts"]["sources"]
    assert sources[0]["dropped"] == 1


def test_rows_of_text_are_made_from_what_they_always_were(finished_run):
    manifest = artifact.read_manifest(finished_run / "blocks")
    assert "format" not in json.dumps(manifest["made_from"])
    assert not {"predicted_tokens", "shortened"} & manifest["facts"]["train"].keys()
    batch = Rows.open(finished_run / "blocks", "train").__getitems__([0])
    assert batch.keys() == {"input_ids", "labels"}
    assert torch.equal(batch["input_ids"], batch["labels"])
    assert true_loss(GPT2LMHeadModel.from_pretrained(finished_run), batch["input_ids"]) > 0
