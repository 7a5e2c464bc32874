from __future__ import annotations

import numpy as np
import pytest
import torch

from diffmask_fast.ops import draw_seed, uniforms
from diffmask_fast.ops.philox import philox4x32

ONES = 0xFFFFFFFF
# Known answers for philox4x32, 10 rounds, of the Random123 library (Salmon et al. 2011): counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def numpy_uniforms(seed: int, offset: int, n: int) -> np.ndarray:
    """The contract again, in NumPy's unsigned integers."""
    counter = np.uint64(offset % 2**64) + np.arange((n + 3) // 4, dtype=np.uint64)
    c = [counter & np.uint64(ONES), counter >> np.uint64(32), np.zeros_like(counter), np.zeros_like(counter)]
    k0, k1 = seed % 2**32, (seed % 2**64) >> 32
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        low = np.uint64(ONES)
        c = [
            (p1 >> np.uint64(32)) ^ c[1] ^ np.uint64(k0),
            p1 & low,
            (p0 >> np.uint64(32)) ^ c[3] ^ np.uint64(k1),
            p0 & low,
        ]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    words = np.stack(c, axis=-1).reshape(-1)[:n]
    return ((words >> np.uint64(9)).astype(np.float64) + 0.5) * 2.0**-23


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_known_answers(counter, key, words):
    result = philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(map(int, result)) == words


@pytest.mark.parametrize(
    ("seed", "offset"),
    [(0, 0), (1, 2), (2**40 + 3, 2**32 - 2), (-1, -2), (-(2**63), 2**63 - 1), (123456789012345, 2**63 - 2)],
)
def test_uniforms_are_those_of_numpy_bit_for_bit_across_every_carry(seed, offset):
    ours = uniforms(torch.tensor([seed, offset]), 1001)
    # float64 holds the value exactly, so equality with the float32 says that float32 does too.
    np.testing.assert_array_equal(ours.double().numpy(), numpy_uniforms(seed, offset, 1001))


def test_extreme_words_give_uniforms_inside_the_open_interval_and_symmetric():
    low = (torch.tensor(0) + 0.5) * 2.0**-23
    high = (torch.tensor(0xFFFFFFFF >> 9).float() + 0.5) * 2.0**-23
    assert 0 < low < high < 1
    assert low == 1 - high


def test_a_longer_draw_begins_with_the_shorter_one():
    seed = torch.tensor([5, 6])
    assert torch.equal(uniforms(seed, 1000)[:13], uniforms(seed, 13))


def test_offset_moves_along_the_stream_by_four_elements():
    assert torch.equal(uniforms(torch.tensor([5, 7]), 96), uniforms(torch.tensor([5, 6]), 100)[4:])


def test_draw_seed_is_an_int64_pair_that_follows_the_global_generator():
    torch.manual_seed(3)
    first, second = draw_seed(), draw_seed()
    torch.manual_seed(3)
    assert first.dtype == torch.int64
    assert first.shape == (2,)
    assert torch.equal(draw_seed(), first)
    assert not torch.equal(first, second)


def test_draw_seed_follows_the_generator_it_is_given_and_leaves_the_global_one_alone():
    state = torch.get_rng_state()
    first = draw_seed(torch.Generator().manual_seed(1))
    assert torch.equal(first, draw_seed(torch.Generator().manual_seed(1)))
    assert torch.equal(torch.get_rng_state(), state)
