"""One token's attention has the same bits in training, in a prompt and in decoding."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from spmd_rl.attend import attend
from spmd_rl.rollout.cpu_sglang import padded

DIM = 32


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (4, 4), (6, 1)])
@pytest.mark.parametrize("length", [16, 18, 61, 100])
def test_decoding_gives_the_bits_of_training(heads, groups, length):
    torch.manual_seed(length)
    query = torch.randn(3, heads, length, DIM)
    key, value = torch.randn(2, 3, groups, length, DIM)
    causal = torch.full((length, length), -math.inf).triu(1)[None, None]
    trained = attend(query, key, value, causal, DIM**-0.5)
    exact = scaled_dot_product_attention(
        *(x.double() for x in (query, key, value)), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(trained, exact.float(), atol=1e-6, rtol=1e-6)

    padding = 7  # a longer request in the same batch
    key, value = (torch.cat([x, x[:, :, :padding]], 2) for x in (key, value))
    for last in (1, 2, 3, length):  # queries: decoding, and prompts with a cached start
        nth = torch.arange(key.size(2))
        seen = nth <= torch.arange(length - last, length)[:, None]
        mask = torch.zeros(seen.shape).masked_fill(~seen, -math.inf)[None, None]
        mask = mask.expand(3, 1, -1, -1)
        decoded = attend(query[:, :, -last:], key, value, mask, DIM**-0.5)
        assert torch.equal(decoded, trained[:, :, -last:])


def test_gradients():
    torch.manual_seed(0)
    query = torch.randn(2, 4, 9, 8, dtype=torch.float64, requires_grad=True)
    key, value = torch.randn(2, 2, 2, 9, 8, dtype=torch.float64, requires_grad=True)
    causal = torch.full((9, 9), -math.inf, dtype=torch.float64).triu(1)[None, None]
    assert torch.autograd.gradcheck(lambda *x: attend(*x, causal, 0.3), (query, key, value))


def test_few_rows_are_padded_to_the_bits_of_many():
    torch.manual_seed(0)
    x, weight = torch.randn(9, 128), torch.randn(300, 128)
    many = x @ weight.T
    for rows in range(1, 9):
        assert torch.equal(padded(lambda x: x @ weight.T, x[:rows]), many[:rows])
