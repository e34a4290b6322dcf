"""The control of a pruned model: its shape with other weights, trained for as much compute as the whole way took."""

import pytest
import torch

from hf_mrpf import PrunedForImageClassification, count_macs, plan_pruning, prune
from hf_mrpf.fresh import equal_compute_epochs, with_fresh_weights

EXAMPLE = torch.zeros(1, 3, 16, 16)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    model = PrunedForImageClassification.from_backbone(
        "timm/resnet18", num_labels=10, image_size=16, small_images=True, layers=(1, 1, 1, 1), channels=(8, 8, 8, 8)
    )
    dense = count_macs(model, EXAMPLE)
    prune(model, plan_pruning(model, EXAMPLE, target=0.5, allocation="uniform"))
    folder = tmp_path_factory.mktemp("pruned")
    model.save_pretrained(folder)
    return PrunedForImageClassification.from_pretrained(folder), dense


def test_fresh_weights_have_the_shapes_and_none_of_the_values(pruned):
    model, _ = pruned
    torch.manual_seed(1)
    fresh = with_fresh_weights(model)
    ours, theirs = dict(fresh.named_parameters()), dict(model.named_parameters())
    assert {n: p.shape for n, p in ours.items()} == {n: p.shape for n, p in theirs.items()}
    assert all(not torch.equal(ours[n], theirs[n]) for n in ours if n.endswith("conv1.weight"))
    assert count_macs(fresh, EXAMPLE) == count_macs(model, EXAMPLE)
    torch.manual_seed(1)
    assert torch.equal(next(with_fresh_weights(model).parameters()), next(fresh.parameters()))


def test_compute_is_that_of_dense_and_pruned_epochs(pruned):
    model, dense = pruned
    epochs = equal_compute_epochs(model, 6.0, 2.0)
    assert epochs * count_macs(model, EXAMPLE) == pytest.approx(6 * dense + 2 * count_macs(model, EXAMPLE))
    assert 13 < epochs < 15
    assert equal_compute_epochs(model, 0.0, 2.0) == 2.0
