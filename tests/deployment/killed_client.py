"""Clients that die anywhere: each in a process of its own, killed after a number of lines of our own code,
before the charge, before its release is stored, or after it.

Run as a program: ``killed_client.py CONFTEST FOLDER ROUNDS SEED``. It answers the rounds of one run on one node, and
before each round's real answer lets some processes die on the way to it. Prints a JSON line for each process that was
killed, and one for each round. The parent never computes, so that it can fork.
"""

import hashlib
import importlib.util
import json
import os
import pathlib
import random
import signal
import sqlite3
import sys
from contextlib import closing

import torch  # with all other imports, once for all children

import client.node
from adadpigu_core.ledger import Ledger

ROOT = str(pathlib.Path(client.node.__file__).parents[1])
OURS = tuple(str(pathlib.Path(ROOT) / name) for name in ("client", "adadpigu_core"))
KILLS_A_ROUND = 9


def load(path):
    spec = importlib.util.spec_from_file_location("node_files", path)
    files = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(files)
    return files


def count_lines(stage=None, limit=None):
    """Count executed lines of our own code before the charge, before the release is stored, and after it.

    At the limit of a stage, kill this process.
    """
    seen = [0]

    def line(frame, event, _):
        if event == "line":
            seen[-1] += 1
            if len(seen) - 1 == stage and seen[-1] == limit:
                os.kill(os.getpid(), signal.SIGKILL)
        return line

    def then(method):
        def done(*arguments):
            result = method(*arguments)
            seen.append(0)
            return result

        return done

    Ledger.charge, Ledger.store_release = then(Ledger.charge), then(Ledger.store_release)
    sys.settrace(lambda frame, *_: line if frame.f_code.co_filename.startswith(OURS) else None)
    return seen


def in_a_child(work):
    """Do something in a child; gives its wait status and what it returned, if it lived."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        torch.set_num_threads(1)
        os.write(writing, json.dumps(work()).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, json.loads(text) if text else None


def answered(node, number):
    """Ask for a round twice; gives the hash of each release."""
    replies = [node.train(round=number) for _ in range(2)]
    return [hashlib.sha256(reply.update.tobytes()).hexdigest() for reply in replies]


def ledger(node):
    with closing(sqlite3.connect(node.ledger)) as connection:
        charges = connection.execute("SELECT round, noise_multiplier, count FROM charges ORDER BY id").fetchall()
        rows = connection.execute("SELECT round, payload FROM rounds WHERE payload IS NOT NULL").fetchall()
        stored = {number: hashlib.sha256(payload).hexdigest() for number, payload in rows}
        whole = connection.execute("PRAGMA integrity_check").fetchone()[0]
    return {"charges": charges, "stored": stored, "whole": whole}


def main(conftest, folder, rounds, seed):
    files, chance = load(conftest), random.Random(int(seed))
    steps = {"training_steps": int(rounds), "pretraining_steps": 0}

    def make():
        return files.Node(pathlib.Path(folder))

    def work(number, stage, limit):
        def ask():
            node = make()
            count_lines(stage, limit)
            node.train(round=number)

        return ask

    def measured():
        other = pathlib.Path(folder) / "measure"
        other.mkdir()
        node = files.Node(other)
        node.describe(**steps)
        seen = count_lines()
        node.train()
        sys.settrace(None)
        return seen

    in_a_child(lambda: str(type(make().describe(**steps)).__name__))
    lines = in_a_child(measured)[1]  # how long the way is
    for number in range(1, int(rounds) + 1):
        for attempt in range(KILLS_A_ROUND):
            stage = attempt % 3
            limit = chance.randint(1, lines[stage])
            status, _nothing = in_a_child(work(number, stage, limit))
            entry = {"killed": number, "stage": stage, "line": limit, "status": status}
            print(json.dumps({**entry, **ledger(make())}), flush=True)
        status, hashes = in_a_child(lambda number=number: answered(make(), number))
        print(json.dumps({"round": number, "hashes": hashes, "status": status, **ledger(make())}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
