"""Schemas of the operators, and the mark by which a compiled library shows that it was built for them; also read by setup.py."""

import hashlib

SCHEMAS = {
    "pad": "(Tensor values, Tensor offsets, Tensor? sizes, SymInt[] max_sizes, Tensor fill) -> Tensor",
    "unpad": "(Tensor padded, Tensor offsets, Tensor? sizes, SymInt rows) -> Tensor",
    "unpad_lengths": "(Tensor padded, Tensor lengths) -> (Tensor, Tensor, SymInt)",
    "pack": "(Tensor[] tensors) -> Tensor",
    "pad_list": "(Tensor[] tensors, SymInt[] max_sizes, Tensor fill) -> Tensor",
    "prefix_lengths": "(Tensor mask) -> Tensor",
    "segment_expand": "(Tensor per_segment, Tensor offsets, SymInt rows) -> Tensor",
    "segment_sum": "(Tensor values, Tensor offsets) -> Tensor",
    "segment_mean": "(Tensor values, Tensor offsets) -> Tensor",
    "segment_max": "(Tensor values, Tensor offsets) -> (Tensor, Tensor)",
    "segment_min": "(Tensor values, Tensor offsets) -> (Tensor, Tensor)",
    "segment_softmax": "(Tensor values, Tensor offsets, bool log) -> Tensor",
    "segment_softmax_backward": "(Tensor grad, Tensor output, Tensor offsets, bool log) -> Tensor",
    "segment_logsumexp": "(Tensor values, Tensor offsets) -> Tensor",
    "segment_cumsum": "(Tensor values, Tensor offsets, bool reverse) -> Tensor",
}

INTERFACE = hashlib.sha256(repr(sorted(SCHEMAS.items())).encode()).hexdigest()[:16]
"""Changes with every schema."""
