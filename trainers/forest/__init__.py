"""Grid search over forests of trees: the results of scikit-learn's GridSearchCV for several times less work.

    from trainers.forest import ForestSearchCV  # instead of sklearn.model_selection.GridSearchCV

This package does not import `launch`.
"""

from trainers.forest.saved import SavedForest, load_forest, save_forest
from trainers.forest.search import ForestSearchCV

__all__ = ["ForestSearchCV", "SavedForest", "load_forest", "save_forest"]
