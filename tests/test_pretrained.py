"""A model of the Hub to go on from: pinned to a commit; an adapter on it is loaded by others."""

import json
import os

import pytest
import yaml
from loopback_hub import USER, LoopbackHub
from test_pushing import _see
from transformers import AutoModelForCausalLM

from pipeline import pretrain, publish
from pipeline.model import load_model
from pipeline.pretrained import settled
from pipeline.recipe import InputError, read_recipe

BASE, TAG = f"{USER}/base", "old"


@pytest.fixture(scope="module")
def hub(finished_run, tmp_path_factory):
    """A Hub with a model that has changed since a revision was tagged."""
    names = (
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "metrics.json",
    )  # fmt: skip
    files = {name: (finished_run / name).read_bytes() for name in names}
    with pytest.MonkeyPatch.context() as patch, LoopbackHub() as running:
        _see(running, patch, tmp_path_factory.mktemp("hub") / "home")
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", os.environ["HF_HOME"])
        # transformers keeps a client of its own, of the Hub that it saw first.
        patch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        running.put(BASE, files, branch="main")
        running.put(BASE, files, branch=TAG)
        changed = AutoModelForCausalLM.from_pretrained(finished_run)
        changed.transformer.wpe.weight.data += 0.5
        folder = tmp_path_factory.mktemp("changed")
        changed.save_pretrained(folder)
        weights = (folder / "model.safetensors").read_bytes()
        running.put(BASE, files | {"model.safetensors": weights}, branch="main")
        yield running


@pytest.fixture(scope="module")
def recipe(smoke_recipe, tmp_path_factory):
    """The smoke recipe, going on from that model as it was at the tag."""
    values = yaml.safe_load(smoke_recipe.read_text())
    del values["tokenizer"]
    values["model"] = {"pretrained": BASE, "revision": TAG}
    values["training"] |= {"max_steps": 4, "save_steps": 2, "eval_steps": 2}
    path = tmp_path_factory.mktemp("recipes") / "hub.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_the_recipe_that_is_kept_names_the_commit(hub, recipe):
    for revision in (TAG, None):
        found = settled(read_recipe(recipe, {"model.revision": revision}))
        commit = hub.repository(BASE).branches[revision or "main"]
        assert found.model.revision == commit
        assert settled(found).model.revision == commit
    values = {"schedule.goes_on": "true"}
    assert settled(read_recipe(recipe, values)).schedule.past_updates == 20


def test_a_revision_that_is_not_there_is_one_sentence(hub, recipe):
    with pytest.raises(InputError, match=f"model.pretrained {BASE}: cannot be loaded as a model"):
        settled(read_recipe(recipe, {"model.revision": "nowhere"}))


@pytest.mark.slow
def test_an_adapter_on_a_model_of_the_hub_is_published_and_loaded_from_there(
    hub, recipe, finished_run, tmp_path, capsys
):
    folder = tmp_path / "adapter"
    pretrain.main(
        ["--config", str(recipe), "--training.output_dir", str(folder), "--model.lora_r", "2",
         "--training.learning_rate", "0.01"]
    )  # fmt: skip
    commit = hub.repository(BASE).branches[TAG]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (BASE, commit)
    publish.main(["--run", str(folder), "--repo_id", f"{USER}/adapter"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("main: ")
    there = hub.files(f"{USER}/adapter")
    assert "adapter_model.safetensors" in there and "model.safetensors" not in there
    card = there["README.md"].decode()
    assert f"base_model: {BASE}" in card and "base_model_relation: adapter" in card
    assert "library_name: peft" in card
    from_hub, from_folder = load_model(f"{USER}/adapter"), load_model(str(folder))
    other = from_folder.state_dict()
    assert all((weight == other[name]).all() for name, weight in from_hub.state_dict().items())
    before = AutoModelForCausalLM.from_pretrained(finished_run).state_dict()
    assert (other["transformer.wpe.weight"] == before["transformer.wpe.weight"]).all()


def test_an_adapter_on_a_folder_of_one_s_own_is_not_published_alone(
    hub, recipe, finished_run, tmp_path
):
    folder = tmp_path / "adapter"
    argv = [
        "--config", str(recipe), "--training.output_dir", str(folder), "--model.lora_r", "2",
        "--model.pretrained", str(finished_run), "--model.revision", "null",
    ]  # fmt: skip
    with pytest.raises(InputError, match="push_to_hub: an adapter on the model in .* no use to"):
        pretrain.main([*argv, "--training.push_to_hub", "true"])
    pretrain.main(argv)
    with pytest.raises(InputError, match="which nobody has but you; publish both in one: python"):
        publish.main(["--run", str(folder), "--repo_id", f"{USER}/alone"])
