"""Map-style data sets and their workers. Ranks with workers are tested in tests/pictures/test_workers.py."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import namedtuple

import numpy as np
import pytest
import torch
from conftest import alive, wait_until
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from trainers.engine.batches.data_sets import checked
from trainers.engine.batches.sampling import Shuffled
from trainers.engine.map_style import DataError, MapStyle, on_device
from trainers.engine.task import Share
from trainers.engine.world import World
from trainers.errors import UserError

CPU = torch.device("cpu")
WORLD = World(0, 1, 0, 1, CPU)


class Noisy:
    """Row r is (r, numbers from the three global generators). `broken` names a row that cannot be made, and how."""

    def __init__(self, count=40, broken=None):
        self.count, self.broken = count, broken or {}

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        match self.broken.get(row):
            case "raise":
                raise ValueError("a bad\nfile")
            case "refuse":
                raise UserError(f"file {row} is empty", "remove it")
            case "exit":
                raise SystemExit(3)
            case "shape":
                return torch.zeros(3, 4), 1
            case "wait":
                time.sleep(600)
        return torch.tensor([row, random.random(), np.random.rand(), torch.rand(()).item()]), 1


def epochs_of(dataset, shares, workers, ahead=True, start_method="fork"):
    bound = MapStyle(dataset, workers=workers, start_method=start_method).bound("the training set", 5, CPU)
    try:
        if ahead:
            bound.ahead(iter(shares))
        return [bound.batch(share)[0] for share in shares]
    finally:
        bound.close()


def error_of(bound, share):
    """Return the DataError of a batch. Its traceback would keep the loader alive until a garbage collection, which closes the
    files of the loader's threads in any order."""
    try:
        bound.batch(share)
    except DataError as error:
        error.__context__ = None
        return error.with_traceback(None)
    raise AssertionError("no error")


def shares_of(ranks=1, micro=None, draws=12):
    samples = Shuffled(40, 12, 1, "model", micro)
    return [share for draw in range(draws) for rank in range(ranks) for share in samples.shares(draw, rank, ranks)]


def test_samples_depend_neither_on_workers_nor_ranks_nor_micro_batches():
    whole = epochs_of(Noisy(), shares_of(), 0)
    assert len(torch.cat(whole).unique(dim=0)) == 144  # 3.6 epochs: the same row is another sample in each
    for workers in (1, 3):
        assert all(map(torch.equal, epochs_of(Noisy(), shares_of(), workers), whole))
    assert torch.equal(torch.cat(epochs_of(Noisy(), shares_of(ranks=2, micro=3), 2)), torch.cat(whole))


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_workers_of_a_fresh_python_make_the_same_samples(start_method):
    whole = epochs_of(Noisy(), shares_of(draws=3), 0)
    assert all(map(torch.equal, epochs_of(Noisy(), shares_of(draws=3), 2, start_method=start_method), whole))


def test_the_ranks_own_noise_does_not_depend_on_workers():
    for workers in (0, 2):
        torch.manual_seed(1), np.random.seed(1), random.seed(1)
        epochs_of(Noisy(), shares_of(draws=2), workers)
        assert (torch.rand(()).item(), np.random.rand(), random.random()) == pytest.approx(
            (0.7576315999031067, 0.417022004702574, 0.13436424411240122))


def test_batches_that_were_not_announced_or_are_asked_for_twice_or_left_out_are_right():
    shares = shares_of()
    whole = epochs_of(Noisy(), shares, 0)
    bound = MapStyle(Noisy(), workers=2).bound("the training set", 5, CPU)
    bound.ahead(iter(shares))
    try:
        for number in (0, 0, 1, 3, 3, 11, 4, 5):
            assert torch.equal(bound.batch(shares[number])[0], whole[number])
        for _ in range(2):  # two evaluations, the first of which was not finished
            bound.ahead(shares)
            assert all(torch.equal(bound.batch(share)[0], batch) for share, batch in zip(shares[:5], whole))
    finally:
        bound.close()


def test_workers_make_the_batches_ahead():
    class Where(Noisy):
        def __getitem__(self, row):
            return os.getpid()

    batches = []
    bound = MapStyle(Where(), workers=2, collate=lambda samples: samples).bound("the training set", 5, CPU)
    shares = shares_of()
    bound.ahead(shares)
    pids = {process.pid for process in bound._processes}
    try:
        batches = [bound.batch(share)[0] for share in shares]
        assert batches == [*batches[:2] * 6] and set(batches) == pids and len(pids) == 2
        assert bound.batch(shares[0])[0] == os.getpid()  # not announced again
        bound.ahead(shares)
        assert bound.batch(shares[0])[0] in pids
    finally:
        bound.close()
    wait_until(lambda: not any(map(alive, pids)), 10)


def test_two_sets_of_one_object_have_their_own_noise_and_workers():
    dataset = MapStyle(Noisy(), workers=1)
    train, evaluation = (checked(name, dataset, 3, WORLD) for name in ("training set", "evaluation set"))
    share = Share(np.arange(4), np.arange(4), 4, 0)
    assert torch.equal(train.batch(share)[0][:, 0], evaluation.batch(share)[0][:, 0])
    assert not (train.batch(share)[0][:, 1:] == evaluation.batch(share)[0][:, 1:]).any()
    assert torch.equal(train.batch(share)[0], checked("training set", Noisy(), 3, WORLD).batch(share)[0])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("broken, message, hint", [
    ("raise", "row 17 of Noisy: ValueError: a bad file", "the traceback is in the log"),
    ("refuse", "row 17 of Noisy: file 17 is empty", "remove it"),
    ("exit", "row 17 of Noisy: SystemExit: 3", "the traceback is in the log"),
    ("shape", "the samples of Noisy cannot be put into one batch: row 17 is (float32 [3, 4], int), but row 16 is (float32 [4], "
              "int)", "Resize"),
])
def test_a_sample_that_cannot_be_made_is_named(workers, broken, message, hint, capfd):
    share = Share(np.arange(16, 19), np.arange(3), 3, 0)
    bound = MapStyle(Noisy(broken={17: broken}), workers=workers).bound("the training set", 5, CPU)
    bound.ahead([share])
    error = error_of(bound, share)
    bound.close()
    assert error.message == f"the training set: {message}" and hint in error.hint
    shown = capfd.readouterr().err
    assert ("test_map_style.py" in shown and "__getitem__" in shown) == (broken in ("raise", "exit"))


def test_samples_that_default_collate_cannot_take_are_named():
    share = Share(np.arange(2), np.arange(2), 2, 0)
    with pytest.raises(DataError, match=r"cannot be put into one batch: they are \{image: object, label: int\}"):
        MapStyle([{"image": object(), "label": 1}] * 2).batch(share)
    with pytest.raises(DataError, match="cannot be put into one batch: ZeroDivisionError: division by zero"):
        MapStyle([1, 2], collate=lambda samples: 1 / 0).batch(share)


@pytest.mark.parametrize("number, words", [(signal.SIGKILL, "memory runs out"), (signal.SIGBUS, "/dev/shm")])
def test_a_worker_that_is_killed_is_named_at_once(number, words):
    share = Share(np.arange(16, 19), np.arange(3), 3, 0)
    bound = MapStyle(Noisy(broken={17: "wait"}), workers=2).bound("the training set", 5, CPU)
    on_child = signal.getsignal(signal.SIGCHLD)
    bound.ahead([share])
    # Not by SIGALRM, which limits the time of a test.
    threading.Timer(0.3, os.kill, (bound._processes[0].pid, number)).start()
    began = time.monotonic()
    error = error_of(bound, share)
    assert time.monotonic() - began < 4  # torch itself looks every 5 s
    pid = bound._processes[0].pid
    bound.close()
    assert error.message == f"the training set: a worker (process {pid}, one of 2) was ended by {number.name}"
    assert words in error.hint and error.retry and error.exit_code == 1
    assert signal.getsignal(signal.SIGCHLD) == on_child


def test_a_killed_worker_is_named_also_where_its_socket_closes_first():
    bound = MapStyle(Noisy(), workers=1).bound("the training set", 5, CPU)
    bound.ahead([])

    def reset():
        os.kill(bound._processes[0].pid, signal.SIGKILL)
        raise ConnectionResetError

    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    try:
        with pytest.raises(DataError, match="was ended by SIGKILL"):
            bound._waiting(reset)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        bound.close()


def test_workers_ignore_stop_signals_but_end_with_close():
    bound = MapStyle(Noisy(), workers=2).bound("the training set", 5, CPU)
    shares = shares_of()
    for _ in range(5):  # also while they start
        bound.ahead(shares)
        pids = [process.pid for process in bound._processes]
        for pid in pids:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP):
                os.kill(pid, number)
        assert len([bound.batch(share) for share in shares]) == 12
        bound.close()
        wait_until(lambda: not any(map(alive, pids)), 10)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


@pytest.mark.parametrize("dataset, message", [
    (Stream(), "the training set: Stream only gives its samples one after another"),
    ((row for row in range(3)), "the training set: generator only gives its samples one after another"),
    (DataLoader([1, 2]), "the training set: the data set is a DataLoader"),
    (3, "the training set: int is no data set: it has no `__len__`"),
    ({1, 2}, "the training set: set only gives its samples one after another"),
])
def test_what_is_no_map_style_data_set_is_refused(dataset, message):
    with pytest.raises(UserError) as error:
        checked("training set", dataset, 1, WORLD)
    assert error.value.message == message and error.value.hint


def test_bad_numbers_are_refused():
    for arguments in ({"workers": -1}, {"workers": 1.5}, {"workers": True}, {"prefetch": 0}, {"start_method": "thread"}):
        with pytest.raises(UserError, match=f"MapStyle: `{next(iter(arguments))}` is"):
            MapStyle([1, 2], **arguments)


def test_a_data_set_that_cannot_be_pickled_needs_a_fork():
    bound = MapStyle(TensorDataset(torch.zeros(3)), collate=lambda samples: samples, workers=1, start_method="spawn")
    with pytest.raises(UserError, match="data set: TensorDataset cannot be sent to a worker: .*lambda") as error:
        bound.ahead([])
    assert 'start_method="fork"' in error.value.hint
    bound.close()


def test_more_workers_than_cores_give_a_warning(capsys):
    many = os.cpu_count() + 1
    checked("training set", MapStyle(Noisy(), workers=many), 1, World(1, 2, 1, 2, CPU))
    assert capsys.readouterr().out == ""  # rank 0 warns
    checked("training set", MapStyle(Noisy(), workers=many), 1, World(0, 2, 0, 2, CPU))
    assert f"the training set has {many} workers on each rank, but a rank has" in capsys.readouterr().out
    checked("training set", MapStyle(Noisy(), workers=1), 1, World(0, 2, 0, 2, CPU))
    assert capsys.readouterr().out == ""


def test_batches_of_any_form_go_to_the_device():
    Pair = namedtuple("Pair", "a b")
    meta = torch.device("meta")
    ones = torch.ones(2)
    moved = on_device({"x": [ones, "text"], "y": Pair(ones, (ones, 3)), "z": None}, meta)
    assert moved["x"][0].device == meta and moved["x"][1] == "text" and moved["z"] is None
    packed = on_device(pack_sequence([ones, ones]), meta)
    assert packed.data.device == meta and packed.batch_sizes.device == CPU
    assert isinstance(moved["y"], Pair) and moved["y"].a.device == moved["y"].b[0].device == meta and moved["y"].b[1] == 3


class Wide:
    """Images whose mean is subtracted: a sum over many pixels."""

    def __len__(self):
        return 2

    def __getitem__(self, row):
        pixels = torch.rand(3, 512, 512)
        return pixels - pixels.mean()


def test_samples_have_the_bits_of_a_worker_whatever_the_threads_of_the_rank():
    share, threads = Share(np.arange(2), np.arange(2), 2, 0), torch.get_num_threads()
    made = {}
    try:
        for workers, torch_threads in ((1, 1), (0, 1), (0, 4), (0, 7)):
            torch.set_num_threads(torch_threads)
            data = checked("training set", MapStyle(Wide(), workers=workers), 1, WORLD)
            data.ahead([share])
            made[workers, torch_threads] = data.batch(share)
            data.close()
            assert torch.get_num_threads() == torch_threads
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(made[1, 1], batch) for batch in made.values())
