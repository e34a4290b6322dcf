"""What becomes of a run that has ended: shown again by the next call, and sent to the Hub."""

from pathlib import Path

from huggingface_hub.utils import validate_repo_id

from .cli import RunArguments
from .config import MRPFConfig
from .console import say, show
from .hub import create_repository, push_folder
from .results import results_table
from .run_folder import RunFolder, read_json


def shown_again(run: RunFolder, run_args: RunArguments, args: MRPFConfig) -> bool:
    """Whether nothing is left to do: then the table of the finished run is printed, and the run sent if asked."""
    if not run.finished or run_args.overwrite_output_dir:
        return False
    say(args, f"{run.path} is finished with these settings; --overwrite_output_dir would start again.")
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
