"""Tables are whole where nobody's terminal says how wide they may be, and bars are no part of what is printed."""

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


@pytest.mark.parametrize("show", [True, False])
def test_a_bar_is_on_stderr(show, capsys):
    with terminal.progress_bar("counting", show=show) as progress:
        assert list(progress.track([1, 2, 3])) == [1, 2, 3]
    said = capsys.readouterr()
    assert said.out == "" and ("counting" in said.err and "3/3" in said.err) == show
