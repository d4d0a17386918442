"""What an error of torch means for the run."""

from __future__ import annotations

import pytest
import torch

from trainers.engine.failures import (
    MemoryFull,
    memory_for,
    out_of_memory,
    without_deterministic_kernel,
    work_without_memory,
)
from trainers.engine.precision import set_deterministic

CPU = torch.device("cpu")


def wrapped(cause: Exception) -> Exception:
    """Return an error that `cause` has caused, as torch's compiler raises it."""
    error = RuntimeError("a compiler's")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("error, full", [
    (torch.OutOfMemoryError("CUDA out of memory"), True), (MemoryError(), True), (RuntimeError("shapes differ"), False),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
    (RuntimeError("GET was unable to find an engine to execute this computation"), True),
    (RuntimeError("[cudnn_frontend] Error: No valid execution plans built."), True),
    (ValueError("out of memory"), False),
])
def test_errors_that_mean_full_memory(error, full):
    assert out_of_memory(error) == out_of_memory(wrapped(error)) == full


def test_an_error_of_full_memory_names_the_work_that_needed_it():
    with pytest.raises(MemoryFull) as caught, memory_for("evaluation"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert out_of_memory(caught.value) and work_without_memory(wrapped(caught.value)) == "evaluation"
    with pytest.raises(ValueError), memory_for("step"):
        raise ValueError("no matter")
    assert work_without_memory(MemoryError()) is None


@pytest.fixture
def deterministic():
    yield set_deterministic
    set_deterministic(False, False, CPU)
    torch.backends.cudnn.benchmark = False


def test_an_operation_without_a_deterministic_kernel_is_an_error_a_warning_or_neither(deterministic, recwarn):
    def put():
        torch.zeros(4).put_(torch.tensor([0]), torch.tensor([1.0]))

    deterministic(True, False, CPU)
    with pytest.raises(RuntimeError) as error:
        put()
    assert without_deterministic_kernel(error.value) == without_deterministic_kernel(wrapped(error.value)) == "put_"
    assert without_deterministic_kernel(RuntimeError("shapes differ")) is None
    assert not torch.backends.cudnn.benchmark and not recwarn
    deterministic("warn", False, CPU)
    put()
    assert "put_ does not have a deterministic implementation" in str(recwarn.pop(UserWarning).message)
    deterministic(False, False, CPU)
    put()
    assert not recwarn and torch.backends.cudnn.benchmark
