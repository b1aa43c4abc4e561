"""Counting what is computed changes nothing of it."""

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from lavis_kvmod.system.flops import counted_flops


def work(weight, x):
    """A convolution, SiLU, whose gradient PyTorch's counter computes by other operations, and a product."""
    hidden = F.silu(F.conv2d(x, weight, padding=1))
    (hidden.flatten(1) @ hidden.flatten(1).T).sum().backward()
    gradient, weight.grad = weight.grad, None
    return gradient


def test_what_is_counted_stays_what_it_is():
    torch.manual_seed(0)
    weight, x = torch.randn(8, 3, 3, 3, requires_grad=True), torch.randn(5, 3, 13, 13)
    expected = work(weight, x)
    with counted_flops() as found:
        assert torch.equal(work(weight, x), expected)
    with FlopCounterMode(display=False) as counter:
        work(weight, x)
    assert found == [counter.get_total_flops()] and found[0] > 2 * 5 * 8 * 3 * 9 * 13 * 13


def test_fused_attention_on_a_cpu_is_counted():
    query = torch.randn(2, 4, 6, 8, requires_grad=True)
    with counted_flops() as found:
        F.scaled_dot_product_attention(query, query, query).sum().backward()
    product = 2 * 2 * 4 * 6 * 6 * 8  # of queries with keys; another one with values; backward, five of that size
    assert found[0] == 7 * product
