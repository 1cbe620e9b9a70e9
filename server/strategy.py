"""The AdaDPIGU strategy: describe, pretrain, rank, train under a mask that grows or moves.

It sees released values and public facts only, so nothing in here can cost privacy; what it bears on is how much the
released values are good for. One round: ask every member for a release under the round's mask and statistics, average
what comes back with public weights, move the weights, learn the statistics. A round with one usable reply is a round.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import reduce

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor, nn

from adadpigu_core.accounting import TRAINING
from adadpigu_core.adaptive_clipping import Standardisation
from adadpigu_core.configuration import Configuration
from adadpigu_core.exceptions import FederationError, MessageError
from adadpigu_core.messages import Refusal, TrainReply, TrainRequest, decode, encode, kind_of
from adadpigu_core.models import ModelSpec
from adadpigu_core.parameters import assign, flatten, flatten_fixed
from server.aggregation import Contribution
from server.cohort import Cohort
from server.exchange import Exchange, Reply, Wait, request, sleep
from server.learning import learn, rerank
from server.learning_rate import automatic, output_gain
from server.reception import Expected, Reception
from server.requests import Asked, Requests, RoundWork
from server.round_report import RoundReport, ignore
from server.schedule import Schedule
from server.state import ServerState
from server.wire import readdressed, to_content

log = logging.getLogger("adadpigu.server")

DESCRIBE, TRAIN = "query.describe", "train"
# A node whose description is lost is asked again after so long, and at the start is waited for that long at least.
_DESCRIBE_SECONDS = 60.0
_POLL_SECONDS = 0.5
# The last round's replies that are late may still come for the tally.
_SETTLE_SECONDS = 5.0
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
        public: Features of public records, [n, ...], from which an automatic learning rate sees what noise on the
            weights does to the outputs.
        oracle: Scores of a model's coordinates, float64 [d], from the model and the rate of a client's steps: what no
            client has released, by which a simulation may rank.
    """

    def __init__(
        self,
        configuration: Configuration,
        spec: ModelSpec,
        model: nn.Module,
        state: ServerState,
        observer: Callable[[RoundReport], None] = ignore,
        wait: Wait = sleep,
        *,
        public: Tensor,
        oracle: Callable[[nn.Module, float], Tensor] | None = None,
    ) -> None:
        self._configuration = configuration
        self._schedule = Schedule(configuration)
        self._requests = Requests(configuration, spec, state.layout, state.run)
        self._model = model
        self._observer = observer
        self._wait = wait
        self._public = public
        self._oracle = oracle
        self._exchange: Exchange
        self.state = state
        self.cohort = Cohort(state.tally)
        self._reception = Reception(configuration, state, self.cohort)
        self._expected = Expected(0, {}, Standardisation.identity(state.layout.num_parameters))
        self._greeted: dict[int, float] = {}

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
            FederationError: If no client takes part, or all have gone and none comes back in time.
        """
        planned = self._configuration.federation.num_rounds
        if num_rounds not in (0, planned):
            raise FederationError(f"num_rounds is {num_rounds}, but the privacy plan was made for {planned} rounds")
        self._exchange = Exchange(grid, self._wait)
        if self.state.round == 0:
            self._model.load_state_dict(initial_arrays.to_torch_state_dict())
            self.state.optimiser.reset(flatten(self._model))
            self.state.fixed = flatten_fixed(self._model)
        self.summary()
        self._gather(grid, timeout)
        if self.state.learning_rate == 0:
            described = [member.description for member in self.cohort.present]
            assign(self._model, self.state.optimiser.weights)
            self.state.learning_rate = automatic(
                self._configuration,
                described,
                self.state.layout.num_parameters,
                output_gain(self._model, self._public),
            )
            log.info("the plan gives a learning rate of %.4g", self.state.learning_rate)
        result = Result()
        if self.state.round == 0:
            if self._oracle is not None:
                assign(self._model, self.state.optimiser.weights)
                self.state.importance.reveal(self._oracle(self._model, self.state.learning_rate))
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
        """Make the requests of a round, one for each member that is there."""
        rerank(self.state, self._schedule, server_round)
        phase, ratio = self._schedule.phase(server_round), self._schedule.ratio(server_round)
        everything = torch.ones(self.state.layout.num_parameters, dtype=torch.bool)
        masks = {
            member.node: self.state.importance.mask(member.description.data_set, ratio)
            for member in self.cohort.present
        }
        # members may share a tensor, and then share what is made of it
        distinct = {id(mask): mask for mask in masks.values()}
        asked = {
            key: Asked.of(everything if mask is None else mask, named=mask is not None)
            for key, mask in distinct.items()
        }
        union = reduce(torch.logical_or, (each.mask for each in asked.values())) if asked else everything
        standardisation = self._standardise(union, phase)
        self._expected = Expected(server_round, {}, standardisation)
        work = RoundWork(
            round=server_round,
            phase=phase,
            weights=self.state.optimiser.weights,
            standardisation=standardisation,
            learning_rate=self.state.learning_rate,
            fixed=self.state.fixed,
        )
        contents: dict[tuple[str, bool], tuple[TrainRequest, RecordDict]] = {}
        messages = []
        for member in self.cohort.present:
            own = self._expected.asked[member.node] = asked[id(masks[member.node])]
            key = (own.mask_id, own.mask_id != member.mask_id)
            if key not in contents:
                message = self._requests.train(work, own, send_mask=key[1])
                contents[key] = message, to_content(encode(message))
            message, shared = contents[key]
            known = self.state.tally[member.description.data_set].events
            content = readdressed(shared, encode(replace(message, spent=known)))
            if key[1]:
                member.mask_id = ""  # it may forget the mask that it had, whether its answer arrives or not
            messages.append(request(content, member.node, TRAIN, server_round))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Tally every reply and apply the updates of this round."""
        contributions, refused = [], 0
        for reply in self._exchange.resolve(replies):
            contribution = self._take(reply)
            if contribution is not None:
                contributions.append(contribution)
            elif (reply.kind, reply.round) == (TRAIN, server_round) and reply.wire is not None:
                refused += kind_of(reply.wire) == "Refusal"
        metrics = MetricRecord({"clients": len(contributions), "refused": refused})
        if not contributions:
            log.warning("round %d: no usable update; the model stays as it is", server_round)
            return None, metrics
        learn(
            self.state,
            contributions,
            self._expected.standardisation.scale,
            self._configuration,
            phase=self._schedule.phase(server_round),
            round_number=server_round,
            statistics=self._requests.server_statistics,
        )
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
        federation, begun = self._configuration.federation, time.monotonic()
        registered = begun + federation.start_timeout
        answered = begun + min(timeout, max(federation.start_timeout, _DESCRIBE_SECONDS))
        while True:
            self._greet(grid, _POLL_SECONDS)
            now, known = time.monotonic(), len(self.cohort) + len(self.cohort.refused)
            if self._exchange.missing(DESCRIBE, 0):
                if now >= answered:
                    break
            elif known >= federation.num_clients or now >= registered:
                break
            else:
                time.sleep(_POLL_SECONDS)
        if len(self.cohort) < federation.num_clients:
            log.warning("%d of %d expected clients take part", len(self.cohort), federation.num_clients)
        self._require_members()

    def _greet(self, grid: Grid, timeout: float) -> None:
        """Ask newcomers to describe themselves, and wait so long for their answers; later ones come with a round's."""
        now = time.monotonic()
        newcomers = self.cohort.newcomers(grid.get_node_ids())
        nodes = [node for node in newcomers if now - self._greeted.get(node, -math.inf) >= _DESCRIBE_SECONDS]
        if nodes:
            content = to_content(encode(self._requests.describe()))
            self._exchange.send([request(content, node, DESCRIBE, 0) for node in nodes], 0)
            self._greeted.update(dict.fromkeys(nodes, now))
        if timeout > 0:
            for reply in self._exchange.resolve(self._exchange.collect(DESCRIBE, 0, timeout)):
                self._take(reply)  # late replies to other requests come along

    def _introduce(self, reply: Reply) -> None:
        if reply.wire is not None:
            self.cohort.admit(reply.node, reply.wire)
        else:
            log.warning("node %d did not describe itself: %s", reply.node, reply.problem)

    def _require_members(self, grid: Grid | None = None) -> None:
        """Make sure that somebody is there; wait for a while if members have gone, since they may come back."""
        deadline = time.monotonic() + self._configuration.federation.start_timeout
        while grid is not None and len(self.cohort) and not self.cohort.present and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            self._greet(grid, 0.1)
        if self.cohort.present:
            return
        if len(self.cohort):
            raise FederationError("all clients have gone; go on with the run when they are back")
        reasons = sorted({refusal.message or f"code {refusal.code!r}" for refusal in self.cohort.refused.values()})
        raise FederationError("no client takes part: " + ("; ".join(reasons) or "none has registered in time"))

    def _round(self, number: int, grid: Grid, timeout: float, evaluate_fn: EvaluateFn | None, result: Result) -> None:
        begun = time.monotonic()
        up, down = self._exchange.bytes_up, self._exchange.bytes_down
        self._expected = replace(self._expected, round=number)
        self._greet(grid, 0)
        self._require_members(grid)
        members = len(self.cohort)
        messages = list(self.configure_train(number, ArrayRecord(), ConfigRecord(), grid))
        self._exchange.send(messages, number)
        replies = self._exchange.collect(TRAIN, number, timeout)
        collected = time.monotonic()
        _, metrics = self.aggregate_train(number, replies)
        aggregated = time.monotonic()
        self.state.round = number
        self.state.bytes_up += self._exchange.bytes_up - up
        self.state.bytes_down += self._exchange.bytes_down - down
        begun_evaluation = time.monotonic()
        evaluated = self._evaluate(number, evaluate_fn, result)
        evaluation = time.monotonic() - begun_evaluation
        if metrics is not None:
            result.train_metrics_clientapp[number] = metrics
        clients, refused = (int(metrics[key]) for key in ("clients", "refused")) if metrics else (0, 0)  # type: ignore[arg-type]  # ints
        self.state.seconds += time.monotonic() - begun
        stages = {"clients": collected - begun, "aggregation": aggregated - collected}
        mask = self._expected.standardisation.mask.double()
        self._observer(
            RoundReport(
                round=number,
                phase=self._schedule.phase(number),
                clients=clients,
                missing=members - clients - refused,
                refused=refused,
                retained=float(mask.mean()),
                retained_by_layer={name: float(part.mean()) for name, part in self.state.layout.split(mask).items()},
                epsilons=self.state.tally.epsilons,
                stages={**stages, "evaluation": evaluation},
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
        """Wait a little for the last round's late replies, so that the tally is complete."""
        number = self._configuration.federation.num_rounds
        self._expected = replace(self._expected, round=number + 1)  # whatever comes now is late
        if self._exchange.missing(TRAIN, number):
            for reply in self._exchange.resolve(self._exchange.collect(TRAIN, number, min(timeout, _SETTLE_SECONDS))):
                self._take(reply)

    def _standardise(self, mask: Tensor, phase: str) -> Standardisation:
        if phase == TRAINING and self._requests.server_statistics:
            return self.state.statistics.standardisation(mask)
        return replace(Standardisation.identity(len(mask)), mask=mask)

    def _take(self, reply: Reply) -> Contribution | None:
        """Tally a reply; what is left of it is the contribution to this round, if it is one."""
        if reply.kind == DESCRIBE:
            self._introduce(reply)
        elif reply.wire is None:
            log.warning("node %d did not answer round %d: %s", reply.node, reply.round, reply.problem)
        else:
            late = reply.round != self._expected.round
            try:
                if kind_of(reply.wire) != "Refusal":
                    message = decode(reply.wire, TrainReply)
                    return self._reception.take(reply.node, reply.round, message, self._expected)
                self.cohort.refused_round(reply.node, decode(reply.wire, Refusal), fresh=not late)
            except MessageError as error:
                # to go on asking would be to spend a budget on what cannot be used
                self.cohort.refused_round(reply.node, Refusal(error.code, str(error), "", ()), fresh=not late)
        return None
