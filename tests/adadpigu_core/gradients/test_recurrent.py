import pytest
import torch
from torch import nn

KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


class Recurrent(nn.Module):
    """A recurrent network over [n, T, 4]; how the head reads it can be chosen."""

    def __init__(self, kind, *, read="mean", hidden=5, **options):
        super().__init__()
        self.network = KINDS[kind](4, hidden, batch_first=True, **options)
        directions = 2 if options.get("bidirectional") else 1
        self.head = nn.Linear(directions * (options.get("proj_size") or hidden), 3)
        self.read = read

    def forward(self, x):
        out, state = self.network(x)
        if self.read == "tokens":
            return self.head(out)
        if self.read == "state":  # the last layer's last state, or the cell that nobody outside of an LSTM sees
            last = state[1] if isinstance(state, tuple) else state
            return self.head(last[-1])
        return self.head(out.mean(1))


OPTIONS = {
    "plain": {},
    "without bias": {"bias": False},
    "both directions": {"bidirectional": True},
    "two layers": {"num_layers": 2},
    "two layers in both directions": {"num_layers": 2, "bidirectional": True},
    "of the state": {"read": "state"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(agree, built, records_of, kind, name):
    agree(built(lambda: Recurrent(kind, **OPTIONS[name])), records_of((6, 4)))


def test_other_activation(agree, built, records_of):
    def make():
        model = Recurrent("rnn", nonlinearity="relu")
        for parameter in model.network.parameters():
            nn.init.uniform_(parameter, 0.3, 0.9)  # stay on one side of the kink
        return model

    records = records_of((4, 4))
    records.features.abs_()
    agree(built(make), records)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # slower, no more
def test_projected(agree_or_refuse, built, records_of):
    agree_or_refuse(built(lambda: Recurrent("lstm", proj_size=3)), records_of((6, 4)), "network")


@pytest.mark.parametrize("kind", KINDS)
def test_loss_of_every_token(agree, built, records_of, per_token, kind):
    agree(built(lambda: Recurrent(kind, read="tokens")), records_of((6, 4)), per_token)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", ["weight_ih_l0", "weight_hh_l0", "bias_hh_l0"])
def test_frozen_parts(agree, built, records_of, kind, frozen):
    def make():
        model = Recurrent(kind)
        model.network.get_parameter(frozen).requires_grad_(False)
        return model

    agree(built(make), records_of((5, 4)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("positions", "count"), [(1, 3), (3, 3), (6, 1)])
def test_lengths(agree, built, records_of, kind, positions, count):
    agree(built(lambda: Recurrent(kind)), records_of((positions, 4), count))


class FromState(nn.Module):
    """The first state is learnt, one for all records."""

    def __init__(self):
        super().__init__()
        self.network, self.start, self.head = nn.GRU(4, 5, batch_first=True), nn.Parameter(torch.zeros(5)), None
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        out, _ = self.network(x, self.start.expand(1, len(x), -1).contiguous())
        return self.head(out.mean(1))


def test_learnt_first_state(agree_or_refuse, built, records_of):
    agree_or_refuse(built(FromState), records_of((5, 4)), "network", "start", "FromState")


class EncoderAndDecoder(nn.Module):
    """One network's state starts the other, and one of them runs twice."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(7, 4)
        self.encoder, self.decoder = nn.LSTM(4, 5, batch_first=True), nn.LSTM(4, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        words = self.words(x.long())
        _, state = self.encoder(words[:, :3])
        out, state = self.decoder(words[:, 3:], state)
        again, _ = self.decoder(words[:, :2], state)
        return self.head(torch.cat([out, again], 1).mean(1))


def test_one_state_starts_another(agree, built, records_of):
    agree(built(EncoderAndDecoder), records_of((6,), tokens=7))


CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}


class Unrolled(nn.Module):
    """A cell, called once for every position."""

    def __init__(self, kind, bias=True):
        super().__init__()
        self.cell, self.head = CELLS[kind](4, 5, bias=bias), nn.Linear(5, 3)
        self.pair = kind == "lstm"

    def forward(self, x):
        state = x.new_zeros(len(x), 5)
        state = (state, state) if self.pair else state
        outputs = []
        for position in range(x.shape[1]):
            state = self.cell(x[:, position], state)
            outputs.append(state[0] if self.pair else state)
        return self.head(torch.stack(outputs, 1).mean(1))


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("bias", [True, False])
def test_cells(agree, built, records_of, kind, bias):
    agree(built(lambda: Unrolled(kind, bias)), records_of((4, 4)))


class ByHand(nn.Module):
    """A recurrent network of two linear layers."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer, self.head = nn.Linear(4, 5), nn.Linear(5, 5, bias=False), nn.Linear(5, 3)

    def forward(self, x):
        state = x.new_zeros(len(x), 5)
        for position in range(x.shape[1]):
            state = torch.tanh(self.inner(x[:, position]) + self.outer(state))
        return self.head(state)


def test_by_hand(agree, built, records_of):
    agree(built(ByHand), records_of((5, 4)))
