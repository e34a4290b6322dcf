"""The card parses as a Hub model card, and every figure in it is the one that was measured."""

import json
import re
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard

from hf_mrpf import AttackConfig, PrunedForImageClassification, plan_pruning, prune
from hf_mrpf.hub import TOLD, of_dense, short_card
from hf_mrpf.model_card import CardInfo, PlanSummary, ResultRow, render_card, results_table
from hf_mrpf.named_attacks import ATTACKS, settings_of
from hf_mrpf.report import RobustnessReport, wilson_interval
from hf_mrpf.results import markdown_table

COSTS = {"parameters": 157_042, "macs": 6_204_000, "file_size": 650_123, "latency": {"1": 1.512, "64": 21.53}}
SETTINGS = {
    "pgd20": {"loss": "ce", "steps": 20, "step_size": 0.025, "restarts": 1, "random_start": True},
    "cw": {"loss": "margin", "steps": 20, "step_size": 0.025, "restarts": 1, "random_start": True},
}


def _report(clean, pgd, cw, count=500):
    right = {"clean": clean, "pgd20": pgd, "cw": cw}
    return RobustnessReport(
        clean_accuracy=clean / count,
        attacks={"pgd20": pgd / count, "cw": cw / count},
        intervals={name: wilson_interval(number, count) for name, number in right.items()},
        settings=SETTINGS,
        num_samples=count,
        norm="linf",
        eps=0.2,
        seed=3,
        zero_gradient_share=0.0,
        data_name="digits",
        images="0",
        device="cpu",
        dtype="float32",
        versions={},
        verdicts={name: [True] * number + [False] * (count - number) for name, number in right.items()},
    )


@pytest.fixture
def info():
    rows = [
        ResultRow.from_report("dense", _report(481, 330, 331), **COSTS),
        ResultRow.from_report("pruned", _report(300, 101, 102), **COSTS | {"parameters": 60_042, "macs": 3_110_000}),
        ResultRow.from_report("fine-tuned", _report(478, 328, 329), **COSTS | {"macs": 3_110_000}),
    ]
    return CardInfo(
        model_name="resnet-digits-mrpf",
        backbone="timm/resnet18",
        repo_id="someone/resnet-digits-mrpf",
        base_model="timm/resnet18.a1_in1k",
        image_size=16,
        class_names=list("0123456789"),
        dataset_id="uoft-cs/cifar10",
        dataset_name="CIFAR-10",
        dataset_on_hub=True,
        rows=rows,
        control=ResultRow.from_report("the same net under normal training", _report(485, 20, 21)),
        plan=PlanSummary(
            allocation="mrs",
            importance="magnitude",
            target_metric="macs",
            target=0.5,
            achieved={"macs": 0.501, "params": 0.382},
            units=[
                {"name": "layer1.0.conv1", "width": 16, "removed": 0.5, "score": 0.01234},
                {"name": "stem", "width": 32, "removed": 0.25, "score": None},
            ],
            gamma=0.1,
            spearman=0.914,
        ),
        pruning_steps={"before": {"accuracy": 0.961, "robust_accuracy": 0.66, "num_samples": 100}},
        selection={"best": {"epoch": 3.0, "eval_accuracy": 0.97, "eval_robust_accuracy": 0.662}},
        training={"objective": "TRADES, beta 6", "epochs": 20},
        figure="mrs.png",
        notes=["The images are a JPEG-coded copy."],
        limits=["Digits only."],
        versions={"torch": "2.15.0"},
        seed=3,
        command="accelerate launch recipes/prune.py --eps 8/255",
    )


def _eval_results(card):
    return {result.metric_name: result for result in card.data.eval_results}


def test_metadata_round_trips_and_holds_every_figure(info):
    text = str(render_card(info))
    card = ModelCard(text)
    assert str(card) == text
    assert (card.data.license, card.data.pipeline_tag) == ("apache-2.0", "image-classification")
    assert (card.data.datasets, card.data.base_model) == (["uoft-cs/cifar10"], "timm/resnet18.a1_in1k")
    (entry,) = card.data.to_dict()["model-index"]
    assert entry["name"] == "resnet-digits-mrpf" and len(entry["results"]) == 1
    results = _eval_results(card)
    assert len(results) == len(card.data.eval_results) == 3, "metric names must be distinct"
    final = info.rows[-1]
    for name, title in {
        "clean": "Accuracy",
        "pgd20": "Robust accuracy (PGD-20, linf, eps 0.2)",
        "cw": "Robust accuracy (CW-PGD, linf, eps 0.2)",
    }.items():
        result = results[title]
        assert isinstance(result.metric_value, float) and result.metric_value == final.accuracies[name]
        assert result.metric_args["n"] == 500 and result.metric_args["seed"] == 3
        assert tuple(result.metric_args["wilson_95"]) == final.intervals[name]
        assert (result.dataset_type, result.dataset_split) == ("uoft-cs/cifar10", "test")
        if name != "clean":
            expected = {"attack": name, "eps": 0.2, "norm": "linf", "steps": 20} | SETTINGS[name]
            assert expected.items() <= result.metric_args.items()


def test_page_shows_table_plan_limits_and_citations(info):
    text = render_card(info).text
    dense, pruned, tuned = (line for line in text.splitlines() if re.match(r"\| (dense|pruned|fine-tuned) ", line))
    assert dense.startswith("| dense | 96.2 % [94.1, 97.6] | 66.0 % [61.7, 70.0] | 66.2 % [")
    assert dense.endswith("| 157 k | 6.20 M | 1.51 | 21.5 | 650 kB |")
    assert "| 60.0 k (38 %) | 3.11 M (50 %) |" in pruned and tuned.startswith("| fine-tuned | 95.6 % ")
    assert "n = 500 images, Wilson 95 % intervals, seed 3. PGD-20: linf eps = 0.2, 20 steps of 0.025" in text
    assert "the same net under normal training reaches 97.0 % [95.1, 98.2] clean and 4.0 % [" in text
    assert "pruned to 50.1 % of the MACs and 38.2 % of the parameters" in text
    assert "| `layer1.0.conv1` | 16 | 0.0123 | 50 % |" in text and "| `stem` | 32 |  | 25 % |" in text
    assert "Spearman correlation of 0.91" in text and "](mrs.png)" in text
    assert "our reading" in text and "not public to us" in text
    assert "holds for the named attack, norm and eps only" in text
    assert "(100 images)" in text and "| before | 96.1 % | 66.0 % |" in text and "| best (epoch 3) |" in text
    assert "| objective | TRADES, beta 6 |" in text and "JPEG-coded" in text and "- Digits only." in text
    assert "2410.15176" in text and "1901.08573" in text and "torch 2.15.0." in text
    assert "--eps 8/255" in text
    assert "None" not in text and "{{" not in text and "\n\n\n" not in text


def test_load_snippet_is_python_that_names_the_model(info):
    snippets = re.findall(r"```python\n(.*?)```", render_card(info).text, re.DOTALL)
    for snippet in snippets:
        compile(snippet, "card", "exec")
    assert 'from_pretrained("someone/resnet-digits-mrpf")' in snippets[0] and "import hf_mrpf" in snippets[0]
    assert "AutoModelForImageClassification" in snippets[0] and "pipeline(" in snippets[0]
    assert "trust_remote_code=True" in snippets[1]


def test_short_card_claims_nothing():
    card = render_card(CardInfo("plain", "timm/resnet18"))
    assert ModelCard(str(card)).data.eval_results is None
    assert card.data.get("model_name") is None and "model-index" not in str(card)
    assert "claims neither accuracy nor robustness" in card.text
    assert "## How to load" in card.text and "## Citation" in card.text
    for heading in ("## Results", "## How it was pruned", "## How it was fine-tuned", "## Again", "None"):
        assert heading not in card.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_card_without_a_plan_tells_that_the_model_is_pruned(dtype):
    sizes = {"layers": (1, 1, 1, 1), "channels": (8, 12, 16, 16), "small_images": True}
    model = PrunedForImageClassification.from_backbone("timm/resnet18", num_labels=4, image_size=16, **sizes)
    assert of_dense(model) is None
    plan = plan_pruning(model, torch.zeros(1, 3, 16, 16), allocation="uniform", target=0.5)
    prune(model, plan)
    macs, params = (f"{100 * plan.achieved[metric]:.1f} %" for metric in ("macs", "params"))
    kept = f"{macs} of the MACs and {params} of the parameters"
    card = render_card(CardInfo("own", "timm/resnet18", of_dense=of_dense(model.to(dtype)))).text
    assert f"pruned to {kept} of its dense network, made with" in card
    assert "pruned" not in short_card(model).text.split("## How")[0]  # which a later push keeps


def test_plan_without_scores_says_nothing_of_sensitivity(info):
    plan = replace(info.plan, allocation="uniform", gamma=None, spearman=None)
    text = render_card(replace(info, plan=plan, figure=None)).text
    assert "nats the loss" not in text and "Spearman" not in text and "mrs.png" not in text
    assert "Allocation `uniform`" in text


def test_no_token_and_no_local_path(info):
    command = (
        "recipes/prune.py --output_dir /home/jane/runs/x --hub_token=secret --dataset_name ../shared/data/cifar10 "
        "--model timm/resnet18 --eps 8/255 ~/models/dense hf_abcdefghijklmnopqrstuvwxyz"
    )
    training = {"resume_from": "/root/out/checkpoint-3", "page": "https://arxiv.org/abs/1901.08573"}
    text = str(render_card(replace(info, command=command, training=training, notes=[r"from C:\Users\jane\data"])))
    for secret in ("jane", "secret", "hf_abc", "shared/", "/root", "~/"):
        assert secret not in text
    for public in ("…/x", "…/cifar10", "timm/resnet18 ", "8/255", "https://arxiv.org/abs/1901.08573", "…/checkpoint-3"):
        assert public in text
    assert "recipes/prune.py --output_dir" in text


def test_info_survives_json(info):
    content = json.loads(json.dumps(info.to_dict()))
    again = CardInfo.from_dict(content)
    assert again == info and str(render_card(again)) == str(render_card(info))
    with pytest.raises(ValueError, match=r"unknown keys \['models'\]"):
        CardInfo.from_dict(content | {"models": 1})


def test_info_refuses_paths_and_figures_without_data(info):
    with pytest.raises(ValueError, match=r"base_model is '/home/x/dense'; it must look like a Hub id"):
        replace(info, base_model="/home/x/dense")
    local = replace(info, dataset_id="my own data", dataset_on_hub=False)
    assert ModelCard(str(render_card(local))).data.datasets is None
    with pytest.raises(ValueError, match="give dataset_id"):
        replace(info, dataset_id=None)


def test_terminal_table_has_the_cells_of_the_page_without_intervals(info):
    table = results_table(info.rows).splitlines()
    assert len({len(line) for line in table[1:5]}) == 1, "columns are aligned"
    heading = ["model", "clean", "PGD-20", "CW-PGD", "parameters", "MACs", "ms, batch 1", "ms, batch 64", "file"]
    assert re.split(r"\s{2,}", table[0]) == heading
    page = re.sub(r" \[[\d., ]+\]", "", render_card(info).text).replace(", Wilson 95 % intervals", "")
    for line in (table[0], *table[2:5]):
        cells = re.split(r"\s{2,}", line.strip())
        assert f"| {' | '.join(cells)} |" in page
    assert table[5].startswith("n = 500 images") and table[5] in page
    assert results_table([json.loads(json.dumps(asdict(row))) for row in info.rows]).splitlines() == table


@pytest.mark.parametrize("classes", [10, 2])
def test_every_attack_that_can_be_measured_can_be_shown(info, classes):
    attack = AttackConfig(eps=0.2)
    names = [name for name, specs in ATTACKS.items() if specs]
    settings = {name: settings_of(name, attack, classes) for name in names}
    right = dict.fromkeys(("clean", *names), 100)
    report = replace(
        _report(481, 330, 331),
        attacks=dict.fromkeys(names, 0.2),
        intervals={name: wilson_interval(100, 500) for name in right},
        settings=settings,
        verdicts={name: [True] * 100 + [False] * 400 for name in right},
    )
    row = ResultRow.from_report("fine-tuned", report)
    page = render_card(replace(info, rows=[row], control=None)).text
    table = results_table([row])
    for text in (page, table):
        assert "Square: linf eps = 0.2, 5000 queries on the margin" in text
        assert "PGD-50 x5: linf eps = 0.2, 50 steps of 0.01 on the cross-entropy, random start, 5 restarts." in text
        if classes == 10:
            assert "AutoAttack: linf eps = 0.2, APGD-CE 100 steps on the cross-entropy, random start; APGD-T" in text
            assert "9 targets, random start; FAB-T" in text and "standard set" not in text
        else:
            assert "AutoAttack (not the standard set)" in text and "It differs from the standard set: 1 of 9" in text


def test_rows_without_costs_leave_blanks(info):
    bare = replace(info.rows[1], parameters=None, macs=None, file_size=None, latency={})
    line = results_table([info.rows[0], bare]).splitlines()[3]
    assert line.startswith("pruned") and line.endswith("%") and "k" not in line


def test_a_table_of_models_without_a_file_has_no_column_of_files(info):
    rows = [replace(row, file_size=None) for row in info.rows]
    heading, *_, told = results_table(rows).splitlines()
    assert "file" in results_table(info.rows).splitlines()[0] and "file" not in heading
    assert heading.split()[-3:] == ["ms,", "batch", "64"] and told.startswith("n = ")


def test_rows_measured_differently_share_no_table(info):
    with pytest.raises(ValueError, match="measured in different ways"):
        results_table([info.rows[0], replace(info.rows[1], eps=0.1)])
    with pytest.raises(ValueError, match="no rows"):
        results_table([])


@pytest.mark.parametrize(
    ("parameters", "shown"),
    [
        (7, "7"),
        (999, "999"),
        (1000, "1.00 k"),
        (78_042, "78.0 k"),
        (999_960, "1.00 M"),
        (11_173_962, "11.2 M"),
        (1_553 * 10**9, "1.55 T"),
    ],
)
def test_amounts_have_three_digits(info, parameters, shown):
    line = results_table([replace(info.rows[0], parameters=parameters)]).splitlines()[2]
    assert re.search(rf"  {re.escape(shown)}\s+6\.20 M", line)


def test_times_that_only_a_later_row_has_are_shown(info):
    first, second, *_ = info.rows
    text = results_table([replace(first, latency={}), replace(second, latency={"1": 1.25})])
    assert "ms, batch 1" in text and "1.25" in text


def test_a_card_of_a_training_without_a_report_does_not_say_that_nothing_was_measured():
    bare = CardInfo("own", "timm/resnet18")
    sentence = "No measurement came with these weights"
    assert sentence in render_card(bare).text
    assert sentence not in render_card(replace(bare, selection={"best": {"accuracy": 0.9}})).text
    # By which a bare push tells a card that other weights came with.
    assert TOLD not in render_card(bare).text and TOLD in render_card(replace(bare, training={"eps": "0.1"})).text


def test_a_name_with_a_pipe_or_a_line_break_stays_one_cell():
    assert markdown_table([["method", "clean"], ["a | b\nc", "1 %"]]).splitlines()[-1] == r"| a \| b c | 1 % |"


def test_plan_summary_reads_a_plan():
    unit = SimpleNamespace(name="stem", width=8)
    plan = SimpleNamespace(
        units=[unit, SimpleNamespace(name="head", width=4)],
        ratios={"stem": 0.5, "head": 0.25},
        scores={"stem": 0.1},
        allocation="mrs",
        importance="taylor",
        target_metric="params",
        target=0.4,
        achieved={"macs": 0.5},
        sensitivity={"settings": {"gamma": 0.1}, "spearman": 0.9},
        after={"macs": 20},
        dense_size={"macs": 80},
        latency=None,
    )
    summary = PlanSummary.from_plan(plan, rounds=2)
    assert (summary.gamma, summary.spearman, summary.rounds, summary.importance) == (0.1, 0.9, 2, "taylor")
    assert summary.units == [
        {"name": "stem", "width": 8, "removed": 0.5, "score": 0.1},
        {"name": "head", "width": 4, "removed": 0.25, "score": None},
    ]
    assert summary.of_dense == {"macs": 0.25}
    card = render_card(CardInfo(model_name="twice", backbone="timm/resnet18", plan=summary)).content
    assert "pruned to 25.0 % of the MACs of its dense parent" in card and "50.0 % of the MACs" in card
    plan.sensitivity = plan.dense_size = None
    assert PlanSummary.from_plan(plan).gamma is None and PlanSummary.from_plan(plan).of_dense is None
