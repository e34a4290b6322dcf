"""A checkpoint from a stranger: whatever its config says, it loads as it was or is refused in one message."""

import copy
import json
import resource
import shutil
import sys
import time
from contextlib import nullcontext

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_modeling import NARROW, TINY_RESNET, from_backbone, shrink_block, shrink_heads
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForImageClassification, ResNetConfig

TRANSFORMERS = ("trust_remote_code", "model_type", "model type")
EVENTS: list[str] = []
WATCHED = {"socket.connect", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class"}
watching = False


def _watch(event, arguments):
    if watching and event in WATCHED:
        EVENTS.append(f"{event} {arguments!r}")


sys.addaudithook(_watch)


def _models():
    narrow = from_backbone("resnet18", num_labels=3, image_size=16, small_images=True, **NARROW)
    shrink_block(narrow.backbone.layer2[0], 20)
    vit = from_backbone("vit_tiny_patch16_224", num_labels=3, image_size=32, depth=1, embed_dim=24)
    shrink_heads(vit.backbone.blocks[0].attn, 5)
    resnet = from_backbone(ResNetConfig(**TINY_RESNET), num_labels=3, image_size=16, small_images=True)
    return {"narrow": narrow.eval(), "vit": vit.eval(), "transformers": resnet.eval()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for name, model in _models().items():
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        images = torch.rand(1, 3, model.config.image_size, model.config.image_size)
        with torch.no_grad():
            found[name] = (folder, json.loads((folder / "config.json").read_text()), images, model(images).logits)
    return found


class Allocated(TorchDispatchMode):
    """Counts the bytes of every tensor with memory of its own; none of them is counted on the meta device."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        output = function(*arguments, **(options or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors_in((arguments, options))}
        for tensor in tensors_in(output):
            if tensor.untyped_storage().data_ptr() not in given:
                self.bytes += tensor.untyped_storage().nbytes()
        return output


def tensors_in(value):
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor) and not leaf.is_meta]


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def attempt(folder, config, counted=True):
    """Load with this config: what it raised, or the model; never slow, large, or with effects."""
    global watching
    (folder / "config.json").write_text(json.dumps(config))
    EVENTS.clear()
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    allocated, watching = Allocated(), True
    try:
        with allocated if counted else nullcontext():
            outcome = AutoModelForImageClassification.from_pretrained(folder)
    except (ValueError, OSError) as error:
        outcome = error
    finally:
        watching = False
    # The copies of the weights, and the pages of the file beneath them.
    assert allocated.bytes <= 2 * (folder / "model.safetensors").stat().st_size + 2**16, allocated.bytes
    assert not EVENTS
    assert time.process_time() - start < 20
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 300_000  # kilobytes
    return outcome


HOSTILE = st.sampled_from(
    [
        *(0, -1, 1, 2, 0.5, 17, 10**4, 10**6, 10**9, 10**30, 1e308, True, None, "", "forward", "__class__", [], {}),
        *(
            "http://127.0.0.1:9/x",
            "../../secret",
            "/etc/passwd",
            "hf_hub:user/model",
            "local-dir:/tmp",
            "timm/resnet18",
        ),
        *([10**9], [10**5] * 4, {"shapes": {}, "attrs": {}}, [[[[]]]], {"__class__": 1}, "os.system", "vgg16"),
    ]
)
KEYS = st.sampled_from(
    [
        *("forward", "__class__", "weight", "pretrained", "checkpoint_path", "cache_dir", "depth", "layers", "kwargs"),
        *("quantization_config", "auto_map", "architectures", "dtype", "transformers_weights", "_name_or_path", "url"),
        *("num_labels", "backbone.fc.weight", "backbone.conv1", "out_channels", "attn_implementation", "eval", "seed"),
    ]
)


@st.composite
def changes(draw):
    """One to three changes: replace, delete or add a value at a place drawn by a number."""
    one = st.tuples(st.sampled_from(["replace", "delete", "add"]), st.integers(0, 10**6), KEYS, HOSTILE)
    return draw(st.lists(one, min_size=1, max_size=3))


def changed(config, steps):
    config = copy.deepcopy(config)
    for kind, number, key, value in steps:
        known = list(places(config))
        path = known[number % len(known)]
        if not path:
            continue
        holder = config
        for part in path[:-1]:
            holder = holder[part]
        if kind == "replace":
            holder[path[-1]] = copy.deepcopy(value)
        elif kind == "delete":
            del holder[path[-1]]
        elif isinstance(holder[path[-1]], dict):
            holder[path[-1]][key] = copy.deepcopy(value)
        else:
            config[key] = value
    return config


def check(folders, name, steps):
    folder, honest, images, logits = folders[name]
    config = changed(honest, steps)
    # AutoConfig itself reads these keys, before any class is known.
    code = config.get("auto_map", {})
    assume(isinstance(config.get("model_type", ""), str))
    assume(isinstance(code, dict) and all(isinstance(value, str) for value in code.values()))
    try:
        outcome = attempt(folder, config)
        if isinstance(outcome, Exception):
            # Where model_type is another, transformers decides: it knows that type, or asks for trust in the code.
            assert any(word in str(outcome) for word in ("config.json", "model.safetensors", *TRANSFORMERS)), outcome
        else:
            size = outcome.config.image_size
            assert outcome.state_dict().keys() == load_file(folder / "model.safetensors").keys()
            if size == images.shape[-1] and config.get("dtype") == honest.get("dtype"):
                with torch.no_grad():
                    assert outcome(images).logits.shape == logits.shape
    finally:
        (folder / "config.json").write_text(json.dumps(honest))


NAMES = st.sampled_from(["narrow", "vit", "transformers"])
QUIET = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


@given(name=NAMES, steps=changes())
@settings(max_examples=30, derandomize=True, **QUIET)
def test_mutated_configs_load_or_are_refused_in_one_message(folders, name, steps):
    check(folders, name, steps)


@pytest.mark.slow
@given(name=NAMES, steps=changes())
@settings(max_examples=50, **QUIET)
def test_many_mutated_configs(folders, name, steps):
    check(folders, name, steps)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("narrow", {"layers": [10**9, 1, 1, 1]}, r"backbone\['kwargs'\]\['layers'\]\[0\] is 1000000000"),
        pytest.param("narrow", {"layers": [2**18, 1, 1, 1]}, "more than 10000 modules", marks=pytest.mark.slow),
        pytest.param("vit", {"depth": 2**18}, "more than 10000 modules", marks=pytest.mark.slow),
        ("narrow", {"channels": [16, 32, 64, 10**5]}, r"config\.json says \(3, 100000\)"),
        ("vit", {"embed_dim": 10**5}, "config.json"),
        ("narrow", {"act_layer": "http://127.0.0.1:9/x"}, "has no paths or addresses"),
    ],
)
def test_huge_and_deep_backbones_are_refused_before_they_cost_anything(folders, name, change, message):
    folder, honest, _, _ = folders[name]
    config = copy.deepcopy(honest)
    config["backbone"]["kwargs"] |= change
    start = time.process_time()
    with pytest.raises(ValueError, match=message):
        raise attempt(folder, config, counted="modules" not in message)  # counting so many would take long
    (folder / "config.json").write_text(json.dumps(honest))
    assert time.process_time() - start < 15


def test_a_network_of_too_many_modules_is_not_built_to_its_end(folders, monkeypatch):
    folder, honest, _, _ = folders["narrow"]
    config = copy.deepcopy(honest)
    config["backbone"]["kwargs"] |= {"layers": [40, 1, 1, 1]}
    monkeypatch.setattr("hf_mrpf.modeling._MOST_MODULES", 100)
    with pytest.raises(ValueError, match="more than 100 modules"):
        raise attempt(folder, config, counted=False)
    (folder / "config.json").write_text(json.dumps(honest))


@pytest.mark.parametrize("value", [10**9, 8193])
def test_a_huge_image_size_is_refused(folders, value):
    folder, honest, _, _ = folders["narrow"]
    with pytest.raises(ValueError, match=r"config\.json: image_size is .* more than 8192 pixels"):
        raise attempt(folder, honest | {"image_size": value})
    (folder / "config.json").write_text(json.dumps(honest))


@pytest.mark.parametrize("value", [10**9, 10**6, 0, -1, 2.5, True, "8"])
def test_a_number_of_labels_that_cannot_be_is_refused_before_they_are_named(folders, value):
    folder, honest, _, _ = folders["narrow"]
    with pytest.raises(ValueError, match=r"config\.json: num_labels must be a positive integer up to 65536"):
        raise attempt(folder, honest | {"num_labels": value})
    (folder / "config.json").write_text(json.dumps(honest))


@pytest.mark.parametrize(
    "name", ["http://127.0.0.1:9/x", "hf_hub:user/model", "../secret", "/etc/passwd", "local-dir:x", "user/model"]
)
def test_a_backbone_that_is_an_address_or_a_path_is_refused(folders, name):
    folder, honest, _, _ = folders["narrow"]
    config = copy.deepcopy(honest)
    config["backbone"]["name"] = name
    with pytest.raises(ValueError, match=r"config\.json: backbone\['name'\] is .* no paths or addresses"):
        raise attempt(folder, config)
    (folder / "config.json").write_text(json.dumps(honest))


CONV, QKV, ATTENTION = "backbone.layer1.0.conv1.weight", "backbone.blocks.0.attn.qkv.weight", "backbone.blocks.0.attn"
CONVOLUTION = "backbone.layer2.0.conv1"


def shape(name, tensor, value):
    return name, ("pruning", "shapes", tensor), value


def size(name, module, attribute, value):
    return name, ("pruning", "attrs", module, attribute), value


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        shape("narrow", "backbone.no_such", [1]),
        shape("narrow", "image_mean", [1]),
        shape("narrow", "__class__", [1]),
        *(
            shape("narrow", CONV, [value, 16, 3, 3])
            for value in (0, -1, 0.5, 16.0, 17, 10**12, 10**30, True, None, "8")
        ),
        shape("narrow", CONV, [16, 16, 3, 3, 1]),
        shape("vit", QKV, [10**9, 24]),
        shape("transformers", "backbone.classifier.1.weight", [3, 0]),
        *(size("narrow", CONVOLUTION, "out_channels", value) for value in (0, -20, 20.0, 10**12, 1e308, "20", [20])),
        *(
            size("narrow", CONVOLUTION, attribute, 1)
            for attribute in ("forward", "__class__", "weight", "training", "_parameters", "stride", "__init__")
        ),
        size("narrow", "backbone.no_such", "dim", 1),
        size("narrow", "__class__", "dim", 1),
        *(
            size("vit", ATTENTION, "scale", value)
            for value in (float("nan"), float("inf"), float("-inf"), -0.4, 0.0, 1e308, 10**400, 0.9, "0.4")
        ),
        *(size("vit", ATTENTION, "head_dim", value) for value in (0, -5, 5.0, 9, 10**12, 6)),
        *(size("vit", ATTENTION, "forward", value) for value in (1, "os.system")),
        ("narrow", ("backbone", "kwargs", "checkpoint_path"), "x.pth"),
        ("narrow", ("backbone", "kwargs", "pretrained"), True),
        ("narrow", ("backbone", "kwargs", "pretrained_cfg"), {"file": "x.pth"}),
        ("narrow", ("backbone", "kwargs", "norm_layer"), "https://127.0.0.1/x"),
        ("narrow", ("backbone", "url"), "x"),
        *(
            ("transformers", ("backbone", "config", "model_type"), value)
            for value in ("timm_wrapper", "mrpf", "../resnet", "hf-hub:user/model", "bert", "no_such")
        ),
        *(
            ("transformers", ("backbone", "config", key), value)
            for key in ("backbone", "_name_or_path", "auto_map", "architectures")
            for value in ("hf-hub:user/model", "https://127.0.0.1:9/x", "/etc/passwd", {"AutoModel": "user/repo--x.Y"})
        ),
        ("transformers", ("backbone", "source"), "hf-hub"),
    ],
)
def test_each_hostile_value_is_one_message_that_names_file_and_key(folders, name, path, value):
    folder, honest, _, _ = folders[name]
    config = copy.deepcopy(honest)
    holder = config
    for part in path[:-1]:
        holder[part] = {} if holder.get(part) is None else holder[part]
        holder = holder[part]
    holder[path[-1]] = value
    if path[0] == "pruning":
        config["pruning"] = {"shapes": {}, "attrs": {}} | config["pruning"]
    try:
        outcome = attempt(folder, config)
    finally:
        (folder / "config.json").write_text(json.dumps(honest))
    assert isinstance(outcome, ValueError), outcome
    message = str(outcome)
    assert "config.json" in message and any(str(part) in message for part in path[1:]), message


@pytest.mark.parametrize("key", ["backbone", "use_timm_backbone", "_name_or_path", "auto_map", "architectures"])
def test_keys_of_a_transformers_config_that_name_other_code_do_nothing(folders, key):
    folder, honest, images, logits = folders["transformers"]
    config = copy.deepcopy(honest)
    values = {"use_timm_backbone": True, "auto_map": {"AutoModel": "evil.Model"}, "architectures": ["Evil"]}
    config["backbone"]["config"][key] = values.get(key, "resnet50")
    config["auto_map"] = dict.fromkeys(honest["auto_map"], "evil--x.Evil")
    try:
        outcome = attempt(folder, config)
    finally:
        (folder / "config.json").write_text(json.dumps(honest))
    with torch.no_grad():
        assert torch.equal(outcome(images).logits, logits)


@given(name=NAMES, number=st.integers(0, 10**6), kind=st.sampled_from(["drop", "add", "reshape", "nan", "cast"]))
@settings(max_examples=15, derandomize=True, **QUIET)
@example(name="narrow", number=0, kind="add")
def test_mutated_weights_are_refused_by_name(folders, tmp_path_factory, name, number, kind):
    folder, _, images, logits = folders[name]
    tensors = load_file(folder / "model.safetensors")
    key = sorted(tensors)[number % len(tensors)]
    if kind == "drop":
        del tensors[key]
    elif kind == "add":
        tensors[f"{key}x"] = tensors[key].clone()
    elif kind == "reshape":
        tensors[key] = tensors[key].reshape(1, *tensors[key].shape).repeat(2, *[1] * tensors[key].ndim)
    elif kind == "nan" and tensors[key].is_floating_point():
        tensors[key] = tensors[key] * float("nan")
    elif kind == "cast":
        tensors[key] = tensors[key].to(torch.float64)
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(folder, other, dirs_exist_ok=True)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    try:
        model = AutoModelForImageClassification.from_pretrained(other)
    except ValueError as error:
        assert kind != "cast" and "model.safetensors" in str(error) and key in str(error)
    else:
        assert kind in ("cast", "nan")
        with torch.no_grad():
            assert torch.equal(model(images).logits, logits)
    shutil.rmtree(other)
