"""Samples of Fourier transforms."""

import torch
from tensors.oracle.sample import Sample

FP32 = (torch.float32,)
LAYOUTS = ("sequences", "batch_second", "channel_first", "two_ragged", "single", "equal", "empty_batch")
IMAGES = {"layouts": ("sequences", "single"), "shapes": ((2, 4, 6), (2, 6, 4), (2, 3, 5)), "ragged": (1, 2)}


def one(name, kind="normal"):
    func = getattr(torch.fft, name)
    return [
        Sample(lambda d, x: func(x, dim=d(0)), (kind,), LAYOUTS, FP32, tolerance=1e-4),
        Sample(lambda d, x: func(x, dim=d(-1)), (kind,), LAYOUTS, FP32, tolerance=1e-4),
        Sample(lambda d, x: func(x, n=6, dim=d(0), norm="ortho"), (kind,), LAYOUTS, FP32, tolerance=1e-4),
    ]


def several(name, kind="normal"):
    func = getattr(torch.fft, name)
    return [
        Sample(lambda d, x: func(x, dim=(d(-2), d(-1))), (kind,), dtypes=FP32, tolerance=1e-4, **IMAGES),
        Sample(lambda d, x: func(x, (4, 4), dim=(d(-2), d(-1))), (kind,), dtypes=FP32, tolerance=1e-4, **IMAGES),
    ]


WINDOW = torch.hann_window(8, dtype=torch.float64)


def window(x):
    return WINDOW.to(x.real.dtype if x.is_complex() else x.dtype)


def spectra(shape, dtype):
    return torch.randn(shape, dtype=torch.complex128).to(
        torch.complex128 if dtype == torch.float64 else torch.complex64
    )


SIGNALS = {"shapes": ((20,), (31,), (16,)), "ragged": (0,), "layouts": ("sequences", "single")}

SAMPLES = {
    **{f"fft_{name}": one(name) for name in ("fft", "rfft", "ihfft")},
    **{f"fft_{name}": one(name, "complex") for name in ("ifft", "irfft", "hfft")},
    **{f"fft_{name}{end}": several(f"{name}{end}") for name in ("fft", "rfft", "ihfft") for end in ("2", "n")},
    **{
        f"fft_{name}{end}": several(f"{name}{end}", "complex")
        for name in ("ifft", "irfft", "hfft")
        for end in ("2", "n")
    },
    **{
        f"fft_{func.__name__[4:]}": [Sample(lambda d, x, f=func: f(x, dim=d(0)), layouts=LAYOUTS, dtypes=FP32)]
        for func in (torch.fft.fftshift, torch.fft.ifftshift)
    },
    "stft": [
        Sample(
            lambda d, x: torch.stft(x, 8, 3, window=window(x), return_complex=True),
            dtypes=FP32,
            tolerance=1e-4,
            **SIGNALS,
        )
    ],
    "istft": [
        Sample(
            lambda d, x: torch.istft(x, 8, 3, window=window(x)),
            (spectra,),
            ("sequences", "single"),
            FP32,
            shapes=((5, 6), (5, 9)),
            ragged=(1,),
            tolerance=1e-4,
        )
    ],
    "gradient": [
        Sample(
            lambda d, x: torch.gradient(x, dim=d(0)),
            layouts=("sequences", "single"),
            dtypes=FP32,
            shapes=((3, 4), (5, 4)),
            ragged=(0,),
        ),
        Sample(
            lambda d, x: torch.gradient(x, spacing=0.5, dim=d(1)), layouts=("sequences", "batch_second"), dtypes=FP32
        ),
    ],
}
