"""The cards in `model_cards/` are what their JSON renders to, and say what a run measured."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from hf_mrpf import PrunedForImageClassification, RobustnessReport
from hf_mrpf.model_card import CardInfo, render_card
from hf_mrpf.report import paired_difference
from hf_mrpf.results import markdown_table, table_cells

FOLDER = Path(__file__).resolve().parent.parent / "model_cards"
SMALL = {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)}
README_TABLES = {
    "digits": "digits-resnet",
    "cifar10": "cifar10-narrow-resnet",
    "cifar10-mobilevit": "cifar10-mobilevit",
}
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


@pytest.mark.parametrize("mark, folder", README_TABLES.items())
def test_the_tables_of_the_readme_are_those_of_the_cards(mark, folder):
    info = CardInfo.from_dict(json.loads((FOLDER / folder / "card.json").read_text()))
    readme = (FOLDER.parent / "README.md").read_text()
    block = readme.split(f"<!-- {mark} -->")[1].split(f"<!-- end {mark} -->")[0]
    cells = table_cells(info.rows)
    shown = [place for place, title in enumerate(cells[0]) if title not in ("FGSM", "CW-PGD")]
    assert markdown_table([[row[place] for place in shown] for row in cells]) in block
    assert next(note for note in info.notes if note.startswith("Fine-tuned minus dense")) in block
    if info.control:
        clean, attacked = (f"{100 * info.control.accuracies[name]:.1f} %" for name in ("clean", "pgd20"))
        assert f"{clean} clean, {attacked} under PGD-20" in block


def test_the_times_of_the_exports_are_those_that_were_measured():
    content = json.loads((FOLDER / "cifar10-mobilevit" / "latency.json").read_text())
    recipe = runpy.run_path(str(FOLDER.parent / "recipes/export.py"))
    readme = (FOLDER.parent / "README.md").read_text()
    assert recipe["latency_table"](content["milliseconds"]) in readme
    assert recipe["measured"](content) in " ".join(readme.split())


def test_the_control_from_scratch_is_told_as_it_was_measured():
    folder = FOLDER / "digits-resnet"
    info = CardInfo.from_dict(json.loads((folder / "card.json").read_text()))
    tuned, scratch = (RobustnessReport.load(folder / f"{name}.json") for name in ("robustness_report", "from_scratch"))
    assert {"clean": tuned.clean_accuracy, **tuned.attacks} == info.rows[-1].accuracies
    told = " ".join((FOLDER.parent / "README.md").read_text().split())
    accuracies = (scratch.clean_accuracy, scratch.attacks["fgsm"], scratch.attacks["pgd20"])
    clean, fgsm, pgd = (f"{100 * value:.1f} %" for value in accuracies)
    assert f"{clean} clean, {fgsm} under FGSM and {pgd} under PGD-20" in told
    differences = []
    for name in ("clean", "fgsm", "pgd20"):
        found = paired_difference(tuned, scratch, name)
        low, high = (f"{100 * value:+.1f}" for value in found.interval)
        differences.append((f"{100 * found.difference:+.1f}", f"[{low}, {high}]"))
    (clean, of_clean), (fgsm, of_fgsm), (pgd, of_pgd) = differences
    assert f"{clean} points clean {of_clean}, {fgsm} under FGSM {of_fgsm} and {pgd} under PGD-20 {of_pgd}" in told
