"""A run has one name on the Hub, made once and kept in its folder."""

import json

import pytest

from pipeline.recipe import InputError
from pipeline.run_identity import identity_file, kept_identity, run_identity


def test_a_run_is_named_once(tmp_path):
    (tmp_path / "other").mkdir()
    assert kept_identity(tmp_path) is None
    name = run_identity(tmp_path)
    assert run_identity(tmp_path) == kept_identity(tmp_path) == name
    assert (tmp_path / "pipeline_run.json").read_bytes() == identity_file(name)
    assert json.loads(identity_file(name)) == {"run": name}
    assert run_identity(tmp_path / "other") != name


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"ru'])
def test_a_name_that_cannot_be_read_is_told(tmp_path, content):
    (tmp_path / "pipeline_run.json").write_text(content)
    with pytest.raises(InputError, match="pipeline_run.json: cannot be read; remove it, and"):
        run_identity(tmp_path)
    assert (tmp_path / "pipeline_run.json").read_text() == content


def test_a_place_that_cannot_be_written_to_is_told(tmp_path):
    with pytest.raises(InputError, match="pipeline_run.json: cannot be written: No such file"):
        run_identity(tmp_path / "none")
