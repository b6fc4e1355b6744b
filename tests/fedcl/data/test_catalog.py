"""The list of datasets: light, complete, honest about what it found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedcl.data import catalog
from fedcl.errors import UsageError


def test_listing_imports_no_heavy_module() -> None:
    code = (
        "import sys; from fedcl.data.catalog import available; available('.');"
        "print([m for m in ('torch', 'numpy', 'sklearn', 'flwr') if m in sys.modules])"
    )
    path = ":".join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": path}
    )
    assert done.stdout.strip() == "[]"


def test_names_are_unique_and_every_file_set_has_a_way_to_get_it() -> None:
    stems = [catalog.canonical(name) for name in catalog.names()]
    assert len({catalog.find(s).name for s in stems}) == len(catalog.ENTRIES)  # type: ignore[union-attr]
    with_files = [e for e in catalog.ENTRIES if e.kind not in catalog.WITHOUT_FILES]
    assert all(e.files for e in with_files)
    assert all(e.get or e.reader for e in with_files)
    assert all(e.source and e.summary for e in catalog.ENTRIES)


@pytest.mark.parametrize(
    ("name", "found"),
    [("MNIST", "mnist"), ("Fashion-MNIST", "fashion_mnist"), ("PACS64", "pacs"), ("CIFAR-100", "cifar100")],
)
def test_find(name: str, found: str) -> None:
    entry = catalog.find(name)
    assert entry is not None
    assert entry.name == found


def test_available(tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", x=np.zeros(1))
    np.savez(tmp_path / "fashionmnist.npz", x=np.zeros(1))
    for file in catalog.find("mnist").files:  # type: ignore[union-attr]
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"")
    infos = {info.name: info for info in catalog.available(str(tmp_path))}
    assert {n for n, i in infos.items() if i.found} == {
        "digits", "random_grey", "random_colour", "mnist", "fashion_mnist", "own",
    }  # fmt: skip
    assert infos["mnist"].where == str(tmp_path / "MNIST")
    assert infos["fashion_mnist"].where == str(tmp_path / "fashionmnist.npz")
    assert infos["svhn"].where is None
    assert str(tmp_path / "svhn.npz") in infos["svhn"].looked


def test_an_incomplete_set_is_not_found_and_says_what_it_lacks(tmp_path: Path) -> None:
    entry = catalog.find("cifar100")
    assert entry is not None
    (tmp_path / "cifar-100-python").mkdir()
    assert catalog.missing(entry, tmp_path) == ""
    (tmp_path / entry.files[0]).write_bytes(b"")
    assert catalog.base_of(entry, tmp_path) is None
    assert catalog.missing(entry, tmp_path).endswith("lacks cifar-100-python/test, cifar-100-python/meta")


def test_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(catalog.ROOT_VARIABLE, raising=False)
    assert catalog.data_root(None) == Path("data")
    monkeypatch.setenv(catalog.ROOT_VARIABLE, str(tmp_path))
    assert catalog.check_root(None) == tmp_path
    assert catalog.data_root("x") == Path("x")
    with pytest.raises(UsageError, match=r"data\.root='nowhere'"):
        catalog.check_root("nowhere")
    monkeypatch.setenv(catalog.ROOT_VARIABLE, "nowhere")
    with pytest.raises(UsageError, match="from FEDCL_DATA_ROOT"):
        catalog.check_root(None)
