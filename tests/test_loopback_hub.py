"""The loopback Hub is one to the real client: what is put there comes back, and faults are real."""

import subprocess
import sys
from pathlib import Path

import pytest
from loopback_hub import READ, USER, WRITE, Fault, LoopbackHub

NAME = f"{USER}/model"


@pytest.fixture
def hub():
    with LoopbackHub() as running:
        yield running


def run(hub: LoopbackHub, folder: Path, code: str, *arguments: object, token: str = WRITE) -> str:
    """Run Python with the real client, and return what it prints."""
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    found = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment | hub.environment(folder / "home", token=token),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return found.stdout


ROUND_TRIP = """
import sys
from pathlib import Path
from huggingface_hub import HfApi, snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer
name, folder = sys.argv[1], Path(sys.argv[2])
api = HfApi()
api.create_repo(name, private=True)
api.create_repo(name, private=True, exist_ok=True)
first = api.upload_folder(repo_id=name, folder_path=folder, commit_message="first").oid
api.create_branch(name, branch="old", revision=first)
api.upload_file(path_or_fileobj=b"# changed", path_in_repo="README.md", repo_id=name)
api.upload_folder(repo_id=name, folder_path=folder / "sub", path_in_repo="sub", revision="old")
model = AutoModelForCausalLM.from_pretrained(name, revision=first)
tokenizer = AutoTokenizer.from_pretrained(name, revision="old")
ids = tokenizer("the model reads text", return_tensors="pt").input_ids
print(float(model(ids, labels=ids).loss))
got = Path(snapshot_download(name, revision="old"))
assert (got / "sub" / "deep.txt").read_text() == "deep", list(got.rglob("*"))
assert (got / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
print([commit.title for commit in api.list_repo_commits(name)])
print(sorted(branch.name for branch in api.list_repo_refs(name).branches))
print(sorted(f.path for f in api.get_paths_info(name, ["config.json", "sub"], revision="old")))
api.delete_repo(name)
"""


@pytest.mark.slow
def test_a_model_that_is_put_there_can_be_loaded_from_there(hub, tmp_path, tiny_model, tokenizer):
    folder = tmp_path / "model"
    tiny_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "sub").mkdir()
    (folder / "sub" / "deep.txt").write_text("deep")
    loss, titles, branches, paths = run(hub, tmp_path, ROUND_TRIP, NAME, folder).splitlines()
    ids = tokenizer("the model reads text", return_tensors="pt").input_ids
    assert float(loss) == pytest.approx(tiny_model(ids, labels=ids).loss.item(), rel=1e-4)
    assert titles == "['Upload README.md with huggingface_hub', 'first', 'initial commit']"
    assert branches == "['main', 'old']" and paths == "['config.json', 'sub']"
    assert hub.repositories == {}
    stored = [r for r in hub.log if "/_store" in r["path"] or "/_cdn" in r["path"]]
    assert stored and not any("uthorization" in str(r["headers"]) for r in stored)


DATA = """
import sys
from datasets import load_dataset
from huggingface_hub import HfApi
api = HfApi()
api.create_repo(sys.argv[1], repo_type="dataset")
for name, text in {"train": "one\\ntwo\\n", "test": "three\\n"}.items():
    api.upload_file(path_or_fileobj=text.encode(), path_in_repo=f"{name}.txt", repo_id=sys.argv[1],
                    repo_type="dataset")
data = load_dataset(sys.argv[1])
print(data["train"]["text"][:], data["test"]["text"][:])
streamed = load_dataset(sys.argv[1], split="train", streaming=True)
print([row["text"] for row in streamed])
"""


@pytest.mark.slow
def test_a_data_set_that_is_put_there_can_be_read_from_there(hub, tmp_path):
    whole, streamed = run(hub, tmp_path, DATA, f"{USER}/text").splitlines()
    assert whole == "['one', 'two'] ['three']" and streamed == "['one', 'two']"


FAULTS = """
import sys, time
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
name, case = sys.argv[1:3]
def status(call, *args, **more):
    try:
        call(*args, **more)
    except HfHubHTTPError as error:
        return error.response.status_code
    except Exception as error:
        return type(error).__name__
    return 200
api = HfApi()
if case == "read":
    print(api.whoami()["name"], status(api.create_repo, name + "2"),
          status(api.upload_file, path_or_fileobj=b"x", path_in_repo="x", repo_id=name),
          status(api.model_info, name), status(api.model_info, "other/private"))
elif case == "stranger":
    print(status(api.whoami), status(api.model_info, name))
elif case == "writes":
    head = api.model_info(name).sha
    put = dict(path_or_fileobj=b"x", repo_id=name, path_in_repo="x")
    print(status(api.upload_file, **put, parent_commit=head),
          status(api.upload_file, **put | {"path_in_repo": "y"}, parent_commit=head),
          status(api.upload_file, **put, revision="none"), status(api.create_repo, name),
          status(api.create_branch, name, branch="main"),
          status(api.model_info, name, revision="no"), status(api.create_repo, "stranger/x"))
elif case == "faults":
    big = dict(path_or_fileobj=b"0123456789" * 9, repo_id=name, path_in_repo="a.safetensors")
    print(status(api.upload_file, **big), status(api.upload_file, **big))
    print(open(hf_hub_download(name, "a.safetensors"), "rb").read() == b"0123456789" * 9)
"""


@pytest.mark.slow
def test_tokens_and_parents_are_looked_at(hub, tmp_path):
    hub.put(NAME, {"a.txt": b"a"}, private=True)
    hub.put("other/private", {"a.txt": b"a"}, private=True)
    assert run(hub, tmp_path, FAULTS, NAME, "read", token=READ).split() == [
        USER, "403", "403", "200", "404",
    ]  # fmt: skip
    assert run(hub, tmp_path, FAULTS, NAME, "stranger", token="hf_unknown").split() == [
        "401", "401",
    ]  # fmt: skip
    assert run(hub, tmp_path, FAULTS, NAME, "writes").split() == [
        "200", "412", "404", "409", "409", "404", "403",
    ]  # fmt: skip
    assert hub.files(NAME) == {"a.txt": b"a", "x": b"x"}


@pytest.mark.slow
def test_faults_happen_as_often_as_they_are_asked_for(hub, tmp_path):
    hub.put(NAME, {"a.txt": b"a"})
    hub.part_bytes = 40
    hub.faults = [
        Fault("PUT /_store/.*/2", "cut"), Fault("POST .*/commit", "drop_after"),
        Fault("GET /_cdn", "cut"),
    ]  # fmt: skip
    found = run(hub, tmp_path, FAULTS, NAME, "faults").split()
    assert found == ["RemoteProtocolError", "200", "True"]
    assert hub.counted("PUT /_store") == 4 and hub.counted("GET /_cdn") == 2
    assert hub.titles(NAME)[1:] == ["by hand", "Upload a.safetensors with huggingface_hub"]
    assert all(fault.times == 0 for fault in hub.faults)
