"""What a charge has bought when something went wrong after it: nothing yet, or the outcome there was. Never two."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import client.node
from adadpigu_core import archive, masking, private_step
from adadpigu_core.adaptive_clipping import AdaptiveClipping
from adadpigu_core.exceptions import ModelError
from adadpigu_core.messages import Refusal, TrainReply

ROOT = Path(__file__).resolve().parents[2]


def refused(reply, code):
    assert isinstance(reply, Refusal), reply
    assert reply.code == code, reply
    return reply.message


def first(number):
    """A mask that retains the first coordinates, and its name."""
    mask = torch.arange(15) < number
    return {"mask": masking.pack(mask), "mask_id": masking.fingerprint(mask)}


class TestOutcomeOfACharge:
    """Once noise may have been drawn, whatever happened is what the charge has bought."""

    def test_an_update_that_overflows_is_stored(self, described):
        message = refused(described.train(learning_rate=1e308), "message")
        assert message == "update: must be finite everywhere"
        before = described.charged()
        assert [len(rows) for rows in before] == [1, 1]
        # a modest request cannot have another draw for the same money
        assert refused(described.train(learning_rate=0.1), "message") == message
        assert described.charged() == before
        assert isinstance(described.train(round=2), TrainReply)

    def test_an_unexpected_error_is_stored_without_its_text(self, described, monkeypatch, caplog):
        real = client.node.train_round

        def fails(*arguments, **settings):
            update = real(*arguments, **settings)
            raise RuntimeError(f"record 17 said {update.update[0]}")

        monkeypatch.setattr(client.node, "train_round", fails)
        assert refused(described.train(), "internal") == ""
        assert "record 17 said" in caplog.text
        monkeypatch.setattr(client.node, "train_round", real)
        before = described.charged()
        assert refused(described.train(), "internal") == ""
        assert described.charged() == before

    def test_that_a_model_fails_on_a_record_shows_nowhere(self, described, monkeypatch, caplog):
        """From outside it is a release like any other, charged as ever."""
        real = private_step.clipped_sum

        def fails(model, loss, records, *arguments, **settings):
            if len(records):
                raise RuntimeError("record 17 is beyond the table")
            return real(model, loss, records, *arguments, **settings)

        monkeypatch.setattr(private_step, "clipped_sum", fails)
        reply = described.train()
        assert isinstance(reply, TrainReply)
        assert np.count_nonzero(reply.update) == len(reply.update), "noise everywhere"
        assert "record 17 is beyond the table" in caplog.text
        assert [len(rows) for rows in described.charged()] == [1, 1]
        monkeypatch.undo()
        assert np.array_equal(described.train().update, reply.update), "asked again, the same release"

    def test_a_network_is_looked_at_before_it_trains_whichever_was_described(self, described, monkeypatch):
        def refuses(*_):
            raise ModelError("it mixes records", "it mixes records")

        client.node._check_once.cache_clear()
        monkeypatch.setattr(client.node, "check_model", refuses)
        assert refused(described.train(), "model") == "it mixes records"
        assert described.charged() == ([], [])

    def test_a_refusal_keeps_what_the_client_remembers(self, described):
        settings = {"clipping": AdaptiveClipping("energy"), "client_statistics": True}
        named = first(9)
        described.train(**named, **settings)
        memory = archive.unpack(described.rows("releases")[0][2])[0]
        refused(described.train(round=2, learning_rate=1e308, mask_id=named["mask_id"], **settings), "message")
        kept = archive.unpack(described.rows("releases")[1][2])[0]
        assert kept.keys() == memory.keys()
        assert all(np.array_equal(kept[name], memory[name]) for name in kept)

    @pytest.mark.parametrize("ending", [SystemExit, KeyboardInterrupt])
    @pytest.mark.parametrize("moment", ["before the noise", "after the noise"])
    def test_a_process_that_ends_has_released_nothing(self, described, monkeypatch, ending, moment):
        real = client.node.train_round

        def ends(*arguments, **settings):
            if moment == "after the noise":
                real(*arguments, **settings)
            raise ending

        monkeypatch.setattr(client.node, "train_round", ends)
        with pytest.raises(ending):
            described.train()
        assert [len(rows) for rows in described.charged()] == [1, 0]
        monkeypatch.setattr(client.node, "train_round", real)
        charges = described.rows("charges")
        reply = described.train()
        assert isinstance(reply, TrainReply)
        assert described.rows("charges") == charges
        assert described.train().update.tobytes() == reply.update.tobytes()

    def test_after_a_crash_the_charge_is_for_nothing_else(self, described, monkeypatch):
        real = client.node.train_round

        def ends(*_arguments, **_settings):
            raise SystemExit

        monkeypatch.setattr(client.node, "train_round", ends)
        with pytest.raises(SystemExit):
            described.train()
        monkeypatch.setattr(client.node, "train_round", real)
        before = described.charged()
        for other in ({"steps": 2}, {"phase": "pretraining"}):
            assert "plan" in refused(described.train(**other), "message")
        assert described.charged() == before
        assert isinstance(described.train(round=2), TrainReply)
        assert "past" in refused(described.train(round=1), "message")


KILL = """
import importlib.util, os, pathlib, signal, sys
import torch._dynamo  # torch imports it at the first gradient, once for all children if it is here
import client.node
from adadpigu_core.ledger import Ledger

conftest, *folders = sys.argv[1:]
spec = importlib.util.spec_from_file_location("node_files", conftest)
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)


def kill(*arguments, **settings):
    os.kill(os.getpid(), signal.SIGKILL)


for folder in folders:  # forked before torch computes, after which a fork would hang
    child = os.fork()
    if child == 0:
        node = files.Node(pathlib.Path(folder))
        node.describe()
        moment = pathlib.Path(folder).name
        setattr(Ledger if moment == "store_release" else client.node, moment, kill)
        node.train()
        os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
MOMENTS = {"train_round": (1, 0), "encode": (1, 0), "store_release": (1, 0), "_unpack": (1, 1)}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Nodes whose process was killed in their first round, each at another moment."""
    top = tmp_path_factory.mktemp("killed")
    folders = {moment: top / moment for moment in MOMENTS}
    for folder in folders.values():
        folder.mkdir()
    command = [sys.executable, "-c", KILL, Path(__file__).with_name("conftest.py"), *folders.values()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(MOMENTS), done.stderr
    return folders


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
class TestKilledProcess:
    """SIGKILL before the noise, after it, before the release is stored, and after."""

    @pytest.mark.parametrize("moment", MOMENTS)
    def test_never_shows_less_than_it_released(self, killed, make_node, moment):
        node = make_node(folder=killed[moment])
        charges = node.rows("charges")
        assert tuple(len(rows) for rows in node.charged()) == MOMENTS[moment]
        reply = node.train()
        assert isinstance(reply, TrainReply)
        assert node.rows("charges") == charges
        assert node.train().update.tobytes() == reply.update.tobytes()
        assert [event.count for event in reply.spent] == [1]
