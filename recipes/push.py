"""
Sends the folder of a finished run to the Hub, or sends it again after an upload that did not end.

    python recipes/push.py outputs/digits me/digits-resnet
"""

import argparse

from hf_mrpf.console import report_errors
from hf_mrpf.hub import push_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", help="--output_dir of a finished run, or a folder that save_pretrained wrote")
    parser.add_argument("repo_id", help="owner/name on the Hub; the owner is you or an organisation of yours")
    parser.add_argument("--revision", help="branch to push to, made if it is missing; main if not given")
    parser.add_argument("--private", action="store_true", default=None, help="make the repository private if it is new")
    parser.add_argument("--token", help="a token with write access; HF_TOKEN or that of `hf auth login` if not given")
    arguments = parser.parse_args()
    pushed = push_folder(
        arguments.folder,
        arguments.repo_id,
        private=arguments.private,
        revision=arguments.revision,
        token=arguments.token,
    )
    print(f"pushed to {pushed.commit_url}")


if __name__ == "__main__":
    report_errors(main)
