"""A small corpus, tokenizer, model and recipe, all made in the process; no network, one place."""

import atexit
import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small only wait for their threads
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="pipeline-tests-")  # measured rates

import gc
import random
from pathlib import Path

import pytest
import yaml

atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

ROOT = Path(__file__).parent.parent


WORDS = (
    "the a model reads text and learns what comes next from what came before it loss falls when "
    "tokens repeat in rows of ids that a tokenizer cut with bytes and merges whole gradient steps "
    "schedule warm floor cosine peak update batch corpus split hash held out book page line naïve "
    "façade 東京 مرحبا 😀 def return class import for in if else None True self"
).split()


def make_texts(count: int = 40, seed: int = 0) -> list[str]:
    """Return documents of different lengths with some structure to learn."""
    source = random.Random(seed)
    texts = []
    for _ in range(count):
        sentences = [
            " ".join(source.choices(WORDS, k=source.randint(4, 12))) + ".\n"
            for _ in range(source.randint(4, 16))
        ]
        texts.append("".join(sentences))
    return texts


@pytest.fixture(scope="session", autouse=True)
def _few_objects_to_collect():
    """Each training run begins with a collection; what was imported by then is left out of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """About 20 kB of text in 40 documents."""
    return make_texts()


@pytest.fixture(scope="session")
def tokenizer(texts):
    """A byte-level BPE tokenizer of 384 entries."""
    from pipeline.tokenizer import train_tokenizer

    return train_tokenizer(texts, vocab_size=384)


@pytest.fixture
def tiny_model(tokenizer):
    """A GPT-2 of 2 layers x 32 with 16 positions."""
    from pipeline.model import build_model
    from pipeline.recipe import ModelSection

    section = ModelSection(config={"n_layer": 2, "n_head": 2, "n_embd": 32})
    return build_model(section, tokenizer, block_size=16, seed=0).eval()


def roughened(model, scale: float = 0.2, seed: int = 0):
    """Return a model that is wrong in different ways at different tokens; a fresh one is not."""
    import torch

    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=source)
    return model


@pytest.fixture
def rough_model(tiny_model):
    """The tiny model, so that its numbers hang on every token."""
    return roughened(tiny_model)


@pytest.fixture
def beginnings(texts) -> list[str]:
    """Beginnings of the session's documents: enough windows, and quick to score one by one."""
    return [text[:200] for text in texts]


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory) -> Path:
    """120 text files: enough to be held out whole, by their hash."""
    folder = tmp_path_factory.mktemp("corpus")
    for number, text in enumerate(make_texts(120)):
        (folder / f"{number:03}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def smoke_recipe(tmp_path_factory, corpus_folder) -> Path:
    """The smoke recipe on the small corpus, so that its text is the same on every machine."""
    values = yaml.safe_load((ROOT / "recipes" / "smoke.yaml").read_text())
    values["data"]["files"] = str(corpus_folder)
    values["training"]["report_to"] = "none"
    path = tmp_path_factory.mktemp("recipes") / "smoke.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, smoke_recipe) -> Path:
    """The folder of one finished smoke run; read it, do not change it."""
    from pipeline import pretrain

    folder = tmp_path_factory.mktemp("runs") / "finished"
    pretrain.main(["--config", str(smoke_recipe), "--training.output_dir", str(folder)])
    return folder


@pytest.fixture
def run_copy(tmp_path, finished_run) -> Path:
    """A copy of the finished run, to be changed."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture(scope="module")
def browser():
    """Chromium, that of CHROMIUM or of the PATH."""
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.fail("no Chromium on the PATH (chromium, google-chrome) and none in CHROMIUM")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # which root cannot have
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=found, args=arguments)
