"""The files of a Hugging Face Space on which a published model can be tried."""

import json
from pathlib import Path

import yaml

APP = Path(__file__).parent / "templates" / "space_app.py"

# What tests/test_space.py runs the page with. A Space installs it by this number.
GRADIO_VERSION = "6.31.0"
PYTHON_VERSION = "3.11"
# Spaces without a GPU are free, and a GPT-2 needs none to write.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
REQUIREMENTS = ["torch>=2.11,<2.14", "transformers>=5.17,<6", "safetensors>=0.6"]
PEFT = "peft>=0.17"


def space_files(
    model_repo_id: str,
    *,
    title: str,
    prompts: list[str],
    is_adapter: bool = False,
    is_private: bool = True,
    license: str | None = None,
) -> dict[str, bytes]:
    """Return the contents of the Space's files by their names.

    What a person wrote goes into them as data (YAML and JSON), never as code: `app.py` is the same
    in every Space.

    Args:
        model_repo_id: the model's repository, or that of its LoRA adapter if it `is_adapter`.
        prompts: beginnings that the page offers.
        is_private: whether the Space needs a token to read the model, and its README says so.
        license: its identifier on the Hub, `apache-2.0` for instance.
    """
    title = " ".join(title.split())
    demo = {"model": model_repo_id, "title": title, "prompts": prompts}
    requirements = [f"--extra-index-url {TORCH_CPU_INDEX}", *REQUIREMENTS]
    if is_adapter:
        requirements.append(PEFT)
    texts = {
        "demo.json": json.dumps(demo, ensure_ascii=False, indent=2),
        "requirements.txt": "\n".join(requirements),
        "README.md": _readme(model_repo_id, title, is_adapter, is_private, license),
    }
    files = {name: f"{text}\n".encode() for name, text in texts.items()}
    return {"app.py": APP.read_bytes(), **files}


def _readme(
    model_repo_id: str, title: str, is_adapter: bool, is_private: bool, license: str | None
) -> str:
    data = {
        "title": title,
        "emoji": "📝",
        "colorFrom": "blue",
        "colorTo": "indigo",
        "sdk": "gradio",
        "sdk_version": GRADIO_VERSION,
        "python_version": PYTHON_VERSION,
        "app_file": "app.py",
        "models": [model_repo_id],
        **({"license": license} if license else {}),
    }
    front_matter = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=1000)
    read = "its repository and that of the model it adapts" if is_adapter else "its repository"
    secret = f"""
It is private, so the Space needs a token: under Settings, Variables and secrets, add a secret
`HF_TOKEN`, a fine-grained token that may read {read} and no more.
Whoever can open the Space can have the model write; make the Space private, too, unless all may.
"""
    return f"""---
{front_matter}---

A page on which [{model_repo_id}](https://huggingface.co/{model_repo_id}) writes. `demo.json` has
its title and its prompts; `app.py` is the page.
{secret if is_private else ""}
On a machine of your own:

    pip install -r requirements.txt gradio=={GRADIO_VERSION}
    python app.py

`MODEL=path/to/a/folder python app.py` opens a model of your disk."""
