"""BatchNorm over the ranks. This file is also the program of its two ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import serve
from torch import nn

from trainers.engine.parallel.batch_norm import synchronize

SHAPES = {nn.BatchNorm1d: (12, 3), nn.BatchNorm2d: (12, 3, 4, 5), nn.BatchNorm3d: (12, 3, 2, 3, 2)}
OPTIONS = [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}]


@pytest.fixture(scope="module")
def two(ranks):
    return ranks(2)


def test_two_ranks_compute_what_one_rank_computes(two):
    for found in two("compare"):
        assert len(found) == len(SHAPES) * len(OPTIONS)
        assert max(found.values()) < 1e-5, found


def test_a_second_derivative_is_refused(two):
    assert two("second_derivative") == [True, True]


# ---- on the ranks


def second_derivative(world) -> bool:
    """Return whether torch refuses a second derivative, as a gradient penalty takes it, instead of computing a wrong one."""
    part = synchronize(make(nn.BatchNorm1d, SHAPES[nn.BatchNorm1d], {})[0], world.device)
    values = torch.randn(4, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(part(values).pow(3).sum(), values, create_graph=True)
    try:
        gradient.square().sum().backward()
    except RuntimeError as error:
        return "once_differentiable" in str(error)
    return False


def compare(world) -> dict[str, float]:
    """Return the largest relative difference from the whole batch on one rank, for each kind of BatchNorm."""
    found = {}
    for kind, shape in SHAPES.items():
        for options in OPTIONS:
            whole, inputs, targets = make(kind, shape, options)
            part, _, _ = make(kind, shape, options)
            part = synchronize(part, world.device)
            assert part.state_dict().keys() == whole.state_dict().keys()
            mine = slice(0, 5) if world.main else slice(5, 12)  # ranks may have unequal numbers of samples
            expected = step(whole, inputs, targets, slice(None))
            got = step(part, inputs, targets, mine)
            for name in expected:
                values, other = expected[name], got[name]
                if name in ("outputs", "gradient", "evaluated"):
                    values = values[mine]
                elif name.startswith("gradient of"):
                    dist.all_reduce(other)
                label = f"{kind.__name__} {options}"
                difference = (values - other).abs().max() / values.abs().max()
                found[label] = max(found.get(label, 0.0), difference.item())
    return found


def make(kind, shape, options):
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(2)
    model = nn.Sequential(nn.Identity(), kind(3, **options))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model, 10 + 3 * torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def step(model, inputs, targets, rows):
    """Two training steps and an evaluation of the rows, and everything that they compute."""
    for _ in range(2):
        model.zero_grad()
        values = inputs[rows].clone().requires_grad_()
        outputs = model(values)
        (outputs * targets[rows]).pow(2).sum().backward()
    found = {"outputs": outputs.detach(), "gradient": values.grad}
    found |= {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
    found |= {name: buffer.float() for name, buffer in model.named_buffers()}
    model.eval()
    if model[1].running_mean is not None:  # otherwise the statistics of the batch are used in evaluation too, of one rank
        found["evaluated"] = model(inputs[rows]).detach()
    return found


if __name__ == "__main__":
    serve(globals())
