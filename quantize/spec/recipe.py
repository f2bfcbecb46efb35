"""Recipes: the YAML files that say what a tier is. A schema, and errors that suggest the right key.

A recipe names a model (place, imatrix, config) and gives, by the first matching rule, the format of every tensor,
the fit, the AWQ settings and the bars that `verify` holds the file to.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ...formats.blocks import BY_NAME, Format
from ...formats.errors import RecipeError
from ...formats.text import shown
from ...verify.bars import Bars
from .patterns import matcher
from .recipe_file import check_size, read_document

DEFAULT_MODEL = "minimax-m2.7"
MODEL_FILE = "model.yaml"
FITTED = "fit-"
"""How the names of tiers begin whose formats were chosen for a memory: fit-96 runs in 96 GB."""
MAX_RULES = 256
NAME_LIMIT, FILE_NAME_LIMIT = 100, 255
SHOWN, MESSAGE_LIMIT = 8, 300
"""Complaints that an error lists, and characters of each."""
MAX_ALPHA = 2
Fit = Literal["reference", "exact", "hessian"]
Effort = Literal["imatrix", "calibrated", "tuned"]
"""How much is done for a file: weights are rounded under an imatrix, or under what a build gathers from a text, or that
and then everything continuous is tuned against the source's outputs."""


def _pattern(text: str) -> str:
    matcher(text)
    return text


def _format(name: str) -> str:
    if name not in BY_NAME:
        raise ValueError(f"is not a block format; there are {', '.join(BY_NAME)}")
    return name


def _file_name(name: str) -> str:
    if not name.isprintable() or not name or set(name) & set("/\\") or len(name) > FILE_NAME_LIMIT:
        raise ValueError(f"cannot begin a file's name, or has more than {FILE_NAME_LIMIT} characters")
    return name


def _inner_path(path: str) -> str:
    parts = path.split("/")
    if not path.isprintable() or not all(parts) or {".", ".."} & set(parts) or "\\" in path:
        raise ValueError(
            f"is {path!r}, which is not the name of a file inside the model's folder or repository"
        )
    return path


def _exponent(alpha: float | str) -> float | str:
    if alpha != "search" and not (isinstance(alpha, float | int) and 0 <= alpha <= MAX_ALPHA):
        raise ValueError(f"is {alpha}, not an exponent from 0 to {MAX_ALPHA} or 'search'")
    return alpha


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Place(_Strict):
    """Where a model's weights are: in a hub repository or in a folder. The repository `tiny` is made on demand."""

    repository: str | None = None
    revision: str | None = None
    folder: str | None = None
    shards: int | None = Field(default=None, ge=1)
    """About how many shards the repository has, so that `plan` can size the disk without asking the hub."""

    @model_validator(mode="after")
    def _one_place(self) -> Place:
        if (self.repository is None) == (self.folder is None):
            raise ValueError("needs either repository or folder")
        return self

    @property
    def address(self) -> str:
        """The place as `--source` takes it."""
        return self.repository or self.folder or ""


class ImatrixRef(_Strict):
    """The imatrix that belongs to a model: a file of a hub repository, or, without one, of the source itself.

    `sha256` pins its bytes, wherever they come from.
    """

    file: Annotated[str, AfterValidator(_inner_path)]
    repository: str | None = None
    revision: str | None = None
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")


class Model(_Strict):
    """One model: its name (which names the output), place, imatrix, and the config for planning offline.

    A recipe calls the place `source`.
    """

    name: Annotated[str, AfterValidator(_file_name)]
    place: Place = Field(alias="source")
    imatrix: ImatrixRef | None = None
    config: dict[str, Any] | None = None


class Rule(_Strict):
    """The format of all tensors whose name holds the pattern `tensors` and that no rule before took."""

    tensors: Annotated[str, AfterValidator(_pattern)]
    format: Annotated[str, AfterValidator(_format)]


class Awq(_Strict):
    """Exponents of the gate/up scale (`search`: one per layer) and of down's scale folded into up (0: none)."""

    alpha: Annotated[float | Literal["search"], AfterValidator(_exponent)] = "search"
    fold_down: float = Field(default=0.0, ge=0, le=1)

    @classmethod
    def checked(cls, alpha: float | Literal["search"], fold_down: float) -> Awq:
        """Settings with these exponents; RecipeError where one is out of range."""
        try:
            return cls(alpha=alpha, fold_down=fold_down)
        except ValidationError as e:
            raise RecipeError("; ".join(f"awq.{_complaint(error)}" for error in e.errors())) from None


class Recipe(_Strict):
    """A validated tier."""

    schema_version: Literal[1] = Field(alias="schema")
    tier: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=NAME_LIMIT)
    description: str = Field(max_length=2000)
    model: Model
    rules: tuple[Rule, ...] = Field(min_length=1, max_length=MAX_RULES, strict=False)
    effort: Effort | None = None
    fit: Fit = "hessian"
    gain: bool = True
    awq: Awq = Awq()
    verify: Bars = Bars()
    quantization_hash: str | None = Field(default=None, pattern=r"^[0-9a-f]{16}$")

    def format_of(self, name: str) -> Format:
        """The format of one tensor; RecipeError where no rule matches."""
        for rule in self.rules:
            if matcher(rule.tensors)(name):
                return BY_NAME[rule.format]
        raise RecipeError(
            f"no rule of the recipe for {self.tier} matches",
            tensor=name,
            hint="end the rules with {tensors: '.*', format: Q8F16}",
        )

    def resolved(self) -> dict[str, Any]:
        """The recipe as plain JSON values, without what does not decide the bytes, and without local paths."""
        return self.model_dump(mode="json", by_alias=True, exclude=_NOT_RESOLVED)


_NOT_RESOLVED: Any = {
    "verify": True,
    "quantization_hash": True,
    "model": {"config": True, "place": {"folder", "shards"}, "imatrix": {"sha256"}},
}


def _field_names() -> set[str]:
    models = (Recipe, Model, Place, ImatrixRef, Rule, Awq, Bars)
    return {field.alias or name for model in models for name, field in model.model_fields.items()}


def _complaint(error: Any) -> str:
    where = ".".join(str(part)[:NAME_LIMIT] for part in error["loc"])
    if error["type"] != "extra_forbidden":
        return f"{where}: {error['msg'].removeprefix('Value error, ')[:MESSAGE_LIMIT]}"
    near = difflib.get_close_matches(str(error["loc"][-1])[:NAME_LIMIT], _field_names(), n=1)
    return f"unknown key {where}" + (f"; did you mean {near[0]!r}?" if near else "")


def parse_recipe(document: dict[str, Any], where: str) -> Recipe:
    """Validate a recipe document whose `model` is a bundled model's name or written out; RecipeError otherwise."""
    check_size(document, where)
    name = document.get("model")
    if isinstance(name, str):
        if name not in models():
            raise RecipeError(f"there is no model {shown(name)}; there are {', '.join(models())}", file=where)
        document = {**document, "model": _bundled_model(name)}
    try:
        return Recipe.model_validate(document)
    except ValidationError as e:
        found = e.errors(include_url=False, include_context=False, include_input=False)
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise RecipeError("; ".join(map(_complaint, found[:SHOWN])) + more, file=where) from None


def _root() -> Traversable:
    return files(__name__.removesuffix("quantize.spec.recipe") + "recipes")


@cache
def _bundled_model(name: str) -> Mapping[str, Any]:
    return read_document(_root() / name / MODEL_FILE)


def models() -> list[str]:
    """The names of the models that recipes are bundled for."""
    return sorted(entry.name for entry in _root().iterdir() if (entry / MODEL_FILE).is_file())


def tiers(model: str = DEFAULT_MODEL) -> list[str]:
    """The standard tiers bundled for a model, in which all layers have the same formats."""
    return [name for name in _bundled(model) if not name.startswith(FITTED)]


def fitted_tiers(model: str = DEFAULT_MODEL) -> list[str]:
    """The tiers bundled for a model whose formats were chosen for a memory, which their names say."""
    return [name for name in _bundled(model) if name.startswith(FITTED)]


def _bundled(model: str) -> list[str]:
    if model not in models():
        raise RecipeError(f"there is no model {shown(model)}", hint=f"There are {', '.join(models())}.")
    names = (entry.name for entry in (_root() / model).iterdir())
    return sorted(
        name.removesuffix(".yaml") for name in names if name.endswith(".yaml") and name != MODEL_FILE
    )


def load_model(name: str) -> Model:
    """A bundled model."""
    return Model.model_validate(_bundled_model(name))


def load_tier(tier: str, model: str = DEFAULT_MODEL) -> Recipe:
    """The bundled recipe of a tier; RecipeError, with the nearest name, where there is none."""
    names = _bundled(model)
    if tier not in names:
        near = difflib.get_close_matches(tier, names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise RecipeError(f"there is no tier {tier!r}", hint=f"{hint}There are {', '.join(names)}.")
    path = bundled_path(tier, model)
    return parse_recipe(read_document(path), str(path))


def bundled_path(tier: str, model: str) -> Path:
    """The file of a bundled tier."""
    return bundled_file(model, f"{tier}.yaml")


def bundled_file(model: str, name: str) -> Path:
    """A file that stands, or could stand, beside the recipes of a model."""
    return Path(str(_root() / model / name))


def load_recipe(path: Path) -> Recipe:
    """The recipe in a file of the user's; RecipeError where it does not follow the schema."""
    return parse_recipe(read_document(path), str(path))
