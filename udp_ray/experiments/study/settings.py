"""Settings of a study: data sets, blocks of variants, and which cells follow from them.

A *variant* is a name and a list of overrides of a base training file. A *block* compares variants
with one of them, the baseline, under overrides that all share. A *cell* is one training: a block, a
data set, a variant, a point of the variant's grid, and a seed. The study knows no setting by name:
each cell's settings are those of `ExperimentConfig.load(base, overrides)`.

    planned = plan_study(config, is_quick=False)
    print(planned.to_text())
    planned.cells[0].label        # "short ubuntu_irc pack seed 1"
"""

from __future__ import annotations

import hashlib
import itertools
import json
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, Field, field_validator, model_validator

from udp_ray.config.base import (
    LocalFolder,
    PositiveFloat,
    PositiveInt,
    Section,
    did_you_mean,
)
from udp_ray.config.experiment import ClusterConfig, ExperimentConfig
from udp_ray.console import COLUMNS
from udp_ray.errors import ConfigError
from udp_ray.io import content_digest, new_run_folder


def _require_value(override: str) -> str:
    field, mark, value = override.partition("=")
    if not (field.strip() and mark and value.strip()):
        raise ValueError(f"{override!r} has no value: write it as privacy.epsilon=8")
    return override


DatasetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]
Override = Annotated[str, AfterValidator(_require_value)]
"""A setting with its value, as privacy.epsilon=8."""

OWN_FIELDS = {
    "output", "data.name", "data.input", "data.heldout", "data.store", "data.ledger", "data.cache",
    "privacy.seed", "train.checkpoint_every", "train.evaluate_every", "train.evaluate_examples",
}  # fmt: skip
"""Settings of a cell that the study sets itself."""

PLACES = {"model.name", "data.tokenizer"}
"""Settings that may be a folder, and then count by what it holds."""


OpacusWay = Literal["one-record", "group-privacy"]
"""How Opacus' promise to a record becomes one to its author; see `opacus.py`."""


class TextSet(Section):
    """A data set: text to train on, and text of other users to evaluate on."""

    name: DatasetName
    """Its name in tables, and data.name of its runs."""
    input: str
    """data.input: text keyed by user."""
    heldout: str
    """Parquet file with the text of held-out users, who are in no input."""
    is_in_data_folder: bool = False
    """Whether input and heldout are files of data_folder; without that the data set is left out."""
    overrides: list[Override] = Field(default=[])
    """Settings of all runs on this data set, as privacy.population=1000."""
    heldout_examples: PositiveInt | None = None
    """Most held-out texts of this data set. Default: as for all."""
    min_rows_per_user: PositiveInt = 1
    """Users with fewer rows are left out, of the input and of the held-out text. The number of rows
    has to be public, as the text of a study is."""
    num_users: PositiveInt | None = None
    """Users of the input that are taken, in the order of a hash of their id. Default: all."""
    gradient_cosine: Annotated[float, Field(ge=0, le=1)] | None = None
    """Mean cosine between the gradients of two examples of one user, as jobs/plan.py measures it on
    public text. Needed for `Study.compares_samplers`."""


class Scaling(Section):
    """How gradients are scaled before they are clipped and noised; see `scaling.py`."""

    source: Literal["releases", "public"]
    """Where second moments of the gradient come from: AdamW's, hence earlier noisy releases, or
    text that the base model writes."""
    floor: PositiveFloat
    """What is added to the root of each second moment, in multiples of their root mean square."""
    first_step: PositiveInt = 2
    """First step that is scaled by releases. Earlier ones are clipped and noised as they are."""


class Variant(Section):
    """One way to train."""

    name: Name
    """Its name in tables."""
    overrides: list[Override] = Field(default=[])
    """What differs from the base file and the block, as data.pack=true."""
    grid: dict[str, list[Any]] = Field(default={})
    """Further settings with the values to try, in all combinations."""
    scaling: Scaling | None = None
    """Scales gradients before they are clipped and noised; only studies can. Default: none."""
    opacus: OpacusWay | None = None
    """Trains with Opacus' example-level DP-SGD, on one record of each author, or on up to
    privacy.group_size with group privacy (opacus.py). Default: neither."""
    datasets: list[DatasetName] | None = None
    """Data sets on which it is tried. Default: those of the block."""
    is_drawn: bool = True
    """Whether the figure shows it; false for one so far from the others that they would vanish."""

    @field_validator("grid")
    @classmethod
    def _refuse_empty(cls, grid: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for field, values in grid.items():
            if not values:
                raise ValueError(f"grid of {field} is empty: give values to try, or leave it out")
        return grid

    def points(self) -> Iterator[dict[str, Any]]:
        """Yields the points of the grid; one empty point without a grid."""
        for values in itertools.product(*self.grid.values()):
            yield dict(zip(self.grid, values, strict=True))


class Block(Section):
    """Variants that are compared with a baseline."""

    name: Name
    """Its name in tables."""
    overrides: list[Override] = Field(default=[])
    """Settings of all variants of the block."""
    baseline: Name
    """The variant that the others are compared with, seed by seed."""
    variants: Annotated[list[Variant], Field(min_length=1)]
    """What is compared."""
    datasets: list[DatasetName] | None = None
    """Data sets of the block. Default: all."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [variant.name for variant in self.variants]
        _refuse_repeats(names, f"variants of block {self.name}")
        if self.baseline not in names:
            raise ValueError(
                f"baseline of block {self.name} is {self.baseline}, which is none of its variants:"
                f" choose one of {', '.join(names)}"
            )
        return self


class Study(Section):
    """What is compared, and how it is measured."""

    base: str
    """Training file whose settings all cells begin with, as jobs/configs/demo.yaml."""
    overrides: list[Override] = Field(default=[])
    """Settings of all cells."""
    datasets: Annotated[list[TextSet], Field(min_length=1)]
    """The data sets."""
    blocks: Annotated[list[Block], Field(min_length=1)]
    """The comparisons."""
    seeds: Annotated[list[int], Field(min_length=1)]
    """Seeds of each cell; every variant has the same ones. The statements of the runs are void."""
    heldout_examples: PositiveInt = 2048
    """Most held-out texts, of whole users in the order of a hash of the user; all cells are
    evaluated on the same ones."""
    compares_samplers: bool = False
    """Also compares ULS and ELS over group sizes, at equal steps and expected examples per step
    (fixed_compute.py), and what jobs/plan.py predicts."""
    evaluate_every: PositiveInt | None = None
    """Steps between evaluations during training. Default: only before and after."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [dataset.name for dataset in self.datasets]
        _refuse_repeats(names, "datasets")
        _refuse_repeats([block.name for block in self.blocks], "blocks")
        _refuse_repeats(self.seeds, "seeds")
        for dataset in self.datasets:
            if self.compares_samplers and dataset.gradient_cosine is None:
                raise ValueError(
                    f"gradient_cosine of data set {dataset.name} is missing, and compares_samplers"
                    " needs it: measure it by jobs/plan.py --estimate-on"
                )
        for name in self._dataset_names():
            if name not in names:
                raise ValueError(
                    f"datasets has {name!r}, which is not one of {', '.join(names)}"
                    f"{did_you_mean(name, names)}: correct it"
                )
        for override in self._all_overrides():
            field = override.partition("=")[0]
            if field in OWN_FIELDS or field.startswith("cluster."):
                raise ValueError(
                    f"override {override}: the study sets {field} itself; leave it out"
                )
        return self

    def _dataset_names(self) -> Iterator[str]:
        for block in self.blocks:
            yield from block.datasets or ()
            for variant in block.variants:
                yield from variant.datasets or ()

    def _all_overrides(self) -> Iterator[str]:
        yield from self.overrides
        for dataset in self.datasets:
            yield from dataset.overrides
        for block in self.blocks:
            yield from block.overrides
            for variant in block.variants:
                yield from variant.overrides
                yield from (f"{field}=" for field in variant.grid)


class SmallStudy(Section):
    """What --quick changes."""

    num_seeds: PositiveInt = 1
    """Number of seeds, the first ones."""
    heldout_examples: PositiveInt = 64
    """Held-out texts."""
    overrides: list[Override] = Field(default=[])
    """Settings that win over all others, as privacy.num_steps=2."""


class StudyConfig(Section):
    """Settings of `jobs/study.py`."""

    study: Study
    """What is compared."""
    small: SmallStudy = SmallStudy()
    """What --quick changes."""
    data_folder: LocalFolder | None = None
    """Folder of the data sets that are not shipped. Default: none, and they are left out."""
    only: list[str] = Field(default=[])
    """Names of variants to run, with the baselines of their blocks. Default: all."""
    cluster: ClusterConfig = ClusterConfig()
    output: LocalFolder = Field(default_factory=new_run_folder("study"))
    """Folder for stores, cells and results. A study that was interrupted continues in its own.
    Default: a new one, runs/study or the next free number."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = {variant.name for block in self.study.blocks for variant in block.variants}
        for name in self.only:
            if name not in names:
                raise ValueError(
                    f"only is {name!r}, which no block has{did_you_mean(name, names)}; known are"
                    f" {', '.join(sorted(names))}"
                )
        return self


# ---- cells


@dataclass(frozen=True)
class Cell:
    """One training of the study."""

    block: str
    dataset: TextSet
    variant: str
    point: Mapping[str, Any]
    """The point of the variant's grid."""
    seed: int
    is_baseline: bool
    is_drawn: bool
    config: ExperimentConfig | None
    """The settings, before the study adds its own folders; None if they are refused."""
    heldout_examples: int
    evaluate_every: int | None
    scaling: Scaling | None = None
    opacus: OpacusWay | None = None
    error: str | None = None
    """Why the settings are refused."""

    @property
    def name(self) -> str:
        """The variant with its point of the grid."""
        return " ".join([self.variant, *(f"{_short(f)}={v}" for f, v in self.point.items())])

    @property
    def label(self) -> str:
        """All of it in a few words."""
        return f"{self.block} {self.dataset.name} {self.name} seed {self.seed}"

    @property
    def digest(self) -> str:
        """SHA-256 over the settings that were given, the text, the model, and what is measured.

        Defaults are left out, so that a new setting in the code does not change the digest. Text
        and model on this machine count by content: they may be moved, and are not mistaken for
        others at the same path. Cells with equal settings in several blocks have one digest, and
        are trained once.
        """
        if self.config is None:
            raise ConfigError(f"{self.label} has no settings: {self.error}")
        given = self.config.model_dump(mode="json", exclude_unset=True)
        for field in OWN_FIELDS - {"privacy.seed"}:
            section, _, name = field.partition(".")
            given[section].pop(name, None) if name else given.pop(section, None)
        given.pop("cluster", None)
        for field in PLACES:
            section, _, name = field.partition(".")
            if (place := given.get(section, {}).get(name)) is not None:
                given[section][name] = content_digest(place)
        measured = {
            "dataset": {
                "name": self.dataset.name,
                "input": content_digest(self.dataset.input),
                "heldout": content_digest(self.dataset.heldout),
            },
            "heldout_examples": self.heldout_examples,
            **self.dataset.model_dump(
                include={"min_rows_per_user", "num_users"}, exclude_defaults=True
            ),
            "evaluate_every": self.evaluate_every,
        }
        if self.scaling is not None:
            measured["scaling"] = self.scaling.model_dump()
        if self.opacus is not None:
            measured["opacus"] = self.opacus
        return digest_of({**given, "measured": measured})


@dataclass(frozen=True)
class PlannedStudy:
    """A study with its cells in the order in which they run."""

    config: StudyConfig
    is_quick: bool
    cells: tuple[Cell, ...]
    """All cells, also those that `only` leaves out."""
    left_out: tuple[str, ...]
    """Names of data sets whose folder is not given."""

    @property
    def chosen(self) -> list[Cell]:
        """The cells to run: those of `only`, and of the baselines of their blocks."""
        only = set(self.config.only)
        blocks = {cell.block for cell in self.cells if cell.variant in only}
        return [
            cell
            for cell in self.cells
            if cell.error is None
            and (not only or (cell.block in blocks and (cell.variant in only or cell.is_baseline)))
        ]

    @property
    def refusals(self) -> dict[str, list[str]]:
        """The names of variants whose settings are refused, by the reason."""
        found: dict[str, list[str]] = {}
        for cell in self.cells:
            names = found.setdefault(cell.error, []) if cell.error is not None else []
            if (name := f"{cell.block} {cell.dataset.name} {cell.name}") not in names:
                names.append(name)
        return found

    def to_text(self) -> str:
        """Returns how much there is to run, in a few lines."""
        study = self.config.study
        seeds = sorted({cell.seed for cell in self.cells})
        names = {(cell.block, cell.dataset.name, cell.name) for cell in self.chosen}
        datasets = {cell.dataset.name for cell in self.cells}
        lines = [
            f"{len(self.chosen)} cells: {len(names)} variants in {len(study.blocks)} blocks on"
            f" {', '.join(sorted(datasets))}, each with {len(seeds)} seeds; base {study.base}.",
            "The runs are seeded, so that they are compared pairwise, and their privacy statements"
            " are void:\nthe text has to be public.",
        ]
        if self.left_out:
            lines.append(f"Left out without data_folder: {', '.join(self.left_out)}.")
        for why, names_of_it in self.refusals.items():
            text = f"Left out: {', '.join(names_of_it)}: {why}"
            lines.append(textwrap.fill(text, COLUMNS, subsequent_indent="  "))
        return "\n".join(lines)


def plan_study(config: StudyConfig, *, is_quick: bool) -> PlannedStudy:
    """Returns the cells of a study: the first seed of all variants first, then the second.

    Args:
        config: The settings.
        is_quick: Whether `config.small` applies.

    Raises:
        ConfigError: The base file cannot be used, or the settings of a baseline are refused.
    """
    study, small = config.study, config.small
    seeds = study.seeds[: small.num_seeds] if is_quick else study.seeds
    datasets = {
        dataset.name: _placed(dataset, config.data_folder)
        for dataset in study.datasets
        if not dataset.is_in_data_folder or config.data_folder is not None
    }
    cells = tuple(
        _cell(config, block, datasets[name], variant, point, seed, is_quick=is_quick)
        for seed in seeds
        for block in study.blocks
        for name in datasets
        if name in (block.datasets or datasets)
        for variant in block.variants
        if name in (variant.datasets or datasets)
        for point in variant.points()
    )
    for cell in cells:
        if cell.is_baseline and cell.error is not None:
            raise ConfigError(f"baseline {cell.name} of block {cell.block}: {cell.error}")
    if not cells:
        raise ConfigError(
            "study.datasets has no data set without data_folder: give data_folder, their folder"
        )
    left_out = tuple(each.name for each in study.datasets if each.name not in datasets)
    return PlannedStudy(config, is_quick, cells, left_out)


def _cell(
    config: StudyConfig,
    block: Block,
    dataset: TextSet,
    variant: Variant,
    point: Mapping[str, Any],
    seed: int,
    *,
    is_quick: bool,
) -> Cell:
    study, small = config.study, config.small
    given = [*study.overrides, *dataset.overrides, *block.overrides, *variant.overrides]
    overrides = {
        **dict(map(_parsed, given)),
        **point,
        **dict(map(_parsed, small.overrides if is_quick else ())),
        "privacy.seed": seed,
        "data.name": dataset.name,
        "data.input": [dataset.input],
        "data.heldout": [dataset.heldout],
        "data.store": "store",
        "output": "output",
    }
    error, settings = None, None
    try:
        settings = ExperimentConfig.load(study.base, overrides)
        if variant.scaling is not None:
            require_scalable(settings)
        if variant.opacus is not None:
            require_trainable_by_opacus(settings)
    except ConfigError as mistake:
        error = str(mistake)
    return Cell(
        block=block.name,
        dataset=dataset,
        variant=variant.name,
        point=point,
        seed=seed,
        is_baseline=variant.name == block.baseline,
        is_drawn=variant.is_drawn,
        config=settings,
        heldout_examples=(
            small.heldout_examples
            if is_quick
            else dataset.heldout_examples or study.heldout_examples
        ),
        evaluate_every=study.evaluate_every,
        scaling=variant.scaling,
        opacus=variant.opacus,
        error=error,
    )


def require_scalable(config: ExperimentConfig) -> None:
    """Refuses settings with which gradients cannot be scaled before they are clipped.

    Raises:
        ConfigError: With the setting, its value and the remedy.
    """
    needed: dict[str, tuple[Any, Any]] = {
        "train.kernel": (config.train.kernel, "direct"),
        "train.optimizer": (config.train.optimizer, "adamw"),
        "train.zero_stage": (config.train.zero_stage, 0),
    }
    _require("scaling", needed)


def require_trainable_by_opacus(config: ExperimentConfig) -> None:
    """Refuses settings that the training by Opacus does not follow.

    Raises:
        ConfigError: With the setting, its value and the remedy.
    """
    needed: dict[str, tuple[Any, Any]] = {
        "privacy.sampling": (config.privacy.sampling, "els"),
        "privacy.mechanism": (config.privacy.mechanism, "independent"),
        "privacy.clipping": (config.privacy.clipping, "flat"),
        "train.optimizer": (config.train.optimizer, "adamw"),
        "train.schedule": (config.train.schedule, "constant"),
        "train.average": (config.train.average, "none"),
    }
    _require("opacus", needed)


def _require(what: str, needed: Mapping[str, tuple[Any, Any]]) -> None:
    for name, (value, only) in needed.items():
        if value != only:
            raise ConfigError(f"{name} is {value}, and {what} needs {only}: set {name}={only}")


def digest_of(values: Any) -> str:
    """Returns a SHA-256 over JSON values; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _placed(dataset: TextSet, folder: str | None) -> TextSet:
    if folder is None or not dataset.is_in_data_folder:
        return dataset
    files = {name: str(Path(folder, getattr(dataset, name))) for name in ("input", "heldout")}
    return dataset.model_copy(update=files)


def _parsed(override: str) -> tuple[str, Any]:
    """Returns the name and the value of an override; the value is read as YAML."""
    field, _, value = override.partition("=")
    try:
        return field, yaml.safe_load(value)
    except yaml.YAMLError:
        return field, value


def _short(field: str) -> str:
    return {"learning_rate": "rate"}.get(name := field.rpartition(".")[2], name)


def _refuse_repeats(values: Iterable[Any], what: str) -> None:
    value, count = Counter(values).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{what} has {value!r} {count} times: keep one of them")
