"""What becomes of a run that has ended: shown again by the next call, and sent to the Hub."""

from pathlib import Path

from huggingface_hub.utils import validate_repo_id

from .cli import RunArguments
from .config import MRPFConfig
from .console import say, show
from .hub import create_repository, push_folder
from .processes import Processes
from .results import results_table
from .run_folder import STAGES, RunFolder, read_json


def shown_again(run: RunFolder, run_args: RunArguments, args: MRPFConfig) -> bool:
    """
    Whether nothing is left to do: then the table of the finished run is printed, and the run sent if asked. Where a
    file of the result is gone or another, it is to be written again, from stages that are kept.
    """
    if not run.finished or run_args.overwrite_output_dir:
        return False
    processes = Processes.of(args.world_size > 1)
    lacking, stages = processes.from_main((run.lacking(), (run.path / STAGES).is_dir()) if processes.is_main else None)
    if lacking and not stages:
        raise ValueError(
            f"The result of this run is not whole: {lacking}, and the stages that it could be written again from are "
            "gone. Put the file back, or give --overwrite_output_dir to start again."
        )
    if lacking:
        say(args, f"The result of this run is not whole: {lacking}. It is written again from the stages there.")
        return False
    say(args, f"{run.path} is finished with these settings; --overwrite_output_dir would start again.")
    if run_args.card_note and run_args.card_note not in (run.path / "README.md").read_text(encoding="utf-8"):
        say(args, "--card_note is not on its card, which is written once: edit README.md there.")
    show(args, results_table(read_json(run.path / "robustness_report.json")["table"]))
    push_result(run, args)
    return True


def check_repository_id(args: MRPFConfig) -> None:
    """Refuses an id that the Hub could not take, before anything is loaded."""
    if args.hub_model_id:
        validate_repo_id(args.hub_model_id)


def repository(args: MRPFConfig) -> str:
    """The id on the Hub, made sure of by the main process."""
    name = args.hub_model_id or Path(str(args.output_dir)).absolute().name
    if args.process_index == 0:
        name = create_repository(name, private=args.hub_private_repo, token=args.hub_token)
    return name


def push_result(run: RunFolder, args: MRPFConfig) -> None:
    """Sends the finished folder; where that fails, the folder stays whole and the error says how to send it again."""
    if args.push_to_hub and args.process_index == 0:
        pushed = push_folder(
            run.path,
            args.hub_model_id or run.path.absolute().name,
            private=args.hub_private_repo,
            revision=args.hub_revision,
            token=args.hub_token,
        )
        say(args, f"pushed to {pushed.commit_url}")
