"""Samples of casts, copies, factories and in-place forms."""

import torch
from tensors.oracle.sample import INTS, STANDARD, Sample

FP32 = (torch.float32,)
FULL = tuple(name for name in STANDARD if name not in ("empty_element", "empty_batch"))


def method(name, *args, kind="normal", grad=True, **settings):
    return [Sample(lambda d, x: getattr(x, name)(*args, **settings), (kind,), dtypes=FP32, grad=grad)]


def on_copy(name, *args, kind="normal", grad=True):
    """An in-place form on a copy."""
    return [Sample(lambda d, x: getattr(x.clone(), name)(*args), (kind,), dtypes=FP32, grad=grad)]


def drawn(name, *args, kind="normal"):
    """A random op: structure and dtype only, because draws differ."""
    return [Sample(lambda d, x: torch.isnan(getattr(x.clone(), name)(*args)), (kind,), FULL, FP32, grad=False)]


def ask(name):
    return [
        Sample(
            lambda d, x: bool(getattr(x, name)()),
            layouts=FULL,
            dtypes=FP32,
            grad=False,
            reference=lambda d, es: bool(getattr(es[0], name)()),
        )
    ]


SAMPLES = {
    **{name: method(name) for name in "double float clone contiguous cpu".split()},
    **{name: method(name, grad=False) for name in "half bfloat16 bool byte char short int long detach".split()},
    **{name: method(name) for name in "cfloat cdouble".split()},
    "chalf": [
        Sample(lambda d, x: torch.view_as_real(x.chalf()), layouts=FULL, dtypes=FP32, grad=False, isolated=False)
    ],
    "_has_compatible_shallow_copy_type": [
        Sample(
            lambda d, x: torch._has_compatible_shallow_copy_type(x, x.clone()), layouts=FULL, dtypes=FP32, grad=False
        )
    ],
    "dequantize": method("dequantize", grad=False),
    "to": [
        Sample(lambda d, x: x.to(torch.float64), dtypes=FP32),
        Sample(lambda d, x: x.to("cpu", torch.float16, copy=True), dtypes=FP32, grad=False),
        Sample(lambda d, x, y: x.to(y), ("normal", "index"), dtypes=FP32, grad=False),
    ],
    "type": [Sample(lambda d, x: x.type(torch.float64), dtypes=FP32)],
    "type_as": [Sample(lambda d, x, y: x.type_as(y), ("normal", "bool"), dtypes=FP32, grad=False)],
    "view_as_real": [Sample(lambda d, x: torch.view_as_real(x), ("complex",), dtypes=FP32)],
    "view_as_complex": [
        Sample(lambda d, x: torch.view_as_complex(torch.stack([x, x + 1], -1)), dtypes=FP32),
    ],
    **{
        name: ask(name)
        for name in "is_floating_point is_complex is_signed is_inference is_conj is_neg is_pinned".split()
    },
    **{name: ask(name) for name in "is_shared is_distributed element_size".split()},
    "get_device": [
        Sample(lambda d, x: x.get_device(), layouts=FULL, dtypes=FP32, grad=False, reference=lambda d, es: -1)
    ],
    "numel": [
        Sample(
            lambda d, x: torch.numel(x),
            layouts=FULL,
            dtypes=INTS,
            grad=False,
            reference=lambda d, es: sum(e.numel() for e in es),
        )
    ],
    "dim_order": [
        Sample(
            lambda d, x: list(x.dim_order()),
            layouts=FULL,
            dtypes=FP32,
            grad=False,
            reference=lambda d, es: list(range(es[0].dim() + 1)),
        )
    ],
    **{
        name: [
            Sample(
                lambda d, x, n=name: getattr(torch, n)(x > 0),
                layouts=FULL,
                dtypes=FP32,
                grad=False,
                reference=lambda d, es, n=name: getattr(torch, n)(torch.cat([e.flatten() for e in es]) > 0),
            )
        ]
        for name in ("_is_all_true", "_is_any_true")
    },
    "module_load": [Sample(lambda d, x, y: x.clone().module_load(y), ("normal", "normal"), dtypes=FP32, grad=False)],
    "result_type": [
        Sample(
            lambda d, x: torch.result_type(x, 1.5),
            layouts=FULL,
            dtypes=INTS,
            grad=False,
            reference=lambda d, es: torch.float32,
        )
    ],
    "share_memory_": [Sample(lambda d, x: x.clone().share_memory_(), dtypes=FP32, layouts=FULL, grad=False)],
    "zeros_like": [Sample(lambda d, x: torch.zeros_like(x), grad=False)],
    "ones_like": [Sample(lambda d, x: torch.ones_like(x, dtype=torch.int32), grad=False)],
    "full_like": [Sample(lambda d, x: torch.full_like(x, 3), grad=False)],
    "empty_like": [Sample(lambda d, x: torch.empty_like(x).zero_(), grad=False)],
    "rand_like": [Sample(lambda d, x: torch.rand_like(x) > 2, dtypes=FP32, grad=False)],
    "randn_like": [Sample(lambda d, x: torch.isnan(torch.randn_like(x)), dtypes=FP32, grad=False)],
    "randint_like": [Sample(lambda d, x: torch.randint_like(x, 5, 6), dtypes=FP32, grad=False)],
    **{
        name: [
            Sample(
                lambda d, x, n=name, a=args: getattr(x, n)(*a) * 0,
                layouts=FULL,
                dtypes=FP32,
                grad=False,
                reference=lambda d, es, n=name, a=args: getattr(es[0], n)(*a) * 0,
            )
        ]
        for name, args in {
            "new_zeros": ((2, 3),),
            "new_ones": ((2, 3),),
            "new_full": ((2,), 4.0),
            "new_tensor": ([1.0, 2.0],),
        }.items()
    },
    **{
        name: [
            Sample(
                lambda d, x, n=name, a=args: list(getattr(x, n)(*a).shape),
                layouts=FULL,
                dtypes=FP32,
                grad=False,
                reference=lambda d, es: [2, 3],
            )
        ]
        for name, args in {"new_empty": ((2, 3),), "new_empty_strided": ((2, 3), (3, 1))}.items()
    },
    "bernoulli": [Sample(lambda d, x: torch.bernoulli(x) > 1, ("unit",), dtypes=FP32, grad=False)],
    "normal": [
        Sample(lambda d, x: torch.normal(x, torch.zeros_like(x)), dtypes=FP32, grad=False),
        Sample(lambda d, x: torch.normal(0.0, x) > 1e9, ("positive",), dtypes=FP32, grad=False),
    ],
    "_standard_gamma": [Sample(lambda d, x: torch._standard_gamma(x) < 0, ("positive",), dtypes=FP32, grad=False)],
    "poisson": [Sample(lambda d, x: torch.poisson(x) < 0, ("positive",), dtypes=FP32, grad=False)],
    "binomial": [
        Sample(
            lambda d, x, p: torch.binomial(x.round(), p) < 0,
            ("positive", "unit"),
            dtypes=FP32,
            grad=False,
            isolated=False,
        ),
    ],
    "multinomial": [
        Sample(lambda d, x: torch.multinomial(x, 2) < 0, ("unit",), ("sequences", "single", "equal"), FP32, grad=False),
        Sample(lambda d, x: torch.multinomial(x, 1).sum(-1) < 0, ("unit",), ("flat", "sequences"), FP32, grad=False),
        Sample(
            lambda d, x: torch.multinomial(x, 3, replacement=True).sum(-1) < 0, ("unit",), ("flat",), FP32, grad=False
        ),
    ],
    "copy_": [
        Sample(lambda d, x, y: torch.zeros_like(x).copy_(y), ("normal", "normal"), dtypes=FP32),
    ],
    "fill_": on_copy("fill_", 2.5),
    "fill": [Sample(lambda d, x: torch.fill(x, 2.0), dtypes=FP32)],
    "zero_": on_copy("zero_"),
    "bernoulli_": drawn("bernoulli_", 0.5),
    "cauchy_": drawn("cauchy_"),
    "exponential_": drawn("exponential_"),
    "geometric_": drawn("geometric_", 0.5),
    "log_normal_": drawn("log_normal_"),
    "normal_": drawn("normal_"),
    "random_": drawn("random_", 5),
    "uniform_": drawn("uniform_"),
    "fill_diagonal_": [
        Sample(
            lambda d, x: x.clone().fill_diagonal_(9.0),
            layouts=("sequences", "channel_first", "batch_second"),
            dtypes=FP32,
        ),
        Sample(
            lambda d, x: x.clone().fill_diagonal_(9.0, wrap=True),
            layouts=("sequences",),
            dtypes=FP32,
            shapes=((9, 3), (2, 3)),
            ragged=(0,),
        ),
    ],
    "equal": [
        Sample(
            lambda d, x, y: torch.equal(x, x.clone()) and not torch.equal(x, y + 9), ("normal",) * 2, FULL, FP32, False
        )
    ],
    "allclose": [
        Sample(lambda d, x: torch.allclose(x, x.clone()), layouts=FULL, dtypes=FP32, grad=False),
    ],
    "is_same_size": [
        Sample(
            lambda d, x: torch.is_same_size(x, x.clone()),
            layouts=FULL,
            dtypes=FP32,
            grad=False,
            reference=lambda d, es: True,
        )
    ],
    "isin": [Sample(lambda d, x: torch.isin(x, torch.tensor([1, 2])), ("index",), dtypes=FP32, grad=False)],
    "bucketize": [Sample(lambda d, x: torch.bucketize(x, torch.tensor([-1.0, 0.0, 1.0])), dtypes=FP32, grad=False)],
    "searchsorted": [
        Sample(lambda d, x: torch.searchsorted(torch.tensor([-1.0, 0.0, 1.0]), x), dtypes=FP32, grad=False)
    ],
    "prelu": [
        Sample(lambda d, x: torch.nn.functional.prelu(x, torch.tensor(0.3, dtype=x.dtype).reshape(1)), dtypes=FP32),
        Sample(
            lambda d, x: torch.nn.functional.prelu(
                x if x.dim() == 3 else x[None], torch.linspace(0.1, 0.5, 4, dtype=x.dtype)
            )[0 if x.dim() == 2 else slice(None)],
            layouts=("channel_first",),
            dtypes=FP32,
        ),
    ],
    "glu": [
        Sample(
            lambda d, x: torch.nn.functional.glu(x, d(-1)), layouts=tuple(n for n in STANDARD if n != "channel_first")
        )
    ],
    "fake_quantize_per_channel_affine": [
        Sample(
            lambda d, x: torch.fake_quantize_per_channel_affine(
                x, torch.full((4,), 0.1), torch.zeros(4, dtype=torch.int32), d(1), 0, 255
            ),
            layouts=("sequences", "batch_second"),
            dtypes=FP32,
            grad=False,
        )
    ],
}
