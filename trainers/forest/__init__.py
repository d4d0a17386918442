"""Grid search over forests of trees: the results of scikit-learn's GridSearchCV for several times less work.

    from trainers.forest import ForestSearchCV  # instead of sklearn.model_selection.GridSearchCV

This package does not import `launch`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainers.forest.saved import SavedForest, load_forest, save_forest
    from trainers.forest.search import ForestSearchCV

__all__ = ["ForestSearchCV", "SavedForest", "load_forest", "save_forest"]


def __getattr__(name: str) -> Any:
    """Import a public name on its first use: trainers.forest.workers must not wait for scikit-learn."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("trainers.forest." + ("search" if name == "ForestSearchCV" else "saved")), name)
