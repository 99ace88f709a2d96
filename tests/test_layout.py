"""The house's rules, read off the source."""

import ast
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from conftest import ROOT

FILES = sorted((ROOT / "pipeline").glob("*.py"))
DOORS = [f for f in FILES if "\nif __name__ ==" in f.read_text()]
ROOMS = [f for f in FILES if f not in DOORS and f.stem != "__init__"]
TAKEN = set(sys.stdlib_module_names) | set(packages_distributions()) - {"pipeline"}
WITHOUT_TORCH = (
    "recipe",
    "sections",
    "preparation",
    "streaming",
    "command_line",
    "options",
    "prompts",
    "known_fields",
    "lr_schedule",
    "reach",
    "hub",
    "publication",
    "publishing",
    "run_files",
    "space",
    "planning",
    "peak_memory",
    "memory_bound",
    "batch_memory",
    "devices",
    "hardware",
    "scaling_laws",
    "ladder",
    "law_fit",
    "law_forms",
    "law_table",
    "communication",
    "rate_suggestion",
    "run_plan",
    "plan_text",
    "recipe_writing",
    "symptoms",
    "notices",
)


def imports_of(path: Path) -> set[str]:
    """Return the modules of our package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "pipeline":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pipeline."):
            found.add(node.module.split(".")[1])
    return found


def test_there_are_rooms_and_doors():
    assert {"pretrain", "train_tokenizer", "prepare_data"} <= {f.stem for f in DOORS}
    assert {"recipe", "blocks", "trainer"} <= {f.stem for f in ROOMS}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_no_file_hides_a_library(path):
    """Run by path, `pipeline/` is first on sys.path: evaluate.py there would be `evaluate`."""
    assert path.stem not in TAKEN


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_nothing_imports_a_door(path):
    assert not imports_of(path) & {door.stem for door in DOORS}


def test_imports_go_one_way():
    """No room reaches itself through what it imports."""
    arrows = {room.stem: imports_of(room) for room in ROOMS}

    def reached(start: str, seen: frozenset = frozenset()) -> set[str]:
        direct = arrows.get(start, set()) - seen
        return direct | {b for a in direct for b in reached(a, seen | direct)}

    for room in arrows:
        assert room not in reached(room), f"{room} imports itself in a circle"


@pytest.mark.parametrize("path", DOORS, ids=lambda p: p.stem)
def test_a_door_is_a_sentence(path):
    tree = ast.parse(path.read_text())
    functions = [n.name for n in tree.body if isinstance(n, ast.FunctionDef)]
    assert functions == ["main"]
    assert not any(isinstance(n, ast.ClassDef | ast.For | ast.While) for n in ast.walk(tree))
    assert len(path.read_text().splitlines()) <= 60
    assert ast.get_docstring(tree)


@pytest.mark.parametrize("path", ROOMS, ids=lambda p: p.stem)
def test_a_room_says_its_job_and_annotates_its_functions(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.stem}.{node.name} has no docstring"
            assert node.returns is not None, f"{path.stem}.{node.name}: no return annotation"


def test_these_rooms_cost_no_torch():
    modules = "; ".join(f"import pipeline.{name}" for name in WITHOUT_TORCH)
    code = f"{modules}; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
