"""What a run of `wine` is. Imports neither torch nor scikit-learn."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import Field, field_validator

from trainers.config.schema import SearchConfig, Section
from trainers.contract.errors import UserError

WINE_URL = "https://archive.ics.uci.edu/ml/machine-learning-databases/wine-quality/winequality-red.csv"
WINE_SHA256 = "4a402cf041b025d4566d954c3b9ba8635a3a8a01e039005d97d6a710278cf05e"

# scikit-learn's parameters by name: importing it to ask takes seconds. A test compares.
PARAMETERS = frozenset((
    "bootstrap", "ccp_alpha", "criterion", "max_depth", "max_features", "max_leaf_nodes", "max_samples",
    "min_impurity_decrease", "min_samples_leaf", "min_samples_split", "min_weight_fraction_leaf", "monotonic_cst",
    "n_estimators", "n_jobs", "oob_score", "random_state", "verbose", "warm_start"))
OF_CLASSIFIERS = frozenset(("class_weight",))

Values = dict[str, Union[list[Any], None]]
Text = Annotated[str, Field(min_length=1)]


class Model(Section):
    name: Literal["random_forest_regressor", "random_forest_classifier", "extra_trees_regressor",
                  "extra_trees_classifier"] = Field("random_forest_regressor", description="scikit-learn's, by name")
    params: dict[str, Any] = Field(default_factory=dict, description="parameters that all of the grid share")

    @property
    def classifies(self) -> bool:
        return self.name.endswith("classifier")

    @property
    def parameters(self) -> frozenset[str]:
        """The names of those that it has."""
        return PARAMETERS | OF_CLASSIFIERS if self.classifies else PARAMETERS


class Data(Section):
    source: Text = Field("wine", description="wine (UCI's red Wine Quality), sample (scikit-learn's diabetes data), a CSV file, "
                                             "or a URL of one")
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = Field(
        None, description="of the file; needed for a URL")
    root: Text | None = Field(None, description="where downloads go; null: $LAUNCH_DATA, else ~/.cache/launch")
    target: Union[int, Text, None] = Field(
        None, description="the column to predict, by name or by number from 1 (-1: the last); null: the last")
    header: bool | None = Field(None, description="whether the first line names the columns; null: if one of its cells is "
                                                  "no number")
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = Field(
        None, description="between cells; null: `;`, a tab or `,`, whichever the first line has")

    @field_validator("source", "root")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        # Made absolute where the user stands: a rank may stand elsewhere.
        if value in (None, "wine", "sample") or is_url(value):
            return value
        return os.path.abspath(os.path.expanduser(value))

    @field_validator("target")
    @classmethod
    def _from_one(cls, value: int | str | None) -> int | str | None:
        if value == 0:
            raise ValueError("must be a name, or a number from 1 on (-1: the last)")
        return value

    def download(self, environment: Mapping[str, str] = os.environ) -> tuple[str, str, Path] | None:
        """(URL, SHA-256, where it goes) of what must be on disk first; None if nothing must."""
        url, sha256 = (WINE_URL, WINE_SHA256) if self.source == "wine" else (self.source, self.sha256)
        if not is_url(url):
            return None
        root = Path(self.root or environment.get("LAUNCH_DATA") or "~/.cache/launch").expanduser()
        return url, sha256 or "", root / "tables" / f"{(sha256 or '')[:16]}.csv"


class Search(Section):
    grid: Union[Values, list[Values]] = Field(
        default_factory=dict, description="lists of values by parameter, or a list of such grids; null takes one out")
    scoring: Union[str, list[str], None] = Field(
        None, description="scikit-learn's names of scores, one or several; null: r2, of classifiers accuracy")
    refit: str | None = Field(None, description="of several scores the one that decides; null: the first")
    cv: Annotated[int, Field(ge=2)] = Field(5, description="folds")
    split: Literal["plain", "shuffled", "stratified", "grouped"] = Field(
        "plain", description="how rows are shared out: as GridSearchCV does by default, at random, each fold with the same "
                             "share of each class, or rows that are identical (or of one group) together")
    group: Text | None = Field(None, description="of split=grouped: the column that says which rows belong together, "
                                                 "which is no feature then; null: rows with identical features")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="of shuffled folds, and of what is reported")
    return_train_score: bool = False
    importance_repeats: Annotated[int, Field(ge=0)] = Field(10, description="of permutation importance; 0: none")
    compare_grouped: bool = Field(True, description="report the best parameters' score under grouped folds too")

    @property
    def grids(self) -> list[dict[str, list[Any]]]:
        """As scikit-learn takes them."""
        found = self.grid if isinstance(self.grid, list) else [self.grid]
        return [{name: values for name, values in one.items() if values is not None} for one in found]

    @property
    def scores(self) -> list[str]:
        return [self.scoring] if isinstance(self.scoring, str) else self.scoring or []


class WineConfig(SearchConfig):
    """A grid search over forests."""

    model: Model = Model()
    data: Data = Data()
    search: Search = Search()

    def check(self) -> None:
        self._check_names()
        search, data = self.search, self.data
        if not any(search.grids):
            raise UserError("the grid is empty (`search.grid`)", "give lists of values: search.grid.n_estimators=[10,100]")
        for name, values in ((name, values) for grid in search.grids for name, values in grid.items()):
            if not values:
                raise UserError(f"`search.grid.{name}` is an empty list", "give values, or null to leave it out")
        if search.scoring == [] or len(set(search.scores)) < len(search.scores):
            raise UserError("`search.scoring` is " + ("an empty list" if not search.scores else "a list with one score twice"),
                            "give scikit-learn's names of scores: search.scoring=[r2,neg_mean_absolute_error]")
        if search.refit is not None and search.refit not in search.scores:
            raise UserError(f"`search.refit` is `{search.refit}`, which is none of `search.scoring`",
                            f"one of {', '.join(search.scores)}" if search.scores else "leave it out: there is one score")
        if search.group is not None and search.split != "grouped":
            raise UserError("`search.group` is of search.split=grouped alone", f"search.split is {search.split}")
        if search.split == "stratified" and not self.model.classifies:
            raise UserError("`search.split` is `stratified`, which needs classes",
                            "use a classifier (model.name=random_forest_classifier), or search.split=shuffled")
        if is_url(data.source) and data.sha256 is None:
            raise UserError(f"`data.source` is a URL, {data.source}, and `data.sha256` is not given",
                            "download it once, look at it, and give what `sha256sum FILE` says: data.sha256=...")
        if data.download() is None and data.source != "sample" and not os.path.isfile(data.source):
            there = "is a folder" if os.path.isdir(data.source) else "is not there"
            raise UserError(f"`{data.source}` {there} (`data.source`)",
                            "give a CSV file or its URL, wine (UCI's red Wine Quality), or sample (diabetes, no download)")

    def _check_names(self) -> None:
        known = self.model.parameters
        places = [("model.params", self.model.params), *(("search.grid", grid) for grid in self.search.grids)]
        for place, name in ((place, name) for place, names in places for name in names):
            if name not in known:
                near = get_close_matches(name, sorted(known), n=1)
                raise UserError(f"`{name}` is no parameter of {self.model.name} (`{place}`)",
                                f"did you mean `{near[0]}`?" if near else f"it has {', '.join(sorted(known))}")

    def missing(self, environment: Mapping[str, str] = os.environ) -> list[str]:
        download = self.data.download(environment)
        return [f"{download[0]} in {download[2]}"] if download and not download[2].is_file() else []


def is_url(text: str) -> bool:
    return bool(re.match(r"https?://", text))
