import pytest
import torch
from torch import nn

from adadpigu_core.adaptive_clipping import Standardisation
from adadpigu_core.exceptions import ModelError
from adadpigu_core.gradients import GradientOptions, check_model, clipped_sum, recorder
from adadpigu_core.parameters import ParameterLayout

EMBED = 8
MOST = (
    ("full", "zero", "unit", "typical"),
    ("most", "random", "coordinate", "small"),
    ("rows", "near", "layer", "small"),
)


def causal(length):
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def hidden_positions(x):
    """Positions [n, T] that a record hides from itself, never the first."""
    return (x[:, :, 0] > 0.5) & (torch.arange(x.shape[1]) > 0)


class Attention(nn.Module):
    """One attention over [n, T, 8]; the query may be another sequence than keys and values."""

    def __init__(self, *, cross=False, mask="", padded=False, weights=False, heads=2, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(EMBED, heads, batch_first=True, **options)
        self.head = nn.Linear(EMBED, 3)
        self.cross, self.mask, self.padded, self.weights = cross, mask, padded, weights

    def forward(self, x):
        query = x[:, 1:4] if self.cross else x
        key, value = (x[..., : self.attention.kdim], x[..., -self.attention.vdim :]) if self.cross else (x, x)
        padding = None
        if self.padded:
            padding = hidden_positions(x)
        options = {"key_padding_mask": padding, "need_weights": self.weights, **self._mask(x, padding)}
        out, weights = self.attention(query, key, value, **options)
        out = self.head(torch.tanh(out).mean(1))
        return out + weights.square().sum((1, 2)).unsqueeze(1) * torch.arange(3) if self.weights else out

    def _mask(self, x, padding):
        length = x.shape[1]
        if self.mask == "bool":
            return {"attn_mask": causal(length)}
        if self.mask == "float":
            values = torch.linspace(-1, 1, length, dtype=x.dtype)
            return {"attn_mask": (values.unsqueeze(1) * values).masked_fill(causal(length), -torch.inf)}
        if self.mask == "causal":
            return {"attn_mask": causal(length), "is_causal": True}
        if self.mask == "of every record":
            hidden = (x[:, :, :1] * x[:, :, 1].unsqueeze(1) > 0.5) & causal(length)
            return {"attn_mask": hidden.repeat_interleave(2, dim=0)}
        return {}


SELF = {
    "plain": {},
    "one head": {"heads": 1},
    "without bias": {"bias": False},
    "mask": {"mask": "bool"},
    "added mask": {"mask": "float"},
    "causal": {"mask": "causal"},
    "mask of every record": {"mask": "of every record"},
    "padding": {"padded": True},
    "padding and mask": {"padded": True, "mask": "bool"},
    "with weights": {"weights": True},
    "bias for key and value": {"add_bias_kv": True},
    "zero": {"add_zero_attn": True},
    "all": {"padded": True, "mask": "bool", "add_bias_kv": True, "add_zero_attn": True, "weights": True},
}

CROSS = {
    "plain": {},
    "other key": {"kdim": 5},
    "other value": {"vdim": 3},
    "other key and value": {"kdim": 5, "vdim": 3},
    "without bias": {"kdim": 5, "vdim": 3, "bias": False},
    "padding": {"padded": True, "kdim": 5, "vdim": 3},
    "bias for key and value": {"add_bias_kv": True},
    "with weights": {"weights": True, "vdim": 5},
}


@pytest.mark.parametrize("name", SELF)
def test_attention_to_itself(agree, built, records_of, name):
    agree(built(lambda: Attention(**SELF[name])), records_of((5, EMBED)))


@pytest.mark.parametrize("name", CROSS)
def test_attention_to_others(agree, built, records_of, name):
    agree(built(lambda: Attention(cross=True, **CROSS[name])), records_of((5, EMBED)))


@pytest.mark.parametrize("frozen", ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"])
def test_frozen_parts(agree, built, records_of, frozen):
    def make():
        model = Attention()
        model.attention.get_parameter(frozen).requires_grad_(False)
        return model

    agree(built(make), records_of((5, EMBED)))


@pytest.mark.parametrize("count", [1, 5, 8])
def test_as_many_records_as_positions(agree, built, records_of, count):
    """Nothing may take one for the other."""
    agree(built(Attention), records_of((5, EMBED), count))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = Attention(), nn.Linear(EMBED, 3)

    def forward(self, x):
        inner = self.attention.attention
        x = x + inner(x, x, x, need_weights=False)[0]
        return self.attention(x)


def test_called_twice(agree, built, records_of):
    agree(built(Twice), records_of((5, EMBED)))


class Sequence(nn.Module):
    """Calls of one attention, to itself or to others, in some order."""

    def __init__(self, order, **options):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(EMBED, 2, batch_first=True, **options), nn.Linear(EMBED, 3)
        self.other, self.order = nn.Linear(EMBED, EMBED), order

    def forward(self, x):
        others = torch.tanh(self.other(x))[:, 1:]
        for call in self.order:
            seen = x if call == "itself" else others
            x = x + self.attention(x, seen, seen, need_weights=False)[0]
        return self.head(torch.tanh(x).mean(1))


ORDERS = [
    ("itself", "others"),
    ("others", "itself"),
    ("itself", "others", "itself"),
    ("others", "others"),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("limit", [None, 1], ids=["one batch", "record by record"])
@pytest.mark.parametrize("order", ORDERS)
def test_called_in_both_ways(agree, built, records_of, order, limit, bias):
    """The same matrix as a whole and in thirds: its gradients must be added up before they are squared."""
    model = built(lambda: Sequence(order, bias=bias))
    settings = (*(("third of the rows", mean, "layer", "small") for mean in ("zero", "random", "near")), *MOST)
    agree(model, records_of((5, EMBED)), options=GradientOptions(memory_limit=limit), settings=settings)


@pytest.mark.parametrize("order", ORDERS)
def test_called_in_both_ways_is_accepted(built, cross_entropy, order):
    check_model(built(lambda: Sequence(order)), cross_entropy, (5, EMBED), 3)


def test_what_is_counted_twice_is_refused(monkeypatch, built, records_of, cross_entropy):
    """If uses of overlapping coordinates were not put together."""
    monkeypatch.setattr(recorder, "_groups", lambda runs: [[run] for run in runs])
    model = built(lambda: Sequence(("itself", "others")))
    given = Standardisation.identity(ParameterLayout.of(model).num_parameters)
    with pytest.raises(ModelError, match="counted twice"):
        clipped_sum(model, cross_entropy, records_of((5, EMBED)), given, 1.0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("positions", [1, 5])
def test_a_third_alone_is_retained(agree, built, records_of, positions, seed):
    settings = (("third of the rows", "random", "layer", "small"),)
    model = built(lambda: Sequence(("others",)))
    agree(model, records_of((positions + 1, EMBED)), settings=settings, seed=seed)


class Encoder(nn.Module):
    def __init__(self, layers=1, padded=False, mask=False, **options):
        super().__init__()
        options = {"d_model": EMBED, "nhead": 2, "dim_feedforward": 12, "dropout": 0.0, "activation": "gelu", **options}
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(batch_first=True, **options) for _ in range(layers))
        self.head = nn.Linear(EMBED, 3)
        self.padded, self.mask = padded, mask

    def forward(self, x):
        padding = hidden_positions(x)
        for layer in self.layers:
            x = layer(x, causal(x.shape[1]) if self.mask else None, padding if self.padded else None)
        return self.head(x.mean(1))


ENCODERS = {
    "plain": {},
    "normalised first": {"norm_first": True},
    "without bias": {"bias": False},
    "padding": {"padded": True},
    "mask": {"mask": True},
    "two": {"layers": 2, "norm_first": True},
}


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("training", [True, False])
def test_encoder_layer(agree, built, records_of, name, training):
    """In evaluation mode, torch has a fast path that knows no gradients."""
    model = built(lambda: Encoder(**ENCODERS[name])).train(training)
    with torch.no_grad():
        agree(model, records_of((5, EMBED)))


def test_encoder(agree, built, records_of):
    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(EMBED, 2, 12, dropout=0.0, activation="gelu", batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(EMBED, 3)

        def forward(self, x):
            return self.head(self.encoder(x).mean(1))

    agree(built(Stacked), records_of((5, EMBED)))


def test_decoder_layer(agree, built, records_of):
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerDecoderLayer(EMBED, 2, 12, dropout=0.0, activation="gelu", batch_first=True)
            self.head = nn.Linear(EMBED, 3)

        def forward(self, x):
            return self.head(self.layer(x[:, :2], x[:, 2:]).mean(1))

    agree(built(Decoder), records_of((5, EMBED)))


class Language(nn.Module):
    """Words and positions, attention, and a head that shares its weights with the words."""

    def __init__(self, words=11):
        super().__init__()
        self.words = nn.Embedding(words, EMBED)
        self.positions = nn.Parameter(torch.zeros(6, EMBED))
        self.body = nn.TransformerEncoderLayer(
            EMBED, 2, 12, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.head = nn.Linear(EMBED, words, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x):
        return self.head(self.body(self.words(x.long()) + self.positions, causal(6)))


def test_language_model(agree, built, records_of, per_token):
    agree(built(Language), records_of((6,), tokens=11), per_token)


class Written(nn.Module):
    """Attention from its parts."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(EMBED, 3 * EMBED), nn.Linear(EMBED, 3)

    def forward(self, x):
        shape = (len(x), x.shape[1], 2, EMBED // 2)
        query, key, value = (part.view(shape).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(x.shape)).mean(1)


def test_attention_from_its_parts(agree, built, records_of):
    agree(built(Written), records_of((5, EMBED)))
