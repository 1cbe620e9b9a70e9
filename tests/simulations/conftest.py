"""Toy apps for the in-process grid, and a look at the processes that it started."""

import time

import pytest

TOY_APP = """
import os, sys, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def echo(message, context):
    return Message(message.content, reply_to=message)


@app.query()
def describe(message, context):
    count = context.state.config_records.setdefault("calls", ConfigRecord({"n": 0}))
    count["n"] += 1
    facts = {"calls": count["n"], "pid": os.getpid(), "node": context.node_id, "run": context.run_id}
    facts |= {"node." + key: value for key, value in context.node_config.items()}
    facts |= {"run." + key: value for key, value in context.run_config.items()}
    return Message(RecordDict({"facts": ConfigRecord(facts)}), reply_to=message)


@app.query("slow")
def slow(message, context):
    time.sleep(message.content["config"]["seconds"])
    return describe(message, context)


@app.query("faulty")
def faulty(message, context):
    exec(message.content["config"]["code"])


@app.query("threads")
def threads(message, context):
    import torch
    return Message(RecordDict({"facts": ConfigRecord({"threads": torch.get_num_threads()})}), reply_to=message)
"""


@pytest.fixture(scope="module")
def apps(tmp_path_factory):
    """Environment in which the toy apps can be imported."""
    folder = tmp_path_factory.mktemp("apps")
    (folder / "toy_app.py").write_text(TOY_APP)
    (folder / "toy_torch_app.py").write_text("import torch\nfrom toy_app import app\n")
    (folder / "toy_broken_app.py").write_text("import a_module_that_is_missing\n")
    (folder / "toy_exiting_app.py").write_text("import os\nos._exit(3)\n")
    return {"PYTHONPATH": str(folder)}


def _is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait_for_end(pids, seconds=5.0):
    end = time.monotonic() + seconds
    while any(map(_is_alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return [pid for pid in pids if _is_alive(pid)]


@pytest.fixture(scope="session")
def is_alive():
    return _is_alive


@pytest.fixture(scope="session")
def wait_for_end():
    return _wait_for_end
