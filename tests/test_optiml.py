"""OPTiML's objective: Eq. 3's arithmetic, the policies for the marginals, and what they do to gradients."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

import otloss
from otloss.cvsim import log_softmax_with_perplexity
from otloss.losses import CosineSinkhornLoss
from otloss.optiml import MarginalCollapseWarning, OPTiMLLoss, OPTiMLOutput
from otloss.regularizers import CovarianceLoss, VarianceLoss

F64 = torch.float64
POLICIES = ("perplexity", "hardest", "learned", "detached", "uniform")


def views(
    batch: int = 4, dim: int = 16, side: int = 3, embedding: int = 24, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two views' maps (as after a ReLU, the second a noisy copy of the first) and embeddings."""
    z_s = torch.randn(batch, dim, side, side, dtype=dtype)
    z_t = (z_s + 0.5 * torch.randn_like(z_s)).relu()
    q_s, q_t = torch.randn(2, batch, embedding, dtype=dtype) * 0.7
    return z_s.relu().requires_grad_(), z_t.requires_grad_(), q_s.requires_grad_(), q_t.requires_grad_()


def make(**options: object) -> OPTiMLLoss:
    return OPTiMLLoss(**{"dim": 16, "eps": 0.2, "num_heads": 4, **options})


def manual_marginals(loss: OPTiMLLoss, z_s: Tensor, z_t: Tensor) -> tuple[Tensor, Tensor]:
    """mu and nu from their definitions."""
    count = 16 if loss.match == "channel" else z_s[0, 0].numel()
    if loss.marginals == "uniform":
        return (torch.full((len(z_s), count), 1 / count, dtype=z_s.dtype),) * 2
    g_s, g_t = z_s.mean((2, 3)), z_t.mean((2, 3))
    other = loss.cvsim if loss.cvsim_t is None else loss.cvsim_t
    results = []
    for r, z in ((loss.cvsim(g_s, g_t), z_s), (other(g_t, g_s), z_t)):
        if loss.match == "position":
            r = (r[:, :, None] * z.flatten(2)).sum(1) / 16**0.5
        if loss.marginals in ("perplexity", "hardest"):
            results.append(log_softmax_with_perplexity(r, loss.perplexity * count).exp())
        else:
            results.append(r.softmax(-1))
    return results[0], results[1]


def test_options_go_by_keyword() -> None:
    with pytest.raises(TypeError, match="positional"):
        OPTiMLLoss(16, 0.6)  # type: ignore[misc]


@pytest.mark.parametrize("match", ["channel", "position"])
@pytest.mark.parametrize("marginals", POLICIES)
@pytest.mark.parametrize("shared", [True, False])
def test_equation_three(match: str, marginals: str, shared: bool) -> None:
    z_s, z_t, q_s, q_t = views(dtype=F64)
    solver = {"eps": 0.2, "tol": 1e-10, "max_iter": 2000}
    loss = make(
        alpha=0.7, beta=3.0, eta=2.0, invariance=1.5, match=match, marginals=marginals, shared=shared, **solver
    ).double()
    out = loss(z_s, z_t, q_s, q_t)

    mu, nu = manual_marginals(loss, z_s, z_t)
    x, y = z_s.flatten(2), z_t.flatten(2)
    if match == "position":
        x, y = x.transpose(1, 2), y.transpose(1, 2)
    cost = otloss.cosine_cost(x, y)
    solved = otloss.sinkhorn(cost, mu, nu, **solver)
    variance = VarianceLoss()(q_s) + VarianceLoss()(q_t)
    covariance = CovarianceLoss()(q_s) + CovarianceLoss()(q_t)
    invariance = (q_s - q_t).square().mean()
    expected = 0.7 * solved.transport_cost.mean() + 3 * variance + 2 * covariance + 1.5 * invariance
    entropies = torch.special.entr(torch.stack([mu, nu])).sum(-1)

    close = {"rtol": 1e-7, "atol": 1e-9}
    torch.testing.assert_close(out.loss, expected, **close)
    torch.testing.assert_close(out.ot, solved.transport_cost.mean(), **close)
    torch.testing.assert_close(out.transport_cost, out.ot, **close)
    torch.testing.assert_close(out.variance, variance, **close)
    torch.testing.assert_close(out.covariance, covariance, **close)
    torch.testing.assert_close(out.invariance, invariance, **close)
    torch.testing.assert_close(out.independent_cost, (mu[:, :, None] * nu[:, None] * cost).sum((1, 2)).mean(), **close)
    torch.testing.assert_close(out.perplexity, entropies.exp().mean(), **close)
    assert out.marginal_error < 1e-10 and out.converged == 1.0
    assert out.transport_cost < out.independent_cost


@pytest.mark.parametrize("objective", ["value", "divergence"])
def test_objectives(objective: str) -> None:
    z_s, z_t, q_s, q_t = views(dtype=F64)
    solver = {"eps": 0.2, "tol": 1e-10, "max_iter": 2000}
    loss = make(objective=objective, **solver).double()
    out = loss(z_s, z_t, q_s, q_t)
    mu, nu = manual_marginals(loss, z_s, z_t)
    x, y = z_s.flatten(2), z_t.flatten(2)
    expected = CosineSinkhornLoss(objective=objective, **solver)(x, y, mu, nu)
    torch.testing.assert_close(out.ot, expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(out.loss, 0.6 * out.ot + 25 * out.variance + out.covariance)
    sharp = CosineSinkhornLoss(**solver)(x, y, mu, nu)
    torch.testing.assert_close(out.transport_cost, sharp, rtol=1e-7, atol=1e-9)
    assert abs(out.transport_cost - out.ot) > 1e-3


@pytest.mark.parametrize("match", ["channel", "position"])
@pytest.mark.parametrize("marginals", POLICIES)
def test_tokens_are_positions_of_a_map(match: str, marginals: str) -> None:
    """Tokens (B, hw, d): every output, and every gradient, is that of the map they were read from, up to rounding."""
    loss = make(match=match, marginals=marginals, tol=1e-11, max_iter=5000).double()
    z_s, z_t, q_s, q_t = views(dtype=F64)
    t_s, t_t = (z.detach().flatten(2).mT.contiguous().requires_grad_() for z in (z_s, z_t))
    of_maps, of_tokens = loss(z_s, z_t, q_s, q_t), loss(t_s, t_t, q_s, q_t)
    for one, other in zip(of_maps, of_tokens, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    weights = list(loss.parameters()) if marginals in ("perplexity", "hardest", "learned") else []
    want = torch.autograd.grad(of_maps.ot, (z_s, z_t, *weights))
    got = torch.autograd.grad(of_tokens.ot, (t_s, t_t, *weights))
    for one, other in zip(got, (*(grad.flatten(2).mT for grad in want[:2]), *want[2:]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_views_with_different_numbers_of_tokens() -> None:
    loss = make(match="position")
    q = torch.randn(2, 4, 24)
    out = loss(torch.rand(4, 9, 16), torch.rand(4, 7, 16), q[0], q[1])
    assert out.loss.isfinite() and out.converged == 1


def test_defaults_are_the_papers() -> None:
    loss = OPTiMLLoss(32)
    assert (loss.alpha, loss.beta, loss.eta, loss.invariance) == (0.6, 25.0, 1.0, 0.0)
    assert loss.match == "channel" and loss.marginals == "perplexity" and loss.transport.objective == "transport_cost"


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("match", ["channel", "position"])
@pytest.mark.parametrize("tokens", ["channel", "batch"])
@pytest.mark.parametrize("marginals", POLICIES)
def test_who_gets_a_gradient(match: str, tokens: str, marginals: str) -> None:
    loss = make(match=match, tokens=tokens, marginals=marginals, shared=False)
    data = views()
    loss(*data).ot.backward()
    z_s, z_t, q_s, q_t = data
    assert z_s.grad.abs().max() > 1e-6 and z_t.grad.abs().max() > 1e-6
    assert q_s.grad is None and q_t.grad is None
    learns = marginals in ("perplexity", "hardest", "learned")
    assert (len(list(loss.parameters())) == 0) is (marginals == "uniform")
    for name, parameter in loss.named_parameters():
        assert parameter.requires_grad is learns, name
        assert (parameter.grad is not None) is learns, name
        # Under batch tokens the softmax does not see a shift by the key's bias.
        if learns and not (name.endswith("key.bias") and tokens == "batch"):
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("match", ["channel", "position"])
@pytest.mark.parametrize("marginals", [policy for policy in POLICIES if policy != "hardest"])
@pytest.mark.parametrize("gradient", ["implicit", "unroll"])
def test_gradcheck(match: str, marginals: str, gradient: str) -> None:
    loss = make(
        dim=6, eps=1.0, num_heads=2, match=match, marginals=marginals, gradient=gradient, tol=1e-12, max_iter=100
    ).double()
    z_s, z_t = (torch.rand(2, 6, 2, 2, dtype=F64, requires_grad=True) for _ in range(2))
    q_s, q_t = (0.5 * torch.randn(2, 5, dtype=F64)).requires_grad_(), torch.randn(2, 5, dtype=F64)
    with otloss.use_backend("reference"):
        if marginals == "detached":  # its marginals move with z, and the gradient leaves that out on purpose
            frozen = loss._log_marginals(z_s.flatten(2), z_t.flatten(2))
            loss._log_marginals = lambda *maps: frozen  # type: ignore[method-assign]
        inputs = [z_s, z_t, q_s]
        weights = [p for name, p in loss.named_parameters() if p.requires_grad and name.endswith("query.weight")]

        def function(z_s: Tensor, z_t: Tensor, q_s: Tensor, *weights: Tensor) -> Tensor:
            parameters = {"cvsim.query.weight": weights[0]} if weights else {}
            return torch.func.functional_call(loss, parameters, (z_s, z_t, q_s, q_t)).loss

        assert torch.autograd.gradcheck(function, (*inputs, *weights), atol=1e-5, fast_mode=True)


def test_detached_leaves_the_features_their_own_gradient() -> None:
    """Detached marginals: z gets the gradient of the cost at fixed masses, nothing through CV-SIM."""
    z_s, z_t, q_s, q_t = views(dtype=F64)
    solver = {"eps": 0.2, "tol": 1e-10, "max_iter": 2000}
    loss = make(marginals="detached", **solver).double()
    (got,) = torch.autograd.grad(loss(z_s, z_t, q_s, q_t).ot, z_s)
    mu, nu = (mass.detach() for mass in manual_marginals(loss, z_s, z_t))
    fixed = otloss.cosine_sinkhorn(z_s.flatten(2), z_t.flatten(2), mu, nu, **solver).transport_cost.mean()
    torch.testing.assert_close(got, torch.autograd.grad(fixed, z_s)[0], rtol=1e-6, atol=1e-9)
    learned = make(marginals="learned", **solver).double()
    learned.load_state_dict(loss.state_dict())
    (other,) = torch.autograd.grad(learned(z_s, z_t, q_s, q_t).ot, z_s)
    assert (other - got).abs().max() > 1e-3 * got.abs().max()


@pytest.mark.parametrize("match", ["channel", "position"])
def test_hardest_turns_cvsims_gradient_round_and_keeps_it_from_the_maps(match: str) -> None:
    z_s, z_t, q_s, q_t = views(dtype=F64)
    found = {}
    for marginals in ("perplexity", "hardest"):
        torch.manual_seed(1)
        loss = make(marginals=marginals, match=match, tol=1e-10, max_iter=2000).double()
        ot = loss(z_s, z_t, q_s, q_t).ot
        found[marginals] = ot, torch.autograd.grad(ot, [*loss.parameters()], retain_graph=True)
        (grad,) = torch.autograd.grad(ot, z_s)
    torch.testing.assert_close(found["hardest"][0], found["perplexity"][0])
    for easy, hard in zip(found["perplexity"][1], found["hardest"][1], strict=True):
        torch.testing.assert_close(hard, -easy)
    mu, nu = (mass.detach() for mass in manual_marginals(loss, z_s, z_t))
    x, y = (z.flatten(2) if match == "channel" else z.flatten(2).mT for z in (z_s, z_t))
    fixed = otloss.cosine_sinkhorn(x, y, mu, nu, eps=0.2, tol=1e-10, max_iter=2000).transport_cost.mean()
    torch.testing.assert_close(grad, torch.autograd.grad(fixed, z_s)[0], rtol=1e-6, atol=1e-9)


def test_gradient_none_freezes_cvsim() -> None:
    loss = make(gradient="none")
    assert not any(p.requires_grad for p in loss.parameters())
    data = views()
    loss(*data).ot.backward()
    assert data[0].grad.abs().max() > 0


def test_diagnostics_carry_no_graph() -> None:
    out = make(objective="value")(*views())
    assert isinstance(out, OPTiMLOutput)
    for name, value in out._asdict().items():
        assert value.shape == (), name
        assert value.requires_grad is (
            name in ("loss", "ot", "variance", "covariance", "invariance", "transport_cost")
        ), name


def test_training_holds_the_perplexity_where_plain_learning_collapses() -> None:
    """The known danger in small: only CV-SIM is trained, on fixed maps, to lower L_OT."""
    data = [t.detach() for t in views(batch=8, dim=32, side=3)]
    ends = {}
    for marginals in ("learned", "perplexity", "hardest"):
        torch.manual_seed(0)
        loss = make(dim=32, marginals=marginals, eps=0.2, tol=1e-3)
        optimizer = torch.optim.Adam(loss.parameters(), lr=3e-2)
        start = loss(*data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MarginalCollapseWarning)
            for _ in range(40):
                out = loss(*data)
                optimizer.zero_grad()
                out.ot.backward()
                optimizer.step()
        assert out.ot > 1.05 * start.ot if marginals == "hardest" else out.ot < 0.9 * start.ot  # all learn
        ends[marginals] = out.perplexity.item()
    assert ends["learned"] < 4
    assert ends["perplexity"] == pytest.approx(16, rel=1e-4) and ends["hardest"] == pytest.approx(16, rel=1e-4)


# --- warnings --------------------------------------------------------------------------------------------------------


def collapsed(marginals: str) -> OPTiMLLoss:
    """A loss whose CV-SIM puts its mass on the first channel."""
    loss = make(dim=32, marginals=marginals)
    with torch.no_grad():
        loss.cvsim.out.bias[0] = 100.0
    return loss


@pytest.mark.parametrize("marginals", ["learned", "detached"])
def test_collapse_warns_once(marginals: str) -> None:
    loss, data = collapsed(marginals), views(dim=32)
    with pytest.warns(MarginalCollapseWarning, match=r"perplexity is 1\.0 of 32 points.*marginals='perplexity'"):
        assert loss(*data).perplexity < 1.01
    with warnings.catch_warnings():
        warnings.simplefilter("error", MarginalCollapseWarning)
        loss(*data)


def test_collapse_under_vmap_is_not_reported() -> None:
    loss, data = collapsed("learned"), views(dim=32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MarginalCollapseWarning)
        got = torch.vmap(lambda *views: loss(*views).loss)(*(t[None] for t in data))
    with pytest.warns(MarginalCollapseWarning):  # which that did not use up
        assert torch.allclose(got[0], loss(*data).loss)


def test_a_nan_under_vmap_is_refused() -> None:
    (z_s, *others), loss = views(dim=32), collapsed("learned")
    with pytest.raises(ValueError, match="must be logarithms of finite masses"):  # which of the maps is not known there
        torch.vmap(lambda *views: loss(*views).loss)(*(t[None] for t in (z_s * torch.nan, *others)))


def test_no_collapse_no_warning() -> None:
    data = views(dim=32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MarginalCollapseWarning)
        for marginals in POLICIES:
            make(dim=32, marginals=marginals)(*data)
        out = collapsed("perplexity")(*data)  # the same weights cannot collapse under this policy
        assert out.perplexity.item() == pytest.approx(16, rel=1e-4)
        assert math.isfinite(out.loss.item())


# --- dtypes, edges, compile ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("marginals", ["perplexity", "learned"])
def test_autocast_and_half_precision(marginals: str) -> None:
    loss, data = make(marginals=marginals), views()
    half = [t.detach().bfloat16().requires_grad_() for t in data]
    exact = loss(*(t.detach().float() for t in half))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = loss(*half)
    for name, value in out._asdict().items():
        assert value.dtype == torch.float32, name
        torch.testing.assert_close(value, getattr(exact, name), rtol=1e-6, atol=1e-6)
    out.loss.backward()
    assert all(t.grad.dtype == torch.bfloat16 and t.grad.isfinite().all() for t in half)


@pytest.mark.parametrize("marginals", ["perplexity", "uniform"])
def test_a_map_that_is_not_finite_is_named(marginals: str) -> None:
    loss, maps, q = OPTiMLLoss(8, num_heads=2, marginals=marginals), torch.rand(4, 8, 2, 2), torch.randn(4, 6)
    bad = maps.clone()
    bad[1, 2] = torch.nan
    for views, name in (((bad, maps), "z_s"), ((maps, bad), "z_t")):
        with pytest.raises(ValueError, match=f"^{name} must be finite"):
            loss(*views, q, q)
    if loss.cvsim is not None:
        with torch.no_grad():
            for weights in loss.cvsim.parameters():
                weights.fill_(torch.nan)
        with pytest.raises(ValueError, match=r"^the marginals of CV-SIM .*'perplexity'.* must be finite"):
            loss(maps, maps, q, q)


def test_dead_and_constant_maps_are_finite() -> None:
    """All-zero maps (every channel dead) make CV-SIM's scores constant and every cosine zero."""
    for match in ("channel", "position"):
        for marginals in POLICIES:
            loss = make(match=match, marginals=marginals)
            z_s, z_t, q_s, q_t = views()
            z_s = torch.zeros_like(z_s).requires_grad_()
            z_t = torch.ones_like(z_t).requires_grad_()
            out = loss(z_s, z_t, q_s, q_t)
            out.loss.backward()
            assert out.transport_cost.item() == pytest.approx(1.0, abs=1e-5)
            for tensor in (z_s, z_t, *(p for p in loss.parameters() if p.requires_grad)):
                assert tensor.grad.isfinite().all()


def test_one_position() -> None:
    """A 1×1 map has one position, which takes all the mass; channels are then compared by sign alone."""
    data = views(side=1)
    for marginals in POLICIES:
        out = make(match="position", marginals=marginals)(*data)
        cosine = torch.cosine_similarity(data[0].flatten(1), data[1].flatten(1))
        assert out.ot.item() == pytest.approx((1 - cosine).mean().item(), abs=1e-5)
        assert out.perplexity.item() == pytest.approx(1.0)


def test_positions_may_differ_in_number() -> None:
    z_s, _, q_s, q_t = views(side=4)
    _, z_t, _, _ = views(side=3)
    out = make(match="position")(z_s, z_t, q_s, q_t)
    assert out.perplexity.item() == pytest.approx((8 + 4.5) / 2, rel=1e-4)


def test_channels_last_maps() -> None:
    data = views()
    last = [t.detach().contiguous(memory_format=torch.channels_last) for t in data[:2]]
    torch.manual_seed(1)
    loss = make()
    torch.testing.assert_close(loss(*last, *data[2:]).loss, loss(*data).loss)


def test_state_dict_keys_are_stable() -> None:
    layers = [f"{layer}.{kind}" for layer in ("query", "key", "value", "out") for kind in ("weight", "bias")]
    for marginals in ("perplexity", "hardest", "learned", "detached"):
        assert list(make(marginals=marginals).state_dict()) == [f"cvsim.{name}" for name in layers]
        keys = list(make(marginals=marginals, shared=False).state_dict())
        assert keys == [f"{module}.{name}" for module in ("cvsim", "cvsim_t") for name in layers]
    assert not make(marginals="uniform").state_dict()


def test_compile() -> None:
    loss, data = make(), views()
    expected = loss(*data).loss
    expected.backward()
    wanted = [t.grad.clone() for t in (*data, loss.cvsim.query.weight)]
    loss.zero_grad()
    fresh = [t.detach().clone().requires_grad_() for t in data]
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    got = compiled(*fresh).loss
    got.backward()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for tensor, grad in zip((*fresh, loss.cvsim.query.weight), wanted, strict=True):
        torch.testing.assert_close(tensor.grad, grad, rtol=1e-3, atol=1e-5)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dim": 0}, ValueError, "dim must be at least 1"),
        ({"dim": 18, "num_heads": 4}, ValueError, "num_heads must divide dim"),
        ({"alpha": -0.1}, ValueError, "alpha must be at least 0"),
        ({"beta": "25"}, TypeError, "beta must be a number"),
        ({"eta": float("inf")}, ValueError, "eta"),
        ({"eps": 0.0}, ValueError, "eps must be positive"),
        ({"match": "pixel"}, ValueError, "match must be one of 'channel', 'position', got 'pixel'"),
        ({"marginals": "free"}, ValueError, "marginals must be one of .*got 'free'"),
        ({"perplexity": 1.0}, ValueError, "perplexity must be a share below 1, got 1.0.*marginals='uniform'"),
        ({"perplexity": 0.0}, ValueError, "perplexity must be positive"),
        ({"perplexity": 256}, ValueError, "perplexity must be a share below 1, got 256"),
        ({"tokens": "image"}, ValueError, "tokens must be one of"),
        ({"objective": "emd"}, ValueError, "objective must be one of"),
        ({"gradient": "none", "objective": "value"}, ValueError, "gradient 'none'"),
        ({"max_iter": 0}, ValueError, "max_iter"),
    ],
)
def test_bad_options(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({0: torch.rand(4, 8, 3, 3)}, ValueError, r"z_s must have shape \(B, 16, h, w\) or .*16\), got \(4, 8, 3, 3\)"),
        ({1: torch.rand(4, 16, 9)}, ValueError, r"z_t must have shape \(B, 16, h, w\) or .*16\), got \(4, 16, 9\)"),
        ({1: torch.rand(4, 16, 0, 3)}, ValueError, r"z_t must have shape"),
        ({1: torch.rand(4, 0, 16)}, ValueError, r"z_t must have shape"),
        ({0: torch.rand(4, 16)}, ValueError, r"z_s must have shape"),
        ({1: torch.rand(4, 9, 16)}, ValueError, "z_s and z_t must both be maps or both be tokens"),
        ({0: torch.rand(4, 9, 16), 1: torch.rand(4, 7, 16)}, ValueError, "or equally many tokens, to compare channels"),
        ({1: torch.rand(4, 16, 2, 2)}, ValueError, "z_s and z_t must have the same height and width"),
        ({2: torch.rand(4, 2, 12)}, ValueError, r"q_s must have shape \(B, D\), got \(4, 2, 12\)"),
        ({3: torch.rand(4, 12)}, ValueError, r"q_s and q_t must be equally wide, got \(4, 24\) and \(4, 12\)"),
        ({3: torch.rand(5, 24)}, ValueError, r"equally many images, got \[4, 4, 4, 5\]"),
        ({0: torch.ones(4, 16, 3, 3).int()}, TypeError, "z_s must be a floating-point tensor, got torch.int32"),
        ({0: torch.rand(4, 16, 3, 3).double()}, TypeError, "float64 does not mix"),
        ({3: None}, TypeError, "q_t must be a tensor"),
        ({2: torch.rand(4, 0), 3: torch.rand(4, 0)}, ValueError, r"q_s must have shape \(B, D\) with D at least 1"),
        ({1: torch.rand(4, 16, 3, 3, device="meta")}, ValueError, "on one device, got z_s on cpu, z_t on meta"),
    ],
)
def test_bad_input(changed: dict, error: type[Exception], message: str) -> None:
    data = [t.detach() for t in views()]
    for position, value in changed.items():
        data[position] = value
    with pytest.raises(error, match=message):
        make()(*data)


def test_one_image_is_refused() -> None:
    with pytest.raises(ValueError, match="q_s must have at least 2 rows, since a variance needs two samples"):
        make()(*views(batch=1))


def test_repr_shows_the_policy() -> None:
    assert "marginals='perplexity', perplexity=0.5, shared=True" in repr(make())
    text = repr(make(marginals="uniform", match="position", eps=0.2))
    assert "match='position', marginals='uniform', shared" in text and "eps=0.2" in text
