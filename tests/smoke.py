"""What an installed wheel must do where nothing else is: `make wheel` runs this outside the repository."""

from __future__ import annotations

import sys
from importlib import metadata, resources
from importlib.util import find_spec

import torch

import diffmask_fast
from diffmask_fast import HardConcrete, gate_mix, patch, register_sites
from diffmask_fast.ops import draw_seed


def main() -> None:
    assert "site-packages" in diffmask_fast.__file__, f"{diffmask_fast.__file__} is not the installed package"
    assert diffmask_fast.__version__ == metadata.version("diffmask_fast")
    assert resources.files("diffmask_fast").joinpath("py.typed").is_file()
    assert find_spec("diffmask_fast.kernels") is not None
    assert not {"transformers", "triton"} & set(sys.modules)

    states, logits = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 5, 3, requires_grad=True)
    baseline, seed = torch.zeros(8), draw_seed()
    found = {}
    for backend in ("reference", "cpu"):
        mixed, gates, log_open = gate_mix(states, logits, baseline, seed, backend=backend)
        gradients = torch.autograd.grad(mixed.square().sum() + log_open.sum(), (states, logits))
        found[backend] = (mixed, gates, log_open, *gradients)
    for one, other in zip(found["reference"], found["cpu"], strict=True):
        torch.testing.assert_close(one, other)

    assert HardConcrete(torch.zeros(3)).rsample().shape == (3,)

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lower, self.upper = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.upper(self.lower(x))

    register_sites(Two, [("middle", "lower", "output")])
    model, inputs = Two(), {"x": torch.randn(1, 3, 4)}
    with patch(model) as patched:
        output, captured = patched.run(inputs, capture=(0,))
        assert torch.equal(patched.run(inputs, replace={0: captured[0]}).output, output)
    print(f"diffmask_fast {diffmask_fast.__version__}: the wheel works")


if __name__ == "__main__":
    main()
