"""The cards in `model_cards/` are what their JSON renders to, and say what a run measured."""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from hf_mrpf import PrunedForImageClassification
from hf_mrpf.model_card import CardInfo, render_card

FOLDER = Path(__file__).resolve().parent.parent / "model_cards"
SMALL = {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)}
CARDS = sorted(path.parent for path in FOLDER.glob("*/card.json"))


def test_there_are_a_digits_a_cifar_and_a_mobilevit_card():
    assert {folder.name for folder in CARDS} >= {"digits-resnet", "cifar10-narrow-resnet", "cifar10-mobilevit"}


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_a_card_is_what_its_json_renders_to(folder):
    info = CardInfo.from_dict(json.loads((folder / "card.json").read_text()))
    assert (folder / "README.md").read_text() == str(render_card(info))
    card = ModelCard.load(folder / "README.md")
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert set(info.rows[-1].accuracies.values()) == set(values.values())
    assert info.figure is None or (folder / info.figure).is_file()
    assert info.command and info.versions and info.seed is not None


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_the_load_snippets_of_a_card_run(folder, tmp_path):
    info = CardInfo.from_dict(json.loads((folder / "card.json").read_text()))
    model = PrunedForImageClassification.from_backbone(
        "timm/resnet18", id2label=dict(enumerate(info.class_names)), image_size=info.image_size, **SMALL
    )
    model.save_pretrained(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 2 and all("FOLDER_OR_HUB_ID" in block for block in blocks)
    names: dict = {}
    for block in blocks:
        exec(compile(block.replace("FOLDER_OR_HUB_ID", str(tmp_path)), "card", "exec"), names)
        pixels = torch.rand(1, 3, info.image_size, info.image_size)
        assert torch.equal(names["model"].eval()(pixels).logits, model.eval()(pixels).logits)
    (first, *_) = names["classify"](Image.new("RGB", (40, 30), "red"))
    assert first["label"] in info.class_names
