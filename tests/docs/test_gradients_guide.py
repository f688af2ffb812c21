"""The guide to gradients: its tables are those of the results, its parts exist."""

import json
from pathlib import Path

import pytest

from benchmarks.report.gradients import RESULT, mark, rows, tables

PAGE = Path(__file__).parents[2] / "docs" / "gradients.md"


@pytest.fixture(scope="module")
def result():
    return json.loads(RESULT.read_text())


def test_the_page_holds_the_tables_of_the_results(result):
    assert result["tables"] and tables(result) in PAGE.read_text()


def test_writing_the_tables_again_changes_nothing(result):
    page = PAGE.read_text()
    assert mark(page, "benchmark", tables(result)) == page
    assert mark(page, "benchmark", "new").count("new\n<!-- end -->") == 1


def test_every_row_has_its_numbers_or_a_reason(result):
    for found in result["tables"].values():
        assert found["commit"] and found["versions"]["torchdeq"] and found["device"]
        for row in rows(found):
            assert row.error == row.error or row.note, row.name
