"""To the Hub: exactly the files of a result, in one commit, and what goes wrong as one message."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from .efficiency import count_macs, count_parameters
from .figures import plot_sensitivity
from .model_card import CardInfo, PlanSummary, render_card
from .modeling import PrunedForImageClassification
from .plan import PruningPlan
from .pruning import dense_size
from .report import RobustnessReport, package_versions
from .results import ResultRow
from .rounds import overall_target, round_rows, shares_left

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NEEDED = ("config.json", "preprocessor_config.json", "modeling.py")
# Begins what a card says of the weights that it came with, measured or not: of others it would be wrong.
TOLD = "\n## How it was "
RECORD = ("pruning_plan.json", "robustness_report.json", "mrs.png", "README.md")
# fmt: off
# Of a training that is on a card, besides how long it was.
SETTINGS = (
    "objective", "beta", "awp_gamma", "ema_decay", "norm", "eps", "step_size", "num_steps", "attack_dtype", "optim",
    "learning_rate", "weight_decay", "lr_scheduler_type", "per_device_train_batch_size", "gradient_accumulation_steps",
    "processes", "bf16", "crop_padding", "horizontal_flip",
)
# fmt: on
# Stands in the load snippet of a card that was rendered before anybody knew the id.
PLACEHOLDER = b"FOLDER_OR_HUB_ID"


def result_files(folder: str | Path) -> list[str]:
    """
    Names of the files in `folder` that make up a result: these go to the Hub, and nothing else does.

    Returns:
        `list[str]`: weights (one file, or an index and its shards), `config.json`, `preprocessor_config.json`,
        `modeling.py`, and those of plan, report, figure and card that there are.

    Raises:
        OSError: where a file is missing that loading would need.
        ValueError: where the index of the shards cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}; give the --output_dir of a finished run.")
    weights = [WEIGHTS]
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        try:
            weights = [INDEX, *sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{folder / INDEX} is no index of weights ({error!r}); save the model again.") from error
        if strange := [
            name for name in weights if Path(name).name != name or not name.endswith((".safetensors", INDEX))
        ]:
            raise ValueError(f"{folder / INDEX} names {strange[0]!r}, which is no file of weights beside it.")
    if missing := [name for name in (*weights, *NEEDED) if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}, so it holds no finished result; nothing was sent. "
            "Finish the run, or save the model with save_pretrained."
        )
    return [*weights, *NEEDED, *(name for name in RECORD if (folder / name).is_file())]


def create_repository(repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
    """
    Makes sure that there is a model repository that may be written to.

    Args:
        repo_id (`str`):
            `name` or `owner/name`; the owner is the token's user or an organisation of theirs.
        private (`bool`, *optional*):
            Whether a new repository is private; the owner's default where it is not given.
        token (`str`, *optional*):
            Defaults to `HF_TOKEN` or the token that `hf auth login` stored.

    Returns:
        `str`: `owner/name`.

    Raises:
        OSError: without a token, with a wrong one, where the name is somebody else's, or without a connection.
        ValueError: where the id is none, or the repository exists and is public although `private` is asked for.
    """
    api = HfApi(token=token)
    with _explained(repo_id):
        found = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        user = api.whoami()
        # The client takes anybody's public repository for one that exists.
        if found.split("/")[0] not in (names := [user["name"], *(entry["name"] for entry in user["orgs"])]):
            raise OSError(f"it belongs to somebody else. This token writes under {', '.join(names)}: choose another id")
        if private and not api.model_info(found).private:
            raise ValueError(
                f"{found} exists and is public, so what is pushed there is too. "
                "Make it private in its settings, or choose another id."
            )
    return found


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload model",
) -> CommitInfo:
    """
    Sends a result to the Hub in one commit: all of it arrives, or nothing changes there.

    Files of an earlier push that this result lacks, such as shards or a plan, are removed in the same commit; other
    files in the repository are left alone. A card that was rendered without an id gets this one.

    Args:
        folder (`str` or `Path`):
            Folder of a run or of `save_pretrained`; see [`result_files`] for what is sent. It is only read.
        repo_id (`str`), private (`bool`, *optional*), token (`str`, *optional*):
            As in [`create_repository`].
        revision (`str`, *optional*):
            Branch to push to, made if it is missing. Defaults to `main`.
        commit_message (`str`, *optional*, defaults to `"Upload model"`):
            First line of the commit.

    Returns:
        `huggingface_hub.CommitInfo`: `commit_url`, `oid`.

    Raises:
        OSError: as in [`create_repository`], for a missing file, or where the connection ended. The message says how to
            push again; a second push sends what is missing.
    """
    names = result_files(folder)
    again = shlex.join(
        ["python", "recipes/push.py", str(folder), repo_id]
        + (["--revision", revision] if revision else [])
        + (["--private"] if private else [])
    )
    with _resumable(f"{folder} is whole. Push it again with: {again}"):
        repo_id = create_repository(repo_id, private=private, token=token)
        additions = [CommitOperationAdd(name, str(Path(folder) / name)) for name in names]
        if "README.md" in names:
            text = (Path(folder) / "README.md").read_bytes().replace(PLACEHOLDER, repo_id.encode())
            additions[names.index("README.md")] = CommitOperationAdd("README.md", text)
        return _commit(repo_id, additions, revision, token, commit_message)


def push_model(
    model: PrunedForImageClassification,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    max_shard_size: int | str = "50GB",
    tags: Sequence[str] = (),
) -> CommitInfo:
    """
    Sends a model to the Hub in one commit: weights, configs, the modeling file and a short card without figures.

    A card that is there already is kept, unless it holds figures or says how a model was pruned or trained: it is of
    other weights then.

    Args:
        model ([`PrunedForImageClassification`]):
            The model.
        repo_id (`str`), private (`bool`, *optional*), token (`str`, *optional*):
            As in [`create_repository`].
        commit_message (`str`, *optional*), revision (`str`, *optional*):
            As in [`push_folder`].
        max_shard_size (`int` or `str`, *optional*, defaults to `"50GB"`):
            Size above which the weights are split.
        tags (`Sequence[str]`, *optional*):
            Further tags of the card.

    Raises:
        OSError, ValueError: as in [`push_folder`].
    """
    # Without private, a second push would open to all what the first was to hide.
    options = {"private": private, "revision": revision}
    again = ", ".join([repr(repo_id), *(f"{name}={value!r}" for name, value in options.items() if value is not None)])
    with _resumable(f"Nothing is lost: push it again with model.push_to_hub({again})"), TemporaryDirectory() as draft:
        repo_id = create_repository(repo_id, private=private, token=token)
        model.save_pretrained(draft, max_shard_size=max_shard_size)
        card = _card_there(repo_id, revision, token) or short_card(model, repo_id)
        if tags:
            card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or ()), *tags]))
        card.save(Path(draft) / "README.md")
        additions = [CommitOperationAdd(name, str(Path(draft) / name)) for name in result_files(draft)]
        return _commit(repo_id, additions, revision, token, commit_message or "Upload model")


def short_card(model: PrunedForImageClassification, repo_id: str | None = None) -> ModelCard:
    """The card of a model of which nothing is known but the model: it claims no figures."""
    return render_card(CardInfo(**_model_facts(model, repo_id)))


def write_record(
    folder: Path,
    model: PrunedForImageClassification,
    repo_id: str | None,
    *,
    plans: Sequence[PruningPlan],
    report: RobustnessReport | None,
    split: str,
    settings: Mapping[str, Any],
    pruning_steps: dict[str, dict[str, float]],
    selection: dict[str, dict[str, float]],
    **facts: Any,
) -> CardInfo:
    """
    Writes what a trainer knows of its model beside the weights: plan, figure, report and card.

    Files of an earlier model that this one has no counterpart of are removed.

    Args:
        folder (`Path`):
            Folder with the saved model.
        model ([`PrunedForImageClassification`]), repo_id (`str`):
            The model, and the id its card gives, a placeholder if there is none yet.
        plans (`Sequence[PruningPlan]`):
            Those that were applied, in order; with several, the file holds `{"rounds": [...], "kept": ...}`.
        report ([`RobustnessReport`], *optional*), split (`str`):
            Its figures, and the split they were measured on.
        settings (`Mapping[str, Any]`):
            Settings of the training; those of [`SETTINGS`] are on the card, and of `num_train_epochs` and `max_steps`
            the one that counts.
        pruning_steps, selection:
            As in [`CardInfo`].
        facts:
            Further fields of [`CardInfo`], or others instead of what is found here.

    Returns:
        [`CardInfo`]: what the card says.
    """
    row = None
    if report is not None:
        example = torch.zeros(1, 3, model.config.image_size, model.config.image_size, device=model.device)
        costs = {"parameters": count_parameters(model), "macs": count_macs(model, example)}
        row = ResultRow.from_report("this model", report, **costs)
    length = "max_steps" if settings.get("max_steps", -1) > 0 else "num_train_epochs"
    shown = [name for name in (*SETTINGS, length) if settings.get(name) is not None]
    known: dict[str, Any] = _model_facts(model, repo_id) | {"of_dense": of_dense(model)}
    known |= {
        "dataset_id": (report.data_name or "images of the user") if report else None,
        "dataset_split": split,
        "rows": [row] if row else [],
        "plan": plan_summary(plans) if plans else None,
        "rounds": round_rows(plans) if len(plans) > 1 else [],
        "pruning_steps": pruning_steps,
        "selection": selection,
        "training": {name: str(settings[name]) for name in shown},
        "figure": "mrs.png" if plans else None,
        "versions": package_versions(),
        "seed": settings.get("seed"),
    }
    info = CardInfo(**known | facts)
    card = render_card(info)  # before anything is removed: it may be refused
    for name in RECORD:
        (folder / name).unlink(missing_ok=True)
    if plans:
        write_plans(plans, folder / "pruning_plan.json")
        plot_sensitivity(cast(Any, shown_plan(plans)), folder / "mrs.png")
    if report is not None:
        report.save(folder / "robustness_report.json")
    card.save(folder / "README.md")
    return info


def write_plans(plans: Sequence[PruningPlan], path: Path) -> None:
    """
    Writes one plan as it is, several as `rounds` with `kept`: channels of the first dense model, by unit.

    `kept` is null where the units changed on the way, so that no indices of the dense model's units say what is left.
    """
    if len(plans) == 1:
        plans[0].save(path)
        return
    whole = whole_plan(plans)
    content = {"rounds": [plan.to_dict() for plan in plans], "kept": whole and whole.kept}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def shown_plan(plans: Sequence[PruningPlan]) -> PruningPlan:
    """What card and picture show of a removal in rounds: the one plan that does the same, or else the last one's."""
    if whole := whole_plan(plans):
        return whole
    first, last = plans[0], plans[-1]
    target, metric = overall_target(plans)
    return replace(
        last,
        target=target,
        target_metric=metric,
        before=first.before,
        achieved=shares_left(plans),
        dense_size=first.dense_size,
        latency=None,
    )


def plan_summary(plans: Sequence[PruningPlan]) -> PlanSummary:
    """What a card says of [`shown_plan`]."""
    return PlanSummary.from_plan(shown_plan(plans), rounds=len(plans), of_last_round=whole_plan(plans) is None)


def whole_plan(plans: Sequence[PruningPlan]) -> PruningPlan | None:
    """The one plan that does what several did one after another; None where there is no such plan."""
    try:
        return PruningPlan.of_rounds(plans)
    except ValueError:
        # Grouped convolutions that lost channels of every group in one round and whole groups in another.
        return None


def _model_facts(model: PrunedForImageClassification, repo_id: str | None) -> dict[str, Any]:
    config = model.config
    return {
        "model_name": repo_id.split("/")[-1] if repo_id else "model",
        "repo_id": repo_id,
        "backbone": config.backbone.get("name") or config.backbone["config"]["model_type"],
        "image_size": config.image_size,
        "class_names": [str(label) for label in (config.id2label or {}).values()],
    }


def of_dense(model: PrunedForImageClassification) -> dict[str, float] | None:
    """What a pruned model keeps of its dense network, by metric; None for a dense one."""
    size = model.config.image_size
    example = torch.zeros(1, 3, size, size, device=model.device, dtype=model.dtype)
    dense = dense_size(model, example)
    if dense is None:
        return None
    return {"macs": count_macs(model, example) / dense["macs"], "params": count_parameters(model) / dense["params"]}


def _card_there(repo_id: str, revision: str | None, token: str | None) -> ModelCard | None:
    api = HfApi(token=token)
    with _explained(repo_id):
        if not api.file_exists(repo_id, "README.md", revision=revision):
            return None
        card = ModelCard(Path(api.hf_hub_download(repo_id, "README.md", revision=revision)).read_text("utf-8"))
    return None if getattr(card.data, "eval_results", None) or TOLD in card.text else card


def _commit(
    repo_id: str,
    additions: list[CommitOperationAdd],
    revision: str | None,
    token: str | None,
    commit_message: str,
) -> CommitInfo:
    api = HfApi(token=token)
    with _explained(repo_id):
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = api.list_repo_files(repo_id, revision=revision)
        stale = [name for name in there if _is_ours(name) and name not in {each.path_in_repo for each in additions}]
        operations: list[CommitOperationAdd | CommitOperationDelete] = [*additions, *map(CommitOperationDelete, stale)]
        # Not upload_folder: it may cut a folder into several commits.
        return api.create_commit(repo_id, operations, commit_message=commit_message, revision=revision)


def _is_ours(name: str) -> bool:
    weights = name in (WEIGHTS, INDEX) or (name.startswith("model-") and name.endswith(".safetensors"))
    return weights or name in NEEDED or name in RECORD


@contextmanager
def _resumable(advice: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(f"{error} {advice}") from error
    except KeyboardInterrupt as error:
        error.add_note(f"The push was interrupted. {advice}")  # its class tells a recipe which signal it was
        raise


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    try:
        yield
    except (HTTPError, OSError, RuntimeError) as error:  # the client wraps what ended an upload in a RuntimeError
        raise OSError(f"Pushing to {repo_id} failed: {_reason(error, repo_id)}.") from error


def _reason(error: BaseException, repo_id: str) -> str:
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return f"{str(error).rstrip('.')}: {_reason(error.__cause__, repo_id)}"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    with_token = isinstance(error, HfHubHTTPError) and "authorization" in error.response.request.headers
    if status == 401 and not with_token:
        return "there is no token. Log in with `hf auth login`, set HF_TOKEN, or give --hub_token (push.py: --token)"
    if status == 401:
        return "the Hub does not accept this token. Make a new one with write access and log in with `hf auth login`"
    if status == 403:
        return f"this token may not write to {repo_id}. Choose an id of your own, or a token with write access"
    text = " ".join(str(error).split()).rstrip(".")
    return text if isinstance(error, OSError) else f"the connection ended ({text or type(error).__name__})"
