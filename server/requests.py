"""What the server asks for, as messages."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adadpigu_core import masking
from adadpigu_core.accounting import PRETRAINING, TRAINING
from adadpigu_core.adaptive_clipping import Standardisation
from adadpigu_core.configuration import Configuration
from adadpigu_core.grouping import groups, shared
from adadpigu_core.importance import DRIFT
from adadpigu_core.messages import DescribeRequest, TrainRequest
from adadpigu_core.models import ModelSpec
from adadpigu_core.parameters import ParameterLayout
from adadpigu_core.provenance import code_fingerprint


@dataclass(frozen=True)
class Asked:
    """The mask that a node is asked to train under; an empty id means that everything is retained."""

    mask: Tensor
    mask_id: str

    @classmethod
    def of(cls, mask: Tensor, *, named: bool) -> "Asked":
        """Name a mask by its fingerprint, unless it retains everything."""
        return cls(mask, masking.fingerprint(mask) if named else "")


@dataclass(frozen=True)
class RoundWork:
    """What all members of a round share.

    Args:
        round: Number of the round.
        phase: ``pretraining`` or ``training``.
        weights: Weights to start from, float32 [d].
        standardisation: Statistics of the round, if the server keeps them.
        learning_rate: Of a client's private steps.
        fixed: What the model has beside its trainable weights, float32 [f].
    """

    round: int
    phase: str
    weights: Tensor
    standardisation: Standardisation
    learning_rate: float
    fixed: Tensor


@dataclass(frozen=True)
class Requests:
    """Makes the messages of one run."""

    configuration: Configuration
    spec: ModelSpec
    layout: ParameterLayout
    run: str

    @property
    def server_statistics(self) -> bool:
        """Whether the server keeps gradient statistics and sends them."""
        settings = self.configuration.adaptive_clipping
        return settings.owner == "server" and settings.rule != "none"

    def describe(self) -> DescribeRequest:
        """Ask a node for public facts, and to fix its plan."""
        plan, privacy = self.configuration.plan_shape, self.configuration.privacy
        return DescribeRequest(
            run=self.run,
            code=code_fingerprint(),
            model=self.spec,
            layout=self.layout.fingerprint,
            sampling_probability=plan.sampling_probability,
            pretraining_steps=plan.pretraining_steps,
            training_steps=plan.training_steps,
            pretraining_share=plan.pretraining_share,
            target_epsilon=privacy.target_epsilon,
            target_delta=privacy.target_delta,
            noise_schedule=plan.noise_schedule,
            steps_per_round=plan.steps_per_round,
        )

    def train(self, work: RoundWork, asked: Asked, *, send_mask: bool) -> TrainRequest:
        """Ask a node for the release of a round."""
        configuration, settings = self.configuration, self.configuration.adaptive_clipping
        mean, scale = self._statistics(work)
        measure = configuration.pretraining.measure
        return TrainRequest(
            run=self.run,
            code=code_fingerprint(),
            round=work.round,
            phase=work.phase,
            model=self.spec,
            weights=work.weights.numpy(),
            mask=masking.pack(asked.mask, self._group) if asked.mask_id and send_mask else None,
            mask_id=asked.mask_id,
            gradient_mean=mean,
            gradient_scale=scale,
            clipping=settings.clipping,
            client_statistics=settings.owner == "client" and settings.rule != "none",
            clipping_norm=configuration.privacy.clipping_norm,
            steps=configuration.federation.local_steps,
            learning_rate=work.learning_rate,
            importance_measure=measure if work.phase == PRETRAINING and measure != DRIFT else "",
            views=configuration.training.views,
            augmentation=configuration.training.augmentation,
            fixed=work.fixed.numpy() if len(work.fixed) else None,
            mask_granularity=configuration.retention.granularity,
        )

    @property
    def _group(self) -> Tensor | None:
        return shared(self.layout, self.configuration.retention.granularity)

    def _statistics(self, work: RoundWork) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]:
        settings = self.configuration.adaptive_clipping
        if work.phase != TRAINING or not self.server_statistics:
            return None, None
        group = groups(self.layout, "coordinate" if settings.rule == "paper" else settings.granularity)
        given = work.standardisation
        # the retained coordinates of a group share one scale; that of the others has no meaning
        scale = torch.ones(int(group[-1]) + 1)
        scale[group[given.mask]] = given.scale[given.mask]
        centred = settings.centre or settings.rule == "paper"
        return given.mean.numpy() if centred else None, scale.numpy()
