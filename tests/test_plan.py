"""What the door says of recipes, budgets and ladders: numbers, tables, pictures, mistakes."""

import json
import math
import re
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

from pipeline import devices, memory_bound, plan, planning, scaling_laws
from pipeline.recipe import InputError, read_recipe
from pipeline.size_ladder import gpt3_batch_tokens
from pipeline.wording import short

SMALL = str(ROOT / "recipes" / "gpt2_small.yaml")
QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")


@pytest.fixture
def planned(tmp_path, capsys):
    """Ask the door, and return its JSON; the text is in `planned.text`."""

    def ask(*argv: str) -> dict:
        plan.main([*map(str, argv), "--json", str(tmp_path / "plan.json")])
        ask.text = capsys.readouterr().out
        return json.loads((tmp_path / "plan.json").read_text())

    return ask


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2_small", 124_439_808),
        ("gpt2_medium", 354_823_168),
        ("gpt2_large", 774_030_080),
        ("gpt2_xl", 1_557_611_200),
    ],
)
def test_gpt_2_has_so_many_parameters(planned, name, parameters):
    found = planned("--config", ROOT / "recipes" / f"{name}.yaml", "--hardware", "8xh100")
    assert found["model"]["parameters"] == parameters
    assert sum(found["parameters_by_part"].values()) == parameters
    assert f"{parameters:,}" in planned.text


def test_a_run_of_eight_gpus_in_numbers(planned):
    found = planned(
        "--config", SMALL, "--hardware", "8xh100", "--mfu", "0.5", "--price_per_hour", "2"
    )
    work, cost, laws, memory = (found[part] for part in ("work", "cost", "laws", "memory"))
    tokens = 524_288 * 19_073
    assert (work["updates"], work["tokens"]) == (19_073, tokens)
    each = 6 * 124_439_808 + 12 * 12 * 768 * 1024
    assert work["flops_per_token"] == each and work["flops"] == each * tokens
    assert work["flops_by_6nd"] == 6 * 124_439_808 * tokens
    head = work["exact_flops_per_token"] - work["exact_flops_per_token_without_head"]
    assert head == pytest.approx(6 * 50_257 * 768, rel=0.001)
    assert (memory["rows_per_device"], memory["devices"], memory["accumulation"]) == (32, 8, 2)
    assert memory["accelerate_config"] == "accelerate_configs/ddp.yaml"
    rate = 8 * 989.5e12 * 0.5 * cost["efficiency_low"]
    assert 0.95 < cost["efficiency_low"] < cost["efficiency_high"] < 1
    assert cost["training_seconds"] == pytest.approx(tokens * each / rate)
    assert cost["evaluations"] == 76
    evaluated = 76 * 1_048_576 + 20e6  # and at the end all of both held-out splits
    assert cost["evaluation_seconds"] == pytest.approx(evaluated * each / 3 / rate, rel=0.01)
    hours = cost["seconds"] / 3600 * 8
    assert cost["device_hours"] == pytest.approx(hours) and cost["price"] == pytest.approx(
        2 * hours
    )
    assert cost["kwh"] == pytest.approx(hours * (700 + 12) * 1.56 / 1000)
    assert laws["tokens_per_parameter"] == pytest.approx(tokens / 124_439_808)
    assert "more tokens than compute-optimal" in laws["verdict"]
    hoffmann = scaling_laws.HOFFMANN.loss(124_439_808, tokens)
    assert laws["predictions"]["Hoffmann"]["loss"] == hoffmann
    assert work["text_tokens"] == pytest.approx(0.998 * 10e9, rel=1e-6)
    assert f"{hours * 2:,.2f} for" in planned.text and "(assumed)" not in planned.text


def test_an_assumed_share_of_the_rate_is_said_with_its_source(planned):
    planned("--config", SMALL, "--hardware", "8xh100")
    assert "7,916 TFLOP/s at an MFU of 40.0% (assumed)" in planned.text
    assert "rate: NVIDIA H100 data sheet; MFU: llm.c on 8 x H100" in planned.text
    found = planned("--config", SMALL, "--hardware", "t4")
    assert "a little below the A100's" in found["cost"]["mfu_source"]
    assert any("precision: fp16 has 8 times fp32's rate" in note for note in found["notes"])


def test_what_is_not_compiled_takes_longer_by_what_was_measured(planned):
    asked = ("--config", SMALL, "--hardware", "h100")
    fast, slow = (planned(*asked, "--training.torch_compile", is_on) for is_on in ("true", "false"))
    assert slow["cost"]["mfu"] == pytest.approx(0.4 * 0.82)
    for part in ("seconds", "training_seconds", "evaluation_seconds", "device_hours", "kwh"):
        assert slow["cost"][part] == pytest.approx(fast["cost"][part] / 0.82)
    assert (
        "0.82 of it without training.torch_compile (124M on an A100" in slow["cost"]["mfu_source"]
    )
    stated = planned(*asked, "--mfu", "0.3", "--training.torch_compile", "false")["cost"]
    assert stated["mfu"] == 0.3 and stated["mfu_source"].endswith("MFU: stated by --mfu")


def test_the_quickstart_takes_two_minutes_of_what_it_was_measured_on(planned, monkeypatch):
    monkeypatch.setattr(devices, "cores", lambda: 2)
    monkeypatch.setattr(devices, "_best_rate", lambda precision, threads: 444.6e9)
    cost = planned("--config", QUICKSTART)["cost"]
    assert cost["mfu"] == 0.39 and cost["seconds"] == pytest.approx(125, abs=1.5)


@pytest.mark.parametrize("changes", [("--model.lora_r", "8"), ("--model.frozen_blocks", "6")])
def test_frozen_parts_save_nothing_of_an_evaluation(planned, changes):
    """A forward pass is 2 N + 4 L C T of all, whatever learns; LoRA's adapter comes on top."""
    asked = ("--config", ROOT / "recipes" / "gpt2_finetune.yaml", "--hardware", "h100")
    fine, part = planned(*asked), planned(*asked, *changes)
    assert part["work"]["flops"] < 0.95 * fine["work"]["flops"]
    scored, less = fine["cost"]["evaluation_seconds"], part["cost"]["evaluation_seconds"]
    assert scored == pytest.approx(less, rel=0.01) and scored > 0


def test_checkpointing_computes_the_forward_pass_twice(planned):
    asked = ("--config", SMALL, "--hardware", "h100")
    plain = planned(*asked)["cost"]["training_seconds"]
    again = planned(*asked, "--training.gradient_checkpointing", "true")["cost"]
    assert again["training_seconds"] == pytest.approx(plain * 4 / 3)
    assert any("0.75 of the speed" in note for note in again["notes"])


def test_a_model_far_smaller_than_the_mfu_s_is_told(planned):
    said = "the MFU is of models from 124 M parameters on: one of 1.07 M, with updates of"
    assert any(said in note for note in planned("--hardware", "8xh100")["notes"])
    for argv in (("--config", SMALL, "--hardware", "8xh100"), ("--config", QUICKSTART)):
        assert not any("the MFU is of models" in note for note in planned(*argv)["notes"])


def test_a_run_of_two_processes_on_a_cpu_is_planned_as_it_ran(planned, tmp_path):
    numbers = {
        "device": "cpu", "world_size": 2, "precision": "fp32", "threads": 8, "mfu": 0.4,
        "product_rate_flops": 1e12, "train_tokens_per_second": 9.0,
        "hardware": {"memory_bytes": 64e9},
    }  # fmt: skip
    (tmp_path / "metrics.json").write_text(json.dumps(numbers))
    found = planned("--config", QUICKSTART, "--hardware", tmp_path)
    memory, cost = found["memory"], found["cost"]
    assert memory["accelerate_config"] == "accelerate_configs/cpu_2.yaml"
    watts = 2 * 8 * 12 + 2 * memory["peak_bytes"] / 1e9 * 0.3725
    assert cost["kwh"] == pytest.approx(cost["seconds"] / 3600 * watts * 1.56 / 1000)


def test_no_torch_is_imported_for_an_answer(tmp_path):
    heavy = ("torch", "transformers", "datasets", "matplotlib", "scipy", "pyarrow")
    code = (
        "import sys; from pipeline import plan; "
        f"plan.main(['--config', {SMALL!r}, '--hardware', '8xh100']); "
        f"plan.main(['--budget', '8xh100 1d', '--recipe', {str(tmp_path / 'a.yaml')!r}]); "
        f"sys.exit(', '.join(set({heavy}) & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_as_typed(tmp_path):
    door = [sys.executable, "pipeline/plan.py"]
    done = subprocess.run(door, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "1,071,872" in done.stdout and not done.stderr
    helped = subprocess.run([*door, "--help"], capture_output=True, text=True, cwd=ROOT).stdout
    assert "--hardware" in helped and "--json str" in helped and "8xh100 24h" in helped
    wrong = subprocess.run([*door, "--hardware", "8xh10"], capture_output=True, text=True, cwd=ROOT)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: hardware: '8xh10'")
    assert wrong.stderr.count("\n") == 1


@pytest.mark.parametrize("hardware", ["cpu", "16xa100"])
@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "recipes").glob("*.yaml")))
def test_every_recipe_has_a_plan_that_fits_a_screen(name, hardware, capsys, monkeypatch, tmp_path):
    recipe = ROOT / "recipes" / name
    argv = ["--config", str(recipe), "--hardware", hardware]
    if files := [f for f in read_recipe(recipe).data.files or [] if not f.startswith("python:")]:
        monkeypatch.chdir(tmp_path)
        for file in files:
            (tmp_path / file).write_text("the model reads text. " * 20_000)
    if name.startswith("gpt2_xl") and hardware == "cpu":
        argv += ["--training.per_device_train_batch_size", "1"]
    try:
        plan.main(argv)
    except InputError as error:  # a small machine's CPU, or one row of an update for 16 devices
        assert "does not fit on" in str(error) and hardware == "cpu"
        return
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    heads = ["model", "work", "memory of each device", "time and cost", "scaling laws"]
    assert [line for line in lines if line in heads] == heads


def test_what_is_not_known_is_said(planned):
    found = planned(
        "--config", SMALL, "--data.dataset", "some/one", "--data.dataset_config", "null",
        "--training.max_steps", "null", "--tokenizer.pretrained", "some/tokenizer",
    )  # fmt: skip
    assert found["work"]["tokens"] is None and found["cost"]["seconds"] is None
    assert found["laws"] is None and found["cost"]["tokens_per_second"] > 0
    assert "some/one is not looked up on the Hub" in " ".join(planned.text.split())
    assert any("--training.max_steps N plans it" in note for note in found["notes"])
    assert any("vocabulary 50,257: assumed" in note for note in found["notes"])


def test_an_update_that_does_not_divide_is_warned_of(planned):
    found = planned("--config", SMALL, "--hardware", "7xh100")
    assert any("will be refused: tokens_per_update is 524288" in note for note in found["notes"])


def test_a_batch_that_does_not_fit_is_said_with_one_that_does(planned):
    found = planned(
        "--config", SMALL, "--hardware", "a10", "--training.per_device_train_batch_size", "64"
    )
    memory = found["memory"]
    assert not memory["is_fitting"] and "DOES NOT FIT" in planned.text
    assert f"per_device_train_batch_size {memory['largest_rows']} does" in found["notes"][0]
    fits = planned(
        "--config", SMALL, "--hardware", "a10", "--training.per_device_train_batch_size",
        str(memory["largest_rows"]),
    )  # fmt: skip
    assert fits["memory"]["is_fitting"]


@pytest.mark.parametrize("topology", ["ddp", "fsdp2", "zero2", "zero3"])
def test_memory_is_that_of_the_topology(planned, topology):
    found = planned(
        "--config", SMALL, "--hardware", "8xh100", "--topology", topology,
        "--training.gradient_checkpointing", "true",
    )["memory"]  # fmt: skip
    asked = {"rows": 32, "block_size": 1024, "devices": 8, "is_checkpointed": True}
    parts = memory_bound.memory_by_part(planning.SIZES["124M"], topology=topology, **asked)
    assert found["bytes_by_part"] == parts and found["peak_bytes"] == sum(parts.values())
    assert found["is_checkpointed"] and topology in planned.text


def test_a_finished_run_is_planned_from_its_own_rows_and_rates(planned, finished_run):
    config = str(finished_run / "config.yaml")
    metrics = json.loads((finished_run / "metrics.json").read_text())
    found = planned("--config", config, "--hardware", str(finished_run))
    assert found["work"]["text_source"].startswith("counted")
    manifest = json.loads((finished_run / "blocks" / "manifest.json").read_text())
    assert found["work"]["text_tokens"] == manifest["facts"]["train"]["rows"] * 32
    assert found["model"]["parameters"] == metrics["parameters"]
    assert found["work"]["flops_per_token"] == metrics["flops_per_token"]
    assert found["work"]["tokens"] == metrics["train_tokens"]
    rate = metrics["product_rate_flops"] * metrics["mfu"] / metrics["flops_per_token"]
    assert found["cost"]["tokens_per_second"] == pytest.approx(rate)
    assert "(assumed)" not in planned.text


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_plan_is_drawn(planned, tmp_path, ending):
    path = tmp_path / f"plan.{ending}"
    planned("--config", SMALL, "--hardware", "8xh100", "--picture", path, "--price_per_hour", "2")
    content = path.read_bytes()
    assert len(content) > 10_000
    assert content.startswith(b"\x89PNG" if ending == "png" else b"<?xml")


# -- budgets --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["8xh100 24h", "cpu 3h", "cpu 2min", "t4 6h", "64xh100 2d", "3xa100 90min"]
)
def test_a_budget_becomes_a_recipe_that_ends_in_time(planned, tmp_path, text):
    path = tmp_path / "budget.yaml"
    answered = planned("--budget", text, "--recipe", path)
    assert answered["recipe_file"] == str(path)
    devices, seconds = text.split()[0], answered["budget"]["seconds"]
    recipe = read_recipe(path)
    again = planned("--config", path, "--hardware", devices)
    assert 0.9 * seconds < again["cost"]["seconds"] <= seconds
    assert again["memory"]["is_fitting"] and not any("refused" in n for n in again["notes"])
    width, heads = recipe.model.config["n_embd"], recipe.model.config["n_head"]
    assert width == 64 * heads
    update = recipe.tokens_per_update
    assert update % (recipe.data.block_size * again["memory"]["devices"]) == 0
    assert update <= again["laws"]["critical_batch_tokens"]
    assert recipe.training["max_steps"] >= 100
    head = path.read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert again["memory"]["accelerate_config"] in head and "prepare_data.py" in head
    assert max(map(len, head.splitlines())) <= 100


@pytest.mark.parametrize(
    "text", ["8xh100 24h", "16xh100 3d", "512xh100 30d", "100000xb200 90d", "cpu 1min", "cpu 3h"]
)
def test_the_reasons_of_a_budget_are_those_of_its_plan(planned, tmp_path, text):
    answered = planned("--budget", text, "--recipe", tmp_path / "a.yaml")
    (size, update, *_), found = answered["reasons"], answered["plan"]
    work, count = found["work"], found["model"]["parameters"]
    assert f"{short(count)} parameters, {short(work['tokens'])} tokens, " in size
    assert f"{work['tokens'] / count:.3g} per parameter" in size
    assert size in " ".join((tmp_path / "a.yaml").read_text().replace("\n#  ", "").split())
    chosen = next(line for line in planned.text.splitlines() if "<- chosen" in line)
    assert short(work["tokens"]) in chosen and f"{work['epochs']:.3g} " in chosen
    others = re.findall(r"^  \d+ x \d+ .* (\+\d|least)", planned.text, re.MULTILINE)
    assert others.count("least") == 1 and len(others) >= 3  # none would have been better
    assert (f"it is read {work['epochs']:.3g} times" in size) == (work["epochs"] > 1)
    # More of python's own text is in its packages; of FineWeb there is no more than this.
    better = re.search(r"with enough of it (.*?) parameters would be best(.*)", size)
    assert not better or better[1] != short(count)
    assert not better or ("python:packages" in better[2]) == text.startswith("cpu")
    assert f"an update of {work['tokens_per_update']:,} tokens" in update
    most, *passed = update.split("; more than ")
    for said, is_kept in ((most, True), *((p, False) for p in passed)):
        if "GPT-3's for" in said:
            assert (work["tokens_per_update"] <= 1.01 * gpt3_batch_tokens(count)) == is_kept
        if "critical batch" in said and "cpu" not in text:
            critical = found["laws"]["critical_batch_tokens"]
            assert (work["tokens_per_update"] <= critical) == is_kept
        if "a 2,000th" in said:
            assert (work["updates"] >= 2000) == is_kept
    assert ("each device takes a row" in update) == (text == "100000xb200 90d")


def test_a_day_of_eight_gpus_is_worth_gpt_2_xl(planned, tmp_path):
    planned("--budget", "8xh100 24h", "--recipe", tmp_path / "xl.yaml")
    recipe = read_recipe(tmp_path / "xl.yaml")
    assert recipe.model.config == {"n_layer": 48, "n_head": 25, "n_embd": 1600}
    assert recipe.tokens_per_update == 2**20
    assert 1.9e-4 <= recipe.training["learning_rate"] <= 2e-4  # GPT-3's of 1.3B: 2e-4
    assert recipe.data.dataset_config == "sample-100BT"  # 26 billion tokens are wanted
    assert recipe.data.validation_fraction == 0.0001


def test_a_budget_says_when_it_wants_more_tokens_than_the_text_has(planned, tmp_path):
    answered = planned("--budget", "cpu 3h", "--recipe", tmp_path / "a.yaml")
    assert any("more tokens than the text has" in reason for reason in answered["reasons"])
    work = answered["plan"]["work"]
    assert work["epochs"] > 10 and "it is read" in planned.text
    assert read_recipe(tmp_path / "a.yaml").evaluation.early_stopping_patience


@pytest.mark.parametrize("text", ["8xh100 24h", "cpu 20min"])
def test_a_written_recipe_makes_training_arguments(planned, tmp_path, text):
    from pipeline.arguments import training_arguments

    path = tmp_path / "budget.yaml"
    planned("--budget", text, "--recipe", path)
    recipe = read_recipe(path, {"training.output_dir": str(tmp_path), "training.use_cpu": True})
    _, arguments = training_arguments(recipe)
    steps = yaml.safe_load(path.read_text())["training"]["max_steps"]
    assert arguments.max_steps == steps and arguments.learning_rate > 0


def test_a_recipe_is_replaced_only_when_asked(planned, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("mine")
    with pytest.raises(InputError, match="is there already; name another file, or .*--overwrite"):
        planned("--budget", "cpu 10min", "--recipe", path)
    assert path.read_text() == "mine"
    planned("--budget", "cpu 10min", "--recipe", path, "--overwrite")
    assert read_recipe(path).training["max_steps"] > 0


# -- ladders --------------------------------------------------------------------------------------


@pytest.fixture
def ladder(tmp_path):
    """metrics.json of twelve runs that follow a law exactly."""
    law = scaling_laws.HOFFMANN._replace(E=1.5, A=60.0, B=90.0, alpha=0.3, beta=0.3)
    files = []
    for parameters in (1e5, 3e5, 1e6, 3e6):
        for tokens in (1e6, 3e6, 1e7):
            folder = tmp_path / "ladder" / f"{parameters:.0f}_{tokens:.0f}"
            folder.mkdir(parents=True)
            numbers = {
                "eval_loss": law.loss(parameters, tokens), "parameters": int(parameters),
                "train_tokens": int(tokens), "tokenizer_fingerprint": "a", "eval_tokens": 1000,
                "eval_bytes": 3000, "data_fingerprint": "b",
            }  # fmt: skip
            (folder / "metrics.json").write_text(json.dumps(numbers))
            files.append(folder / "metrics.json")
    return law, files


def test_a_ladder_foretells_what_it_left_out_and_the_recipe(planned, ladder, tmp_path):
    law, files = ladder
    picture = tmp_path / "law.png"
    found = planned(
        "--fit", *files, "--leave_out", files[-1], "--config", QUICKSTART, "--picture", picture
    )
    (left_out,) = found["left_out"]
    assert len(found["runs"]) == 11
    assert left_out["foretold"]["loss"] == pytest.approx(left_out["loss"], rel=0.002)
    here = found["planned"]
    assert (here["parameters"], here["tokens"]) == (1_071_872, 2_867_200)
    assert here["loss"] == pytest.approx(law.loss(1_071_872, 2_867_200), rel=0.002)
    assert here["low"] <= here["loss"] <= here["high"]
    assert re.search(r"^this recipe +1\.07 M +2\.87 M ", planned.text, re.MULTILINE)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_loss_is_foretold_of_a_recipe_that_no_machine_here_could_train(planned, ladder):
    _, files = ladder
    xl = ROOT / "recipes" / "gpt2_xl.yaml"
    here = planned("--fit", *files, "--config", xl)["planned"]
    assert here["parameters"] == 1_557_611_200 and here["tokens"] > 1e10


def test_a_ladder_without_a_recipe_is_only_fitted(planned, ladder):
    _, files = ladder
    found = planned("--fit", *files)
    assert found["planned"] is None and len(found["runs"]) == 12
    assert found["law"]["alpha"] == pytest.approx(0.3, abs=0.02)
    with pytest.raises(InputError, match=r"^--model.config.n_layer: with --fit .*with --config"):
        planned("--fit", *files, "--model.config.n_layer", "8")


# -- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--hardware 8xh10", "'8xh10' is not in the table; the nearest are h100"),
        ("--hardware 0xh100", "0 devices cannot train"),
        ("--budget 8xh100\u00a00h", "nothing can be trained in 0 h"),
        ("--budget 8xh10\u00a024h", "'8xh10' is not in the table"),
        ("--budget tomorrow", "budget: 'tomorrow' is not understood"),
        ("--budget cpu\u00a00.1s", "cannot train the smallest size"),
        ("--budget cpu\u00a01s", "cannot train the smallest size that fits for 100 updates"),
        ("--budget cpu\u00a0999999999999999999h", "is longer than 10 years"),
        ("--budget cpu\u00a01h --training.learning_rate 1", "--training.learning_rate: --budget"),
        ("--budget cpu\u00a01h --model.config.n_layer 3", "--model.config.n_layer: --budget choo"),
        ("--budget cpu\u00a01h --tokens_per_update 1024", "--tokens_per_update: --budget chooses"),
        ("--budget cpu\u00a01h --precision fp32", "--precision: --budget chooses it; leave it out"),
        ("--budget cpu\u00a01h --recipe a", "--recipe a: is a folder; name a file in it"),
        ("--budget 2xh100\u00a01h --topology none", "2 device(s) need ddp or another"),
        ("--training.max_steps 100000000000000000000", "more than 1,000,000,000,000 updates"),
        (
            "--training.num_train_epochs 1e30 --training.max_steps null",
            "training.num_train_epochs: no run makes more than 1,000,000,000,000 updates",
        ),
        ("--budget cpu\u00a01h --fit a.json", "give one of --budget and --fit"),
        ("--budget cpu\u00a01h --hardware h100", "--budget names the devices itself"),
        (
            "--budget cpu\u00a01h --recipe a/b.txt/c.yaml",
            "--recipe a/b.txt/c.yaml: cannot be written",
        ),
        ("--recipe a.yaml", "--recipe has a meaning with --budget only"),
        ("--overwrite", "--overwrite has a meaning with --budget only"),
        ("--leave_out a.json", "--leave_out has a meaning with --fit only"),
        ("--fit a.json --mfu 0.5", "--mfu has no meaning with --fit; leave it out"),
        ("--mfu 0", "--mfu: input should be greater than 0"),
        ("--mfu 1.1", "--mfu: input should be less than or equal to 1"),
        ("--price_per_hour -1", "--price_per_hour: input should be greater than or equal to 0"),
        ("--picture plan.gif", "name a file that ends in .png, .svg, .pdf"),
        ("--picture no/where.png", "--picture no/where.png: cannot be written"),
        ("--json no/where.json", "--json no/where.json: cannot be written"),
        ("--model.config.n_head 3", "n_embd: 128 is not a multiple of n_head 3; every head has"),
        ("--model.config.n_layer 0", "model.config.n_layer: must be at least 1; got 0"),
        ("--model.config.vocab_size 9", "model.config.vocab_size: is derived, leave it out"),
        (
            "--training.max_steps null --tokens_per_update 1048576000",
            "an update takes 1,048,576,000",
        ),
        ("--data.files nowhere.txt", "nowhere.txt: no such file"),
        ("--topology fsdp2", "--topology fsdp2: 1 device(s) share nothing; leave it out"),
        ("--topology none --hardware 2xh100", "--topology none: 2 device(s) need ddp or another"),
        ("--topology fsdp2 --hardware 2xh100", "optimizer.name: muon needs every matrix whole"),
        ("--precision fp16 --hardware cpu", "precision: fp16 is asked, but"),
        ("--fit nowhere.json", "nowhere.json"),
        ("--hardwear cpu", "--hardwear: unknown option; did you mean --hardware?"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.txt").write_text("a file, not a folder")
    given = [word.replace("\u00a0", " ") for word in argv.split(" ")]
    with pytest.raises(InputError) as caught:
        plan.main(given)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.yaml"))


def test_what_fits_in_no_batch_is_one_sentence_with_remedies():
    xl = str(ROOT / "recipes" / "gpt2_xl.yaml")
    with pytest.raises(InputError) as caught:
        plan.main(["--config", xl, "--hardware", "t4"])
    said = str(caught.value)
    assert "does not fit on NVIDIA T4, 16 GB in any batch: one row of 1,024 tokens takes" in said
    assert "a device with more memory" in said and "\n" not in said
    assert "gradient_checkpointing" not in said  # which would not be enough
    with pytest.raises(InputError, match="it takes --training.gradient_checkpointing true, or"):
        plan.main(["--config", xl, "--hardware", "l4", "--data.block_size", "4096",
                   "--model.config.n_layer", "30"])  # fmt: skip


def test_a_pretrained_model_of_the_hub_is_planned_only_under_a_known_name(planned):
    recipe = str(ROOT / "recipes" / "gpt2_finetune.yaml")
    found = planned("--config", recipe, "--hardware", "h100")
    assert found["model"]["parameters"] == 124_439_808
    assert found["laws"] is None and "models that begin with nothing" in planned.text
    with pytest.raises(InputError, match="some/gpt: no such folder here, and a plan fetches"):
        plan.main(["--config", recipe, "--model.pretrained", "some/gpt"])
    with pytest.raises(InputError, match=r"chooses a size, and \S*gpt2_finetune.yaml goes on from"):
        plan.main(["--config", recipe, "--budget", "h100 1h"])


def test_the_course_s_figures_come_out(planned):
    """GPT-3: 3.14e23 FLOPs by 6 N D; Chinchilla: 20 tokens a parameter at 70 billion."""
    count = planning.parameters(planning.Shape(96, 12_288, 96, 50_257, 2048))
    assert count == pytest.approx(174.6e9, rel=1e-4)
    assert scaling_laws.FLOPS * count * 300e9 == pytest.approx(3.14e23, rel=0.002)
    assert "about as many tokens" in scaling_laws.verdict(70e9, 1.4e12)
    found = planned("--config", SMALL, "--hardware", "8xh100", "--training.max_steps", "1000")
    assert math.isclose(found["work"]["flops_by_6nd"], 6 * 124_439_808 * 524_288_000, rel_tol=1e-12)
