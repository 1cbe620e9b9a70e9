"""What the server makes of a client's reply: checks, an entry in the tally, and a contribution to the round.

Clients are not trusted. What one sends is checked against what it was asked and what it declared, and counts for its
own data set alone. A client that lies within these bounds is not found out.
"""

import logging
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from adadpigu_core.accounting import PRETRAINING, TRAINING, Event
from adadpigu_core.adaptive_clipping import Standardisation
from adadpigu_core.configuration import Configuration
from adadpigu_core.exceptions import MessageError
from adadpigu_core.importance import DRIFT
from adadpigu_core.messages import TrainReply, require
from server.aggregation import Contribution, largest_norm, public_weight
from server.cohort import Cohort, Member
from server.requests import Asked
from server.schedule import Schedule
from server.state import ServerState

log = logging.getLogger("adadpigu.server")

# The paper's rule clamps the variance of a gradient to 1e6.
_LARGEST_SCALE_OF_THE_PAPER = 1e3


@dataclass(frozen=True)
class Expected:
    """What the nodes of a round were asked.

    Args:
        round: Number of the round.
        asked: The mask of each node.
        standardisation: Statistics of the round, if the server keeps them.
    """

    round: int
    asked: dict[int, Asked]
    standardisation: Standardisation


@dataclass(frozen=True)
class Reception:
    """Takes replies in."""

    configuration: Configuration
    state: ServerState
    cohort: Cohort

    def take(self, node: int, asked_in: int, message: TrainReply, expected: Expected) -> Contribution | None:
        """Tally a reply and make the contribution of it; None if it comes too late to be one.

        Args:
            node: The node that was asked.
            asked_in: The round in which it was asked.
            message: The reply.
            expected: What is expected now.

        Raises:
            MessageError: If it is not what the node was asked for.
        """
        member = self.cohort.known(node)
        if member is None:
            raise MessageError("this node does not take part")
        own, late = member.description.data_set, asked_in != expected.round
        require(message.data_set == own, "data-set", f"is not {own}, which this node described")
        account = self.state.tally[own]
        account.claim(message.spent, fresh=not late)
        phase = Schedule(self.configuration).phase(asked_in)
        for name, value in (("run", self.state.run), ("round", asked_in), ("phase", phase)):
            require(getattr(message, name) == value, name, f"is not {value}, which was asked for")
        event = self._event(member, phase, asked_in)
        account.witness(event)
        if late or self.cohort.get(node) is None:
            log.warning("%s answered round %d too late; it counts in the tally only", account.name, asked_in)
            return None
        return self._contribution(message, member, event, expected)

    def _event(self, member: Member, phase: str, round_number: int) -> Event:
        """What a client's round costs, by its own description."""
        described = member.description
        plan = self.configuration.plan_shape.with_noise(
            described.pretraining_noise_multiplier, described.training_noise_multiplier
        )
        return replace(plan.step_event(phase, round_number), count=self.configuration.federation.local_steps)

    def _contribution(self, message: TrainReply, member: Member, event: Event, expected: Expected) -> Contribution:
        asked = expected.asked[member.node]
        retained = int(asked.mask.sum())
        require(len(message.update) == retained, "update", f"expected {retained} entries, got {len(message.update)}")
        batch = event.sampling_probability * member.description.num_records
        noise_stddev = event.noise_multiplier * self.configuration.privacy.clipping_norm / batch
        norm = float(np.linalg.norm(message.update.astype(np.float64)))
        most = self._largest_norm(message.phase, asked.mask, expected, noise_stddev)
        require(norm <= most, "update", f"its norm {norm:.3g} is beyond {most:.3g}, which clipping and noise can reach")
        weight = public_weight(
            self.configuration.federation.aggregation,
            num_records=member.description.num_records,
            noise_multiplier=event.noise_multiplier,
            sampling_probability=event.sampling_probability,
        )
        if message.phase == PRETRAINING:
            drift, d = self.configuration.pretraining.measure == DRIFT, self.state.layout.num_parameters
            scores = message.update if drift else message.importance
            if scores is None or len(scores) != d:
                raise MessageError(f"importance: expected {d} entries")
            self.state.importance.add(member.description.data_set, torch.from_numpy(np.array(scores)), weight)
        member.mask_id, member.refusals = asked.mask_id, 0
        update = torch.from_numpy(np.array(message.update))
        return Contribution(update, asked.mask, weight, noise_stddev / math.sqrt(event.count))

    def _largest_norm(self, phase: str, mask: Tensor, expected: Expected, noise_stddev: float) -> float:
        """Norm that an honest update can reach, under the server's statistics or under any that a client can have."""
        configuration, clipping = self.configuration, self.configuration.adaptive_clipping
        steps, rate = configuration.federation.local_steps, self.state.learning_rate
        scale, times = float(expected.standardisation.scale[mask].max()), 1
        if phase == TRAINING and clipping.owner == "client" and clipping.rule != "none":
            # a mean square of 1 over the retained coordinates allows no more; a mean is a mean of what was released
            paper = clipping.rule == "paper"
            scale = _LARGEST_SCALE_OF_THE_PAPER if paper else math.sqrt(int(mask.sum()))
            times = expected.round * steps if paper or clipping.centre else 1
        most = largest_norm(
            clipping_norm=configuration.privacy.clipping_norm,
            sampling_probability=configuration.privacy.sampling_probability,
            noise_stddev=noise_stddev,
            num_retained=int(mask.sum()),
            scale=scale,
        )
        mean = float(expected.standardisation.mean[mask].double().norm())
        # differences of weights are rounded like weights, step by step
        return rate * steps * (mean + times * most) + 1e-6 * steps * float(self.state.optimiser.weights.norm())
