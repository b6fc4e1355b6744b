"""Foreign Avalanche benchmarks: images, labels, columns, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedcl import config as settings
from fedcl.errors import UsageError
from fedcl.scenarios.benchmark import Benchmark
from fedcl.stream import DatasetLabels

MODULE = '''
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset


class Pictures(Dataset):
    """Image i of a split has the pixel value i; labels go round."""

    def __init__(self, count, labels, kind):
        self.targets = [labels[i % len(labels)] for i in range(count)]
        self.kind = kind

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        array = np.full((4, 5), i, dtype=np.uint8)
        array[0, 0] = 255 - i
        if self.kind == "rgb":
            return Image.fromarray(np.stack([array, array // 2, array // 3], axis=-1)), self.targets[i]
        if self.kind == "uint8":
            return torch.from_numpy(array), self.targets[i]
        image = torch.from_numpy(array)[None].float() / 255
        return (image if self.kind == "float" else (image - 0.5) / 0.1), self.targets[i]


def normalise(image):
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 - 0.5) / 0.1


def split(kind="rgb", transform=False, labels=(7, 3, 11, 5), sizes=(40, 20)):
    from avalanche.benchmarks import nc_benchmark

    print("noise on the screen")
    chosen = normalise if transform else None
    return nc_benchmark(Pictures(sizes[0], labels, kind), Pictures(sizes[1], labels, kind), n_experiences=2,
                        task_labels=False, fixed_class_order=[7, 5, 11, 3] if 7 in labels else None,
                        train_transform=chosen, eval_transform=chosen)


def domains(shared_test=False):
    from avalanche.benchmarks import dataset_benchmark

    from avalanche.benchmarks.utils import as_classification_dataset
    def wrap(count, labels):
        return as_classification_dataset(Pictures(count, labels, "float"))
    tests = [wrap(10, (0, 1)), wrap(6, (0, 1)), wrap(9, (0, 1, 2))]
    if shared_test:
        tests = [wrap(9, (0, 1, 2))]
    return dataset_benchmark([wrap(20, (0, 1)), wrap(12, (0, 1)), wrap(30, (2, 1))], tests)


def fails(where="nowhere"):
    raise RuntimeError(f"cannot read {where}\\nsecond line")


NOT_A_FUNCTION = 3
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "fedcl_test_benchmarks.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "fedcl_test_benchmarks"


def made(name, validation=0.0, seed=0, **arguments):
    scenario, config = Benchmark(), settings.Scenario(name="benchmark", benchmark=name, arguments=arguments)
    data = scenario.dataset(config, seed)
    labels = DatasetLabels(data.train.labels, data.test.labels, data.num_classes, data.class_names)
    return data, scenario.build(labels, config, validation, seed)


def pixels(store):
    return store.gather(torch.arange(len(store))).numpy()


@pytest.mark.parametrize("kind", ["rgb", "uint8", "float"])
def test_class_incremental_benchmark_keeps_images_labels_and_tasks(module, kind, capsys):
    data, stream = made(f"{module}:split", kind=kind)
    assert capsys.readouterr().out == ""
    images = pixels(data.train)
    assert images.shape == (40, 3 if kind == "rgb" else 1, 4, 5)
    assert images.dtype == np.uint8
    source = images[:, 0, 1, 1]  # pixel value = row of the source
    assert sorted(source.tolist()) == list(range(40))
    assert (images[:, 0, 0, 0] == 255 - source).all()
    originals = np.array([7, 3, 11, 5])[source % 4]
    assert data.class_names == ("3", "5", "7", "11")
    assert [data.class_names[y] for y in data.train.labels] == [str(y) for y in originals]
    exposed = [{data.class_names[stream.class_order[p]] for p in s.classes} for s in stream.stages]
    assert exposed == [{"5", "7"}, {"3", "11"}]
    for stage in stream.stages:
        assert set(stream.train_labels[stage.train_ids]) == set(stage.classes)
        assert set(stream.test_labels[stage.test_ids]) == set(stage.classes)
        assert (len(stage.train_ids), len(stage.test_ids)) == (20, 10)


def test_a_normalising_transform_is_left_out(module):
    plain, _ = made(f"{module}.split")
    transformed, _ = made(f"{module}.split", transform=True)
    assert (pixels(plain.train) == pixels(transformed.train)).all()


def test_domain_stream_columns(module):
    data, stream = made(f"{module}:domains", validation=0.2)
    assert [stage.classes for stage in stream.stages] == [(0, 1), (), (2,)]
    assert [len(s.train_ids) + len(s.validation_ids) for s in stream.stages] == [20, 12, 30]
    assert all(len(s.validation_ids) > 0 for s in stream.stages)
    # test rows 0-9, 10-15, 16-24; classes 0 and 1 of the last belong to column 0
    last = np.arange(16, 25)
    of_two = last[data.test.labels[16:] == 2]
    assert stream.stages[0].test_ids.tolist() == [*range(10), *sorted(set(last) - set(of_two))]
    assert stream.stages[1].test_ids.tolist() == list(range(10, 16))
    assert stream.stages[2].test_ids.tolist() == of_two.tolist()


def test_one_test_set_for_all_tasks(module):
    data, stream = made(f"{module}:domains", shared_test=True)
    assert [set(data.test.labels[s.test_ids].tolist()) for s in stream.stages] == [{0, 1}, {0, 1}, {2}]


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        (None, {}, ["scenario.benchmark=None", "dotted name"]),
        ("split", {}, ["dotted name"]),
        ("no_such_module:split", {}, ["no_such_module"]),
        ("MODULE:splt", {}, ["splt"]),
        ("MODULE:NOT_A_FUNCTION", {}, ["dotted name of a function"]),
        ("MODULE:fails", {"where": "here"}, ["RuntimeError: cannot read here"]),
        ("MODULE:split", {"colour": "red"}, ["colour", "scenario.arguments"]),
        ("MODULE:split", {"kind": "normalised"}, ["[0, 1]"]),
        ("builtins:dict", {}, ["train_stream"]),
    ],
)
def test_refused_in_one_line(module, name, arguments, words):
    with pytest.raises(UsageError) as caught:
        made(name and name.replace("MODULE", module), **arguments)
    line = str(caught.value)
    assert "\n" not in line
    assert all(word in line for word in words), line
