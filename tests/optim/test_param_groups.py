"""Parameter groups from rules, and the parameters that get no weight decay."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from danling.optim import OPTIMIZERS, param_groups


class MyRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3))  # two dimensions, yet part of a normalisation


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = MyRMSNorm()
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight  # tied
        self.scale = nn.Parameter(torch.ones(()))
        self.mix = nn.Bilinear(2, 2, 2)


def names(groups):
    return {group["name"]: group["param_names"] for group in groups}


def test_without_rules_there_is_one_group():
    model = Transformer()
    (group,) = param_groups(model)
    expected = [name for name, _ in model.named_parameters()]
    assert (group["name"], group["param_names"]) == ("default", expected)
    assert [id(param) for param in group["params"]] == [id(param) for param in model.parameters()]


def test_no_decay_on_a_transformer():
    model = Transformer()
    groups = names(param_groups(model, no_decay=True))
    decayed = groups["default"]
    assert decayed == [
        "embed.weight",
        *(
            f"encoder.layers.{i}.{name}"
            for i in range(2)
            for name in ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
        ),
        "mix.weight",
    ]
    everything = [name for name, _ in model.named_parameters()]
    assert groups["default without decay"] == [name for name in everything if name not in decayed]


def test_rules_multiply_and_replace():
    model = Transformer()
    rules = [
        {"pattern": r"^encoder\.layers\.0\.", "lr_mult": 0.1, "weight_decay_mult": 0.5},
        {"pattern": r"^encoder", "lr_mult": 0.2, "betas": (0.5, 0.6)},
        {"pattern": r"embed", "lr": 7.0, "weight_decay": 3.0},
    ]
    groups = param_groups(model, rules, lr=1.0, weight_decay=0.2)
    by_name = {group["name"]: group for group in groups}
    assert list(by_name) == ["default", "embed", r"^encoder\.layers\.0\.", "^encoder"]  # by first parameter
    first, second, third = (by_name[rule["pattern"]] for rule in rules)
    assert (first["lr"], first["weight_decay"]) == (0.1, 0.1)
    assert (second["lr"], second["betas"], "weight_decay" in second) == (0.2, (0.5, 0.6), False)
    assert all(name.startswith("encoder.layers.1.") for name in second["param_names"])  # the first rule wins
    assert (third["lr"], third["weight_decay"], third["param_names"]) == (7.0, 3.0, ["embed.weight"])


def test_no_decay_wins_over_rules():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    rules = [{"pattern": "^0", "weight_decay_mult": 4.0}, {"pattern": "^1", "weight_decay": 9.0}]
    groups = param_groups(model, rules, no_decay=True, weight_decay=0.1)
    decay = {name: group["weight_decay"] for group in groups for name in group["param_names"]}
    assert decay == {"0.weight": 0.4, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([{"pattern": "decoder"}], "'decoder' matches no parameter"),
        ([{"pattern": "embed", "lr_mul": 2}], "unknown key 'lr_mul'; the nearest are lr_mult"),
        ([{"lr_mult": 2}], "'pattern'"),
        (["embed"], "'pattern'"),
        ([{"pattern": "("}], "no regular expression"),
        ([{"pattern": "embed", "lr": 1.0, "lr_mult": 2}], "lr and lr_mult: keep one"),
        ([{"pattern": "embed", "weight_decay_mult": 2}], "no weight_decay to multiply"),
        ([{"pattern": "embed", "lr_mult": 2}], "no lr to multiply"),
        ([{"pattern": "embed", "lr_mult": -2}], "lr_mult=-2"),
        ([{"pattern": "embed"}, {"pattern": "embed.weight"}], "has no effect"),
    ],
)
def test_wrong_rules_are_errors(rules, message):
    given_lr = 1.0 if message == "lr_mult=-2" else None
    with pytest.raises(ValueError) as caught:
        param_groups(Transformer(), rules, lr=given_lr)
    assert message in str(caught.value)


def test_rules_need_names():
    with pytest.raises(ValueError, match="pass the module"):
        param_groups(Transformer().parameters(), [{"pattern": "embed"}])
    with pytest.raises(ValueError, match="pass the module"):
        OPTIMIZERS.build("sgd", Transformer().parameters(), param_groups=[{"pattern": "embed"}])


def test_plain_parameters_are_split_by_dimensions_alone():
    model = Transformer()
    groups = param_groups(model.parameters(), no_decay=True)
    assert sorted(group["name"] for group in groups) == ["default", "default without decay"]
    for group in groups:
        assert "param_names" not in group
        assert all((param.ndim < 2) == ("without" in group["name"]) for param in group["params"])


def test_named_pairs_are_split_by_name_and_dimensions():
    pairs = [("a.weight", torch.ones(2, 2)), ("b.bias", torch.ones(2, 2)), ("c.gain", torch.ones(2))]
    pairs = [(name, nn.Parameter(value)) for name, value in pairs]
    assert names(param_groups(pairs, no_decay=True)) == {
        "default": ["a.weight"],
        "default without decay": ["b.bias", "c.gain"],
    }


def test_frozen_parameters_are_left_out_and_groups_are_never_empty():
    model = Transformer()
    model.embed.requires_grad_(False)
    groups = param_groups(model, [{"pattern": "embed", "lr_mult": 0.1}], lr=1.0)  # a rule may match frozen ones only
    assert [group["name"] for group in groups] == ["default"]
    assert "embed.weight" not in groups[0]["param_names"]
    assert param_groups(nn.ReLU()) == []


def test_prefixes_of_wrappers_are_removed():
    model = torch.compile(nn.Sequential(nn.Linear(2, 2)), backend="eager")
    wrapped = nn.DataParallel(model)
    assert next(name for name, _ in wrapped.named_parameters()) == "module._orig_mod.0.weight"
    groups = param_groups(wrapped, [{"pattern": r"^0\.weight$", "lr": 0.5}])
    assert names(groups) == {r"^0\.weight$": ["0.weight"], "default": ["0.bias"]}


@given(
    st.lists(st.sampled_from(["weight", "bias", "layers.0", "layers.1", "norm", "embed"]), unique=True), st.booleans()
)
def test_groups_are_a_partition_in_order(patterns, no_decay):
    model = Transformer()
    try:
        groups = param_groups(model, [{"pattern": pattern} for pattern in patterns], no_decay=no_decay)
    except ValueError as error:
        assert "no effect" in str(error)
        return
    order = {id(param): i for i, param in enumerate(model.parameters())}
    found = [order[id(param)] for group in groups for param in group["params"]]
    assert sorted(found) == list(range(len(order)))
    for group in groups:
        inside = [order[id(param)] for param in group["params"]]
        assert inside == sorted(inside)
        assert inside
    first = [order[id(group["params"][0])] for group in groups]
    assert first == sorted(first)


# Through the registry


def test_build_takes_rules_and_uses_the_optimizers_defaults():
    model = Transformer()
    rules = [{"pattern": "encoder", "lr_mult": 0.5, "weight_decay_mult": 2.0}]
    optimizer = OPTIMIZERS.build("adamw", model, param_groups=rules, no_decay=True)
    settings = {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert settings == {
        "default": (1e-3, 1e-2),
        "default without decay": (1e-3, 0.0),
        "encoder": (5e-4, 2e-2),
        "encoder without decay": (5e-4, 0.0),
    }
    optimizer = OPTIMIZERS.build(model.named_parameters(), type="sgd", lr=0.1, param_groups=rules[:0], no_decay=True)
    assert [group["name"] for group in optimizer.param_groups] == ["default without decay", "default"]


def test_build_knows_the_options_of_its_optimizer():
    model = nn.Linear(2, 2)
    OPTIMIZERS.build("sgd", model, param_groups=[{"pattern": "bias", "momentum": 0.5}])
    with pytest.raises(ValueError, match="unknown key 'momentum'"):
        OPTIMIZERS.build("adamw", model, param_groups=[{"pattern": "bias", "momentum": 0.5}])
    with pytest.raises(ValueError, match="no weight_decay to multiply"):
        OPTIMIZERS.build("rprop", model, param_groups=[{"pattern": "bias", "weight_decay_mult": 0.5}])
    # Where there is no weight decay, there is nothing to switch off.
    assert len(OPTIMIZERS.build("rprop", model, no_decay=True).param_groups) == 1


def test_sources_of_parameters():
    model = nn.Linear(2, 2)
    params = list(model.parameters())
    for source in (
        model,
        model.parameters(),
        model.named_parameters(),
        dict(model.named_parameters()).items(),
        [{"params": [params[0]]}, {"params": [params[1]], "lr": 0.5}],
    ):
        optimizer = OPTIMIZERS.build("sgd", source, lr=0.1)
        assert [id(param) for group in optimizer.param_groups for param in group["params"]] == [*map(id, params)]
    groups = [{"params": [params[0]]}]
    with pytest.raises(ValueError, match="groups already"):
        OPTIMIZERS.build("sgd", groups, no_decay=True)
    with pytest.raises(TypeError):
        OPTIMIZERS.build("sgd", params[0])
    with pytest.raises(ValueError, match="empty"):
        OPTIMIZERS.build("sgd", nn.ReLU())


def test_groups_save_and_load_with_their_names():
    model = Transformer()
    rules = [{"pattern": "encoder", "lr_mult": 0.5}]
    first = OPTIMIZERS.build("adamw", model, param_groups=rules, no_decay=True)
    second = OPTIMIZERS.build("adamw", Transformer(), param_groups=rules, no_decay=True)
    second.load_state_dict(first.state_dict())
    assert [group["param_names"] for group in second.param_groups] == [
        group["param_names"] for group in first.param_groups
    ]
