"""How models are split over the tensor, context and expert axes."""

from .collectives import Axis, copy_in, exchange, gather_parts, join, own_randomness, sum_out, take_part
from .linear import split_columns, split_rows
from .packing import PackedShard, packed_parameters, to_rank_order, to_usual_order
from .sequence import apply_context_plan, shard_context, unshard_context
from .tensor import apply_tensor_plan
from .vocabulary import SplitCrossEntropy

__all__ = [
    "Axis",
    "PackedShard",
    "SplitCrossEntropy",
    "apply_context_plan",
    "apply_tensor_plan",
    "copy_in",
    "exchange",
    "gather_parts",
    "join",
    "own_randomness",
    "packed_parameters",
    "shard_context",
    "split_columns",
    "split_rows",
    "sum_out",
    "take_part",
    "to_rank_order",
    "to_usual_order",
    "unshard_context",
]
