"""Samples of convolution, pooling and resampling on signals, images and volumes of different sizes."""

import torch
import torch.nn.functional as F
from tensors.oracle.sample import Sample

FP32 = (torch.float32,)
LAYOUTS = ("sequences", "single", "empty_batch")
SHAPES = {
    1: (((4, 7), (4, 5), (4, 9)), (1,)),
    2: (((4, 6, 7), (4, 8, 5), (4, 6, 7)), (1, 2)),
    3: (((4, 5, 6, 5), (4, 6, 5, 7)), (1, 2, 3)),
}
SHAPE_ONE_RAGGED = (((4, 6, 7), (4, 6, 5)), (2,))


def filters(*shape):
    return torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float64).sin().reshape(shape)


def on(n, call, *kinds, shapes=None, grad=True, tolerance=1e-4):
    sizes, ragged = shapes or SHAPES[n]
    return Sample(
        call, kinds or ("normal",), LAYOUTS, FP32, shapes=sizes, ragged=ragged, grad=grad, tolerance=tolerance
    )


def conv(func, n, out=6, kernel=3, **settings):
    groups = settings.get("groups", 1)
    weight, bias = filters(out, 4 // groups, *[kernel] * n), filters(out)
    return on(n, lambda d, x: func(x, weight.to(x.dtype), bias.to(x.dtype), **settings))


def conv_transpose(func, n, **settings):
    weight, bias = filters(4, 6, *[3] * n), filters(6)
    return on(n, lambda d, x: func(x, weight.to(x.dtype), bias.to(x.dtype), **settings))


def pools(func, n, *args, **settings):
    return on(n, lambda d, x: func(x, *args, **settings), "distinct")


def unpool(pool, func, n, **settings):
    def call(d, x):
        values, indices = pool(x, 2, return_indices=True)
        return func(values, indices, 2, **settings)

    return on(n, call, "distinct")


def grids(shape, dtype):
    return (torch.rand(5, 3, 2, dtype=torch.float64) * 1.6 - 0.8).to(dtype)


def fixed_grid(x):
    return (filters(5, 3, 2) * 0.8).to(x.dtype)


def sample_grid(d, x):
    grid = fixed_grid(x)
    if x.dim() == 4:
        return F.grid_sample(x, grid.expand(len(x), -1, -1, -1), align_corners=False)
    return F.grid_sample(x[None], grid[None], align_corners=False)[0]


SAMPLES = {
    "conv1d": [
        conv(F.conv1d, 1),
        conv(F.conv1d, 1, padding="same"),
        conv(F.conv1d, 1, stride=2, padding=1, dilation=2, groups=2),
        conv(F.conv1d, 1, kernel=1),
        conv(F.conv1d, 1, kernel=8),
    ],
    "conv2d": [conv(F.conv2d, 2), conv(F.conv2d, 2, kernel=1), conv(F.conv2d, 2, stride=(2, 1), padding=(1, 0))],
    "conv3d": [conv(F.conv3d, 3), conv(F.conv3d, 3, padding=1)],
    "conv_transpose1d": [conv_transpose(F.conv_transpose1d, 1, stride=2, output_padding=1)],
    "conv_transpose2d": [conv_transpose(F.conv_transpose2d, 2, stride=(2, 1))],
    "conv_transpose3d": [conv_transpose(F.conv_transpose3d, 3)],
    **{f"avg_pool{n}d": [pools(getattr(F, f"avg_pool{n}d"), n, 2, padding=1)] for n in (1, 2, 3)},
    **{
        f"max_pool{n}d": [
            pools(getattr(F, f"max_pool{n}d"), n, 3, stride=2),
            pools(getattr(F, f"max_pool{n}d"), n, 2, return_indices=True),
        ]
        for n in (1, 2, 3)
    },
    **{f"max_pool{n}d_with_indices": [pools(getattr(F, f"max_pool{n}d_with_indices"), n, 2)] for n in (1, 2, 3)},
    **{f"lp_pool{n}d": [on(n, lambda d, x, n=n: getattr(F, f"lp_pool{n}d")(x, 2, 2), "positive")] for n in (1, 2, 3)},
    **{
        f"adaptive_{kind}_pool{n}d": [
            pools(getattr(F, f"adaptive_{kind}_pool{n}d"), n, 2),
            *([pools(getattr(F, f"adaptive_{kind}_pool{n}d"), n, (None,) + (2,) * (n - 1))] if n > 1 else []),
        ]
        for kind in ("avg", "max")
        for n in (1, 2, 3)
    },
    **{
        f"adaptive_max_pool{n}d_with_indices": [pools(getattr(F, f"adaptive_max_pool{n}d_with_indices"), n, 3)]
        for n in (1, 2, 3)
    },
    **{f"max_unpool{n}d": [unpool(getattr(F, f"max_pool{n}d"), getattr(F, f"max_unpool{n}d"), n)] for n in (1, 2, 3)},
    "fractional_max_pool2d": [],
    "fractional_max_pool3d": [],
    "fractional_max_pool2d_with_indices": [],
    "fractional_max_pool3d_with_indices": [],
    "fold": [
        Sample(
            lambda d, x: F.fold(x, (4, 5), 2),
            layouts=LAYOUTS[:2],
            dtypes=FP32,
            shapes=((8, 12), (8, 12)),
            ragged=(1,),
        )
    ],
    "F.unfold": [
        on(
            2,
            lambda d, x: (
                F.unfold(x, 3, padding=1, stride=2) if x.dim() == 4 else F.unfold(x[None], 3, padding=1, stride=2)[0]
            ),
        )
    ],
    "im2col": [on(2, lambda d, x: torch._C._nn.im2col(x, (2, 2), (1, 1), (0, 0), (1, 1)))],
    "interpolate": [
        on(1, lambda d, x: resize(x, 1, scale_factor=2)),
        on(2, lambda d, x: resize(x, 2, scale_factor=1.5, mode="bilinear")),
        on(2, lambda d, x: resize(x, 2, size=(3, 4), mode="bilinear")),
        on(2, lambda d, x: resize(x, 2, size=5), shapes=SHAPE_ONE_RAGGED),
    ],
    "F.grid_sample": [on(2, sample_grid)],
    "affine_grid": [
        Sample(
            lambda d, x: (
                F.affine_grid(x, [len(x), 1, 3, 4], align_corners=False)
                if x.dim() == 3
                else F.affine_grid(x[None], [1, 1, 3, 4], align_corners=False)[0]
            ),
            layouts=("sequences",),
            dtypes=FP32,
            shapes=((2, 3), (2, 3)),
            ragged=(),
        )
    ],
    "pixel_shuffle": [on(2, lambda d, x: F.pixel_shuffle(x, 2))],
    "pixel_unshuffle": [
        Sample(
            lambda d, x: F.pixel_unshuffle(x, 2),
            layouts=LAYOUTS,
            dtypes=FP32,
            shapes=((3, 4, 6), (3, 2, 4)),
            ragged=(1, 2),
        )
    ],
    "channel_shuffle": [
        on(1, lambda d, x: F.channel_shuffle(x, 2) if x.dim() == 3 else F.channel_shuffle(x[None], 2)[0])
    ],
    "local_response_norm": [
        on(1, lambda d, x: F.local_response_norm(x, 2) if x.dim() == 3 else F.local_response_norm(x[None], 2)[0])
    ],
}


def resize(x, n, **settings):
    return F.interpolate(x, **settings) if x.dim() == n + 2 else F.interpolate(x[None], **settings)[0]


def fractional(n, **settings):
    """Fractional pooling with given random samples, which torch wants per image and channel."""
    func = getattr(F, f"fractional_max_pool{n}d")

    def call(d, x):
        drawn = torch.full((*x.shape[:-n], n), 0.3, dtype=x.dtype)
        return func(x, 2, _random_samples=drawn if x.dim() == n + 2 else drawn[None], **settings)

    return on(n, call, "distinct", grad=n < 3)


for _n in (2, 3):
    SAMPLES[f"fractional_max_pool{_n}d"] = [fractional(_n, output_size=3), fractional(_n, output_ratio=(0.5,) * _n)]
    SAMPLES[f"fractional_max_pool{_n}d_with_indices"] = [fractional(_n, output_size=3, return_indices=True)]
