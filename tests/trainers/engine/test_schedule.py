from __future__ import annotations

import pytest
import torch

from trainers.config.schema import Optim
from trainers.engine.schedule import learning_rate


def rates(total: int, **optim) -> list[float]:
    return [learning_rate(Optim(lr=0.4, **optim), applied, total) for applied in range(total)]


@pytest.mark.parametrize("warmup", [0.0, 0.2])
def test_onecycle_gives_the_rates_of_pytorchs_onecyclelr(warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.4, total_steps=101, pct_start=warmup or 0.3,
                                                    cycle_momentum=False)
    expected = []
    for _ in range(101):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        if len(expected) < 101:
            scheduler.step()
    got = rates(101, schedule="onecycle", warmup=warmup)
    # PyTorch's peak is one step earlier, at pct_start * total - 1.
    assert max(abs(a - b) for a, b in zip(expected, got)) < 0.4 * 0.06
    assert got[0] == pytest.approx(0.4 / 25) and max(got) == pytest.approx(0.4, rel=1e-3)
    assert got[-1] == pytest.approx(0.4 / 25e4, rel=1e-6)


def test_cosine_and_linear_rise_in_the_warm_up_and_then_fall_to_final_lr():
    cosine = rates(100, schedule="cosine", warmup=10.0, final_lr=0.1)
    linear = rates(100, schedule="linear", warmup=0.1, final_lr=0.1)
    for curve in (cosine, linear):
        assert curve[:11] == sorted(curve[:11]) and curve[10:] == sorted(curve[10:], reverse=True)
        assert curve[0] == pytest.approx(0.4 / 11) and curve[10] == 0.4
        assert 0.04 < curve[-1] < 0.045
    assert linear[55] == pytest.approx(0.22) and cosine[55] == pytest.approx(0.22)
    assert set(rates(100, warmup=3.0)[3:]) == {0.4}


def test_inverse_sqrt_is_the_schedule_of_attention_is_all_you_need():
    """lr = d_model^-0.5 * min(step^-0.5, step * warmup^-1.5), whose peak is (d_model * warmup)^-0.5."""
    peak = (512 * 4000) ** -0.5
    for step in (1, 2, 1000, 3999, 4000, 4001, 16_000, 300_000):
        expected = 512**-0.5 * min(step**-0.5, step * 4000**-1.5)
        assert learning_rate(Optim(lr=peak, schedule="inverse_sqrt", warmup=4000), step - 1, 10) == pytest.approx(expected)
    assert rates(400, schedule="inverse_sqrt", warmup=0.1)[39] == 0.4  # a tenth of all steps
    assert rates(400, schedule="inverse_sqrt", warmup=0.1)[159] == pytest.approx(0.2)
    assert rates(3, schedule="inverse_sqrt", warmup=0.1)[0] == 0.4  # a warm-up of less than a step


def test_inverse_sqrt_needs_a_warm_up():
    with pytest.raises(ValueError, match="inverse_sqrt needs optim.warmup"):
        Optim(schedule="inverse_sqrt")
