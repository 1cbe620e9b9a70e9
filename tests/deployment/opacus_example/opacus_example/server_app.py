"""Federated averaging without evaluation on the clients, which writes down when each round has ended."""

import time
from pathlib import Path

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from opacus_example.task import network

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    clients = int(config["num-clients"])

    def note(number, _):
        with Path(config["times"]).open("a") as file:
            print(number, time.monotonic(), file=file, flush=True)

    strategy = FedAvg(fraction_evaluate=0, min_train_nodes=clients, min_available_nodes=clients, min_evaluate_nodes=0)
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(network().state_dict()),
        num_rounds=int(config["num-rounds"]),
        evaluate_fn=note,
    )
