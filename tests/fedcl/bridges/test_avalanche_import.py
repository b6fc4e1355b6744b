"""Avalanche is imported without a trace: in a process and a home folder of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from fedcl.bridges.avalanche_import import sealed

SCRIPT = """
import json, os, random, socket, sys, warnings
import numpy as np, torch
import matplotlib.font_manager  # its cache is not Avalanche's doing

def refuse(*args, **kwargs):
    raise OSError("no network here")

socket.socket.connect = refuse
from fedcl.bridges.avalanche_import import quiet_avalanche

def state():
    kind, words, place, *_ = np.random.get_state()
    return (random.getstate(), kind, words.tobytes(), place, torch.get_rng_state().tolist(), dict(os.environ),
            list(warnings.filters), os.path.expanduser("~/.avalanche"), os.path.expanduser("~"))

before = state()
quiet_avalanche()
same = [a == b for a, b in zip(before, state(), strict=True)]
import avalanche
from avalanche.benchmarks.datasets import default_dataset_location
json.dump({"same": same, "data": str(default_dataset_location("mnist"))}, sys.stdout)
"""


def run(home):
    environment = {**os.environ, "HOME": str(home)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


@pytest.mark.slow
def test_import_leaves_no_file_no_output_and_no_changed_state(tmp_path):
    seen = run(tmp_path)
    assert all(seen["same"]), seen["same"]
    assert not (tmp_path / ".avalanche").exists()
    assert seen["data"] == str(tmp_path / ".avalanche" / "data" / "mnist")


@pytest.mark.slow
def test_a_user_s_own_configuration_is_read_and_left_alone(tmp_path):
    folder = tmp_path / ".avalanche"
    folder.mkdir()
    text = json.dumps({"dataset_location": str(tmp_path / "elsewhere")})
    (folder / "config.json").write_text(text)
    seen = run(tmp_path)
    assert seen["data"] == str(tmp_path / "elsewhere" / "mnist")
    assert (folder / "config.json").read_text() == text


def test_sealed_restores_generators_environment_and_filters(capsys, caplog):
    numpy_before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    filters = list(warnings.filters)
    drawn = []
    with caplog.at_level("INFO", "fedcl.avalanche"):
        for _ in range(2):
            with sealed(7):
                drawn.append((np.random.rand(), float(torch.rand(()))))  # noqa: NPY002
                os.environ["FEDCL_TEST_LEFT_BEHIND"] = "1"
                warnings.warn("noise", stacklevel=1)
                print("a line")
    assert drawn[0] == drawn[1]
    assert (np.random.get_state()[1] == numpy_before).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert "FEDCL_TEST_LEFT_BEHIND" not in os.environ
    assert list(warnings.filters) == filters
    assert capsys.readouterr() == ("", "")
    assert [record.message for record in caplog.records] == ["a line", "a line"]
