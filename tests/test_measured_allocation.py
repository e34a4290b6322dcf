"""Allocations that measure: what plan_pruning hands them, what it takes from them, and what it refuses."""

import pytest
import torch
from pruning_reference import narrow_resnet

from hf_mrpf import AttackConfig, plan_pruning

EXAMPLE = torch.rand(1, 3, 16, 16)
ATTACK = AttackConfig(eps=0.1, num_steps=1)
OPTIONS = {"allocation": "netadapt", "attack": ATTACK, "min_channels": 1}


def calibration(count=8):
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(count, 3, 16, 16, generator=generator), torch.arange(count) % 10)]


@pytest.mark.parametrize("metric", ["macs", "params"])
def test_a(metric):
    model = narrow_resnet()
    import time

    t = time.time()
    plan = plan_pruning(model, EXAMPLE, target=0.5, target_metric=metric, batches=calibration(), **OPTIONS)
    print(time.time() - t, plan.achieved, plan.ratios)
