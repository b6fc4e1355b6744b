"""Runs without running."""

import pytest


@pytest.fixture
def runs(tmp_path, made_runs):
    """``runs(name, values, settings)``: one run a value; a value may be (value, entries of the summary)."""

    def make(name, values, settings=None, summary=None, seeds=None):
        for seed, value in zip(seeds or range(len(values)), values, strict=True):
            made_runs.make_run(tmp_path, name, seed, value, settings or {}, summary or {})
        return tmp_path

    return make
