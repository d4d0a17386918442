"""Grid search over forests, as exact as scikit-learn's and several times less work. Needs nothing of `launch`.

    from trainers.forest import ForestSearchCV  # in the place of sklearn.model_selection.GridSearchCV
"""

from trainers.forest.saved import SavedForest, load_forest, save_forest
from trainers.forest.search import ForestSearchCV

__all__ = ["ForestSearchCV", "SavedForest", "load_forest", "save_forest"]
