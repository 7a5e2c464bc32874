"""Tiny models of every architecture in the installed transformers, and what their sites must do.

Configurations are the default ones with small numbers in place of the large: nothing is read from a network.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffmask_fast.sites import patch, sites_of

WIDTH, HEADS, LAYERS, WORDS, IMAGE, PATCH = 16, 2, 3, 60, 16, 8

# Names of settings, whole, and what they become. The first that fits counts.
SMALL: tuple[tuple[str, int], ...] = (
    (r"vocab_size|(text_)?n_words|.*vocab_size.*", WORDS),
    (r".*(kv|key_value)_heads", HEADS),
    (r".*(num|n)_.*heads?|(encoder|decoder)_attention_heads|n_heads?|num_heads|heads", HEADS),
    (r"head_dim|d_kv|.*_head_dim|attention_head_size|d_head", WIDTH // HEADS),
    (r"(q|kv)_lora_rank|rotary_dim|.*lora_rank", WIDTH // HEADS),
    (r"num_hidden_layers|n_layers?|num_layers|(encoder|decoder)_layers|depth|.*_(encoder|decoder)_layers", LAYERS),
    (r".*(intermediate_size|ffn_dim|d_ff|d_inner|n_inner|mlp_dim|ffn_hidden_size).*|.*_hidden_dim", 2 * WIDTH),
    (r".*(hidden_size|d_model|n_embd|hidden_dim|projection_dim|embed_dim|embedding_size)|dim|width", WIDTH),
    (r"(num|n)_.*experts", 4),
    (r"(num_)?experts_per_tok.*|moe_k|.*top_?k", 2),
    (r"image_size|crop_size", IMAGE),
    (r"patch_size|.*patch_size", PATCH),
    (r".*sliding_window|attention_window|.*chunk_size|block_size|local_attention.*", 4),
    (r"(num_conv_pos_embeddings|num_codevector.*|codevector_dim|proj_codevector_dim|tdnn_dim|xvector_output_dim)", 8),
    (r"max_position_embeddings|n_positions|max_.*_positions|max_seq_len.*|n_ctx|max_target_positions", 64),
)


def tiny_config(config: Any) -> Any:
    """The same configuration with small numbers."""
    return type(config).from_dict(_shrunk(config.to_dict()))


def _shrunk(settings: Any, name: str = "", layers: tuple[int, ...] = ()) -> Any:
    if isinstance(settings, Mapping):
        depths = [v for k, v in settings.items() if isinstance(v, int) and _small(k) == LAYERS]
        shrunk = {key: _shrunk(value, key, tuple(depths)) for key, value in settings.items()}
        return {key: value for key, value in shrunk.items() if value is not None or settings[key] is None}
    if name in ("out_features", "out_indices", "stage_names", "_out_features", "_out_indices", "per_layer_config"):
        return None
    if name == "mrope_section":
        return [2, 1, 1]
    if name == "layer_types" and settings:
        kinds = list(dict.fromkeys(settings))
        return (kinds * LAYERS)[:LAYERS]
    if isinstance(settings, list):
        if "conv_dim" in name:
            return [WIDTH] * len(settings)
        return settings[:LAYERS] if len(settings) in layers and "conv" not in name else settings
    if isinstance(settings, bool) or not isinstance(settings, int):
        return settings
    if name.endswith(("token_id", "token_index")):
        return settings % (WORDS - 10) if settings >= WORDS else settings
    small = _small(name)
    return settings if small is None or settings <= small else small


def _small(name: str) -> int | None:
    return next((value for pattern, value in SMALL if re.fullmatch(pattern, name)), None)


def candidates(config: Any) -> Iterator[dict[str, Tensor]]:
    """Inputs to be tried, until a model takes them: text, pictures, sound."""
    generator = torch.Generator().manual_seed(1)
    text = {"input_ids": torch.randint(50, WORDS, (2, 8), generator=generator)}
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    padded = {**text, "attention_mask": mask}
    decoder = {"decoder_input_ids": torch.randint(50, WORDS, (2, 6), generator=generator)}
    seen = [c for c in (config, getattr(config, "vision_config", None)) if c is not None]
    size = next((s for c in seen if isinstance(s := getattr(c, "image_size", None), int)), IMAGE)
    channels = next((s for c in seen if isinstance(s := getattr(c, "num_channels", None), int)), 3)
    picture = {"pixel_values": torch.randn(2, channels, size, size, generator=generator)}
    bins = next(
        (s for n in ("num_mel_bins", "input_feat_per_channel", "feature_size") if (s := getattr(config, n, 0))), 80
    )
    boxes = {**text, "bbox": torch.zeros(2, 8, 4, dtype=torch.long)}
    frames = next((s for n in ("num_frames", "frames_per_clip") if (s := getattr(config, n, 0))), 2)
    film = {"pixel_values": torch.randn(2, frames, channels, size, size, generator=generator)}
    sound = {"input_values": torch.randn(2, 4000, generator=generator)}
    yield from (
        {**padded, **decoder},
        padded,
        text,
        {**text, **decoder},
        boxes,
        picture,
        {**padded, **picture},
        film,
        sound,
    )
    yield {**picture, **decoder}
    for shape in ((2, 32, bins), (2, bins, 32), (2, bins, 128)):
        features = {"input_features": torch.randn(shape, generator=generator)}
        yield features
        yield {**features, **decoder}


# --- what sites must do: each returns nothing, or fails ---


def outputs(result: Any) -> list[Tensor]:
    """The tensors of a model's output in order, without those of the cache of keys and values."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, Mapping):
        return [t for key, value in result.items() if not re.search("past|cache|mems", key) for t in outputs(value)]
    return [t for value in result for t in outputs(value)] if isinstance(result, (tuple, list)) else []


def same(left: Any, right: Any) -> bool:
    left, right = outputs(left), outputs(right)
    return len(left) == len(right) > 0 and all(map(torch.equal, left, right))


def seen(model: nn.Module, inputs: dict[str, Tensor], module: str) -> list[Tensor]:
    """What a submodule returned first, in each of its calls, by a hook of PyTorch's."""
    calls: list[Tensor] = []
    handle = model.get_submodule(module).register_forward_hook(lambda *args: calls.append(outputs(args[-1])[0].clone()))
    model(**inputs)
    handle.remove()
    return calls


def in_decoder(module: str) -> bool:
    return any(part.endswith("decoder") for part in module.split("."))


def captures_the_models_own_hidden_states(model: nn.Module, inputs: dict[str, Tensor], part: str = "") -> None:
    """The last of them may be what the model's end made of the state: its final norm, in most decoders."""
    sites = sites_of(model, part)
    states = patch(model, part).run(inputs, capture=range(len(sites))).states
    layers = [states[k] for k, site in enumerate(sites) if site.side == "input"]
    last = states[len(sites) - 1]
    assert torch.equal(last, seen(model, inputs, sites[-1].module)[-1]), "the last layer's output differs"
    result = model(**inputs, output_hidden_states=True)
    side = "decoder" if in_decoder(sites[-1].module) else "encoder"
    hidden = next((h for key in (f"{side}_hidden_states", "hidden_states") if (h := result.get(key)) is not None), None)
    assert hidden is not None, "no hidden states to compare with"
    assert len(hidden) == len(layers) + 1, f"{len(hidden)} hidden states of {len(layers)} layers"
    if all(map(torch.equal, (*layers[1:], last), hidden)):
        return  # Mamba: what the layers return, and then the last again, normed
    different = [i for i, (a, b) in enumerate(zip(layers, hidden, strict=False)) if not torch.equal(a, b)]
    assert not different, f"the inputs of layers {different} differ"
    ends = [norm(last) for norm in final_norms(model, last)]
    ends += [end for key in ("last_hidden_state", "encoder_last_hidden_state") if (end := result.get(key)) is not None]
    assert any(torch.equal(end, hidden[-1]) for end in (last, *ends)), "the last one differs"


def final_norms(model: nn.Module, state: Tensor) -> list[nn.Module]:
    norms = [m for m in model.modules() if re.search(r"(Layer|RMS)_?Norm", type(m).__name__, re.IGNORECASE)]
    weights = [(m, getattr(m, "weight", None)) for m in norms if not list(m.children())]
    return [m for m, weight in weights if weight is not None and weight.shape == state.shape[-1:]]


def captures_the_embedding(model: nn.Module, inputs: dict[str, Tensor], part: str = "") -> None:
    site = sites_of(model, part)[0]
    assert site.name == "embedding", "no embedding"
    calls = seen(model, inputs, site.module)
    expected = calls[-1] if in_decoder(site.module) else calls[0]
    assert torch.equal(patch(model, part).run(inputs, capture=(0,)).states[0], expected)


def a_replacement_by_the_same_changes_no_bit(model: nn.Module, inputs: dict[str, Tensor], part: str = "") -> None:
    plain, patched = model(**inputs), patch(model, part)
    every = range(len(patched.sites))
    assert same(patched.run(inputs, replace=dict.fromkeys(every, lambda state: state)).output, plain)
    assert same(patched.run(inputs, replace=dict.fromkeys(every, torch.clone)).output, plain)


def a_replacement_changes_what_follows_and_nothing_else(
    model: nn.Module, inputs: dict[str, Tensor], part: str = ""
) -> None:
    patched = patch(model, part)
    every = range(len(patched.sites))
    plain = patched.run(inputs, capture=every)
    for site in every:
        state = plain.states[site]
        noise = torch.randn(state.shape, generator=torch.Generator().manual_seed(site)).to(state.dtype)
        changed = patched.run(inputs, capture=every, replace={site: state + noise})
        for other in every:
            untouched = torch.equal(changed.states[other], plain.states[other])
            assert untouched == (other <= site), f"site {other} after a replacement at site {site}"
        assert not same(changed.output, plain.output), f"no effect of site {site}"


def stop_and_resume_give_the_whole_pass(model: nn.Module, inputs: dict[str, Tensor], part: str = "") -> None:
    plain, first = model(**inputs), patch(model, part)
    states = first.run(inputs, capture=range(len(first.sites))).states
    for site, state in states.items():
        assert torch.equal(patch(model, part).run(inputs, stop=site, capture=(site,)).states[site], state)
        noise = torch.randn(state.shape, generator=torch.Generator().manual_seed(site)).to(state.dtype)
        replaced = first.run(inputs, replace={site: state + noise}).output
        for handle in (first, patch(model, part)):  # a handle that saw a run, and one that saw none
            assert same(handle.run(inputs, resume=(site, state)).output, plain), f"resumed at site {site}"
            assert same(handle.run(inputs, resume=(site, state + noise)).output, replaced), f"resumed at {site}"


def the_model_stays_as_it_was(model: nn.Module, inputs: dict[str, Tensor], part: str = "") -> None:
    plain = model(**inputs)
    before = snapshot(model)
    with patch(model, part) as patched:
        last = len(patched.sites) - 1
        state = patched.run(inputs, capture=range(last + 1)).states[last]
        patched.run(inputs, replace={0: torch.clone}, stop=last)
        patched.run(inputs, resume=(last, state))
    assert snapshot(model) == before
    assert same(model(**inputs), plain)


PROPERTIES = (
    captures_the_models_own_hidden_states,
    captures_the_embedding,
    a_replacement_by_the_same_changes_no_bit,
    a_replacement_changes_what_follows_and_nothing_else,
    stop_and_resume_give_the_whole_pass,
    the_model_stays_as_it_was,
)


def snapshot(model: nn.Module) -> Any:
    """Every attribute of every submodule, in order, and what its dictionaries (hooks, children) hold."""
    taken = {}
    for name, module in model.named_modules():
        taken[name] = [
            (key, id(value), list(value.items()) if isinstance(value, dict) else None)
            for key, value in module.__dict__.items()
        ]
    flags = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    return taken, flags, [module.training for module in model.modules()]
