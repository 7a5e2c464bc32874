"""`L0Module` of CoFi (Xia et al., ACL 2022, "Structured pruning learns compact and accurate models"): gates of heads,
intermediate and hidden dimensions and whole layers of an encoder, and the size that is expected of it.

Same constructor, attributes, state_dict keys, shapes, uniforms and numbers as published; gates are drawn by the law of
`diffmask_fast.ops.reference`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffmask_fast.compat.l0 import HIGHEST, LOWEST, TEMPERATURE, cdf_stretched_concrete, sample_z_from_log_alpha
from diffmask_fast.compat.rules import FACTOR, evaluate

START = 10.0  # of the logits of heads, hidden dimensions and layers; those of intermediate ones follow from the rate
UNITS = {  # of each part of `pruning_type`: what is gated, and the attribute of its logits
    "structured_heads": (("head", "head_loga"),),
    "structured_mlp": (("intermediate", "int_loga"),),
    "hidden": (("hidden", "hidden_loga"),),
    "layer": (("mlp", "intlayer_loga"), ("head_layer", "headlayer_loga")),
}


class L0Module(nn.Module):
    """Gates of a BERT-like encoder of L layers, h heads, width H and intermediate width I.

    `forward` gives, for what `pruning_type` names, `head_z` (L, 1, h, 1, 1), `intermediate_z` (L, 1, 1, I), `hidden_z`
    (H,), `mlp_z` and `head_layer_z` (L,): sampled, or with `training=False` by the rule "top-k" of `evaluate` in each
    layer.

    The published constructor needs a configuration with `ffn_dim` even where there is an `intermediate_size`, its sizes
    need every kind of gate, and whoever gives `calculate_model_size` fewer is met by an error. Here all of that works,
    and what has no gate counts as kept.

    Args:
        config: with `hidden_size`, `intermediate_size` (or `ffn_dim`), `num_attention_heads`, `num_hidden_layers` and
            `vocab_size`.
        droprate_init: of the intermediate dimensions; 0 means 0.5.
        temperature: of the law.
        lagrangian_warmup: steps in which the target goes from `start_sparsity` to `target_sparsity`.
        start_sparsity, target_sparsity: shares of the parameters that can be pruned.
        pruning_type: names from `UNITS`, joined by "+".
        magical_number: the factor of "top-k".

    Raises:
        ValueError: an unknown name in `pruning_type`, or neither heads nor intermediate dimensions in it: their
            parameters are what a sparsity is a share of.
    """

    def __init__(
        self,
        config: Any,
        droprate_init: float = 0.5,
        temperature: float = TEMPERATURE,
        lagrangian_warmup: int = 0,
        start_sparsity: float = 0.0,
        target_sparsity: float = 0.0,
        pruning_type: str = "structured_heads+structured_mlp+hidden+layer",
        magical_number: float = FACTOR,
    ) -> None:
        super().__init__()
        asked = pruning_type.split("+")
        if not set(asked) <= set(UNITS) or not {"structured_heads", "structured_mlp"} & set(asked):
            raise ValueError(
                f"pruning_type is {pruning_type!r}; expected names joined by +, of {', '.join(UNITS)}, and the "
                "first or the second among them"
            )
        self.all_types = ["hidden_z", "intermediate_z", "mlp_z", "head_layer_z", "head_z"]
        self.pruning_type, self.temperature, self.magical_number = pruning_type, temperature, magical_number
        self.droprate_init = droprate_init or 0.5
        self.lagrangian_warmup = lagrangian_warmup
        self.start_sparsity, self.target_sparsity = start_sparsity, target_sparsity
        width, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
        inner = getattr(config, "intermediate_size", None) or config.ffn_dim
        self.hidden_size, self.num_hidden_layers, self.num_attention_heads = width, layers, heads
        self.intermediate_size, self.vocab_size = inner, config.vocab_size
        self.mlp_num_per_layer, self.dim_per_head = 1, width // heads
        # weights and biases; those of normalisations are not counted, as published
        self.params_per_head_layer = 4 * width * width + 4 * width
        self.params_per_head = self.params_per_head_layer // heads
        self.params_per_mlp_layer = 2 * width * inner + 5 * width
        self.params_per_intermediate_dim = self.params_per_mlp_layer // inner
        self.full_model_size = (self.params_per_head_layer + self.params_per_mlp_layer) * layers
        counted = {"structured_heads": self.params_per_head * heads, "structured_mlp": self.params_per_mlp_layer}
        self.prunable_model_size = sum(counted.get(part, 0) for part in asked) * layers

        self.sizes = {"head": heads, "intermediate": inner, "hidden": width, "mlp": 1, "head_layer": 1}
        self.shapes: dict[str, list[int]] = {
            "head": [layers, 1, heads, 1, 1],
            "intermediate": [layers, 1, 1, inner],
            "hidden": [width],
            "mlp": [layers],
            "head_layer": [layers],
        }
        self.parameters_per_dim = {
            "head": self.params_per_head,
            "intermediate": self.params_per_intermediate_dim,
            "hidden": 12 * width,
            "mlp": self.params_per_mlp_layer,
            "head_layer": self.params_per_head * heads,
        }
        self.types: list[str] = []
        self.z_logas: dict[str, nn.Parameter] = {}
        for part in sorted(asked, key=lambda name: name == "layer"):  # layers come last, as published
            for name, attribute in UNITS[part]:
                per_layer = self.sizes[name] > 1 and name != "hidden"
                loga = nn.Parameter(
                    torch.empty(layers, self.sizes[name]) if per_layer else torch.empty(*self.shapes[name])
                )
                setattr(self, attribute, loga)
                self.types.append(name)
                self.z_logas[name] = loga
                self.reset_loga(loga, None if name == "intermediate" else START)
        self.lambda_1 = nn.Parameter(torch.tensor(0.0))
        self.lambda_2 = nn.Parameter(torch.tensor(0.0))

    def set_lagrangian_warmup_steps(self, lagrangian_warmup: int) -> None:
        self.lagrangian_warmup = lagrangian_warmup

    def reset_loga(self, tensor: Tensor, mean: float | None = None) -> None:
        """Logits near `mean`, or near that of the drop rate."""
        rate = math.log(1 - self.droprate_init) - math.log(self.droprate_init)
        tensor.data.normal_(rate if mean is None else mean, 1e-2)

    def reset_qz_logas(self) -> None:
        """All logits anew. As published, those of hidden dimensions go to the drop rate here."""
        for name, loga in self.z_logas.items():
            self.reset_loga(loga, START if name in ("head_layer", "mlp", "head") else None)

    def constrain_parameters(self) -> None:
        for loga in self.z_logas.values():
            loga.data.clamp_(LOWEST, HIGHEST)

    def cdf_qz(self, x: float, loga: Tensor) -> Tensor:
        return cdf_stretched_concrete(x, loga, self.temperature)

    def get_num_parameters_for_one(self, loga: Tensor, parameter_size: int) -> Tensor:
        return (1 - self.cdf_qz(0, loga)).sum() * parameter_size

    def _score(self, name: str) -> Tensor:
        """P(gate != 0), (L, units) or (H,); 1 where there is no such gate."""
        if name in self.z_logas:
            score = 1 - self.cdf_qz(0, self.z_logas[name])
        else:
            score = torch.ones(self.num_hidden_layers, self.sizes[name], device=self.lambda_1.device)
        return score if name == "hidden" else score.reshape(self.num_hidden_layers, -1)

    def _expected(self, name: str, layer: str) -> Tensor:
        """How many heads or intermediate dimensions are expected to stay; 0 if they can't be pruned."""
        return (self._score(layer) * self._score(name)).sum() * (name in self.z_logas)

    def get_num_parameters_for_mlp(self) -> Tensor:
        return self._expected("intermediate", "mlp") * self.parameters_per_dim["intermediate"]

    def get_num_parameters_and_constraint(self) -> Tensor:
        """How many parameters are expected to stay, of those heads and intermediate dimensions that are gated."""
        return (
            self._expected("head", "head_layer") * self.parameters_per_dim["head"] + self.get_num_parameters_for_mlp()
        )

    def get_num_parameters_and_constraint_for_hidden(self) -> Tensor:
        """The same where hidden dimensions are gated too."""
        hidden = self._score("hidden").sum()
        heads = self._expected("head", "head_layer") * self.parameters_per_dim["head"] / self.hidden_size
        return hidden * heads + hidden * self._expected("intermediate", "mlp") * 2

    def get_target_sparsity(self, pruned_steps: int) -> float:
        share = min(1.0, pruned_steps / self.lagrangian_warmup)
        return self.start_sparsity + (self.target_sparsity - self.start_sparsity) * share

    def lagrangian_regularization(self, pruned_steps: int) -> tuple[Tensor, Tensor, float]:
        """The penalty, the expected sparsity, and the target after so many steps."""
        gated = "hidden" in self.types
        size = (
            self.get_num_parameters_and_constraint_for_hidden() if gated else self.get_num_parameters_and_constraint()
        )
        sparsity = 1 - size / self.prunable_model_size
        target = self.get_target_sparsity(pruned_steps) if self.lagrangian_warmup > 0 else self.target_sparsity
        gap = sparsity - target
        return self.lambda_1 * gap + self.lambda_2 * gap**2, sparsity, target

    def _sample_z(self, loga: Tensor) -> Tensor:
        return sample_z_from_log_alpha(loga, self.temperature)

    def _deterministic_z(self, size: int, loga: Tensor) -> Tensor:
        zeros = round(size - (1 - self.cdf_qz(0, loga)).sum().item())
        found = evaluate(loga, "top-k", temperature=self.temperature, zeros=max(zeros, 0), factor=self.magical_number)
        return found.detach()

    def forward(self, training: bool = True) -> dict[str, Tensor]:
        zs = {}
        for name, loga in self.z_logas.items():
            if training:
                z = self._sample_z(loga)
            elif name == "hidden":
                z = self._deterministic_z(self.sizes[name], loga)
            else:
                z = torch.stack([self._deterministic_z(self.sizes[name], layer) for layer in loga])
            zs[f"{name}_z"] = z.reshape(self.shapes[name])
        return zs

    def get_z_from_zs(self, zs: Mapping[str, Tensor]) -> dict[str, Any]:
        """Which gates are open, as NumPy arrays of bool; all of a kind that is not given."""
        given = {name[:-2]: zs.get(name) for name in self.all_types}
        every = {name: torch.ones(self.shapes[name]) if z is None else z for name, z in given.items()}
        return {name: (z.squeeze().detach().cpu() > 0).numpy() for name, z in every.items()}

    def calculate_model_size(self, zs: Mapping[str, Tensor]) -> dict[str, Any]:
        """What is left with these gates, and how much that prunes."""
        layers = self.num_hidden_layers
        opened = {name: torch.from_numpy(z.reshape(-1)) for name, z in self.get_z_from_zs(zs).items()}
        heads, inner = opened["head"].view(layers, -1), opened["intermediate"].view(layers, -1)
        hidden = int(opened["hidden"].sum())
        head_nums = int((heads & opened["head_layer"][:, None]).sum()) * hidden
        inner_nums = int((inner & opened["mlp"][:, None]).sum()) * hidden
        remaining = head_nums * self.dim_per_head * 4 * ("head" in self.z_logas)
        remaining += inner_nums * 2 * ("intermediate" in self.z_logas)
        pruned = self.prunable_model_size - remaining

        def counts(rows: Tensor) -> Sequence[int]:
            return rows.sum(-1).tolist()

        return {
            "head_layers": opened["head_layer"].int().tolist(),
            "mlp_layers": opened["mlp"].int().tolist(),
            "hidden_dims": hidden,
            "intermediate_dims": counts(inner),
            "head_nums": counts(heads),
            "pruned_params": pruned,
            "remaining_params": remaining,
            "pruned_model_sparsity": pruned / self.prunable_model_size,
        }
