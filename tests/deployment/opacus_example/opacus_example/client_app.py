"""A private engine around a plain loop, for so many steps."""

import warnings

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from opacus import PrivacyEngine

from opacus_example.task import network, records

warnings.filterwarnings("ignore")  # Opacus warns of hooks that it sets itself
app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    loader, model = records(context.node_config["dataset"]), network()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    engine = PrivacyEngine(secure_mode=False)
    model, optimizer, loader = engine.make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
    )
    criterion = torch.nn.CrossEntropyLoss()
    for step, (features, labels) in enumerate(loader, start=1):
        optimizer.zero_grad()
        criterion(model(features), labels).backward()
        optimizer.step()
        if step == int(context.run_config["steps"]):
            break
    metrics = {"num-examples": len(loader.dataset), "epsilon": float(engine.get_epsilon(delta=1e-5))}
    content = RecordDict({"arrays": ArrayRecord(model._module.state_dict()), "metrics": MetricRecord(metrics)})
    return Message(content=content, reply_to=message)
