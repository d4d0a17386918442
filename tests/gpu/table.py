"""The checks that need a GPU. Imports only the standard library, as the driver does."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: of the check.
        function: `module:function`. The function gets a Place (place.py), in a process of its own.
        seconds: about how long the check takes on one GPU.
        limit: seconds after which the check is killed.
        alone: whether no other check may run beside this one, because the check measures time or memory.
    """

    name: str
    function: str
    seconds: float
    limit: float
    alone: bool = False


# In order of value: a machine that is lent for minutes may be gone before the last check.
CHECKS = (
    Check("facts", "gpu.facts:facts", 15, 60, alone=True),
    Check("main_job", "gpu.commands:main_job", 40, 120),
    Check("precisions", "gpu.exact:precisions", 30, 90),
    Check("resume_vgg", "gpu.exact:resume_vgg", 35, 120),
    Check("resume_resnet18", "gpu.exact:resume_resnet18", 35, 120),
    Check("resume_transformer", "gpu.exact:resume_transformer", 35, 120),
    Check("strategies", "gpu.exact:strategies", 50, 150),
    Check("host_syncs", "gpu.kernels:host_syncs", 15, 60),
    Check("shared_gpu", "gpu.exact:shared_gpu", 25, 90),
    Check("out_of_memory", "gpu.trouble:out_of_memory", 40, 120),
    Check("hung_kernel", "gpu.trouble:hung_kernel", 30, 90),
    Check("workers", "gpu.trouble:workers", 15, 60),
    Check("attention", "gpu.kernels:attention", 12, 60),
    Check("noise", "gpu.kernels:noise", 10, 60),
    Check("stall", "gpu.measures:stall", 25, 90, alone=True),
    Check("throughput", "gpu.measures:throughput", 30, 90, alone=True),
    Check("memory", "gpu.measures:memory", 15, 60, alone=True),
    Check("language_model", "gpu.measures:language_model", 60, 150, alone=True),
)
