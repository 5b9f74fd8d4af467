"""Tables are whole where nobody's terminal says how wide they may be."""

import io

import pytest
from rich.table import Table

from radlads_jax.system import terminal

WORDS = [f"a column of some width, number {i}" for i in range(4)]


@pytest.mark.parametrize(("columns", "whole"), [(None, True), ("80", False)])
def test_tables_in_a_log(columns, whole, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    written = io.StringIO()
    monkeypatch.setattr("sys.stdout", written)
    terminal.tables().print(Table(*WORDS))
    assert all(word in written.getvalue() for word in WORDS) == whole
