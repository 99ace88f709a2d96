"""What is ill and what is well, by table; and the README's table is the code's."""

import math

import pytest
from conftest import ROOT

from pipeline.known_fields import training_fields
from pipeline.recipe import Recipe
from pipeline.symptoms import SYMPTOMS, beside_guessing, causes, score, table

WAVE = [3.0, 3.1, 2.9, 3.0] * 16  # a mean of 3, a deviation of 0.0707


@pytest.mark.parametrize(
    ("value", "before", "least", "z"),
    [
        (3.0, WAVE, 0.0, 0.0),
        (3.0 + 0.1 / math.sqrt(2), WAVE, 0.0, 1.0),
        (3.6, WAVE, 0.0, 6 * math.sqrt(2)),
        (2.0, WAVE, 0.0, -10 * math.sqrt(2)),  # downwards it is no spike
        (3.5, [3.0] * 9, 0.0, 0.0),  # no deviation
        (3.003, [3.0] * 9, 1e-3, 1.0),
        (0.0, [0.0] * 9, 1 / 3, 0.0),
        (4.0, [1.0] * 9, 1 / 3, 9.0),
    ],
)
def test_a_score_counts_deviations(value, before, least, z):
    found = score(value, before, least_spread=least)
    assert found.z == pytest.approx(z, abs=1e-9) and found.value == value
    assert found.mean == pytest.approx(sum(before) / len(before))


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        ([math.log(512)] * 20, "stuck"),
        ([math.log(512)] * 19, None),
        ([math.log(512) * 1.03] * 20, "stuck"),  # a large fresh model
        ([math.log(512) * 0.97] * 20, None),
        ([math.log(512)] * 19 + [math.log(512) * 0.97], None),
        ([1.0] * 5 + [math.log(512)] * 20, "stuck"),
        ([70.0] * 20, "diverged"),
        ([70.0] * 19 + [math.log(512)], None),  # on its way back
        ([4.0] * 20, None),
        ([], None),
    ],
)
def test_beside_guessing(losses, found):
    assert beside_guessing(losses, 512) == found


def test_remedies_name_keys_that_there_are():
    sections = Recipe.model_fields
    for symptom in SYMPTOMS.values():
        assert symptom.treatments
        named = [t.remedy.split("`")[1::2] for t in symptom.treatments]
        for key in (k.partition(":")[0] for keys in named for k in keys):
            if ".py" in key or key == "precision":
                continue
            section, field = key.split(".")
            known = training_fields() if section == "training" else None
            assert field in (known or sections[section].annotation.model_fields), key


def test_causes_are_one_line_in_their_order_without_marks():
    said = causes("spike")
    assert said.startswith("rows unlike the rest (prepare_data.py --show 20, cleaning.deduplicate")
    assert said.index("training.learning_rate x 0.1") < said.index("schedule.warmup_steps")
    assert "`" not in said and "\n" not in said


def test_the_readme_has_the_table():
    assert "\n".join(table()) in (ROOT / "README.md").read_text()
