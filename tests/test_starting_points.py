"""Dense starts from the Hub: repositories of timm and of transformers, read by the real clients over HTTP."""

import json
import pickle
from pathlib import Path

import pytest
from hub_client import assert_public, refused
from hub_server import ALICE

TIMM = "timm/test_resnet.r160_in1k"
RESNET = "lab/tiny-resnet"
MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]

MAKE = """
import timm
from timm.models import save_for_hf
from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification
torch.manual_seed(1)

def vary(model):
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) * 0.2 + (0.5 if name.endswith("running_var") else -0.1))
    return model.eval()

network = vary(timm.create_model("test_resnet", num_classes=7))
save_for_hf(network, given["timm"], safe_serialization=True, data_config={"mean": given["mean"], "std": given["std"]})
config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4)
vary(ResNetForImageClassification(config)).save_pretrained(given["transformers"])
ConvNextImageProcessor(image_mean=given["mean"], image_std=given["std"]).save_pretrained(given["transformers"])
"""
START = """
from hf_mrpf import PrunedForImageClassification
model = PrunedForImageClassification.from_backbone(given["name"], **given.get("options", {})).eval()
"""
# Everything that two networks share, the names of what differs in size, and both in use.
COMPARE = """
from safetensors.torch import load_file
weights, own = load_file(given["weights"]), model.backbone.state_dict()
assert own.keys() == weights.keys()
head = sorted(name for name in own if own[name].shape != weights[name].shape)
assert all(torch.equal(own[name], weights[name]) for name in own if name not in head)
answer = {"head": head, "mean": model.config.image_mean, "std": model.config.image_std,
          "labels": model.config.num_labels, "size": model.config.image_size, "pruning": model.config.pruning}
"""
NORMAL = "mean, std = (torch.tensor(given[key]).view(3, 1, 1) for key in ('mean', 'std'))\n"


def read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def folders(client, server, place):
    """Repositories as timm and transformers write them, with a normalisation of their own."""
    found = {"timm": place / "timm", "transformers": place / "transformers"}
    client.run(MAKE, mean=MEAN, std=STD, **{name: str(folder) for name, folder in found.items()})
    assert {"config.json", "model.safetensors"} == set(read(found["timm"]))
    server.put(TIMM, read(found["timm"]))
    server.put("lab/mine", read(found["timm"]))
    server.put(RESNET, read(found["transformers"]))
    return found


def weights(folder: Path) -> str:
    return str(folder / "model.safetensors")


@pytest.mark.parametrize("name", [TIMM, "test_resnet.r160_in1k", "lab/mine", "folder"])
def test_timm_weights_with_another_number_of_classes_and_the_repository_s_normalisation(client, folders, name):
    given = {"weights": weights(folders["timm"]), "options": {"num_labels": 3, "image_size": 32}}
    name = str(folders["timm"]) if name == "folder" else name
    answer = client.run(START + COMPARE, name=name, **given)
    assert answer["head"] == ["fc.bias", "fc.weight"]
    assert (answer["mean"], answer["std"]) == (MEAN, STD)
    assert (answer["labels"], answer["size"], answer["pruning"]) == (3, 32, None)


def test_timm_weights_with_their_own_classes_answer_as_in_timm(client, folders):
    code = (
        START
        + COMPARE
        + (
            "import timm\n"
            "images = torch.rand(2, 3, 64, 64)\n"
            + NORMAL
            + "plain = timm.create_model('hf-hub:' + given['name'], pretrained=True).eval()\n"
            "with torch.no_grad():\n    assert torch.equal(model(images).logits, plain((images - mean) / std))\n"
        )
    )
    for options in ({}, {"pretrained": True, "name": "test_resnet"}):
        name = options.pop("name", TIMM)
        code_ = code.replace("given['name']", repr(TIMM))
        answer = client.run(code_, name=name, weights=weights(folders["timm"]), mean=MEAN, std=STD, options=options)
        assert (answer["head"], answer["labels"], answer["size"]) == ([], 7, 160)


def test_a_given_normalisation_wins_and_small_images_gets_its_stem(client, folders):
    options = {"num_labels": 3, "image_size": 32, "small_images": True, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}
    code = START + (
        "answer = [model.config.image_mean, list(model.backbone.conv1.weight.shape),\n"
        "          torch.equal(model.backbone.layer4[0].conv1.weight, load['layer4.0.conv1.weight'])]"
    )
    code = "from safetensors.torch import load_file\nload = load_file(given['weights'])\n" + code
    given = {"name": TIMM, "weights": weights(folders["timm"])}
    mean, stem, same = client.run(code, options=options, **given)
    assert mean == [0, 0, 0] and stem[2:] == [3, 3] and same


@pytest.mark.parametrize("labels", [4, 6])
@pytest.mark.parametrize("where", ["hub", "folder"])
def test_transformers_weights_with_their_processor_s_normalisation(client, folders, where, labels):
    folder = folders["transformers"]
    code = (
        START
        + COMPARE
        + (
            "from transformers import AutoImageProcessor, AutoModelForImageClassification\n"
            "plain = AutoModelForImageClassification.from_pretrained(given['name'])\n"
            "images = torch.rand(2, 3, 32, 32)\n"
            + NORMAL
            + "with torch.no_grad():\n    same = model(images).logits, plain((images - mean) / std).logits\n"
            "assert answer['head'] or torch.equal(*same)\n"
        )
    )
    name = RESNET if where == "hub" else str(folder)
    options = {"num_labels": labels, "image_size": 32}
    answer = client.run(code, name=name, weights=weights(folder), options=options, mean=MEAN, std=STD)
    assert answer["head"] == ([] if labels == 4 else ["classifier.1.bias", "classifier.1.weight"])
    assert (answer["mean"], answer["std"], answer["labels"]) == (MEAN, STD, labels)


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["timm/test_vit.r160_in1k", "lab/pickle"])
def test_a_repository_that_holds_a_pickle_only_is_refused_and_the_pickle_is_not_read(client, hub, folders, place, name):
    files = read(folders["timm" if name.startswith("timm/") else "transformers"])
    del files["model.safetensors"]
    hub.put(name, files | {"pytorch_model.bin": pickle.dumps(Payload(place / "executed"))})
    message = refused(client, START, name=name)
    assert name in message and "model.safetensors" in message
    assert not (place / "executed").exists()
    assert not [request for request in hub.requests if f"GET /{name}" in request and request.endswith(".bin")]
    assert not [request for request in hub.requests if "discussions" in request or "refs/pr" in request]


def test_timm_weights_that_are_nowhere_as_safetensors_are_refused_without_a_download(client, hub):
    before = len(hub.requests)
    message = refused(client, START, name="timm/gcvit_xxtiny.in1k")
    assert "'gcvit_xxtiny.in1k' as a pickle only (https://" in message
    assert len(hub.requests) == before


@pytest.mark.parametrize("name", ["timm/test_convnext.r160_in1k", "lab/no-such-model"])
def test_weights_that_cannot_be_fetched_are_one_message_with_their_name(client, hub, folders, name):
    assert name.split("/")[1] in refused(client, START, name=name)
    hub.fail(f"{name}/resolve", times=99, how="drop")
    assert name.split("/")[1] in refused(client, START, name=name)


def test_offline_from_the_cache(client, folders, hub):
    offline = "import huggingface_hub.constants as constants\nconstants.HF_HUB_OFFLINE = True\n"
    for name, kind in ((TIMM, "timm"), (RESNET, "transformers")):
        client.run(START, name=name)
        before = len(hub.requests)
        given = {"name": name, "weights": weights(folders[kind]), "options": {"num_labels": 3}}
        assert client.run(offline + START + COMPARE, **given)["mean"] == MEAN
        assert len(hub.requests) == before
    assert "test_efficientnet.r160_in1k" in refused(client, offline + START, name="timm/test_efficientnet.r160_in1k")


@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_weights_that_lack_or_damage_a_tensor_are_refused_even_with_a_new_head(client, hub, folders, place, kind):
    name, lost = f"lab/lacks-{kind}", {"timm": "layer2.0.bn1.weight", "transformers": "resnet.embedder"}[kind]
    code = (
        "from safetensors.torch import load_file, save_file\n"
        "tensors = load_file(given['weights'])\n"
        "for key in [key for key in tensors if key.startswith(given['lost'])]:\n    del tensors[key]\n"
        "save_file(tensors, given['file'], metadata={'format': 'pt'})"
    )
    file = place / f"lacks-{kind}.st"
    client.run(code, weights=weights(folders[kind]), lost=lost, file=str(file))
    hub.put(name, read(folders[kind]) | {"model.safetensors": file.read_bytes()})
    message = refused(client, START, name=name, options={"num_labels": 3})
    assert name.split("/")[1] in message and lost in message
    hub.put(f"{name}-2", read(folders[kind]) | {"model.safetensors": file.read_bytes()[:-100]})
    message = refused(client, START, name=f"{name}-2", options={"num_labels": 3})
    assert "model.safetensors" in message or "weights in" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "no_such"}, "config.json: timm has no architecture 'no_such'"),
        ({"num_classes": 10**9}, "config.json: num_classes is 1000000000, no number of classes"),
        ({"num_classes": -1}, "config.json: num_classes is -1, no number of classes"),
        ({"pretrained_cfg": {"mean": "x"}}, "image_mean must be 3 finite numbers"),
        ({"pretrained_cfg": {"input_size": 3}}, "config.json: input_size is 3"),
        ({"model_args": [1]}, "config.json: model_args must be an object"),
        ({"model_args": {"checkpoint_path": "x"}}, "may not hold checkpoint_path"),
        ({"model_args": {"act_layer": "http://127.0.0.1:9"}}, "has no paths or addresses"),
        ({"model_args": {"layers": [10**9, 1, 1, 1]}}, "is 1000000000"),
        ({"model_args": {"channels": [4096] * 4}}, "model.safetensors is too small for the"),
    ],
)
def test_a_hostile_config_of_timm_s_format_is_refused(client, folders, tmp_path, change, message):
    for name, content in read(folders["timm"]).items():
        (tmp_path / name).write_bytes(content)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value in change.items():
        config[key] = {**config[key], **value} if key == "pretrained_cfg" else value
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert message in refused(client, START, name=str(tmp_path))


def test_code_in_a_repository_is_neither_run_nor_asked_about(client, hub, folders, place):
    files = read(folders["transformers"])
    config = json.loads(files["config.json"]) | {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    code = f"open({str(place / 'executed')!r}, 'w')".encode()
    hub.put("lab/evil", files | {"config.json": json.dumps(config).encode(), "evil.py": code})
    ask = "import builtins\ndef ask(*words):\n    raise SystemExit('asked')\nbuiltins.input = ask\n"
    assert "trust_remote_code" in refused(client, ask + START, name="lab/evil")
    own = "from hf_mrpf.starting_point import own_config\nanswer = own_config(given['name'])"
    assert client.run(ask + own, name="lab/evil") is None
    assert not (place / "executed").exists()


BUILD = """
from hf_mrpf.cli import ModelArguments
from hf_mrpf.starting_point import build_model
from hf_mrpf.data import load_image_data
data = load_image_data("digits", max_train_samples=40, max_eval_samples=10)
for name in given["names"]:
    model = build_model(ModelArguments(model_name_or_path=name, model_revision="v1"), data)
    assert list(model.config.id2label.values()) == data.class_names
    found = [model.config.image_mean, model.config.image_std]
    assert found == [given["mean"], given["std"]], found
    weights, own = load_file(given["names"][name]), model.backbone.state_dict()
    assert sum(torch.equal(own[key], weights[key]) for key in own) == len(own) - 2, name
try:
    build_model(ModelArguments(model_name_or_path=name, model_revision="v2"), data)
except OSError as error:
    answer = str(error)
"""


def test_the_options_of_the_recipe_start_from_a_revision(client, hub, folders):
    names = {TIMM: folders["timm"], RESNET: folders["transformers"]}
    for name, folder in names.items():
        hub.put(name, read(folder), branch="v1")
        hub.put(name, {"README.md": b"emptied"})
    try:
        code = "from safetensors.torch import load_file\n" + BUILD
        files = {name: weights(folder) for name, folder in names.items()}
        assert "v2" in client.run(code, names=files, mean=MEAN, std=STD)
    finally:
        for name, folder in names.items():
            hub.put(name, read(folder))


RECIPE = [
    *("--max_train_samples", "64", "--max_eval_samples", "20", "--base_epochs", "0", "--num_train_epochs", "0"),
    *("--num_steps", "1", "--calibration_sets", "1", "--calibration_set_size", "16", "--eval_num_steps", "1"),
    *("--allocation", "uniform", "--use_cpu", "--disable_tqdm", "true"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [(TIMM, "timm"), (RESNET, "transformers"), ("folder", "transformers")])
def test_the_recipe_prunes_a_model_of_the_hub_and_publishes_no_place(client, hub, folders, place, name, kind):
    output, repo_id = place / "runs" / f"{Path(name).name}", f"lab/from-{Path(name).name}"
    name = str(folders[kind]) if name == "folder" else name
    command = [*RECIPE, "--model_name_or_path", name, "--image_size", "32", "--output_dir", str(output)]
    command += ["--push_to_hub", "--hub_model_id", repo_id]
    assert client.recipe("prune", *command, token=ALICE) == 0, client.stderr
    dense = output / "stages" / "dense" / "model"
    code = (
        "from safetensors.torch import load_file\nfrom hf_mrpf import PrunedForImageClassification\n"
        "model = PrunedForImageClassification.from_pretrained(given['dense'])\n" + COMPARE
    )
    answer = client.run(code, dense=str(dense), weights=weights(folders[kind]))
    assert len(answer["head"]) == 2 and answer["mean"] == MEAN and answer["labels"] == 10
    start = Path(name).name if Path(name).is_dir() else name
    assert f'"pretrained {start}"' in (output / "robustness_report.json").read_text()
    assert_public(hub.files(repo_id), ALICE, str(place))
    assert json.loads((output / "config.json").read_text())["pruning"]["shapes"]
