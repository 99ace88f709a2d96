"""Tasks of lm-eval: numbers of a plain computation, sentences, and runs that they do not change."""

import copy
import json
import math
import os
import random
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import make_texts
from runs import assert_ended_the_same, cut_back, logs, trained
from test_trainer import equal, make_trainer, weights

from pipeline.model import build_model
from pipeline.recipe import InputError, read_recipe
from pipeline.results import measured_tasks
from pipeline.sections import ModelSection
from pipeline.tasks import check_tasks, run_tasks, sentence

SPLIT = {"test_split": "test", "dataset_path": "json"}
CHOICE = {
    "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [
        {"metric": name, "aggregation": "mean", "higher_is_better": True}
        for name in ("acc", "acc_norm")
    ],
}  # fmt: skip
LAST_WORD = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
    "doc_to_target": "{{' '+text.split(' ')[-1]}}",
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ],
}
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
}
WRITING = {
    "output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["."], "max_gen_toks": 6},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip


class Folder:
    """Task files with their data beside them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def task(self, name: str, rules: dict, documents: list[dict], **more) -> str:
        """Write a task's two files, and return the path of the one that is given to the user."""
        text = "".join(f"{json.dumps(document)}\n" for document in documents)
        (self.path / f"{name}.jsonl").write_text(text)
        data = {"dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}}}
        return self.file(name, {"task": name} | SPLIT | data | rules | more)

    def file(self, name: str, content: dict | str) -> str:
        path = self.path / f"{name}.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return str(path)


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path)


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    lines = [line for text in make_texts(8, seed=5) for line in text.splitlines()]
    return [line.removesuffix(".") for line in lines if len(line.split()) > 3][:24]


@pytest.fixture(scope="module")
def questions(sentences) -> list[dict]:
    """The rest of a sentence, or of another one, with one answer that has the same tokens twice."""
    source = random.Random(3)
    found = []
    for sentence_ in sentences:
        words = sentence_.split()
        others = [" ".join(s.split()[-2:]) for s in source.sample(sentences, 3)]
        choices = [" ".join(words[3:]), *others]
        source.shuffle(choices)
        answer = choices.index(" ".join(words[3:]))
        found.append({"question": " ".join(words[:3]), "choices": choices, "answer": answer})
    return found


@pytest.fixture(scope="module")
def model(tokenizer):
    """A GPT-2 with 48 positions that is not indifferent."""
    return made(tokenizer, 48)


def made(tokenizer, positions: int, **options):
    section = ModelSection(config={"n_layer": 2, "n_head": 2, "n_embd": 32}, **options)
    built = build_model(section, tokenizer, block_size=positions, seed=1).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter *= 4
    return built


# -- the plain computation, in fp64 ---------------------------------------------------------------


def log_probabilities(model, ids: list[int]) -> torch.Tensor:
    """Return those of every next token [tokens, vocabulary]."""
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        return F.log_softmax(exact(torch.tensor([ids])).logits[0], -1)


def log_likelihood(model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    found = log_probabilities(model, (context + continuation)[:-1])[-len(continuation) :]
    wanted = torch.tensor(continuation)
    likeliest = bool((found.argmax(-1) == wanted).all())
    return found.gather(1, wanted[:, None]).sum().item(), likeliest


def pair(tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    before, all_ = tokenizer.encode(context), tokenizer.encode(context + continuation)
    return all_[: len(before)], all_[len(before) :]


def greedy(model, tokenizer, text: str, count: int) -> str:
    ids = tokenizer.encode(text)
    start = len(ids)
    for _ in range(count):
        ids.append(int(log_probabilities(model, ids)[-1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True).split(".")[0]


@pytest.mark.slow
def test_multiple_choice_is_the_likeliest_answer(folder, model, tokenizer, questions):
    path = folder.task("choice", CHOICE, questions)
    hits = {"acc": [], "acc_norm": []}
    for one in questions:
        found = [
            log_likelihood(model, *pair(tokenizer, one["question"], f" {choice}"))[0]
            for choice in one["choices"]
        ]
        by_length = [v / len(c) for v, c in zip(found, one["choices"], strict=True)]
        for name, values in (("acc", found), ("acc_norm", by_length)):
            hits[name].append(int(np.argmax(values) == one["answer"]))
    numbers = run_tasks(model, tokenizer, [path], batch_size=5)["choice"]
    assert 0 < numbers["acc"] < 1
    for name, own in hits.items():
        error = statistics.stdev(own) / math.sqrt(len(own))
        assert numbers[name] == statistics.mean(own)
        assert numbers[f"{name}_stderr"] == pytest.approx(error, rel=1e-12)
    assert numbers["samples"] == len(questions)


def test_the_last_word_is_scored_after_what_stands_before(folder, model, tokenizer, sentences):
    path = folder.task("last", LAST_WORD, [{"text": text} for text in sentences])
    found = []
    for text in sentences:
        before, word = text.rsplit(" ", 1)
        found.append(log_likelihood(model, *pair(tokenizer, before, f" {word}")))
    numbers = run_tasks(model, tokenizer, [path], batch_size=5)["last"]
    mean = statistics.mean(value for value, _ in found)
    error = statistics.stdev(value for value, _ in found) / math.sqrt(len(found))
    assert numbers["perplexity"] == pytest.approx(math.exp(-mean), rel=1e-6)
    assert numbers["perplexity_stderr"] == pytest.approx(math.exp(-mean) * error, rel=1e-6)
    assert numbers["acc"] == statistics.mean(is_likeliest for _, is_likeliest in found)


def test_whole_texts_are_scored_once_in_windows_as_full_as_can_be(folder, tokenizer, sentences):
    """Also those longer than the model's positions: the last window reaches back."""
    model, positions = made(tokenizer, 12), 12
    path = folder.task("whole", ROLLING, [{"text": text} for text in sentences])
    total = 0.0
    lengths = []
    for text in sentences:
        ids = [tokenizer.bos_token_id, *tokenizer.encode(text)]
        lengths.append(len(ids))
        for start in range(1, len(ids), positions):
            end = min(start + positions, len(ids))
            first = start - 1 if start == 1 else max(0, end - positions - 1)
            total += log_likelihood(model, ids[first:start], ids[start:end])[0]
    assert min(lengths) < 12 < max(lengths)
    numbers = run_tasks(model, tokenizer, [path], batch_size=5)["whole"]
    size = sum(len(text.encode()) for text in sentences)
    words = sum(len(text.split()) for text in sentences)
    assert numbers["word_perplexity"] == pytest.approx(math.exp(-total / words), rel=1e-5)
    assert numbers["byte_perplexity"] == pytest.approx(math.exp(-total / size), rel=1e-6)
    assert numbers["bits_per_byte"] == pytest.approx(-total / math.log(2) / size, rel=1e-6)


@pytest.mark.parametrize("attention", ["blockwise_causal", "sdpa_causal", "sdpa", "eager"])
def test_what_is_written_does_not_hang_on_the_batch(folder, tokenizer, sentences, attention):
    """An attention without a mask would read what fills up shorter contexts."""
    model = made(tokenizer, 48, attn_implementation=attention)
    texts = [text[: 10 + 2 * place] for place, text in enumerate(sentences[:6])]
    documents = [{"text": text, "answer": greedy(model, tokenizer, text, 6)} for text in texts]
    documents[0]["answer"] += "?"
    path = folder.task("written", WRITING, documents)
    kept = model.generation_config.max_new_tokens  # would else decide how much is written
    assert kept == 24
    numbers = run_tasks(model, tokenizer, [path], batch_size=4)["written"]
    assert numbers["exact_match"] == pytest.approx(5 / 6)
    assert model.generation_config.max_new_tokens == kept


def test_log_likelihoods_are_lm_evals_own(model, tokenizer, sentences):
    """Contexts with spaces at their end, empty ones, and answers that share all but a token."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from pipeline.task_model import TaskModel

    pairs = [(f"{text} ", word) for text in sentences[:4] for word in ("a", "the", "peak rows")]
    pairs += [("", text) for text in sentences[:3]]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    ours = TaskModel(model, tokenizer, name="", batch_size=4, after_batch=lambda: None)
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    assert ours.prefix_token_id == tokenizer.eos_token_id
    assert ours.tok_encode("the model") == tokenizer.encode("the model", add_special_tokens=False)
    found, expected = (lm.loglikelihood(requests, disable_tqdm=True) for lm in (ours, stock))
    assert [f[1] for f in found] == [e[1] for e in expected]
    assert [f[0] for f in found] == pytest.approx([e[0] for e in expected], rel=1e-6)


def test_what_is_longer_than_the_positions_loses_its_beginning(tokenizer, sentences):
    from lm_eval.api.instance import Instance

    from pipeline.task_model import TaskModel

    model, positions = made(tokenizer, 12), 12
    text = " ".join(sentences[:3])
    ids = tokenizer.encode(text)
    requests = [
        Instance("loglikelihood", {}, (text, " peak"), 0),  # stock lm-eval warns
        Instance("loglikelihood", {}, ("the", f" {text}"), 0),  # ... and ends in an assertion
        Instance("loglikelihood", {}, ("  ", "the"), 0),  # ... and here, too
    ]
    asked = TaskModel(model, tokenizer, name="", batch_size=4, after_batch=lambda: None)
    found = asked.loglikelihood(requests)
    assert asked.cut == 2
    context, word = pair(tokenizer, text, " peak")
    kept = context[len(word) - positions - 1 :]
    assert found[0][0] == pytest.approx(log_likelihood(model, kept, word)[0], rel=1e-6)
    context, rest = pair(tokenizer, "the", f" {text}")
    total, half = 0.0, positions // 2
    for start in range(0, len(rest), half):
        part = rest[start : start + half]
        before = (context + rest[:start])[len(part) - positions - 1 :]
        total += log_likelihood(model, before, part)[0]
    assert len(ids) > positions and found[1][0] == pytest.approx(total, rel=1e-6)
    alone = log_likelihood(model, [tokenizer.eos_token_id], tokenizer.encode("  the"))
    assert found[2][0] == pytest.approx(alone[0], rel=1e-6)


def test_neither_batch_nor_order_changes_a_number_and_a_limit_takes_the_first(
    folder, model, tokenizer, questions, sentences
):
    paths = [
        folder.task("choice", CHOICE, questions),
        folder.task("last", LAST_WORD, [{"text": text} for text in sentences]),
        folder.task("first", LAST_WORD, [{"text": text} for text in sentences[:7]]),
    ]
    done = []
    one = run_tasks(model, tokenizer, paths, batch_size=1, after_batch=lambda: done.append(1))
    other = run_tasks(model, tokenizer, paths[::-1], batch_size=64)
    assert len(done) > len(sentences)
    assert list(one) == ["choice", "last", "first"]
    for name, numbers in one.items():
        assert other[name] == pytest.approx(numbers, rel=1e-6)
    limited = run_tasks(model, tokenizer, paths[1:2], batch_size=8, limit=7)["last"]
    assert limited == pytest.approx(one["first"], rel=1e-6) and limited["samples"] == 7


def test_a_perplexity_per_word_may_be_infinite(folder, model, tokenizer):
    path = folder.task("spaceless", ROLLING, [{"text": "東京" * 200}, {"text": "مرحبا" * 200}])
    numbers = run_tasks(model, tokenizer, [path], batch_size=8)["spaceless"]
    assert numbers["word_perplexity"] == math.inf and numbers["bits_per_byte"] > 0


def test_nothing_else_is_changed(folder, model, tokenizer, sentences, capfd, caplog):
    """Not by the rules of a task that shuffles its documents, either, which always do the same."""
    (folder.path / "rules.py").write_text(
        "import random, numpy, torch\n"
        "def shuffled(documents):\n"
        "    random.random(), torch.rand(1)\n"
        "    return documents.select(numpy.random.permutation(len(documents))[:9])\n"
    )
    documents = [{"text": text} for text in sentences]
    path = folder.task("shuffled", LAST_WORD, documents)
    with Path(path).open("a") as file:
        file.write("process_docs: !function rules.shuffled\n")
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    parameters = [id(parameter) for parameter in model.parameters()]
    model.train()
    one = run_tasks(model, tokenizer, [path], batch_size=8)
    assert model.training and [id(p) for p in model.parameters()] == parameters
    model.eval()
    other = run_tasks(model, tokenizer, [path], batch_size=8)
    assert not model.training
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1] and np.random.get_state()[1].tolist() == states[2]
    assert one == other and one["shuffled"]["samples"] == 9
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if not record.name.startswith("pipeline.")]


def test_the_line_for_the_screen():
    numbers = {"acc": 0.25, "acc_stderr": 0.0123, "perplexity": 1234.5, "samples": 5153}
    assert sentence("one", numbers) == (
        "one: acc 0.2500 ± 0.0123, perplexity 1,234.50 (5,153 documents)"
    )


# -- sentences ------------------------------------------------------------------------------------

DOCUMENTS = [{"text": "the model reads"}, {"text": "the loss falls"}]


def refusal(*names: str, **options) -> str:
    with pytest.raises(InputError) as caught:
        check_tasks(list(names), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert refusal("hellaswag", "arc_easy") == (
        "tasks (hellaswag, arc_easy): they are run by lm-eval, which is not installed: "
        "pip install -e '.[tasks]'"
    )
    check_tasks([])


def test_with_one_that_is_too_old(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.4.9.2")
    assert refusal("hellaswag") == (
        "tasks: lm-eval is 0.4.9.2, and must be 0.4.12 or newer: pip install -e '.[tasks]'"
    )


def test_without_network():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert refusal("hellaswag") == (
        "task hellaswag: its data set Rowan/hellaswag is not here and cannot be fetched: Couldn't "
        "reach 'Rowan/hellaswag' on the Hub (OfflineModeIsEnabled); check the network and "
        "HF_HUB_OFFLINE, or give the path of a task file (.yaml) whose data lie beside it"
    )


def test_names_that_are_wrong():
    said = refusal("helaswag")
    assert said.startswith("task helaswag: lm-eval 0.4.")
    assert "has none of this name; did you mean hellaswag or " in said
    assert said.endswith("; a task of your own is given by its file, ending in .yaml")
    assert "did you mean" not in refusal("~~~~")
    assert refusal("arc_easy", "arc_easy") == "task arc_easy: is given twice"
    assert refusal("nowhere.yaml").startswith("nowhere.yaml: no such task file; looked in /")
    assert refusal("humaneval") == (
        "task humaneval: runs the code that the model writes (unsafe_code), which is not done "
        "here; leave it out"
    )


def test_two_files_of_the_same_task(folder):
    first = folder.task("one", LAST_WORD, DOCUMENTS)
    second = folder.task("two", LAST_WORD, DOCUMENTS, task="one")
    assert refusal(first, second) == f"task one: is in {first} and in {second}; leave out one"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("task: [x", "not YAML: "),
        ("- x", "a task file is a YAML mapping of task, dataset_path, ..."),
        ({"dataset_path": "json"}, "task: is missing; it is what the task is called"),
        ({"group": "x", "task": ["y"]}, "is a group of tasks; give the files of its tasks instead"),
        (
            {"task": "x", "doc_to_txt": "y"},
            "doc_to_txt: lm-eval knows no such key of a task; did you mean doc_to_text?",
        ),
        ({"task": "x", "output_type": "choice"}, "output_type: must be one of multiple_choice, "),
        ({"task": "x"}, "dataset_path: is missing; json reads the files that dataset_kwargs."),
        ({"task": "x", "dataset_path": "json"}, "test_split: is missing; it names the split of "),
        ({"task": "x", **SPLIT}, "doc_to_text: is missing; it is a column of the data, or a "),
        ({"task": "x", "include": "broken.yaml"}, "includes itself"),
        ({"task": "x", "unsafe_code": True}, "runs the code that the model writes (unsafe_code)"),
    ],
)  # fmt: skip
def test_a_broken_file(folder, content, said):
    path = folder.file("broken", content)
    assert said in refusal(path) and path in refusal(path)


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (
            {"dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}},
            "its data_files cannot be read: Unable to find ",
        ),
        ({"test_split": "held_out"}, "test_split: 'held_out' is not in its data (test)"),
        ({"doc_to_text": "{{words.nowhere}}"}, "cannot be read: 'words' is undefined (Undefined"),
        (CHOICE, "doc_to_choice: 'choices' is neither a column of its data (text) nor a template"),
        (
            {"metric_list": [{"metric": "accuracy", "aggregation": "mean"}]},
            "its metric accuracy is none of lm-eval's own; one of that name on the Hub would be a ",
        ),
        (
            {"doc_to_text": "!function nowhere.rules"},
            "a package that it needs is missing: No module named 'nowhere' (ModuleNotFoundError)",
        ),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_its_data(folder, rules, said):
    path = folder.task("other", LAST_WORD | rules, DOCUMENTS)
    Path(path).write_text(Path(path).read_text().replace("'!function nowhere.rules'",
                                                         "!function nowhere.rules"))  # fmt: skip
    assert refusal(path).startswith(f"task {path}: {said}")


def test_data_that_are_broken(folder):
    path = folder.task("torn", LAST_WORD, DOCUMENTS)
    (folder.path / "torn.jsonl").write_text("{")
    assert "its data_files cannot be read: JSON parse error" in refusal(path)
    (folder.path / "torn.jsonl").write_text("")
    assert "its data_files cannot be read: " in refusal(path)


def test_more_is_to_be_written_than_there_are_positions(folder, tokenizer):
    path = folder.task("long", WRITING, [{"text": "the", "answer": "a"}])
    said = (
        "task long: lets the model write up to 6 tokens, and the model has 6 positions for them "
        "and what stands before; leave the task out, or lower max_gen_toks in a task file of your "
        "own"
    )
    assert refusal(path, positions=6) == said
    check_tasks([path], positions=7)
    with pytest.raises(InputError, match="has 6 positions for them"):
        run_tasks(made(tokenizer, 6), tokenizer, [path], batch_size=1)


def test_rules_that_fail_and_memory_that_does_not_suffice(folder, model, tokenizer, monkeypatch):
    path = folder.task("torn", LAST_WORD, DOCUMENTS, process_results="nothing")
    check_tasks([path])

    def fail(*given, **more):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("pipeline.task_model.TaskModel._scored", fail)
    with pytest.raises(InputError) as caught:
        run_tasks(model, tokenizer, [path], batch_size=2)
    assert str(caught.value) == (
        f"task {path}: cannot be run: division by zero (ZeroDivisionError)"
    )

    def full(*given, **more):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("pipeline.task_model.TaskModel._scored", full)
    with pytest.raises(InputError, match="2 texts in one forward pass do not fit into memory"):
        run_tasks(model, tokenizer, [path], batch_size=2)


def test_paths_are_looked_for_beside_the_file_and_where_one_stands(folder, monkeypatch, tokenizer):
    path = folder.task("here", LAST_WORD, DOCUMENTS)
    (folder.path / "elsewhere").mkdir()
    moved = folder.path / "elsewhere" / "here.yaml"
    Path(path).rename(moved)
    monkeypatch.chdir(folder.path)
    check_tasks([str(moved)])


def test_data_in_a_folder_and_from_a_function(folder, model, tokenizer):
    documents = "".join(f"{json.dumps(document)}\n" for document in DOCUMENTS)
    (folder.path / "json").mkdir()  # of a builder's name
    (folder.path / "json" / "test.jsonl").write_text(documents)
    (folder.path / "make.py").write_text(
        "import datasets\n"
        f"def documents(**_):\n    return {{'test': datasets.Dataset.from_list({DOCUMENTS})}}\n"
    )
    inside = {"task": "inside", **SPLIT, **LAST_WORD, "dataset_path": "json"}
    made_up = folder.file("made", {"task": "made", "test_split": "test", **LAST_WORD})
    with Path(made_up).open("a") as file:
        file.write("custom_dataset: !function make.documents\n")
    paths = [folder.file("inside", inside), made_up, folder.task("named", LAST_WORD, DOCUMENTS)]
    found = run_tasks(model, tokenizer, paths, batch_size=2)
    assert found["inside"] == found["made"] == found["named"]


@pytest.mark.slow
def test_the_names_are_those_of_lm_evals_index():
    from lm_eval.tasks import TaskManager

    from pipeline.task_files import known_names

    known, index = known_names(), TaskManager().task_index
    assert set(index) <= set(known) and len(known) < len(index) + 10
    for name, entry in index.items():
        is_task = entry.kind.name in ("TASK", "PY_TASK")
        assert known[name] == (entry.yaml_path if is_task else None), name


# -- while training -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task_files(tmp_path_factory, questions, sentences) -> list[str]:
    folder = Folder(tmp_path_factory.mktemp("tasks"))
    return [
        folder.task("choice", CHOICE, questions),
        folder.task("last", LAST_WORD, [{"text": text} for text in sentences]),
    ]


def with_tasks(files: list[str], **more) -> dict:
    return {
        "evaluation__tasks": files, "evaluation__tasks_steps": 5, "training__max_steps": 12,
        "training__eval_steps": 4, "training__logging_steps": 2, "training__save_steps": 4,
        "training__save_total_limit": 5, "model__config__resid_pdrop": 0.2,
    } | more  # fmt: skip


def task_logs(trainer) -> dict[int, dict[str, float]]:
    return {
        entry["step"]: {k: v for k, v in entry.items() if k.startswith("eval_task_")}
        for entry in trainer.history
        if any(key.startswith("eval_task_") for key in entry)
    }


@pytest.fixture(scope="module")
def straight(smoke_recipe, tmp_path_factory, task_files):
    folder = tmp_path_factory.mktemp("straight") / "run"
    return trained(make_trainer(smoke_recipe, folder, **with_tasks(task_files)))


def test_tasks_are_logged_and_change_nothing_of_a_run(smoke_recipe, tmp_path, task_files, straight):
    """Not with dropout, and not the log of the update after which they run."""
    options = with_tasks(task_files)
    plain = {k: v for k, v in options.items() if not k.startswith("evaluation__tasks")}
    other = trained(make_trainer(smoke_recipe, tmp_path / "plain", **plain))
    assert equal(weights(straight), weights(other))
    found = task_logs(straight)
    assert list(found) == [5, 10]
    assert set(found[5]) == {
        f"eval_task_{name}"
        for name in (
            "choice_acc", "choice_acc_stderr", "choice_acc_norm", "choice_acc_norm_stderr",
            "choice_samples", "last_perplexity", "last_perplexity_stderr", "last_acc",
            "last_acc_stderr", "last_samples",
        )
    }  # fmt: skip
    assert found[5] != found[10]
    straight.save_result()
    at_the_end = measured_tasks(straight.recipe, straight.args, straight.processing_class)
    expected = run_tasks(straight.model, straight.processing_class, task_files, batch_size=8)
    assert at_the_end["last"] == pytest.approx(expected["last"], rel=1e-5)
    own = [entry for entry in logs(straight) if not any("eval_task_" in key for key in entry)]
    assert own == logs(other)


def test_they_are_shown_and_are_no_update(
    smoke_recipe, tmp_path, task_files, monkeypatch, capsys, caplog
):
    from pipeline import evaluating as room

    def looked_at(*given, **more):
        is_paused.append(run._clock._paused_at is not None)
        return run_tasks(*given, **more)

    is_paused = []
    monkeypatch.setattr(room, "run_tasks", looked_at)
    options = with_tasks(task_files[:1], training__max_steps=3, evaluation__tasks_limit=4)
    options["evaluation__tasks_steps"] = 2
    run = make_trainer(smoke_recipe, tmp_path, **options, faults__grace_seconds=1e-6)
    trained(run)
    shown = capsys.readouterr().out
    assert "update 2/3: choice: acc 0." in shown and "(4 documents)" in shown
    assert is_paused == [True] and run._spent["evaluation_seconds"] > 0
    assert "goes back to the checkpoint before; lower evaluation.tasks_limit" in caplog.text


def test_a_resumed_run_is_the_uninterrupted_one(smoke_recipe, tmp_path, task_files, straight):
    folder = cut_back(Path(straight.args.output_dir), tmp_path / "run", 8)
    resumed = trained(make_trainer(smoke_recipe, folder, **with_tasks(task_files)), "must")
    assert task_logs(resumed) == task_logs(straight)
    assert_ended_the_same(resumed, straight)


@pytest.mark.slow
def test_a_task_that_cannot_be_run_does_not_end_a_run(
    smoke_recipe, tmp_path, task_files, monkeypatch, caplog
):
    from pipeline import evaluating as room

    def failing(model, tokenizer, names, **options):
        if names == task_files[:1]:
            raise InputError("task choice: cannot be run: for a test")
        return run_tasks(model, tokenizer, names, **options)

    monkeypatch.setattr(room, "run_tasks", failing)
    run = trained(make_trainer(smoke_recipe, tmp_path, **with_tasks(task_files)))
    assert caplog.text.count("cannot be run: for a test; the run goes on without it") == 1
    assert [set(k.split("_")[2] for k in found) for found in task_logs(run).values()] == [
        {"last"}, {"last"},
    ]  # fmt: skip
    monkeypatch.setattr("pipeline.results.run_tasks", failing)
    run.save_result()
    assert set(measured_tasks(run.recipe, run.args, run.processing_class)) == {"last"}
    assert caplog.text.count("cannot be run: for a test; the final numbers are without it") == 1


def test_a_task_is_looked_at_before_anything_is_prepared(smoke_recipe, tmp_path):
    from pipeline import pretrain

    argv = ["--config", str(smoke_recipe), "--training.output_dir", str(tmp_path / "run")]
    argv += ["--evaluation.tasks", "hellaswag", "--evaluation.tasks_steps", "5"]
    with pytest.raises(InputError, match="task hellaswag: its data set Rowan/hellaswag is not"):
        pretrain.main(argv)
    assert not (tmp_path / "run" / "blocks").exists()


@pytest.mark.parametrize("given", ["a, b,c.yaml", ["a", "b,c.yaml"], ["a", "b", "c.yaml"]])
def test_tasks_in_a_recipe(smoke_recipe, given):
    values = {"evaluation.tasks": given, "evaluation.tasks_steps": 5}
    section = read_recipe(smoke_recipe, values).evaluation
    assert section.tasks == ["a", "b", "c.yaml"] and section.tasks_limit is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"tasks": "a"}, "evaluation.tasks needs evaluation.tasks_steps: the updates after which"),
        ({"tasks_steps": 5}, "evaluation.tasks_steps has a meaning with evaluation.tasks only"),
        ({"tasks_limit": 5}, "evaluation.tasks_limit has a meaning with evaluation.tasks only"),
        ({"tasks": {"a": 1}, "tasks_steps": 5}, "--evaluation.tasks: input should be a valid list"),
        ({"tasks": "a", "tasks_steps": 0}, "--evaluation.tasks_steps: input should be greater"),
    ],
)  # fmt: skip
def test_tasks_that_a_recipe_cannot_have(smoke_recipe, values, said):
    with pytest.raises(InputError) as caught:
        read_recipe(smoke_recipe, {f"evaluation.{key}": value for key, value in values.items()})
    assert said in str(caught.value)


@pytest.mark.slow
def test_a_compiled_model_is_not_compiled_for_them(smoke_recipe, tmp_path, task_files):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    options = with_tasks(task_files, training__torch_compile="true", training__eval_strategy="no")
    options["training__torch_compile_backend"] = "eager"  # graphs are counted, and need no code
    run = trained(make_trainer(smoke_recipe, tmp_path, **options))
    assert list(task_logs(run)) == [5, 10]
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("is_divided", [False, True], ids=["DDP", "FSDP2"])
def test_of_several_processes_one_runs_them_and_the_others_wait(
    smoke_recipe, tmp_path, task_files, is_divided
):
    """For longer than a process may be silent; where they share the weights, on a copy."""
    from forked import divide_weights, forked, history, start_ranks

    from pipeline import evaluating as room

    def hook(rank: int) -> None:
        def slow(model, tokenizer, names, *, after_batch, **options):
            assert rank == 0
            for _ in range(6):
                time.sleep(0.5)
                after_batch()
            return run_tasks(model, tokenizer, names, after_batch=after_batch, **options)

        room.run_tasks = slow
        if is_divided:
            divide_weights()

    folder = tmp_path / "run"
    argv = ["--config", str(smoke_recipe), "--training.output_dir", str(folder)]
    argv += ["--training.use_cpu", "true", "--training.max_steps", "4", "--faults.hang_seconds"]
    argv += ["1.5", "--evaluation.tasks", *task_files]
    argv += ["--evaluation.tasks_steps", "3"]
    with forked() as starter:
        log = tmp_path / "log"
        pids = start_ranks(starter, 2, argv, log, hook)
        codes = [starter.code(pid) for pid in pids]
        said = [log.with_name(f"log.{rank}").read_text() for rank in (0, 1)]
    assert codes == [0, 0], "\n".join(said)
    assert said[0].count(": choice: acc ") == 1 and "choice" not in said[1]
    steps = [e["step"] for e in history(folder / "checkpoint-4") if "eval_task_choice_acc" in e]
    assert steps == [3]
    numbers = json.loads((folder / "metrics.json").read_text())["tasks"]
    assert set(numbers) == {"choice", "last"} and 0 <= numbers["choice"]["acc"] <= 1


def test_answers_that_are_no_choices_are_refused(folder, questions):
    """lm-eval counts every such row as wrong without a word."""
    texts = [row | {"answer": "neither"} for row in questions]
    with pytest.raises(InputError, match="doc_to_target of row 0 is 'neither', which is none of"):
        check_tasks([folder.task("text", CHOICE, texts)])
    far = [*questions[:2], questions[2] | {"answer": 9}]
    with pytest.raises(InputError, match="doc_to_target of row 2 is 9, which is none of its"):
        check_tasks([folder.task("far", CHOICE, far)])


def test_a_task_of_one_s_own_has_a_name_of_its_own(folder, questions):
    with pytest.raises(InputError, match="task: 'hellaswag' is the name of one of lm-eval's own"):
        check_tasks([folder.task("hellaswag", CHOICE, questions)])
