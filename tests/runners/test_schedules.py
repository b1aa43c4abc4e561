import pytest
import torch
from lavis.common.registry import registry
from torch.optim import SGD

from lavis_kvmod.runners.schedules import Schedule

SETTINGS = dict(max_epoch=4, min_lr=1e-6, init_lr=1e-3, warmup_start_lr=1e-5, decay_rate=0.5)


def optimizer(**scales):
    return SGD([{"params": [torch.nn.Parameter(torch.ones(1))], "name": k, "lr_scale": v} for k, v in scales.items()])


def rates(name, warmup_steps, steps_per_epoch, theirs=False):
    """The rate of every step of 4 epochs, by us or by LAVIS's own loop."""
    taken, opt = [], optimizer(all=1.0)
    scheduler = registry.get_lr_scheduler_class(name)(optimizer=opt, warmup_steps=warmup_steps, **SETTINGS)
    schedule = Schedule(scheduler, opt)
    for epoch in range(4):
        for step in range(steps_per_epoch):
            if theirs:
                scheduler.step(cur_epoch=epoch, cur_step=step)
            else:
                schedule.set(epoch=epoch, step=step, steps_per_epoch=steps_per_epoch)
            taken.append(opt.param_groups[0]["lr"])
    return taken


@pytest.mark.parametrize("name", ["linear_warmup_cosine_lr", "linear_warmup_step_lr"])
@pytest.mark.parametrize("warmup_steps", [0, 3, 5])
def test_equal_to_lavis_where_the_warm_up_ends_in_the_first_epoch(name, warmup_steps):
    assert rates(name, warmup_steps, 5) == rates(name, warmup_steps, 5, theirs=True)


@pytest.mark.parametrize("name", ["linear_warmup_cosine_lr", "linear_warmup_step_lr"])
def test_a_longer_warm_up_ends_where_it_says(name):
    """LAVIS's breaks off behind epoch 0."""
    ours = rates(name, 8, 5)
    assert ours[:8] == pytest.approx([1e-5 + (1e-3 - 1e-5) * step / 8 for step in range(8)])
    assert ours[8:] == rates(name, 0, 5, theirs=True)[8:]
    assert rates(name, 8, 5, theirs=True)[5] != pytest.approx(ours[5])


def test_each_group_has_its_multiplier_at_every_step():
    opt = optimizer(one=1.0, prefix=10.0)
    scheduler = registry.get_lr_scheduler_class("linear_warmup_cosine_lr")(optimizer=opt, warmup_steps=2, **SETTINGS)
    schedule = Schedule(scheduler, opt)
    for step in range(4):
        schedule.set(epoch=1, step=step, steps_per_epoch=4)
        one, prefix = (group["lr"] for group in opt.param_groups)
        assert prefix == 10 * one
    assert schedule.rates() == {"lr": one, "prefix": prefix}
