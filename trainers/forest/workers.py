"""The worker processes of a search that a task runs. Imports no scikit-learn, so workers can start before it is imported."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from contextlib import AbstractContextManager

import joblib
from joblib.externals.loky import reusable_executor

from trainers.contract.signals import blocked

CHECK_PARENT_EVERY_S = 1.0


def guarded_workers() -> AbstractContextManager:
    """Return a context in which joblib starts guarded workers.

    They leave signals to this process, do not warn of each score that fails (`quiet`), and exit when this process is gone,
    even after kill -9. joblib keeps these workers apart from its usual pool: entering this context after another pool was
    used starts a new pool.
    """
    return joblib.parallel_config(backend="loky", initializer=_start_worker, initargs=(os.getpid(),))


def start_workers(cores: int) -> None:
    """Start the workers that `guarded_workers` will use, and return at once. They import scikit-learn in the meantime."""
    if cores > 1:
        with guarded_workers(), joblib.Parallel(n_jobs=cores), blocked():  # Ctrl-C finds no worker that does not ignore it yet
            reusable_executor._executor.submit(os.getpid)  # the first task starts all workers


def end_workers() -> None:
    """Stop all joblib workers of this process. A process that ends by os._exit must do this itself."""
    if reusable_executor._executor is not None:
        reusable_executor._executor.shutdown(wait=True, kill_workers=True)


def quiet() -> None:
    """Silence scikit-learn's warnings about failed fits and non-finite scores, which hold tracebacks.

    For a task that reports failed fits and such scores itself.
    """
    from sklearn.exceptions import FitFailedWarning

    warnings.filterwarnings("ignore", "Scoring failed", UserWarning)
    warnings.filterwarnings("ignore", "One or more of the (test|train) scores are non-finite", UserWarning)
    warnings.filterwarnings("ignore", category=FitFailedWarning)


def _start_worker(parent: int) -> None:
    """Make this worker leave signals to its parent process, and exit when the parent is gone, even after kill -9."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(CHECK_PARENT_EVERY_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    quiet()
    import trainers.forest.fitting  # noqa: F401 - while the rank reads the table; the first piece would wait for it
