"""The settings of a `wine` run. This module imports neither torch nor scikit-learn."""

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
from trainers.contract.home import downloads, expanded

WINE_URL = "https://archive.ics.uci.edu/ml/machine-learning-databases/wine-quality/winequality-red.csv"
WINE_SHA256 = "4a402cf041b025d4566d954c3b9ba8635a3a8a01e039005d97d6a710278cf05e"

# The names of scikit-learn's parameters. Importing scikit-learn to ask for them takes seconds. A test compares the names.
PARAMETERS = frozenset((
    "bootstrap", "ccp_alpha", "criterion", "max_depth", "max_features", "max_leaf_nodes", "max_samples",
    "min_impurity_decrease", "min_samples_leaf", "min_samples_split", "min_weight_fraction_leaf", "monotonic_cst",
    "n_estimators", "n_jobs", "oob_score", "random_state", "verbose", "warm_start"))
OF_CLASSIFIERS = frozenset(("class_weight",))

Values = dict[str, Union[list[Any], None]]
Text = Annotated[str, Field(min_length=1)]


class Model(Section):
    name: Literal["random_forest_regressor", "random_forest_classifier", "extra_trees_regressor",
                  "extra_trees_classifier"] = Field("random_forest_regressor", description="the estimator of scikit-learn")
    params: dict[str, Any] = Field(default_factory=dict, description="parameters that are the same for the whole grid")

    @property
    def classifies(self) -> bool:
        return self.name.endswith("classifier")

    @property
    def parameters(self) -> frozenset[str]:
        """The names of the parameters that this model has."""
        return PARAMETERS | OF_CLASSIFIERS if self.classifies else PARAMETERS


class Data(Section):
    source: Text = Field("wine", description="wine (UCI's red Wine Quality), sample (scikit-learn's diabetes data), a CSV file, "
                                             "or the URL of a CSV file")
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = Field(
        None, description="SHA-256 of the file; required for a URL")
    root: Text | None = Field(None, description="where downloads go; null: $LAUNCH_DATA, else ~/.cache/launch")
    target: Union[int, Text, None] = Field(
        None, description="the column to predict: its name, or its number from 1 (-1: the last); null: the last")
    header: bool | None = Field(None, description="whether the first line holds the names of the columns; null: true if it "
                                                  "has text above numbers, or no numbers")
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = Field(
        None, description="the character between cells; a blank: any number of blanks; null: the one of `;`, tab, `|`, `,` and "
                          "blank that gives all rows equally many cells")
    decimal: Literal[".", ","] | None = Field(
        None, description="the decimal mark; null: a comma, if numbers have one and the character between cells is another")
    encoding: Text | None = Field(None, description="the encoding of the file; null: UTF-8 or UTF-16, else Windows-1252")

    @field_validator("source", "root")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        # Paths become absolute here, because a rank may have another working directory.
        if value in (None, "wine", "sample") or is_url(value):
            return value
        return os.path.abspath(expanded(value))

    @field_validator("encoding")
    @classmethod
    def _exists(cls, value: str | None) -> str | None:
        try:
            b" ".decode(value or "utf-8")
        except UnicodeDecodeError:  # characters have several bytes
            pass
        except (LookupError, UnicodeError):  # also codecs that are no text encodings, such as hex
            raise ValueError("must be an encoding that Python knows, such as latin-1, utf-16 or gbk") from None
        return value

    @field_validator("target")
    @classmethod
    def _from_one(cls, value: int | str | None) -> int | str | None:
        if value == 0:
            raise ValueError("must be the name of a column, or its number from 1 (-1: the last)")
        return value

    def download(self, environment: Mapping[str, str] = os.environ) -> tuple[str, str, Path] | None:
        """Return (URL, SHA-256, path on disk) of the file to download, or None if nothing must be downloaded."""
        url, sha256 = (WINE_URL, WINE_SHA256) if self.source == "wine" else (self.source, self.sha256)
        if not is_url(url):
            return None
        return url, sha256 or "", downloads(self.root, environment) / "tables" / f"{(sha256 or '')[:16]}.csv"


class Search(Section):
    grid: Union[Values, list[Values]] = Field(
        default_factory=dict, description="a list of values for each parameter, or a list of such grids; null leaves one out")
    scoring: Union[str, list[str], None] = Field(
        None, description="one or several of scikit-learn's score names; null: r2, or accuracy for a classifier")
    refit: str | None = Field(None, description="the score that selects the best grid point; null: the first")
    cv: Annotated[int, Field(ge=2)] = Field(5, description="number of folds")
    split: Literal["plain", "shuffled", "stratified", "grouped"] = Field(
        "plain", description="how rows are divided into folds. plain: as GridSearchCV does by default; shuffled: at random; "
                             "stratified: at random, with the same share of each class in each fold; grouped: rows that are "
                             "identical, or in one group, stay in one fold")
    group: Text | None = Field(None, description="for split=grouped: the column that gives the group of each row, and is "
                                                 "then not a feature; null: rows with identical features are one group")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="for random folds, and for the permutation importance")
    return_train_score: bool = False
    importance_repeats: Annotated[int, Field(ge=0)] = Field(10, description="repeats of the permutation importance; 0: none")
    compare_grouped: bool = Field(True, description="also report the score of the best parameters under grouped folds")

    @property
    def grids(self) -> list[dict[str, list[Any]]]:
        """The grids as scikit-learn takes them, without the parameters that are null."""
        grids = self.grid if isinstance(self.grid, list) else [self.grid]
        return [{name: values for name, values in grid.items() if values is not None} for grid in grids]

    @property
    def scores(self) -> list[str]:
        """The names of the scores; empty for the default score."""
        return [self.scoring] if isinstance(self.scoring, str) else self.scoring or []


class WineConfig(SearchConfig):
    """The spec of a grid search over forests."""

    seed_keys = ("search.seed", "model.params.random_state")

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
                raise UserError(f"`search.grid.{name}` is an empty list", f"give values, or null to leave `{name}` out")
        if search.scoring == [] or len(set(search.scores)) < len(search.scores):
            raise UserError("`search.scoring` is " + ("an empty list" if not search.scores else "a list with a score twice"),
                            "give score names of scikit-learn: search.scoring=[r2,neg_mean_absolute_error]")
        if search.refit is not None and search.refit not in search.scores:
            raise UserError(f"`search.refit` is `{search.refit}`, which is not in `search.scoring`",
                            f"use one of {', '.join(search.scores)}" if search.scores else
                            "leave `search.refit` out: there is only one score")
        if search.group is not None and search.split != "grouped":
            raise UserError(f"`search.group` is only for search.split=grouped, but search.split is {search.split}",
                            "use search.split=grouped, or leave `search.group` out")
        if search.split == "stratified" and not self.model.classifies:
            raise UserError("`search.split` is `stratified`, which needs classes",
                            "use a classifier (model.name=random_forest_classifier), or search.split=shuffled")
        if is_url(data.source) and data.sha256 is None:
            raise UserError(f"`data.source` is a URL, {data.source}, but `data.sha256` is not given",
                            "download the file once, check it, and give the sum that `sha256sum FILE` prints: data.sha256=...")
        if data.download() is None and data.source != "sample" and not os.path.isfile(data.source):
            problem = "is a folder" if os.path.isdir(data.source) else "does not exist"
            raise UserError(f"`{data.source}` {problem} (`data.source`)",
                            "give a CSV file or its URL, wine (UCI's red Wine Quality), or sample (diabetes, no download)")

    def _check_names(self) -> None:
        known = self.model.parameters
        places = [("model.params", self.model.params), *(("search.grid", grid) for grid in self.search.grids)]
        for place, name in ((place, name) for place, names in places for name in names):
            if name not in known:
                near = get_close_matches(name, sorted(known), n=1)
                raise UserError(f"`{name}` is not a parameter of {self.model.name} (`{place}`)",
                                f"did you mean `{near[0]}`?" if near else f"it has {', '.join(sorted(known))}")

    def missing(self, environment: Mapping[str, str] = os.environ) -> list[str]:
        download = self.data.download(environment)
        return [f"{download[0]} in {download[2]}"] if download and not download[2].is_file() else []


def is_url(text: str) -> bool:
    return bool(re.match(r"https?://", text))
