"""Gate f: a transformer encoder on a NestedTensor over the same encoder on the padded batch with its mask."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from danling.tensors import NestedTensor
from support.ratios import Board

from .batches import MARKS, jagged, lengths_of, parts_of

pytestmark = MARKS
WIDTH, BATCH, LONGEST = 256, 32, 256


def encoder(fast_path: bool = False) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=fast_path)


def step(model: nn.Module, forward: Callable[[], Tensor]) -> float:
    """Forward, mean square of the real outputs, backward."""
    model.zero_grad(set_to_none=True)
    loss = forward().square().mean()
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("occupancy", [0.2, 0.4, 0.8])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_encoder(board: Board, mode: str, occupancy: float) -> None:
    parts = parts_of(lengths_of(BATCH, LONGEST, occupancy), WIDTH)
    batch, theirs = NestedTensor(parts), jagged(parts)
    padded, mask = batch.tensor_mask
    hidden = ~mask
    model = encoder().train(mode == "train")
    p = batch.occupancy
    limit = 1.15 * p + 0.05
    case = f"encoder, {mode}, occupancy {p:.2f}"
    against = "padded, with key padding mask"
    # torch turns to fused kernels of its own in eval mode without gradients; a padded run is one without them.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        if mode == "eval":
            with torch.no_grad():
                torch.testing.assert_close(
                    model(batch).concat, model(padded, src_key_padding_mask=hidden)[mask], rtol=1e-3, atol=1e-4
                )

                def base() -> Tensor:
                    return model(padded, src_key_padding_mask=hidden)

                quick = encoder(fast_path=True).eval()

                def stock() -> Tensor:
                    torch.backends.mha.set_fastpath_enabled(True)
                    try:
                        return quick(padded, src_key_padding_mask=hidden)
                    finally:
                        torch.backends.mha.set_fastpath_enabled(False)

                board.peer("f", case, "torch's nested fast path", against, stock, base)
                board.peer("f", case, "torch.nested (jagged)", against, lambda: model(theirs), base)
                board.gate("f", case, "NestedTensor", against, limit, lambda: model(batch), base)
            return

        def ours() -> float:
            return step(model, lambda: model(batch).concat)

        def base_step() -> float:
            return step(model, lambda: model(padded, src_key_padding_mask=hidden)[mask])

        torch.testing.assert_close(ours(), base_step(), rtol=1e-3, atol=1e-5)
        board.peer(
            "f", case, "torch.nested (jagged)", against, lambda: step(model, lambda: model(theirs).values()), base_step
        )
        board.gate("f", case, "NestedTensor", against, limit, ours, base_step)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
