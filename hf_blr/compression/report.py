"""What a compression did, layer by layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from hf_blr.calibration.joint import BlockReport
from hf_blr.compression.allocation import Choice
from hf_blr.structures import BLRSpec


@dataclass(frozen=True)
class LayerReport:
    """One replaced layer.

    Attributes:
        name: of the module.
        spec: its structure and sizes.
        rel_error: ||(W - W') X^T|| / ||W X^T|| on the calibration inputs X `[T, K]`, of the factors as they are stored,
            without the damping of the fit; of layers that are fitted to the weights, ||W - W'|| / ||W||.
        rounds: of alternating solves that the fit took; 0 where there is a closed form.
        seconds: of the fit.
        choice: why it became so; None unless bits were shared out.
    """

    name: str
    spec: BLRSpec
    rel_error: float
    rounds: int
    seconds: float
    choice: Choice | None = None


@dataclass
class CompressionReport:
    """The outcome of `compress`.

    Attributes:
        parameters_before, parameters_after: numbers stored in the whole model.
        bytes_before, bytes_after: of its parameters.
        fitted_to: "activations" or "weights".
        calibration_tokens: of the text that this compression ran itself; 0 if it was given statistics and no text.
        dataset: which text of the config's that was, in words; None if it was none of the config's.
        seconds: of the whole compression.
        layers: the replaced layers, in the model's order.
        blocks: the refined blocks; empty unless `block_steps` was set.
        predicted_loss: the rise of the loss that the shared budget predicted, in nats a token, to second order and
            without sequential fits; None if no budget was shared out.
        left_dense: {target that the budget kept as it was: its parameters}.
        divergence: the mean KL divergence from the dense model on text that no fit saw, in nats a token; None where no
            text was held out (batches of the caller's own, few windows) or the model predicts no classes.
        held_out_tokens: that it was measured on.
        untied_bytes: of `bytes_after`, those of the head that shared the embedding's matrix until the model was turned.
    """

    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    fitted_to: str
    calibration_tokens: int
    dataset: str | None
    seconds: float
    layers: list[LayerReport] = field(default_factory=list)
    blocks: list[BlockReport] = field(default_factory=list)
    predicted_loss: float | None = None
    left_dense: dict[str, int] = field(default_factory=dict)
    divergence: float | None = None
    held_out_tokens: int = 0
    untied_bytes: int = 0

    @property
    def mean_rel_error(self) -> float:
        return sum(layer.rel_error for layer in self.layers) / len(self.layers)

    @property
    def fit_seconds(self) -> float:
        return sum(layer.seconds for layer in self.layers)

    @property
    def ratio(self) -> float:
        """Kept / dense parameters of the targets together."""
        dense = sum(self.left_dense.values())
        kept = dense + sum(layer.spec.num_parameters for layer in self.layers)
        return kept / (dense + sum(layer.spec.dense_parameters for layer in self.layers))

    def to_dict(self) -> dict[str, Any]:
        layers = [{**asdict(layer), "spec": layer.spec.to_dict()} for layer in self.layers]
        summary = {"ratio": self.ratio, "mean_rel_error": self.mean_rel_error, "fit_seconds": self.fit_seconds}
        return {**asdict(self), **summary, "layers": layers}

    def __str__(self) -> str:
        fitted = f"{self.calibration_tokens} tokens" if self.calibration_tokens else self.fitted_to
        if self.dataset is not None:
            fitted += f" ({self.dataset})"
        left = f", {len(self.left_dense)} left dense" if self.left_dense else ""
        refined = ""
        if self.blocks:
            before, after = (
                sum(getattr(block, key) for block in self.blocks) / len(self.blocks)
                for key in ("error_before", "error_after")
            )
            refined = f"; {len(self.blocks)} blocks refined, their outputs' squared error {before:.4f} -> {after:.4f}"
        cost = ""
        if self.divergence is not None:
            cost = f"; {self.divergence:.4f} nats a token from the dense model on text that no fit saw"
        untied = f", {self.untied_bytes / 1e6:.0f} of them a head of its own" if self.untied_bytes else ""
        return (
            f"{len(self.layers)} layers{left}, at {100 * self.ratio:.1f} % of their parameters, fitted to {fitted} in "
            f"{self.seconds:.0f} s; model {self.parameters_before / 1e6:.1f} M -> {self.parameters_after / 1e6:.1f} M "
            f"parameters, {self.bytes_before / 1e6:.0f} -> {self.bytes_after / 1e6:.0f} MB{untied}; "
            f"mean relative error {self.mean_rel_error:.4f}{refined}{cost}"
        )
