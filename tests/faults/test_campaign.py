"""Every bad input of the tables gets its sentence: none is unclear, silent or without end."""

from collections import Counter

import pytest

from tests.faults.campaign import Case, outcome
from tests.faults.tables import all_cases


def _name(case):
    return case.name if isinstance(case, Case) else ""


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("case", all_cases(), ids=_name)
def test_it_is_refused_with_its_sentence(case, tmp_path):
    kind, line = outcome(case, tmp_path)
    assert kind == "clear", line


def test_the_campaign_is_large_and_names_each_case_once():
    names = Counter(case.name for case in all_cases())
    assert len(names) >= 1000
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda folder: None, "silent"),
        (lambda folder: [][1], "unclear"),
        (lambda folder: int("x"), "unclear"),
        (_name, "silent"),
    ],
)
def test_the_campaign_notices(call, kind):
    """What is not refused by the package itself is not counted as clear."""
    assert outcome(Case("x", call, ""), None)[0] == kind


def test_the_campaign_notices_what_never_ends(monkeypatch):
    monkeypatch.setattr("tests.faults.campaign.PATIENCE", 0.1)

    def forever(folder):
        while True:
            pass

    assert outcome(Case("x", forever, ""), None)[0] == "never ends"
