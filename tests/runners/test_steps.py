"""One optimizer step, with a model small enough to see through."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lavis_kvmod.datasets.loading.loader import PADDING
from lavis_kvmod.runners.steps import GradientStep, _ids, _named

CPU = torch.device("cpu")


class Tokens(nn.Module):
    """Mean over tokens of (w·x)²: batches hold different numbers of tokens."""

    def __init__(self, says_weight=True):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
        self.unused = nn.Parameter(torch.ones(1), requires_grad=False)
        self.says_weight = says_weight

    def forward(self, samples):
        loss = (samples["x"] @ self.weight).pow(2).mean() * samples.get("times", 1.0)
        return {"loss": loss, **({"loss_weight": torch.tensor(len(samples["x"]))} if self.says_weight else {})}


def train_step(model, samples):
    return model(samples)["loss"]


def make(model=None, train_step=train_step, **settings):
    model = model or Tokens()
    optimizer = torch.optim.SGD([model.weight], lr=0.1)
    step = GradientStep(model=model, inner=model, train_step=train_step, optimizer=optimizer, device=CPU, **settings)
    return model, step


def batches(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(size, 3, generator=generator)} for size in sizes]


def take(step, parts):
    for i, part in enumerate(parts):
        step.add(dict(part), num_batches=len(parts), is_last=i + 1 == len(parts), counts=[])
    return step.finish()


def test_a_step_over_several_batches_is_that_of_one_large_batch():
    parts = batches(1, 5, 2)
    large, one = make()
    small, several = make()
    loss = take(one, [{"x": torch.cat([part["x"] for part in parts])}]).loss
    assert take(several, parts).loss == pytest.approx(loss)
    assert torch.allclose(large.weight, small.weight, atol=1e-7)
    # without its weights a batch would count as much as any other
    equal, unweighed = make(Tokens(says_weight=False))
    take(unweighed, parts)
    assert not torch.allclose(large.weight, equal.weight, atol=1e-3)


def test_a_single_batch_is_stock_bit_for_bit():
    (part,) = batches(7)
    model, step = make()
    stock = Tokens()
    optimizer = torch.optim.SGD([stock.weight], lr=0.1)
    stock(part)["loss"].backward()
    optimizer.step()
    take(step, [part])
    assert torch.equal(model.weight, stock.weight)


def test_lavis_mains_train_step_gives_a_tuple():
    model, step = make(train_step=lambda model, samples: (model(samples)["loss"], {"loss": 1}))
    assert take(step, batches(3)).problem is None and not torch.equal(model.weight, Tokens().weight)


def test_padding_counts_nothing():
    parts = batches(2, 3)
    model, step = make()
    take(step, [*parts, {**batches(4)[0], PADDING: True}])
    same, without = make()
    take(without, parts)
    assert torch.allclose(model.weight, same.weight, atol=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_costs_its_step_and_no_more(bad):
    good, worse = batches(2, 2)
    model, step = make()
    before = model.weight.detach().clone()
    finished = take(step, [good, {**worse, "times": bad, "image_id": [7, 8]}])
    assert torch.equal(model.weight, before) and model.weight.grad is None
    assert finished.problem == f"the loss is {bad} (image_id [7, 8])"
    finished = take(step, [good])
    assert finished.problem is None and not torch.equal(model.weight, before)


def test_a_gradient_that_is_not_finite_is_no_step():
    """sqrt(0) has a finite value and an infinite slope."""
    model, step = make(train_step=lambda model, samples: (model.weight * 0).abs().sum().sqrt())
    before = model.weight.detach().clone()
    finished = take(step, batches(1))
    assert finished.problem.startswith("the norm of the gradient is ") and torch.equal(model.weight, before)


def test_gradients_are_clipped_and_their_norm_is_told():
    model, step = make(max_grad_norm=0.5)
    before = model.weight.detach().clone()
    finished = take(step, batches(4))
    assert finished.grad_norm > 0.5
    assert (before - model.weight).norm().item() == pytest.approx(0.1 * 0.5, rel=1e-4)


def test_a_trained_parameter_without_gradient_is_named(caplog):
    model = Tokens()
    model.unused.requires_grad_(True)
    _, step = make(model)
    take(step, batches(1))
    assert "1 trained parameters got no gradient from the first step: unused; they will not change" in caplog.text
    _, step = make(model, world_size=2)  # which would wait for it
    step.add(batches(1)[0], num_batches=1, is_last=True, counts=[])
    with pytest.raises(RuntimeError, match="unused; freeze them"):
        step.finish()


def test_with_a_scaler_the_step_is_the_same_and_an_overflow_is_the_scalers_affair():
    parts = batches(3, 5)
    plain, step = make(max_grad_norm=1.0)
    take(step, parts)
    scaled, step = make(max_grad_norm=1.0, scaler=torch.amp.GradScaler("cpu", init_scale=4.0))
    take(step, parts)
    assert torch.allclose(plain.weight, scaled.weight, atol=1e-7)
    before = scaled.weight.clone()
    scaled.weight.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
    told = [take(step, parts[:1]).problem for _ in range(3)]  # at scales of 4, 2 and 1
    assert told == [None, None, "the norm of the gradient is inf, whatever the losses' scale"]
    assert torch.equal(scaled.weight, before)


class _Reads(TorchDispatchMode):
    """Counts the numbers that are read one by one (`item`, `float`, `bool`): each waits for a GPU."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_no_number_is_read_while_batches_are_computed():
    """All that is wanted of a step comes in one piece, when it is due."""
    _, step = make(max_grad_norm=1.0)
    with _Reads() as reads:
        finished = take(step, batches(2, 3))
    assert reads.number == 0 and finished.loss > 0


def test_what_is_counted_is_added_up():
    _, step = make()
    for i, part in enumerate(batches(1, 2)):
        step.add(part, num_batches=2, is_last=i == 1, counts=[10 + i, i])
    assert step.finish().counts == [21, 1]


def test_the_size_of_losses_changes_no_result():
    parts = batches(1, 5, 2)
    for usual in (1, 48, 300):
        model, step = make(usual_weight=usual)
        take(step, parts)
        first = model.weight.clone() if usual == 1 else first  # noqa: F821
        assert torch.equal(model.weight, first)


def test_a_loss_without_number_leaves_the_scale_as_it_was():
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    model, step = make(scaler=scaler)
    assert take(step, [{**batches(2)[0], "times": float("nan")}]).problem and scaler.get_scale() == 4.0
    assert take(step, batches(2)).problem is None and not torch.equal(model.weight, Tokens().weight)


def test_batches_are_named_by_what_they_carry():
    assert _named(_ids({"question_id": [1, 2], "text_input": ["a", "b"]})) == "question_id [1, 2]"
    assert _named(_ids({"image": None})) == "its samples carry no id"


class Parts(Tokens):
    """A loss that is the sum of two."""

    def forward(self, samples):
        output = super().forward(samples)
        return {**output, "loss_one": output["loss"] * 0.25, "loss_two": output["loss"] * 0.75, "loss_three": None}


def test_single_losses_are_means_like_their_sum():
    _, step = make(Parts())
    result = take(step, batches(1, 5, 2))
    assert result.parts == pytest.approx({"loss_one": result.loss / 4, "loss_two": result.loss * 3 / 4})
    assert take(make()[1], batches(3)).parts == {}
