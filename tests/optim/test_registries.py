"""Optimizers and schedulers by name: every name builds, every typo is told."""

import builtins
import inspect
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from danling.optim import OPTIMIZERS, SCHEDULERS, LRScheduler

TORCH = {
    "sgd": "SGD",
    "asgd": "ASGD",
    "adam": "Adam",
    "adamw": "AdamW",
    "adadelta": "Adadelta",
    "adagrad": "Adagrad",
    "adamax": "Adamax",
    "nadam": "NAdam",
    "radam": "RAdam",
    "rmsprop": "RMSprop",
    "rprop": "Rprop",
    "lbfgs": "LBFGS",
    "sparse_adam": "SparseAdam",
    "adafactor": "Adafactor",
    "muon": "Muon",
    "torch_adam": "Adam",
    "torch_adamw": "AdamW",
}
CPU_DEEPSPEED = ("cpu_adam", "cpu_adamw", "cpu_adagrad", "ds_adagrad", "cpu_lion")
FUSED = ("fused_adam", "fused_adamw", "fused_lamb", "fused_lion", "ds_adam", "ds_adamw", "ds_lamb", "ds_lion")


def weights(seed=0):
    return nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)))


def two_steps(optimizer, param, sparse=False):
    def closure():
        optimizer.zero_grad()
        grad = torch.linspace(-1, 1, param.numel(), device=param.device).reshape(param.shape)
        param.grad = grad.to_sparse() if sparse else grad
        return (param * grad).sum().detach()

    for _ in range(2):
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    return param.detach().clone()


@pytest.mark.parametrize("name", TORCH)
def test_every_torch_optimizer_is_torchs_own(name):
    kind = getattr(torch.optim, TORCH[name])
    assert OPTIMIZERS.lookup(name) is kind
    mine, theirs = weights(), weights()
    built = OPTIMIZERS.build(name, params=[mine], lr=0.02)
    assert type(built) is kind
    reference = kind([theirs], lr=0.02)
    assert built.defaults == reference.defaults
    sparse = name == "sparse_adam"
    moved = two_steps(built, mine, sparse)
    assert torch.equal(moved, two_steps(reference, theirs, sparse))
    assert not torch.equal(moved, weights().detach())


def test_all_torch_optimizers_have_a_name():
    for name in torch.optim.__all__:
        kind = getattr(torch.optim, name)
        if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer:
            assert OPTIMIZERS.lookup(name) is kind


@pytest.mark.parametrize("name", ["lamb", "lion"])
def test_lamb_and_lion_need_no_deepspeed(name):
    library = _import_quietly("pytorch_optimizer")
    kind = {"lamb": library.Lamb, "lion": library.Lion}[name]
    assert OPTIMIZERS.lookup(name) is kind
    mine, theirs = weights(), weights()
    built = two_steps(OPTIMIZERS.build(name, params=[mine], lr=0.02, weight_decay=0.1), mine)
    assert torch.equal(built, two_steps(kind([theirs], lr=0.02, weight_decay=0.1), theirs))
    # Their classes swallow any keyword.
    with pytest.raises(TypeError, match="no argument 'weight_decy'; accepted are weight_decay"):
        OPTIMIZERS.build(name, params=[weights()], weight_decy=0.1)


def test_lion_follows_its_published_update():
    _import_quietly("pytorch_optimizer")
    param, expected = weights(), weights().detach()
    optimizer = OPTIMIZERS.build("lion", [param], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    momentum = torch.zeros_like(expected)
    for step in range(3):
        grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(10 + step))
        param.grad = grad.clone()
        optimizer.step()
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * torch.sign(0.9 * momentum + 0.1 * grad)
        momentum = 0.99 * momentum + 0.01 * grad
    torch.testing.assert_close(param.detach(), expected)


def _import_quietly(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


@pytest.fixture
def deepspeed():
    """DeepSpeed, if its CPU kernels can be built here."""
    library = _import_quietly("deepspeed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        builder = pytest.importorskip("deepspeed.ops.op_builder").CPUAdamBuilder()
        if not builder.is_compatible(verbose=False):
            pytest.skip("DeepSpeed cannot build its CPU kernels here")
    return library


@pytest.mark.timeout(
    1200
)  # the first use of each kernel compiles it, which takes a minute: one for CI, all for `just faults`
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "cpu_adam" else pytest.mark.faults)
        for name in CPU_DEEPSPEED
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_deepspeeds_cpu_optimizers(name, deepspeed):
    param = weights()
    optimizer = OPTIMIZERS.build(name, params=[param], lr=0.02, weight_decay=0.1)
    assert type(optimizer).__module__.startswith("deepspeed.ops.")
    moved = two_steps(optimizer, param)
    reference = weights()
    kinds = {
        "cpu_adam": (torch.optim.Adam, {}),
        "cpu_adamw": (torch.optim.AdamW, {}),
        "cpu_adagrad": (torch.optim.Adagrad, {}),
        "ds_adagrad": (torch.optim.Adagrad, {}),
    }
    if name in kinds:
        kind, options = kinds[name]
        expected = two_steps(kind([reference], lr=0.02, weight_decay=0.1, **options), reference)
        torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(moved, weights().detach())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="DeepSpeed's fused optimizers need a GPU")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FUSED)
def test_deepspeeds_fused_optimizers(name):
    pytest.importorskip("deepspeed")
    param = nn.Parameter(weights().detach().cuda())
    before = param.detach().clone()
    assert not torch.equal(two_steps(OPTIMIZERS.build(name, params=[param], lr=0.02), param), before)


@pytest.mark.filterwarnings("ignore")
def test_deepspeeds_names_mean_deepspeeds_classes():
    pytest.importorskip("deepspeed")
    from deepspeed.ops import adagrad, adam, lamb, lion

    for name, kind in {
        "fused_adam": adam.FusedAdam,
        "fused_adamw": adam.FusedAdam,
        "ds_adam": adam.FusedAdam,
        "ds_adamw": adam.FusedAdam,
        "fused_lamb": lamb.FusedLamb,
        "ds_lamb": lamb.FusedLamb,
        "fused_lion": lion.FusedLion,
        "ds_lion": lion.FusedLion,
        "cpu_adam": adam.DeepSpeedCPUAdam,
        "cpu_adamw": adam.DeepSpeedCPUAdam,
        "cpu_adagrad": adagrad.DeepSpeedCPUAdagrad,
        "ds_adagrad": adagrad.DeepSpeedCPUAdagrad,
        "cpu_lion": lion.DeepSpeedCPULion,
    }.items():
        assert OPTIMIZERS.lookup(name) is kind
        assert "params" in OPTIMIZERS.accepts(name)
        assert "model_params" not in OPTIMIZERS.accepts(name)
    # The mode is what the name says, and cannot be contradicted.
    assert "adam_w_mode" not in OPTIMIZERS.accepts("fused_adam")
    assert "adamw_mode" not in OPTIMIZERS.accepts("cpu_adamw")
    # DeepSpeed being importable changes no other name.
    assert OPTIMIZERS.lookup("adamw") is torch.optim.AdamW


def test_names_are_forgiving():
    for name in ("AdamW", "adam_w", "ADAMW", "adam-w", "Adam W"):
        assert OPTIMIZERS.lookup(name) is torch.optim.AdamW
        assert name in OPTIMIZERS
    assert SCHEDULERS.lookup("CosineAnnealingLR") is torch.optim.lr_scheduler.CosineAnnealingLR
    assert "cosin" not in SCHEDULERS


def test_unknown_names_offer_the_nearest():
    with pytest.raises(ValueError, match=r"unknown optimizer 'adamm'; the nearest names are adam, "):
        OPTIMIZERS.build("adamm", [weights()])
    with pytest.raises(ValueError, match=r"nearest names are cosine\b"):
        SCHEDULERS.build(torch.optim.SGD([weights()]), type="cosin", total_steps=3)
    with pytest.raises(ValueError, match="unknown"):
        OPTIMIZERS.accepts("nothing")
    with pytest.raises(ValueError, match="is a string"):
        OPTIMIZERS.build([weights()], type=3)


def test_ways_of_building_are_equivalent():
    def described(optimizer):
        return type(optimizer), optimizer.defaults, [group["params"] for group in optimizer.param_groups]

    param = weights()
    config = {"type": "sgd", "lr": 0.1, "momentum": 0.5}
    expected = described(torch.optim.SGD([param], lr=0.1, momentum=0.5))
    for built in (
        OPTIMIZERS.build("sgd", params=[param], lr=0.1, momentum=0.5),
        OPTIMIZERS.build("sgd", [param], lr=0.1, momentum=0.5),
        OPTIMIZERS.build("sgd", [param], 0.1, 0.5),
        OPTIMIZERS.build([param], type="sgd", lr=0.1, momentum=0.5),
        OPTIMIZERS.build([param], **config),
        OPTIMIZERS.build({**config, "params": [param]}),
        OPTIMIZERS.build({**config, "lr": 9.0}, params=[param], lr=0.1),
        OPTIMIZERS.build(config, [param]),
        OPTIMIZERS.build({"lr": 0.1, "momentum": 0.5}, params=[param], type="SGD"),
        OPTIMIZERS.build("sgd", (p for p in [param]), type="SGD", lr=0.1, momentum=0.5),
    ):
        assert described(built) == expected
        assert built.param_groups[0]["params"][0] is param
    assert config == {"type": "sgd", "lr": 0.1, "momentum": 0.5}


def test_chanfig_configurations_build():
    chanfig = pytest.importorskip("chanfig")
    config = chanfig.NestedDict({"optim": {"type": "adamw", "lr": 0.1, "betas": [0.8, 0.9]}})
    config.optim.param_groups = [{"pattern": "bias", "lr_mult": 0.5}]
    optimizer = OPTIMIZERS.build(nn.Linear(2, 2), **config.optim)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.05]


def test_the_optimizer_may_come_first_or_by_keyword():
    optimizer = torch.optim.SGD([weights()], lr=1.0)
    config = {"type": "step", "step_size": 5}
    for built in (
        SCHEDULERS.build(optimizer, **config),
        SCHEDULERS.build(optimizer, 5, type="step"),
        SCHEDULERS.build("StepLR", optimizer, step_size=5),
        SCHEDULERS.build("step", optimizer=optimizer, step_size=5),
        SCHEDULERS.build({**config, "optimizer": optimizer}),
    ):
        assert (type(built), built.optimizer, built.step_size) == (
            torch.optim.lr_scheduler.StepLR,
            optimizer,
            5,
        )


def test_chained_takes_the_optimizer_wherever_it_is():
    optimizer = torch.optim.SGD([weights()], lr=1.0)
    parts = [torch.optim.lr_scheduler.ConstantLR(optimizer), torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]
    for built in (
        SCHEDULERS.build("chained", optimizer, schedulers=parts),
        SCHEDULERS.build("chained", optimizer=optimizer, schedulers=parts),
        SCHEDULERS.build("chained", parts),
        SCHEDULERS.build("chained", parts, optimizer=optimizer),
        SCHEDULERS.build("chained", schedulers=parts),
    ):
        assert built.optimizer is optimizer
        assert list(built._schedulers) == parts


def test_none_or_two_names_are_errors():
    with pytest.raises(ValueError, match="no name of optimizer"):
        OPTIMIZERS.build([weights()], lr=0.1)
    with pytest.raises(ValueError, match="'sgd' and 'adam': keep one"):
        OPTIMIZERS.build("sgd", [weights()], type="adam")
    with pytest.raises(ValueError, match="keep one"):
        OPTIMIZERS.build({"type": "sgd"}, [weights()], type="adam")
    with pytest.raises(TypeError, match="given twice"):
        OPTIMIZERS.build("sgd", [weights()], params=[weights()])


def test_unknown_keywords_list_the_accepted_ones():
    with pytest.raises(TypeError, match="'sgd' has no argument 'momentun'; accepted are momentum, "):
        OPTIMIZERS.build("sgd", [weights()], momentun=0.9)
    with pytest.raises(TypeError, match="accepted are lr, "):
        OPTIMIZERS.build("sgd", [weights()], learning_rate=0.9)
    optimizer = torch.optim.SGD([weights()], lr=1.0)
    with pytest.raises(TypeError, match="accepted are step_size, "):
        SCHEDULERS.build(optimizer, type="step", stepsize=3)
    with pytest.raises(TypeError, match=r"no argument 'gamma'.*'exponential_lr' of torch has it"):
        SCHEDULERS.build(optimizer, type="exponential", total_steps=3, gamma=0.9)
    with pytest.raises(TypeError, match=r"'cosine_annealing_lr' of torch has it"):
        SCHEDULERS.build(optimizer, type="cosine", T_max=3)
    with pytest.raises(TypeError, match="has no argument 'power'"):
        SCHEDULERS.build(optimizer, type="linear", total_steps=3, power=2)
    with pytest.raises(TypeError, match="has no argument 'strategy'"):
        SCHEDULERS.build(optimizer, type="linear", total_steps=3, strategy="cosine")


def test_accepts_tells_where_a_default_applies():
    assert {"total_steps", "warmup_steps", "timescale", "optimizer"} <= set(SCHEDULERS.accepts("inverse_sqrt"))
    assert "timescale" not in SCHEDULERS.accepts("cosine")
    assert SCHEDULERS.accepts("step") == ("optimizer", "step_size", "gamma", "last_epoch")
    assert {"params", "lr", "param_groups", "no_decay"} <= set(OPTIMIZERS.accepts("adamw"))


BY_CLASS = [
    name
    for name, kind in vars(torch.optim.lr_scheduler).items()
    if inspect.isclass(kind)
    and issubclass(kind, torch.optim.lr_scheduler.LRScheduler)
    and kind is not torch.optim.lr_scheduler.LRScheduler
    and not name.startswith("_")
]
ARGUMENTS = {
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [2]},
    "CosineAnnealingLR": {"T_max": 3},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "CyclicLR": {"base_lr": 0.1, "max_lr": 1.0, "cycle_momentum": False},
    "OneCycleLR": {"max_lr": 1.0, "total_steps": 5, "cycle_momentum": False},
    "LambdaLR": {"lr_lambda": lambda epoch: 0.5**epoch},
    "MultiplicativeLR": {"lr_lambda": lambda epoch: 0.5},
    "ExponentialLR": {"gamma": 0.9},
    "PolynomialLR": {"power": 2.0},
}
SHORT = {
    "step": "StepLR",
    "multistep": "MultiStepLR",
    "cosine_annealing": "CosineAnnealingLR",
    "cosine_warm_restarts": "CosineAnnealingWarmRestarts",
    "reduce_on_plateau": "ReduceLROnPlateau",
    "cyclic": "CyclicLR",
    "one_cycle": "OneCycleLR",
    "lambda": "LambdaLR",
    "multiplicative": "MultiplicativeLR",
    "sequential": "SequentialLR",
    "chained": "ChainedScheduler",
    "step_lr": "StepLR",
    "linear_lr": "LinearLR",
    "exponential_lr": "ExponentialLR",
}


def test_short_names_of_schedulers():
    for short, name in SHORT.items():
        assert SCHEDULERS.lookup(short) is getattr(torch.optim.lr_scheduler, name)


@pytest.mark.parametrize("name", BY_CLASS)
def test_every_torch_scheduler_is_torchs_own(name):
    def run(build):
        optimizer = torch.optim.SGD([weights()], lr=1.0)
        arguments = dict(ARGUMENTS.get(name, {}))
        if name in ("SequentialLR", "ChainedScheduler"):
            parts = [torch.optim.lr_scheduler.ConstantLR(optimizer), LRScheduler(optimizer, 4)]
            arguments = {"schedulers": parts} | ({"milestones": [2]} if name == "SequentialLR" else {})
        scheduler = build(optimizer=optimizer, **arguments)
        rates = []
        for _ in range(4):
            optimizer.step()
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            rates.append(optimizer.param_groups[0]["lr"])
        return type(scheduler), rates

    kind = getattr(torch.optim.lr_scheduler, name)
    assert run(lambda **kwargs: SCHEDULERS.build(type=name, **kwargs)) == run(kind)


# Users' own components


@pytest.fixture
def registered():
    """Forget what a test registers."""
    before = [(registry, dict(registry), dict(registry.getattr("names"))) for registry in (OPTIMIZERS, SCHEDULERS)]
    yield
    for registry, content, names in before:
        dict.clear(registry)
        for key, value in content.items():
            dict.__setitem__(registry, key, value)
        registry.setattr("names", names)


def test_users_register_their_own(registered):
    @OPTIMIZERS.register("my_opt")
    class MyOptimizer(torch.optim.SGD):
        pass

    @OPTIMIZERS.register
    def open_minded(params, **kwargs):
        return torch.optim.SGD(params, lr=kwargs["rate"])

    @SCHEDULERS.register("stairs")
    class Stairs(LRScheduler):
        def stairs(self, progress, *, n=2):
            return float(progress > 0.5)

    assert type(OPTIMIZERS.build("My-Opt", [weights()], lr=0.1)) is MyOptimizer
    assert OPTIMIZERS.build("open_minded", params=[weights()], rate=0.3).param_groups[0]["lr"] == 0.3
    with pytest.raises(TypeError, match="momentun"):
        OPTIMIZERS.build("my_opt", [weights()], momentun=0.1)
    optimizer = torch.optim.SGD([weights()], lr=1.0)
    built = SCHEDULERS.build(optimizer, type="stairs", total_steps=4, strategy="stairs", n=3)
    assert isinstance(built, Stairs)
    with pytest.raises(ValueError, match="already registered"):
        OPTIMIZERS.register(MyOptimizer, "MY OPT")
    OPTIMIZERS.register(torch.optim.Adam, "myopt", override=True)
    assert OPTIMIZERS.lookup("my_opt") is torch.optim.Adam


def test_a_component_may_take_its_parameters_anywhere(registered):
    def backwards(lr, parameters):
        return torch.optim.SGD(parameters, lr=lr)

    OPTIMIZERS.register(backwards, "backwards")
    param = weights()
    for built in (
        OPTIMIZERS.build("backwards", [param], lr=0.2),
        OPTIMIZERS.build("backwards", params=[param], lr=0.2),
    ):
        assert built.param_groups[0]["params"] == [param]
    assert OPTIMIZERS.accepts("backwards") == ("params", "lr", "param_groups", "no_decay")


# Missing libraries


@pytest.mark.parametrize(
    ("name", "library", "extra"),
    [("lamb", "pytorch_optimizer", "optimizers"), ("lion", "pytorch_optimizer", "optimizers")]
    + [(name, "deepspeed", "deepspeed") for name in (*CPU_DEEPSPEED, *FUSED)],
)
def test_a_missing_library_names_its_extra(name, library, extra, monkeypatch):
    real = builtins.__import__

    def without(module, *args, **kwargs):
        if module.partition(".")[0] == library:
            raise ModuleNotFoundError(f"No module named {library!r}")
        return real(module, *args, **kwargs)

    import importlib

    for module in [module for module in sys.modules if module.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", without)
    found = importlib.import_module

    def import_module(module, package=None):
        if module.partition(".")[0] == library:
            raise ModuleNotFoundError(f"No module named {library!r}")
        return found(module, package)

    monkeypatch.setattr(importlib, "import_module", import_module)
    assert name in OPTIMIZERS  # registration loads nothing
    for call in (OPTIMIZERS.lookup, OPTIMIZERS.accepts, lambda name: OPTIMIZERS.build(name, [weights()])):
        with pytest.raises(ImportError) as caught:
            call(name)
        assert f'pip install "danling-optim[{extra}]"' in str(caught.value)


def test_importing_loads_no_optional_library():
    code = """
import sys
import danling.optim
assert "chanfig" not in sys.modules  # until a registry is wanted
from danling.optim import OPTIMIZERS, SCHEDULERS
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"pytorch_optimizer", "deepspeed", "matplotlib", "pandas"}, loaded
assert {"OPTIMIZERS", "SCHEDULERS"} <= set(dir(danling.optim))
assert OPTIMIZERS is danling.optim.OPTIMIZERS
import chanfig
assert isinstance(OPTIMIZERS, chanfig.Registry)
assert "adamw" in repr(OPTIMIZERS) and "adamw" in list(OPTIMIZERS.keys())
try:
    danling.optim.nothing
except AttributeError as error:
    assert "nothing" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)
