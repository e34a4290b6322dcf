"""Fresh client processes for a loopback Hub: every snippet runs in a fork of a process that knows that Hub alone.

The variables that huggingface_hub reads are set before it is imported, and imports are paid once.
`hf_mrpf` is not among what is imported: a snippet imports it, or is run where it cannot be.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_server import ALICE

REPOSITORY = Path(__file__).resolve().parent.parent

PARENT = r"""
import contextlib, importlib.abc, io, json, os, sys, time, traceback
import torch, transformers, timm, datasets, sklearn.datasets
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
from huggingface_hub import HfApi
torch.set_num_threads(1)
# Paths of the repository come back where a snippet may see the package.
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or os.getcwd()) != os.environ["REPOSITORY"]]
assert "hf_mrpf" not in sys.modules

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_mrpf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def child(order):
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(os.devnull)
    os.environ.update(order["environment"])
    for name in order["unset"]:
        os.environ.pop(name, None)
    if order["hidden"]:
        sys.meta_path.insert(0, Hidden())
        try:
            import hf_mrpf
        except ImportError:
            pass
        else:
            raise SystemExit("hf_mrpf is not hidden")
    else:
        sys.path[:0] = [os.environ["REPOSITORY"], os.path.join(os.environ["REPOSITORY"], "tests")]
    waits = []
    def sleep(seconds):
        waits.append(seconds)
    from huggingface_hub.utils import _http
    _http.time = type("clock", (), {**vars(time), "sleep": staticmethod(sleep)})  # backoff without waiting
    known = {"torch": torch, "HfApi": HfApi, "pipeline": pipeline, "AutoImageProcessor": AutoImageProcessor}
    known["AutoModelForImageClassification"] = AutoModelForImageClassification
    scope = known | {"__name__": "snippet", "given": order["given"], "answer": None}
    out, err, error = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            exec(compile(order["code"], "snippet", "exec"), scope)
        except BaseException as raised:
            kinds = [kind.__name__ for kind in type(raised).__mro__]
            error = {"kinds": kinds, "message": str(raised), "trace": traceback.format_exc()}
    return {"answer": scope["answer"], "error": error, "stdout": out.getvalue(), "stderr": err.getvalue()}

results = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for line in sys.stdin:
    read, write = os.pipe()
    if not os.fork():
        with os.fdopen(write, "w") as pipe:
            pipe.write(json.dumps(child(json.loads(line))))
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        content = pipe.read()
    os.wait()
    results.write((content or json.dumps({"error": {"kinds": ["crash"], "message": "", "trace": ""}})) + "\n")
    results.flush()
"""


class Failed(Exception):
    """What a snippet raised: `kinds` are the names of its class and bases."""

    def __init__(self, error: dict, stderr: str):
        super().__init__(error["message"])
        self.kinds, self.trace, self.stderr = error["kinds"], error["trace"], stderr


class Client:
    """Runs snippets as a user whose token is `token`; `given` is what a snippet sees under that name."""

    def __init__(self, url: str, home: Path, **environment: str):
        environment = {
            "HF_ENDPOINT": url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
            "OMP_NUM_THREADS": "1",
            "REPOSITORY": str(REPOSITORY),
            **environment,
        }
        inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_TOKEN")}
        self._process = subprocess.Popen(
            [sys.executable, "-c", PARENT],
            env=inherited | environment,
            cwd=home.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.stdout = self.stderr = ""

    def run(
        self,
        code: str,
        *,
        token: str | None = None,
        hidden: bool = False,
        environment: dict | None = None,
        **given: Any,
    ) -> Any:
        """The value of `answer` after the snippet; raises `Failed` where it raises."""
        environment = (environment or {}) | ({"HF_TOKEN": token} if token else {})
        unset = [] if token else ["HF_TOKEN"]
        order = {"code": code, "given": given, "hidden": hidden, "environment": environment, "unset": unset}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        result = json.loads(self._process.stdout.readline())
        self.stdout, self.stderr = result.get("stdout", ""), result.get("stderr", "")
        if result["error"]:
            raise Failed(result["error"], self.stderr)
        return result["answer"]

    def recipe(self, name: str, *arguments: str, **options: Any) -> int:
        """Exit status of a recipe with these arguments."""
        code = (
            "import runpy, sys\n"
            "sys.argv = [given['name'], *given['arguments']]\n"
            "try:\n    runpy.run_path(given['path'], run_name='__main__')\n    answer = 0\n"
            "except SystemExit as end:\n    answer = end.code or 0\n"
        )
        path = str(REPOSITORY / "recipes" / f"{name}.py")
        return self.run(code, name=f"{name}.py", path=path, arguments=list(arguments), **options)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)


def refused(client: Client, code: str, **options: Any) -> str:
    """The message of the ValueError or OSError that a snippet must end with; never with the token in it."""
    with pytest.raises(Failed) as refusal:
        client.run(code, **options)
    assert {"ValueError", "OSError"} & set(refusal.value.kinds), refusal.value.trace
    assert ALICE not in refusal.value.trace
    return str(refusal.value)


# Absolute paths of Unix and Windows, outside of addresses; a card's fractions (8/255) and ids are none.
LOCAL_PATH = re.compile(rb"(?<![\w.:/<])(?:/(?:tmp|home|root|Users|var|work|private|mnt|opt)/|[A-Za-z]:\\\\)[\w.-]+")


def assert_public(files: dict[str, bytes], *secrets: str) -> None:
    """No file that was pushed names a place of this machine, or holds one of these secrets."""
    for name, content in files.items():
        assert not name.endswith((".bin", ".pt", ".pkl", ".pth")), name
        for secret in (*secrets, str(Path.home()) + "/"):
            assert secret.encode() not in content, (name, secret)
        if name.endswith((".json", ".md", ".py")):
            assert not LOCAL_PATH.findall(content), (name, LOCAL_PATH.findall(content))
