"""The cards in `model_cards/` are what their JSON renders to, and say what a run measured."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_mrpf.model_card import CardInfo, render_card

FOLDER = Path(__file__).resolve().parent.parent / "model_cards"
CARDS = sorted(path.parent for path in FOLDER.glob("*/card.json"))


def test_there_are_cards():
    assert CARDS


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_a_card_is_what_its_json_renders_to(folder):
    info = CardInfo.from_dict(json.loads((folder / "card.json").read_text()))
    assert (folder / "README.md").read_text() == str(render_card(info))
    card = ModelCard.load(folder / "README.md")
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert set(info.rows[-1].accuracies.values()) == set(values.values())
    assert info.figure is None or (folder / info.figure).is_file()
    assert info.command and info.versions and info.seed is not None
