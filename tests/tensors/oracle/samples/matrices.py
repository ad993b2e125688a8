"""Samples of batched matrix functions, on static and on ragged matrix dims."""

import torch
from tensors.oracle.sample import Sample

FP32 = (torch.float32,)
LAYOUTS = ("sequences", "single", "empty_batch")
STATIC = {"shapes": ((2, 3, 3), (1, 3, 3), (3, 3, 3)), "ragged": (0,)}
SQUARE = {"shapes": ((3, 3), (2, 2), (4, 4)), "ragged": (0, 1)}
TALL = {"shapes": ((5, 2), (3, 2), (4, 2)), "ragged": (0,)}


def full_rank(shape, dtype):
    """Well-conditioned matrices with distinct singular values."""
    if len(shape) < 2:
        return torch.ones(shape, dtype=dtype)  # asked for to learn the dtype
    m, n = shape[-2:]
    noise = torch.randn(shape, dtype=torch.float64) * 0.1
    return (noise + torch.eye(m, n, dtype=torch.float64) * torch.arange(1, n + 1)).to(dtype)


def positive(shape, dtype):
    a = full_rank(shape, torch.float64)
    if len(shape) < 2:
        return a.to(dtype)
    return (a @ a.mT + torch.eye(shape[-1], dtype=torch.float64)).to(dtype)


def triangular(shape, dtype):
    return full_rank(shape, torch.float64).tril().to(dtype) if len(shape) > 1 else full_rank(shape, dtype)


def of(func, *kinds, where=(STATIC, SQUARE), grad=True, isolated=True):
    return [
        Sample(
            lambda d, *xs: func(*xs),
            kinds or (full_rank,),
            LAYOUTS,
            FP32,
            grad,
            isolated=isolated,
            tolerance=2e-4,
            **sizes,
        )
        for sizes in where
    ]


L = torch.linalg


def first(func):
    return lambda x: func(x)[0]


SAMPLES = {
    "det": of(torch.det),
    "logdet": of(torch.logdet, positive),
    "slogdet": of(torch.slogdet),
    "inverse": of(torch.inverse),
    "cholesky": of(torch.cholesky, positive),
    "cholesky_inverse": of(torch.cholesky_inverse, triangular),
    "cholesky_solve": of(torch.cholesky_solve, full_rank, triangular),
    "triangular_solve": of(lambda b, a: torch.triangular_solve(b, a, upper=False)[0], full_rank, triangular),
    "qr": of(lambda x: tuple(torch.qr(x)), where=(STATIC, SQUARE, TALL)),
    "geqrf": of(lambda x: tuple(torch.geqrf(x)), where=(STATIC, TALL), grad=False),
    "orgqr": of(lambda x: torch.orgqr(*torch.geqrf(x)), where=(STATIC, TALL), grad=False),
    "ormqr": of(lambda x, y: torch.ormqr(*torch.geqrf(x), y), full_rank, full_rank, where=(STATIC, SQUARE), grad=False),
    "svd": of(lambda x: torch.svd(x)[1], where=(STATIC, SQUARE, TALL)),
    "pinverse": of(torch.pinverse, where=(STATIC, SQUARE, TALL)),
    "matrix_exp": of(torch.matrix_exp),
    "matrix_power": of(lambda x: torch.matrix_power(x, 3)),
    "lu_solve": of(lambda b, a: torch.lu_solve(b, *torch.linalg.lu_factor(a)), full_rank, full_rank),
    "lu_unpack": of(lambda a: tuple(torch.lu_unpack(*torch.linalg.lu_factor(a)))),
    "frobenius_norm": of(lambda x: torch.frobenius_norm(x, (-2, -1))),
    "nuclear_norm": of(lambda x: torch.nuclear_norm(x, (-2, -1))),
    "linalg_cholesky": of(L.cholesky, positive),
    "linalg_cholesky_ex": of(first(L.cholesky_ex), positive),
    "linalg_cond": of(L.cond),
    "linalg_det": of(L.det),
    "linalg_eig": of(lambda x: L.eig(x)[0].abs(), positive, grad=False),
    "linalg_eigh": of(lambda x: L.eigh(x)[0], positive),
    # Not isolated: torch crashes inside LAPACK on the eigenvalues of a dense matrix with inf.
    "linalg_eigvals": of(lambda x: L.eigvals(x).abs().amax(-1), positive, grad=False, where=(STATIC,), isolated=False),
    "linalg_eigvalsh": of(L.eigvalsh, positive),
    "linalg_householder_product": of(
        lambda x: L.householder_product(*torch.geqrf(x)), where=(STATIC, TALL), grad=False
    ),
    "linalg_inv": of(L.inv),
    "linalg_inv_ex": of(first(L.inv_ex)),
    "linalg_ldl_factor": of(first(L.ldl_factor), positive, grad=False),
    "linalg_ldl_factor_ex": of(first(L.ldl_factor_ex), positive, grad=False),
    "linalg_ldl_solve": of(lambda a, b: L.ldl_solve(*L.ldl_factor(a), b), positive, full_rank, grad=False),
    "linalg_lu": of(lambda x: tuple(L.lu(x))),
    "linalg_lu_factor": of(first(L.lu_factor)),
    "linalg_lu_factor_ex": of(first(L.lu_factor_ex)),
    "linalg_lu_solve": of(lambda a, b: L.lu_solve(*L.lu_factor(a), b), full_rank, full_rank),
    "linalg_matrix_exp": of(L.matrix_exp),
    "linalg_matrix_power": of(lambda x: L.matrix_power(x, 2)),
    "linalg_matrix_rank": of(L.matrix_rank, where=(STATIC, SQUARE, TALL), grad=False),
    "linalg_pinv": of(L.pinv, where=(STATIC, SQUARE, TALL)),
    "linalg_qr": of(lambda x: tuple(L.qr(x)), where=(STATIC, SQUARE, TALL)),
    "linalg_slogdet": of(lambda x: tuple(L.slogdet(x))),
    "linalg_solve": of(L.solve, full_rank, full_rank),
    "linalg_solve_ex": of(lambda a, b: L.solve_ex(a, b)[0], full_rank, full_rank),
    "linalg_solve_triangular": of(lambda a, b: L.solve_triangular(a, b, upper=False), triangular, full_rank),
    "linalg_svd": of(lambda x: L.svd(x)[1], where=(STATIC, SQUARE, TALL)),
    "linalg_svdvals": of(L.svdvals, where=(STATIC, SQUARE, TALL)),
}
