"""From the words of a command line to a `Recipe`, by Hydra: `recipe=NAME|PATH.yaml`, groups and `key=value` overrides.

`CommandLine.read` takes the recipe's name off and holds every other key against the schema, those added with `+` too;
`compose` lets Hydra put files and overrides together; `recipe_of` turns the result into dataclasses and checks them.
Whatever a user got wrong comes out as one `UserError`. Text never names code to run: `_target_` is refused wherever it
stands. Ranks use the same functions, and never the part of Hydra that makes output directories.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from importlib.resources import files
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from hydra import compose as hydra_compose
from hydra import initialize_config_dir, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException, ValidationError
from yaml import YAMLError

from parallel.errors import UserError
from train.recipe import Recipe, did_you_mean

DEFAULT_RECIPE = "tiny"
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)  # in the name of a variable
SECRET_LENGTH = 8  # shorter values are found in innocent texts
CALLABLES = ("_target_", "class", "()")  # keys by which Hydra and logging would call whatever a text names
# No output directory, no log files: a run has its own. A sweep leaves its summary beside its runs.
QUIET = (
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra.sweep.dir=${run.dir}",
    "hydra.sweep.subdir=.",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
)

ConfigStore.instance().store(name="schema", node=Recipe)


@dataclass(frozen=True)
class CommandLine:
    """A recipe's name, the folder it was found in (null: weft's own `recipes`), and the overrides, all keys known."""

    name: str
    folder: str | None
    overrides: list[str]

    @classmethod
    def read(cls, words: list[str], sweep: bool = False) -> "CommandLine":
        """Split `words`, each `recipe=NAME|PATH.yaml` or an override; several values only in a sweep.

        Raises `UserError`.
        """
        recipe = DEFAULT_RECIPE
        overrides = []
        for word in words:
            if word.startswith("recipe="):
                recipe = word.removeprefix("recipe=")
            else:
                overrides.append(word)
        name, folder = find(recipe)
        parsed = parse(overrides)
        several = [override.input_line for override in parsed if override.is_sweep_override()]
        if several and not sweep:
            raise UserError(f"{several[0]}: expected one value; a list is written [1,2], a sweep needs --multirun")
        return cls(name, folder, [check_override(override) for override in parsed])

    @property
    def hydra_overrides(self) -> list[str]:
        """What Hydra is given: quiet unless the user says otherwise, and weft's groups beside a user's own file."""
        chosen = {word.split("=")[0] for word in self.overrides}
        quiet = [word for word in QUIET if word.split("=")[0] not in chosen]
        return quiet + (["hydra.searchpath=[pkg://recipes]"] if self.folder else []) + self.overrides

    def compose(self) -> DictConfig:
        """The composed configuration, Hydra's own section included. Sweeps are left out. Raises `UserError`."""
        overrides = [str(o.input_line) for o in parse(self.hydra_overrides) if not o.is_sweep_override()]
        start: Any = (
            initialize_config_dir(self.folder, version_base="1.3")
            if self.folder
            else initialize_config_module("recipes", version_base="1.3")
        )
        try:
            with start:
                config = hydra_compose(self.name, overrides, return_hydra_config=True)
        except (HydraException, OmegaConfBaseException, RecursionError, YAMLError) as error:
            explain(error, self.name)
        refuse_callables(OmegaConf.to_container(config))
        return config


def compose(words: list[str]) -> Recipe:
    """The checked recipe that `words` (`recipe=NAME|PATH.yaml` and overrides) describe. Raises `UserError`."""
    line = CommandLine.read(words)
    return recipe_of(line.compose(), line.name).validate()


def recipe_of(config: Any, name: str) -> Recipe:
    """The dataclasses that a composed or saved configuration fills; a run without a name gets the recipe's."""
    try:
        plain: Any = OmegaConf.to_container(config, resolve=True)
        plain = {key: value for key, value in plain.items() if key != "hydra"}
        recipe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), plain))
    except OmegaConfBaseException as error:
        explain(error, name)
    assert isinstance(recipe, Recipe)
    refuse_secrets(plain)
    recipe.run.name = recipe.run.name or name
    return recipe


def save(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe as YAML, readable by `load` and as `recipe=PATH`."""
    OmegaConf.save(OmegaConf.structured(recipe), path)


def write(recipe: Recipe) -> Path:
    """Write the resolved recipe into its run directory; returns the file. Raises `UserError` if it cannot."""
    directory = Path(recipe.run.dir) / str(recipe.run.name)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save(recipe, directory / "config.yaml")
    except OSError as error:
        raise UserError(f"run.dir={recipe.run.dir}: expected a folder to write into; {error}") from None
    return directory / "config.yaml"


def load(path: Path) -> Recipe:
    """The checked recipe of a file that `save` wrote. Raises `UserError`."""
    return recipe_of(OmegaConf.load(path), path.stem).validate()


def recipe_names() -> list[str]:
    """Names of weft's own recipes."""
    return sorted(file.name.removesuffix(".yaml") for file in files("recipes").iterdir() if file.name.endswith(".yaml"))


def find(recipe: str) -> tuple[str, str | None]:
    """Name and folder of `NAME` or `PATH.yaml`; the folder is None for weft's own. Raises `UserError`."""
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if not path.is_file() or path.suffix != ".yaml":
            raise UserError(f"recipe={recipe}: expected an existing file whose name ends in .yaml")
        return path.stem, str(path.resolve().parent)
    if recipe not in recipe_names():
        raise UserError(
            f"recipe={recipe}: expected one of {', '.join(recipe_names())}, or the path of a .yaml file"
            + did_you_mean(recipe, recipe_names())
        )
    return recipe, None


def parse(words: list[str]) -> list[Override]:
    """Hydra's reading of overrides. Raises `UserError`."""
    try:
        return OverridesParser.create().parse_overrides(words)
    except OverrideParseException as error:
        hint = f"; did you mean recipe={error.override}?" if error.override in recipe_names() else ""
        raise UserError(f"{error.override}: expected key=value, as Hydra writes overrides{hint}") from None


def check_override(override: Override) -> str:
    """The override for Hydra, once its key is known to the schema and its value names no code. Raises `UserError`."""
    line = override.input_line or ""
    key = override.key_or_group
    refuse_callables(dict.fromkeys(key.split(".")), line)
    refuse_callables(override._value if isinstance(override._value, dict) else {}, key)
    if override.is_hydra_override() or "/" in key or override.package:
        return line
    known = keys_of(Recipe)
    if key not in known:
        raise UserError(unknown_key(key))
    if override.is_delete():
        raise UserError(f"{line}: keys of a recipe cannot be deleted; expected {key}=VALUE")
    whole = isinstance(override._value, dict)
    if section_of(known[key]) and not whole:
        return line  # a choice of a group, such as model=v3
    value = line.partition("=")[2]
    for name, kind in known.items():
        inside = key.startswith(f"{name}.") or (key == name and whole)
        if inside and section_of(kind) and type(None) in options(kind):  # may be null, where OmegaConf cannot set a key
            parent, _, leaf = name.rpartition(".")
            nested = key.removeprefix(name).lstrip(".")
            return f"++{parent}={{{leaf}:{{{nested}:{value}}}}}" if nested else f"++{parent}={{{leaf}:{value}}}"
    return f"++{key}={value}"  # the schema knows the key, whether or not the user's file spells it out


def refuse_callables(node: Any, path: str = "") -> None:
    """Raise `UserError` if a key anywhere in `node` would make Hydra or logging call what its value names."""
    if isinstance(node, list):
        for item in node:
            refuse_callables(item, path)
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        harmless = path in ("hydra.launcher", "hydra.sweeper") and str(value).startswith(
            "hydra._internal.core_plugins."
        )
        if key in CALLABLES and not harmless:
            raise UserError(
                f"{f'{path}: ' if path else ''}{key} is refused: a recipe holds values, it does not name code to run"
            )
        refuse_callables(value, f"{path}.{key}".lstrip("."))


def refuse_secrets(node: Any, path: str = "") -> None:
    """Raise `UserError` if a value holds a secret of the environment: recipes are written to files and sent to W&B."""
    if isinstance(node, dict | list):
        for key, item in node.items() if isinstance(node, dict) else enumerate(node):
            refuse_secrets(item, f"{path}.{key}".lstrip("."))
    if not isinstance(node, str):
        return
    for name, secret in os.environ.items():
        if SECRET.search(name) and len(secret) >= SECRET_LENGTH and secret in node:
            raise UserError(
                f"{path}: holds the value of the variable {name}; a recipe is written into the run directory, keys and "
                "tokens stay in the environment"
            )


def keys_of(config: type, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> its type, for every section and value of a dataclass."""
    found: dict[str, Any] = {}
    for name, kind in get_type_hints(config).items():
        found[prefix + name] = kind
        if section := section_of(kind):
            found |= keys_of(section, f"{prefix}{name}.")
    return found


def section_of(kind: Any) -> type | None:
    """The dataclass that a section's type is, with or without null; None for the type of a value."""
    return next((option for option in options(kind) if isinstance(option, type) and is_dataclass(option)), None)


def options(kind: Any) -> tuple[Any, ...]:
    """Members of a union type, or the type alone."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def unknown_key(key: str) -> str:
    """Message for a key that the schema lacks, with the nearest one that it has."""
    known = [name for name, kind in keys_of(Recipe).items() if not section_of(kind)]
    same_end = [name for name in known if name.split(".")[-1] == key.split(".")[-1]]
    hint = f"; did you mean '{same_end[0]}'?" if len(same_end) == 1 else did_you_mean(key, known)
    return f"{key}: no such key in a recipe{hint}"


def explain(error: BaseException, name: str) -> NoReturn:
    """Raise what Hydra or OmegaConf found as a `UserError` that names key, value and expectation."""
    causes = list(chain(error))
    if any(isinstance(cause, RecursionError) for cause in causes):
        raise UserError(
            f"recipe={name}: a defaults list leads back to its own file; "
            "expected a name other than that of the recipe it extends"
        ) from None
    for cause in causes:
        if isinstance(cause, YAMLError):
            raise UserError(f"recipe={name}: expected plain YAML; {' '.join(str(cause).split())}") from None
        if isinstance(cause, MissingConfigException) and cause.missing_cfg_file:
            group, _, choice = cause.missing_cfg_file.rpartition("/")
            choices = cause.options or recipe_names()
            raise UserError(
                f"{group or 'defaults'}={choice.removesuffix('.yaml')}: expected one of {', '.join(choices)}"
                + did_you_mean(choice, choices)
            ) from None
        key = str(getattr(cause, "full_key", "") or "")
        if isinstance(cause, ConfigKeyError) and key:
            refuse_callables(dict.fromkeys(key.split(".")), f"recipe={name}")
            raise UserError(f"recipe={name}: {unknown_key(key)}") from None
        if isinstance(cause, MissingMandatoryValue) and key:
            raise UserError(f"{key}=???: expected a value") from None
        if isinstance(cause, ValidationError) and key:
            raise UserError(
                f"{key}: expected {spell(keys_of(Recipe).get(key, Any))}; {str(cause).splitlines()[0]}"
            ) from None
    raise UserError(f"recipe={name}: {' '.join(str(causes[-1]).split())}") from None


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what caused it, outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def spell(kind: Any) -> str:
    """A type in a user's words."""
    words = {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return " or ".join(words.get(option, "a section" if is_dataclass(option) else "a list") for option in options(kind))
