"""To the Hub and back: the real client against a Hub on the loopback interface."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub_client import REPOSITORY, Failed, assert_public, refused
from hub_server import ALICE, BOB

FILES = {"model.safetensors", "config.json", "preprocessor_config.json", "modeling.py", "README.md"}
RECORD = {"pruning_plan.json", "robustness_report.json", "mrs.png"}

FIGURES = b"""---
model-index:
- name: old
  results:
  - task: {type: image-classification}
    dataset: {type: digits, name: digits}
    metrics: [{type: accuracy, value: 0.9}]
---
# old
"""

BUILD = """
import hf_mrpf
torch.manual_seed(given.get("seed", 0))
model = hf_mrpf.PrunedForImageClassification.from_backbone(
    "timm/resnet18", id2label={0: "a", 1: "b", 2: "c"}, image_size=16, small_images=True, image_mean=[0.4, 0.5, 0.6],
    layers=[1, 1, 1, 1], channels=[8, 8, 8, 8], stem_type="deep", stem_width=4,
).eval()
"""
REMEMBER = """
from safetensors.torch import save_file
images = torch.rand(3, 3, 16, 16)
with torch.no_grad():
    save_file({"images": images, "logits": model.eval()(images).logits}, given["expected"])
"""
COMPARE = """
from safetensors.torch import load_file
expected = load_file(given["expected"])
with torch.no_grad():
    answer = torch.equal(model(expected["images"]).logits, expected["logits"])
"""


@pytest.fixture(scope="module")
def saved(client, place):
    """A saved model with its record, as a finished run leaves it, and what it answers."""
    folder = place / "saved"
    client.run(
        BUILD + REMEMBER + "model.save_pretrained(given['folder'])\n"
        "from hf_mrpf.hub import short_card\nshort_card(model).save(given['folder'] + '/README.md')",
        folder=str(folder),
        expected=str(place / "saved.st"),
    )
    for name in RECORD:
        (folder / name).write_text(json.dumps({"file": name}))
    (folder / "stages").mkdir()
    for name in ("run.json", "training_args.bin", "optimizer.pt", "stages/model.safetensors", ".env"):
        (folder / name).write_text("not to be sent")
    return folder


@pytest.fixture(scope="module")
def published(client, server, saved):
    """The id of the saved model on the Hub."""
    assert client.recipe("push", str(saved), "alice/published", token=ALICE) == 0, client.stderr
    return "alice/published"


@pytest.fixture(scope="module")
def sharded(client, place):
    folder = place / "sharded"
    client.run(BUILD + "model.save_pretrained(given['folder'], max_shard_size='20KB')", folder=str(folder))
    return folder


def digest(folder: Path) -> dict:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ---- Publish --------------------------------------------------------------------------------------------------------

TRAIN = """
from datasets import ClassLabel, Dataset, Features, Image
import numpy as np, PIL.Image
from hf_mrpf import MRPFConfig, MRPFTrainer
BUILD
def images(count, seed):
    draw = np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"])})
    rows = {"image": [PIL.Image.fromarray(pixels) for pixels in draw], "label": [i % 3 for i in range(count)]}
    return Dataset.from_dict(rows, features=features)
args = MRPFConfig(
    given["folder"], push_to_hub=True, hub_model_id=given["repo_id"], hub_token=given["hub_token"],
    hub_private_repo=True, num_train_epochs=1, num_steps=1, eval_num_steps=1, save_strategy="epoch",
    eval_strategy="epoch", per_device_train_batch_size=16, calibration_sets=1, calibration_set_size=16, target=0.6,
    use_cpu=True, report_to="none", disable_tqdm=True, recalibration_samples=16, hub_strategy="all_checkpoints",
)
trainer = MRPFTrainer(model, args, train_dataset=images(32, 0), eval_dataset=images(9, 1))
trainer.prune()
trainer.train()
""".replace("BUILD", BUILD)


def test_the_trainer_sends_exactly_the_result_in_one_commit_and_it_loads_bit_equal(client, hub, place):
    folder, expected = place / "trainer", str(place / "trained.st")
    client.run(
        TRAIN + "commit = trainer.push_to_hub()\nmodel = trainer.model\n" + REMEMBER,
        repo_id="lab/trained",
        hub_token=ALICE,
        folder=str(folder),
        expected=expected,
    )
    repository = hub.repositories["lab/trained"]
    assert repository.private
    assert repository.messages == ["initial commit", "End of training"]
    files = hub.files("lab/trained")
    assert set(files) == FILES | RECORD
    assert_public(files, ALICE, ALICE[3:], str(place))
    assert not [path for path in folder.rglob("*") if path.is_file() and ALICE.encode() in path.read_bytes()]

    card = files["README.md"].decode()
    report = json.loads(files["robustness_report.json"])
    assert report["num_samples"] == 9
    assert 'from_pretrained("lab/trained")' in card and "split `validation`" in card
    assert f"value: {report['attacks']['pgd20']}" in card
    assert "generated from the" not in card and "transformers.Trainer" not in card
    assert json.loads(files["pruning_plan.json"])["target"] == 0.6
    assert files["mrs.png"].startswith(b"\x89PNG")

    loaded = "model = AutoModelForImageClassification.from_pretrained(given['repo_id'])\n" + COMPARE
    given = {"repo_id": "lab/trained", "expected": expected, "token": ALICE}
    assert client.run("import hf_mrpf\n" + loaded, **given)
    assert client.run(loaded.replace("'])", "'], trust_remote_code=True)"), hidden=True, **given)


def test_a_trainer_with_a_bad_token_fails_before_training(client, hub, place):
    message = refused(client, TRAIN, repo_id="alice/never", hub_token="hf_wrong", folder=str(place / "never"))
    assert "alice/never" in message and "does not accept this token" in message
    assert "alice/never" not in hub.repositories


@pytest.mark.slow
def test_a_second_round_replaces_the_record_of_the_first(client, hub, place):
    code = TRAIN + (
        "trainer.args.target = 0.8\nsecond = trainer.prune()\nfirst = trainer.plans[0]\n"
        "future = trainer.push_to_hub(blocking=False, private=False, revision='rounds')\nfuture.result()\n"
        "answer = [first.to_dict(), second.to_dict()]"
    )
    first, second = client.run(code, repo_id="alice/rounds", hub_token=ALICE, folder=str(place / "rounds"))
    files = hub.files("alice/rounds", "rounds")
    plan = json.loads(files["pruning_plan.json"])
    assert plan["rounds"] == [first, second]
    for unit, kept in plan["kept"].items():
        assert kept == [first["kept"][unit][index] for index in second["kept"][unit]]
        assert len(kept) == second["units"][0]["width"] or len(kept) <= len(first["kept"][unit])
    assert "2 rounds" in files["README.md"].decode()
    assert set(hub.files("alice/rounds")) == set()


def test_a_bare_model_sends_what_makes_it_load_and_run(client, hub):
    code = BUILD + "answer = model.push_to_hub('bare', tags=['mine']).commit_url"
    assert client.run(code, token=ALICE).startswith(f"{hub.url}/alice/bare/commit/")
    files = hub.files("alice/bare")
    assert set(files) == FILES
    card = files["README.md"].decode()
    assert "claims neither accuracy nor robustness" in card and 'from_pretrained("alice/bare")' in card
    assert "- mine\n" in card and "model-index" not in card


def test_saving_can_push_too(client, hub, place):
    code = BUILD + "model.save_pretrained(given['folder'], push_to_hub=True, private=True, token=given['hub_token'])"
    client.run(code, folder=str(place / "both"), hub_token=ALICE)
    assert hub.repositories["alice/both"].private
    assert set(hub.files("alice/both")) == FILES == {path.name for path in (place / "both").iterdir()} | {"README.md"}
    assert b"claims neither accuracy" in hub.files("alice/both")["README.md"]


def test_what_is_saved_and_pushed_at_once_is_pushed_as_it_is_saved(client, hub, place):
    code = BUILD + "model.save_pretrained(given['folder'], push_to_hub=True, tags=['mine'], max_shard_size='20KB')"
    client.run(code, token=ALICE, folder=str(place / "shards"))
    pushed = {name for name in hub.files("alice/shards") if name.endswith(".safetensors")}
    assert len(pushed) > 1 and pushed == {path.name for path in (place / "shards").glob("*.safetensors")}
    assert b"- mine\n" in hub.files("alice/shards")["README.md"]
    code = BUILD + "model.save_pretrained(given['folder'], push_to_hub=True, create_pr=True)"
    assert "create_pr: a push here is one commit" in refused(client, code, token=ALICE, folder=str(place / "asked"))


def test_a_bare_push_keeps_a_card_without_figures_and_drops_figures_of_other_weights(client, hub):
    words = b"---\nlicense: mit\n---\n# My own words\n"
    hub.put("alice/worded", {"README.md": words, "notes.txt": b"mine"})
    client.run(BUILD + "model.push_to_hub('alice/worded')", token=ALICE)
    assert b"My own words" in hub.files("alice/worded")["README.md"]
    record = dict.fromkeys(RECORD, b"of other weights")
    hub.put("alice/worded", {"README.md": FIGURES, "notes.txt": b"mine"} | record)
    client.run(BUILD + "model.push_to_hub('alice/worded')", token=ALICE)
    files = hub.files("alice/worded")
    assert set(files) == FILES | {"notes.txt"}
    assert b"model-index" not in files["README.md"]
    pruned = b"---\nlicense: mit\n---\n# old\n\n## How it was pruned\n\nTo half of it.\n"
    hub.put("alice/worded", {"README.md": pruned} | {name: b"" for name in RECORD if name != "README.md"})
    client.run(BUILD + "model.push_to_hub('alice/worded')", token=ALICE)
    assert set(hub.files("alice/worded")) == FILES and b"To half" not in hub.files("alice/worded")["README.md"]


def test_push_sends_the_result_and_nothing_else_of_a_run_folder(client, hub, saved, published):
    files = hub.files(published)
    assert set(files) == FILES | RECORD
    card = files.pop("README.md")
    assert b'from_pretrained("alice/published")' in card
    assert b'from_pretrained("FOLDER_OR_HUB_ID")' in (saved / "README.md").read_bytes()
    assert files == {name: (saved / name).read_bytes() for name in files}
    assert client.recipe("push", str(saved), published, token=ALICE) == 0
    assert len(hub.repositories[published].messages) == 2  # nothing has changed, so there is no second commit


def test_shards_of_an_older_push_go_and_files_of_others_stay(client, hub, sharded):
    assert client.recipe("push", str(sharded), "alice/shards", token=ALICE) == 0, client.stderr
    names = set(hub.files("alice/shards"))
    shards = {name for name in names if name.startswith("model-")}
    assert len(shards) > 1
    assert names == shards | (FILES - {"README.md", "model.safetensors"}) | {"model.safetensors.index.json"}
    hub.put("alice/shards", hub.files("alice/shards") | {"LICENSE": b"mine"})
    client.run(BUILD + "model.push_to_hub('alice/shards')", token=ALICE)
    assert set(hub.files("alice/shards")) == FILES | {"LICENSE"}


def test_private_repositories_branches_and_organisations(client, hub, saved):
    push = ["push", str(saved)]
    assert client.recipe(*push, "lab/secret", "--private", "--revision", "v2", "--token", ALICE) == 0, client.stderr
    assert hub.repositories["lab/secret"].private
    assert hub.files("lab/secret") == {} and set(hub.files("lab/secret", "v2")) == FILES | RECORD
    hub.put("alice/public", {})
    assert client.recipe(*push, "alice/public", "--private", token=ALICE) == 2
    assert "alice/public exists and is public" in client.stderr
    assert hub.files("alice/public") == {}


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        (None, "alice/x", "there is no token. Log in with `hf auth login`"),
        ("hf_wrong", "alice/x", "the Hub does not accept this token"),
        (ALICE, "firm/x", "this token may not write to firm/x"),
        (ALICE, "bob/theirs", "belongs to somebody else. This token writes under alice, lab"),
        (ALICE, "bob/hidden", "this token may not write to bob/hidden"),
        (ALICE, "alice/no such name!", "alice/no such name!"),
    ],
)
def test_a_push_that_may_not_be_is_one_message_and_changes_nothing(client, hub, saved, token, repo_id, message):
    hub.repositories.setdefault("bob/theirs", hub.new_repository(False))
    hub.repositories.setdefault("bob/hidden", hub.new_repository(True))
    before, repositories = digest(saved), {name: list(r.messages) for name, r in hub.repositories.items()}
    assert client.recipe("push", str(saved), repo_id, token=token) == 2
    assert message in client.stderr
    assert client.stderr.count("error: ") == 1 and "Traceback" not in client.stderr
    assert digest(saved) == before
    assert {name: r.messages for name, r in hub.repositories.items()} == repositories


def test_hub_is_told_to_be_offline(client, saved):
    code = (
        "import huggingface_hub.constants as constants\nconstants.HF_HUB_OFFLINE = True\n"
        "from hf_mrpf import push_folder\npush_folder(given['folder'], 'alice/offline')"
    )
    assert "HF_HUB_OFFLINE" in refused(client, code, token=ALICE, folder=str(saved))


@pytest.mark.parametrize(
    ("request_", "how"),
    [("PUT /lfs/", "drop"), ("POST /api/models/alice/.*/commit", "drop"), ("POST .*preupload", "500")],
)
def test_an_upload_that_ends_leaves_the_result_whole_and_a_second_one_completes_it(
    client, hub, saved, request_, how, request
):
    repo_id = f"alice/dropped-{abs(hash(request.node.name)) % 10**6}"
    folder, before = str(saved), digest(saved)
    # Other weights than any the server has seen, or it would not ask for them.
    hub.fail(request_, times=99, how=how)
    for oid in {hashlib.sha256((saved / "model.safetensors").read_bytes()).hexdigest()}:
        (hub.folder / oid).unlink(missing_ok=True)
    assert client.recipe("push", folder, repo_id, "--private", token=ALICE) == 2
    again = f"python recipes/push.py {folder} {repo_id} --private"
    assert f"is whole. Push it again with: {again}" in client.stderr
    assert client.stderr.count("error: ") == 1 and "Traceback" not in client.stderr
    assert digest(saved) == before
    assert hub.files(repo_id) == {}
    hub.heal()
    assert client.recipe("push", *again.split()[2:], token=ALICE) == 0, client.stderr
    assert set(hub.files(repo_id)) == FILES | RECORD


def test_a_lost_answer_and_a_short_outage_change_nothing(client, hub, saved):
    hub.fail("POST /api/models/alice/lost/commit", how="hang up")
    assert client.recipe("push", str(saved), "alice/lost", token=ALICE) == 2
    assert "the connection ended" in client.stderr
    assert set(hub.files("alice/lost")) == FILES | RECORD
    assert client.recipe("push", str(saved), "alice/lost", token=ALICE) == 0
    assert hub.repositories["alice/lost"].messages == ["initial commit", "Upload model"]
    hub.fail("preupload", times=3, how="503")
    assert client.recipe("push", str(saved), "alice/outage", token=ALICE) == 0, client.stderr


def test_a_bare_push_that_ends_says_how_to_make_it_again_as_private_as_it_was(client, hub):
    hub.fail("POST /api/repos/create", times=99)
    code = BUILD + "model.push_to_hub('alice/once-more', private=True, revision='v3')"
    message = refused(client, code, token=ALICE)
    again = "model.push_to_hub('alice/once-more', private=True, revision='v3')"
    assert message.endswith(f"Nothing is lost: push it again with {again}")
    hub.heal()
    client.run(BUILD + again, token=ALICE)
    assert hub.repositories["alice/once-more"].private and set(hub.files("alice/once-more", "v3")) == FILES


def test_an_interrupted_push_says_how_to_go_on(client, hub, saved):
    code = (
        "import signal, hf_mrpf.hub as hub\nfrom hf_mrpf.interruption import Interrupted\n"
        "def stop(*arguments, **options):\n    raise eval(given['end'])\n"
        "hub.HfApi.create_commit = stop\nhub.push_folder(given['folder'], 'alice/stopped')"
    )
    for end in ("KeyboardInterrupt()", "Interrupted(signal.SIGTERM)"):  # of a user's script, and of a recipe
        with pytest.raises(Failed) as failed:
            client.run(code, token=ALICE, folder=str(saved), end=end)
        assert failed.value.kinds[0] == end.split("(")[0]
        assert re.search(r"interrupted.*Push it again with: python recipes/push\.py", failed.value.trace)


@pytest.mark.parametrize("lacking", ["model.safetensors", "config.json", "modeling.py", "preprocessor_config.json"])
def test_a_folder_without_a_result_is_not_sent(client, hub, saved, tmp_path, lacking):
    for name in FILES - {lacking}:
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    before = len(hub.requests)
    code = "from hf_mrpf import push_folder\npush_folder(given['folder'], 'alice/partial')"
    assert f"lacks {lacking}" in refused(client, code, token=ALICE, folder=str(tmp_path))
    assert len(hub.requests) == before


def test_an_index_that_points_out_of_the_folder_is_not_followed(client, saved, tmp_path):
    for name in FILES - {"model.safetensors"}:
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    code = "from hf_mrpf.hub import result_files\nresult_files(given['folder'])"
    for index in ({"weight_map": {"a": "../secret.safetensors"}}, {"weight_map": {"a": "optimizer.pt"}}, {}, []):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        assert "model.safetensors.index.json" in refused(client, code, folder=str(tmp_path))


# ---- Load -----------------------------------------------------------------------------------------------------------

AUTO = "model = AutoModelForImageClassification.from_pretrained(given['source'], **given.get('options', {}))\n"
PIPELINE = "model = pipeline('image-classification', model=given['source'], **given.get('options', {})).model\n"
REMOTE = {"trust_remote_code": True}


@pytest.mark.parametrize("load", [AUTO, PIPELINE], ids=["auto", "pipeline"])
@pytest.mark.parametrize("where", ["hub", "folder"])
@pytest.mark.parametrize("installed", [True, False])
def test_logits_are_bit_equal_in_a_fresh_process(client, place, saved, published, load, where, installed):
    given = {"source": published if where == "hub" else str(saved), "expected": str(place / "saved.st")}
    if installed:
        check = "import hf_mrpf\n" + load + "assert type(model) is hf_mrpf.PrunedForImageClassification\n" + COMPARE
        assert client.run(check, **given)
    else:
        assert client.run(load + COMPARE, hidden=True, options=REMOTE, **given)


def test_without_the_package_loading_asks_for_trust_or_the_package(client, published):
    assert "trust_remote_code" in refused(client, AUTO, hidden=True, source=published)


def test_the_pipeline_classifies_an_image(client, published):
    code = (
        "import hf_mrpf, PIL.Image\nclassify = pipeline('image-classification', model=given['source'])\n"
        "answer = classify(PIL.Image.new('RGB', (40, 30)))"
    )
    assert {entry["label"] for entry in client.run(code, source=published)} == {"a", "b", "c"}


def test_a_model_loaded_with_its_own_code_can_be_saved_pushed_and_loaded_again(client, hub, published, place):
    code = AUTO + "model.save_pretrained(given['folder'])\nmodel.push_to_hub('alice/travelled')"
    folder = str(place / "travelled")
    client.run(code, hidden=True, token=ALICE, source=published, options=REMOTE, folder=folder)
    assert set(hub.files("alice/travelled")) == FILES
    for source in (folder, "alice/travelled"):
        given = {"source": source, "options": REMOTE, "expected": str(place / "saved.st")}
        assert client.run(AUTO + COMPARE, hidden=True, **given)


def test_a_pinned_revision_stays_what_it_was(client, hub, place, saved):
    client.run(BUILD + "model.push_to_hub('pinned')", token=ALICE)
    old = hub.repositories["alice/pinned"].refs["main"]
    client.run(BUILD + "model.push_to_hub('pinned')", token=ALICE, seed=1)
    given = {"source": "alice/pinned", "expected": str(place / "saved.st")}
    assert client.run("import hf_mrpf\n" + PIPELINE + COMPARE, options={"revision": old}, **given)
    assert client.run(AUTO + COMPARE, hidden=True, options=REMOTE | {"revision": old}, **given)
    assert not client.run("import hf_mrpf\n" + AUTO + COMPARE, **given)
    message = refused(client, "import hf_mrpf\n" + AUTO, options={"revision": "no-such"}, **given)
    assert "no-such" in message


@pytest.mark.slow
def test_offline_from_the_cache_in_a_cold_process_without_the_package(client, place, published):
    client.run("import hf_mrpf\n" + PIPELINE, source=published)
    client.run(PIPELINE, source=published, hidden=True, options=REMOTE)
    given = {"source": published, "expected": str(place / "saved.st"), "options": REMOTE}
    script = (
        "import sys, torch\nfrom transformers import AutoModelForImageClassification, pipeline\n"
        "class Hidden:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'hf_mrpf':\n            raise ModuleNotFoundError(name)\n"
        f"sys.meta_path.insert(0, Hidden())\ngiven = {given!r}\n"
        + "".join(load + COMPARE + "assert answer\n" for load in (AUTO, PIPELINE))
        + f"sys.meta_path.pop(0)\nsys.path.insert(0, {str(REPOSITORY)!r})\nimport hf_mrpf\ngiven['options'] = {{}}\n"
        + "".join(load + COMPARE + "assert answer\n" for load in (AUTO, PIPELINE))
        + "print(type(model))"
    )
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment,
        cwd=place,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "hf_mrpf.modeling.PrunedForImageClassification" in result.stdout


def test_offline_from_the_cache(client, hub, place, published):
    offline = "import huggingface_hub.constants as constants\nconstants.HF_HUB_OFFLINE = True\n"
    given = {"source": published, "expected": str(place / "saved.st")}
    for load in (AUTO, PIPELINE):
        client.run("import hf_mrpf\n" + load, **given)
        client.run(load, hidden=True, options=REMOTE, **given)
        before = len(hub.requests)
        assert client.run(offline + "import hf_mrpf\n" + load + COMPARE, **given)
        assert client.run(offline + load + COMPARE, hidden=True, options=REMOTE, **given)
        assert len(hub.requests) == before


@pytest.mark.parametrize("token", [None, "hf_wrong", BOB])
def test_a_private_model_needs_its_owners_token(client, hub, saved, place, token):
    # One repository for each: what one process has loaded, the others find in the cache.
    repo_id = f"alice/private-{(token or 'none')[:5]}"
    hub.put(repo_id, {name: (saved / name).read_bytes() for name in FILES}, private=True)
    message = refused(client, "import hf_mrpf\n" + AUTO, source=repo_id, token=token)
    assert repo_id in message
    given = {"source": repo_id, "expected": str(place / "saved.st")}
    assert client.run("import hf_mrpf\n" + AUTO + COMPARE, token=ALICE, **given)


@pytest.mark.parametrize("lacking", ["model.safetensors", "config.json", "modeling.py", "preprocessor_config.json"])
def test_a_repository_that_lacks_a_file_is_one_message(client, hub, saved, lacking):
    repo_id = f"alice/lacks-{lacking.split('.')[0]}"
    hub.put(repo_id, {name: (saved / name).read_bytes() for name in FILES - {lacking}})
    needs_code = lacking == "modeling.py"
    code = PIPELINE if lacking == "preprocessor_config.json" else AUTO
    message = refused(
        client,
        code if needs_code else "import hf_mrpf\n" + code,
        hidden=needs_code,
        source=repo_id,
        options=REMOTE if needs_code else {},
    )
    assert repo_id in message and lacking in message
    assert not [request for request in hub.requests if "convert" in request or "discussions" in request]


def test_an_index_with_a_shard_that_is_not_there(client, hub, sharded):
    files = {path.name: path.read_bytes() for path in sharded.iterdir() if path.is_file()}
    gone = sorted(name for name in files if name.startswith("model-"))[0]
    del files[gone]
    hub.put("alice/lacks-a-shard", files)
    assert gone in refused(client, "import hf_mrpf\n" + AUTO, source="alice/lacks-a-shard")


@pytest.mark.slow
def test_a_connection_that_ends_during_the_download(client, hub, saved):
    hub.put("alice/flaky", {name: (saved / name).read_bytes() for name in FILES} | {"x": b"1"})
    hub.fail("GET /alice/flaky/resolve/.*/config.json", times=99)
    assert "alice/flaky" in refused(client, "import hf_mrpf\n" + AUTO, source="alice/flaky")


# ---- Recipes --------------------------------------------------------------------------------------------------------


def test_evaluate_measures_an_id_as_it_measures_the_folder(client, hub, place):
    folder, output = str(place / "digits"), place / "measured.json"
    client.run(
        "import hf_mrpf\ntorch.manual_seed(0)\n"
        "model = hf_mrpf.PrunedForImageClassification.from_backbone(\n"
        "    'timm/resnet18', image_size=16, small_images=True, id2label={i: str(i) for i in range(10)},\n"
        "    layers=[1, 1, 1, 1], channels=[8, 8, 8, 8], stem_width=4, stem_type='deep')\n"
        "model.save_pretrained(given['folder'])\nmodel.push_to_hub('alice/digits')",
        token=ALICE,
        folder=folder,
    )
    options = ["--dataset_name", "digits", "--num_samples", "20", "--eps", "51/255", "--attacks", "clean", "pgd20"]
    assert client.recipe("evaluate", "alice/digits", *options, "--output", str(output)) == 0, client.stderr
    assert "alice/digits on digits, split test: clean" in client.stdout
    assert "upper bound" in client.stdout and "near the 10.0% of guessing" in client.stdout
    report = json.loads(output.read_text())
    assert (report["num_samples"], report["eps"], report["data_name"]) == (20, 0.2, "digits")
    assert client.recipe("evaluate", folder, *options, "--output", str(output)) == 0, client.stderr
    assert json.loads(output.read_text())["verdicts"] == report["verdicts"]


def test_evaluate_refuses_in_one_message(client, hub, saved, published, place):
    other = str(place / "other")
    client.run(BUILD + "hf_mrpf.with_new_head(model, {0: 'a', 1: 'b'}).save_pretrained(given['folder'])", folder=other)
    hub.put("alice/unreachable", {name: (saved / name).read_bytes() for name in FILES})
    hub.fail("HEAD /alice/unreachable", times=99)
    for arguments, message in (
        (["alice/unreachable"], "alice/unreachable could not be fetched: the connection to the Hub ended"),
        (["alice/no-such"], "alice/no-such"),
        ([published, "--dataset_name", "digits"], "has 3 classes and digits 10"),
        ([published, "--norm", "l2"], "was not measured in this norm; give --eps, such as 0.5 at 32 pixels"),
        ([published, "--output", "/no/such/file.json"], "there is no such folder"),
        ([published, "--output", str(saved)], "is a folder; name a file in it"),
        ([published, "--device", "xpu"], "--device xpu: there is none here; give "),
        ([published, "--dataset_name", "digits", "--parent", "alice/no-such"], "alice/no-such"),
        ([published, "--parent", other], "has 2 classes, the model 16 pixels and 3 classes: give the dense model"),
    ):
        assert client.recipe("evaluate", *arguments) == 2
        assert message in client.stderr and client.stderr.count("error: ") == 1
        assert "clean" not in client.stdout  # nothing was measured that is lost now


PRUNE = [
    *("--max_train_samples", "96", "--max_eval_samples", "20", "--base_epochs", "1", "--num_train_epochs", "1"),
    *("--control_epochs", "0", "--num_steps", "1", "--calibration_sets", "1", "--calibration_set_size", "16"),
    *("--eval_num_steps", "1", "--eps", "51/255", "--use_cpu", "--disable_tqdm", "true", "--push_to_hub"),
]


@pytest.mark.slow
def test_prune_pushes_at_the_end_and_the_same_command_completes_a_push_that_failed(client, hub, place):
    folder = place / "outputs" / "pruned"
    command = [*PRUNE, "--output_dir", str(folder), "--hub_model_id", "lab/pruned", "--hub_to", ALICE]
    before = hub.requests.count("POST /api/repos/create")
    hub.fail("PUT /lfs/", times=99)
    assert client.recipe("prune", *command) == 2
    errors = [line for line in client.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert f"{folder} is whole. Push it again with: python recipes/push.py {folder} lab/pruned" in errors[0]
    assert hub.files("lab/pruned") == {}
    assert hub.requests.count("POST /api/repos/create") == before + 2  # before any training, and to push
    before = digest(folder)
    hub.heal()
    assert client.recipe("prune", *command) == 0, client.stderr
    assert "is finished with these settings" in client.stdout and "pushed to" in client.stdout
    assert digest(folder) == before

    # The trainers of the stages have made no commit and no repository.
    assert hub.repositories["lab/pruned"].messages == ["initial commit", "Upload model"]
    assert not [name for name in hub.repositories if "training" in name]
    files = hub.files("lab/pruned")
    assert set(files) == FILES | RECORD
    local = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name, content in (files | local).items():
        assert ALICE.encode() not in content and ALICE[3:].encode() not in content, name
    assert_public(files, str(place))
    card = files["README.md"].decode()
    assert 'from_pretrained("lab/pruned")' in card and "--hub_to ***" in card

    # A private repository and a branch of it, by the same finished run.
    command += ["--hub_model_id", "lab/hidden", "--hub_private_repo", "true", "--hub_revision", "v2"]
    assert client.recipe("prune", *command) == 0, client.stderr
    assert hub.repositories["lab/hidden"].private and hub.files("lab/hidden") == {}
    assert set(hub.files("lab/hidden", "v2")) == FILES | RECORD

    options = ["--dataset_name", "digits", "--max_eval_samples", "20", "--output", str(place / "again.json")]
    assert client.recipe("evaluate", "lab/pruned", *options) == 0, client.stderr
    there, here = json.loads(files["robustness_report.json"]), json.loads((place / "again.json").read_text())
    assert {name: here[name] for name in ("verdicts", "eps", "images")} == {
        name: there[name] for name in ("verdicts", "eps", "images")
    }


@pytest.mark.slow
def test_prune_with_a_name_of_somebody_else_fails_before_any_training(client, hub, place):
    folder = place / "outputs" / "theirs"
    assert client.recipe("prune", *PRUNE, "--output_dir", str(folder), "--hub_model_id", "firm/x", token=ALICE) == 2
    assert "this token may not write to firm/x" in client.stderr
    assert not folder.exists()
