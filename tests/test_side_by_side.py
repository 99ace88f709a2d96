"""Models side by side, and the door that shows them."""

import json
import math
import shlex
import shutil
import subprocess
import sys

import datasets
import oracle
import pytest
from conftest import ROOT, make_texts, roughened
from transformers import GPT2LMHeadModel

from pipeline import measure_perplexity
from pipeline.json_file import check_target, write
from pipeline.measuring import measure_texts
from pipeline.model import build_model, load_model
from pipeline.recipe import InputError, ModelSection
from pipeline.side_by_side import said_as_options, table
from pipeline.tokenizer import load_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory, texts, tokenizer):
    """Two models of one tokenizer, one of them rougher, and one of another vocabulary."""
    folder = tmp_path_factory.mktemp("models")
    other = train_tokenizer(texts, vocab_size=300)
    for name, fits, scale in (("a", tokenizer, 0.02), ("b", tokenizer, 0.4), ("c", other, 0.02)):
        section = ModelSection(config={"n_layer": 1, "n_head": 2, "n_embd": 32})
        model = build_model(section, fits, block_size=16, seed=0)
        roughened(model, scale).save_pretrained(folder / name)
        fits.save_pretrained(folder / name)
    return {name: str(folder / name) for name in "abc"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for number, text in enumerate(make_texts(30, seed=4)):
        (folder / f"{number:02}.txt").write_text(text[:300])
    return folder


def shown(capsys, *argv):
    measure_perplexity.main(list(argv))
    return capsys.readouterr().out


def test_one_model_is_shown_and_kept(models, files, tmp_path, capsys):
    target = tmp_path / "numbers.json"
    out = shown(capsys, "--model", models["a"], "--files", str(files), "--json", str(target))
    found = json.loads(target.read_text())
    texts = [path.read_text() for path in sorted(files.iterdir())]
    expected = measure_texts(
        texts, load_model(models["a"]), load_tokenizer(models["a"]), joined=True
    ).numbers()
    numbers = found["models"][models["a"]]
    assert {name: numbers[name] for name in expected} == expected
    assert found["text"]["documents"] == 30 and found["text"]["joined"] is True
    assert len(found["text"]["fingerprint"]) == 64
    assert "torch" in found["versions"] and "git_commit" in found
    assert found["options"] == {"files": [str(files)]}
    low, high = expected["confidence_intervals"]["perplexity"]
    rows = dict(line.split(maxsplit=1) for line in out.splitlines()[1:-1])
    assert rows["perplexity"] == f"{expected['perplexity']:,.6g} [{low:.5g}, {high:.5g}]"
    assert rows["tokens"] == f"{expected['tokens']:,}"
    assert "30 document(s), laid end to end, as in training" in out
    assert "95 % intervals, by bootstrap over the documents" in out and "too narrow" not in out


def test_several_models_stand_side_by_side_with_marks(models, files, tmp_path, capsys):
    target = tmp_path / "numbers.json"
    out = shown(
        capsys, "--model", models["b"], models["a"], "--files", str(files), "--json", str(target)
    )
    found = json.loads(target.read_text())["models"]
    assert list(found) == [models["b"], models["a"]]
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    for name in ("perplexity", "bits_per_byte", "word_perplexity"):
        ends = [found[models[m]]["confidence_intervals"][name] for m in "ba"]
        assert ends[0][0] > ends[1][1]  # else the test shows nothing
        assert " <" in lines[name] and lines[name].rstrip().endswith("*")
    assert "* best; < its interval does not overlap with the best one's" in out
    assert "the tokenizers differ" not in out


def test_models_that_are_alike_get_no_mark(models, files, tmp_path, capsys):
    twin = tmp_path / "twin"
    model = roughened(load_model(models["a"]), 1e-4)
    model.save_pretrained(twin)
    load_tokenizer(models["a"]).save_pretrained(twin)
    out = shown(capsys, "--model", models["a"], str(twin), "--files", str(files))
    line = next(line for line in out.splitlines() if line.startswith("bits_per_byte"))
    assert line.count("*") == 1 and "<" not in line


def test_across_tokenizers_only_what_is_comparable_is_compared(models, files, capsys):
    """Bytes per token and bits per byte of two vocabularies on the same text."""
    out = shown(capsys, "--model", models["a"], models["c"], "--files", str(files))
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "*" in lines["bits_per_byte"] and "*" in lines["word_perplexity"]
    assert "*" not in lines["perplexity"] + lines["nats_per_token"] + lines["accuracy"]
    assert "what is per token cannot be compared, bits per byte" in out
    per_token = [float(value) for value in lines["bytes_per_token"].split()[1:]]
    assert per_token[0] > per_token[1]  # the larger vocabulary's tokens are longer
    # What was scored is the same text but for the first token, which has no context.
    sizes = [int(value.replace(",", "")) for value in lines["bytes"].split()[1:]]
    assert abs(sizes[0] - sizes[1]) < 20


@pytest.mark.parametrize("kind", ["jsonl", "csv", "separated", "joined", "data set"])
def test_any_source_of_text_can_be_scored(models, tmp_path, capsys, kind):
    texts = [text[:200] for text in make_texts(5, seed=7)]
    rows = datasets.Dataset.from_dict({"content": texts})
    target = tmp_path / "numbers.json"
    options = ["--text_column", "content"]
    if kind in ("jsonl", "joined"):
        rows.to_json(tmp_path / "t.jsonl")
        options += ["--files", str(tmp_path / "t.jsonl")]
    if kind == "joined":
        options += ["--join_rows", "true", "--separator", "\\n\\n"]
        texts = ["\n\n".join(texts)]
    elif kind == "csv":
        rows.to_csv(tmp_path / "t.csv")
        options += ["--files", str(tmp_path / "t.csv")]
    elif kind == "separated":
        (tmp_path / "t.txt").write_text("<end>".join(texts))
        options = ["--files", str(tmp_path / "t.txt"), "--separator", "<end>"]
    elif kind == "data set":
        (tmp_path / "set").mkdir()
        rows.to_parquet(tmp_path / "set" / "t.parquet")
        options += ["--dataset", str(tmp_path / "set")]
    shown(capsys, "--model", models["a"], *options, "--json", str(target))
    found = json.loads(target.read_text())["models"][models["a"]]
    model = load_model(models["a"])
    expected = measure_texts(texts, model, load_tokenizer(models["a"]), joined=True).numbers()
    assert found["perplexities"] == pytest.approx(expected["perplexities"], rel=1e-6)
    assert found["bytes"] == expected["bytes"] and found["documents"] == len(texts)


def test_texts_by_themselves_are_said_and_follow_from_the_options(models, files, capsys):
    first = ["--model", models["a"], "--files", str(files)]
    for options in (["--joined", "false"], ["--packed"], ["--target", "last_word"]):
        out = shown(capsys, *first, *options)
        assert "each by itself" in out.splitlines()[0]
    assert "last_word_accuracy" in out


def test_few_documents_and_one(models, files, capsys):
    some = [str(files / f"{number:02}.txt") for number in range(3)]
    out = shown(capsys, "--model", models["a"], "--files", *some)
    assert "with fewer than 20 documents they are too narrow" in out
    out = shown(capsys, "--model", models["a"], "--files", some[0])
    assert "one document: no interval" in out and "[" not in out


def test_held_out_text_of_a_run_is_scored_again(finished_run, tmp_path, capsys):
    metrics = json.loads((finished_run / "metrics.json").read_text())
    target = tmp_path / "numbers.json"
    for split, prefix in (("validation", "eval"), ("test", "test")):
        shown(
            capsys, "--model", str(finished_run), "--held_out", str(finished_run),
            "--split", split, "--json", str(target),
        )  # fmt: skip
        found = json.loads(target.read_text())["models"][str(finished_run)]
        for name in ("perplexity", "bits_per_byte", "accuracy", "word_perplexity"):
            assert found[name] == pytest.approx(metrics[f"{prefix}_{name}"], rel=1e-6)
        for name in ("tokens", "bytes", "words", "documents"):
            assert found[name] == metrics[f"{prefix}_{name}"]
        ends = metrics[f"{prefix}_confidence_intervals"]["bits_per_byte"]
        assert found["confidence_intervals"]["bits_per_byte"] == pytest.approx(ends, rel=1e-6)


def test_a_text_of_one_giant_document_is_read_in_pieces(models, tmp_path, capsys, monkeypatch):
    """The reader's windows and the groups of windows are smaller than the text by far."""
    monkeypatch.setattr("pipeline.text_files.WINDOW", 500)
    monkeypatch.setattr("pipeline.text_pieces.ENCODED_TOGETHER", 700)
    monkeypatch.setattr("pipeline.windows.SORTED_TOGETHER", 64)
    text = "".join(make_texts(12, seed=3))
    (tmp_path / "giant.txt").write_text(text)
    model, tokenizer = load_model(models["a"]), load_tokenizer(models["a"])
    for joined in ("true", "false"):
        shown(
            capsys, "--model", models["a"], "--files", str(tmp_path / "giant.txt"),
            "--joined", joined, "--json", str(tmp_path / "n.json"),
        )  # fmt: skip
        found = json.loads((tmp_path / "n.json").read_text())["models"][models["a"]]
        with monkeypatch.context() as whole:
            whole.setattr("pipeline.text_pieces.ENCODED_TOGETHER", 1 << 20)
            whole.setattr("pipeline.windows.SORTED_TOGETHER", 1 << 20)
            expected = measure_texts([text], model, tokenizer, joined=joined == "true").numbers()
        assert found["nats_per_token"] == pytest.approx(expected["nats_per_token"], rel=1e-6)
        for name in ("tokens", "bytes", "words"):
            assert found[name] == expected[name]


def test_tasks_alone_need_no_text(models, capsys, monkeypatch):
    asked = []

    def run(model, tokenizer, names, **options):
        assert isinstance(model, GPT2LMHeadModel)
        asked.append((names, options))
        return {"hellaswag": {"acc": 0.25, "acc_stderr": 0.01}}

    monkeypatch.setattr("pipeline.side_by_side.check_tasks", lambda names: None)
    monkeypatch.setattr("pipeline.side_by_side.run_tasks", run)
    out = shown(
        capsys, "--model", models["a"], "--tasks", "hellaswag,arc_easy", "--tasks_limit", "5"
    )
    assert asked == [(["hellaswag", "arc_easy"], {"batch_size": 8, "limit": 5})]
    assert "hellaswag acc" in out and "0.25" in out


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--model", "A"], "give the text by exactly one of --files, --dataset and --held_out"),
        (["--model", "A", "--files", "x", "--held_out", "y"], "give the text by exactly one of"),
        (["--files", "x"], "--model is required"),
        (["--model", "A", "A", "--files", "x"], "--model names the same model twice"),
        (["--model", "A", "--files", "a.txt", "a.txt"], "--files names the same file twice"),
        (["--model", "A", "--files", ""], "--files: an empty name; name a file, a folder or"),
        (["--model", "a.txt", "--files", "a.txt"], "a.txt: is a file; give its folder, ."),
        (["--model", "A", "--files", "nowhere.txt"], "nowhere.txt: no such file; looked in"),
        (["--model", "A", "--files", "empty.txt"], "empty.txt: the file is empty"),
        (["--model", "A", "--files", "bytes.txt"], "--errors replace"),
        (["--model", "A", "--files", "t.jsonl"], "set --text_column"),
        (["--model", "A", "--files", "blank.jsonl"], "the text has no token to predict"),
        (["--model", "A", "--held_out", "."], "--held_out .: no run of ours (config.yaml is m"),
        (["--model", ".", "--files", "a.txt"], ".: no model in this folder"),
        (
            ["--model", "A", "--files", "a.txt", "--stride", "0"],
            "--stride: input should be greater",
        ),
        (["--model", "A", "--files", "a.txt", "--stride", "16"], "stride is 16: windows of 16"),
        (["--model", "A", "--files", "a.txt", "--target", "first"], "--target: input should be"),
        (
            ["--model", "A", "--files", "a.txt", "--joined", "true", "--packed"],
            "have a meaning for texts each by itself only",
        ),
        (["--model", "A", "--files", "a.txt", "--json", "no/n.json"], "no/n.json: cannot be writ"),
    ],
)
def test_mistakes_are_one_sentence(models, tmp_path, monkeypatch, argv, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "a.txt").write_text("the model reads text")
    (tmp_path / "bytes.txt").write_bytes(b"ok \xff")
    (tmp_path / "t.jsonl").write_text('{"content": "the model"}\n')
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(InputError) as caught:
        measure_perplexity.main([models["a"] if word == "A" else word for word in argv])
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
    assert "data." not in str(caught.value)


def test_where_numbers_go_is_checked_before_the_work(tmp_path):
    check_target(None)
    check_target(str(tmp_path / "numbers.json"))
    (tmp_path / "old.json").write_text("{}")
    check_target(str(tmp_path / "old.json"))
    with pytest.raises(InputError, match="no/numbers.json: cannot be written"):
        check_target(str(tmp_path / "no" / "numbers.json"))
    (tmp_path / "book.txt").write_text("my book")
    with pytest.raises(InputError, match="book.txt: holds something other than JSON"):
        check_target(str(tmp_path / "book.txt"))
    assert (tmp_path / "book.txt").read_text() == "my book"


def test_infinite_numbers_can_be_shown():
    numbers = {"perplexity": math.inf, "tokenizer_fingerprint": "x", "confidence_intervals": {}}
    text = {"source": "t", "documents": 1, "joined": True}
    assert "inf" in table({"models": {"m": numbers}, "text": text})


@pytest.mark.slow
@pytest.mark.parametrize("joined", ["true", "false"])
def test_two_processes_give_the_numbers_of_one(models, files, tmp_path, capsys, joined):
    """Started by torchrun, on gloo; the number of batches is odd, so that the shares differ."""
    options = [
        "--model", models["b"], "--files", str(files), "--joined", joined, "--stride", "7",
        "--batch_size", "5", "--json",
    ]  # fmt: skip
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
            "pipeline/measure_perplexity.py", *options, str(tmp_path / "two.json"),
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bits_per_byte") == 1
    shown(capsys, *options, str(tmp_path / "one.json"))
    files = (tmp_path / "one.json", tmp_path / "two.json")
    found = [json.loads(file.read_text())["models"][models["b"]] for file in files]
    one, two = found
    assert two["perplexities"] == pytest.approx(one["perplexities"], rel=1e-9)
    for name, value in one.items():
        if isinstance(value, int | float):
            assert two[name] == pytest.approx(value, rel=1e-9)


# -- the README's commands for published numbers, on a small local model ---------------------------


def readme_options(words: str) -> list[str]:
    """Return the options that the README's table gives after this name of a data set."""
    text = (ROOT / "README.md").read_text()
    (line,) = [line for line in text.splitlines() if f"`--dataset {words} " in line]
    return shlex.split(line[line.index("`--dataset") + 1 :].split("`")[0])


def run_as_in_readme(words, rows, models, folder, capsys):
    """Run that command on a local data set of the same form, and return the numbers."""
    options = readme_options(words)
    column = options[options.index("--text_column") + 1] if "--text_column" in options else "text"
    (folder / "set").mkdir()
    datasets.Dataset.from_dict({column: rows}).to_parquet(folder / "set" / "test.parquet")
    options[1] = str(folder / "set")
    if "--dataset_config" in options:
        place = options.index("--dataset_config")
        del options[place : place + 2]
    target = folder / "numbers.json"
    shown(capsys, "--model", models["b"], *options, "--json", str(target))
    return json.loads(target.read_text())["models"][models["b"]]


def test_the_command_for_wikitext_2(models, tmp_path, capsys):
    rows = ["", " = the model = \n", "", " It reads text , and learns ( 1 @.@ 5 ) rows . \n"] * 3
    found = run_as_in_readme("Salesforce/wikitext", rows, models, tmp_path, capsys)
    model, tokenizer = load_model(models["b"]), load_tokenizer(models["b"])
    ids = oracle.ids_of("\n\n".join(rows), tokenizer) + [tokenizer.eos_token_id]
    nats = [n for n, _ in oracle.scores(oracle.in_fp64(model), ids, 16, 15).values()]
    assert found["tokens"] == len(nats) == len(ids) - 1
    assert found["perplexity"] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-6)


def test_the_command_for_detokenised_wikitext(models, tmp_path, capsys):
    pages = [" = the model = \n \n It reads text , and rows . \n", " = text = \n of ids @-@ 2 . \n"]
    put_back = [" = the model =\n\nIt reads text, and rows.\n", " = text =\nof ids-2.\n"]
    found = run_as_in_readme("EleutherAI/wikitext_document_level", pages, models, tmp_path, capsys)
    model, tokenizer = load_model(models["b"]), load_tokenizer(models["b"])
    each = oracle.by_text(model, put_back, tokenizer, 16, 15)
    expected = oracle.numbers(each, pages)
    for name in ("word_perplexity", "bits_per_byte", "perplexity"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6)


def test_the_command_for_lambada(models, tmp_path, capsys):
    texts = ["the model reads text and learns what comes next", "a row of ids is a line of bytes"]
    found = run_as_in_readme("EleutherAI/lambada_openai", texts, models, tmp_path, capsys)
    model, tokenizer = load_model(models["b"]), load_tokenizer(models["b"])
    plain, nats, exact = oracle.in_fp64(model), 0.0, []
    for text in texts:
        context, word = text.rsplit(" ", 1)
        target = oracle.ids_of(f" {word}", tokenizer)
        ids = (oracle.ids_of(context, tokenizer) + target)[-16:]
        each = oracle.scores(plain, ids, 16, 15, len(ids) - len(target)).values()
        nats += sum(n for n, _ in each)
        exact.append(all(hit for _, hit in each))
    assert math.log(found["word_perplexity"]) == pytest.approx(nats / 2, rel=1e-6)
    assert found["last_word_accuracy"] == sum(exact) / 2


# -- corners ---------------------------------------------------------------------------------------


def test_the_text_of_a_run_is_its_own_wherever_the_run_lies(run_copy, finished_run, capsys):
    """The saved recipe names the folder in which the run was made."""
    rows = run_copy / "blocks" / "validation.arrow"
    first = shown(capsys, "--model", str(run_copy), "--held_out", str(run_copy))
    assert first.replace(str(run_copy), "") == shown(
        capsys, "--model", str(run_copy), "--held_out", str(finished_run)
    ).replace(str(finished_run), "")
    rows.unlink()
    with pytest.raises(InputError, match="its prepared rows are not whole: .*validation.arrow is"):
        measure_perplexity.main(["--model", str(run_copy), "--held_out", str(run_copy)])


def test_rows_of_another_tokenizer_are_not_the_run_s(models, run_copy):
    for path in run_copy.glob("tokenizer*.json"):
        shutil.copy(f"{models['c']}/{path.name}", path)
    with pytest.raises(InputError, match="are another run's: they were made with another tok"):
        measure_perplexity.main(["--model", models["c"], "--held_out", str(run_copy)])


def test_models_that_see_texts_differently_are_not_marked(models, files, tmp_path, capsys):
    apart = tmp_path / "apart"
    shutil.copytree(models["a"], apart)
    config = json.loads((apart / "config.json").read_text()) | {"attend_across": False}
    (apart / "config.json").write_text(json.dumps(config))
    out = shown(capsys, "--model", models["a"], str(apart), "--files", str(files))
    assert "*" not in out.replace("(* best", "") and "over other tokens: nothing is marked" in out


def test_a_start_token_that_is_not_wanted_means_texts_by_themselves(models, files, capsys):
    first = ["--model", models["a"], "--files", str(files)]
    assert "each by itself" in shown(capsys, *first, "--add_start_token", "false")


def test_sentences_speak_of_options_and_leave_paths_alone():
    with pytest.raises(InputError) as caught, said_as_options():
        raise InputError(
            "a/data.files/metadata.csv: set data.text_column, or --data.errors replace"
        )
    said = "a/data.files/metadata.csv: set --text_column, or --errors replace"
    assert str(caught.value) == said


def test_what_is_kept_is_json_whatever_the_numbers(tmp_path):
    write({"a": math.inf, "b": [math.nan, 1.5]}, str(tmp_path / "n.json"))
    found = json.loads((tmp_path / "n.json").read_text(), parse_constant=pytest.fail)
    assert found == {"a": None, "b": [None, 1.5]}


@pytest.mark.parametrize(
    "argv",
    [
        ["--files", "a.txt", "--split", "test"],
        ["--files", "a.txt", "--tasks_limit", "3"],
        ["--files", "a.txt", "--dataset_config", "x"],
        ["--held_out", "run", "--errors", "replace"],
        ["--tasks", "hellaswag", "--stride", "3"],
    ],
)
def test_options_without_a_meaning_are_refused(argv):
    with pytest.raises(InputError, match=f"{argv[2]} has no meaning with these options"):
        measure_perplexity.main(["--model", "m", *argv])
