"""The values of report.json, as types."""

from typing import Any, TypedDict

from cospadi.allocation import AllocationAccount


class MemberRow(TypedDict):
    """One compressed layer: its name, output features, relative output error on the calibration text, stored bytes."""

    name: str
    out_features: int
    relative_error: float
    bytes: int


class GroupRow(TypedDict):
    """One compressed group of layers.

    ``n_atoms``, ``n_nonzero`` and ``side`` are None for layers that are only quantised.  Bytes are those on disk, those
    of the layers in bfloat16, and those of the factors by the paper's convention (16 bits a number, no mask).  Loss
    increases are in nats per token: what the allocation counted on, and what the stored numbers give on the calibration
    text.
    """

    name: str
    kind: str
    members: list[MemberRow]
    in_features: int
    n_atoms: int | None
    n_nonzero: int | None
    side: str | None
    value_dtype: str
    dictionary_dtype: str
    solver: str
    status: str
    statistics: dict[str, Any]
    damping: float
    note: str
    relative_error: float
    predicted_loss_increase: float | None
    loss_increase: float
    bytes: int
    dense_bytes: int
    paper_bytes: int


class KeptLayer(TypedDict):
    """A layer that was to be compressed and stays dense."""

    name: str
    reason: str
    in_features: int
    out_features: int


class CalibrationFacts(TypedDict):
    """The calibration tokens, and the loss whose gradients were collected."""

    source: str
    fingerprint: str
    windows: int
    seq_len: int
    loss: str


class SolverFacts(TypedDict):
    """The dictionary solver, and why this one."""

    name: str
    reason: str


class Totals(TypedDict):
    """Sums over the model, in bytes, and the fractions that were removed."""

    n_layers: int
    n_groups: int
    layer_bytes: int
    layer_dense_bytes: int
    ratio: float
    ratio_paper_convention: float
    model_bytes: int
    model_dense_bytes: int
    model_ratio: float
    mean_relative_error: float


class Report(TypedDict):
    """What a compression did; the same for the same run."""

    cospadi: str
    model: str
    left_out: list[str]
    causal: bool
    config: dict[str, Any]
    calibration: CalibrationFacts
    solver: SolverFacts
    format: str
    allocation: AllocationAccount
    groups: list[GroupRow]
    kept_dense: list[KeptLayer]
    totals: Totals
    evaluation: dict[str, Any] | None


class Machine(TypedDict):
    """The machine of a run."""

    platform: str
    processor: str
    cores: int | None
    threads: int
    gpu: str | None


class RunFacts(TypedDict):
    """What run.json holds: when and where a run was, and the seconds of its stages and groups."""

    began: float
    seconds: float
    machine: Machine
    versions: dict[str, str]
    threads: int
    stages: dict[str, float]
    groups: dict[str, float]
    predicted_memory: dict[str, Any]
