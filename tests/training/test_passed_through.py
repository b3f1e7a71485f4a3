from __future__ import annotations

from dataclasses import fields

import pytest

from steep.errors import UserError
from steep.schema import TrainingSection
from steep.training.arguments import TrainingArguments
from steep.training.passed_through import HONOURED, REFUSED, check_further

LISTED = list(TrainingSection.model_fields)


def test_every_argument_of_transformers_has_a_decision() -> None:
    """A new field of TrainingArguments is either listed, honoured or refused; none slips through unseen."""
    known = {field.name for field in fields(TrainingArguments) if field.init}
    assert known - set(LISTED) - HONOURED - set(REFUSED) == set()
    assert not HONOURED & set(REFUSED)
    assert not set(LISTED) & (HONOURED | set(REFUSED))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_with_a_reason(name: str) -> None:
    with pytest.raises(UserError) as raised:
        check_further({name: True}, LISTED)
    assert str(raised.value) == f"training.{name}: steep cannot honour it: {REFUSED[name]}. Leave it out."
    assert len(REFUSED[name]) > 10


def test_honoured_values_get_their_types() -> None:
    checked = check_further({"adam_epsilon": "1e-7", "dataloader_num_workers": 2, "full_determinism": True}, LISTED)
    assert checked == {"adam_epsilon": 1e-7, "dataloader_num_workers": 2, "full_determinism": True}
    assert type(checked["adam_epsilon"]) is float


@pytest.mark.parametrize(
    ("name", "hint"), [("adam_beta3", "Did you mean 'adam_beta"), ("learning_rat", "Did you mean 'learning_rate'")]
)
def test_unknown_names_get_a_hint(name: str, hint: str) -> None:
    with pytest.raises(UserError, match=hint):
        check_further({name: 1}, LISTED)


def test_far_off_names_point_to_the_documentation() -> None:
    with pytest.raises(UserError, match=r"See transformers\.TrainingArguments"):
        check_further({"zzzzqqqq": 1}, LISTED)


def test_a_wrong_type_is_refused() -> None:
    with pytest.raises(UserError, match=r"training\.adam_beta1: 'high' is not valid"):
        check_further({"adam_beta1": "high"}, LISTED)
