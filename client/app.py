"""The Flower ClientApp: routes messages, and nothing else."""

from collections.abc import Mapping
from typing import cast

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from adadpigu_core.configuration import Value
from adadpigu_core.messages import DescribeRequest, TrainRequest, encode
from client.node import answer, refusal
from client.site import site
from client.wire import from_content, to_content

app = ClientApp()


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """Say what is public about this client, and fix its plan for the run."""
    return _reply(message, context, DescribeRequest)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Release the update of one round."""
    return _reply(message, context, TrainRequest)


def _reply(message: Message, context: Context, kind: type[DescribeRequest] | type[TrainRequest]) -> Message:
    try:
        node_config = cast(Mapping[str, Value], context.node_config)
        run_config = cast(Mapping[str, Value], context.run_config)
        content = to_content(answer(from_content(message.content), site(node_config, run_config, context.run_id), kind))
    except Exception as error:  # Flower would send its text to the server
        content = to_content(encode(refusal(error)))
    return Message(content, reply_to=message)
