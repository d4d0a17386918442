"""The task `cifar10`: its settings, its models, its measures and its report."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import ValidationError
from ruamel.yaml import YAML

import trainers.cifar10
from trainers.cifar10.config import Cifar10Config, Data, Model, torchvision_models
from trainers.cifar10.model import make_model
from trainers.cifar10.task import Cifar10
from trainers.contract.errors import UserError
from trainers.data.images import mean_and_std
from trainers.engine.batches.evaluating import evaluation_shares
from trainers.engine.batches.sampling import Shuffled
from trainers.engine.schedule import learning_rate
from trainers.engine.world import World

ONE = World(0, 1, 0, 1, torch.device("cpu"))
SPEC = YAML(typ="safe").load(Path(trainers.cifar10.__file__).with_name("cifar10.yaml"))


def config(model: dict | None = None, **data) -> Cifar10Config:
    return Cifar10Config(**SPEC | {"model": SPEC["model"] | (model or {}), "data": {"source": "sample"} | data})


def sample_task(model: dict | None = None, **data) -> Cifar10:
    task = Cifar10(config({"width": 0.1} | (model or {}), **data))
    task.train, task.test = task.data(ONE)
    return task


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# --- Config


def test_config_imports_no_framework():
    code = "import sys, trainers.cifar10.config as c; c.torchvision_models(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "trainers.cifar10.config" in loaded
    assert not {"torch", "torchvision", "numpy", "PIL", "matplotlib"} & set(loaded)


def test_the_spec_names_what_exists():
    assert SPEC["name"] == "cifar10" and config().checkpoint.metric == "top1"
    assert SPEC["task"] == f"{Cifar10.__module__}:{Cifar10.__name__}"
    assert SPEC["config"] == f"{Cifar10Config.__module__}:{Cifar10Config.__name__}"


def test_paths_become_absolute_and_names_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Data(source="a folder").source == str(tmp_path / "a folder")
    assert Data(source="./sample").source == str(tmp_path / "sample")
    assert Data(source="~/x", root="down").source == str(tmp_path / "home" / "x")
    assert Data(root="down").root == str(tmp_path / "down")
    assert (Data(source="sample").source, Data().source) == ("sample", "cifar10")
    again = Data(source="a folder")
    assert Data(**again.model_dump()) == again


def test_the_folder_for_downloads(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LAUNCH_DATA", raising=False)
    assert Data().download_root() == tmp_path / ".cache" / "launch"
    monkeypatch.setenv("LAUNCH_DATA", "~/sets")
    assert Data().download_root() == tmp_path / "sets"
    assert Data(root="/elsewhere").download_root() == Path("/elsewhere")


@pytest.mark.parametrize("model, data, message", [
    ({"arch": "resnet18", "width": 0.5}, {}, "model.width is only for vgg"),
    ({}, {"pad": 32}, "narrower than data.size, 32"), ({"width": 0.0}, {}, "greater than 0"),
    ({"dropout": 1.0}, {}, "less than 1"), ({}, {"eval_fraction": 1.0}, "less than 1"), ({}, {"source": ""}, "source"),
])
def test_bad_values_are_refused(model, data, message):
    with pytest.raises(ValidationError, match=message):
        config(model, **data)


@pytest.mark.parametrize("arch, hint", [("resnet81", "did you mean resnet18, "), ("vg", "did you mean vgg11"),
                                        ("bgg", "did you mean vgg"),
                                        ("efficientnet", "efficientnet_b0"), ("???", "vgg, resnet18, or a classifier")])
def test_an_unknown_architecture_gets_a_hint_with_near_names(arch, hint):
    with pytest.raises(UserError) as error:
        config({"arch": arch}).check()
    assert f"`{arch}`" in error.value.message and hint in error.value.hint and len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize("arch", ["vgg", "resnet18", "mobilenet_v3_small"])
def test_a_known_architecture_is_accepted(arch):
    config({"arch": arch}).check()


def test_the_names_read_from_the_source_are_those_of_torchvision():
    from torchvision import models
    assert sorted(torchvision_models()) == models.list_models(module=models)


def test_check_without_torchvision_leaves_the_name_to_the_rank(monkeypatch):
    monkeypatch.setattr("trainers.cifar10.config.find_spec", lambda name: None)
    config({"arch": "anything"}).check()


def test_check_refuses_a_bad_folder(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        config(source=str(tmp_path / "none")).check()
    with pytest.raises(UserError, match="no class folders"):
        config(source=str(tmp_path)).check()


# --- Models


def test_the_layers_of_vgg():
    model = make_model(Model(width=1.0), 10, 32)
    assert model.features == 2048 == model.classifier[0].in_features
    shapes = [m.weight.shape[:2] for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert shapes == [(64, 3), (128, 64), (256, 128), (256, 256), (512, 256), (512, 512)]
    assert sum(isinstance(m, torch.nn.MaxPool2d) for m in model.modules()) == 4
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()) == 6
    assert sum(isinstance(m, torch.nn.Linear) for m in model.modules()) == 3
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in make_model(Model(batch_norm=False), 10, 32).modules())


def test_the_parameters_of_resnet18():
    assert parameters(make_model(Model(arch="resnet18"), 10, 32)) == 11_173_962
    assert parameters(make_model(Model(arch="resnet18"), 100, 32)) == 11_220_132


@pytest.mark.parametrize("arch, size", [*(("vgg", size) for size in (8, 28, 32, 40, 64, 96, 224)), ("resnet18", 16),
                                        ("shufflenet_v2_x0_5", 32), ("squeezenet1_1", 32)])
@pytest.mark.parametrize("n", [0, 2])
def test_the_shape_of_the_logits(arch, size, n):
    model = make_model(Model(arch=arch, width=0.05 if arch == "vgg" else 1.0), 7, size).eval()
    with torch.no_grad():
        assert model(torch.randn(n, 3, size, size)).shape == (n, 7)


def test_a_name_that_torchvision_does_not_have_is_refused():
    with pytest.raises(UserError, match="`nonesuch`"):
        make_model(Model(arch="nonesuch"), 10, 32)


@pytest.mark.parametrize("arch", ["vgg", "resnet18"])
def test_gradients_have_the_memory_order_of_their_parameters(arch):
    """Only activations are channels-last. Parameters and gradients, which are saved and reduced, are not."""
    model = make_model(Model(arch=arch), 10, 32)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.is_contiguous() and p.grad.stride() == p.stride() for p in model.parameters())


# --- Task


def test_loss_is_a_sum_with_smoothing():
    task = sample_task({"label_smoothing": 0.2})
    model = task.model().eval()
    images, labels = task.test.batch(evaluation_shares(500, 8, 0, 1)[0])
    loss = task.loss(model, (images, labels))
    log = model(images).log_softmax(1)
    target = 0.8 * F.one_hot(labels, 10) + 0.02
    assert loss.count == 8 and torch.allclose(loss.sum, -(target * log).sum())


def summed(task, model, parts):
    sums: dict[str, list[torch.Tensor]] = {}
    for part in parts:
        for name, pair in task.measure(model, part).items():
            new = [torch.as_tensor(value).double() for value in pair]
            sums[name] = [a + b for a, b in zip(sums[name], new)] if name in sums else new
    return {name: total / count for name, (total, count) in sums.items()}


def test_measuring_reads_no_value_of_the_device():
    """Tensors without values stand for a GPU's: reading one would make the host wait, and is an error here."""
    task = sample_task()
    with torch.device("meta"):
        measured = task.measure(task.model(), (torch.empty(8, 3, 32, 32), torch.empty(8, dtype=torch.int64)))
    assert measured["confusion"][0].is_meta and measured["confusion"][1] == 8


def test_measures_of_parts_equal_measures_of_the_whole():
    """Sums over uneven parts equal the measures of the whole set, as counted with numpy."""
    task = sample_task()
    torch.manual_seed(0)
    model = task.model().eval()
    with torch.no_grad():
        parts = [task.test.batch(s) for rank in range(3) for s in evaluation_shares(500, 64, rank, 3)]
        images, labels = task.test.batch(evaluation_shares(500, 500, 0, 1)[0])
        measured, logits = summed(task, model, parts), model(images)
    predicted, true = logits.argmax(1).numpy(), labels.numpy()
    counts = np.zeros((10, 10))
    np.add.at(counts, (true, predicted), 1)
    np.testing.assert_array_equal((measured["confusion"] * 500).round(), counts)
    np.testing.assert_allclose(measured["class"], counts.diagonal() / 50)
    np.testing.assert_allclose(measured["top1"], (predicted == true).mean())
    np.testing.assert_allclose(measured["loss"], F.cross_entropy(logits, labels), rtol=1e-5)


def test_report_leaves_out_classes_without_images():
    task = sample_task()
    confusion = torch.zeros(10, 10, dtype=torch.float64)
    confusion[0, 0], confusion[1, 0] = 0.75, 0.25
    measured = {"loss": torch.tensor(0.5), "top1": torch.tensor(0.75), "confusion": confusion,
                "class": confusion.diagonal() / confusion.sum(1)}
    assert task.report(measured, None) == {"loss": 0.5, "top1": 0.75, "class/checkers": 1.0, "class/circle": 0.0}


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_the_figure_of_the_confusion_matrix(tmp_path, classes):
    task = sample_task()
    task.classes, task.evaluated = [f"class $ 数 {n}" for n in range(classes)], 20 * classes
    confusion = (torch.eye(classes) * 15 + 5 / classes) / (20 * classes)
    measured = {"top1": confusion.trace(), "confusion": confusion, "class": torch.full((classes,), 0.75)}
    task.report(measured, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["confusion.png"]
    with Image.open(tmp_path / "confusion.png") as picture:
        assert 400 <= min(picture.size) and max(picture.size) <= 2000
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    dark = (pixels[..., 2] - pixels[..., 0] > 60).mean()  # the blue cells of the diagonal, and the colour bar
    assert 0.005 < dark < 0.5


def test_the_folder_decides_the_number_of_classes(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("ä", "b", "c"):
        for number in range(4):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(tmp_path / name / f"{number}.png")
    task = sample_task(source=str(tmp_path), size=16, pad=2, eval_fraction=0.25)
    assert task.train.pixels.shape == (9, 3, 16, 16) and task.evaluated == len(task.test) == 3
    assert task.train.augment.pad == 2 and not task.test.augment.active
    assert task.model()(task.train.batch(evaluation_shares(9, 9, 0, 1)[0])[0]).shape == (9, 3)


def coloured(root: Path, classes: str) -> Path:
    """Make a folder with one image for each class: the class decides the colour."""
    for name in classes:
        (root / "test" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (30 * (ord(name) - 90),) * 3).save(root / "test" / name / "x.png")
    return root


TRAINED = {"classes": ["d", "a", "b"], "mean": [0.5, 0.25, 0.75], "std": [0.5, 0.5, 0.25], "size": 8, "files": "f" * 16}


def evaluation_set(source: Path, facts=TRAINED) -> Cifar10:
    task = Cifar10(config({"width": 0.1}, source=str(source), size=8, pad=2))
    task.trained_facts = facts
    task.train, task.test = task.data(ONE)
    return task


def test_other_data_is_evaluated_with_the_classes_and_statistics_of_the_training(tmp_path):
    task = evaluation_set(coloured(tmp_path / "one", "ab"))
    assert task.classes == ["d", "a", "b"]
    images, labels = task.test.batch(evaluation_shares(2, 2, 0, 1)[0])
    assert labels.tolist() == [1, 2]
    value = 30 * (ord("a") - 90) / 255
    expected = torch.tensor([(value - 0.5) / 0.5, (value - 0.25) / 0.5, (value - 0.75) / 0.25])
    torch.testing.assert_close(images[0, :, 0, 0], expected)
    assert task.model()(images).shape == (2, 3)


@pytest.mark.parametrize("change, said", [
    ({"size": 16}, "data.size=16, but is evaluated with data.size=8"), ({"bits": 12}, "data.bits=12, but is evaluated with "
                                                                                      "data.bits=null"), ({"bits": None}, "")])
def test_other_settings_than_in_training_deserve_a_warning(tmp_path, capsys, change, said):
    evaluation_set(coloured(tmp_path / "one", "ab"), {**TRAINED, **change})
    out = capsys.readouterr().out
    assert f"the model was trained with {said}" in out if said else "the model was trained with" not in out


def test_classes_that_the_model_does_not_know_are_refused(tmp_path):
    with pytest.raises(UserError, match="trained on the classes d, a, b, which do not include `c`"):
        evaluation_set(coloured(tmp_path / "one", "abc"))


def test_the_facts_of_a_run(tmp_path):
    task = sample_task()
    facts = task.facts()
    assert facts["classes"] == task.train.classes and facts["size"] == 32 and "files" not in facts
    assert facts["mean"] == mean_and_std(task.train.pixels.numpy()).mean
    again = Cifar10(config({"width": 0.1}))
    again.trained_facts = {**facts, "classes": facts["classes"][::-1], "std": [1.0, 1.0, 1.0]}
    _, test = again.data(ONE)
    assert test.labels.tolist() == (9 - task.test.labels).tolist() and again.facts()["std"] == [1.0, 1.0, 1.0]


@pytest.mark.slow
def test_the_sample_is_learnt():
    task = sample_task({"width": 0.25})
    torch.manual_seed(0)
    model, spec = task.model(), task.config
    order = Shuffled(len(task.train), spec.train.batch_size, 0, "model")
    total = order.steps(12)
    optimizer = torch.optim.SGD(model.parameters(), lr=spec.optim.lr, momentum=spec.optim.momentum,
                                nesterov=spec.optim.nesterov, weight_decay=spec.optim.weight_decay)
    for step in range(total):
        optimizer.param_groups[0]["lr"] = learning_rate(spec.optim, step, total)
        loss = task.loss(model, task.train.batch(order.shares(step, 0, 1)[0]))
        optimizer.zero_grad()
        (loss.sum / loss.count).backward()
        optimizer.step()
    with torch.no_grad():
        measured = summed(task, model.eval(), [task.test.batch(s) for s in evaluation_shares(500, 250, 0, 1)])
    assert measured["top1"] > 0.9
