"""The AdaDPIGU strategy: describe, pretrain, rank, train under a growing mask.

It sees released values and public facts only, so nothing in here can cost privacy; what it bears on is how much the
released values are good for. One round: ask every member for a release under the round's mask and statistics, average
what comes back with public weights, move the weights, learn the statistics. A round with one usable reply is a round.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor, nn

from adadpigu_core.accounting import PRETRAINING, TRAINING, Event
from adadpigu_core.adaptive_clipping import Standardisation
from adadpigu_core.configuration import Configuration
from adadpigu_core.exceptions import FederationError, MessageError
from adadpigu_core.messages import Refusal, TrainReply, decode, encode, kind_of, require
from adadpigu_core.models import ModelSpec
from adadpigu_core.parameters import assign, flatten
from server.aggregation import Contribution, aggregate, public_weight
from server.cohort import Cohort, Member
from server.exchange import Exchange, Reply, Wait, request, sleep
from server.requests import Asked, Requests, RoundWork
from server.round_report import RoundReport, ignore
from server.schedule import Schedule
from server.state import ServerState

log = logging.getLogger("adadpigu.server")

DESCRIBE, TRAIN = "query.describe", "train"
EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class AdaDPIGU(Strategy):
    """Federated training of a model on private records.

    Args:
        configuration: All settings.
        spec: What is trained; clients build it themselves.
        model: The same model here, a container for weights.
        state: Where the run stands.
        observer: Called after every round, when the state is complete: the place for checkpoints.
        wait: Waits up to some seconds for a reply to one of some message ids.
    """

    def __init__(
        self,
        configuration: Configuration,
        spec: ModelSpec,
        model: nn.Module,
        state: ServerState,
        observer: Callable[[RoundReport], None] = ignore,
        wait: Wait = sleep,
    ) -> None:
        self._configuration = configuration
        self._schedule = Schedule(configuration)
        self._requests = Requests(configuration, spec, state.layout, state.run)
        self._model = model
        self._observer = observer
        self._wait = wait
        self._exchange: Exchange
        self.state = state
        self.cohort = Cohort(state.tally)
        self._asked: dict[int, Asked] = {}

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 0,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Run all rounds that the state still lacks.

        Args:
            grid: Flower's way to the nodes.
            initial_arrays: Weights to start from; ignored when a run goes on.
            num_rounds: Must be the configured number, or 0 for it: the privacy plan depends on it.
            timeout: Seconds to wait for the replies of a round.
            train_config: Not used; the configuration says everything.
            evaluate_config: Not used; nothing is evaluated on private data.
            evaluate_fn: Evaluates weights on public data, before the first round and as often as configured.

        Raises:
            FederationError: If no client takes part, or none is left.
        """
        planned = self._configuration.federation.num_rounds
        if num_rounds not in (0, planned):
            raise FederationError(f"num_rounds is {num_rounds}, but the privacy plan was made for {planned} rounds")
        self._exchange = Exchange(grid, self._wait)
        if self.state.round == 0:
            self._model.load_state_dict(initial_arrays.to_torch_state_dict())
            self.state.optimiser.reset(flatten(self._model))
        self._gather(grid, timeout)
        result = Result()
        if self.state.round == 0:
            self._evaluate(0, evaluate_fn, result)
        for number in range(self.state.round + 1, planned + 1):
            self._round(number, grid, timeout, evaluate_fn, result)
        self._settle(timeout)
        result.arrays = self.arrays()
        return result

    def arrays(self) -> ArrayRecord:
        """The current model, as Flower carries it."""
        assign(self._model, self.state.optimiser.weights)
        return ArrayRecord(self._model.state_dict())

    def summary(self) -> None:
        """Log what is about to run."""
        plan = self._configuration.plan_shape
        log.info("AdaDPIGU: %d pretraining and %d training steps", plan.pretraining_steps, plan.training_steps)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Make the requests of a round, one for each member."""
        phase, ratio = self._schedule.phase(server_round), self._schedule.ratio(server_round)
        masks = {member.node: self.state.importance.mask(member.description.data_set, ratio) for member in self.cohort}
        known = [mask for mask in masks.values() if mask is not None]
        everything = torch.ones(self.state.layout.num_parameters, dtype=torch.bool)
        union = torch.stack(known).any(dim=0) if known else everything
        self._standardisation = self._standardise(union, phase)
        work = RoundWork(server_round, phase, self.state.optimiser.weights, self._standardisation)
        messages = []
        for member in self.cohort:
            mask = masks[member.node]
            asked = Asked.of(everything if mask is None else mask, named=mask is not None)
            self._asked[member.node] = asked
            wire = encode(self._requests.train(work, asked, send_mask=asked.mask_id != member.mask_id))
            messages.append(request(wire, member.node, TRAIN, server_round))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Tally every reply and apply the updates of this round."""
        contributions, refused = [], 0
        for reply in self._exchange.resolve(replies):
            try:
                contribution = self._take(reply, server_round)
            except MessageError as error:
                log.warning("node %d: its reply cannot be used (%s)", reply.node, error)
                continue
            refused += contribution is None and reply.wire is not None and kind_of(reply.wire) == "Refusal"
            if contribution is not None:
                contributions.append(contribution)
        metrics = MetricRecord({"clients": len(contributions), "refused": refused})
        if not contributions:
            log.warning("round %d: no usable update; the model stays as it is", server_round)
            return None, metrics
        self._apply(contributions, server_round)
        return self.arrays(), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nobody: an evaluation on private records would be a release."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing was asked for, so nothing comes back."""
        return None

    def _gather(self, grid: Grid, timeout: float) -> None:
        """Wait for the expected number of nodes to describe themselves; go on with fewer after a while."""
        expected = self._configuration.federation.num_clients
        deadline = time.monotonic() + self._configuration.federation.start_timeout
        self._describe(self.cohort.newcomers(grid.get_node_ids()), timeout)
        while len(self.cohort) + len(self.cohort.refused) < expected and time.monotonic() < deadline:
            time.sleep(0.5)
            self._describe(self.cohort.newcomers(grid.get_node_ids()), timeout)
        if len(self.cohort) < expected:
            log.warning("%d of %d expected clients take part", len(self.cohort), expected)
        self._require_members()

    def _describe(self, nodes: list[int], timeout: float) -> None:
        asked = set(self._exchange.missing(DESCRIBE, 0))
        wire = encode(self._requests.describe())
        self._exchange.send([request(wire, node, DESCRIBE, 0) for node in nodes if node not in asked], 0)
        if set(nodes) - asked:
            for reply in self._exchange.resolve(self._exchange.collect(DESCRIBE, 0, timeout)):
                self._introduce(reply)

    def _introduce(self, reply: Reply) -> None:
        if reply.wire is not None:
            self.cohort.admit(reply.node, reply.wire)
        else:
            log.warning("node %d did not describe itself: %s", reply.node, reply.problem)

    def _require_members(self) -> None:
        if len(self.cohort):
            return
        reasons = sorted({refusal.message or f"code {refusal.code!r}" for refusal in self.cohort.refused.values()})
        raise FederationError("no client takes part: " + ("; ".join(reasons) or "none has registered in time"))

    def _round(self, number: int, grid: Grid, timeout: float, evaluate_fn: EvaluateFn | None, result: Result) -> None:
        begun = time.monotonic()
        up, down = self._exchange.bytes_up, self._exchange.bytes_down
        self._describe(self.cohort.newcomers(grid.get_node_ids()), timeout)
        self._require_members()
        members = len(self.cohort)
        messages = list(self.configure_train(number, ArrayRecord(), ConfigRecord(), grid))
        self._exchange.send(messages, number)
        _, metrics = self.aggregate_train(number, self._exchange.collect(TRAIN, number, timeout))
        self.state.round = number
        self.state.bytes_up += self._exchange.bytes_up - up
        self.state.bytes_down += self._exchange.bytes_down - down
        evaluated = self._evaluate(number, evaluate_fn, result)
        if metrics is not None:
            result.train_metrics_clientapp[number] = metrics
        clients, refused = (int(metrics[key]) for key in ("clients", "refused")) if metrics else (0, 0)  # type: ignore[arg-type]
        self.state.seconds += time.monotonic() - begun
        self._observer(
            RoundReport(
                round=number,
                phase=self._schedule.phase(number),
                clients=clients,
                missing=members - clients - refused,
                refused=refused,
                retained=float(self._standardisation.mask.double().mean()),
                epsilon=self.state.tally.largest_epsilon,
                bytes_up=self.state.bytes_up,
                bytes_down=self.state.bytes_down,
                seconds=time.monotonic() - begun,
                metrics=evaluated,
            )
        )

    def _evaluate(self, number: int, evaluate_fn: EvaluateFn | None, result: Result) -> dict[str, float]:
        last = number == self._configuration.federation.num_rounds
        if evaluate_fn is None or not (last or number % self._configuration.runtime.evaluate_every == 0):
            return {}
        metrics = evaluate_fn(number, self.arrays())
        if metrics is None:
            return {}
        result.evaluate_metrics_serverapp[number] = metrics
        return {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}

    def _settle(self, timeout: float) -> None:
        """Ask once more for the ledgers of clients whose last reply is missing, so that the tally is complete."""
        number = self._configuration.federation.num_rounds
        absent = self._exchange.missing(TRAIN, number)
        for reply in self._exchange.resolve(self._exchange.collect(TRAIN, number, min(timeout, 5.0)) if absent else []):
            try:
                self._take(reply, number + 1)
            except MessageError as error:
                log.warning("node %d: its reply cannot be used (%s)", reply.node, error)

    def _standardise(self, mask: Tensor, phase: str) -> Standardisation:
        if phase == TRAINING and self._requests.server_statistics:
            return self.state.statistics.standardisation(mask)
        return replace(Standardisation.identity(len(mask)), mask=mask)

    def _take(self, reply: Reply, server_round: int) -> Contribution | None:
        """Tally a reply; what is left of it is the contribution to this round, if it is one."""
        if reply.kind == DESCRIBE:
            self._introduce(reply)
            return None
        member = self.cohort.get(reply.node)
        if reply.wire is None:
            log.warning("node %d did not answer round %d: %s", reply.node, reply.round, reply.problem)
            return None
        if kind_of(reply.wire) == "Refusal":
            self.cohort.refused_round(reply.node, decode(reply.wire, Refusal))
            return None
        message = decode(reply.wire, TrainReply)
        if member is None:
            self.state.tally.claim(message.data_set, message.spent)
            return None
        late = reply.round != server_round
        event = self._event(member, message.phase)
        account = self.state.tally[member.description.data_set]
        account.claim(message.spent, fresh=not late)
        account.witness(event)
        if late:
            log.warning("%s answered round %d too late; it counts in the tally only", account.name, reply.round)
            return None
        return self._contribution(message, member, event, server_round)

    def _contribution(self, message: TrainReply, member: Member, event: Event, server_round: int) -> Contribution:
        asked = self._asked[member.node]
        require((message.run, message.round) == (self.state.run, server_round), "round", f"is {message.round}")
        retained = int(asked.mask.sum())
        require(len(message.update) == retained, "update", f"expected {retained} entries, got {len(message.update)}")
        weight = self._weight(member, event)
        if message.phase == PRETRAINING:
            d = self.state.layout.num_parameters
            require(
                message.importance is not None and len(message.importance) == d, "importance", f"expected {d} entries"
            )
            self.state.importance.add(
                member.description.data_set, torch.from_numpy(np.array(message.importance)), weight
            )
        member.mask_id, member.refusals = asked.mask_id, 0
        batch = event.sampling_probability * member.description.num_records
        noise_stddev = event.noise_multiplier * self._configuration.privacy.clipping_norm / batch
        return Contribution(
            torch.from_numpy(message.update.copy()), asked.mask, weight, noise_stddev / math.sqrt(event.count)
        )

    def _event(self, member: Member, phase: str) -> Event:
        """What a client's round costs, by its own description."""
        described = member.description
        noise = described.pretraining_noise_multiplier if phase == PRETRAINING else described.training_noise_multiplier
        probability = self._configuration.privacy.sampling_probability
        return Event(phase, noise, probability, self._configuration.federation.local_steps)

    def _weight(self, member: Member, event: Event) -> float:
        return public_weight(
            self._configuration.federation.aggregation,
            num_records=member.description.num_records,
            noise_multiplier=event.noise_multiplier,
            sampling_probability=event.sampling_probability,
        )

    def _apply(self, contributions: list[Contribution], server_round: int) -> None:
        """Move the weights and learn the statistics."""
        combined = aggregate(contributions)
        self.state.optimiser.step(combined.update, combined.mask, server_round)
        if self._schedule.phase(server_round) == PRETRAINING or not self._requests.server_statistics:
            return
        steps, rate = self._configuration.federation.local_steps, self._configuration.optimiser.local_learning_rate
        gradient = -combined.update / (rate * steps)
        noise_stddev = combined.noise_stddev * self._standardisation.scale
        self.state.statistics = self.state.statistics.updated(gradient, noise_stddev, combined.mask)
