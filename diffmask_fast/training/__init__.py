"""Training a probe: recipe, multipliers, objective, trainer, evaluation."""
