from __future__ import annotations

import math

import pytest

from trainers.checkpoints import retention
from trainers.config.schema import Checkpoint


def kept(metrics, newest=None, **config):
    newest = max(metrics) if newest is None else newest
    return sorted(set(metrics) - set(retention.stale(metrics, Checkpoint(**config), newest)))


def plain(*steps):
    return {step: {} for step in steps}


@pytest.mark.parametrize("keep_last, expected", [(1, [30]), (2, [20, 30]), (3, [10, 20, 30]), (9, [10, 20, 30])])
def test_the_last_ones_are_kept(keep_last, expected):
    assert kept(plain(30, 10, 20), keep_last=keep_last) == expected


def test_every_nth_is_kept_for_good():
    assert kept(plain(*range(10, 101, 10)), keep_last=1, keep_every=40) == [40, 80, 100]


@pytest.mark.parametrize("mode, expected", [("max", [2, 4]), ("min", [1, 4])])
def test_the_best_is_kept_by_its_mode(mode, expected):
    metrics = {1: {"top1": 0.1}, 2: {"top1": 0.9}, 3: {"top1": 0.5}, 4: {"top1": 0.3}}
    assert kept(metrics, keep_last=1, keep_best=1, metric="top1", mode=mode) == expected


def test_of_two_equally_good_steps_the_newer_is_kept():
    assert kept({1: {"f1": 0.5}, 2: {"f1": 0.5}, 3: {"f1": 0.1}}, keep_last=1, keep_best=1, metric="f1") == [2, 3]


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_metric_that_is_not_a_finite_number_is_never_best(value):
    metrics = {1: {"loss": value}, 2: {}, 3: {"loss": 0.5}, 4: {}}
    assert kept(metrics, keep_last=1, keep_best=3, metric="loss", mode="min") == [3, 4]


def test_no_step_is_best_without_a_metric_or_with_keep_best_0():
    metrics = {1: {"f1": 0.9}, 2: {"f1": 0.1}, 3: {"f1": 0.2}}
    assert kept(metrics, keep_last=1, keep_best=2) == [3]
    assert kept(metrics, keep_last=1, keep_best=0, metric="f1") == [3]


def test_newer_steps_are_neither_deleted_nor_counted():
    assert retention.stale(plain(10, 20, 30, 40), Checkpoint(keep_last=1), newest=20) == [10]


def test_the_reasons_why_steps_are_kept():
    metrics = {step: {"f1": value} for step, value in [(10, 0.9), (20, 0.1), (30, 0.2), (40, 0.8)]}
    config = Checkpoint(keep_last=2, keep_best=2, keep_every=20, metric="f1")
    assert list(retention.kept(metrics, config).items()) == [
        (40, ["last", "best", "every"]), (30, ["last"]), (20, ["every"]), (10, ["best"])]
    assert retention.ranked(metrics, config) == [20, 30, 40, 10]
