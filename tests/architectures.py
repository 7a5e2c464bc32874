"""Tiny models of every architecture in the installed transformers, and what their sites must do.

Configurations are the default ones with small numbers in place of the large: nothing is read from a network.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

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
        return {key: _shrunk(value, key, tuple(depths)) for key, value in settings.items()}
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
    sound = {"input_values": torch.randn(2, 4000, generator=generator)}
    yield from ({**padded, **decoder}, padded, text, {**text, **decoder}, picture, {**padded, **picture}, sound)
    yield {**picture, **decoder}
    for shape in ((2, 32, bins), (2, bins, 32), (2, bins, 128)):
        features = {"input_features": torch.randn(shape, generator=generator)}
        yield features
        yield {**features, **decoder}
