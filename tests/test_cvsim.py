"""CV-SIM against its formula written out, and the softmax with a given perplexity."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from otloss.cvsim import CVSIM, log_softmax_with_perplexity

F64 = torch.float64


def perplexity_of(log_p: Tensor) -> Tensor:
    return torch.special.entr(log_p.double().exp()).sum(-1).exp()


# --- CV-SIM ----------------------------------------------------------------------------------------------------------


def written_out(module: CVSIM, g_query: Tensor, g_context: Tensor) -> Tensor:
    """The module's formula, one head at a time, with explicit matrices."""
    q = g_query @ module.query.weight.T + module.query.bias
    k = g_context @ module.key.weight.T + module.key.bias
    v = g_context @ module.value.weight.T + module.value.bias
    size = module.dim // module.num_heads
    heads = []
    for h in range(module.num_heads):
        qh, kh, vh = (t[:, h * size : (h + 1) * size] for t in (q, k, v))
        if module.tokens == "channel":
            images = []
            for qi, ki, vi in zip(qh, kh, vh, strict=True):
                scores = torch.outer(qi, ki) / math.sqrt(size)  # features × features
                images.append(scores.softmax(-1) @ vi)
            heads.append(torch.stack(images))
        else:
            heads.append((qh @ kh.T / math.sqrt(size)).softmax(-1) @ vh)  # images × images
    return torch.cat(heads, -1) @ module.out.weight.T + module.out.bias


@pytest.fixture(params=["channel", "batch"])
def module(request: pytest.FixtureRequest) -> CVSIM:
    module = CVSIM(12, num_heads=3, tokens=request.param).double()
    for layer in (module.query, module.key, module.value, module.out):
        torch.nn.init.normal_(layer.bias)  # so that a bias in the wrong place shows
    return module


def test_is_the_formula(module: CVSIM) -> None:
    g_query, g_context = torch.randn(5, 12, dtype=F64), torch.randn(5, 12, dtype=F64)
    r = module(g_query, g_context)
    assert r.shape == (5, 12)
    torch.testing.assert_close(r, written_out(module, g_query, g_context), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(r, written_out(module, g_context, g_query))


def test_batch_tokens_are_torchs_multihead_attention() -> None:
    module = CVSIM(12, num_heads=3, tokens="batch").double()
    peer = torch.nn.MultiheadAttention(12, 3).double()
    layers = (module.query, module.key, module.value)
    with torch.no_grad():
        peer.in_proj_weight.copy_(torch.cat([layer.weight for layer in layers]))
        peer.in_proj_bias.copy_(torch.cat([layer.bias for layer in layers]))
        peer.out_proj.load_state_dict(module.out.state_dict())
    g_s, g_t = torch.randn(5, 12, dtype=F64), torch.randn(5, 12, dtype=F64)
    torch.testing.assert_close(module(g_s, g_t), peer(g_s, g_t, g_t)[0], rtol=1e-10, atol=1e-12)


def test_channel_tokens_treat_each_image_by_itself_and_batch_tokens_do_not() -> None:
    g_s, g_t = torch.randn(5, 12, dtype=F64), torch.randn(5, 12, dtype=F64)
    for tokens, alone in (("channel", True), ("batch", False)):
        module = CVSIM(12, 3, tokens).double()
        same = torch.allclose(module(g_s, g_t)[:2], module(g_s[:2], g_t[:2]), rtol=1e-10)
        assert same is alone


def test_every_parameter_gets_a_gradient(module: CVSIM) -> None:
    r = module(torch.randn(5, 12, dtype=F64), torch.randn(5, 12, dtype=F64))
    (r * torch.randn_like(r)).sum().backward()
    for name, parameter in module.named_parameters():
        # Under batch tokens the key's bias shifts all scores of a row alike, so that the softmax does not see it.
        blind = name == "key.bias" and module.tokens == "batch"
        assert (parameter.grad.abs().max() > 1e-6) is not blind, name


def test_one_token_would_be_degenerate() -> None:
    """Why the module has two readings: with one key the softmax is constant, and q and k cannot learn."""
    module = CVSIM(12, 3, tokens="batch").double()
    g_s, g_t = torch.randn(1, 12, dtype=F64), torch.randn(1, 12, dtype=F64)
    r = module(g_s, g_t)
    torch.testing.assert_close(r, module.out(module.value(g_t)))
    r.square().sum().backward()
    # The weight of the one key is 1, so a score's gradient is dO·v less dO·o with o = v: dot products of `size` terms
    # with three more roundings (softmax, o, difference), each right to that many u times the sum of the terms' sizes.
    # A layer's gradient is that, times size^(-1/2), an entry of the other side's token and an entry of the input.
    size, u, v = 4, torch.finfo(F64).eps / 2, module.value(g_t)
    score = 2 * (size + 3) * u * (module.value.bias.grad * v).abs().view(3, size).sum(-1).max()
    for layer, token, g in ((module.query, module.key(g_t), g_s), (module.key, module.query(g_s), g_t)):
        assert layer.weight.grad.abs().max() <= score * size**-0.5 * token.abs().max() * g.abs().max()
    assert module.value.weight.grad.abs().max() > 0


def test_gradcheck(module: CVSIM) -> None:
    g = [torch.randn(3, 12, dtype=F64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(module, g)


def test_state_dict_keys_are_stable() -> None:
    assert list(CVSIM(8).state_dict()) == [
        f"{layer}.{kind}" for layer in ("query", "key", "value", "out") for kind in ("weight", "bias")
    ]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dim": 10, "num_heads": 4}, ValueError, "num_heads must divide dim, got dim=10 and num_heads=4"),
        ({"dim": 0}, ValueError, "dim must be at least 1, got 0"),
        ({"dim": 8.0}, TypeError, "dim must be an integer, got float"),
        ({"dim": 8, "num_heads": 0}, ValueError, "num_heads"),
        ({"dim": 8, "tokens": "image"}, ValueError, "tokens must be one of 'channel', 'batch', got 'image'"),
    ],
)
def test_bad_options(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CVSIM(**arguments)


@pytest.mark.parametrize(
    ("g_query", "g_context", "error", "message"),
    [
        (torch.randn(2, 7), torch.randn(2, 8), ValueError, r"g_query must have shape \(B, 8\), got \(2, 7\)"),
        (torch.randn(2, 8), torch.randn(2, 1, 8), ValueError, r"g_context must have shape \(B, 8\), got \(2, 1, 8\)"),
        (torch.randn(2, 8), torch.randn(3, 8), ValueError, r"one shape, got \(2, 8\) and \(3, 8\)"),
        (torch.ones(2, 8).long(), torch.randn(2, 8), TypeError, "g_query must be a floating-point tensor"),
        (torch.randn(2, 8), None, TypeError, "g_context must be a tensor"),
        (torch.randn(2, 8, dtype=torch.double, device="meta"), torch.randn(2, 8), TypeError, "must have the dtype"),
    ],
)
def test_bad_input(g_query: Tensor, g_context: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CVSIM(8)(g_query, g_context)


# --- softmax with a given perplexity ---------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(2, 600),
    share=st.floats(0.01, 0.99),
    log_scale=st.floats(-12, 12),
    offset=st.floats(-3, 3),
    heavy=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_perplexity_is_met(n: int, share: float, log_scale: float, offset: float, heavy: bool, seed: int) -> None:
    r = torch.randn(3, n, dtype=F64, generator=torch.Generator().manual_seed(seed))
    if heavy:
        r = r.pow(5)  # a few outliers
    target = max(1.0, share * n)
    log_p = log_softmax_with_perplexity((r + offset) * 10**log_scale, share * n)
    assert log_p.dtype == F64
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(3, dtype=F64), rtol=1e-12, atol=0)
    if target > 1.01:  # at 1 the entropy's slope is 0 in reach of the bracket, and the nearest is taken
        torch.testing.assert_close(perplexity_of(log_p), torch.full((3,), target, dtype=F64), rtol=2e-6, atol=0)
    assert torch.equal(log_p.argsort(-1)[:, -1], r.argsort(-1)[:, -1])  # the largest score keeps the largest mass


def test_two_points_in_closed_form() -> None:
    p = 0.8
    target = math.exp(-(p * math.log(p) + (1 - p) * math.log(1 - p)))
    for r in (torch.tensor([3.0, -1.0], dtype=F64), torch.tensor([1e-6, 0.0], dtype=F64)):
        got = log_softmax_with_perplexity(r, target).exp()
        torch.testing.assert_close(got, torch.tensor([p, 1 - p], dtype=F64), rtol=1e-9, atol=0)


def test_shift_and_scale_do_not_matter_but_sign_does() -> None:
    r = torch.randn(4, 50, dtype=F64)
    p = log_softmax_with_perplexity(r, 20)
    torch.testing.assert_close(log_softmax_with_perplexity(7 * r - 3, 20), p, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(log_softmax_with_perplexity(-r, 20), p)


@pytest.mark.parametrize("perplexity", [2.0, 4.0, 7.0, 7.9])
def test_gradient_is_right_to_second_order(perplexity: float) -> None:
    r = torch.randn(1, 8, dtype=F64, requires_grad=True)

    def function(r: Tensor) -> Tensor:
        return log_softmax_with_perplexity(r, perplexity).exp()  # log p itself has entries and slopes without bound

    assert torch.autograd.gradcheck(function, r, eps=1e-5, atol=1e-5)
    assert torch.autograd.gradgradcheck(function, r, eps=1e-5, atol=1e-4)


def test_gradient_is_the_printed_formula_and_holds_the_perplexity() -> None:
    r = torch.randn(1, 40, dtype=F64, requires_grad=True)
    log_p = log_softmax_with_perplexity(r, 15)
    weights = torch.randn(1, 40, dtype=F64)
    (got,) = torch.autograd.grad((weights * log_p).sum(), r, retain_graph=True)
    p, x = log_p.detach().exp(), r.detach()
    order = x.argsort()[0]
    first, last = order[0], order[-1]
    beta = (log_p[0, last] - log_p[0, first]).detach() / (x[0, last] - x[0, first])
    c = weights - p * weights.sum()
    mean = (p * x).sum()
    expected = beta * (c - p * (x - mean) * (c * x).sum() / (p * (x - mean) ** 2).sum())
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-10)
    # No direction of r changes the entropy, whereas a plain softmax's entropy has a gradient of order 0.1.
    (flat,) = torch.autograd.grad(perplexity_of(log_p).log().sum(), r)
    assert flat.abs().max() < 1e-9
    (plain,) = torch.autograd.grad(perplexity_of(r.log_softmax(-1)).log().sum(), r)
    assert plain.abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
@pytest.mark.parametrize("value", [0.0, 5.0, -1e30])
def test_constant_row_is_uniform_with_gradient_zero(dtype: torch.dtype, value: float) -> None:
    r = torch.full((2, 30), value, dtype=dtype)
    r[1] = torch.randn(30).to(dtype)  # a healthy row beside it is not disturbed
    r.requires_grad_()
    log_p = log_softmax_with_perplexity(r, 10)
    torch.testing.assert_close(log_p[0], torch.full_like(log_p[0], -math.log(30)))
    assert perplexity_of(log_p)[1].item() == pytest.approx(10, rel=1e-5)
    (log_p * torch.randn_like(log_p)).sum().backward()
    assert r.grad[0].abs().max() == 0
    assert torch.isfinite(r.grad).all() and r.grad[1].abs().max() > 0


def test_constant_up_to_rounding_counts_as_constant() -> None:
    r = torch.full((1, 1000), 1 / 3) * (1 + torch.finfo(torch.float32).eps * torch.randint(-1, 2, (1, 1000)))
    assert r.std() > 0
    torch.testing.assert_close(log_softmax_with_perplexity(r, 500), torch.full((1, 1000), -math.log(1000)))


def test_ties_give_the_nearest_perplexity_and_finite_gradients() -> None:
    r = torch.zeros(3, 20, dtype=F64)
    r[0, :15] = 1  # 15 tied at the top: 10 is out of reach, 15 is the nearest
    r[1, :10] = 1  # reached in the limit only
    r[2, :5] = 1  # within reach
    r.requires_grad_()
    log_p = log_softmax_with_perplexity(r, 10)
    torch.testing.assert_close(perplexity_of(log_p), torch.tensor([15.0, 10.0, 10.0], dtype=F64), rtol=1e-5, atol=0)
    (log_p.exp() * torch.randn_like(log_p)).sum().backward()
    assert torch.isfinite(r.grad).all()


def test_perplexity_beyond_its_range() -> None:
    r = torch.randn(2, 6, requires_grad=True)
    uniform = log_softmax_with_perplexity(r, 6.0)
    torch.testing.assert_close(uniform, torch.full((2, 6), -math.log(6)))
    uniform.sum().backward()
    assert r.grad.abs().max() == 0
    one_hot = log_softmax_with_perplexity(r, 0.5).exp()
    torch.testing.assert_close(one_hot, torch.nn.functional.one_hot(r.argmax(-1), 6).float(), rtol=0, atol=1e-4)
    assert log_softmax_with_perplexity(torch.randn(3, 1), 0.5).tolist() == [[0.0]] * 3


def test_float32_agrees_with_float64() -> None:
    r = torch.randn(8, 512)
    weights = torch.randn(8, 512)
    results = []
    for x in (r, r.double()):
        x.requires_grad_()
        log_p = log_softmax_with_perplexity(x, 256)
        (log_p.exp() * weights).sum().backward()
        results.append((log_p.detach(), x.grad))
    (low, low_grad), (high, high_grad) = results
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), high, rtol=2e-7, atol=1e-9)
    torch.testing.assert_close(low_grad.double(), high_grad, rtol=1e-4, atol=1e-6 * high_grad.abs().max().item())


def test_autocast_does_not_change_it() -> None:
    r = torch.randn(4, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(log_softmax_with_perplexity(r, 20), log_softmax_with_perplexity(r.clone(), 20))
        assert log_softmax_with_perplexity(r.bfloat16(), 20).dtype == torch.float32


@pytest.mark.parametrize(
    ("r", "perplexity", "error", "message"),
    [
        (torch.randn(3), 0.0, ValueError, "perplexity must be positive"),
        (torch.randn(3), math.nan, ValueError, "perplexity"),
        (torch.randn(3), "half", TypeError, "perplexity must be a number"),
        (torch.ones(3).int(), 2.0, TypeError, "r must be a floating-point tensor"),
        (torch.tensor(1.0), 2.0, ValueError, "r must have shape"),
    ],
)
def test_perplexity_bad_input(r: Tensor, perplexity: float, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        log_softmax_with_perplexity(r, perplexity)
