"""Folders that are whole or absent: staging, the manifest, damage by name, and reuse."""

import hashlib
import json
import os
import re

import pytest

from pipeline import artifact
from pipeline.recipe import InputError

MADE_FROM = {"data": {"block_size": 16}, "tokenizer": "abc", "shares": [0.1, 0.2]}
BIG = bytes(range(256)) * 64  # four pages


def make(folder, made_from=MADE_FROM, content=BIG):
    with artifact.staged(folder, made_from) as (staging, facts):
        (staging / "deep" / "er").mkdir(parents=True)
        (staging / "rows.bin").write_bytes(content)
        (staging / "deep" / "er" / "words.txt").write_text("naïve\n", encoding="utf-8")
        (staging / "empty").touch()
        facts["rows"] = 7
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# -- whole or absent ------------------------------------------------------------------------------


def test_a_finished_block_is_one_whole_folder(tmp_path):
    folder = make(tmp_path / "not" / "yet" / "there")
    assert names(folder.parent) == ["there"]
    assert names(folder) == ["deep", "empty", "manifest.json", "rows.bin"]
    assert (folder / "rows.bin").read_bytes() == BIG
    assert artifact.damage(folder) is None


def test_nothing_is_at_its_place_before_the_block_ends(tmp_path):
    with artifact.staged(tmp_path / "a", MADE_FROM) as (staging, _):
        (staging / "file").touch()
        assert staging.parent == tmp_path  # one rename only within one file system
        assert not (tmp_path / "a").exists()
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failed_block_leaves_nothing(tmp_path, error):
    with pytest.raises(error), artifact.staged(tmp_path / "a", MADE_FROM) as (staging, _):
        (staging / "half").write_text("x")
        raise error
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_block_leaves_the_old_folder_as_it_was(tmp_path, error):
    folder = make(tmp_path / "a")
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(error), artifact.staged(folder, {"other": 1}) as (staging, _):
        (staging / "rows.bin").write_text("new")
        raise error
    after = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}
    assert after == before
    assert names(tmp_path) == ["a"]


def test_a_whole_folder_is_replaced(tmp_path):
    folder = make(tmp_path / "a")
    make(folder, {"other": 1}, b"new")
    assert (folder / "rows.bin").read_bytes() == b"new"
    assert artifact.read_manifest(folder)["made_from"] == {"other": 1}
    assert names(tmp_path) == ["a"]


def test_what_a_killed_process_left_in_staging_is_cleared(tmp_path):
    with artifact.staged(tmp_path / "a", MADE_FROM) as (staging, _):
        name = staging.name
    (tmp_path / name).mkdir()
    (tmp_path / name / "left over").write_text("x")
    folder = make(tmp_path / "a")
    assert "left over" not in names(folder)
    assert names(tmp_path) == ["a"]


def test_a_damaged_folder_in_the_way_is_kept_beside(tmp_path):
    folder = make(tmp_path / "a")
    for number in (1, 2):
        (folder / "rows.bin").write_bytes(b"damaged %d" % number)
        make(folder)
        assert artifact.damage(folder) is None
        kept = [path for path in tmp_path.iterdir() if path != folder]
        assert len(kept) == number and all(path.name.startswith("a.") for path in kept)
    contents = {(path / "rows.bin").read_bytes() for path in kept}
    assert contents == {b"damaged 1", b"damaged 2"}


def test_a_folder_that_is_not_ours_is_kept_beside(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").write_text("years of work")
    make(tmp_path / "a")
    (kept,) = (path for path in tmp_path.iterdir() if path.name != "a")
    assert (kept / "thesis.txt").read_text() == "years of work"


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "a"
    with pytest.raises(InputError, match=f"^{re.escape(str(place))}: cannot be written: [^\n]+$"):
        make(place)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_one_sentence(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(InputError, match="cannot be written: Permission denied"):
            make(tmp_path / "a")
    finally:
        tmp_path.chmod(0o700)


# -- the manifest ---------------------------------------------------------------------------------


def test_the_manifest_lists_every_file_with_size_and_digest(tmp_path):
    folder = make(tmp_path / "a")
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {
        str(path.relative_to(folder)): {
            "size": len(path.read_bytes()),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    assert set(files) == {"rows.bin", "deep/er/words.txt", "empty"}
    assert manifest["files"] == files
    assert manifest["made_from"] == MADE_FROM
    assert manifest["facts"] == {"rows": 7}
    assert {"python", "torch", "transformers", "tokenizers", "datasets"} <= set(
        manifest["versions"]
    )
    assert manifest["git_commit"] is None or re.match("[0-9a-f]{40}", manifest["git_commit"])
    assert artifact.read_manifest(folder) == manifest


def test_the_fingerprint_is_of_the_contents_alone(tmp_path):
    a, b = make(tmp_path / "a"), make(tmp_path / "b", {"other": 1})
    c = make(tmp_path / "c", content=BIG[::-1])
    assert artifact.fingerprint(a) == artifact.fingerprint(b) != artifact.fingerprint(c)


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe", bytes(4096)])
def test_no_manifest_or_a_broken_one_is_none(tmp_path, content):
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content)
    assert artifact.read_manifest(tmp_path) is None
    assert artifact.damage(tmp_path) == f"{tmp_path}/manifest.json is missing or unreadable"
    assert artifact.read_manifest(tmp_path / "nowhere") is None


# -- damage ---------------------------------------------------------------------------------------


def flip(content):
    return content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]


@pytest.mark.parametrize(
    "change, how",
    [
        (lambda content: None, "is missing"),
        (lambda content: content[:-1], "has 16383 bytes instead of 16384"),
        (lambda content: b"", "has 0 bytes instead of 16384"),
        (lambda content: content + b"\0", "has 16385 bytes instead of 16384"),
        (flip, "differs from what was written"),
        (lambda content: content[:4096] + bytes(4096) + content[8192:], "differs from what was"),
    ],
    ids=["missing", "truncated", "emptied", "longer", "flipped bit", "zeroed page"],
)
@pytest.mark.parametrize("name", ["rows.bin", "deep/er/rows.bin"])
def test_damage_names_the_file_and_how(tmp_path, name, change, how):
    folder = tmp_path / "a"
    with artifact.staged(folder, MADE_FROM) as (staging, _):
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        (staging / name).write_bytes(BIG)
        (staging / "whole").write_bytes(BIG)
    changed = change(BIG)
    if changed is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(changed)
    wrong = artifact.damage(folder)
    assert wrong.startswith(f"{folder / name} {how}")
    with pytest.raises(InputError, match=re.escape(wrong)) as caught:
        artifact.reusable(folder, MADE_FROM)
    assert f"remove {folder}" in str(caught.value)


# -- reuse ----------------------------------------------------------------------------------------


def test_an_absent_folder_is_to_be_made_and_a_whole_one_reused(tmp_path):
    assert artifact.reusable(tmp_path / "a", MADE_FROM) is False
    make(tmp_path / "a")
    assert artifact.reusable(tmp_path / "a", MADE_FROM) is True


def test_foreign_files_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match=f"^{re.escape(str(tmp_path / 'a'))}: .*not ours"):
        artifact.reusable(tmp_path / "a", MADE_FROM)
    assert (tmp_path / "a" / "thesis.txt").exists()


def test_another_recipe_is_spelled_out(tmp_path):
    folder = make(tmp_path / "a")
    other = {"data": {"block_size": 32}, "tokenizer": "xyz", "shares": [0.1, 0.2]}
    with pytest.raises(InputError) as caught:
        artifact.reusable(folder, other)
    message = str(caught.value)
    assert message.startswith(f"{folder}: was made by another recipe")
    assert "data.block_size: 16 -> 32" in message and 'tokenizer: "abc" -> "xyz"' in message
    assert "shares" not in message and "remove that folder" in message
    assert artifact.damage(folder) is None


@pytest.mark.parametrize(
    "old, new, expected",
    [
        ({}, {}, []),
        ({"a": 1, "b": {"c": [1, 2]}}, {"b": {"c": [1, 2]}, "a": 1}, []),
        ({"a": 1}, {"a": 2}, ["a: 1 -> 2"]),
        ({"a": 1}, {"a": "1"}, ['a: 1 -> "1"']),
        ({"a": {"b": {"c": 1}}}, {"a": {"b": {"c": None}}}, ["a.b.c: 1 -> null"]),
        ({"a": 1}, {"b": 2}, ["a: 1 -> null", "b: null -> 2"]),
        ({"a": {"x": 1, "y": 2}}, {"a": {"x": 3, "y": 4}}, ["a.x: 1 -> 3", "a.y: 2 -> 4"]),
        ({"a": {"b": 1}}, {"a": 5}, ['a: {"b": 1} -> 5']),
        ({"a": [1, 2]}, {"a": [1, 3]}, ["a: [1, 2] -> [1, 3]"]),
        ({"a": True}, {"a": False}, ["a: true -> false"]),
    ],
)
def test_differences(old, new, expected):
    assert artifact.differences(old, new) == expected


def test_long_values_are_shortened_but_both_ends_are_told():
    old, new = "0" * 32 + "a" * 32, "0" * 32 + "b" * 32
    (line,) = artifact.differences({"digest": old}, {"digest": new})
    assert len(line) < 60
    before, after = line.removeprefix("digest: ").split(" -> ")
    assert before != after and before.startswith('"000') and after.endswith('b"')
