"""Every test runs offline, on one thread, from the same seed."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch
from hub_client import Client
from hub_server import ALICE, BOB, HubServer

torch.set_num_threads(1)

# Files that take longest: begun first, or one process would be at one of them when the others have nothing left.
LONGEST = (
    *("families", "hub", "rounds", "export", "distributed", "resume"),
    *("units", "memory", "reload", "readme", "recipe"),
)

# Files in which the tracer of coverage would double the time, as they go over the same lines for many networks.
UNTRACED = ("families", "units", "memory", "exactness", "reload")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def set_default_dtype():
    """`torch.set_default_dtype`, undone after the test."""
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


def pytest_collection_modifyitems(items):
    """
    Files in the order of `LONGEST`, the others after them as they are; nothing changes within a file.

    Tests of `UNTRACED` are left out of the coverage.
    """
    for item in items:
        if item.path.stem.removeprefix("test_") in UNTRACED:
            item.add_marker("no_cover")
    place = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_terminal_summary(terminalreporter):
    """What tests have to say although they passed, also from other processes."""
    for report in terminalreporter.stats.get("passed", []):
        for name, text in report.user_properties:
            if name == "summary":
                terminalreporter.write_line(text)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of the real data sets; the test is skipped where there is none."""
    folder = Path(os.environ.get("HF_MRPF_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (set HF_MRPF_TEST_DATA)")
    return folder


# One Hub and one client for every file that needs them: the client's imports take a while.


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """Folder of everything that client processes read and write."""
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="session")
def server(place):
    with HubServer(place / "contents", {ALICE: "alice", BOB: "bob"}, {"lab": ["alice"], "firm": ["bob"]}) as running:
        yield running


@pytest.fixture
def hub(server):
    """The Hub, without the faults of an earlier test."""
    yield server
    server.heal()


@pytest.fixture(scope="session")
def client(server, place):
    (place / "home").mkdir()
    running = Client(server.url, place / "home")
    yield running
    running.close()
